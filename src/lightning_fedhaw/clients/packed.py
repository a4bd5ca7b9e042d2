"""Packed values: plain Python values, tensors and arrays in host memory, of types that any checkpoint may hold."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Packed = Any
"""A number, string, dtype or ``None`` as it is; anything else as a tuple whose first entry says what it is."""

ABSENT: Packed = ("absent",)
"""The packed value of an attribute that does not exist."""

SCALARS = (int, float, complex, bool, str, bytes, type(None), torch.dtype)
"""The types of values that are packed as they are."""

_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {"dict": dict, "OrderedDict": OrderedDict}
_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float}


class NotPlainError(TypeError):
    """A value cannot be packed, because it is of another type or holds such a value."""


def pack(value: Any) -> Packed:
    """Copy a value into host memory.

    Raises:
        NotPlainError: If it is of a type whose objects cannot be copied without knowing the type.
    """
    kind = type(value)
    if kind in SCALARS:
        return value
    if isinstance(value, Tensor) and kind in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
        return "tensor", value.detach().to("cpu", copy=True), value.device.type != "cpu"
    if isinstance(value, np.ndarray) and kind is np.ndarray and value.dtype.kind in "biufc":
        return "array", torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return "scalar", value.item(), value.dtype.name
    if kind is deque:
        return "deque", list(map(pack, value)), value.maxlen
    if kind is defaultdict:
        name = getattr(value.default_factory, "__name__", None)
        if _FACTORIES.get(str(name)) is not value.default_factory:
            raise NotPlainError("defaultdict")
        return "defaultdict", _packed_items(value), name
    if kind in (dict, OrderedDict, Counter):
        return kind.__name__, _packed_items(value)
    if kind in (set, frozenset):
        # In an order that does not depend on the history of the set.
        return kind.__name__, list(map(pack, sorted(value, key=repr)))
    if kind is torch.device:
        return "device", str(value), value.type != "cpu"
    if kind in (list, tuple, torch.Size):
        return kind.__name__, list(map(pack, value))
    raise NotPlainError(kind.__name__)


def unpack(packed: Packed, device: torch.device) -> Any:
    """Make a value from what :func:`pack` returned.

    Args:
        packed: The packed value; not :data:`ABSENT`.
        device: The device of tensors that were not in host memory.
    """
    if not isinstance(packed, tuple):
        return packed
    kind = packed[0]
    content = packed[1]
    if kind == "tensor":
        return content.to(device if packed[2] else "cpu", copy=True)
    if kind == "device":
        return device if packed[2] else torch.device(content)
    if kind == "array":
        return content.numpy().copy()
    if kind == "scalar":
        return np.dtype(packed[2]).type(content)
    if kind in _SEQUENCES:
        items = [unpack(item, device) for item in content]
        if kind == "deque":
            return deque(items, packed[2])
        return _SEQUENCES[kind](items)
    pairs = [(unpack(key, device), unpack(value, device)) for key, value in content]
    if kind == "defaultdict":
        return defaultdict(_FACTORIES[packed[2]], pairs)
    if kind == "Counter":
        return Counter(dict(pairs))
    return _MAPPINGS[kind](pairs)


def are_same(first: Packed, second: Packed) -> bool:
    """Return whether two packed values are of the same types and hold the same numbers, NaN included."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        # As bytes, in which NaN equals NaN.
        return torch.equal(_bytes(first), _bytes(second))
    if type(first) is not type(second):
        return False
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(are_same, first, second))
    # NaN is the number that differs from itself.
    are_both_nan = first != first and second != second
    return bool(first is second or first == second or are_both_nan)


def nbytes(packed: Packed) -> int:
    """Return the memory of the tensors and items of a packed value, in bytes."""
    if isinstance(packed, Tensor):
        return packed.numel() * packed.element_size()
    if isinstance(packed, (tuple, list)):
        return 8 + sum(map(nbytes, packed))
    return 8


def _packed_items(mapping: Any) -> list[tuple[Packed, Packed]]:
    return [(pack(key), pack(value)) for key, value in mapping.items()]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
