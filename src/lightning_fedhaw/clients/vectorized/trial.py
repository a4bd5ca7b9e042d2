"""A trial of a module's step: may many clients be trained in one batched computation, and what does that need."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins import DoublePrecision, Precision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchmetrics import Metric

from lightning_fedhaw.clients.engine import LocalPlan, give_settings, settings_of, states_of
from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, EmbeddingGuard, StepInputs
from lightning_fedhaw.clients.vectorized.comparison import GRADIENT, Values, check_equal, distance
from lightning_fedhaw.clients.vectorized.dropout import ClientDropout
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.fingerprint import Undo, fingerprint
from lightning_fedhaw.clients.vectorized.optimizers import row_states
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.tracing import LineFinder, explained, is_users, no_collection, reads_index
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.streams import seed_of, stream
from lightning_fedhaw.vectors.layout import ParameterLayout

FEW = 8
"""Samples a client that are enough to compare: float64 is slow on many devices."""


@dataclass(frozen=True)
class Facts:
    """What the vectorized engine must know about a step.

    Attributes:
        row_states: Names of the optimizer's states that have the parameter's shape.
        uses_index: Whether the step looks at ``batch_idx``.
        draws_dropout: Whether it asks for dropout.
        draws_other: Whether it draws other random numbers, which are then equal per engine only.
        is_compared: Whether its values could be compared with those of a client alone.
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


def probe(
    host: Host,
    layout: ParameterLayout,
    data: ClientData,
    plan: LocalPlan,
    objectives: Sequence[ClientObjective] = (),
) -> Facts:
    """Try a module's step on two clients at once, and compare it with each client alone. The module is left as it was.

    Raises:
        NotVectorizableError: If it has side effects or gives other values, saying why and where.
    """
    step = f"`{type(host.module).__name__}.training_step`"
    if host.obstacle is not None:
        raise NotVectorizableError(f"{step} {host.obstacle}")
    if not data.is_sliced:
        raise NotVectorizableError(
            f"the data set {type(data.dataset).__name__} is not tensors in memory (a `TensorDataset` with the default"
            " `collate_fn`)"
        )
    try:
        rows = row_states(host.optimizers[0], states_of(host.optimizers[0]))
    except ValueError as error:
        raise NotVectorizableError(f"the optimizer {error}") from error
    uses_index = reads_index(host.module.training_step)
    snapshot = _Snapshot(host.module, host.optimizers, layout)
    with isolated_randomness(host.device), no_collection():
        try:
            return _Trial(host, layout, data, plan, objectives, snapshot).facts(rows, uses_index)
        except NotVectorizableError as error:
            raise NotVectorizableError(f"{step} {error}") from error
        finally:
            snapshot.restore()


class _Trial:
    """A step of two clients with different models, buffers and data."""

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective],
        snapshot: _Snapshot,
    ) -> None:
        self.host = host
        self.layout = layout
        self.objectives = objectives
        self.snapshot = snapshot
        self.parameters = layout.tensors(host.module)
        self.seeds = [seed_of(plan.seed, "probe", row) for row in (0, 1)]
        start = layout.read(self.parameters)
        noise = torch.randn(2, layout.numel, generator=stream(plan.seed, "probe"), dtype=torch.float64)
        self.vectors = [layout.rounded(start + 0.01 * row.to(start)) for row in noise]
        # The data of the largest client, once from its beginning and once from its end.
        largest = int(data.num_examples.argmax())
        indices = data.train_indices[largest]
        self.batch_size = min(data.settings.batch_size, len(indices))
        self.batch = data.gather(torch.stack([indices[: self.batch_size], indices.flip(0)[: self.batch_size]]))
        self.starts = {name: value.expand(2, *value.shape) for name, value in layout.views(start).items()}
        self.states = []
        for objective in objectives:
            state = objective.client_state(largest, layout.views(start))
            self.states.append({name: torch.stack([value, value]).to(host.device) for name, value in state.items()})
        # Set while the step runs in another precision than its own.
        self.dtype: torch.dtype | None = None
        self.activations = 0
        self.frozen: dict[Tensor, int] = {}

    def facts(self, rows: frozenset[str], uses_index: bool) -> Facts:
        """Try the step, and say what it needs.

        Args:
            rows: Names of the optimizer's states that have the parameter's shape.
            uses_index: Whether the step looks at ``batch_idx``.

        Raises:
            NotVectorizableError: If the step cannot be batched.
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

    # ------------------------------------------------------------------ one client, and both at once

    def _try_alone(self, row: int) -> None:
        """Run the step for one client, and refuse what it leaves behind."""
        seed_randomness(self.seeds[row], self.host.device)
        before = _foreign_randomness()
        try:
            self._alone(row, self._measured())
        except Exception as error:
            # The user's code may raise anything; the sequential engine will say so where it matters.
            raise NotVectorizableError(explained(error)) from error
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change + self._line_that(lambda: self.snapshot.changed() is not None))
        after = _foreign_randomness()
        if after != before:
            line = self._line_that(lambda: _foreign_randomness() != after)
            raise NotVectorizableError(f"draws from NumPy's or Python's random numbers, once for all clients{line}")

    def _try_together(self, dropout: ClientDropout) -> bool:
        """Run the step for both clients at once; whether it draws random numbers other than dropout's."""
        self.snapshot.restore()
        seed_randomness(self.seeds[0], self.host.device)
        before = _torch_randomness(self.host.device)
        try:
            self._together(dropout)
        except Exception as error:
            # The user's code, and torch about it, may raise anything.
            raise NotVectorizableError(explained(error)) from error
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change)
        return not torch.equal(before, _torch_randomness(self.host.device))

    def _alone(self, row: int, around: AbstractContextManager[Any]) -> Values:
        """Run one client's step in the module itself, and return everything that it gives.

        Args:
            row: Which of the two.
            around: Is entered around the call of ``training_step``.
        """
        self.snapshot.restore()
        host = self.host
        self.layout.write(self.vectors[row], self.parameters)
        self.snapshot.mark()
        batch = self._prepared([tensor[row].clone() for tensor in self.batch])
        with LogRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            arguments = host.arguments(batch, 0)
            with host.strategy.precision_plugin.train_step_context(), around:
                output = host.module.training_step(*arguments)
            loss, _ = loss_of(output)
            if loss is None:
                raise RuntimeError("`training_step` returned None")
            terms = self._terms(row)
            loss = terms.added_to(loss, terms.open)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            logged = recorder.recorded()
        values: Values = {"the loss": loss.detach().reshape(())}
        for name, gradient in zip(self.layout.names, gradients, strict=True):
            values[f"{GRADIENT} `{name}`"] = gradient
        for name, buffer in self.layout.moving_buffers(host.module).items():
            values[f"buffer `{name}`"] = buffer.detach().clone()
        for name, numbers in logged.items():
            values[f"logged `{name}`"] = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        return values

    def _terms(self, row: int) -> Terms:
        """Return what objectives add to one client's loss."""
        return Terms(
            self.objectives,
            dict(zip(self.layout.names, self.parameters, strict=True)),
            {name: value[row] for name, value in self.starts.items()},
            [{name: value[row] for name, value in state.items()} for state in self.states],
        )

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Note what the forward pass saves for the backward pass, and which frozen parameters it computes with."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def note_frozen(module: nn.Module, _: Any) -> None:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    self.frozen[parameter] = parameter.numel()

        with (
            register_module_forward_pre_hook(note_frozen),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            yield
        self.activations = sum(saved.values())

    def _together(self, dropout: ClientDropout, same_draws: bool = False) -> list[Values]:
        """Run both clients' steps at once, and return everything that each gives."""
        host = self.host
        layout = self.layout
        stacks = []
        for view, parameter in zip(layout.views(torch.stack(self.vectors)).values(), self.parameters, strict=True):
            stacks.append(view.to(parameter.dtype).requires_grad_())
        buffers = [torch.stack([buffer, buffer]) for buffer in layout.moving_buffers(host.module).values()]
        dropout.generators = self._generators()
        with StackRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            step = BatchedStep(host, layout, self.objectives, recorder, dropout, same_draws)
            batch = self._prepared([tensor.clone() for tensor in self.batch])
            with EmbeddingGuard():
                outputs = step(StepInputs(stacks, buffers, batch, 0, self.starts, self.states))
            assert outputs.losses is not None
            # The module's own parameters too: a gradient of theirs means that the step reached past the stacks.
            found = torch.autograd.grad(outputs.losses.sum(), [*stacks, *self.parameters], allow_unused=True)
            gradients = found[: len(stacks)]
            for name, gradient in zip(layout.names, found[len(stacks) :], strict=True):
                if gradient is not None:
                    raise NotVectorizableError(
                        f"reaches the parameter `{name}` through a list or an object that holds it, and not through the"
                        " module"
                    )
            recorder.put(torch.arange(2), outputs.logged)
            logged = {name: torch.stack(numbers) for name, numbers in recorder.stacks().items()}
        for i, value in outputs.replaced.items():
            buffers[i] = value
        values_of_clients = []
        for row in (0, 1):
            values: Values = {"the loss": outputs.losses[row].detach()}
            for name, gradient in zip(layout.names, gradients, strict=True):
                values[f"{GRADIENT} `{name}`"] = None if gradient is None else gradient[row]
            for name, buffer in zip(step.buffer_names, buffers, strict=True):
                values[f"buffer `{name}`"] = buffer[row]
            for name, stack in logged.items():
                values[f"logged `{name}`"] = stack[:, row].detach()
            values_of_clients.append(values)
        return values_of_clients

    def _prepared(self, data: list[Tensor]) -> list[Tensor]:
        """Prepare a batch for ``training_step``, in the precision that is computed in at the moment."""
        prepared: list[Tensor] = self.host.prepare(data)
        return prepared if self.dtype is None else [_cast(tensor, self.dtype) for tensor in prepared]

    def _generators(self) -> list[torch.Generator]:
        """Make a generator for the dropout masks of each of the two clients."""
        return [torch.Generator(self.host.device).manual_seed(seed) for seed in self.seeds]

    # ------------------------------------------------------------------ the comparison

    def _compare(self, draws_other: bool) -> bool:
        """Compare both clients at once with each alone, with the same masks and the same other random numbers.

        In float64, where rounding is many orders of magnitude below the tolerance: what differs there is another
        computation. A few samples are enough, unless the step takes full batches only. A step that cannot be run in
        float64 is compared in float32, beside its own rounding noise.

        Returns:
            False if that is not possible, because a batched call cannot give clients the same random numbers.

        Raises:
            NotVectorizableError: If a value differs, or the step cannot be run in either precision.
        """
        for precision, dtype, size in (
            (DoublePrecision(), torch.float64, min(FEW, self.batch_size)),
            (DoublePrecision(), torch.float64, self.batch_size),
            (Precision(), torch.float32, self.batch_size),
        ):
            self.snapshot.restore()
            try:
                with self._computing_in(precision, dtype, size):
                    alone = [self._alone_with_masks(row) for row in (0, 1)]
                    noise = [self._noise(row, alone[row]) if dtype == torch.float32 else {} for row in (0, 1)]
                    self.snapshot.restore()
                    seed_randomness(self.seeds[0], self.host.device)
                    together = self._together(ClientDropout(), same_draws=True)
            except Exception as error:
                # Whatever the user's code raises in a precision that is not its own is no reason to refuse it yet.
                failure = error
                continue
            for row in (0, 1):
                check_equal(together[row], alone[row], noise[row], self._step_line())
            return True
        if draws_other and "same randomness" in str(failure):
            return False
        raise NotVectorizableError(f"cannot be compared in float64 or float32: it {explained(failure)}") from failure

    @contextmanager
    def _computing_in(self, precision: Precision, dtype: torch.dtype, size: int) -> Iterator[None]:
        """Run the module in another precision for a while, on the first samples of each client's batch."""
        strategy = self.host.strategy
        own_precision = strategy.precision_plugin
        own_inputs = self.vectors, self.starts, self.states, self.batch, self.batch_size
        tensors = [*self.host.module.parameters(), *self.host.module.buffers()]
        own_data = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
        strategy.precision_plugin = precision
        self.dtype = dtype
        self.vectors = [vector.to(dtype) for vector in self.vectors]
        self.starts = {name: _cast(value, dtype) for name, value in self.starts.items()}
        self.states = [{name: _cast(value, dtype) for name, value in state.items()} for state in self.states]
        self.batch = [tensor[:, :size] for tensor in self.batch]
        self.batch_size = size
        try:
            for tensor, data in own_data:
                tensor.data = data.to(dtype)
            yield
        finally:
            strategy.precision_plugin = own_precision
            self.dtype = None
            self.vectors, self.starts, self.states, self.batch, self.batch_size = own_inputs
            for tensor, data in own_data:
                tensor.data = data

    def _alone_with_masks(self, row: int) -> Values:
        """Run one client alone, with the dropout masks and other draws that it is given beside the other one."""
        seed_randomness(self.seeds[0], self.host.device)
        dropout = ClientDropout()
        dropout.generators = self._generators()[row : row + 1]
        return self._alone(row, dropout)

    def _noise(self, row: int, values: Values) -> dict[str, float]:
        """Measure how far each value moves when every parameter is rounded another way."""
        # Elsewhere convolutions may be computed in TF32.
        unit = 2.0**-24 if self.host.device.type == "cpu" else 2.0**-11
        vector = self.vectors[row]
        moved = dict.fromkeys(values, 0.0)
        for draw in range(4):
            generator = stream(self.seeds[row], "rounding", draw)
            signs = torch.randint(2, vector.shape, generator=generator).mul_(2).sub_(1).to(vector)
            self.vectors[row] = vector * (1 + unit * signs)
            for name, value in self._alone_with_masks(row).items():
                moved[name] = max(moved[name], distance(value, values[name]))
        self.vectors[row] = vector
        return moved

    # ------------------------------------------------------------------ where, and how much

    def _step_line(self) -> str:
        """Return where ``training_step`` is written, in brackets."""
        step = self.host.module.training_step
        if not hasattr(step, "__code__"):
            return ""
        return f" ({inspect.getsourcefile(step)}:{step.__code__.co_firstlineno})"

    def _line_that(self, changed: Callable[[], bool]) -> str:
        """Find the line of the user's code after which something has changed, by running the step again."""
        self.snapshot.restore()
        finder = LineFinder(changed)
        self._alone(0, finder)
        return f" ({finder.found})" if finder.found else ""

    def _bytes(self, num_states: int) -> int:
        """Estimate the memory that one client more takes."""
        layout = self.layout
        # A client's parameters, their copy where rows are picked, gradients, states of the optimizer.
        copies = (3 + max(num_states, 1)) * layout.message_bytes
        vectors = 2 * layout.numel * layout.dtype.itemsize
        buffers = 2 * sum(_nbytes(buffer) for buffer in layout.moving_buffers(self.host.module).values())
        batch = 2 * sum(_nbytes(tensor[0]) for tensor in self.batch)
        terms = sum(_nbytes(value[0]) for state in self.states for value in state.values())
        # Backward holds about as much again as forward saved.
        total: int = copies + vectors + buffers + batch + terms + 2 * self.activations
        return total


class _Snapshot:
    """What a module holds, and attributes beside it: to see what a step changes, and to put it back."""

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], layout: ParameterLayout) -> None:
        self.module = module
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
        self.frozen = [(name, tensor, tensor._version) for name, tensor in layout.still_tensors(module).items()]
        self.trainable = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
        self.settings = settings_of(optimizers)
        self.optimizers = optimizers
        self.mark()
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for submodule in module.modules():
            for holder in (vars(submodule)["_parameters"], vars(submodule)["_buffers"]):
                self.dicts.append((holder, dict(holder)))
        # Classes of the user's too, which may count their steps.
        owners: list[tuple[str, Any]] = list(module.named_modules())
        owners += [("", base) for base in type(module).__mro__]
        self.attributes = [(path, owner, dict(_attributes(owner))) for path, owner in owners]
        self._undo: list[Undo] = []
        self._fingerprints = self._taken(self._undo)

    def _taken(self, undo: list[Undo] | None = None) -> list[dict[str, Any]]:
        """Take the fingerprints of all attributes, by owner and name."""
        fingerprints = []
        for _, _, values in self.attributes:
            fingerprints.append({name: fingerprint(value, undo) for name, value in values.items()})
        return fingerprints

    def mark(self) -> None:
        """Take the parameters as they are now for unchanged."""
        self.versions = [(name, p, p._version) for name, p, is_trainable in self.trainable if is_trainable]

    def changed(self) -> str | None:
        """Name the first thing that a step changed and no client may leave behind; ``None`` if there is none."""
        for (path, owner, _), before in zip(self.attributes, self._fingerprints, strict=True):
            now = dict(_attributes(owner))
            for name in {**before, **now}:
                if name in before and name in now and fingerprint(now[name]) == before[name]:
                    continue
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
            return "changes settings of the optimizer"
        for name, parameter, is_trainable in self.trainable:
            if parameter.requires_grad != is_trainable:
                return f"changes whether `{name}` is trainable"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for holder, before in self.dicts:
            if holder.keys() != before.keys() or any(holder[name] is not before[name] for name in before):
                holder.clear()
                holder.update(before)
        for tensor, value in self.tensors:
            tensor.copy_(value)
        self.frozen = [(name, tensor, tensor._version) for name, tensor, _ in self.frozen]
        for _, parameter, is_trainable in self.trainable:
            parameter.requires_grad_(is_trainable)
        for _, owner, values in self.attributes:
            added = [name for name, _ in _attributes(owner) if name not in values]
            for name in added:
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
        # Putting tensors back counts as a change of theirs.
        self._fingerprints = self._taken()


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module or a class that a step may change."""
    if isinstance(owner, type):
        # A class of the user's, with its counters and lists.
        if is_users(getattr(sys.modules.get(owner.__module__), "__file__", None) or "<"):
            plain = (int, float, str, list, dict, set, Tensor)
            for name, value in vars(owner).items():
                if isinstance(value, plain) and not name.startswith("__"):
                    yield name, value
        return
    # `log` is the recorder's while a step runs.
    inner = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "log"}
    for name, value in vars(owner).items():
        if name not in inner:
            yield name, value


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; any other stays as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _foreign_randomness() -> tuple[Any, ...]:
    """Return the states of NumPy's and Python's random numbers."""
    _, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), *rest


def _torch_randomness(device: torch.device) -> Tensor:
    """Return the states of torch's random numbers as one tensor."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
