"""FedOpt: an optimizer on the server steps along the displacement that averaging, or another rule, proposes.

S. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar, H. B. McMahan: Adaptive Federated
Optimization. ICLR 2021, Algorithm 1. FedAvgM: T.-M. H. Hsu, H. Qi, M. Brown: Measuring the Effects of Non-Identical
Data Distribution for Federated Visual Classification. arXiv 1909.06335.

With ``delta`` [P], the proposed displacement ``sum_k p_k (w_k - w)``::

    FedOpt      w <- optimizer(w, gradient = -delta)
    FedAvgM     v <- beta v + delta                     w <- w + lr v

Algorithm 2 (FedAdagrad, FedAdam, FedYogi) is in ``adaptive.py``. Hyper-parameters of the server's optimizer can be
learned while training (``learn=``): K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation.
arXiv:2301.07806, Algorithm 2.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer, check_schedule
from lightning_fedhaw.aggregation.learned import Bounds, Learned, LinkName
from lightning_fedhaw.aggregation.server_steps import check_derivatives, check_names, set_hyper_parameters, tangent
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.options import FederationOptions, repr_settings, settings_of
from lightning_fedhaw.probe import Probe, ProbeResult
from lightning_fedhaw.rule import LocalLRScale, Rule, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.layout import ParameterLayout

LRSchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""Makes a schedule that can be checkpointed."""

DOMAINS: Mapping[str, Bounds] = {
    "momentum": (1e-4, 0.9999),
    **dict.fromkeys(("alpha", "beta1", "beta2", "rho"), (0.0, 0.9999)),
}
"""The bounds of what is learned where none are given; all others are at least 0. Without momentum SGD keeps no
velocity, so it could not learn to have some again."""


class FedOptCallback(AggregationRule):
    """Let an optimizer on the server step along the displacement that averaging, or another rule, proposes.

    Weights are those of the rule that proposes. Buffers are averaged with them and never stepped by the optimizer,
    which gets the model's parameters in their own shapes.

    Args:
        optimizer: Makes the server's optimizer from ``(parameters, lr=...)``: a class of ``torch.optim`` or a
            ``functools.partial`` of one; one that steps on a given gradient.
        lr: The server's learning rate.
        lr_scheduler: Makes a schedule from the optimizer, such as ``partial(StepLR, step_size=20)``. It steps once a
            round.
        rule: The rule that proposes, such as ``FedAdpCallback()``. Default: plain averaging by the number of examples,
            with which memory does not grow with the cohort.
        learn: The optimizer's hyper-parameters that are learned while training, such as ``("lr", "momentum")``;
            ``"beta1"`` and ``"beta2"`` are those of Adam. What is given for them is the start.
        probe: The second cohort whose gradient they are learned by. Default: ``Probe()``, training clients that are
            drawn afresh and answer in the same communication round.
        hyper_optimizer: Makes the optimizer of what is learned from ``(parameters, lr=...)``.
        hyper_lr: Its learning rate.
        bounds: The smallest and largest value of what is learned, by name, such as ``{"lr": (0.01, 10.0)}``. Default:
            where the optimizer is defined, which is from 0 on, and for momentum and betas up to 0.9999.
        links: What is stepped instead of the number itself, by name: ``"exp"`` its logarithm, ``"sigmoid"`` its logit,
            ``"softplus"`` the inverse of that; ``"identity"`` by default.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``optimizer`` and, with a schedule, ``scheduler``: their own states; ``rule``: the inner rule's. With
            ``learn``, ``learned`` and ``tangents``.

    Raises:
        TypeError: If optimizer or schedule are given ready-made, cannot be made from their arguments, or need more
            arguments in their steps (``LBFGS``, ``ReduceLROnPlateau``), or if ``rule`` is not a rule.
        ValueError: If ``lr`` is negative or not finite, or ``rule`` has federation arguments of its own; if ``learn``
            names what the optimizer does not have, or what cannot be learned.

    Example:
        >>> from functools import partial
        >>> rule = FedOptCallback(partial(torch.optim.SGD, momentum=0.9, nesterov=True), lr=0.5)
    """

    key = "FedOptCallback"

    summary_metrics: Sequence[str] = ("server_lr",)

    def __init__(
        self,
        optimizer: OptimizerFactory = torch.optim.SGD,
        lr: float = 1.0,
        *,
        lr_scheduler: LRSchedulerFactory | None = None,
        rule: AggregationRule | None = None,
        learn: Sequence[str] = (),
        probe: Probe | None = None,
        hyper_optimizer: OptimizerFactory = torch.optim.SGD,
        hyper_lr: float = 0.01,
        bounds: Mapping[str, Bounds] | None = None,
        links: Mapping[str, LinkName] | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.lr = arguments.number("lr", lr, minimum=0)
        server_optimizer = check_optimizer("optimizer", optimizer, self.lr)
        check_schedule("lr_scheduler", lr_scheduler, server_optimizer)
        if rule is not None:
            _check_inner(rule, type(self).__name__)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.rule = rule
        self._adopt_inner_needs()
        starts = check_names(learn, server_optimizer)
        learned = Learned(
            starts,
            hyper_optimizer=hyper_optimizer,
            hyper_lr=hyper_lr,
            bounds=bounds,
            links=links,
            domains={name: DOMAINS.get(name, (0.0, inf)) for name in starts},
        )
        arguments.optional(arguments.instance, "probe", probe, Probe, example='Probe("validation")')
        # Without anything to learn there are no such settings: `None` is not shown, and no part of the resume key.
        self.learn = tuple(starts) or None
        self.learned: Learned | None = None
        if self.learn is not None:
            self._check_learning(self.learn)
            self.learned = learned
            self.probe = probe or Probe()
        elif probe is not None:
            raise ValueError('`probe` is for what is learned, and `learn` is empty. Give `learn=("lr",)` with it.')

    def _check_learning(self, names: Sequence[str]) -> None:
        """Refuse to learn what is set by a schedule, or what has no derivative."""
        if "lr" in names and self.lr_scheduler is not None:
            raise ValueError('`learn` names "lr", which `lr_scheduler` sets. Leave one of them out.')
        check_derivatives(names, self.optimizer, self.lr)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization: that of the inner rule, or its number of examples."""
        if self.rule is None or self.rule.unnormalized_weight is None:
            return float(update.example_weight)
        return self.rule.unnormalized_weight(update)

    def _adopt_inner_needs(self) -> None:
        """Declare what the inner rule declares, because the round asks this rule only."""
        if self.rule is None:
            return
        self._adopt_inner_weight(self.rule)
        self.needs_learning_rates = self.rule.needs_learning_rates
        self.needs_initial_loss = self.rule.needs_initial_loss
        self.keeps_cohort = self.rule.keeps_cohort
        self.takes_substitutes = self.rule.takes_substitutes
        self.min_updates = self.rule.min_updates
        self.objectives = self.rule.objectives
        self.prog_bar = self.rule.prog_bar
        self.summary_metrics = ("server_lr", *self.rule.summary_metrics)

    def _adopt_inner_weight(self, rule: AggregationRule) -> None:
        """Have no weight that is known in advance where the inner rule has none."""
        vars(self).pop("unnormalized_weight", None)
        if rule.unnormalized_weight is not None:
            return
        if type(self).unnormalized_weight is not FedOptCallback.unnormalized_weight:
            raise ValueError(
                f"`{type(self).__name__}.unnormalized_weight` would be ignored: {type(rule).__name__} computes weights"
                " from the whole cohort. Override it with an inner rule that averages, such as `FedAvgCallback()`."
            )
        self.unnormalized_weight = None  # type: ignore[assignment]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the inner rule's hook, which is no callback of the trainer."""
        if self.rule is not None:
            self.rule.on_fit_start(trainer, pl_module)

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Let the inner rule read what it needs."""
        if self.rule is not None:
            self.rule.read_local_training(local_training)
            # Again, because some rules know their needs only now, such as FedNova with a proximal term.
            self._adopt_inner_needs()

    def check(self, server: ServerView) -> None:
        """Let the inner rule refuse what it cannot work with."""
        if self.rule is not None:
            self.rule.check(server)

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """Return the inner rule's factor on the clients' learning rates."""
        if self.rule is None:
            return None
        return self.rule.local_lr_scale(state["rule"], layout)

    def describe(self) -> str:
        """Return the rule and its settings, for the start-up block."""
        inner = None if self.rule is None else self.rule.describe()
        probe = None if self.probe is None else repr(self.probe)
        return repr_settings(self, *self._implied_settings, rule=inner, probe=probe)

    @property
    def resume_key(self) -> str:
        """Optimizer and schedule with their settings, which their states hold too, and the inner rule's key."""
        inner = None if self.rule is None else self.rule.resume_key
        settings = settings_of(self, *self._implied_settings, "probe", rule=inner)
        if self.learned is not None:
            settings += f", {self.learned.resume_key}"
        return f"{type(self).key}({settings})"

    @property
    def _implied_settings(self) -> tuple[str, ...]:
        """The settings that are not shown: a named rule is described by arguments of its own."""
        if type(self) is FedOptCallback:
            return ()
        return ("optimizer",)

    @property
    def base_rule(self) -> Rule:
        """The rule that proposes."""
        if self.rule is None:
            return self
        return self.rule.base_rule

    def summary(self) -> dict[str, float]:
        """Return the numbers that are learned, here and by the inner rule."""
        numbers = {}
        if self.learned is not None:
            for name, value in self.learned.values(self.state.get("learned", {})).items():
                numbers[f"learned_{name}"] = value
        if self.rule is None:
            return numbers
        self._lend_state()
        return {**numbers, **self.rule.summary()}

    def divergence_hint(self) -> str:
        """Return the inner rule's hint, and the server's rate."""
        inner_hint = ""
        if self.rule is not None:
            self._lend_state()
            inner_hint = self.rule.divergence_hint()
        return f"{inner_hint} The server's learning rate is {self.lr}: a lower `lr` makes smaller steps."

    def move_state(self, device: torch.device) -> None:
        """Move the state to another device, the inner rule's state with it."""
        super().move_state(device)
        # Otherwise the inner rule would keep the old state, and with it memory of the old device.
        self._lend_state()

    def _lend_state(self) -> None:
        """Show the inner rule its part of this rule's state, which is the only one that is kept."""
        if self.rule is not None:
            self.rule.state = self.state.get("rule", {})

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return the inner rule's state and what is learned; optimizer and schedule start with the first round."""
        state: State = {}
        if self.rule is not None:
            state["rule"] = self.rule.init(start, num_examples)
        if self.learned is not None:
            state["learned"] = self.learned.init()
        return state

    def learn_from(self, probe: ProbeResult, state: State, server: ServerView) -> tuple[State, Mapping[str, float]]:
        """Step the hyper-parameters that are learned."""
        assert self.learned is not None
        return self.learned.learn_from(probe, state)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Take the proposal, and step the server's optimizer along it."""
        delta, weights, new_state, metrics = self._propose(cohort, state, server)
        new_vector = cohort.start.clone()  # [P]
        # Named tensors that share the vector's memory: an optimizer that uses shapes gets those of the model.
        views = server.layout.views(new_vector)
        parameters = [view.detach().requires_grad_() for view in views.values()]
        optimizer = self.optimizer(parameters, lr=self.lr)
        scheduler = None
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        # Copies: optimizers change their memory in place, and the old state must not change.
        if "optimizer" in state:
            optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if scheduler is not None and "scheduler" in state:
            scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        gradients = server.layout.views(-delta)
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient
        if self.learned is not None:
            set_hyper_parameters(optimizer, self.learned.values(state["learned"]))
            new_state["learned"] = state["learned"]
            new_state["tangents"] = {name: tangent(optimizer, name, self.optimizer) for name in self.learned.starts}
            metrics |= self.learned.metrics(state["learned"])
        # Read before the schedule's step: this is the rate of this round.
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
            new_state["scheduler"] = scheduler.state_dict()
        # After the schedule's step, which changes the rate in the optimizer's state.
        new_state["optimizer"] = optimizer.state_dict()
        return RuleOutput(new_vector, new_state, weights, {**metrics, "server_lr": rate})

    def _propose(
        self, cohort: Cohort, state: State, server: ServerView
    ) -> tuple[Tensor, Tensor, State, dict[str, float]]:
        """Return a displacement ``[P]``, the weights ``[K]`` behind it, and new entries of state and metrics."""
        if self.rule is None:
            weights = self.cohort_weights(cohort)
            delta = cohort.vectors.displacements.weighted_sum(weights).to(cohort.start)
            return delta, weights, {}, {}
        proposal = self.rule.step(cohort, state["rule"], server)
        # Displacements may be stored in another dtype than the model, and a proposal is then too.
        delta = (proposal.parameters - cohort.start).to(cohort.start)
        return delta, proposal.weights, {"rule": proposal.state}, dict(proposal.metrics)


class FedAvgMCallback(FedOptCallback):
    """FedAvg with momentum on the server: ``v <- momentum v + delta``, ``w <- w + lr v``.

    Args:
        lr: The server's learning rate. In the long run a step is ``lr / (1 - momentum)`` times the displacement.
        momentum: Decay of the velocity.
        options: The further arguments of :class:`FedOptCallback`: ``lr_scheduler``, ``rule``, ``learn`` (here
            ``"lr"`` and ``"momentum"``) and what belongs to it, and the federation's.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).
    """

    key = "FedAvgMCallback"

    def __init__(self, lr: float = 1.0, momentum: float = 0.9, **options: Any) -> None:
        self.momentum = arguments.number("momentum", momentum, minimum=0, below=1)
        super().__init__(partial(torch.optim.SGD, momentum=self.momentum), lr, **options)


def _check_inner(rule: AggregationRule, outer: str) -> None:
    """Refuse an inner rule that is no rule, or that has arguments of the federation."""
    arguments.instance("rule", rule, AggregationRule, example="FedAvgCallback()")
    if rule.probe is not None:
        raise ValueError(
            f"`rule` ({type(rule).__name__}) learns by a probe at the model that it proposes, and {outer} makes another"
            " model of its proposal. Give the rule to the trainer instead, or leave its probe out."
        )
    # The federation is built from the options of the outer rule, so those of the inner one would be ignored.
    if rule.options != FederationOptions():
        raise ValueError(
            f"`rule` ({type(rule).__name__}) was given arguments of the federation, which belong to the callback that"
            f" the trainer is given. Give them to {outer}."
        )
