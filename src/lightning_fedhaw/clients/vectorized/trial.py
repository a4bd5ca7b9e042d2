"""Finds out whether a module's step is a function, so that many clients can be trained in one batched computation."""

from __future__ import annotations

import dis
import gc
import inspect
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.plugins import DoublePrecision, Precision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import Dataset
from torchmetrics import Metric

from lightning_fedhaw import streams
from lightning_fedhaw.clients.engine import LocalPlan, give_settings, settings_of, states_of
from lightning_fedhaw.clients.records import LogRecorder, NotAFunctionError, StackRecorder
from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, ClientDropout, EmbeddingGuard
from lightning_fedhaw.clients.vectorized.optimizers import row_states
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.streams import seed_of, stream
from lightning_fedhaw.vectors.layout import ParameterLayout

# The standard library's folder too, which holds that of installed packages as a rule.
_LIBRARIES = tuple(str(Path(m.__file__ or "").parent) for m in (torch, lightning, torchmetrics, streams, dis))

FEW = 8
"""Samples a client that are enough to compare: float64 is slow on many devices."""

TOLERANCE = 1e-4
"""How far a value may be from the one that a client alone gives, as a share of the largest in its tensor."""

NEGLIGIBLE = 1e-6
"""A gradient below this share of the largest one is zero but for rounding, as of a bias before a normalization."""

NOTHING = 1e-9
"""A loss, a buffer or a logged value below this is zero but for rounding."""

NOISE_MARGIN = 8.0
"""How many times the rounding noise that was measured a float32 value may be off."""

MOST_NOISE = 5e-3
"""With more rounding noise than this share of the largest value, float32 cannot tell a wrong value from a right one."""

Values = dict[str, Tensor | None]
"""What one client's step gives, by name: loss, gradients, buffers, logged values."""


@dataclass(frozen=True)
class Facts:
    """What the vectorized engine must know of a step.

    Attributes:
        row_states: Names of the optimiser's states that have the parameter's shape.
        uses_index: Whether the step looks at ``batch_idx``.
        draws_dropout: Whether it asks for dropout.
        draws_other: Whether it draws other random numbers, which are then equal per engine only.
        is_compared: Whether its values could be held against those of a client alone.
        bytes_per_client: Memory that one client more takes.
        frozen: Frozen parameters that the step computes with.
    """

    row_states: frozenset[str]
    uses_index: bool
    draws_dropout: bool
    draws_other: bool
    is_compared: bool
    bytes_per_client: int
    frozen: int


class NoFunctionError(Exception):
    """Why a step is not a function, as a sentence."""


def probe(
    host: Host,
    layout: ParameterLayout,
    data: ClientData,
    plan: LocalPlan,
    objectives: Sequence[ClientObjective] = (),
) -> Facts:
    """Try a module's step on two clients at once, and hold it against each client alone. The module is left as it was.

    Raises:
        NoFunctionError: If it is not a function, saying why and where.
    """
    step = f"`{type(host.module).__name__}.training_step`"
    if host.obstacle is not None:
        raise NoFunctionError(f"{step} {host.obstacle}")
    if not data.is_sliced:
        raise NoFunctionError(
            f"the data set {type(data.dataset).__name__} is not tensors in memory (a `TensorDataset` with the default"
            " `collate_fn`)"
        )
    try:
        rows = row_states(host.optimizers[0], states_of(host.optimizers[0]))
    except ValueError as error:
        raise NoFunctionError(f"the optimiser {error}") from error
    uses_index = _looks_at_index(host.module.training_step)
    kept = _Kept(host.module, host.optimizers, layout)
    with isolated_randomness(host.device), _no_collection():
        try:
            return _Trial(host, layout, data, plan, objectives, kept).facts(rows, uses_index)
        except NoFunctionError as error:
            raise NoFunctionError(f"{step} {error}") from error
        finally:
            kept.restore()


class _Trial:
    """A step of two clients with different models, buffers and data."""

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective],
        kept: _Kept,
    ) -> None:
        self.host, self.layout, self.objectives, self.kept = host, layout, objectives, kept
        self.parameters = layout.tensors(host.module)
        start = layout.read(self.parameters)
        noise = torch.randn(2, layout.numel, generator=stream(plan.seed, "probe"), dtype=torch.float64)
        self.vectors = [layout.rounded(start + 0.01 * each.to(start)) for each in noise]
        self.seeds = [seed_of(plan.seed, "probe", row) for row in (0, 1)]
        sizes = data.num_examples
        large = int(sizes.argmax())
        own = data.train_indices[large]
        self.batch_size = min(data.settings.batch_size, len(own))
        samples = torch.stack([own[: self.batch_size], own.flip(0)[: self.batch_size]])
        self.batch = data.gather(samples)
        self.states = [
            {n: torch.stack([v, v]).to(host.device) for n, v in o.client_state(large, layout.views(start)).items()}
            for o in objectives
        ]
        self.starts = {n: v.expand(2, *v.shape) for n, v in layout.views(start).items()}
        self.dtype: torch.dtype | None = None
        self.activations = 0
        self.frozen: dict[Tensor, int] = {}

    def facts(self, rows: frozenset[str], uses_index: bool) -> Facts:
        """Try the step, and say what it needs.

        Args:
            rows: Names of the optimizer's states that have the parameter's shape.
            uses_index: Whether the step looks at ``batch_idx``.

        Raises:
            NoFunctionError: If the step cannot be batched.
        """
        for row in (0, 1):
            self._try_alone(row)
        dropout = ClientDropout()
        draws_other = self._try_together(dropout)
        is_compared = self._compare(draws_other)
        return Facts(
            row_states=rows,
            uses_index=uses_index,
            draws_dropout=dropout.calls > 0,
            draws_other=draws_other,
            is_compared=is_compared,
            bytes_per_client=self._bytes(len(rows)),
            frozen=sum(self.frozen.values()),
        )

    def _try_alone(self, row: int) -> None:
        """Run the step for one client, and refuse what it leaves behind."""
        seed_randomness(self.seeds[row], self.host.device)
        drawn = _foreign_randomness()
        try:
            self._alone(row, self._measured())
        except Exception as error:
            raise NoFunctionError(explained(error)) from error
        if what := self.kept.changed():
            raise NoFunctionError(what + self._line_that(lambda: self.kept.changed() is not None))
        if _foreign_randomness() != drawn:
            drawn = _foreign_randomness()
            line = self._line_that(lambda: _foreign_randomness() != drawn)
            raise NoFunctionError(f"draws from NumPy's or Python's random numbers, once for all clients{line}")

    def _try_together(self, dropout: ClientDropout) -> bool:
        """Run the step for both clients at once; whether it draws random numbers other than dropout's."""
        self.kept.restore()
        seed_randomness(self.seeds[0], self.host.device)
        before = _torch_randomness(self.host.device)
        try:
            self._together(dropout)
        except Exception as error:
            raise NoFunctionError(explained(error)) from error
        if what := self.kept.changed():
            raise NoFunctionError(what)
        return not torch.equal(before, _torch_randomness(self.host.device))

    def _alone(self, row: int, around: AbstractContextManager[Any]) -> Values:
        """One client in the module itself: everything that a step gives.

        Args:
            row: Which of the two.
            around: Is entered around the call of ``training_step``.
        """
        self.kept.restore()
        host = self.host
        self.layout.write(self.vectors[row], self.parameters)
        self.kept.mark()
        data = self._prepared([tensor[row].clone() for tensor in self.batch])
        with LogRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            arguments = host.arguments(data, 0)
            with host.step_context(), around:
                output = host.module.training_step(*arguments)
            loss, _ = loss_of(output)
            if loss is None:
                raise RuntimeError("`training_step` returned None")
            named = dict(zip(self.layout.names, self.parameters, strict=True))
            starts = {n: v[row] for n, v in self.starts.items()}
            states = [{n: v[row] for n, v in state.items()} for state in self.states]
            terms = Terms(self.objectives, named, starts, states)
            loss = terms.added_to(loss, terms.open)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            logged = {
                f"logged `{name}`": torch.tensor([float(v) for v in values], dtype=torch.float64)
                for name, (_, values, _) in recorder._entries.items()
            }
        gradients = dict(zip((f"the gradient of `{n}`" for n in self.layout.names), found, strict=True))
        buffers = {f"buffer `{n}`": b.detach().clone() for n, b in self.layout.moving_buffers(host.module).items()}
        return {"the loss": loss.detach().reshape(()), **gradients, **buffers, **logged}

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Note what the forward pass saves for the backward pass, and which frozen parameters it computes with."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def called(module: nn.Module, _: Any) -> None:
            own = module.parameters(recurse=False)
            self.frozen.update({p: p.numel() for p in own if not p.requires_grad})

        with (
            register_module_forward_pre_hook(called),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            yield
        self.activations = sum(saved.values())

    def _together(self, dropout: ClientDropout, same_draws: bool = False) -> list[Values]:
        """Both clients at once, the same."""
        host, layout = self.host, self.layout
        stacks = [
            view.to(parameter.dtype).requires_grad_()
            for view, parameter in zip(layout.views(torch.stack(self.vectors)).values(), self.parameters, strict=True)
        ]
        buffers = [torch.stack([b, b]) for b in layout.moving_buffers(host.module).values()]
        dropout.generators = self._generators()
        with StackRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            step = BatchedStep(host, layout, self.objectives, recorder, dropout, same_draws)
            data = self._prepared([tensor.clone() for tensor in self.batch])
            with EmbeddingGuard():
                losses, replaced, logged = step(stacks, buffers, data, 0, self.starts, self.states)
            assert losses is not None
            found = torch.autograd.grad(losses.sum(), [*stacks, *self.parameters], allow_unused=True)
            for name, gradient in zip(layout.names, found[len(stacks) :], strict=True):
                if gradient is not None:
                    raise NotAFunctionError(
                        f"reaches the parameter `{name}` through a list or an object that holds it, and not through the"
                        " module"
                    )
            recorder.put(torch.arange(2), logged)
            values = {f"logged `{n}`": torch.stack([s for _, s, _ in calls]) for n, calls in recorder._calls.items()}
        for i, value in replaced:
            buffers[i] = value
        return [
            {
                "the loss": losses[row].detach(),
                **{
                    f"the gradient of `{n}`": None if g is None else g[row]
                    for n, g in zip(layout.names, found[: len(stacks)], strict=True)
                },
                **{f"buffer `{n}`": b[row] for n, b in zip(step.buffer_names, buffers, strict=True)},
                **{name: stack[:, row].detach() for name, stack in values.items()},
            }
            for row in (0, 1)
        ]

    def _prepared(self, data: list[Tensor]) -> list[Tensor]:
        """A batch as ``training_step`` is given it, in the precision that is computed in at the moment."""
        prepared: list[Tensor] = self.host.prepare(data)
        return prepared if self.dtype is None else [_cast(tensor, self.dtype) for tensor in prepared]

    def _generators(self) -> list[torch.Generator]:
        """One generator for the dropout masks of each of the two clients."""
        return [torch.Generator(self.host.device).manual_seed(seed) for seed in self.seeds]

    def _compare(self, draws_other: bool) -> bool:
        """Hold both clients at once against each alone, with the same masks and the same other random numbers.

        In float64, where rounding is many orders of magnitude below the tolerance: what differs there is another
        computation. A few samples are enough, unless the step takes full batches only. A step that cannot be run in
        float64 is compared in float32, beside its own rounding noise.

        Returns:
            False if that is not possible, because a batched call cannot give clients the same random numbers.

        Raises:
            NoFunctionError: If a value differs, or the step cannot be run in either precision.
        """
        for precision, dtype, size in (
            (DoublePrecision(), torch.float64, min(FEW, self.batch_size)),
            (DoublePrecision(), torch.float64, self.batch_size),
            (Precision(), torch.float32, self.batch_size),
        ):
            self.kept.restore()
            try:
                with self._computing_in(precision, dtype, size):
                    alone = [self._alone_with_masks(row) for row in (0, 1)]
                    noise = [self._noise(row, alone[row]) if dtype == torch.float32 else {} for row in (0, 1)]
                    self.kept.restore()
                    seed_randomness(self.seeds[0], self.host.device)
                    together = self._together(ClientDropout(), same_draws=True)
            except Exception as error:
                # Whatever the user's code raises in a precision that is not its own is no reason to refuse it yet.
                failure = error
                continue
            for row in (0, 1):
                self._check_equal(together[row], alone[row], noise[row])
            return True
        if draws_other and "same randomness" in str(failure):
            return False
        raise NoFunctionError(f"cannot be compared in float64 or float32: it {explained(failure)}") from failure

    @contextmanager
    def _computing_in(self, precision: Precision, dtype: torch.dtype, size: int) -> Iterator[None]:
        """Run the module in another precision for a while, on the first samples of each client's batch."""
        given = self.vectors, self.starts, self.states, self.batch, self.batch_size
        tensors = [*self.host.module.parameters(), *self.host.module.buffers()]
        before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
        self.dtype = dtype
        self.vectors = [vector.to(dtype) for vector in self.vectors]
        self.starts = {name: _cast(value, dtype) for name, value in self.starts.items()}
        self.states = [{name: _cast(value, dtype) for name, value in state.items()} for state in self.states]
        self.batch = [tensor[:, :size] for tensor in self.batch]
        self.batch_size = size
        try:
            for tensor, data in before:
                tensor.data = data.to(dtype)
            with self.host.computing_in(precision):
                yield
        finally:
            self.dtype = None
            self.vectors, self.starts, self.states, self.batch, self.batch_size = given
            for tensor, data in before:
                tensor.data = data

    def _alone_with_masks(self, row: int) -> Values:
        """One client alone, with the dropout masks and other random numbers that it is given beside the other one."""
        seed_randomness(self.seeds[0], self.host.device)
        dropout = ClientDropout()
        dropout.generators = self._generators()[row : row + 1]
        return self._alone(row, dropout)

    def _noise(self, row: int, values: Values) -> dict[str, float]:
        """How far each value moves when every parameter is rounded another way."""
        unit = 2.0**-24 if self.host.device.type == "cpu" else 2.0**-11  # where convolutions may be computed in TF32
        given = self.vectors[row]
        moved = dict.fromkeys(values, 0.0)
        for draw in range(4):
            generator = stream(self.seeds[row], "rounding", draw)
            signs = torch.randint(2, given.shape, generator=generator).mul_(2).sub_(1).to(given)
            self.vectors[row] = given * (1 + unit * signs)
            for name, value in self._alone_with_masks(row).items():
                before = values[name]
                if value is not None and before is not None and value.shape == before.shape:
                    distance = (value.double() - before.double()).nan_to_num().abs()
                    moved[name] = max(moved[name], float(distance.max()) if distance.numel() else 0.0)
        self.vectors[row] = given
        return moved

    def _check_equal(self, together: Values, alone: Values, noise: Mapping[str, float]) -> None:
        """Refuse a step that gives one of two clients something else than alone.

        Raises:
            NoFunctionError: Naming the first value that differs.
        """
        gradients = [name for name in alone if name.startswith("the gradient")]
        largest = max(_largest(alone[name]) for name in gradients)
        for name in {**together, **alone}:
            floor = NEGLIGIBLE * largest if name in gradients else NOTHING
            allowed = TOLERANCE * _largest(alone.get(name)) + floor
            rounding = NOISE_MARGIN * noise.get(name, 0.0)
            if rounding > MOST_NOISE * max(_largest(alone.get(name)), largest if name in gradients else 0.0) + floor:
                raise NoFunctionError(
                    f"cannot be run in float64, and in float32 the rounding noise of {name} is too large to compare"
                    f" two clients at once with each alone{self._step_line()}"
                )
            if not _agree(together.get(name), alone.get(name), allowed + rounding):
                raise NoFunctionError(
                    f"gives another value of {name} for two clients at once than alone{self._step_line()}"
                )

    def _step_line(self) -> str:
        """Where ``training_step`` is written, in brackets."""
        step = self.host.module.training_step
        if not hasattr(step, "__code__"):
            return ""
        return f" ({inspect.getsourcefile(step)}:{step.__code__.co_firstlineno})"

    def _line_that(self, changed: Callable[[], bool]) -> str:
        """The line of the user's code after which something has changed, found by running the step again."""
        self.kept.restore()
        finder = _LineFinder(changed)
        self._alone(0, finder)
        return f" ({finder.found})" if finder.found else ""

    def _bytes(self, states: int) -> int:
        layout = self.layout
        # A client's parameters, their copy where rows are picked, gradients, states of the optimiser.
        copies = (3 + max(states, 1)) * layout.message_bytes
        buffers = 2 * sum(b.numel() * b.element_size() for b in layout.moving_buffers(self.host.module).values())
        batch = 2 * sum(t[0].numel() * t.element_size() for t in self.batch)
        terms = sum(v[0].numel() * v.element_size() for state in self.states for v in state.values())
        # Backward holds about as much again as forward saved.
        total: int = copies + 2 * layout.numel * layout.dtype.itemsize + buffers + batch + terms + 2 * self.activations
        return total


class _Kept:
    """What a module holds beside parameters and buffers, to see what a step changes, and to put it back."""

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], layout: ParameterLayout) -> None:
        self.module = module
        self.tensors = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
        self.frozen = [(n, t, t._version) for n, t in layout.still_tensors(module).items()]
        self.trainable = [(n, p, p.requires_grad) for n, p in module.named_parameters()]
        self.settings = settings_of(optimizers)
        self.optimizers = optimizers
        self.mark()
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (own, dict(own)) for m in module.modules() for own in (vars(m)["_parameters"], vars(m)["_buffers"])
        ]
        owners: list[tuple[str, Any]] = [*module.named_modules(), *(("", c) for c in type(module).__mro__)]
        self.attributes = [(name, owner, dict(_attributes(owner))) for name, owner in owners]
        self._undo: list[Callable[[], None]] = []
        self._prints = [
            {attribute: _print(value, self._undo) for attribute, value in values.items()}
            for _, _, values in self.attributes
        ]

    def mark(self) -> None:
        """The parameters are as they should be."""
        self.versions = [(n, p, p._version) for n, p, trainable in self.trainable if trainable]

    def changed(self) -> str | None:
        """What a step changed that no client may leave behind."""
        for (path, owner, _), prints in zip(self.attributes, self._prints, strict=True):
            now = dict(_attributes(owner))
            for name in {**prints, **now}:
                if name not in prints or name not in now or _print(now[name]) != prints[name]:
                    if isinstance(owner, Metric):
                        return f"updates the torchmetrics object `self.{path}`"
                    return f"changes `self.{'.'.join(filter(None, (path, name)))}`"
        for name, tensor, version in self.frozen:
            if tensor._version != version:
                return f"changes the frozen {'parameter' if isinstance(tensor, nn.Parameter) else 'buffer'} `{name}`"
        for name, parameter, version in self.versions:
            if parameter._version != version or self.module.get_parameter(name) is not parameter:
                return f"changes the parameter `{name}` itself"
        if repr(settings_of(self.optimizers)) != repr(self.settings):
            return "changes settings of the optimiser"
        for name, parameter, trainable in self.trainable:
            if parameter.requires_grad != trainable:
                return f"changes whether `{name}` is trainable"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for own, before in self.dicts:
            if own.keys() != before.keys() or any(own[name] is not before[name] for name in before):
                own.clear()
                own.update(before)
        for tensor, value in self.tensors:
            tensor.copy_(value)
        self.frozen = [(n, t, t._version) for n, t, _ in self.frozen]
        for _, parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)
        for _, owner, values in self.attributes:
            for name in [n for n, _ in _attributes(owner) if n not in values]:
                delattr(owner, name)
            if isinstance(owner, type):
                for name, value in values.items():
                    setattr(owner, name, value)
            else:
                vars(owner).update(values)
        for undo in self._undo:
            undo()
        give_settings(self.optimizers, self.settings)
        self.mark()
        self._prints = [{n: _print(v) for n, v in values.items()} for _, _, values in self.attributes]


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, type):  # a class of the user's, with its counters and lists
        if _is_users(getattr(sys.modules.get(owner.__module__), "__file__", None) or "<"):
            plain = (int, float, str, list, dict, set, Tensor)
            yield from ((n, v) for n, v in vars(owner).items() if isinstance(v, plain) and not n.startswith("__"))
        return
    # `log` is the recorder's while a step runs.
    inner = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "log"}
    yield from ((name, value) for name, value in vars(owner).items() if name not in inner)


def _print(value: Any, undo: list[Callable[[], None]] | None = None, depth: int = 4) -> Any:
    """Something that differs when a value was changed in place; ``undo`` gets what changes it back."""
    if isinstance(value, nn.Parameter):  # whose values are looked at where the module holds it
        return id(value)
    if isinstance(value, torch.Generator):
        if undo is not None:
            undo.append(cast("Callable[[], None]", partial(value.set_state, value.get_state())))
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, Tensor):
        if undo is not None:
            undo.append(_setter(value, value.detach().clone()))
        return id(value), value._version
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return repr(value)
    if depth and isinstance(value, (list, tuple, deque)):
        if undo is not None and not isinstance(value, tuple):
            undo.append(_refill(value, list(value)))
        return id(value), tuple(_print(each, undo, depth - 1) for each in value)
    if depth and isinstance(value, dict):
        if undo is not None:
            undo.append(_refill(value, dict(value)))
        return id(value), tuple((repr(key), _print(each, undo, depth - 1)) for key, each in value.items())
    if isinstance(value, set):
        if undo is not None:
            undo.append(_refill(value, set(value)))
        return id(value), len(value)
    if depth and (isinstance(value, Metric) or _is_plain_object(value)):
        return id(value), _print(vars(value), undo, depth - 1)
    return id(value)


def _is_plain_object(value: Any) -> bool:
    """Whether something of the user's keeps its state in attributes."""
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, nn.Module, FunctionType, MethodType, ModuleType, Dataset, pl.Trainer, pl.LightningDataModule)
    )


def _setter(tensor: Tensor, value: Tensor) -> Callable[[], None]:
    def undo() -> None:
        tensor.detach().copy_(value)

    return undo


def _refill(container: Any, content: Any) -> Callable[[], None]:
    def undo() -> None:
        container.clear()
        container.update(content) if isinstance(container, (dict, set)) else container.extend(content)

    return undo


class _LineFinder:
    """Finds the line of the user's code after which something has changed, entered around a call.

    Only frames under that call are looked at: whatever else this thread runs, such as a tracer's or a debugger's own
    functions, is not the user's step. Other threads have trace functions of their own.

    Args:
        changed: Whether it has.

    Attributes:
        found: File and line; ``None`` if there was none.
    """

    def __init__(self, changed: Callable[[], bool]) -> None:
        self.changed = changed
        self.found: str | None = None
        self._last: str | None = None
        self._caller: FrameType | None = None
        self._before: Any = None

    def __enter__(self) -> None:
        self._caller = sys._getframe(1)
        self._before = sys.gettrace()
        sys.settrace(self._enter_frame)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._caller = None

    def _enter_frame(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._see if _is_users(frame.f_code.co_filename) else None

    def _see(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.found is None:
            if self._last is not None and self.changed():
                self.found = self._last
            # After a return, the rest of the line that called comes next, which may be in another function's caller.
            current = self._users_caller(frame) if event == "return" else frame
            if current is not None:
                self._last = f"{current.f_code.co_filename}:{current.f_lineno}"
        return self._see

    def _users_caller(self, frame: FrameType) -> FrameType | None:
        """The frame of the user's that called this one, if it is under the call that is watched."""
        caller = frame.f_back
        while caller is not None and caller is not self._caller:
            if _is_users(caller.f_code.co_filename):
                return caller
            caller = caller.f_back
        return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running by itself, and what waits for it from being run by the user's step.

    Its callbacks and the finalizers of garbage that is there already would look like the step's own doing.
    """
    was_enabled = gc.isenabled()
    callbacks = list(gc.callbacks)
    freezes = gc.get_freeze_count() == 0  # else somebody else keeps objects there
    gc.disable()
    gc.callbacks.clear()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        gc.callbacks[:0] = callbacks
        if was_enabled:
            gc.enable()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in another dtype; any other as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _largest(value: Tensor | None) -> float:
    """The largest finite element's size; 0 where there is none."""
    if value is None or not value.numel():
        return 0.0
    return float(value.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _agree(a: Tensor | None, b: Tensor | None, allowed: float) -> bool:
    """Whether no element of two values differs by more than is allowed."""
    if a is None or b is None:
        # A batched call may give zeros for what a client alone does not use.
        return all(t is None or not t.any() for t in (a, b))
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.double().cpu(), b.double().cpu(), rtol=0.0, atol=allowed, equal_nan=True)


def _looks_at_index(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` ever reads its second argument; true where that cannot be told."""
    function = inspect.unwrap(getattr(step, "__func__", step))
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) or "locals" in code.co_names:
        return True
    names = code.co_varnames[: code.co_argcount][2 if inspect.ismethod(step) else 1 :]
    if not names:
        return False
    if names[0] in code.co_cellvars:
        return True
    reads = (i.argval for i in dis.get_instructions(code) if "LOAD" in i.opname)
    # From Python 3.13 on, one instruction may load two names.
    return any(names[0] in (argval if isinstance(argval, tuple) else (argval,)) for argval in reads)


def _foreign_randomness() -> tuple[Any, ...]:
    _, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), *rest


def _torch_randomness(device: torch.device) -> Tensor:
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _is_users(file: str) -> bool:
    return not file.startswith((*_LIBRARIES, "<"))


def _line_of(error: BaseException) -> str:
    """The last line of the user's code behind an error."""
    found, traceback = "", error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if _is_users(file):
            found = f" ({file}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return found


def explained(error: BaseException) -> str:
    """An error in one line, as a sentence without its subject, with the line of the user's code that it came from."""
    return _said(error) + _line_of(error)


def _said(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    if "data-dependent control flow" in str(error) or ".item()" in str(error):
        return (
            "needs the value of a tensor in Python (`if`, `.item()`, `float()`), and many clients at once have many;"
            " `torch.where` and `self.log(name, tensor)` do without"
        )
    if isinstance(error, NotAFunctionError):
        return first
    return f"raises {type(error).__name__}: {first[:200]}" if first else f"raises {type(error).__name__}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; 2 GiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**31
