"""Two clients whose steps are run at once and alone, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

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
)
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.guard import StepGuard
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.snapshot import Snapshot
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import seed_randomness
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, make_watch
from lightning_fedhaw.streams import seed_of, stream
from lightning_fedhaw.vectors.layout import ParameterLayout


class DifferenceError(Exception):
    """The error of two clients at once whose values differ from those alone, or cannot be compared."""


class Pair:
    """Two clients with different models and data, whose steps are run together and alone.

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

    def alone(self, row: int, context: AbstractContextManager[object], length: int | None = None) -> Values:
        """Run one client's step in the module itself, and return all its values.

        Args:
            row: The client, 0 or 1.
            context: A context for the call of ``training_step``.
            length: The number of samples, the first ones of its batch. Default: all.
        """
        self.snapshot.restore()
        host = self.host
        self.trained.write(self.vectors[row], self.parameters)
        self.snapshot.mark()
        batch = self._prepared([tensor[row, :length].clone() for tensor in self.batch])
        with LogRecorder(host.module, host.callbacks) as recorder:
            recorder.batch_size = length or self.batch_size
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
            examples = recorder.examples()
        values: Values = {LOSS: loss.detach().reshape(())}
        for name, gradient in zip(self.trained.names, gradients, strict=True):
            values[f"{GRADIENT} `{name}`"] = gradient
        for name, buffer in self.layout.tracked_buffers(host.module).items():
            values[f"buffer `{name}`"] = buffer.detach().clone()
        for name, numbers in logged.items():
            values[f"logged `{name}`"] = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
            values[f"the examples of `{name}`"] = torch.tensor(examples[name], dtype=torch.float64)
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

    def together(
        self, guard: StepGuard, same_draws: bool = False, lengths: Sequence[int] | None = None
    ) -> list[Values]:
        """Run both clients' steps at once, and return the values of each.

        Args:
            guard: Surrounds the clients' steps.
            same_draws: Whether both are given the same random numbers other than dropout's.
            lengths: The number of samples of each that count, the first ones of its batch. Default: all.
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
            counted: Tensor | None = None
            if lengths is not None:
                counted = torch.tensor(lengths, dtype=torch.float32, device=host.device)
            outputs = step(StepInputs(stacks, buffers, batch, self.index, self.starts, self.states, counted))
            assert outputs.losses is not None
            gradients = self._stack_gradients(outputs.losses, stacks)
            recorder.put(torch.arange(2), outputs.logged, counted)
            logged = {name: torch.stack(numbers) for name, numbers in recorder.stacks().items()}
            examples = {name: torch.stack(numbers) for name, numbers in recorder.stack_examples().items()}
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
                values[f"the examples of `{name}`"] = examples[name][:, row]
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

    def check_equal(self, together: Sequence[Values], alone: Sequence[Values], dtype: torch.dtype) -> None:
        """Refuse a step that gives one of two clients other values than alone.

        Raises:
            DifferenceError: Naming the first value that differs by more than rounding.
        """
        for row in (0, 1):
            if first_difference(together[row], alone[row], dtype) is None:
                continue
            # Parts of a step may compute in less precision than the one it is run in, so rounding is measured.
            noise = self._noise(row, alone[row])
            try:
                name = first_difference(together[row], alone[row], dtype, noise)
            except NotVectorizableError as error:
                raise DifferenceError(str(error)) from error
            if name is not None:
                raise DifferenceError(f"gives another value of {name} for two clients at once than alone")

    @contextmanager
    def computing_in(self, precision: Precision, dtype: torch.dtype, size: int) -> Iterator[None]:
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

    def alone_with_masks(self, row: int) -> Values:
        """Run one client alone, with the dropout masks and other draws that it is given in the batched call."""
        seed_randomness(self.seeds[0], self.host.device)
        guard = StepGuard()
        generators = self._generators()[row : row + 1]
        guard.generators = lambda: generators
        return self.alone(row, guard)

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
            for name, value in self.alone_with_masks(row).items():
                noise[name] = max(noise[name], distance(value, values[name]))
        self.vectors[row] = vector
        return noise
