"""The frozen tensors of a module, which no client may change unless they travel as buffers do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedhaw.vectors.layout import ParameterLayout

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by their bytes."""


class _Mark(NamedTuple):
    """A frozen tensor as it was before a client trained.

    Attributes:
        name: Its name in the module.
        tensor: The tensor.
        version: How often it was changed in place.
        pointer: The address of its memory.
        content: The sum of its bits; ``None`` if it is not compared.
    """

    name: str
    tensor: Tensor
    version: int
    pointer: int
    content: Tensor | None

    def is_changed(self) -> bool:
        """Return whether the tensor was changed since."""
        if self.tensor._version != self.version or _pointer(self.tensor) != self.pointer:
            return True
        return self.content is not None and not torch.equal(_content(self.tensor), self.content)


class FrozenTensors:
    """The frozen tensors that are not exchanged, so that a change would pass to the next client that trains.

    Versions rise with every change in place, so no values have to be copied. A change through ``tensor.data`` in place
    leaves the version as it was. The contents are therefore compared, too, but only for the first client of a fit,
    because that takes time.

    Args:
        module: The user's module.
        layout: Its tensors that are exchanged.
        compares_content: Whether the contents are compared after the first client.
    """

    def __init__(self, module: nn.Module, layout: ParameterLayout, *, compares_content: bool) -> None:
        self._compares_content = compares_content
        self.marks = []
        for name, tensor in layout.frozen_tensors(module).items():
            content = _content(tensor) if compares_content else None
            self.marks.append(_Mark(name, tensor, tensor._version, _pointer(tensor), content))

    def check(self, client: int) -> None:
        """Refuse to continue when a client has changed what is frozen.

        Raises:
            RuntimeError: Naming the first tensor, and a remedy for all.
        """
        changed = [mark for mark in self.marks if mark.is_changed()]
        if not changed:
            if self._compares_content:
                self._compares_content = False
                self.marks = [mark._replace(content=None) for mark in self.marks]
            return
        first = changed[0]
        kind = "parameter" if isinstance(first.tensor, nn.Parameter) else "buffer"
        patterns = covering_patterns(_names(changed), _names(self.marks))
        policies = ", ".join(f'"{pattern}": "average"' for pattern in patterns)
        raise RuntimeError(
            f"Client {client} changed the frozen {kind} `{first.name}` in local training. Frozen tensors are not sent"
            " to the server, so the change would pass to the next client that trains. If the step moves it on purpose,"
            f" as that of a momentum teacher does, let it travel as buffers do: `buffers={{{policies}}}`."
        )


def covering_patterns(changed: Sequence[str], frozen: Collection[str]) -> list[str]:
    """Return few patterns that match the names of changed tensors, and no other frozen ones.

    Args:
        changed: The names of the changed tensors.
        frozen: The names of all frozen tensors.

    Example:
        >>> covering_patterns(["teacher.weight", "teacher.bias"], ["net.weight", "teacher.weight", "teacher.bias"])
        ['teacher.*']
    """
    untouched = set(frozen) - set(changed)
    patterns: dict[str, None] = {}
    for name in changed:
        layers = name.split(".")
        pattern = name
        # From the outermost layer on, so that the first pattern that fits is the shortest.
        for depth in range(1, len(layers)):
            prefix = ".".join(layers[:depth]) + "."
            if not any(untouched_name.startswith(prefix) for untouched_name in untouched):
                pattern = f"{prefix}*"
                break
        patterns[pattern] = None
    return list(patterns)


def _names(marks: Iterable[_Mark]) -> list[str]:
    return [mark.name for mark in marks]


def _pointer(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 for one that is not in one piece, such as a sparse tensor."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _content(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers, which almost every change changes."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.zeros((), dtype=torch.int64)
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    # In their own type, whose overflow does no harm, because a conversion takes twenty times as long.
    return bits.sum(dtype=bits.dtype)
