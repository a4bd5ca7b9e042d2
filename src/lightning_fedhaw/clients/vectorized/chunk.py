"""A chunk of clients that train at once: one row each in stacks of parameters, buffers and optimizer states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.clients.clipping import clipped
from lightning_fedhaw.clients.engine import ClientTask, Engine
from lightning_fedhaw.clients.local_parameters import LOCAL_PARAMETERS, in_host_memory
from lightning_fedhaw.clients.lr_scale import ScaledSteps, initial_scale_states
from lightning_fedhaw.clients.rates import scaled_rates
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.clients.steps import parameters_of
from lightning_fedhaw.clients.tangents import RATE_TANGENT, OptimizerState, RateTangents, constant_factor
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, Gradients, StepInputs
from lightning_fedhaw.clients.vectorized.calls import Call, CallPlan, Sharing, row_index_of
from lightning_fedhaw.clients.vectorized.compiled import CompiledStep
from lightning_fedhaw.clients.vectorized.optimizers import RowIndex, StackedOptimizer
from lightning_fedhaw.clients.vectorized.repeated import RepeatedStep
from lightning_fedhaw.clients.vectorized.trial import Facts
from lightning_fedhaw.cohort import ClientUpdate, factors_of
from lightning_fedhaw.data.partitioners.partition import swap_labels
from lightning_fedhaw.isolation import seed_randomness
from lightning_fedhaw.objectives.base import ClientState, Named
from lightning_fedhaw.streams import seed_of


class Chunk:
    """Some clients that train at once, one row each: those with more samples first.

    Args:
        engine: The engine, with the plan, the data, and the state that its clients keep from round to round.
        tasks: The clients' tasks.
        step: The batched step.
        facts: What the trial found out about the step.
        compiled: The compiled step, to be called instead of the batched one.
        repeated: The step that repeats recorded calls, to be called instead of the batched one.

    Attributes:
        made: The optimizer steps that each row has made.
        skipped: The steps of each row that were tried and skipped.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[ClientTask],
        step: BatchedStep,
        facts: Facts,
        compiled: CompiledStep | None = None,
        repeated: RepeatedStep | None = None,
    ) -> None:
        self.engine = engine
        self.step = step
        self.facts = facts
        # A graph would not carry tangents.
        self.compiled = compiled if engine.gradient_slope is None else None
        self.plain_step = repeated or step
        self.batch_size = engine.data.settings.batch_size
        self._sort(tasks)
        self.made = [0] * len(tasks)
        self.skipped = [0] * len(tasks)
        self._load_model()
        self._load_objectives()
        self._load_lr_scale()
        self._load_streams(tasks[0].client)

    # ------------------------------------------------------------------ the start

    def _sort(self, tasks: Sequence[ClientTask]) -> None:
        """Assign the rows: clients with equally many samples are neighbors, so that most groups of rows are slices."""
        plan = self.engine.plan
        data = self.engine.data
        round_idx = self.engine.host.round
        orders = []
        for task in tasks:
            epochs = plan.epochs_of(task.client)
            num_batches = plan.steps_of(task.client)
            passes = data.orders(task.client, round_idx, epochs=epochs, num_batches=num_batches, limit=plan.limit)
            orders.append(list(passes))
        totals = [_num_samples(passes) for passes in orders]
        # `sorted` is stable, so that clients with equally many samples stay in the order of the tasks.
        by_length = sorted(range(len(tasks)), key=lambda number: -totals[number])
        # The inverse permutation: the row of each task.
        self.row_of = sorted(range(len(tasks)), key=by_length.__getitem__)
        self.tasks = [tasks[number] for number in by_length]
        # By row and pass: the samples in the order in which the client sees them.
        self.orders = [orders[number] for number in by_length]
        self.clients = [task.client for task in self.tasks]
        self.swaps = {}
        for row, client in enumerate(self.clients):
            if client in data.partition.label_swaps:
                self.swaps[row] = data.partition.label_swaps[client]

    def _load_model(self) -> None:
        """Stack the parameters, buffers and optimizer states that the clients start from."""
        engine = self.engine
        host = engine.host
        layout = engine.layout
        first = self.tasks[0].start
        if all(task.start is first for task in self.tasks):
            # The usual case; a view costs no memory.
            self.start = first.expand(len(self.tasks), -1)
        else:
            self.start = torch.stack([task.start for task in self.tasks])
        self.stacks = []
        for view, dtype in zip(layout.views(self.start).values(), layout.dtypes, strict=True):
            # A copy in any case: the stacks are trained in place, and the start is needed afterwards.
            self.stacks.append(view.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True))
        self.num_shared = len(self.stacks)
        starts = [engine.local_parameters.start(client) for client in self.clients]
        for name in layout.local:
            self.stacks.append(torch.stack([start[name].to(host.device) for start in starts]))
        self.buffers = []
        for name in self.step.buffer_names:
            self.buffers.append(torch.stack([task.buffers[name].to(host.device) for task in self.tasks]))
        optimizer = host.optimizers[0]
        number_of = {id(parameter): number for number, parameter in enumerate(layout.trained_tensors(host.module))}
        # By position in the optimizer's groups: the parameter's number among the stacks; `None` for a frozen one.
        self.stack_numbers = [number_of.get(id(parameter)) for parameter in parameters_of(optimizer)]
        self.trained = [number for number in self.stack_numbers if number is not None]
        stacks: list[Tensor | None] = []
        for number in self.stack_numbers:
            stacks.append(None if number is None else self.stacks[number])
        # Only modules with one optimizer are vectorized, so that a client has one entry.
        states = [engine.optimizer_states.get(client, engine.initial_states)[0] for client in self.clients]
        self.tangents: RateTangents | None = None
        observer = None
        if engine.gradient_slope is not None:
            self.tangents = RateTangents(optimizer, stacks)
            observer = self._carry_tangents
        self.optimizer = StackedOptimizer(optimizer, stacks, self.facts.row_states, states, observer)

    def _load_objectives(self) -> None:
        """Stack the clients' states of the objectives."""
        self.starts: Named | None = None
        if self.engine.objectives:
            self.starts = self.engine.layout.views(self.start)
        states_of_clients = [self.engine.begin_objectives(task) for task in self.tasks]
        # By objective and name: `[rows, *shape]`.
        self.states: list[ClientState] = []
        for states in zip(*states_of_clients, strict=True):
            stacks = {}
            for name in states[0]:
                stacks[name] = torch.stack([state[name] for state in states])
            self.states.append(stacks)

    def _load_lr_scale(self) -> None:
        """Stack the clients' own factors on the learning rates, and the states of the rule's scale."""
        engine = self.engine
        layout = engine.layout
        self.scaled_steps: ScaledSteps | None = None
        own_scales = [engine.plan.lr_scale_of(client) for client in self.clients]
        self.lr_scales = factors_of(own_scales)
        if self.lr_scales is not None:
            self.lr_scales = self.lr_scales.to(engine.host.device, engine.layout.dtype)
        if engine.lr_scale is not None:
            clients = [(layout.views(task.start), engine.num_steps(task.client)) for task in self.tasks]
            rates = engine.host.learning_rates(layout)
            state = initial_scale_states(engine.lr_scale, clients, rates, own_scales)
            self.scaled_steps = ScaledSteps(engine.lr_scale, layout.names, state)

    def _load_streams(self, first: int) -> None:
        """Seed random numbers other than dropout's, which all rows share, by the client that the chunk begins with."""
        host = self.engine.host
        seed = self.engine.plan.seed
        self._generators: dict[int, torch.Generator] = {}
        seed_randomness(seed_of(seed, "round", host.round, "clients from", first), host.device)

    def _generator(self, row: int) -> torch.Generator:
        """Return the generator of a client's dropout masks; it is made for the first one."""
        if row not in self._generators:
            host = self.engine.host
            seed = seed_of(self.engine.plan.seed, "client", self.clients[row], "round", host.round, "model")
            self._generators[row] = torch.Generator(host.device).manual_seed(seed)
        return self._generators[row]

    # ------------------------------------------------------------------ local training

    def train(self) -> None:
        """Train all clients to the end of their local work."""
        try:
            for call in self._calls():
                self.engine.host.stop_if_asked()
                self._make(call)
        finally:
            # Otherwise chunk and step refer to each other, and their memory waits for a garbage collection.
            self.step.guard.generators = tuple
        layout = self.engine.layout
        self.displacements = torch.empty_like(self.start, memory_format=torch.contiguous_format)
        torch._foreach_copy_(list(layout.views(self.displacements).values()), self.stacks[: self.num_shared])
        self.displacements.sub_(self.start)
        if self.tangents is not None:
            self.rate_tangents = torch.zeros_like(self.displacements)
            views = list(layout.views(self.rate_tangents).values())
            for number, value in zip(self.stack_numbers, self.tangents.values, strict=True):
                if number is not None and value is not None:
                    views[number].copy_(value)

    def _calls(self) -> CallPlan:
        """Plan the calls."""
        sharing = self.facts.sharing
        if self.tangents is not None:
            # They are carried for each batch as it is.
            sharing = Sharing()
        return CallPlan(
            self.orders,
            self.batch_size,
            counts_steps=self.engine.plan.steps is not None,
            uses_index=self.facts.uses_index,
            sharing=sharing,
            parameters=self.engine.layout.numel,
        )

    def _make(self, call: Call) -> None:
        """Make a call, and one step of each of its clients."""
        rows = call.rows
        row_index = call.row_index
        samples = call.samples
        # A compiled step has graphs for few numbers of rows: the last row is repeated, and the copies are dropped.
        padding = 0
        if self.compiled is not None:
            padding = self.compiled.padding(len(rows), len(self.tasks))
        padded_index = row_index
        if padding:
            padded_index = row_index_of(rows + rows[-1:] * padding)
            samples = torch.cat([samples, samples[-1:].expand(padding, -1)])
        lengths = call.lengths
        if lengths is not None:
            lengths = torch.cat([lengths, lengths[-1:].expand(padding)]).to(self.engine.host.device)
        inputs = self._inputs(rows, padded_index, samples, call.batch_index)._replace(lengths=lengths)
        self.step.recorder.batch_size = samples.shape[1]
        outputs = self._gradients(inputs, row_index, len(rows))
        with torch.no_grad():
            if outputs.logged:
                logged = outputs.logged
                if padding:
                    logged = [value[: len(rows)] for value in logged]
                self.step.recorder.put(_row_numbers(row_index), logged, call.lengths)
            self._put_buffers(rows, row_index, outputs.buffers(inputs.buffers))
            if outputs.losses is not None:
                gradients = self._in_optimizer_order(outputs.gradients, len(rows))
                self._step(rows, row_index, clipped(gradients, self.engine.host.clipping))
        counts = self.skipped if outputs.losses is None else self.made
        for row in rows:
            counts[row] += 1

    def _gradients(self, inputs: StepInputs, row_index: RowIndex, num_rows: int) -> Gradients:
        """Compute the gradients of a call, and where a rate is learned their change along the tangents.

        Args:
            inputs: The inputs of the call.
            row_index: Its rows.
            num_rows: Their number, without copies of the last one.
        """
        if self.tangents is None:
            if self.compiled is not None:
                return self.compiled.gradients(self.trained, inputs, num_rows)
            return self.plain_step.gradients(self.trained, inputs)
        with self.tangents.level():
            duals = list(inputs.parameters)
            for position, number in enumerate(self.stack_numbers):
                if number is not None:
                    duals[number] = self.tangents.dual(position, inputs.parameters[number], row_index)
            outputs = self.step.gradients(self.trained, inputs._replace(parameters=duals))
            if outputs.losses is not None:
                gradients = self._in_optimizer_order(outputs.gradients, len(duals[0]))
                with torch.no_grad():
                    self.tangents.put_slopes(clipped(gradients, self.engine.host.clipping), row_index)
        # Duals of a level are plain tensors after it.
        return outputs

    def _carry_tangents(self, rows: slice, parameters: Sequence[Tensor], state: OptimizerState) -> None:
        """Carry the tangents of neighboring rows through the step that is about to be made."""
        assert self.tangents is not None
        own_factors = None
        if self.lr_scales is not None:
            own_factors = self.lr_scales[rows]
        self.tangents.step(parameters, state, constant_factor(self.engine.lr_scale), rows, own_factors)

    def _put_buffers(self, rows: list[int], row_index: RowIndex, buffers: Sequence[Tensor]) -> None:
        """Write the buffers after a call into their stacks.

        Args:
            rows: The rows of the call.
            row_index: The same as an index.
            buffers: ``[rows and copies, *shape]`` each.
        """
        for stack, value in zip(self.buffers, buffers, strict=True):
            # A slice of a stack is a view, and what the step changed in place is in the stack already.
            is_view = isinstance(row_index, slice) and len(value) == len(rows)
            if not is_view or value.data_ptr() != stack[row_index].data_ptr():
                stack[row_index] = value[: len(rows)]

    def _in_optimizer_order(self, gradients: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
        """Return the gradients of ``count`` rows for each parameter of the optimizer; ``None`` for a frozen one."""
        remaining = iter(gradients)
        ordered: list[Tensor | None] = []
        for number in self.stack_numbers:
            gradient = None if number is None else next(remaining)
            if gradient is not None and len(gradient) > count:
                # The rows after them are copies, for a compiled step.
                gradient = gradient[:count]
            ordered.append(gradient)
        return ordered

    def _inputs(self, rows: list[int], row_index: RowIndex, samples: Tensor, batch_index: int) -> StepInputs:
        """Collect the inputs of a call.

        Args:
            rows: Its rows.
            row_index: The same as an index, with the copies of the last row that a compiled step needs.
            samples: ``[rows and copies, batch]``, the indices of the samples.
            batch_index: The batch's number.
        """
        data = self.engine.data.gather(samples)
        if self.swaps:
            for position, row in enumerate(rows):
                if row in self.swaps:
                    data[1][position] = swap_labels(data[1][position], self.swaps[row])
        self.step.guard.generators = lambda: [self._generator(row) for row in rows]
        starts = None
        if self.starts is not None:
            starts = _rows_of(self.starts, row_index)
        return StepInputs(
            parameters=[stack[row_index].requires_grad_() for stack in self.stacks],
            buffers=[buffer[row_index] for buffer in self.buffers],
            batch=self.engine.host.prepare(data),
            batch_index=batch_index,
            starts=starts,
            states=[_rows_of(state, row_index) for state in self.states],
        )

    def _step(self, rows: list[int], row_index: RowIndex, gradients: Sequence[Tensor | None]) -> None:
        """Step the optimizer of each client of a call, and scale the step where the rule scales learning rates."""
        if self.scaled_steps is None and self.lr_scales is None:
            self.optimizer.step(rows, row_index, gradients)
            return
        previous = [stack[row_index].clone() for stack in self.stacks]
        self.optimizer.step(rows, row_index, gradients)
        scaled = [stack[row_index] for stack in self.stacks]
        if self.lr_scales is not None:
            self._scale_by_client(scaled, previous, row_index)
        if self.scaled_steps is not None:
            # Without local parameters, which come last and of which the rule does not know.
            count = self.num_shared
            self._scale_by_rule(scaled[:count], previous[:count], gradients, row_index)
        # Rows that are picked by an index tensor are copies.
        for stack, value in zip(self.stacks, scaled, strict=True):
            stack[row_index] = value

    def _scale_by_client(self, parameters: Sequence[Tensor], previous: Sequence[Tensor], row_index: RowIndex) -> None:
        """Scale a step by the clients' own factors, which equals a factor on the rates: see ``rates.PROPORTIONAL``."""
        assert self.lr_scales is not None
        for parameter, start in zip(parameters, previous, strict=True):
            weight = self.lr_scales[row_index].view(-1, *[1] * (start.ndim - 1)).to(start.dtype)
            parameter.copy_(torch.lerp(start, parameter, weight))

    def _scale_by_rule(
        self,
        parameters: Sequence[Tensor],
        previous: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        row_index: RowIndex,
    ) -> None:
        """Scale a step by the rule's scale."""
        assert self.scaled_steps is not None
        gradient_of = dict(zip(self.stack_numbers, gradients, strict=True))
        in_layout_order = [gradient_of.get(number) for number in range(len(parameters))]
        self.scaled_steps.scale(parameters, previous, in_layout_order, row_index)

    # ------------------------------------------------------------------ the updates

    def updates(self) -> Iterator[ClientUpdate]:
        """Return the updates, in the order of the tasks.

        Yields:
            Each update, while the client's model is in the module, for callbacks that look at it.
        """
        module = self.engine.host.module
        layout = self.engine.layout
        tensors = [*layout.trained_tensors(module), *layout.tracked_buffers(module).values()]
        stacks = [*self.stacks, *self.buffers]
        logged = self.step.recorder.collect_rows(len(self.tasks))
        for row in self.row_of:
            with torch.no_grad():
                torch._foreach_copy_(tensors, [stack[row] for stack in stacks])
            self.engine.host.client = self.clients[row]
            yield self._update(row, logged[row])

    def _update(self, row: int, logged: dict[str, Logged]) -> ClientUpdate:
        engine = self.engine
        task = self.tasks[row]
        optimizer_states = []
        if engine.plan.optimizer_state == "kept":
            optimizer_states.append(self.optimizer.states(row))
        buffers = {}
        for name, buffer in zip(self.step.buffer_names, self.buffers, strict=True):
            buffers[name] = buffer[row].clone()
        local_stacks = self.stacks[self.num_shared :]
        local = _rows_of(dict(zip(engine.layout.local, local_stacks, strict=True)), row)
        objective_states = []
        if engine.objectives:
            # Without local parameters, whose stacks come last.
            end = _rows_of(dict(zip(engine.layout.names, self.stacks, strict=False)), row)
            states = [_rows_of(state, row) for state in self.states]
            # Objectives such as SCAFFOLD's read the rates.
            with scaled_rates(engine.host, engine.plan.lr_scale_of(task.client)):
                objective_states = engine.end_objectives(task, states, end, {**buffers, **local}, self.made[row])
        memory: dict[str, Any] = {
            "optimizers": optimizer_states,
            "objectives": objective_states,
            LOCAL_PARAMETERS: in_host_memory(local.items()),
        }
        if self.tangents is not None:
            memory[RATE_TANGENT] = self.rate_tangents[row]
        return ClientUpdate(
            client=task.client,
            num_examples=len(engine.data.train_indices[task.client]),
            num_steps=self.made[row],
            num_skipped=self.skipped[row],
            displacement=self.displacements[row],
            buffers=buffers,
            logged=logged,
            memory=memory,
            num_batches=engine.num_batches(task.client),
            lr_scale=engine.plan.lr_scale_of(task.client),
            inverse_probability=task.inverse_probability,
        )


def _num_samples(passes: Sequence[Tensor]) -> int:
    return sum(order.numel() for order in passes)


def _rows_of(stacks: Mapping[str, Tensor], index: RowIndex | int) -> dict[str, Tensor]:
    """Pick rows of named stacks."""
    return {name: stack[index] for name, stack in stacks.items()}


def _row_numbers(index: RowIndex) -> Tensor:
    """Return the rows of an index as a tensor."""
    if isinstance(index, slice):
        return torch.arange(index.start, index.stop)
    return index
