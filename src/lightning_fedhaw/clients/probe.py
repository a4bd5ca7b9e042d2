"""Finds out whether a module's step is a function, so that many clients can be trained in one batched computation."""

from __future__ import annotations

import dis
import inspect
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import Dataset
from torchmetrics import Metric

import lightning_fedhaw
from lightning_fedhaw.clients.batched import BatchedStep, ClientDropout, EmbeddingGuard
from lightning_fedhaw.clients.engine import LocalPlan, give_settings, settings_of, states_of
from lightning_fedhaw.clients.optimizers import row_states
from lightning_fedhaw.clients.records import LogRecorder, NotAFunctionError, StackRecorder
from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.data.federation import ClientData
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.layout import ParameterLayout
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.streams import seed_of, stream

# The standard library's folder too, which holds that of installed packages as a rule.
_LIBRARIES = tuple(str(Path(m.__file__ or "").parent) for m in (torch, lightning, torchmetrics, lightning_fedhaw, dis))


@dataclass(frozen=True)
class Facts:
    """What the vectorized engine must know of a step.

    Attributes:
        row_states: Names of the optimiser's states that have the parameter's shape.
        uses_index: Whether the step looks at ``batch_idx``.
        draws_dropout: Whether it asks for dropout.
        draws_other: Whether it draws other random numbers, which are then equal per engine only.
        bytes_per_client: Memory that one client more takes.
        frozen: Frozen parameters that the step computes with.
    """

    row_states: frozenset[str]
    uses_index: bool
    draws_dropout: bool
    draws_other: bool
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
    with isolated_randomness(host.device):
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
        self.activations = 0
        self.frozen: dict[Tensor, int] = {}

    def facts(self, rows: frozenset[str], uses_index: bool) -> Facts:
        alone = []
        for row in (0, 1):
            seed_randomness(self.seeds[row], self.host.device)
            drawn = _foreign_randomness()
            try:
                alone.append(self._alone(row))
            except Exception as error:
                raise NoFunctionError(explained(error)) from error
            if what := self.kept.changed():
                raise NoFunctionError(what + self._line_that(lambda: self.kept.changed() is not None))
            if _foreign_randomness() != drawn:
                drawn = _foreign_randomness()
                line = self._line_that(lambda drawn=drawn: _foreign_randomness() != drawn)  # type: ignore[misc]
                raise NoFunctionError(f"draws from NumPy's or Python's random numbers, once for all clients{line}")
        self.kept.restore()
        dropout = ClientDropout()
        seed_randomness(self.seeds[0], self.host.device)
        before = _torch_randomness(self.host.device)
        try:
            together = self._together(dropout)
        except Exception as error:
            raise NoFunctionError(explained(error)) from error
        draws_other = not torch.equal(before, _torch_randomness(self.host.device))
        if what := self.kept.changed():
            raise NoFunctionError(what)
        # Other engines draw other numbers, and on a GPU other masks, so that there is nothing to compare.
        if not draws_other and not (dropout.calls and self.host.device.type != "cpu"):
            self._compare(together, alone)
        frozen = sum(self.frozen.values())
        return Facts(rows, uses_index, dropout.calls > 0, draws_other, self._bytes(len(rows)), frozen)

    def _alone(self, row: int) -> dict[str, Tensor | None]:
        """One client in the module itself: everything that a step gives."""
        self.kept.restore()
        host = self.host
        self.layout.write(self.vectors[row], self.parameters)
        self.kept.mark()
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def called(module: nn.Module, _: Any) -> None:
            own = module.parameters(recurse=False)
            self.frozen.update({p: p.numel() for p in own if not p.requires_grad})

        data = host.prepare([tensor[row].clone() for tensor in self.batch])
        with register_module_forward_pre_hook(called), LogRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            with (
                host.strategy.precision_plugin.train_step_context(),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                loss, _ = loss_of(host.module.training_step(*host.arguments(data, 0)))
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
        self.activations = sum(saved.values())
        gradients = dict(zip((f"the gradient of `{n}`" for n in self.layout.names), found, strict=True))
        buffers = {f"buffer `{n}`": b.detach().clone() for n, b in self.layout.moving_buffers(host.module).items()}
        return {"the loss": loss.detach().reshape(()), **gradients, **buffers, **logged}

    def _together(self, dropout: ClientDropout) -> list[dict[str, Tensor | None]]:
        """Both clients at once, the same."""
        host, layout = self.host, self.layout
        stacks = [
            view.to(dtype).requires_grad_()
            for view, dtype in zip(layout.views(torch.stack(self.vectors)).values(), layout.dtypes, strict=True)
        ]
        buffers = [torch.stack([b, b]) for b in layout.moving_buffers(host.module).values()]
        dropout.generators = [torch.Generator(host.device).manual_seed(seed) for seed in self.seeds]
        with StackRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            step = BatchedStep(host, layout, self.objectives, recorder, dropout)
            data = host.prepare([tensor.clone() for tensor in self.batch])
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

    def _compare(
        self, together: Sequence[Mapping[str, Tensor | None]], alone: Sequence[Mapping[str, Tensor | None]]
    ) -> None:
        with self.host.strategy.precision_plugin.train_step_context():
            mixed = torch.is_autocast_enabled(self.host.device.type)
        step = self.host.module.training_step
        where = f" ({inspect.getsourcefile(step)}:{step.__code__.co_firstlineno})" if hasattr(step, "__code__") else ""
        for one, other in zip(together, alone, strict=True):
            # A gradient that is zero but for rounding, as of a bias before a normalisation, is small beside the others.
            sizes = [float(v.abs().max()) for n, v in other.items() if v is not None and n.startswith("the gradient")]
            for name in {**one, **other}:
                if not _close(
                    one.get(name), other.get(name), mixed, max(sizes) if name.startswith("the gradient") else 0.0
                ):
                    raise NoFunctionError(f"gives another value of {name} for two clients at once than alone{where}")

    def _line_that(self, changed: Callable[[], bool]) -> str:
        """The line of the user's code after which something has changed, found by running the step again."""
        self.kept.restore()
        found: list[str] = []
        last: list[str] = []

        def line(frame: Any, event: str, _: Any) -> Any:
            if not found:
                if last and changed():
                    found.append(last[-1])
                if event == "return":  # the rest of the line that called, which may be another's
                    frame = frame.f_back
                    while frame is not None and not _is_users(frame.f_code.co_filename):
                        frame = frame.f_back
                if frame is not None:
                    last[:] = [f"{frame.f_code.co_filename}:{frame.f_lineno}"]
            return line

        def trace(frame: Any, event: str, _: Any) -> Any:
            return line if _is_users(frame.f_code.co_filename) else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            self._alone(0)
        finally:
            sys.settrace(before)
        return f" ({found[0]})" if found else ""

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


def _close(a: Tensor | None, b: Tensor | None, mixed: bool, least: float) -> bool:
    """Whether two values differ by rounding at most."""
    if a is None or b is None:
        # A batched call may give zeros for what a client alone does not use.
        return all(t is None or not t.any() for t in (a, b))
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    loose = 0.1 if mixed or torch.finfo(a.dtype).bits < 32 else 1e-4 if a.dtype == torch.float32 else 1e-9
    a, b = a.double().cpu(), b.double().cpu()
    scale = b[torch.isfinite(b)].abs().max().item() if torch.isfinite(b).any() else 1.0
    return torch.allclose(a, b, rtol=loose, atol=loose * max(scale, least), equal_nan=True)


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
