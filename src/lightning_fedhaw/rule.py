"""The contract between a rule and the round: what the round asks of a rule, and what a rule may ask of the server.

It lies below the round, which knows rules by this file only. The base of the rules that users write is
:class:`~lightning_fedhaw.extending.AggregationRule`, which adds what makes a rule a callback of a trainer.

Shapes: N clients exist, K of them are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.inquiry import Inquiry
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.probe import Probe, ProbeResult
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

Batch = Any
"""A batch, as a data loader gives it and ``training_step`` takes it; its form is the user's choice."""

PredictionFunction = Callable[[Any, Any], Tensor]
"""``function(module, batch)`` returns predictions ``[batch, ...]``."""

State = dict[str, Any]
RuleType = TypeVar("RuleType", bound="Rule")


class ServerView(Protocol):
    """The part of the server that a rule may use."""

    @property
    def layout(self) -> ParameterLayout:
        """The place of each trainable parameter in the flat vector."""

    @property
    def seed(self) -> int:
        """The federation's seed, for random streams."""

    @property
    def proxy_dataset(self) -> Any:
        """The server's own data, from ``FederatedDataModule(proxy=...)``; ``None`` without it."""

    def proxy_batch(self, index: Tensor) -> Batch:
        """Return the proxy samples with these indices ``[batch]``, as a batch on the model's device."""

    def check_proxy(self, rule: str, attempt: Callable[[Tensor, Batch], object]) -> None:
        """Refuse proxy data that is missing, empty, or on which ``attempt(vector [P], batch)`` fails."""

    def loss(self, vector: Tensor, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Return the module's training loss at any parameters ``[P]``, differentiable with respect to them."""

    def predict(
        self,
        vector: Tensor,
        batch: Batch,
        function: PredictionFunction | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        training: bool = False,
    ) -> Tensor:
        """Return the module's predictions at any parameters ``[P]`` and buffers, differentiable in the parameters."""

    def mixed_buffers(self, clients: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
        """Return the buffers of a model that is a weighted mean of the clients' models; ``weights`` is ``[K]``."""


@dataclass(frozen=True)
class RuleOutput:
    """The result of one aggregation.

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
    """A factor on each change that a client's optimizer makes to the model.

    With optimizers whose step is proportional to the learning rate (SGD, Adam and similar ones) it is a factor on the
    rate. It works on named tensors with any number of leading axes, so that one implementation serves a single client
    and a stack of clients: reduce over each parameter's own axes only.
    """

    numbers_sent: int = 0
    """Numbers that each client is sent for it, in addition to the model."""

    constant: float | None = None
    """The factor, where it is the same for all clients and steps of a round, as ``needs_rate_tangents`` needs it."""

    @abstractmethod
    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """Return a client's state at the beginning of a round.

        Args:
            start: The model that the client starts from, by name of the parameter.
            num_steps: Optimizer steps that the client is going to make.
            rates: The learning rate of each parameter tensor, in the layout's order.
        """

    @abstractmethod
    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the factor on the step that is about to be made.

        Args:
            gradients: The gradients that the optimizer gets, each ``[..., *shape]``; zero for an unused parameter.
            state: Each ``[...]`` or ``[..., *shape]``. Not changed.

        Returns:
            The factor ``[...]``, and the state for the next step.
        """


class Rule(ABC):
    """A rule by which the server turns a cohort into the next global model.

    :meth:`init` and :meth:`step` are pure: state goes in, state comes out. State holds tensors, plain Python values,
    whole :class:`~lightning_fedhaw.extending.ClientVectors`, and dictionaries of these; a checkpoint holds vectors as
    tensors, so that it can be loaded with ``weights_only=True``.

    Attributes:
        state: The state after the last round; empty before the first.

    Raises:
        TypeError: If a class that lacks an abstract method is instantiated, naming the method.
    """

    key: ClassVar[str]
    """The name of the class in random streams and checkpoints, which stays when the class is renamed."""

    needs_learning_rates: bool = False
    """Whether the rule reads the clients' learning rates; then each trainable parameter needs exactly one optimizer."""

    needs_initial_loss: bool = False
    """Whether the rule reads ``cohort.initial_losses``, which cost one more forward pass over each client's training
    data."""

    needs_rate_tangents: bool = False
    """Whether the rule reads ``cohort.rate_tangents``, the derivatives of the clients' displacements in the constant
    factor of :meth:`local_lr_scale`. Clients carry them through their local steps, and send one more vector."""

    reads_buffers: bool = False
    """Whether the rule reads ``cohort.buffers``, which clients elsewhere send only if the server averages them."""

    keeps_cohort: bool = False
    """Whether the state holds a cohort's vectors, so that a checkpoint grows with them."""

    takes_substitutes: bool = True
    """Whether a channel's substitute for a lost update is in the cohort. A rule that compares clients, or that learns
    what they are worth, sets it to false, because a substitute says nothing about its client: it is left out."""

    min_updates: int = 1
    """The updates that a round needs. A round that losses leave with fewer is skipped, like one without any."""

    unnormalized_weight: Callable[[ClientUpdate], float] | None = None
    """A client's weight before normalization, where a rule knows it before the cohort is complete. Then vectors are
    summed as they arrive and memory does not grow with the cohort. :meth:`step` finds the same numbers in
    ``cohort.unnormalized_weights``."""

    objectives: tuple[ClientObjective, ...] = ()
    """Client objectives that belong to the rule; their state is checkpointed with the rule's."""

    client_placed: Collection[str] = ()
    """Names among :meth:`server_parameters` of which each client has its own rows, so that they are not sent."""

    clients_train: bool = True
    """Whether clients train with their optimizer in some round, and do not answer an :meth:`inquiry` in all of them."""

    needs_held_out_data: bool = False
    """Whether every client needs held-out samples, for the upper loss of an :meth:`inquiry`."""

    upper_loss: str | None = None
    """The value that ``validation_step`` logs and that is the upper loss of an :meth:`inquiry`; ``None`` for the loss
    that the module's ``upper_step`` returns."""

    probe: Probe | None = None
    """The second cohort whose loss and gradient :meth:`learn_from` receives; ``None`` for a rule that asks nobody."""

    prog_bar: Sequence[str] = ()
    """Names among the rule's metrics that the progress bar shows."""

    summary_metrics: Sequence[str] = ()
    """Names among the rule's metrics whose last values the run summary shows."""

    def __new__(cls: type[RuleType], *args: Any, **kwargs: Any) -> RuleType:
        """Refuse a class that lacks an abstract method, and suggest the method that was misspelled."""
        # Python refuses it too, but its message does not mention a method that was meant to be `step`.
        for name in sorted(cls.__abstractmethods__):
            similar = get_close_matches(name, _added_methods(cls), 1)
            hint = f" It has `{similar[0]}`; did you mean `{name}`?" if similar else ""
            raise TypeError(f"`{cls.__name__}` must implement the method `{name}`, which is missing.{hint}")
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__()
        self.state: State = {}

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return the state before the first round.

        Args:
            start: ``[P]``, the initial global parameters.
            num_examples: ``[N]`` int64, training examples of every client.
        """
        return {}

    def admit(self, state: State, num_examples: Tensor) -> State:
        """Return the state after a client has joined a federation that runs; by default it is refused.

        Only a deployed federation admits clients. The new one has the last number.

        Args:
            state: The state after the last round. Not changed.
            num_examples: ``[N]`` int64, training examples of every client, the new one's last.

        Raises:
            ValueError: If the rule cannot go on with more clients.
        """
        raise ValueError(
            f"`{type(self).__name__}` admits no client after the first round. Use a rule that implements `admit`, such"
            " as `FedHAWCallback`, or start a new run with all clients."
        )

    @abstractmethod
    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Aggregate one cohort.

        Args:
            cohort: The updates that the server received.
            state: The state after the last round. Not changed: the new state is part of the output.
            server: The parameter layout, and a loss that is differentiable in the global parameters.
        """

    def learn_from(self, probe: ProbeResult, state: State, server: ServerView) -> tuple[State, Mapping[str, float]]:
        """Learn from the gradient of the loss at the model that the last :meth:`step` has made.

        Called once a round if :attr:`probe` is set: before the round's step with ``form="parallel"``, after it with
        ``form="sequential"``. Either way, the gradient is that at the model of the last step before the call, so a rule
        does not need to know the form: it keeps the derivatives of its step in the state and multiplies them here.

        Args:
            probe: The answers of the second cohort.
            state: The state after the last round or step. Not changed: the new state is returned.
            server: The parameter layout.

        Returns:
            The new state, and numbers for the log.
        """
        raise NotImplementedError(f"`{type(self).__name__}` sets `probe` and does not implement `learn_from`.")

    def inquiry(self, state: State, server: ServerView) -> Inquiry | None:
        """Return what the clients of the next round are asked for, which :meth:`step` finds in ``cohort.answers``.

        Args:
            state: The state after the last round. Not changed.
            server: The parameter layout.

        Returns:
            The inquiry; by default ``None``: clients train, and are asked for nothing else.
        """
        return None

    def server_parameters(self, state: State) -> Mapping[str, Tensor]:
        """Return the values of parameters that only the server changes, by name; by default there are none.

        They are frozen in the module, sent to clients with the model, and written into the module after every step.

        Args:
            state: The state after the last round.
        """
        return {}

    def with_server_parameters(self, state: State, values: Mapping[str, Tensor]) -> State:
        """Return a state with other values of :meth:`server_parameters`, which the user's code has set in the module.

        Args:
            state: The state after the last round. Not changed: the new state is returned.
            values: The new values, by name, of those that have changed; by default they are ignored.
        """
        return state

    def weigh(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization, checked; 0 for a rule without ``unnormalized_weight``.

        Raises:
            ValueError: If the weight is not a finite number of at least 0.
        """
        if self.unnormalized_weight is None:
            return 0.0
        name = f"{type(self).__name__}.unnormalized_weight of client {update.client}"
        return arguments.number(name, self.unnormalized_weight(update), minimum=0)

    def read_local_training(self, local_training: LocalTraining) -> None:  # noqa: B027 (most rules read nothing)
        """Read what is needed of the clients' optimizers and of the module; by default nothing.

        Called when a ``fit`` begins, once a checkpoint has been restored, and again before every round, because
        schedules change the settings of optimizers. What is read in ``setup`` or ``on_fit_start`` would be that of
        before the checkpoint.

        Args:
            local_training: How clients train.

        Raises:
            ValueError: If it cannot be worked with.
        """

    def check(self, server: ServerView) -> None:  # noqa: B027 (most rules work with any server)
        """Refuse a server that the rule cannot work with. Called before the first round of a fit.

        Raises:
            ValueError: If the rule cannot work with it.
        """

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """Return the factor on the clients' learning rates in the next round; by default ``None``, which means 1."""
        return None

    def describe(self) -> str:
        """Return the rule and its settings, for the start-up block."""
        return repr_settings(self)

    @property
    def base_rule(self) -> Rule:
        """The rule that reads the cohort, where one rule works on another's proposal; by default this rule."""
        return self

    @property
    def resume_key(self) -> str:
        """The settings that a resumed run must share with its checkpoint, because the state depends on them."""
        return type(self).key

    def summary(self) -> dict[str, float]:
        """Return the learned numbers of the rule's state, for the run summary; by default none."""
        return {}

    def divergence_hint(self) -> str:
        """Return advice for a user whose training has diverged, from the rule's state; by default none."""
        return ""

    def move_state(self, device: torch.device) -> None:
        """Move the state to another device, in its own dtypes."""
        self.state = move_data_to_device(self.state, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values, with client vectors as dictionaries."""
        state: State = {}
        for name, value in self.state.items():
            state[name] = _to_checkpoint(value)
        if self.objectives:
            state["objectives"] = [objective.state_dict() for objective in self.objectives]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        objective_states = state_dict.get("objectives", ())
        for objective, objective_state in zip(self.objectives, objective_states, strict=True):
            objective.load_state_dict(objective_state)
        state: State = {}
        for name, value in state_dict.items():
            if name != "objectives":
                state[name] = _from_checkpoint(value)
        self.state = state


def _to_checkpoint(value: object) -> object:
    """Return a value of the state with all client vectors in it as dictionaries of tensors."""
    if isinstance(value, ClientVectors):
        return value.state_dict()
    # A subclass of `dict` cannot be built again from its items alone, so it is saved as it is.
    if type(value) is dict:
        return {name: _to_checkpoint(item) for name, item in value.items()}
    return value


def _from_checkpoint(value: object) -> object:
    """Return a value of the state with all client vectors in it built again from their tensors."""
    if isinstance(value, Mapping) and ClientVectors.is_state(value):
        return ClientVectors.from_state(value)
    if type(value) is dict:
        return {name: _from_checkpoint(item) for name, item in value.items()}
    return value


def _added_methods(cls: type[Rule]) -> list[str]:
    """List the methods of a rule's class that override nothing, among which a misspelled one is found."""
    names: list[str] = []
    for kind in cls.__mro__[: cls.__mro__.index(Rule)]:
        # What a class still has to define counts as known: a method of that name is not misspelled.
        inherited = set(cls.__abstractmethods__)
        for parent in kind.__mro__[1:]:
            inherited.update(vars(parent))
        for name, value in vars(kind).items():
            if callable(value) and name not in inherited:
                names.append(name)
    return names


def find_rule(callbacks: Iterable[object]) -> Rule:
    """Return the one aggregation rule among callbacks.

    Raises:
        TypeError: If a class is among them instead of an object.
        ValueError: If there is no rule, or more than one.
    """
    rules: list[Rule] = []
    for callback in callbacks:
        if isinstance(callback, type) and issubclass(callback, Callback):
            name = callback.__name__
            raise TypeError(f"`callbacks` must hold objects, got the class {name}. Write `{name}()`.")
        if isinstance(callback, Rule):
            rules.append(callback)
    if len(rules) == 1:
        return rules[0]
    problem = "none. Add one, such as `FedHAWCallback()`."
    if rules:
        names = ", ".join(type(rule).__name__ for rule in rules)
        problem = f"{len(rules)} ({names}). Remove all but one."
    raise ValueError(f"A federation needs exactly one aggregation rule among `callbacks`, got {problem}")
