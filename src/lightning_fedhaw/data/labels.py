"""The labels of a data set, and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from numbers import Integral
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fedhaw.data.numbered import has_numbers, unnumbered
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.user_functions import called

_INTEGER_KINDS = "iub"
"""NumPy's codes of the dtypes whose values can be class numbers: signed, unsigned and boolean."""

_BULK_SIZE = 1024
"""Samples that are read at a time from a data set that takes lists of indices."""

_Values = NDArray[Any]
"""One label per sample, ``[samples]``: int64, or strings."""


class ClassLabels(NamedTuple):
    """The label of every sample.

    Attributes:
        labels: int64 ``[samples]`` on the CPU.
        names: The name of each class, by number, where labels are strings; None where they are integers.
    """

    labels: Tensor
    names: tuple[str, ...] | None = None


def find_labels(dataset: Dataset[object], labels: object | Callable[[Any], object] = None) -> Tensor | None:
    """Find the integer label of every sample, if the data set has labels.

    The sources are tried in this order: ``labels``; the second tensor of a ``TensorDataset``; an attribute ``targets``
    or ``labels`` of the data set; the latter two also inside of ``Subset`` and ``ConcatDataset``. Such an attribute
    holds integers, or the names of classes: strings, each of which occurs twice on average or more often, so that file
    names are no classes. If none of them has labels, the second item of the samples is taken, if it is an integer: this
    reads **every sample of the data set once**, transforms included, so give ``labels`` where that is slow. The global
    random states do not change.

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
    classes = find_classes(dataset, labels)
    if classes is None:
        return None
    return classes.labels


def find_classes(
    dataset: Dataset[object], labels: object | Callable[[Any], object] = None, *, bulk: bool = False
) -> ClassLabels | None:
    """Find the label of every sample and the names of the classes, as :func:`find_labels` does.

    Args:
        dataset: A map-style data set.
        labels: Labels ``[samples]``, or a callable that takes the data set and returns them.
        bulk: Whether the data set takes lists of indices instead of single ones.
    """
    if labels is not None:
        if callable(labels):
            labels = called("labels", labels, dataset)
        return _numbered(_checked_values(labels, len(cast(Sized, dataset))))
    stored = stored_classes(dataset)
    if stored is not None:
        return stored
    labels_of_samples = _read_in_bulk(dataset) if bulk else _read_one_by_one(dataset)
    if labels_of_samples is None:
        return None
    return ClassLabels(labels_of_samples)


def stored_classes(dataset: object) -> ClassLabels | None:
    """Find the labels that a data set stores, without reading a sample; None if it stores none."""
    values = _stored_values(dataset)
    if values is None:
        return None
    return _numbered(values)


def _numbered(values: _Values) -> ClassLabels:
    """Number strings in sorted order, and keep them as names; integers are labels as they are."""
    if values.dtype.kind in _INTEGER_KINDS:
        return ClassLabels(torch.from_numpy(values.astype(np.int64)))
    names, numbers = np.unique(values, return_inverse=True)
    return ClassLabels(torch.from_numpy(numbers.astype(np.int64)), tuple(str(name) for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# Labels that a data set stores
# ---------------------------------------------------------------------------------------------------------------------


def _stored_values(dataset: object) -> _Values | None:
    """Find the labels that a data set stores, as it stores them."""
    if isinstance(dataset, Subset):
        values = _stored_values(dataset.dataset)
        if values is None:
            return None
        return values[np.asarray(list(dataset.indices), dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return _values_of_members(dataset)
    if unnumbered(dataset) is not None:
        # The number of a sample is no label.
        return _stored_values(unnumbered(dataset))
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            return None
        return _integers(_vector(dataset.tensors[1], len(dataset)))
    if isinstance(dataset, Sized):
        return _values_of_attributes(dataset)
    return None


def _values_of_members(dataset: ConcatDataset[object]) -> _Values | None:
    """Concatenate the stored labels of all members; None if any member stores none, or only some store strings."""
    values_of_members = []
    for member in dataset.datasets:
        values = _stored_values(member)
        if values is None:
            return None
        values_of_members.append(values)
    # Joined before they are numbered, so that a name has the same number in all members.
    if len({values.dtype.kind in _INTEGER_KINDS for values in values_of_members}) > 1:
        return None
    return np.concatenate(values_of_members)


def _values_of_attributes(dataset: Sized) -> _Values | None:
    """Take the labels from the attributes by which torchvision's data sets store them."""
    for name in ("targets", "labels"):
        stored = getattr(dataset, name, None)
        if stored is None:
            continue
        array = _vector(stored, len(dataset))
        values = _integers(array)
        if values is None:
            values = _class_names(array)
        if values is not None:
            return values
    return None


def _class_names(array: _Values | None) -> _Values | None:
    """Return strings that can be names of classes; None for anything else, such as the names of files."""
    strings = _strings(array)
    if strings is None:
        return None
    # Paths of masks and captions are stored under the same attributes, and differ from sample to sample.
    if 2 * len(set(strings.tolist())) > len(strings):
        return None
    return strings


# ---------------------------------------------------------------------------------------------------------------------
# Labels in samples
# ---------------------------------------------------------------------------------------------------------------------


def _read_one_by_one(dataset: Dataset[object]) -> Tensor | None:
    """Read the second item of every sample; None as soon as one is not an integer."""
    if not isinstance(dataset, Sized) or not hasattr(type(dataset), "__getitem__"):
        return None
    labels: list[int] = []
    are_numbered = has_numbers(dataset)
    # Random transforms draw while samples are read; reading labels must not change what training draws later.
    with isolated_randomness(torch.device("cpu")):
        for index in range(len(dataset)):
            # The number of a sample is no label.
            label = _label_of(_second_item(dataset[index], 3 if are_numbered else 2))
            if label is None:
                return None
            labels.append(label)
    if not labels:
        return None
    return torch.tensor(labels, dtype=torch.int64)


def _read_in_bulk(dataset: Dataset[object]) -> Tensor | None:
    """Read the second item of all samples, many at a time; None as soon as it is not one integer per sample."""
    labels = []
    num_samples = len(cast(Sized, dataset))
    with isolated_randomness(torch.device("cpu")):
        for start in range(0, num_samples, _BULK_SIZE):
            indices = list(range(start, min(start + _BULK_SIZE, num_samples)))
            values = _integers(_vector(_second_item(dataset[indices]), len(indices)))
            if values is None:
                return None
            labels.append(torch.from_numpy(values))
    if not labels:
        return None
    return torch.cat(labels)


def _second_item(sample: object, num_items: int = 2) -> object:
    """Take the second item of a sample; None if it has fewer items than that."""
    if not isinstance(sample, (tuple, list)) or len(sample) < num_items:
        return None
    return cast(object, sample[1])


def _label_of(value: object) -> int | None:
    """Convert one integer to Python's own; None for anything else, such as a box, a mask, a list or a text."""
    # Only numbers and arrays are converted: nested lists of unequal lengths make no array.
    if isinstance(value, Integral):
        return int(value)
    if not hasattr(value, "__array__"):
        return None
    array = _to_numpy(value)
    if array is not None and array.ndim == 0 and array.dtype.kind in _INTEGER_KINDS:
        return int(array)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------


def _checked_values(values: object, num_samples: int) -> _Values:
    """Convert the labels that a user gave to integers or strings ``[num_samples]``, or refuse them."""
    array = _vector(values)
    if array is None:
        raise ValueError(f"`labels` must have one entry per sample ({num_samples}), got shape {list(_shape(values))}.")
    if len(array) != num_samples:
        raise ValueError(f"`labels` must have one entry per sample ({num_samples}), got {len(array)}.")
    for checked in (_integers(array), _strings(array)):
        if checked is not None:
            return checked
    raise TypeError(
        f"`labels` must be integers or strings, got dtype {array.dtype}; for a split by classes number the classes,"
        " for a split without labels use `IIDPartitioner()`."
    )


def _integers(array: _Values | None) -> _Values | None:
    """Convert an array to int64; None if its values are not integers."""
    if array is None:
        return None
    # A nullable column of pandas is an array of objects.
    is_boxed = array.dtype.kind == "O" and all(isinstance(value, Integral) for value in array)
    if array.dtype.kind in _INTEGER_KINDS or is_boxed:
        return array.astype(np.int64)
    return None


def _strings(array: _Values | None) -> _Values | None:
    """Return an array of strings; None if any of its values is something else."""
    if array is None or array.dtype.kind not in "UOT":
        return None
    if not all(isinstance(value, str) for value in array):
        return None
    return array


def _vector(values: object, length: int | None = None) -> _Values | None:
    """Convert values to an array ``[n]``.

    Args:
        values: Anything.
        length: The number of values that are needed.

    Returns:
        The array; None if the values are no array, have any other shape than ``[n]`` or ``[n, 1]``, or another length.
    """
    array = _to_numpy(values)
    if array is None:
        return None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or length not in (None, len(array)):
        return None
    return array


def _to_numpy(values: object) -> _Values | None:
    """Convert values to an array, also a tensor that requires gradients or lies on another device.

    Returns:
        The array; None if there is none, as for a ragged list, or for a dtype that only torch has.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None


def _shape(values: object) -> Sequence[int]:
    """Return the shape of values that are no vector; without one, as that of a ragged list, the number of entries."""
    array = _to_numpy(values)
    if array is not None:
        return array.shape
    return [len(values)] if isinstance(values, Sized) else []
