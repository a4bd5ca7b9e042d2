"""The sequential engine: one client after another in the user's own module, through a lean loop."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedhaw.clients.engine import ClientTask, EndState, Engine, locate
from lightning_fedhaw.clients.frozen import FrozenTensors
from lightning_fedhaw.clients.local_parameters import LOCAL_PARAMETERS, in_host_memory
from lightning_fedhaw.clients.lr_scale import ScaledOptimizer, ScaledSteps, initial_scale_states
from lightning_fedhaw.clients.optimizer_states import restore_settings, restore_states, settings_of, states_of
from lightning_fedhaw.clients.rates import scale_rates, unscaled
from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.sequential_tangents import SequentialTangents
from lightning_fedhaw.clients.steps import (
    AutomaticStep,
    BatchProgress,
    LocalStep,
    ManualStep,
    PlainSGDStep,
    ScheduleStates,
    StepCounts,
    Terms,
)
from lightning_fedhaw.clients.tangents import RATE_TANGENT, constant_factor
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.objectives.base import ClientState, make_watch
from lightning_fedhaw.streams import seed_of


class SequentialEngine(Engine):
    """The engine that trains clients one by one in the user's module."""

    # Whether a client has trained in this fit.
    _has_trained = False

    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort, one client at a time.

        The module holds a client's model while it trains; the caller puts the server's model back.

        Yields:
            Each client's update, before the next client starts.
        """
        host = self.host
        parameters = self.layout.tensors(host.module)
        begin = self.current_state()
        # A round that fails, or is not run to its end, is run again from where it began.
        end = begin
        self._scaled_optimizer: ScaledOptimizer | None = None
        if self.lr_scale is not None:
            # Before the step is chosen, because hooks on the optimizer rule out plain SGD.
            self._scaled_optimizer = ScaledOptimizer(host.optimizers[0], parameters)
        self._tangents: SequentialTangents | None = None
        if self.gradient_slope is not None:
            factor = constant_factor(self.lr_scale)
            self._tangents = SequentialTangents(host.optimizers[0], self.layout, self.gradient_slope, factor)
        step = self._make_step()
        module_state = _ModuleState(host.module)
        self.attributes.begin()
        try:
            with (
                isolated_randomness(host.device),
                LogRecorder(host.module, host.callbacks) as recorder,
                self._memory_format(),
            ):
                end = yield from self._run_clients(tasks, begin, parameters, step, recorder, module_state)
        finally:
            host.client = None
            module_state.restore()
            self.attributes.restore()
            for optimizer, states in zip(host.optimizers, self.initial_states, strict=True):
                restore_states(optimizer, states)
            step.close()
            for hooked in (self._scaled_optimizer, self._tangents):
                if hooked is not None:
                    hooked.close()
            self._end_state = end
            self.restore_end_state([end])

    def _run_clients(
        self,
        tasks: Iterable[ClientTask],
        begin: EndState,
        parameters: Sequence[nn.Parameter],
        step: LocalStep,
        recorder: LogRecorder,
        module_state: _ModuleState,
    ) -> Generator[ClientUpdate, None, EndState]:
        """Train the clients, each from the beginning of the round.

        Args:
            tasks: Their tasks.
            begin: Settings, schedules and loss scale at the beginning of the round.
            parameters: The module's trainable parameters, without the local ones.
            step: The local step.
            recorder: Records what is logged.
            module_state: The flags of the module at the beginning of the round.

        Yields:
            Each client's update, before the next client starts.

        Returns:
            Settings and schedules of the furthest client, and all clients' loss scales.
        """
        host = self.host
        frozen = FrozenTensors(host.module, self.layout, compares_content=not self._has_trained)
        furthest = begin
        scales = []
        for task in tasks:
            self._load(begin)
            module_state.restore()
            host.client = task.client
            scale = self.plan.lr_scale_of(task.client)
            if scale != 1.0:
                scale_rates(host, scale)
            update = self._train(task, parameters, step, recorder)
            frozen.check(task.client)
            self._has_trained = True
            yield update
            host.client = None
            if _progress(host.schedules()) > _progress(furthest.schedules):
                furthest = self.current_state()
                if scale != 1.0:
                    furthest = unscaled(furthest, begin, scale)
            if host.scaler is not None:
                scales.append(host.scaler.state_dict())
        return furthest._replace(scales=scales)

    def close(self) -> None:
        """Release what is needed during a round only."""
        super().close()
        self._scaled_optimizer = None
        self._tangents = None

    def end_state(self) -> EndState:
        """Return settings and schedules of the furthest client, and all clients' loss scales."""
        return self._end_state._replace(attributes=self.attributes.pending)

    def restore_end_state(self, end_states: Sequence[EndState]) -> None:
        """Load the furthest schedule and the smallest loss scale of all processes."""
        super().restore_end_state(end_states)
        furthest = furthest_of(end_states)
        restore_settings(self.host.optimizers, furthest.settings)
        self.host.load_schedules(furthest.schedules)
        scales = list(chain.from_iterable(state.scales for state in end_states))
        if scales and self.host.scaler is not None:
            # The smallest one is safe for all clients; the others overflowed, or may soon.
            smallest = min(scales, key=lambda state: state["scale"])
            self.host.scaler.load_state_dict(smallest)

    # ------------------------------------------------------------------ the state of settings, schedules, loss scale

    def current_state(self) -> EndState:
        """Return settings, schedules and loss scale as they are now."""
        scales = []
        if self.host.scaler is not None:
            scales.append(self.host.scaler.state_dict())
        return EndState(settings_of(self.host.optimizers), self.host.schedules(), scales, {})

    def _load(self, state: EndState) -> None:
        """Let a client start with the settings, schedules and loss scale of the round."""
        restore_settings(self.host.optimizers, state.settings)
        self.host.load_schedules(state.schedules)
        if self.host.scaler is not None:
            self.host.scaler.load_state_dict(dict(state.scales[0]))

    # ------------------------------------------------------------------ one client

    def _make_step(self) -> LocalStep:
        if not self.host.module.automatic_optimization:
            return ManualStep(self.host)
        if self.host.is_plain_sgd:
            return PlainSGDStep(self.host)
        return AutomaticStep(self.host)

    def _memory_format(self) -> AbstractContextManager[None]:
        parameters: Iterable[nn.Parameter] = ()
        if self.plan.channels_last:
            parameters = self.host.module.parameters()
        return _channels_last(parameters)

    def _train(
        self, task: ClientTask, parameters: Sequence[nn.Parameter], step: LocalStep, recorder: LogRecorder
    ) -> ClientUpdate:
        """Train one client, and return its update."""
        host = self.host
        self.attributes.load(task.client)
        self._load_model(task, parameters)
        # Only now, so that a client's draws do not depend on the clients before it.
        seed = seed_of(self.plan.seed, "client", task.client, "round", self.host.round, "model")
        seed_randomness(seed, self.host.device)
        self._begin_lr_scale(task)
        if self._tangents is not None:
            self._tangents.begin(list(parameters))
        states = self.begin_objectives(task)
        named = dict(zip(self.layout.names, parameters, strict=True))
        terms = None
        if self.objectives:
            watch = make_watch(self.objectives, host.module, host.step_context)
            terms = Terms(self.objectives, named, self.layout.views(task.start), states, watch)
        with host.client_pass(self.num_batches(task.client)) as progress:
            counts = self._train_batches(task.client, step, recorder, terms, progress)
        return self._update(task, named, states, counts, recorder)

    def _load_model(self, task: ClientTask, parameters: Sequence[nn.Parameter]) -> None:
        """Load what a client starts from: parameters, buffers, optimizer states."""
        self.layout.write(task.start, parameters)
        with torch.no_grad():
            for name, parameter in self.layout.local_tensors(self.host.module).items():
                parameter.copy_(self.local_parameters.start(task.client)[name])
        if task.buffers:
            module_buffers = self.layout.tracked_buffers(self.host.module)
            for name, value in task.buffers.items():
                module_buffers[name].copy_(value)
        optimizer_states = self.optimizer_states.get(task.client, self.initial_states)
        for optimizer, states in zip(self.host.optimizers, optimizer_states, strict=True):
            restore_states(optimizer, states)

    def _begin_lr_scale(self, task: ClientTask) -> None:
        """Give the client's steps their scale, where the rule has one."""
        if self.lr_scale is None or self._scaled_optimizer is None:
            return
        client = (self.layout.views(task.start), self.num_steps(task.client))
        stacks = initial_scale_states(self.lr_scale, [client], self.host.learning_rates(self.layout))
        state = {name: stack[0] for name, stack in stacks.items()}
        self._scaled_optimizer.scaled_steps = ScaledSteps(self.lr_scale, self.layout.names, state)

    def _train_batches(
        self, client: int, step: LocalStep, recorder: LogRecorder, terms: Terms | None, progress: BatchProgress
    ) -> StepCounts:
        """Train the module on a client's batches, and count the optimizer steps."""
        host = self.host
        plan = self.plan
        counts = StepCounts()
        num_batches = plan.steps_of(client)
        if num_batches is not None:
            num_batches = num_batches * host.accumulate
        epochs = plan.epochs_of(client)
        skips_pass = False
        for batch in self.data.batches(client, host.round, epochs=epochs, num_batches=num_batches, limit=plan.limit):
            host.stop_if_asked()
            if batch.index == 0:
                skips_pass = False
            if skips_pass:
                continue
            if batch.ends_task:
                progress.is_last_batch = True
            data = host.prepare(batch.data)
            recorder.batch_size = batch.size
            # As in Lightning, a hook that returns -1 ends the epoch, which here is the pass over the client's data.
            if host.on_batch_start(data, batch.index):
                skips_pass = True
                continue
            try:
                if self._tangents is not None:
                    self._tangents.see(data, batch.index, terms)
                outputs = step(data, batch, counts, terms)
                host.on_batch_end(outputs, data, batch.index)
            except Exception as error:
                # The user's code may raise anything; the error is raised again, with a note that says where.
                full_batch = self.data.settings.batch_size
                locate(error, f"client {client}, round {host.round}", batch.size, full_batch)
                raise
        return counts

    def _update(
        self,
        task: ClientTask,
        named: Mapping[str, Tensor],
        states: Sequence[ClientState],
        counts: StepCounts,
        recorder: LogRecorder,
    ) -> ClientUpdate:
        """Read a client's update from the module.

        Args:
            task: The client's task.
            named: The module's trainable parameters by name, without the local ones.
            states: The client's state of each objective when it began.
            counts: Its optimizer steps.
            recorder: Holds what was logged.
        """
        client = task.client
        optimizer_states = []
        if self.plan.optimizer_state == "kept":
            optimizer_states = [states_of(optimizer) for optimizer in self.host.optimizers]
        end = {name: parameter.detach() for name, parameter in named.items()}
        buffers = self._end_buffers(task)
        local = in_host_memory(self.layout.local_tensors(self.host.module).items())
        memory: dict[str, Any] = {
            # The first, because an objective may call the module's step.
            "attributes": self.attributes.changes(),
            "optimizers": optimizer_states,
            "objectives": self.end_objectives(task, states, end, {**buffers, **local}, counts.made),
            LOCAL_PARAMETERS: local,
        }
        if self._tangents is not None:
            memory[RATE_TANGENT] = self._tangents.vector()
        displacement = self.layout.read(list(named.values()), out=task.slot()).sub_(task.start)
        return ClientUpdate(
            client=client,
            num_examples=len(self.data.train_indices[client]),
            num_steps=counts.made,
            num_skipped=counts.skipped,
            displacement=displacement,
            buffers=buffers,
            logged=recorder.collect(),
            memory=memory,
            num_batches=self.num_batches(client),
            lr_scale=self.plan.lr_scale_of(client),
            inverse_probability=task.inverse_probability,
        )

    def _end_buffers(self, task: ClientTask) -> dict[str, Tensor]:
        """Copy the buffers that the client started from, as training left them."""
        if not task.buffers:
            return {}
        # Looked up again, because a step may have assigned another tensor to a buffer.
        module_buffers: dict[str, Tensor] = dict(self.host.module.named_buffers())
        if self.layout.frozen_parameters:
            module_buffers.update(self.host.module.named_parameters())
        buffers = {}
        for name, start in task.buffers.items():
            buffers[name] = _same_shape(name, module_buffers.get(name), start)
        return buffers


@contextmanager
def _channels_last(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Lay out 4-D parameters channels-last inside the context."""
    converted = []
    for parameter in parameters:
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            converted.append(parameter)
    try:
        for parameter in converted:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter in converted:
            parameter.data = parameter.data.contiguous()


class _ModuleState:
    """The state of the module that no client may change for the next one.

    These are training flags, trainability, and gradients.

    Args:
        module: The user's module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(submodule, submodule.training) for submodule in module.modules()]
        self.trainability = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore(self) -> None:
        """Restore flags and trainability, and clear gradients."""
        for submodule, training in self.modes:
            if submodule.training != training:
                submodule.training = training
        for parameter, is_trainable in self.trainability:
            parameter.grad = None
            if parameter.requires_grad != is_trainable:
                parameter.requires_grad_(is_trainable)


def _same_shape(name: str, end: Tensor | None, start: Tensor) -> Tensor:
    """Copy a buffer after local training.

    Raises:
        ValueError: If it is gone or has another shape than before.
    """
    if end is not None and end.shape == start.shape:
        return end.detach().clone()
    shape = "gone"
    if end is not None:
        shape = f"of the shape {list(end.shape)}"
    raise ValueError(
        f"Buffer `{name}` of the shape {list(start.shape)} is {shape} after local training, and buffers that change"
        " their shape cannot be sent. Keep its shape, or hold it in an attribute that is not a buffer. If the first"
        " batch sets the shape, as with observers of quantization, run one batch through the model before `fit`."
    )


def furthest_of(end_states: Sequence[EndState]) -> EndState:
    """Return the first end state whose schedules have made the most steps."""
    return max(end_states, key=lambda state: _progress(state.schedules))


def _progress(schedules: ScheduleStates) -> int:
    """Add up the steps that the schedules have made."""
    return sum(state.get("last_epoch", 0) for state in schedules)
