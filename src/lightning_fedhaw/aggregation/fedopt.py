"""FedOpt: a server optimizer steps along what averaging, or another rule, proposes.

S. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar, H. B. McMahan: Adaptive Federated
Optimization. ICLR 2021, Algorithms 1 and 2. FedAvgM: T.-M. H. Hsu, H. Qi, M. Brown: Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification. arXiv 1909.06335.

With ``delta`` [P], the proposed displacement ``sum_k p_k (w_k - w)``, everything else per element::

    FedAvgM                          v <- beta v + delta                              w <- w + lr v
    FedAdagrad, FedAdam, FedYogi     m <- beta1 m + (1 - beta1) delta                 w <- w + lr m / (sqrt(v) + tau)
        FedAdagrad                   v <- v + delta^2
        FedAdam                      v <- beta2 v + (1 - beta2) delta^2
        FedYogi                      v <- v - (1 - beta2) delta^2 sign(v - delta^2)

``tau`` stands outside the root, and no bias is corrected. :class:`FedOptCallback` takes any optimizer of
``torch.optim`` and gives it ``-delta`` for a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, check_optimizer, check_schedule, normalized
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.options import FederationOptions, repr_settings, settings_of
from lightning_fedhaw.rule import LocalLRScale, Rule, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.layout import ParameterLayout

Method = Literal["adagrad", "adam", "yogi"]
MakesOptimizer = Callable[..., torch.optim.Optimizer]
MakesScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def second_moment(v: Tensor, delta: Tensor, method: Method, beta2: float) -> Tensor:
    """The next second moment ``v`` [P] of FedAdagrad, FedAdam or FedYogi; it stays at least 0."""
    square = delta.square()
    if method == "adagrad":
        return v + square
    if method == "adam":
        return beta2 * v + (1 - beta2) * square
    return v - (1 - beta2) * square * torch.sign(v - square)


class AdaptiveOptimizer(torch.optim.Optimizer):
    """FedAdagrad, FedAdam and FedYogi as published, for a gradient that is minus the displacement.

    Args:
        parameters: The tensors to step, or groups of them.
        lr: The server's learning rate.
        method: How the second moment is formed.
        betas: Decay of the two moments; the second is not used by ``"adagrad"``.
        tau: What is added to the root of the second moment.
        initial: The second moment before the first step.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        method: Method,
        betas: tuple[float, float],
        tau: float,
        initial: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "method": method, "betas": betas, "tau": tau, "initial": initial})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                delta, state = -parameter.grad, self.state[parameter]
                m = state.get("m", torch.zeros_like(delta))
                v = state.get("v", torch.full_like(delta, group["initial"]))
                state["m"] = beta1 * m + (1 - beta1) * delta
                state["v"] = second_moment(v, delta, group["method"], beta2)
                parameter.add_(state["m"] / (state["v"].sqrt() + group["tau"]), alpha=group["lr"])


class FedOptCallback(AggregationRule):
    """Let an optimizer of the server step along what averaging, or another rule, proposes.

    Weights are those of the rule that proposes; buffers follow them and are never touched by the optimizer, which sees
    the model's parameters in their own shapes.

    Args:
        optimizer: Makes the server's optimizer from ``(parameters, lr=...)``: a class of ``torch.optim`` or a
            ``functools.partial`` of one; one that steps on a given gradient.
        lr: The server's learning rate.
        lr_scheduler: Makes a schedule from the optimizer, such as ``partial(StepLR, step_size=20)``. It steps once a
            round.
        rule: The rule whose proposal is stepped along, such as ``FedAdpCallback()``. Default: plain averaging by the
            number of examples, of which memory does not grow with the cohort.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``optimizer`` and, with a schedule, ``scheduler``: their own states; ``rule``: the inner rule's.

    Raises:
        TypeError: If optimizer or schedule are given ready-made, cannot be made of what they will be given or want
            more in their steps (``LBFGS``, ``ReduceLROnPlateau``), or ``rule`` is not a rule.
        ValueError: If ``lr`` is negative or not finite, or ``rule`` brings federation arguments of its own.

    Example:
        >>> from functools import partial
        >>> rule = FedOptCallback(partial(torch.optim.SGD, momentum=0.9, nesterov=True), lr=0.5)
    """

    key = "FedOptCallback"

    def __init__(
        self,
        optimizer: MakesOptimizer = torch.optim.SGD,
        lr: float = 1.0,
        *,
        lr_scheduler: MakesScheduler | None = None,
        rule: AggregationRule | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.lr = arguments.number("lr", lr, minimum=0)
        check_schedule("lr_scheduler", lr_scheduler, check_optimizer("optimizer", optimizer, self.lr))
        if rule is not None:
            _check_inner(rule, type(self).__name__)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.rule = rule
        self.unnormalized_weight = _examples
        self._follow()

    summary_metrics: Sequence[str] = ("server_lr",)

    def _follow(self) -> None:
        """What the inner rule asks for."""
        if self.rule is not None:
            self.unnormalized_weight, self.prog_bar = self.rule.unnormalized_weight, self.rule.prog_bar
            self.needs_learning_rates = self.rule.needs_learning_rates
            self.keeps_cohort, self.objectives = self.rule.keeps_cohort, self.rule.objectives
            self.summary_metrics = ("server_lr", *self.rule.summary_metrics)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the inner rule look at the clients' optimizers."""
        if self.rule is not None:
            self.rule.on_fit_start(trainer, pl_module)
            self._follow()

    def check(self, server: ServerView) -> None:
        """Let the inner rule refuse what it cannot work with."""
        if self.rule is not None:
            self.rule.check(server)

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """What the inner rule gives the clients for a round."""
        return None if self.rule is None else self.rule.local_lr_scale(state["rule"], layout)

    def describe(self) -> str:
        """The rule and its settings, for the start-up line."""
        return repr_settings(self, *self._hidden, rule=None if self.rule is None else self.rule.describe())

    @property
    def resume_key(self) -> str:
        """Optimizer and schedule with their settings, which their states hold too, and the inner rule's identity."""
        settings = settings_of(self, *self._hidden, rule=None if self.rule is None else self.rule.resume_key)
        return f"{type(self).key}({settings})"

    @property
    def _hidden(self) -> tuple[str, ...]:
        """A named rule says its optimizer's settings itself."""
        return () if type(self) is FedOptCallback else ("optimizer",)

    @property
    def base_rule(self) -> Rule:
        """The rule that proposes."""
        return self if self.rule is None else self.rule.base_rule

    def summary(self) -> dict[str, float]:
        """What the inner rule has learned."""
        return {} if self.rule is None else self._informed(self.rule).summary()

    def divergence_hint(self) -> str:
        """What the inner rule has to say, and the server's rate."""
        inner = "" if self.rule is None else self._informed(self.rule).divergence_hint()
        return f"{inner} The server's learning rate is {self.lr}: a lower `lr` makes smaller steps."

    def move_state(self, device: torch.device) -> None:
        """Keep the state on another device; the inner rule knows no other."""
        super().move_state(device)
        if self.rule is not None:
            self._informed(self.rule)

    def _informed(self, rule: AggregationRule) -> AggregationRule:
        rule.state = self.state.get("rule", {})
        return rule

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """The inner rule's state; optimizer and schedule begin with the first round."""
        return {} if self.rule is None else {"rule": self.rule.init(start, num_examples)}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One proposal, and one step of the server's optimizer along it."""
        delta, weights, kept, metrics = self._propose(cohort, state, server)
        new = cohort.start.clone()
        # Named tensors that share the vector's memory: an optimizer that looks at shapes sees those of the model.
        parameters = [view.detach().requires_grad_() for view in server.layout.views(new).values()]
        optimizer = self.optimizer(parameters, lr=self.lr)
        scheduler = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        # Copies: optimizers change their memory in place, and the old state is not ours to change.
        if "optimizer" in state:
            optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if scheduler is not None and "scheduler" in state:
            scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        for parameter, part in zip(parameters, server.layout.views(-delta).values(), strict=True):
            parameter.grad = part
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        kept["optimizer"] = optimizer.state_dict()
        if scheduler is not None:
            scheduler.step()
            kept |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        return RuleOutput(new, kept, weights, {**metrics, "server_lr": rate})

    def _propose(
        self, cohort: Cohort, state: State, server: ServerView
    ) -> tuple[Tensor, Tensor, State, dict[str, float]]:
        """A displacement ``[P]``, the weights behind it, and what is new in state and metrics."""
        if self.rule is None:
            weights = normalized(cohort.num_examples)
            return cohort.vectors.displacements.weighted_sum(weights).to(cohort.start), weights, {}, {}
        inner = self.rule.step(cohort, state["rule"], server)
        return inner.parameters - cohort.start, inner.weights, {"rule": inner.state}, dict(inner.metrics)


class FedAvgMCallback(FedOptCallback):
    """FedAvg with momentum on the server: ``v <- momentum v + delta``, ``w <- w + lr v``.

    Args:
        lr: The server's learning rate. In the long run a step is ``lr / (1 - momentum)`` times the displacement.
        momentum: Decay of the velocity.
        options: The further arguments of :class:`FedOptCallback`: ``lr_scheduler``, ``rule`` and the federation's.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).
    """

    key = "FedAvgMCallback"

    def __init__(self, lr: float = 1.0, momentum: float = 0.9, **options: Any) -> None:
        self.momentum = arguments.number("momentum", momentum, minimum=0, below=1)
        super().__init__(partial(torch.optim.SGD, momentum=self.momentum), lr, **options)


class _AdaptiveCallback(FedOptCallback):
    """What the three adaptive rules share."""

    def __init__(
        self,
        method: Method,
        lr: float,
        betas: tuple[float, float],
        tau: float,
        initial_second_moment: float | None,
        **options: Any,
    ) -> None:
        self.beta1 = arguments.number("beta1", betas[0], minimum=0, below=1)
        self.beta2 = arguments.number("beta2", betas[1], minimum=0, below=1)
        self.tau = arguments.number("tau", tau, above=0)
        initial = self.tau**2 if initial_second_moment is None else initial_second_moment
        self.initial_second_moment = arguments.number("initial_second_moment", initial, minimum=0)
        optimizer = partial(
            AdaptiveOptimizer,
            method=method,
            betas=(self.beta1, self.beta2),
            tau=self.tau,
            initial=self.initial_second_moment,
        )
        super().__init__(optimizer, lr, **options)


class FedAdagradCallback(_AdaptiveCallback):
    """Adagrad on the server.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        tau: What is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`FedOptCallback`: ``lr_scheduler``, ``rule`` and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedAdagradCallback"

    def __init__(
        self,
        lr: float = 0.1,
        beta1: float = 0.0,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("adagrad", lr, (beta1, 0.0), tau, initial_second_moment, **options)


class FedAdamCallback(_AdaptiveCallback):
    """Adam on the server, without bias correction.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: What is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`FedOptCallback`: ``lr_scheduler``, ``rule`` and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedAdamCallback"

    def __init__(
        self,
        lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("adam", lr, (beta1, beta2), tau, initial_second_moment, **options)


class FedYogiCallback(_AdaptiveCallback):
    """Yogi on the server: Adam whose second moment changes by no more than the square it sees.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        beta2: One minus the rate of the second moment.
        tau: What is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`FedOptCallback`: ``lr_scheduler``, ``rule`` and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedYogiCallback"

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("yogi", lr, (beta1, beta2), tau, initial_second_moment, **options)


def _examples(update: ClientUpdate) -> float:
    return float(update.num_examples)


def _check_inner(rule: Any, outer: str) -> None:
    arguments.instance("rule", rule, AggregationRule, example="FedAvgCallback()")
    if rule.options != FederationOptions():
        raise ValueError(
            f"`rule` ({type(rule).__name__}) was given arguments of the federation, which belong to the callback that"
            f" the trainer is given. Give them to {outer}."
        )
