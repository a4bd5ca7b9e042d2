"""Messages between server and sites: named arrays and one text, which any engine can carry."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple}


@dataclass(frozen=True)
class Message:
    """A message in either direction.

    Attributes:
        arrays: The tensors by name; bfloat16 as the int16 with the same bits.
        text: Everything else, as JSON.
        error: Why there is no content, in one sentence; empty if all is well.
    """

    arrays: Mapping[str, Array] = field(default_factory=dict)
    text: str = "{}"
    error: str = ""

    @property
    def num_bytes(self) -> int:
        """The bytes of the arrays, which are what a run counts."""
        return sum(array.nbytes for array in self.arrays.values())


def packed(content: Mapping[str, Any]) -> Message:
    """Pack plain values, tensors, and lists, tuples and dictionaries of these, to a message.

    Raises:
        TypeError: If a value is of another type.
    """
    arrays: dict[str, Array] = {}
    tree = {name: _flat(value, name, arrays) for name, value in content.items()}
    return Message(arrays, json.dumps(tree))


def merged(first: Message, second: Message) -> Message:
    """Return a message with the contents of two, which have different names."""
    return Message({**first.arrays, **second.arrays}, json.dumps({**json.loads(first.text), **json.loads(second.text)}))


def unpacked(message: Message) -> dict[str, Any]:
    """Return the content of a message.

    Raises:
        ValueError: If it is no message of :func:`packed`.
    """
    try:
        tree = json.loads(message.text)
        return {name: _whole(value, message.arrays) for name, value in tree.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its message cannot be read ({type(error).__name__}: {error})") from error


def _flat(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """Return a value as JSON has it, with its tensors among the arrays.

    Args:
        value: The value.
        name: The path to it, under which a tensor is stored.
        arrays: Gets the tensors.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        arrays[name] = _array(value)
        # The type, because numpy has none for bfloat16.
        return ["tensor", name, str(value.dtype).removeprefix("torch.")]
    if isinstance(value, np.generic):
        return _flat(value.item(), name, arrays)
    if kind.__name__ in _SEQUENCES and isinstance(value, (list, tuple)):
        items = [_flat(item, f"{name}/{index}", arrays) for index, item in enumerate(value)]
        return [kind.__name__, items]
    if kind.__name__ in _MAPPINGS and isinstance(value, dict):
        entries = []
        for key, item in value.items():
            if type(key) not in (int, str):
                raise TypeError(f"`{name}` has the key {key!r}, and messages have texts and whole numbers as keys.")
            entries.append([key, _flat(item, f"{name}/{key}", arrays)])
        return [kind.__name__, entries]
    raise TypeError(
        f"`{name}` is a {kind.__name__}, and messages hold tensors, numbers, texts, lists and dictionaries."
    )


def _whole(value: Any, arrays: Mapping[str, Array]) -> Any:
    """Return what :func:`_flat` was given."""
    if not isinstance(value, list):
        return value
    kind = value[0]
    if kind == "tensor":
        return _tensor(arrays[value[1]], value[2])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_whole(item, arrays) for item in value[1]])
    return _MAPPINGS[kind]({key: _whole(item, arrays) for key, item in value[1]})


def _array(tensor: Tensor) -> Array:
    """Copy a tensor to an array with the same bits."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: Array = tensor.numpy()
    return array


def _tensor(array: Array, dtype: str) -> Tensor:
    """Make a tensor from an array with the same bits.

    Raises:
        ValueError: If the array is of another type.
    """
    # A copy, because an engine may lend memory that cannot be written.
    tensor = torch.from_numpy(np.array(array, order="C"))
    expected = getattr(torch, dtype)
    if expected == torch.bfloat16:
        tensor = tensor.view(torch.bfloat16)
    if tensor.dtype != expected:
        raise ValueError(f"an array is {tensor.dtype}, and should be {expected}")
    return tensor
