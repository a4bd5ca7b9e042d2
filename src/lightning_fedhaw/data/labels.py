"""Where a data set keeps its labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fedhaw.isolation import isolated_randomness


def find_labels(dataset: Dataset[Any], labels: Any | Callable[[Any], Any] = None) -> Tensor | None:
    """The integer label of every sample, if the data set has such a thing.

    In this order: what the caller says; the second tensor of a ``TensorDataset``; an attribute ``targets`` or
    ``labels``; both also inside ``Subset`` and ``ConcatDataset``. Failing that, the second item of the samples, if it
    is an integer: this reads **every sample of the data set once**, transforms included, so give ``labels`` where that
    is slow. Torch's global random state is as before afterwards.

    Args:
        dataset: A map-style data set.
        labels: Labels ``[samples]``, integers or strings, as an array, tensor or list; or a callable that takes the
            data set and returns them. Strings are numbered in sorted order.

    Returns:
        Labels, int64 ``[samples]`` on the CPU; None if none were given and none found.

    Raises:
        TypeError: If the labels given are neither integers nor strings.
        ValueError: If there are not as many labels given as samples.
    """
    if labels is not None:
        return _given(labels(dataset) if callable(labels) else labels, len(dataset))  # type: ignore[arg-type]
    stored = stored_labels(dataset)
    return _read(dataset) if stored is None else stored


def _given(values: Any, num_samples: int) -> Tensor:
    array = _array(values)
    if array is None or len(array) != num_samples:
        raise ValueError(
            f"`labels` must have one entry per sample ({num_samples}), got"
            f" {f'shape {list(np.shape(values))}' if array is None else len(array)}."
        )
    if array.dtype.kind in "UO" and all(isinstance(value, str) for value in array):
        array = np.unique(array, return_inverse=True)[1]
    if array.dtype.kind not in "iub":
        raise TypeError(
            f"`labels` must be integers or strings, got dtype {array.dtype}; for a split by classes number the classes,"
            " for a split without labels use `IIDPartitioner()`."
        )
    return torch.from_numpy(array.astype(np.int64))


def stored_labels(dataset: Any) -> Tensor | None:
    """Labels that can be had without reading a sample."""
    if isinstance(dataset, Subset):
        whole = stored_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored_labels(part) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[1], len(dataset)) if len(dataset.tensors) > 1 else None
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(dataset, "__len__"):
            found_here = _integers(values, len(dataset))
            if found_here is not None:
                return found_here
    return None


def _read(dataset: Any) -> Tensor | None:
    """The second item of every sample; None as soon as one is not an integer."""
    if not (hasattr(dataset, "__len__") and hasattr(type(dataset), "__getitem__")):
        return None
    labels: list[int] = []
    # Random transforms draw while samples are read; looking at labels must not change what training draws later.
    with isolated_randomness(torch.device("cpu")):
        for i in range(len(dataset)):
            label = _second_integer(dataset[i])
            if label is None:
                return None
            labels.append(label)
    return torch.tensor(labels, dtype=torch.int64) if labels else None


def _second_integer(sample: Any) -> int | None:
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        return None
    array = np.asarray(sample[1].cpu() if isinstance(sample[1], Tensor) else sample[1])
    return int(array) if array.ndim == 0 and array.dtype.kind in "iub" else None


def _integers(values: Any, num_samples: int) -> Tensor | None:
    array = _array(values)
    if array is None or len(array) != num_samples or array.dtype.kind not in "iub":
        return None
    return torch.from_numpy(array.astype(np.int64))


def _array(values: Any) -> np.ndarray[Any, Any] | None:
    """The values as an array of shape [n]; None if they have another shape or none."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError:  # a ragged list
        return None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return array if array.ndim == 1 else None
