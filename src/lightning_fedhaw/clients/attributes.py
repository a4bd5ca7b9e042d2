"""Attributes of the module that local training changes: each client keeps its own values.

Numbers, strings, tensors, arrays and containers of them count (a hidden state, a counter, a cache). Parameters, buffers
and metrics are treated elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Number
from operator import is_
from types import FunctionType
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_fedhaw.clients.packed import ABSENT, NotPlainError, Packed, are_same, nbytes, pack, unpack
from lightning_fedhaw.clients.watch import MISSING, Watched, Watcher, refill

MEMORY_TO_WARN_OF = 1 << 30
"""The memory of clients' attributes, in bytes, from which on a run says what needs it."""


class Gain(NamedTuple):
    """What a client has added to an attribute, so that it can be shown together with what others have added.

    Attributes:
        kind: ``"items"`` appended to a list, ``"members"`` of a set, ``"entries"`` of a dict, or a ``"number"``.
        value: The packed items, members or number; or the gain of each entry, by packed key.
    """

    kind: str
    value: Any


class Change(NamedTuple):
    """A client's change of an attribute.

    Attributes:
        value: The packed value after training.
        gain: What was added; ``None`` if the value was changed in another way.
    """

    value: Packed
    gain: Gain | None


Changes = Mapping[str, Change]
"""A client's changes, by the attribute's name after ``self``."""


class AttributeState(NamedTuple):
    """The attributes that clients keep, between two rounds.

    Attributes:
        kept: Each client's own packed values, by name.
        first: The packed values that clients without own ones start from, where the module shows others.
        shown: The packed values that the last round left in the module.
    """

    kept: dict[int, dict[str, Packed]]
    first: dict[str, Packed]
    shown: dict[str, Packed]


class ClientAttributes:
    """The attributes of the module that clients keep from round to round, and those that the module shows in between.

    Args:
        module: The user's module.
        device: The device of the model.

    Attributes:
        state: What is kept between rounds.
        pending: The changes of this process's clients in the round, whose update was received.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.state = AttributeState({}, {}, {})
        self.pending: dict[int, Changes] = {}
        self._watcher: Watcher | None = None
        # By layer and name; from the end of training on, with what the round shows.
        self._begin: dict[str, dict[str, Watched]] = {}
        self._replaced: dict[str, Watched | None] = {}
        self._loaded: dict[str, Watched] = {}
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ while clients train

    def begin(self) -> None:
        """Begin a round: what the module holds now is what a client's training starts from.

        A value that code has changed since the last round replaces those that clients have kept.
        """
        if self._watcher is None:
            self._watcher = Watcher(self.module)
        replaced = []
        for name, shown in self.state.shown.items():
            if not are_same(shown, self._packed(name)):
                replaced.append(name)
        if replaced:
            values_of_clients = {}
            for client, values in self.state.kept.items():
                values_of_clients[client] = _without(values, replaced)
            first = _without(self.state.first, replaced)
            self.state = AttributeState(values_of_clients, first, _without(self.state.shown, replaced))
        self._begin = self._watcher.watch_all()
        self._loaded = {}

    def load(self, client: int) -> None:
        """Give the module the values that a client starts from."""
        self.restore()
        for name, value in {**self.state.first, **self.state.kept.get(client, {})}.items():
            self._put(name, value)
            present = self._holder(name).get(_last(name), MISSING)
            assert self._watcher is not None
            self._loaded[name] = self._watcher.watch(present)

    def changes(self) -> Changes:
        """Return what training has changed since :meth:`load`."""
        assert self._watcher is not None
        changes = {}
        for path, begin in self._begin.items():
            holder = self._watcher.holders[path]
            for name in [*begin, *self._watcher.added(path, begin)]:
                full_name = _join(path, name)
                start = self._loaded.get(full_name) or begin.get(name) or Watched(MISSING)
                present = holder.get(name, MISSING)
                if start.is_changed(present):
                    change = self._change(full_name, start, present)
                    if change is not None:
                        changes[full_name] = change
        return changes

    def _change(self, name: str, start: Watched, present: object) -> Change | None:
        """Pack a change; ``None``, with a warning, if the value cannot be kept."""
        if isinstance(present, (type, FunctionType)):
            # What a step looks up lazily is no state: the next client's step looks it up again.
            return None
        try:
            return Change(_packed_value(present), _gain(start.value, present, start.items()))
        except NotPlainError as error:
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"`self.{name}` is changed in local training, and cannot be kept for each client, because it is or"
                    f" holds a {error}. Every client starts from its value at the beginning of the round. Numbers,"
                    " strings, tensors, arrays, and lists, tuples, dicts, sets and deques of them are kept."
                )
        return None

    def restore(self) -> None:
        """Put the module's attributes back: to what they were when the round began, or to what it shows at its end."""
        if self._watcher is None:
            return
        for path, begin in self._begin.items():
            holder = self._watcher.holders[path]
            for name, watched in begin.items():
                if holder.get(name, MISSING) is not watched.value:
                    holder[name] = watched.value
                for content in watched.contents:
                    content.restore()
            for name in self._watcher.added(path, begin):
                del holder[name]
        self._loaded = {}

    # ------------------------------------------------------------------ the end of a round

    def finish(self, pending: Mapping[int, Changes]) -> None:
        """Keep the values of a round's clients, and show in the module what they have changed.

        Args:
            pending: The changes of all clients whose update was received, on any process.
        """
        if not any(pending.values()):
            return
        clients = sorted(pending)
        values_of_clients = dict(self.state.kept)
        first = dict(self.state.first)
        shown = dict(self.state.shown)
        changes_of_names: dict[str, list[Change]] = {}
        for client in clients:
            # A new dictionary: the undo of the round puts the earlier one back.
            values = dict(values_of_clients.get(client, {}))
            for name, change in pending[client].items():
                values[name] = change.value
                changes_of_names.setdefault(name, []).append(change)
            values_of_clients[client] = values
        for name, changes in changes_of_names.items():
            earlier = self._packed(name)
            if len(clients) == 1:
                self._put(name, changes[0].value)
            else:
                self._show(name, [change.gain for change in changes])
            shown[name] = self._packed(name)
            if not are_same(earlier, shown[name]):
                first.setdefault(name, earlier)
            self._replace_begin(name)
        self.state = AttributeState(values_of_clients, first, shown)
        self._warn_of_memory(len(clients), changes_of_names)

    def _replace_begin(self, name: str) -> None:
        """Let :meth:`restore` put back the value that an attribute has now."""
        path = name.rpartition(".")[0]
        if self._watcher is None or path not in self._begin:
            return
        begin = self._begin[path]
        self._replaced[name] = begin.pop(_last(name), None)
        if _last(name) in self._holder(name):
            begin[_last(name)] = self._watcher.watch(self._holder(name)[_last(name)])

    def _show(self, name: str, gains: Sequence[Gain | None]) -> None:
        """Show together what several clients have added to an attribute."""
        present = self._holder(name).get(_last(name), MISSING)
        value = _with_gains(present, gains, self.device)
        if value is not MISSING:
            self._holder(name)[_last(name)] = value

    def _warn_of_memory(self, clients: int, names: Mapping[str, Sequence[Change]]) -> None:
        """Say once which attribute needs much memory."""
        for name, changes in names.items():
            size = max(nbytes(change.value) for change in changes)
            total = size * len(self.state.kept)
            if total > MEMORY_TO_WARN_OF and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"`self.{name}` is changed in local training, so each client keeps its own:"
                    f" {total / 2**30:.1f} GiB of host memory for {len(self.state.kept)} clients. If no step reads it"
                    " in a later round, do not store it in the module."
                )

    # ------------------------------------------------------------------ undo and checkpoints

    def snapshot(self) -> AttributeState:
        """Return the state before a round, which :meth:`undo` takes."""
        self._begin = {}
        self._replaced = {}
        self.pending = {}
        return self.state

    def undo(self, state: AttributeState) -> None:
        """Undo a round that failed."""
        for name, watched in self._replaced.items():
            begin = self._begin[name.rpartition(".")[0]]
            begin.pop(_last(name), None)
            if watched is not None:
                begin[_last(name)] = watched
        self._replaced = {}
        self.restore()
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with the values that the module shows now."""
        present = {}
        for name in self.state.shown:
            present[name] = self._packed(name)
        return {**self.state._asdict(), "present": present}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint, and give the module the values that it showed then."""
        self.state = AttributeState(dict(state["kept"]), dict(state["first"]), dict(state["shown"]))
        for name, value in state["present"].items():
            self._put(name, value)

    # ------------------------------------------------------------------ the module

    def _holder(self, name: str) -> dict[str, Any]:
        return vars(self.module.get_submodule(name.rpartition(".")[0]))

    def _packed(self, name: str) -> Packed:
        """Pack an attribute as it is; as if it were absent, where it cannot be packed."""
        try:
            return _packed_value(self._holder(name).get(_last(name), MISSING))
        except NotPlainError:
            return ABSENT

    def _put(self, name: str, packed: Packed) -> None:
        """Give the module a value; a container of the same type remains the same object."""
        holder = self._holder(name)
        if packed == ABSENT:
            holder.pop(_last(name), None)
            return
        value = unpack(packed, self.device)
        present = holder.get(_last(name))
        if type(present) is type(value) and isinstance(value, (list, deque, dict, set)):
            refill(present, value)
        else:
            holder[_last(name)] = value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _without(values: Mapping[str, Packed], names: Sequence[str]) -> dict[str, Packed]:
    remaining = dict(values)
    for name in names:
        remaining.pop(name, None)
    return remaining


def _packed_value(value: object) -> Packed:
    return ABSENT if value is MISSING else pack(value)


def _is_number(value: object) -> bool:
    """Return whether a value is a real number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, Number) and not isinstance(value, (bool, complex))


def _gain(start: object, end: object, items: Mapping[int, Any]) -> Gain | None:
    """Return what was added to a value; ``None`` if it was changed in another way.

    Args:
        start: The value before.
        end: The value after.
        items: The items before, of all containers in it, by the identity of the container.
    """
    earlier_items = items.get(id(start), ())
    if isinstance(end, (list, deque)):
        present = list(end)
        # The very objects, as a list of tensors cannot be compared by `==`.
        if len(present) < len(earlier_items) or not all(map(is_, present, earlier_items)):
            return None
        return Gain("items", list(map(pack, present[len(earlier_items) :])))
    if isinstance(end, set):
        # Sorted, because the order of a set may differ between processes.
        return Gain("members", list(map(pack, sorted(end - set(earlier_items), key=repr))))
    if isinstance(end, dict):
        entries = []
        for key, value in end.items():
            earlier = dict(earlier_items).get(key, MISSING)
            gain = None
            if value is not earlier or id(value) in items:
                gain = _gain(earlier, value, items)
            if gain is not None:
                entries.append((pack(key), gain))
        return Gain("entries", entries)
    if _is_number(end):
        return Gain("number", pack(end))
    return None


def _with_gains(value: Any, gains: Sequence[Gain | None], device: torch.device) -> Any:
    """Return a value together with what several clients have added to it.

    Args:
        value: The value before the round.
        gains: What each client has added.
        device: The device of the model.

    Returns:
        The value itself, if it is a container, or if what they did cannot be shown together.
    """
    kinds = set()
    contents = []
    for gain in gains:
        if gain is None:
            return value
        kinds.add(gain.kind)
        contents.append(gain.value)
    if len(kinds) != 1:
        return value
    kind = kinds.pop()
    if kind == "number":
        return _mean([unpack(content, device) for content in contents])
    if kind == "entries":
        return _with_entries(value, contents, device)
    added = []
    for content in contents:
        for item in content:
            added.append(unpack(item, device))
    if kind == "items":
        if not isinstance(value, (list, deque)):
            value = []
        value.extend(added)
        return value
    if not isinstance(value, set):
        value = set()
    value.update(added)
    return value


def _with_entries(value: Any, contents: Sequence[Any], device: torch.device) -> Any:
    """Return a dict together with what several clients have added to its entries."""
    if not isinstance(value, dict):
        value = {}
    gains: dict[Any, list[Gain]] = {}
    for entries in contents:
        for key, gain in entries:
            gains.setdefault(unpack(key, device), []).append(gain)
    for key, gains_of_key in gains.items():
        grown = _with_gains(value.get(key, MISSING), gains_of_key, device)
        if grown is not MISSING:
            value[key] = grown
    return value


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, of the type of the first; a float if whole numbers have none that is whole."""
    first = values[0]
    if isinstance(first, Tensor):
        mean = torch.stack([torch.as_tensor(value).double().reshape(()).cpu() for value in values]).mean()
        dtype = first.dtype
        if not dtype.is_floating_point and not float(mean).is_integer():
            dtype = torch.get_default_dtype()
        return mean.to(first.device, dtype).reshape(first.shape)
    average = sum(float(value) for value in values) / len(values)
    if isinstance(first, int) and average.is_integer():
        return int(average)
    return average
