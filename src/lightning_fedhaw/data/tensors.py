"""Data sets that are tensors in memory, whose batches can be sliced instead of fetched sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset


def tensors_of(dataset: Dataset[object]) -> tuple[Tensor, ...] | None:
    """Find the tensors whose rows are the samples of a data set.

    They are found in a ``TensorDataset``, also inside of ``Subset`` and ``ConcatDataset``.

    Returns:
        The tensors, each ``[samples, ...]``; ``None`` for any other data set.
    """
    # Types are compared exactly: a subclass may change the samples that it returns.
    if type(dataset) is TensorDataset:
        return dataset.tensors
    if type(dataset) is Subset:
        return _rows_of_subset(dataset)
    if type(dataset) is ConcatDataset:
        return _concatenated(dataset)
    return None


def _rows_of_subset(dataset: Subset[object]) -> tuple[Tensor, ...] | None:
    """Select the rows of a subset."""
    tensors = tensors_of(dataset.dataset)
    if tensors is None:
        return None
    index = torch.as_tensor(dataset.indices, dtype=torch.int64)
    return tuple(tensor[index.to(tensor.device)] for tensor in tensors)


def _concatenated(dataset: ConcatDataset[object]) -> tuple[Tensor, ...] | None:
    """Concatenate the tensors of all members, if they agree in shape, dtype and device."""
    tensors_of_members = []
    signatures = set()
    for member in dataset.datasets:
        tensors = tensors_of(member)
        if tensors is None:
            return None
        tensors_of_members.append(tensors)
        signatures.add(tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors))
    if len(signatures) != 1:
        return None
    return tuple(torch.cat(columns) for columns in zip(*tensors_of_members, strict=True))
