"""Samples with numbers, by which parameters of a sample find their client."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fedhaw import arguments


class NumberedDataset(Dataset[Any]):
    """A data set whose samples end with their number.

    Args:
        dataset: A map-style data set.
        first: The number of the first sample.
    """

    def __init__(self, dataset: Any, first: int) -> None:
        self.dataset = dataset
        self.first = first

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self.dataset[index]
        parts = sample if isinstance(sample, (tuple, list)) else (sample,)
        return (*parts, self.first + index)


def with_indices(dataset: Any) -> Any:
    """Return a data set whose samples end with their number, for :class:`~lightning_fedhaw.bilevel.SampleWeights`.

    A sample that is no tuple, such as a dictionary, becomes the pair of itself and its number. The numbers stay when
    the result is split by ``Subset`` or ``random_split``.

    Args:
        dataset: A map-style data set, or a list with one for each client, whose samples are counted on from client to
            client. A ``TensorDataset`` stays one, so that batches are made as fast as before.

    Example:
        >>> with_indices(TensorDataset(torch.zeros(5, 2)))[3]
        (tensor([0., 0.]), tensor(3))
    """
    # A list of samples is a data set; a list of data sets is one for each client.
    is_list = isinstance(dataset, (list, tuple)) and all(isinstance(own, Dataset) for own in dataset)
    if not is_list:
        return _counted(dataset, 0)
    first = 0
    numbered: list[Any] = []
    for own in dataset:
        numbered.append(_counted(own, first))
        first += len(own)
    return numbered


def _counted(dataset: Any, first: int) -> Any:
    """Return a data set whose samples end with their number, counted from the first one's."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise arguments.invalid("dataset", "a map-style data set, or a list of these", dataset)
    if type(dataset) is not TensorDataset:
        return NumberedDataset(dataset, first)
    numbered = TensorDataset(*dataset.tensors, torch.arange(first, first + len(dataset)))
    # Of the type itself and not a subclass, which may change samples, so that batches are slices of the tensors.
    vars(numbered)["unnumbered"] = dataset
    return numbered


def unnumbered(dataset: Any) -> Any:
    """Return the data set that :func:`with_indices` was given; ``None`` for any other one."""
    if isinstance(dataset, NumberedDataset):
        return dataset.dataset
    if type(dataset) is TensorDataset:
        return vars(dataset).get("unnumbered")
    return None


def has_numbers(dataset: object) -> bool:
    """Return whether the last element of every sample is the number that :func:`with_indices` gave it."""
    if isinstance(dataset, Subset):
        return has_numbers(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(has_numbers(member) for member in dataset.datasets)
    return unnumbered(dataset) is not None


def sample_numbers(dataset: Any) -> Tensor:
    """Return the number of each sample, int64 ``[samples]``: its position, if :func:`with_indices` gave it none."""
    if not has_numbers(dataset):
        return torch.arange(len(dataset))
    if isinstance(dataset, Subset):
        return sample_numbers(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([sample_numbers(member) for member in dataset.datasets])
    if isinstance(dataset, NumberedDataset):
        return torch.arange(dataset.first, dataset.first + len(dataset))
    numbers: Tensor = dataset.tensors[-1]
    return numbers.cpu()
