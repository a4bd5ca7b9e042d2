"""What every engine is given, and what it returns: the local plan, a client task, and the state that clients keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_fedhaw.clients.attributes import Changes, ClientAttributes
from lightning_fedhaw.clients.evaluation import ClientEvaluation, ClientMetrics
from lightning_fedhaw.clients.local_buffers import LocalBuffers
from lightning_fedhaw.clients.local_parameters import LocalParameters
from lightning_fedhaw.clients.optimizer_states import OptimizerStates, Settings, states_of
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.steps import BatchData, Host, ScheduleStates, Terms
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.loader_settings import pass_lengths
from lightning_fedhaw.notes import add_note
from lightning_fedhaw.objectives.base import GRADIENT, ClientObjective, ClientState, Named
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import LocalLRScale
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import is_out_of_memory


class GradientSlope(Protocol):
    """The gradient of a batch, and its change along a tangent."""

    def __call__(
        self, vector: Tensor, tangent: Tensor, data: BatchData, batch_idx: int, terms: Terms | None
    ) -> tuple[Tensor, Tensor]:
        """Return both, ``[P]`` each, as the optimizer gets them: with the terms of objectives, and clipped.

        Args:
            vector: ``[P]``, the parameters.
            tangent: ``[P]``.
            data: The batch, on the model's device.
            batch_idx: Its number.
            terms: The terms of client objectives at the client; ``None`` without any.
        """


@dataclass(frozen=True)
class ClientTask:
    """One client's task in a round: the model it received, and where its displacement is written.

    Attributes:
        client: The client's number.
        start: ``[P]``, the parameters it starts from.
        buffers: The buffers it starts from.
        slot: Returns the memory ``[P]``, on the model's device, of the next update. An engine that trains one client
            at a time writes the displacement there, which saves a copy.
        inverse_probability: The factor on its weight, where chances of being sampled are unequal.
    """

    client: int
    start: Tensor
    buffers: Mapping[str, Tensor]
    slot: Callable[[], Tensor]
    inverse_probability: float = 1.0


class EndState(NamedTuple):
    """The state of settings, schedules and loss scale after a cohort was trained.

    Attributes:
        settings: The options of the optimizers' parameter groups.
        schedules: The states of the learning-rate schedules that the module steps itself.
        scales: The state of the loss scaler after each client.
        attributes: The changes of the module's attributes by each client whose update was received.
    """

    settings: Settings
    schedules: ScheduleStates
    scales: list[dict[str, Any]]
    attributes: dict[int, Changes]


class Engine(ABC):
    """The clients, as the rounds of a run use them: they train, keep what is theirs, and evaluate the global model.

    Args:
        host: The trainer around it.
        layout: Where each trainable parameter lives in the flat vector.
        data: The clients' data.
        plan: The local work of a client in a round.
        objectives: The terms that clients add to their loss.

    Attributes:
        optimizer_states: With ``optimizer_state="kept"``, the states of each client's optimizers.
        initial_states: The optimizers' states that a client without its own starts from: those of the constructors.
        attributes: The attributes of the module that clients keep.
        lr_scale: The rule's scale of the clients' learning rates in this round; ``None`` without one.
        local_parameters: The parameters that stay with the clients.
        local_buffers: The buffers that stay with the clients.
        gradient: Computes the gradient ``[P]`` of a client's mean loss at parameters ``[P]``, for objectives that need
            it.
        gradient_slope: Computes how the gradient of a batch changes along a tangent; ``None`` where the clients' rate
            is not learned by its derivative.
        absent: The clients of the last run whose update did not arrive.
    """

    elsewhere: str | None = None
    """Where clients train, if it is not in this process; what they keep is there, too."""

    absent: Collection[int] = ()

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective] = (),
    ) -> None:
        self.host = host
        self.layout = layout
        self.data = data
        self.plan = plan
        self.objectives = objectives
        self.optimizer_states: dict[int, list[OptimizerStates]] = {}
        self.initial_states = [states_of(optimizer) for optimizer in host.optimizers]
        self.attributes = ClientAttributes(host.module, host.device)
        self.lr_scale: LocalLRScale | None = None
        self.local_parameters: LocalParameters
        self.local_buffers: LocalBuffers
        self.gradient: Callable[[int, Tensor], Tensor]
        self.gradient_slope: GradientSlope | None = None

    def succeed(self, engine: Engine) -> None:
        """Take over from another engine: what its clients keep, and what it was given for them.

        Args:
            engine: The engine that this one replaces. A checkpoint may have been loaded into it.
        """
        self.optimizer_states = engine.optimizer_states
        self.local_parameters = engine.local_parameters
        self.local_buffers = engine.local_buffers
        self.attributes = engine.attributes
        self.gradient = engine.gradient
        self.gradient_slope = engine.gradient_slope

    @property
    def clients_at_once(self) -> int:
        """The number of clients that train at the same time."""
        return 1

    @abstractmethod
    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort.

        Meanwhile the module may hold a client's model; the caller puts the server's model back.

        Yields:
            Each client's update, in the order of the tasks.
        """

    def cost(self, client: int) -> float:
        """Estimate the cost of a client's task: the number of samples in its local work."""
        steps = self.plan.steps_of(client)
        if steps is not None:
            return float(steps * self.data.settings.batch_size)
        return float(len(self.data.train_indices[client]) * (self.plan.epochs_of(client) or 1))

    def num_steps(self, client: int) -> int:
        """Return the number of optimizer steps that the plan gives a client in a round."""
        steps = self.plan.steps_of(client)
        if steps is not None:
            return steps
        # Rounded up: the last batches of a pass make a step even if the accumulation window is not full.
        batches_of_passes = pass_lengths(self.num_batches(client), self.plan.epochs_of(client) or 1)
        return sum(-(-batches // self.host.accumulate) for batches in batches_of_passes)

    def num_batches(self, client: int) -> int:
        """Return the number of batches in a pass over a client's data."""
        return self.data.batches_per_pass(self.data.samples_per_pass(client), self.plan.limit)

    def end_state(self) -> EndState:
        """Return the state of schedules and loss scale after the last run, for the other processes."""
        return EndState([], [], [], self.attributes.pending)

    def restore_end_state(self, end_states: Sequence[EndState]) -> None:
        """Merge the end states of all processes, and continue from the result in the next round."""
        pending: dict[int, Changes] = {}
        for state in end_states:
            pending.update(state.attributes)
        self.attributes.finish(pending)

    def evaluate(self, own: Mapping[int, Mapping[str, Tensor]], ranks: Ranks, batch_size: int | None) -> ClientMetrics:
        """Evaluate the global model, which is in the module, on every client's own data.

        Args:
            own: The parameters and buffers that a client has instead of the global model's, by client and name.
            ranks: The processes, each of which evaluates a part of the clients.
            batch_size: Samples in a batch; ``None`` for those of training.
        """
        moving = self.layout.frozen_parameters
        return ClientEvaluation(self.host, self.data, ranks, self.plan.seed, own, moving, batch_size).evaluate()

    def close(self) -> None:
        """Release what is needed during a round only."""
        self.lr_scale = None

    def begin_objectives(self, task: ClientTask) -> list[ClientState]:
        """Return the client's state of each objective for this round, on the model's device."""
        if not self.objectives:
            return []
        start = self.layout.views(task.start)
        # Local parameters are like buffers to a term: it does not act on them, but another model is run with its own.
        start_buffers = dict(task.buffers)
        if self.layout.local:
            start_buffers.update(self.local_parameters.start(task.client))
        states = []
        for objective in self.objectives:
            state = objective.begin_client(task.client, start, start_buffers)
            states.append({name: value.to(self.host.device) for name, value in state.items()})
        return states

    def end_objectives(
        self, task: ClientTask, states: Sequence[ClientState], end: Named, end_buffers: Named, num_steps: int
    ) -> list[ClientState]:
        """Return the client's new state of each objective after its local work.

        Args:
            task: The client's task.
            states: The states that :meth:`begin_objectives` returned.
            end: The client's model after training, by name of the parameter.
            end_buffers: Its buffers and local parameters after training, by name.
            num_steps: Its optimizer steps.
        """
        if not self.objectives:
            return []
        start = self.layout.views(task.start)
        end_states = []
        for objective, state in zip(self.objectives, states, strict=True):
            if objective.needs_gradient:
                state = dict(state)
                for name, slope in self.layout.views(self.gradient(task.client, task.start)).items():
                    state[GRADIENT + name] = slope
            end_states.append(objective.finish_client(state, start, end, end_buffers, num_steps))
        return end_states

    def commit(self, update: ClientUpdate) -> None:
        """Keep the state of a client whose update was received, for its next round."""
        if self.plan.optimizer_state == "kept":
            self.optimizer_states[update.client] = update.memory["optimizers"]
        self.local_parameters.commit(update)
        self.local_buffers.commit(update)
        self.attributes.pending[update.client] = update.memory.get("attributes", {})
        for objective, state in zip(self.objectives, update.memory["objectives"], strict=True):
            objective.keep_client_state(update.client, state)


def locate(error: BaseException, circumstances: str, batch_size: int, full_batch: int, remedy: str = "") -> None:
    """Add a note to an error that says when in local training it was raised, and what may help.

    Args:
        error: The error.
        circumstances: The clients and the round.
        batch_size: The number of samples in the batch.
        full_batch: The loader's batch size.
        remedy: What may help, as a sentence that begins with a space.
    """
    if batch_size == 1 and not is_out_of_memory(error):
        # Usually BatchNorm, which cannot normalize a single sample.
        remedy = (
            f" Leave such batches out by the loader's `drop_last=True`, together with"
            f" `min_client_samples={full_batch}`, which leaves out clients that have less than a batch."
        )
        if full_batch == 1:
            remedy = " Choose a larger `batch_size`."
    add_note(error, f"In local training: {circumstances}, a batch of {batch_size}.{remedy}")
