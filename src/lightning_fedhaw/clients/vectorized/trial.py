"""A trial of a module's step, which finds out whether and how many clients can be trained in one computation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from lightning.pytorch.plugins import DoublePrecision, Precision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_fedhaw.clients.engine import states_of
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, StepInputs
from lightning_fedhaw.clients.vectorized.comparison import (
    GRADIENT,
    LOSS,
    Values,
    cast_all,
    cast_tensor,
    distance,
    first_difference,
    is_finite,
    number_of_bytes,
)
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.guard import NoLogger, StepGuard
from lightning_fedhaw.clients.vectorized.optimizers import check_scalable, row_states
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.snapshot import Snapshot
from lightning_fedhaw.clients.vectorized.tracing import LineFinder, explained, quiet_collector, reads_index
from lightning_fedhaw.clients.vectorized.turns import many_clients
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import foreign_random_states, isolated_randomness, seed_randomness, torch_random_states
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, make_watch
from lightning_fedhaw.streams import seed_of, stream
from lightning_fedhaw.vectors.layout import ParameterLayout

FEW_SAMPLES = 8
"""The samples of a client that are enough for the comparison: float64 is slow on many devices."""


@dataclass(frozen=True)
class Facts:
    """The facts about a step that the vectorized engine needs.

    Attributes:
        row_states: Names of the optimizer's states that have the parameter's shape.
        uses_index: Whether the step reads ``batch_idx``.
        draws_dropout: Whether it uses dropout.
        draws_other: Whether it draws other random numbers, which differ between the engines.
        is_compared: Whether its values could be compared with those of a client alone.
        bytes_per_client: The memory of one more client, in bytes.
        frozen: The number of frozen parameters that the step computes with.
    """

    row_states: frozenset[str]
    uses_index: bool
    draws_dropout: bool
    draws_other: bool
    is_compared: bool
    bytes_per_client: int
    frozen: int

    @property
    def is_fixed(self) -> bool:
        """Whether all calls are the same operations: without random numbers, and whatever the batch index is."""
        return not (self.uses_index or self.draws_dropout or self.draws_other)


def probe(
    host: Host,
    layout: ParameterLayout,
    data: ClientData,
    plan: LocalPlan,
    objectives: Sequence[ClientObjective] = (),
) -> Facts:
    """Try a module's step on two clients at once, and compare it with each client alone.

    The module and all that its step has changed are restored.

    Args:
        host: The trainer around the module.
        layout: Its trainable parameters.
        data: The clients' data.
        plan: The local work of a client in a round.
        objectives: The terms that clients add to their loss.

    Raises:
        NotVectorizableError: If the step has side effects or gives other values, with the reason and the line.
    """
    step = f"`{type(host.module).__name__}.training_step`"
    if host.obstacle is not None:
        raise NotVectorizableError(f"{step} {host.obstacle}")
    if layout.frozen_parameters:
        raise NotVectorizableError(f"{step} moves frozen parameters, such as `{layout.frozen_parameters[0]}`")
    if not data.is_sliced:
        raise NotVectorizableError(
            f"the data set {type(data.dataset).__name__} is not tensors in memory (a `TensorDataset` with the default"
            " `collate_fn` and a plain `DataLoader`)"
        )
    try:
        names = row_states(host.optimizers[0], states_of(host.optimizers[0]))
        check_scalable(host.optimizers[0], plan)
    except ValueError as error:
        raise NotVectorizableError(f"the optimizer {error}") from error
    uses_index = reads_index(host.module.training_step)
    snapshot = Snapshot(host.module, host.optimizers, layout)
    with isolated_randomness(host.device), quiet_collector(), host.logging_to(NoLogger()), many_clients(host):
        try:
            return _Trial(host, layout, data, plan, objectives, snapshot).facts(names, uses_index)
        except NotVectorizableError as error:
            raise NotVectorizableError(f"{step} {error}") from error
        finally:
            snapshot.restore()


class _Trial:
    """A trial of a step on two clients with different models and data.

    Args:
        host: The trainer around the module.
        layout: Its trainable parameters.
        data: The clients' data.
        plan: The local work of a client in a round.
        objectives: The terms that clients add to their loss.
        snapshot: Detects and undoes what the step changes.
    """

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective],
        snapshot: Snapshot,
    ) -> None:
        self.host = host
        self.layout = layout
        # Like the layout, but local parameters, which are trained as well, have their place at the end of the vector.
        self.trained = layout.with_local(host.module)
        self.objectives = objectives
        self.snapshot = snapshot
        self.parameters = layout.trained_tensors(host.module)
        self.seeds = [seed_of(plan.seed, "probe", row) for row in (0, 1)]
        start = self.trained.read(self.parameters)
        noise = torch.randn(2, self.trained.numel, generator=stream(plan.seed, "probe"), dtype=torch.float64)
        # Different models, close enough to the real one that no value overflows.
        self.vectors = [self.trained.rounded(start + 0.01 * row.to(start)) for row in noise]
        # Different data: those of the largest client, once from its beginning and once from its end.
        largest = int(data.num_examples.argmax())
        indices = data.train_indices[largest]
        self.batch_size = min(data.settings.batch_size, len(indices))
        self.batch = data.gather(torch.stack([indices[: self.batch_size], indices.flip(0)[: self.batch_size]]))
        shared = layout.views(start[: layout.numel])
        self.starts = {name: value.expand(2, *value.shape) for name, value in shared.items()}
        # What the clients keep, as `Engine.begin_objectives` passes it on.
        start_buffers: dict[str, Tensor] = dict(layout.tracked_buffers(host.module))
        for name, parameter in layout.local_tensors(host.module).items():
            start_buffers[name] = parameter.detach()
        self.states: list[ClientState] = []
        for objective in objectives:
            state = objective.begin_client(largest, shared, start_buffers)
            self.states.append({name: torch.stack([value, value]).to(host.device) for name, value in state.items()})
        self.index = 0
        # Set while the step runs in another precision than its own.
        self.dtype: torch.dtype | None = None
        self.activations = 0
        self.frozen: dict[Tensor, int] = {}

    def facts(self, row_states: frozenset[str], uses_index: bool) -> Facts:
        """Try the step, and return what was found out.

        Args:
            row_states: Names of the optimizer's states that have the parameter's shape.
            uses_index: Whether the step reads ``batch_idx``.

        Raises:
            NotVectorizableError: If the step cannot be batched.
        """
        guard = StepGuard()
        draws_other = False
        is_compared = True
        # A step that reads its number may do something else from the second batch on.
        num_batches = 2 if uses_index else 1
        for self.index in range(num_batches):
            for row in (0, 1):
                self._try_alone(row)
            draws_other |= self._try_together(guard)
            is_compared &= self._compare(draws_other)
        return Facts(
            row_states=row_states,
            uses_index=uses_index,
            draws_dropout=guard.calls > 0,
            draws_other=draws_other,
            is_compared=is_compared,
            bytes_per_client=self._bytes(len(row_states)),
            frozen=sum(self.frozen.values()),
        )

    # ------------------------------------------------------------------ one client, and both at once

    def _try_alone(self, row: int) -> None:
        """Run the step for one client, and refuse side effects.

        Raises:
            NotVectorizableError: If the step fails, changes something that would pass from client to client, or draws
                random numbers that no batched call could give each client.
        """
        seed_randomness(self.seeds[row], self.host.device)
        state_before = foreign_random_states()
        with _errors_refuse():
            self._run_measured(row)
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change.description + self._line_that(change.has_happened))
        state_after = foreign_random_states()
        if state_after != state_before:
            line = self._line_that(lambda: foreign_random_states() != state_after)
            raise NotVectorizableError(f"draws from NumPy's or Python's random numbers, once for all clients{line}")

    def _run_measured(self, row: int) -> None:
        """Run the step for one client, and measure the memory of its activations."""
        try:
            self._alone(row, self._measured())
        except RuntimeError:
            # Steps that compute gradients themselves may not allow the measurement. Then activations are estimated, at
            # ten times the batch.
            seed_randomness(self.seeds[row], self.host.device)
            self._alone(row, nullcontext())
            self.activations = max(self.activations, 10 * sum(number_of_bytes(tensor[row]) for tensor in self.batch))

    def _try_together(self, guard: StepGuard) -> bool:
        """Run the step for both clients at once.

        Returns:
            Whether the step draws random numbers other than dropout's.

        Raises:
            NotVectorizableError: If the step fails, or changes something that would pass from client to client.
        """
        self.snapshot.restore()
        seed_randomness(self.seeds[0], self.host.device)
        state_before = torch_random_states(self.host.device)
        with _errors_refuse():
            self._together(guard)
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change.description)
        return not torch.equal(state_before, torch_random_states(self.host.device))

    def _alone(self, row: int, context: AbstractContextManager[object]) -> Values:
        """Run one client's step in the module itself, and return all its values.

        Args:
            row: The client, 0 or 1.
            context: A context for the call of ``training_step``.
        """
        self.snapshot.restore()
        host = self.host
        self.trained.write(self.vectors[row], self.parameters)
        self.snapshot.mark()
        batch = self._prepared([tensor[row].clone() for tensor in self.batch])
        with LogRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            arguments = host.arguments(batch, self.index)
            terms = self._terms(row)
            with host.step_context(), context:
                output = terms.watched(lambda: host.module.training_step(*arguments), batch)
            loss, _ = loss_of(output)
            if loss is None:
                raise RuntimeError("`training_step` returned None")
            loss = terms.added_to(loss, terms.open)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            logged = recorder.recorded()
        values: Values = {LOSS: loss.detach().reshape(())}
        for name, gradient in zip(self.trained.names, gradients, strict=True):
            values[f"{GRADIENT} `{name}`"] = gradient
        for name, buffer in self.layout.tracked_buffers(host.module).items():
            values[f"buffer `{name}`"] = buffer.detach().clone()
        for name, numbers in logged.items():
            values[f"logged `{name}`"] = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        return values

    def _terms(self, row: int) -> Terms:
        """Return the terms that objectives add to one client's loss."""
        # Without local parameters, which come last: no term acts on them.
        parameters = dict(zip(self.layout.names, self.parameters, strict=False))
        start = {name: value[row] for name, value in self.starts.items()}
        states = []
        for state in self.states:
            states.append({name: value[row] for name, value in state.items()})
        watch = make_watch(self.objectives, self.host.module, self.host.step_context)
        return Terms(self.objectives, parameters, start, states, watch)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure the tensors saved for the backward pass, and count the frozen parameters that are computed with."""
        # By address, because several tensors may share their memory.
        saved_bytes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        def record_frozen(module: nn.Module, inputs: object) -> None:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    self.frozen[parameter] = parameter.numel()

        with (
            register_module_forward_pre_hook(record_frozen),
            torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        ):
            yield
        self.activations = sum(saved_bytes.values())

    def _together(self, guard: StepGuard, same_draws: bool = False) -> list[Values]:
        """Run both clients' steps at once, and return the values of each.

        Args:
            guard: Surrounds the clients' steps.
            same_draws: Whether both are given the same random numbers other than dropout's.
        """
        host = self.host
        layout = self.layout
        stacks = []
        for view, parameter in zip(
            self.trained.views(torch.stack(self.vectors)).values(), self.parameters, strict=True
        ):
            stacks.append(view.to(parameter.dtype).requires_grad_())
        buffers = [torch.stack([buffer, buffer]) for buffer in layout.tracked_buffers(host.module).values()]
        generators = self._generators()
        guard.generators = lambda: generators
        with StackRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = self.batch_size
            step = BatchedStep(host, layout, self.objectives, recorder, guard, same_draws)
            batch = self._prepared([tensor.clone() for tensor in self.batch])
            outputs = step(StepInputs(stacks, buffers, batch, self.index, self.starts, self.states))
            assert outputs.losses is not None
            gradients = self._stack_gradients(outputs.losses, stacks)
            recorder.put(torch.arange(2), outputs.logged)
            logged = {name: torch.stack(numbers) for name, numbers in recorder.stacks().items()}
        for i, value in outputs.replaced.items():
            buffers[i] = value
        values_of_clients = []
        for row in (0, 1):
            values: Values = {LOSS: outputs.losses[row].detach()}
            for name, gradient in zip(self.trained.names, gradients, strict=True):
                values[f"{GRADIENT} `{name}`"] = None if gradient is None else gradient[row]
            for name, buffer in zip(step.buffer_names, buffers, strict=True):
                values[f"buffer `{name}`"] = buffer[row]
            for name, stack in logged.items():
                values[f"logged `{name}`"] = stack[:, row].detach()
            values_of_clients.append(values)
        return values_of_clients

    def _stack_gradients(self, losses: Tensor, stacks: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Compute the gradients of the clients' losses.

        Args:
            losses: ``[2]``.
            stacks: ``[2, *shape]``, the clients' parameters.

        Raises:
            NotVectorizableError: If the step used the module's own parameters instead of the clients'.
        """
        gradients: Sequence[Tensor | None]
        gradients = torch.autograd.grad(losses.sum(), [*stacks, *self.parameters], allow_unused=True)
        for name, gradient in zip(self.trained.names, gradients[len(stacks) :], strict=True):
            if gradient is not None:
                raise NotVectorizableError(
                    f"reaches the parameter `{name}` through a list or an object that holds it, and not through the"
                    " module"
                )
        return gradients[: len(stacks)]

    def _prepared(self, data: list[Tensor]) -> list[Tensor]:
        """Prepare a batch for ``training_step``, in the current precision."""
        prepared: list[Tensor] = self.host.prepare(data)
        if self.dtype is None:
            return prepared
        return [cast_tensor(tensor, self.dtype) for tensor in prepared]

    def _generators(self) -> list[torch.Generator]:
        """Make a generator for the dropout masks of each of the two clients."""
        return [torch.Generator(self.host.device).manual_seed(seed) for seed in self.seeds]

    # ------------------------------------------------------------------ the comparison

    def _compare(self, draws_other: bool) -> bool:
        """Compare both clients at once with each alone, with the same masks and the same other random numbers.

        The comparison is in float64, where rounding is many orders of magnitude below the error of a wrong computation,
        or else in float32. A few samples are enough, unless the step works with full batches only.

        Args:
            draws_other: Whether the step draws random numbers other than dropout's.

        Returns:
            False if no comparison is possible: because a batched call cannot give clients the same random numbers, or
            because a client alone has a loss or a gradient that is not finite.

        Raises:
            NotVectorizableError: If a value differs by more than rounding, or the step cannot be run in either
                precision.
        """
        for precision, dtype, size in (
            (DoublePrecision(), torch.float64, min(FEW_SAMPLES, self.batch_size)),
            (DoublePrecision(), torch.float64, self.batch_size),
            (Precision(), torch.float32, self.batch_size),
        ):
            self.snapshot.restore()
            try:
                with self._computing_in(precision, dtype, size):
                    alone = [self._alone_with_masks(row) for row in (0, 1)]
                    self.snapshot.restore()
                    seed_randomness(self.seeds[0], self.host.device)
                    together = self._together(StepGuard(), same_draws=True)
                    self._check_equal(together, alone, dtype)
            except _DifferenceError as error:
                raise NotVectorizableError(f"{error}{self._step_line()}") from error
            except Exception as error:
                # The user's code may raise anything in a precision that is not its own, so the next one is tried.
                failure = error
                continue
            return all(map(is_finite, alone))
        if draws_other and "same randomness" in str(failure):
            return False
        raise NotVectorizableError(f"cannot be compared in float64 or float32: it {explained(failure)}") from failure

    def _check_equal(self, together: Sequence[Values], alone: Sequence[Values], dtype: torch.dtype) -> None:
        """Refuse a step that gives one of two clients other values than alone.

        Raises:
            _DifferenceError: Naming the first value that differs by more than rounding.
        """
        for row in (0, 1):
            if first_difference(together[row], alone[row], dtype) is None:
                continue
            # Parts of a step may compute in less precision than the one it is run in, so rounding is measured.
            noise = self._noise(row, alone[row])
            try:
                name = first_difference(together[row], alone[row], dtype, noise)
            except NotVectorizableError as error:
                raise _DifferenceError(str(error)) from error
            if name is not None:
                raise _DifferenceError(f"gives another value of {name} for two clients at once than alone")

    @contextmanager
    def _computing_in(self, precision: Precision, dtype: torch.dtype, size: int) -> Iterator[None]:
        """Run the module in another precision inside the context, on the first samples of each client's batch."""
        original_inputs = (self.vectors, self.starts, self.states, self.batch, self.batch_size)
        self.dtype = dtype
        self.vectors = [vector.to(dtype) for vector in self.vectors]
        self.starts = cast_all(self.starts, dtype)
        self.states = [cast_all(state, dtype) for state in self.states]
        self.batch = [tensor[:, :size] for tensor in self.batch]
        self.batch_size = size
        try:
            with self.snapshot.cast(dtype), self.host.computing_in(precision):
                yield
        finally:
            self.dtype = None
            self.vectors, self.starts, self.states, self.batch, self.batch_size = original_inputs

    def _alone_with_masks(self, row: int) -> Values:
        """Run one client alone, with the dropout masks and other draws that it is given in the batched call."""
        seed_randomness(self.seeds[0], self.host.device)
        guard = StepGuard()
        generators = self._generators()[row : row + 1]
        guard.generators = lambda: generators
        return self._alone(row, guard)

    def _noise(self, row: int, values: Values) -> dict[str, float]:
        """Measure the rounding noise of each value: how far it changes when parameters are rounded in another way."""
        # Half of the distance of two float32 numbers near 1; on GPUs convolutions may be computed in TF32.
        unit = 2.0**-24 if self.host.device.type == "cpu" else 2.0**-11
        vector = self.vectors[row]
        noise = dict.fromkeys(values, 0.0)
        for draw in range(4):
            generator = stream(self.seeds[row], "rounding", draw)
            signs = torch.randint(2, vector.shape, generator=generator).mul_(2).sub_(1).to(vector)
            self.vectors[row] = vector * (1 + unit * signs)
            for name, value in self._alone_with_masks(row).items():
                noise[name] = max(noise[name], distance(value, values[name]))
        self.vectors[row] = vector
        return noise

    # ------------------------------------------------------------------ lines of code, and memory

    def _step_line(self) -> str:
        """Return the line where ``training_step`` begins, in brackets."""
        step = self.host.module.training_step
        if not hasattr(step, "__code__"):
            return ""
        return f" ({inspect.getsourcefile(step)}:{step.__code__.co_firstlineno})"

    def _line_that(self, changed: Callable[[], bool]) -> str:
        """Find the line of the user's code after which something has changed, by running the step again."""
        self.snapshot.restore()
        finder = LineFinder(changed)
        try:
            self._alone(0, finder)
        except Exception:
            # The second run of the user's code may fail where the first did not; then the line remains unknown.
            return ""
        if finder.line is None:
            return ""
        return f" ({finder.line})"

    def _bytes(self, num_states: int) -> int:
        """Estimate the memory of one more client, in bytes.

        Args:
            num_states: The number of the optimizer's states that have the parameter's shape.
        """
        layout = self.trained
        # A client's parameters, their copy where rows are picked by index, gradients, and states of the optimizer.
        copies = (3 + max(num_states, 1)) * layout.message_bytes
        vectors = 2 * layout.numel * layout.dtype.itemsize
        buffers = 2 * sum(number_of_bytes(buffer) for buffer in layout.tracked_buffers(self.host.module).values())
        batch = 2 * sum(number_of_bytes(tensor[0]) for tensor in self.batch)
        terms = 0
        for state in self.states:
            terms += sum(number_of_bytes(value[0]) for value in state.values())
        # The backward pass needs about as much again as the forward pass has saved.
        total: int = copies + vectors + buffers + batch + terms + 2 * self.activations
        return total


@contextmanager
def _errors_refuse() -> Iterator[None]:
    """Turn any error of a step into a reason why it cannot be batched."""
    try:
        yield
    except Exception as error:
        # The user's code may raise anything, and so may torch for operations that cannot be batched. If the error is
        # the step's own, the sequential engine will raise it again.
        raise NotVectorizableError(explained(error)) from error


class _DifferenceError(Exception):
    """The error of two clients at once whose values differ from those alone, or cannot be compared."""
