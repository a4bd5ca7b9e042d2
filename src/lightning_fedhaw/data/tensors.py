"""Data sets that are tensors in memory, whose batches can be sliced instead of fetched sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset


def tensors_of(dataset: Dataset[Any]) -> tuple[Tensor, ...] | None:
    """Find the tensors behind a data set whose samples are their rows; ``None`` if it is something else.

    A subclass is something else, since it may change its samples.
    """
    if type(dataset) is TensorDataset:
        return dataset.tensors
    if type(dataset) is Subset:
        return _chosen_rows(dataset)
    if type(dataset) is ConcatDataset:
        return _joined(dataset)
    return None


def _chosen_rows(dataset: Subset[Any]) -> tuple[Tensor, ...] | None:
    whole = tensors_of(dataset.dataset)
    if whole is None:
        return None
    index = torch.as_tensor(dataset.indices, dtype=torch.int64)
    return tuple(tensor[index.to(tensor.device)] for tensor in whole)


def _joined(dataset: ConcatDataset[Any]) -> tuple[Tensor, ...] | None:
    parts = []
    signatures = set()
    for member in dataset.datasets:
        tensors = tensors_of(member)
        if tensors is None:
            return None
        parts.append(tensors)
        signatures.add(tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors))
    if len(signatures) != 1:
        return None
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
