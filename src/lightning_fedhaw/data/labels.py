"""The labels of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fedhaw.isolation import isolated_randomness

_INTEGER_KINDS = "iub"
"""NumPy's codes of the dtypes whose values can be class numbers: signed, unsigned and boolean."""

_TEXT_KINDS = "UO"
"""NumPy's codes of the dtypes that can hold strings: fixed-width text, and objects."""


def find_labels(dataset: Dataset[object], labels: object | Callable[[Any], object] = None) -> Tensor | None:
    """Find the integer label of every sample, if the data set has labels.

    The sources are tried in this order: ``labels``; the second tensor of a ``TensorDataset``; an attribute ``targets``
    or ``labels`` of the data set; the latter two also inside of ``Subset`` and ``ConcatDataset``. If none of them has
    labels, the second item of the samples is taken, if it is an integer: this reads **every sample of the data set
    once**, transforms included, so give ``labels`` where that is slow. The global random states do not change.

    Args:
        dataset: A map-style data set.
        labels: Labels ``[samples]``, integers or strings, as an array, tensor or list; or a callable that takes the
            data set and returns them. Strings are numbered in sorted order.

    Returns:
        Labels, int64 ``[samples]`` on the CPU; None if none were given and none were found.

    Raises:
        TypeError: If ``labels`` are neither integers nor strings.
        ValueError: If the number of ``labels`` is not the number of samples.
    """
    if labels is not None:
        values = labels(dataset) if callable(labels) else labels
        return _checked_labels(values, len(cast(Sized, dataset)))
    labels_in_memory = stored_labels(dataset)
    if labels_in_memory is not None:
        return labels_in_memory
    return _read_labels(dataset)


def stored_labels(dataset: object) -> Tensor | None:
    """Find the labels that a data set stores, without reading a sample.

    Returns:
        Labels, int64 ``[samples]`` on the CPU; None if the data set stores none.
    """
    if isinstance(dataset, Subset):
        labels = stored_labels(dataset.dataset)
        if labels is None:
            return None
        return labels[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return _labels_of_members(dataset)
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            return None
        return _integer_labels(dataset.tensors[1], len(dataset))
    if isinstance(dataset, Sized):
        return _labels_of_attributes(dataset)
    return None


def _labels_of_members(dataset: ConcatDataset[object]) -> Tensor | None:
    """Concatenate the stored labels of all members; None if any member stores none."""
    labels_of_members = []
    for member in dataset.datasets:
        labels = stored_labels(member)
        if labels is None:
            return None
        labels_of_members.append(labels)
    return torch.cat(labels_of_members)


def _labels_of_attributes(dataset: Sized) -> Tensor | None:
    """Take the labels from the attributes by which torchvision's data sets store them."""
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is None:
            continue
        labels = _integer_labels(values, len(dataset))
        if labels is not None:
            return labels
    return None


def _read_labels(dataset: Dataset[object]) -> Tensor | None:
    """Read the second item of every sample; None as soon as one is not an integer."""
    if not isinstance(dataset, Sized) or not hasattr(type(dataset), "__getitem__"):
        return None
    labels: list[int] = []
    # Random transforms draw while samples are read; reading labels must not change what training draws later.
    with isolated_randomness(torch.device("cpu")):
        for index in range(len(dataset)):
            label = _label_of_sample(dataset[index])
            if label is None:
                return None
            labels.append(label)
    if not labels:
        return None
    return torch.tensor(labels, dtype=torch.int64)


def _label_of_sample(sample: object) -> int | None:
    """Take the second item of a sample; None if there is none, or it is not an integer."""
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        return None
    array = _to_numpy(sample[1])
    if array.ndim == 0 and array.dtype.kind in _INTEGER_KINDS:
        return int(array)
    return None


def _checked_labels(values: object, num_samples: int) -> Tensor:
    """Convert the labels that a user gave to int64 ``[num_samples]``, or refuse them."""
    array = _vector(values)
    if array is None:
        raise ValueError(
            f"`labels` must have one entry per sample ({num_samples}), got shape {list(np.shape(cast(Any, values)))}."
        )
    if len(array) != num_samples:
        raise ValueError(f"`labels` must have one entry per sample ({num_samples}), got {len(array)}.")
    # An array of objects may hold strings, or a mixture of which no classes can be made.
    if array.dtype.kind in _TEXT_KINDS and all(isinstance(value, str) for value in array):
        array = np.unique(array, return_inverse=True)[1]
    if array.dtype.kind not in _INTEGER_KINDS:
        raise TypeError(
            f"`labels` must be integers or strings, got dtype {array.dtype}; for a split by classes number the classes,"
            " for a split without labels use `IIDPartitioner()`."
        )
    return torch.from_numpy(array.astype(np.int64))


def _integer_labels(values: object, num_samples: int) -> Tensor | None:
    """Convert values to int64 ``[num_samples]``; None if they are not one integer per sample."""
    array = _vector(values)
    if array is None or len(array) != num_samples or array.dtype.kind not in _INTEGER_KINDS:
        return None
    return torch.from_numpy(array.astype(np.int64))


def _vector(values: object) -> NDArray[Any] | None:
    """Convert values to an array ``[n]``; None if they have any other shape than ``[n]`` or ``[n, 1]``."""
    try:
        array = _to_numpy(values)
    except ValueError:  # a ragged list
        return None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        return None
    return array


def _to_numpy(values: object) -> NDArray[Any]:
    """Convert values to an array, also a tensor that requires gradients or lies on another device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values)
