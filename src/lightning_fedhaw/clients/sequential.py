"""The sequential engine: one client after another in the user's own module, through a lean loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedhaw.clients.engine import (
    ClientTask,
    Engine,
    Settings,
    give_settings,
    give_states,
    locate,
    settings_of,
    states_of,
)
from lightning_fedhaw.clients.lr_scale import ScaledOptimizer, ScaledSteps, begin
from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.steps import AutomaticStep, ManualStep, PlainSGDStep, StepCounts, Terms
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.layout import ParameterLayout


class SequentialEngine(Engine):
    """Trains clients one by one in the user's module."""

    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort, one client at a time.

        The module holds a client's model while it trains; whoever runs the engine puts the server's back.

        Yields:
            Each client's update, before the next client starts.
        """
        host = self.host
        parameters = self.layout.tensors(host.module)
        settings, schedules = settings_of(host.optimizers), host.schedules()
        furthest = settings, schedules
        scale = host.scaler.state_dict() if host.scaler is not None else None
        scales: list[dict[str, Any]] = []
        complete = False
        # Before the step is chosen, which is another one where an optimizer has hooks.
        self._scaled_optimizers = None if self.lr_scale is None else ScaledOptimizer(host.optimizers[0], parameters)
        step, modes = self._make_step(), _Modes(host.module, self.layout)
        try:
            with (
                isolated_randomness(host.device),
                LogRecorder(host.module, host.callbacks) as recorder,
                _channels_last(host.module.parameters() if self.plan.channels_last else ()),
            ):
                for task in tasks:
                    give_settings(host.optimizers, settings)
                    host.load_schedules(schedules)
                    modes.restore()
                    if scale is not None:
                        host.scaler.load_state_dict(dict(scale))
                    update = self._task(task, parameters, step, recorder)
                    modes.check(task.client)
                    yield update
                    if _progress(host.schedules()) > _progress(furthest[1]):
                        furthest = settings_of(host.optimizers), host.schedules()
                    if scale is not None:
                        scales.append(host.scaler.state_dict())
            complete = True
        finally:
            if not complete:  # the round failed, and will be played again from where it began
                furthest, scales = (settings, schedules), [] if scale is None else [scale]
            modes.restore()
            for optimizer, states in zip(host.optimizers, self.initial, strict=True):
                give_states(optimizer, states)
            close: Callable[[], None] = getattr(step, "close", lambda: None)
            close()
            if self._scaled_optimizers is not None:
                self._scaled_optimizers.close()
            self._end_state = (*furthest, scales)
            self.restore_end_state([self._end_state])

    def close(self) -> None:
        """Let go of what only a round needs."""
        super().close()
        self._scaled_optimizers = None

    def end_state(self) -> tuple[Settings, list[dict[str, Any]], list[dict[str, Any]]]:
        """Settings of the optimizers, states of the schedules, and the clients' loss scales."""
        return self._end_state

    def restore_end_state(self, end_states: Sequence[Any]) -> None:
        """Take the furthest schedule, and the smallest loss scale."""
        settings, schedules, _ = max(end_states, key=lambda end_state: _progress(end_state[1]))
        give_settings(self.host.optimizers, settings)
        self.host.load_schedules(schedules)
        scales = [scale for *_, scales in end_states for scale in scales]
        if scales:
            self.host.scaler.load_state_dict(min(scales, key=lambda state: state["scale"]))

    def _make_step(self) -> PlainSGDStep | AutomaticStep | ManualStep:
        if not self.host.module.automatic_optimization:
            return ManualStep(self.host)
        return PlainSGDStep(self.host) if self.host.is_plain_sgd else AutomaticStep(self.host)

    def _task(self, task: ClientTask, parameters: Sequence[Tensor], step: Any, recorder: LogRecorder) -> ClientUpdate:
        host, client = self.host, task.client
        self.layout.write(task.start, parameters)
        if task.buffers:
            own_buffers = dict(host.module.named_buffers())
            for name, value in task.buffers.items():
                own_buffers[name].copy_(value)
        for optimizer, memory in zip(host.optimizers, self.kept.get(client, self.initial), strict=True):
            give_states(optimizer, memory)
        seed_randomness(seed_of(self.plan.seed, "client", client, "round", host.round, "model"), host.device)

        if self.lr_scale is not None and self._scaled_optimizers is not None:
            steps = [(self.layout.views(task.start), self.num_steps(client))]
            state = begin(self.lr_scale, steps, host.learning_rates(self.layout))
            self._scaled_optimizers.scaled_steps = ScaledSteps(
                self.lr_scale, self.layout.names, {name: value[0] for name, value in state.items()}
            )
        states = self.begin_objectives(task)
        named = dict(zip(self.layout.names, parameters, strict=True))
        terms = Terms(self.objectives, named, self.layout.views(task.start), states) if self.objectives else None
        counts = self._train(client, step, recorder, terms)
        end = {name: parameter.detach() for name, parameter in named.items()}
        memories = {
            "optimizers": [states_of(o) for o in host.optimizers] if self.plan.optimizer_state == "kept" else [],
            "objectives": self.end_objectives(task, states, end, counts.made),
        }
        # Read anew: a step may have put another tensor in a buffer's place.
        ended = dict(host.module.named_buffers()) if task.buffers else {}
        displacement = self.layout.read(parameters, out=task.slot()).sub_(task.start)
        return ClientUpdate(
            client=client,
            num_examples=len(self.data.train_indices[client]),
            num_steps=counts.made,
            num_skipped=counts.skipped,
            displacement=displacement,
            buffers={name: _same_shape(name, ended.get(name), value) for name, value in task.buffers.items()},
            logged=recorder.collect(),
            memory=memories,
            num_batches=self.num_batches(client),
        )

    def _train(self, client: int, step: Any, recorder: LogRecorder, terms: Terms | None) -> StepCounts:
        host, plan, counts = self.host, self.plan, StepCounts()
        batches = self.data.batches(
            client,
            host.round,
            epochs=plan.epochs,
            num_batches=None if plan.steps is None else plan.steps * host.accumulate,
            limit=plan.limit,
        )
        skipping = False
        for batch in batches:
            if batch.index == 0:
                skipping = False
            if skipping:
                continue
            data = host.prepare(batch.data)
            recorder.batch_size = batch.size
            if host.on_batch_start(data, batch.index):
                skipping = True
                continue
            try:
                outputs = step(data, batch, counts, terms)
                host.on_batch_end(outputs, data, batch.index)
            except Exception as error:
                locate(error, f"client {client}, round {host.round}", batch.size)
                raise
        return counts


@contextmanager
def _channels_last(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Lay out 4-D parameters channels-last; at the end, as they were."""
    moved = [p for p in parameters if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last)]
    try:
        for parameter in moved:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter in moved:
            parameter.data = parameter.data.contiguous()


class _Modes:
    """What no client may leave behind: training flags, trainability, gradients, other values of what is frozen."""

    def __init__(self, module: Any, layout: ParameterLayout) -> None:
        self.training = [(submodule, submodule.training) for submodule in module.modules()]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self.frozen = {n: (t, t._version) for n, t in layout.frozen_tensors(module).items()}

    def restore(self) -> None:
        for submodule, training in self.training:
            if submodule.training != training:
                submodule.training = training
        for parameter, trainable in self.trainable:
            parameter.grad = None
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)

    def check(self, client: int) -> None:
        for name, (tensor, version) in self.frozen.items():
            if tensor._version == version:
                continue
            kind, remedy = "buffer", "Call `train()` on its module before `fit`, and `buffers=` takes care of it."
            if isinstance(tensor, nn.Parameter):
                kind = "parameter"
                remedy = "Make it a buffer (`register_buffer`), which `buffers=` takes care of, or trainable."
            raise RuntimeError(
                f"Client {client} changed the frozen {kind} `{name}` in local training, and what is frozen does not"
                f" travel: the change would pass to whoever trains next. {remedy}"
            )


def _same_shape(name: str, ended: Tensor | None, started: Tensor) -> Tensor:
    if ended is None or ended.shape != started.shape:
        shape = "gone" if ended is None else f"of the shape {list(ended.shape)}"
        raise ValueError(
            f"Buffer `{name}` of the shape {list(started.shape)} is {shape} after local training, and buffers that"
            " change their shape cannot be sent. Keep its shape, or hold it in an attribute that is not a buffer."
        )
    return ended.detach().clone()


def _progress(schedules: list[dict[str, Any]]) -> int:
    """How far the schedules have come, in all."""
    return sum(state.get("last_epoch", 0) for state in schedules)
