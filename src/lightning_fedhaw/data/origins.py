"""Where the samples of a data set come from, through the subsets and concatenations that it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_fedhaw.data.numbered import unnumbered

Origins = dict[int, tuple[Any, Tensor]]
"""Data sets that hold the samples themselves, by their ``id``, each with the indices of the samples in it."""


def origins(dataset: Dataset[Any], indices: Tensor) -> Origins:
    """Find the data sets that hold some samples.

    Args:
        dataset: A map-style data set.
        indices: int64 ``[samples]``, the samples in it.
    """
    if isinstance(dataset, Subset):
        return origins(dataset.dataset, torch.as_tensor(dataset.indices, dtype=torch.int64)[indices])
    if unnumbered(dataset) is not None:
        return origins(unnumbered(dataset), indices)
    if not isinstance(dataset, ConcatDataset):
        return {id(dataset): (dataset, indices)}
    found: Origins = {}
    begin = 0
    for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
        inside = indices[(indices >= begin) & (indices < end)] - begin
        begin = end
        if not len(inside):
            continue
        for key, (source, samples) in origins(part, inside).items():
            if key in found:
                samples = torch.cat([found[key][1], samples])
            found[key] = (source, samples)
    return found


def count_shared(first: Dataset[Any], first_indices: Tensor, second: Dataset[Any], second_indices: Tensor) -> int:
    """Count the samples of one data set that are samples of another one, where both are made of the same data set.

    Args:
        first: A map-style data set.
        first_indices: int64, samples in it.
        second: Another data set, or the same one.
        second_indices: int64, samples in it, which are counted.
    """
    sources = origins(first, first_indices)
    shared = 0
    for key, (_, samples) in origins(second, second_indices).items():
        if key in sources:
            shared += int(torch.isin(samples, sources[key][1]).sum())
    return shared
