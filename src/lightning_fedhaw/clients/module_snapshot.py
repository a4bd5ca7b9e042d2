"""The state of a module that an evaluation changes, put back as often as clients are evaluated."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.vectorized.fingerprint import MAX_BYTES, Fingerprint, Fingerprints, is_plain_object
from lightning_fedhaw.clients.vectorized.snapshot import Attributes
from lightning_fedhaw.clients.vectorized.tracing import is_users_class


class ModuleSnapshot:
    """The modes, buffers, metrics and other attributes of a module, its layers and its classes.

    Numbers, containers, tensors, arrays, metrics and objects of the user's classes are restored to their content,
    nested ones too. Objects of other libraries are not: they may hold threads, files or connections. Neither are large
    tensors and arrays, of which a copy may not fit into memory. :meth:`restore` says which of these have changed.

    Args:
        module: The user's module.
        moving: The names of frozen parameters that a step moves, which are restored like buffers.
    """

    def __init__(self, module: nn.Module, moving: Sequence[str] = ()) -> None:
        self._holders: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for submodule in module.modules():
            for kind in ("_parameters", "_buffers", "_modules"):
                holder = vars(submodule)[kind]
                self._holders.append((holder, dict(holder)))
        tensors = [*module.buffers(), *(module.get_parameter(name) for name in moving)]
        self._buffers = [(tensor, tensor.detach().clone()) for tensor in tensors]
        is_restorable = _restorable_objects(module)
        self._unrestorable = list(_unrestorable_values(module, is_restorable))
        large = []
        for unrestorable in self._unrestorable:
            if isinstance(unrestorable.value, Tensor):
                large.append(unrestorable.value)
        self._attributes = Attributes(module, globals_too=False, looks_into=is_restorable, left_out=large)

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back, to evaluate the next client."""
        for holder, content in self._holders:
            if holder.keys() != content.keys() or any(holder[name] is not content[name] for name in content):
                holder.clear()
                holder.update(content)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        self._attributes.put_back()

    def restore(self) -> list[str]:
        """Put everything back, at the end.

        Returns:
            The attributes that have changed and cannot be put back, as ``self.name``.
        """
        self.put_back()
        return [value.name for value in self._unrestorable if value.is_changed()]


@dataclass(frozen=True)
class _UnrestorableValue:
    """An attribute whose content is not restored.

    Attributes:
        name: Its name in the user's code.
        value: Its value.
        fingerprint: That of its content.
    """

    name: str
    value: Any
    fingerprint: Fingerprint

    def is_changed(self) -> bool:
        """Return whether its content was changed."""
        return _fingerprint_of(self.value) != self.fingerprint


def _fingerprint_of(value: object) -> Fingerprint:
    if isinstance(value, np.ndarray) and not isinstance(value, np.memmap) and not value.dtype.hasobject:
        # A large array, of whose content other fingerprints know nothing. A file is not read for it.
        return zlib.crc32(np.ascontiguousarray(value).data.cast("B"))
    return Fingerprints(()).of(value)


def _restorable_objects(module: nn.Module) -> Callable[[object], bool]:
    """Return a function that says whether an object's attributes are restored.

    They are for classes of the user's, and for those of the package that the module's own class is from.
    """
    packages = set()
    for base in type(module).__mro__:
        package = base.__module__.split(".")[0]
        if package not in ("lightning", "pytorch_lightning", "lightning_fabric", "torch", "torchmetrics", "builtins"):
            packages.add(package)

    def is_restorable(value: object) -> bool:
        if not is_plain_object(value):
            return False
        kind = type(value)
        return kind is SimpleNamespace or is_users_class(kind) or kind.__module__.split(".")[0] in packages

    return is_restorable


def _unrestorable_values(module: nn.Module, is_restorable: Callable[[object], bool]) -> Iterator[_UnrestorableValue]:
    """Yield the attributes of a module and its layers whose content can be compared, but is not restored."""
    for path, submodule in module.named_modules():
        if isinstance(submodule, Metric):
            continue
        for name, value in vars(submodule).items():
            # The trainer and Lightning's own objects are no part of the module.
            if name in ("_trainer", "_fabric", "log"):
                continue
            if isinstance(value, dict) and not value:
                # As most dictionaries of hooks are, a dozen in every layer. One that is filled is emptied again.
                continue
            is_large = isinstance(value, (Tensor, np.ndarray)) and value.nbytes > MAX_BYTES
            is_foreign = is_plain_object(value) and not isinstance(value, (Metric, Tensor, np.ndarray))
            if is_large or (is_foreign and not is_restorable(value)):
                # The module itself has no path.
                qualified_name = ".".join(filter(None, ("self", path, name)))
                yield _UnrestorableValue(qualified_name, value, _fingerprint_of(value))
