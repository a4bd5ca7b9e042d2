"""The contract between a rule and the round: what a rule is asked, what it answers, and what it may ask of the server.

It lies below the round, which knows rules by this file only. The base of the rules that users write is
:class:`~lightning_fedhaw.extending.AggregationRule`, which adds what makes a rule a callback of a trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torch import Tensor

from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

State = dict[str, Any]
R = TypeVar("R", bound="Rule")


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
class RuleOutput:
    """What a rule makes of a cohort.

    Attributes:
        parameters: ``[P]``, the new global parameters.
        state: The rule's new state.
        weights: ``[K]`` float64, the normalized weight of each client in the cohort, summing to one. Buffers are
            averaged with them.
        metrics: Numbers for the log.
    """

    parameters: Tensor
    state: State
    weights: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalLRScale(ABC):
    """How far clients go in their local steps: a factor on each change that their optimizer makes.

    With optimizers whose step is proportional to the learning rate (SGD, Adam and their kin) that is a factor on the
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
            num_steps: Optimizer steps it is going to make.
            rates: The learning rate of each parameter tensor, in the layout's order.
        """

    @abstractmethod
    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The factor on the step that is about to be made.

        Args:
            gradients: What the optimizer is given, each ``[..., *shape]``; zero for a parameter that was not used.
            state: Each ``[...]`` or ``[..., *shape]``. Not changed.

        Returns:
            ``[...]``, and the state for the next step.
        """


class Rule(ABC):
    """How the server turns a cohort into the next global model.

    :meth:`init` and :meth:`step` are pure: state goes in, state comes out. State holds tensors, plain Python values,
    whole :class:`~lightning_fedhaw.extending.ClientVectors`, and dictionaries of these; a checkpoint holds vectors as
    tensors, so that it can be read back safely.

    Attributes:
        state: The state after the last round; empty before the first.

    Raises:
        TypeError: If a class that lacks an abstract method is instantiated, naming the method.
    """

    key: ClassVar[str]
    """What the class is called in random streams and checkpoints, whatever its name."""

    needs_learning_rates: bool = False
    """Whether the rule reads the clients' learning rates; then each trainable parameter needs exactly one optimizer."""

    keeps_cohort: bool = False
    """Whether the state holds a cohort's vectors, so that a checkpoint grows with them."""

    unnormalized_weight: Any = None
    """``unnormalized_weight(client_update) -> float``, where a rule's weights are known before the cohort is complete.
    Then vectors are summed as they come and memory does not grow with the cohort."""

    objectives: tuple[ClientObjective, ...] = ()
    """Client objectives that the rule brings along; their state is checkpointed with the rule's."""

    def __new__(cls: type[R], *args: Any, **kwargs: Any) -> R:
        """Refuse a class without :meth:`step` here, where Python's own sentence would not see a misspelled one."""
        for name in sorted(cls.__abstractmethods__):
            similar = get_close_matches(name, _new_methods(cls), 1)
            hint = f" It has `{similar[0]}`; did you mean `{name}`?" if similar else ""
            raise TypeError(f"`{cls.__name__}` must implement the method `{name}`, which is missing.{hint}")
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__()
        self.state: State = {}

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """The state before the first round.

        Args:
            start: ``[P]``, the initial global parameters.
            num_examples: ``[N]`` int64, training examples of every client.
        """
        return {}

    @abstractmethod
    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One aggregation.

        Args:
            cohort: What reached the server.
            state: The state after the last round. Not changed: the new state is part of the answer.
            server: The parameter layout, and a loss that is differentiable in the global parameters.
        """

    def check(self, server: ServerView) -> None:  # noqa: B027 (most rules work with anything)
        """Called before the first round of a fit: a rule refuses here what it cannot work with.

        Raises:
            ValueError: If so.
        """

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """What a rule that sets the clients' learning rates gives them for a round; nothing by default."""
        return None

    prog_bar: Sequence[str] = ()
    """Names among the rule's metrics that belong into the progress bar."""

    summary_metrics: Sequence[str] = ()
    """Names among the rule's metrics whose last values belong into the run summary."""

    def describe(self) -> str:
        """The rule and its settings, for the start-up line."""
        return repr_settings(self)

    @property
    def base_rule(self) -> Rule:
        """The rule that reads the cohort, where one rule works on another's proposal; this one by default."""
        return self

    @property
    def resume_key(self) -> str:
        """What a run must share with the checkpoint that it goes on from, because the state depends on it."""
        return type(self).key

    def summary(self) -> dict[str, float]:
        """What the rule's state has learned, for the run summary; nothing by default."""
        return {}

    def divergence_hint(self) -> str:
        """What a user should know of the rule's state when training has diverged; nothing by default."""
        return ""

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


def _new_methods(cls: type[Rule]) -> list[str]:
    """The methods of a rule's class that override nothing, among which a misspelled one is found."""
    names: list[str] = []
    for kind in cls.__mro__[: cls.__mro__.index(Rule)]:
        known = {name for parent in kind.__mro__[1:] for name in vars(parent)} | cls.__abstractmethods__
        names += [name for name, value in vars(kind).items() if callable(value) and name not in known]
    return names


def find_rule(callbacks: Iterable[Any]) -> Rule:
    """The one aggregation rule among callbacks.

    Raises:
        ValueError: If there is none, or more than one.
    """
    given = list(callbacks)
    rules = [c for c in given if isinstance(c, Rule)]
    for each in given:
        if isinstance(each, type) and issubclass(each, Callback):
            raise TypeError(f"`callbacks` must hold objects, got the class {each.__name__}. Write `{each.__name__}()`.")
    if len(rules) != 1:
        names = ", ".join(type(rule).__name__ for rule in rules)
        raise ValueError(
            "A federation needs exactly one aggregation rule among `callbacks`, got "
            + (
                f"{len(rules)} ({names}). Remove all but one."
                if rules
                else "none. Add one, such as `FedHAWCallback()`."
            )
        )
    return rules[0]
