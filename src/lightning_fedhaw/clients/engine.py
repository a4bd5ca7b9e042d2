"""What every engine is given, and what it gives back: the local plan, a client task, and the memory of clients."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.notes import add_note
from lightning_fedhaw.objectives.base import GRADIENT, ClientObjective, ClientState, Named
from lightning_fedhaw.options import OptimizerState
from lightning_fedhaw.rule import LocalLRScale
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import is_out_of_memory


@dataclass(frozen=True)
class LocalPlan:
    """What a client does in a round.

    Attributes:
        epochs: Passes over its data; or
        steps: optimizer steps.
        limit: Batches a pass at most: a number, or a share of the pass.
        optimizer_state: Whether clients find the optimizer state they left behind.
        seed: The federation's seed.
        channels_last: Whether 4-D parameters are laid out channels-last meanwhile.
    """

    epochs: int | None
    steps: int | None
    limit: int | float | None
    optimizer_state: OptimizerState
    seed: int
    channels_last: bool = False


@dataclass(frozen=True)
class ClientTask:
    """One client's call: what it received, and where its displacement goes.

    Attributes:
        client: The client's number.
        start: ``[P]``, the parameters it starts from.
        buffers: The buffers it starts from.
        slot: Gives the place ``[P]``, on the model's device, where the next update is kept: an engine that trains one
            client at a time writes the displacement there, and saves a copy.
    """

    client: int
    start: Tensor
    buffers: Mapping[str, Tensor]
    slot: Callable[[], Tensor]


class Engine(ABC):
    """How a cohort trains.

    Args:
        host: The trainer around it.
        layout: Where each trainable parameter lives in the flat vector.
        data: The clients' data.
        plan: What a client does in a round.
        objectives: What clients add to their loss.

    Attributes:
        kept: With ``optimizer_state="kept"``, each client's optimizer states, by position of the parameter.
        initial: The optimizer states that a client without memory starts from: those of their constructors.
        lr_scale: What the rule makes of the clients' learning rates in this round.
        gradient: Gives the gradient ``[P]`` of a client's mean loss at parameters ``[P]``, for objectives that ask.
    """

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
        self.kept: dict[int, list[dict[int, dict[str, Any]]]] = {}
        self.initial = [states_of(optimizer) for optimizer in host.optimizers]
        self.lr_scale: LocalLRScale | None = None
        self.gradient: Callable[[int, Tensor], Tensor]

    @property
    def clients_at_once(self) -> int:
        """How many clients train at the same time."""
        return 1

    @abstractmethod
    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort.

        The module may hold a client's model meanwhile; whoever runs the engine puts the server's back.

        Yields:
            Each client's update, in the order of the tasks.
        """

    def cost(self, client: int) -> float:
        """What a client's task is estimated to cost: the samples it will see."""
        if self.plan.steps is not None:
            return float(self.plan.steps * self.data.settings.batch_size)
        return float(len(self.data.train_indices[client]) * (self.plan.epochs or 1))

    def num_steps(self, client: int) -> int:
        """Optimizer steps that a client is going to make in a round."""
        if self.plan.steps is not None:
            return self.plan.steps
        return -(-self.num_batches(client) // self.host.accumulate) * (self.plan.epochs or 1)

    def num_batches(self, client: int) -> int:
        """Batches in a pass over a client's data."""
        return self.data.batches_per_pass(len(self.data.train_indices[client]), self.plan.limit)

    def end_state(self) -> Any:
        """What the last run left in schedules and loss scale, for the other processes; ``None`` if nothing."""
        return None

    def restore_end_state(self, end_states: Sequence[Any]) -> None:  # noqa: B027 (most engines leave nothing)
        """Go on from where all processes' runs ended."""

    def close(self) -> None:
        """Let go of what only a round needs."""
        self.lr_scale = None

    def begin_objectives(self, task: ClientTask) -> list[ClientState]:
        """What a client works with in a round, for each objective."""
        start = self.layout.views(task.start) if self.objectives else {}
        return [
            {name: value.to(self.host.device) for name, value in objective.client_state(task.client, start).items()}
            for objective in self.objectives
        ]

    def end_objectives(
        self, task: ClientTask, states: Sequence[ClientState], end: Named, num_steps: int
    ) -> list[ClientState]:
        """Each objective's state of a client after its work."""
        start = self.layout.views(task.start) if self.objectives else {}
        found = []
        for objective, state in zip(self.objectives, states, strict=True):
            if objective.needs_gradient:
                slopes = self.layout.views(self.gradient(task.client, task.start))
                state = {**state, **{GRADIENT + name: slope for name, slope in slopes.items()}}
            found.append(objective.end_client(state, start, end, num_steps))
        return found

    def commit(self, update: ClientUpdate) -> None:
        """Let a client whose update was received find its state again next time."""
        if self.plan.optimizer_state == "kept":
            self.kept[update.client] = update.memory["optimizers"]
        for objective, state in zip(self.objectives, update.memory["objectives"], strict=True):
            objective.keep_client_state(update.client, state)


def states_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """An optimizer's states by position of the parameter, in host memory."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        index: {n: v.cpu() if isinstance(v, Tensor) else v for n, v in optimizer.state[parameter].items()}
        for index, parameter in enumerate(order)
        if parameter in optimizer.state
    }


def device_of_state(name: str, device: torch.device, group: Mapping[str, Any]) -> torch.device:
    """Where an optimizer wants a state, as ``torch.optim.Optimizer.load_state_dict`` places it.

    Args:
        name: The state's name.
        device: The device of its parameter.
        group: The options of the parameter's group.
    """
    # Plain optimizers read `step` on the host in every step; fused and capturable kernels read it where they run.
    if name == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return device


def give_states(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, Any]]) -> None:
    """Put copies of such states in place of an optimizer's own."""
    optimizer.state = defaultdict(dict)
    if not states:
        return
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if index in states:
                optimizer.state[parameter] = {
                    name: value.to(device_of_state(name, parameter.device, group), copy=True)
                    if isinstance(value, Tensor)
                    else copy.deepcopy(value)
                    for name, value in states[index].items()
                }
            index += 1


Settings = list[list[dict[str, Any]]]


def settings_of(optimizers: Sequence[torch.optim.Optimizer]) -> Settings:
    """The numbers of every parameter group, which a module may change while a client trains."""
    return [
        [
            {n: v.clone() if isinstance(v, Tensor) else v for n, v in group.items() if n != "params"}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]


def give_settings(optimizers: Sequence[torch.optim.Optimizer], settings: Settings) -> None:
    """Put such numbers back."""
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for name, value in values.items():
                now = group.get(name)
                if isinstance(value, Tensor):
                    # A copy, so that a rate changed in place does not change what it is restored to; and where the
                    # rate is, because what another process sent is in host memory.
                    device = now.device if isinstance(now, Tensor) else value.device
                    group[name] = value.to(device, copy=True)
                else:
                    group[name] = value


def locate(error: BaseException, where: str, batch_size: int, remedy: str = "") -> None:
    """Say in an error where in local training it was raised, and what may help."""
    if batch_size == 1 and not is_out_of_memory(error):
        # BatchNorm is the usual reason.
        remedy = " Leave such batches out by the loader's `drop_last=True`, or choose another `batch_size`."
    add_note(error, f"In local training: {where}, a batch of {batch_size}.{remedy}")
