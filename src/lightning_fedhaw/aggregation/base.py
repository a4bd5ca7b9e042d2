"""The base of every aggregation rule, and the second door through which a federation is entered."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions, check_names, described
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

State = dict[str, Any]


class ServerView(Protocol):
    """What a rule may ask of the server."""

    @property
    def layout(self) -> ParameterLayout:
        """Where each trainable parameter lives in the flat vector."""

    @property
    def seed(self) -> int:
        """The federation's seed, for streams."""

    @property
    def proxy_dataset(self) -> Any:
        """The server's own data, from ``FederatedDataModule(proxy=...)``; ``None`` without it."""

    def proxy_batch(self, index: Tensor) -> Any:
        """The proxy samples with these numbers, as a batch on the model's device."""

    def check_proxy(self, rule: str, attempt: Callable[[Tensor, Any], object]) -> None:
        """Refuse proxy data that is missing, empty, or on which ``attempt(vector [P], batch)`` fails."""

    def loss(self, vector: Tensor, batch: Any, batch_idx: int = 0) -> Tensor:
        """The module's training loss at any parameters ``[P]``, differentiable with respect to them."""

    def predict(
        self,
        vector: Tensor,
        batch: Any,
        function: Callable[[Any, Any], Tensor] | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        training: bool = False,
    ) -> Tensor:
        """What the module makes of a batch at any parameters ``[P]`` and buffers, differentiable in the parameters."""

    def mixed_buffers(self, clients: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
        """The buffers of a model that is a weighted mean of clients' models."""


@dataclass(frozen=True)
class RuleStep:
    """What a rule makes of a cohort.

    Attributes:
        parameters: ``[P]``, the new global parameters.
        state: The rule's new state.
        weights: ``[K]`` float64, the normalised weight of each client in the cohort, summing to one. Buffers are
            averaged with them.
        metrics: Numbers for the log.
    """

    parameters: Tensor
    state: State
    weights: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalPace(ABC):
    """How far clients go in their local steps: a factor on each change that their optimiser makes.

    With optimisers whose step is proportional to the learning rate (SGD, Adam and their kin) that is a factor on the
    rate. Stated on named tensors with free leading axes, so that it serves one client and a stack of clients alike:
    reduce over each parameter's own axes only.
    """

    numbers_sent: int = 0
    """Numbers that each client is sent for it, beside the model."""

    @abstractmethod
    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """A client's state when a round begins.

        Args:
            start: The model it starts from, by name of the parameter.
            num_steps: Optimiser steps it is going to make.
            rates: The learning rate of each parameter tensor, in the layout's order.
        """

    @abstractmethod
    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The factor on the step that is about to be made.

        Args:
            gradients: What the optimiser is given, each ``[..., *shape]``; zero for a parameter that was not used.
            state: Each ``[...]`` or ``[..., *shape]``. Not changed.

        Returns:
            ``[...]``, and the state for the next step.
        """


class AggregationRule(KeyedCallback):
    """How the server turns a cohort into the next global model.

    A rule is a callback: give it to a :class:`~lightning_fedhaw.FederatedTrainer`, or to a stock
    ``lightning.pytorch.Trainer``, which then plays federated rounds with the training data of whatever ``fit`` is
    given.

    A new rule implements :meth:`step`, and :meth:`init` if it keeps state between rounds. Both are pure: state goes
    in, state comes out. State holds tensors, plain Python values, whole :class:`~lightning_fedhaw.ClientVectors`, and
    dictionaries of these; a checkpoint holds vectors as tensors, so that it can be read back safely.

    Args:
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`, for the second door.

    Attributes:
        state: The state after the last round; empty before the first.
    """

    key = "AggregationRule"

    needs_learning_rates: bool = False
    """Whether the rule reads the clients' learning rates; then each trainable parameter needs exactly one optimiser."""

    keeps_cohort: bool = False
    """Whether the state holds a cohort's vectors, so that a checkpoint grows with them."""

    raw_weight: Any = None
    """``raw_weight(client_update) -> float``, where a rule's weights are known before the cohort is complete. Then
    vectors are summed as they come and memory does not grow with the cohort."""

    objectives: tuple[ClientObjective, ...] = ()
    """Client objectives that the rule brings along; their state is checkpointed with the rule's."""

    def __init__(self, **federation: Any) -> None:
        super().__init__()
        check_names(type(self).__name__, federation, [f.name for f in fields(FederationOptions)])
        self.options = FederationOptions(**federation)
        self.state: State = {}

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """The state before the first round.

        Args:
            start: ``[P]``, the initial global parameters.
            num_examples: ``[N]`` int64, training examples of every client.
        """
        return {}

    @abstractmethod
    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleStep:
        """One aggregation.

        Args:
            cohort: What reached the server.
            state: The state after the last round. Not changed: the new state is part of the answer.
            server: The parameter layout, and a loss that is differentiable in the global parameters.
        """

    def check(self, server: ServerView) -> None:
        """Called before the first round of a fit: a rule refuses here what it cannot work with.

        Raises:
            ValueError: If so.
        """

    def local_pace(self, state: State, layout: ParameterLayout) -> LocalPace | None:
        """What a rule that sets the clients' learning rates gives them for a round; nothing by default."""
        return None

    prog_bar: Sequence[str] = ()
    """Names among the rule's metrics that belong into the progress bar."""

    headlines: Sequence[str] = ()
    """Names among the rule's metrics whose last values belong into the table that closes a run."""

    def describe(self) -> str:
        """The rule and its settings, for the line that opens a run."""
        return described(self)

    @property
    def innermost(self) -> AggregationRule:
        """The rule that reads the cohort, where one rule works on another's proposal; this one by default."""
        return self

    @property
    def identity(self) -> str:
        """What a run must share with the checkpoint that it goes on from, because the state depends on it."""
        return type(self).key

    def summary(self) -> dict[str, float]:
        """What the rule's state has learned, for the table that closes a run; nothing by default."""
        return {}

    def advice(self) -> str:
        """What a user should know of the rule's state when training has diverged; nothing by default."""
        return ""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the objectives that come along look at the clients' optimisers."""
        for objective in self.objectives:
            objective.on_fit_start(trainer, pl_module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the round loop in the place of a stock trainer's fit loop."""
        if stage == "fit":
            from lightning_fedhaw.adapter.loop import attach

            attach(trainer, self.options)

    def move_state(self, device: torch.device) -> None:
        """Keep the state on another device, in its own dtypes."""
        self.state = move_data_to_device(self.state, device)

    def state_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint: tensors and plain values, with client vectors taken apart."""
        state = {k: _taken_apart(v) for k, v in self.state.items()}
        return {**state, "objectives": [o.state_dict() for o in self.objectives]} if self.objectives else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        for objective, state in zip(self.objectives, state_dict.get("objectives", ()), strict=True):
            objective.load_state_dict(state)
        self.state = {k: _put_together(v) for k, v in state_dict.items() if k != "objectives"}


def _taken_apart(value: Any) -> Any:
    if isinstance(value, ClientVectors):
        return value.state_dict()
    return {k: _taken_apart(v) for k, v in value.items()} if type(value) is dict else value


def _put_together(value: Any) -> Any:
    if ClientVectors.is_state(value):
        return ClientVectors.from_state(value)
    return {k: _put_together(v) for k, v in value.items()} if type(value) is dict else value


def normalised(weights: Tensor) -> Tensor:
    """Weights scaled to sum to one, in float64.

    Raises:
        ZeroDivisionError: If they sum to zero.
    """
    wide = weights.to(torch.float64)
    total = wide.sum()
    if not total > 0:
        raise ZeroDivisionError(f"Aggregation weights must have a positive sum, got {wide.tolist()}.")
    return wide / total


def check_made(name: str, make: Any, what: str, example: str, *arguments: Any, given: str = "", **keywords: Any) -> Any:
    """What a factory makes, be it an optimiser or a schedule: here it is tried before a run depends on it.

    Args:
        name: The argument that is the factory.
        make: Its value.
        what: What it must make.
        example: A ``partial`` that does.
        arguments: What it makes it of.
        given: The argument that ``step`` will be called with, if any.
        keywords: What it makes it of, by name.

    Raises:
        TypeError: If nothing comes of it, or of something whose ``step`` wants more.
    """
    try:
        made = make(*arguments, **keywords)
        for p in inspect.signature(made.step).parameters.values():
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != given:
                raise TypeError(f"{type(made).__name__}.step wants `{p.name}`, which there is not")
    except Exception as error:
        ready = hasattr(make, "state_dict") and not isinstance(make, type)
        got = f"a ready-made {type(make).__name__}" if ready else getattr(make, "__name__", repr(make))
        raise TypeError(
            f"`{name}` must make {what}: give a class or a `functools.partial` of one, such as `partial({example})`,"
            f" got {got} ({error})."
        ) from error
    return made


def check_optimizer(name: str, make: Any, lr: float, given: str = "") -> Any:
    """An optimiser of one number, by :func:`check_made`."""
    what = "an optimiser from parameters and `lr`" + ("" if given else ", one that steps on a given gradient")
    parameter = torch.zeros(1, 1, requires_grad=True)
    return check_made(name, make, what, "torch.optim.SGD, momentum=0.9", [parameter], given=given, lr=lr)


def check_schedule(name: str, make: Any, optimizer: Any) -> None:
    """Refuse what makes no schedule of that optimiser, by :func:`check_made`."""
    if make is not None:
        check_made(name, make, "a schedule from the optimiser", "StepLR, step_size=20", optimizer)
