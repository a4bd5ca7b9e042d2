"""FedHAW as published: learn the aggregation weights and the global scale by one hypergradient step a round.

A. Nakai-Kasai and T. Wadayama: Federated Learning with Hypergradient-based Online Update of Aggregation Weights.
arXiv:2605.00458, and the authors' code (github.com/a-nakai-k/FedHAW, function ``train_fedhaw``), whose formulas these
are. The server uses only models it already has: no proxy data, no extra bytes.

Symbols, here and in every state and log of the rule:

==============  =====  ===================================================================================
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the averaged model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
``u_k``         [P]    the model that client k sent in the previous cohort A; these models built ``w``
``w_k``         [P]    the model that client k sent in this cohort B
``w``           [P]    the global model that was broadcast: ``w = scale * sum_A s_k u_k``
``mu``                 local learning rate (a number, or one per parameter)
``r``           [P]    ``sum_B s_k (w - w_k) / mu``, the plain pseudo-gradient: the effect of local training
==============  =====  ===================================================================================

With ``g = scale * r``, the gradient of the weighted loss ``sum_B scale s_k f_k`` as local training shows it
(``pseudo_gradient="weighted"``), one step is::

    gamma    <- gamma    - lr_gamma  <g, w>
    lambda_k <- lambda_k - lr_lambda scale s_k <g, u_k - sum_A s_j u_j>             jacobian="exact", k in A
    lambda_k <- lambda_k - lr_lambda scale s_k (1 - s_k) <g, u_k>                   jacobian="diagonal", k in A
    w        <- exp(gamma) sum_B softmax_B(lambda)_k w_k

The exact step is the derivative. The authors' code keeps the diagonal of the softmax Jacobian only and uses the scale
that was updated one line earlier (``gamma_for_lambda="new"``); the two can disagree in sign. ``docs/parity.md`` lists
every difference.

The steps are in units of the loss, the model and the learning rate, so their sizes must be tuned for every problem (the
authors' ``lr_gamma`` runs from 1e-3 to 1e-7), and the scale multiplies the model in every round.
:class:`~lightning_fedhaw.FedHAWCallback` is the rule without units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer
from lightning_fedhaw.aggregation.hypergradient import (
    USUAL_SCALES,
    HypergradientRule,
    Memory,
    learned_logits,
    scale_and_weight_metrics,
)
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.probe import Probe, ProbeResult
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot

Jacobian = Literal["diagonal", "exact"]
GammaForLambda = Literal["new", "old"]
PseudoGradient = Literal["weighted", "plain"]
NormalizeBy = Literal["lr", "lr*steps"]


def gamma_hypergradient(r_w: Tensor, gamma: Tensor, pseudo_gradient: PseudoGradient = "weighted") -> Tensor:
    """Compute the derivative of the objective with respect to the log-scale: ``<g, w>``.

    Args:
        r_w: ``[]``, the inner product of the plain pseudo-gradient and the broadcast model.
        gamma: ``[]``, the log-scale that built the broadcast model.
        pseudo_gradient: Whether ``g`` has the factor ``scale``.
    """
    if pseudo_gradient == "weighted":
        return r_w * gamma.exp()
    return r_w.clone()


def lambda_hypergradient(
    r_u: Tensor,
    shares: Tensor,
    gamma: Tensor,
    jacobian: Jacobian = "diagonal",
    pseudo_gradient: PseudoGradient = "weighted",
) -> Tensor:
    """Compute the derivative of the objective with respect to the previous cohort's logits.

    Args:
        r_u: ``[A]``, inner products of the plain pseudo-gradient and each previous local model.
        shares: ``[A]``, the softmax of the logits over the previous cohort.
        gamma: ``[]``, the log-scale to use.
        jacobian: ``"exact"``: the derivative of the softmax. ``"diagonal"``: its diagonal alone.
        pseudo_gradient: Whether ``g`` has the factor ``scale``.

    Returns:
        ``[A]``. The exact one sums to zero.
    """
    # One factor `scale` comes from the model, and one more from the weighted pseudo-gradient.
    factor = (2 * gamma).exp() if pseudo_gradient == "weighted" else gamma.exp()  # []
    if jacobian == "exact":
        return factor * shares * (r_u - (shares * r_u).sum())
    return factor * shares * (1 - shares) * r_u


class PublishedFedHAWCallback(HypergradientRule):
    """Learn the scale of the global model and the weight of each client with the authors' steps.

    The first round in which an update is received is FedAvg. The step sizes have units and must be tuned for every
    problem; :class:`FedHAWCallback` is the rule whose steps have none.

    Args:
        lr_gamma: Step size of the log-scale.
        lr_lambda: Step size of the logits.
        jacobian: ``"diagonal"``, as in the authors' code, or ``"exact"``, the derivative.
        gamma_for_lambda: Whether the step of the logits sees the log-scale before or after its own step. Default:
            ``"new"`` with ``"diagonal"`` (the authors' code), ``"old"`` with ``"exact"`` (the derivative).
        pseudo_gradient: ``"weighted"``: ``scale * r``, the gradient of the weighted loss, as in the authors' code.
            ``"plain"``: ``r``. They agree while the scale is 1.
        normalize_by: ``"lr"``: each client's displacement is divided by its learning rate, as in the paper, whose step
            sizes are made for it. ``"lr*steps"``: also by its number of steps.
        learning_rate: The local learning rate. Default: read every round from the clients' optimizer, per parameter
            group and as scheduled.
        scale_bounds: The smallest and largest scale allowed, such as ``(0.5, 2.0)``. Default: none, as published.
        hyper_optimizer: Makes the optimizer of ``gamma`` and that of ``lambda_`` from ``(parameters, lr=...)``, such
            as ``torch.optim.Adam`` or a ``functools.partial`` of it; one that steps on a given gradient. Default:
            ``torch.optim.SGD``, as published. Where ``normalize_by="lr*steps"`` and clients do not train with SGD,
            ``torch.optim.Adam``: a client's displacement is then not in the units of a gradient, and a step that does
            not depend on units keeps the step sizes meaningful.
        memory: Where the previous cohort's models are kept: on the model's ``"device"``, or in ``"host"`` memory.
        takes_substitutes: Whether a channel's substitute for a lost update counts as what its client sent, in the
            hypergradients as in the average, as in the authors' code. Otherwise only received updates count.
        probe: A second cohort whose gradient replaces the pseudo-gradient, such as ``Probe()``. Then steps are those of
            the true hypergradients, for which ``pseudo_gradient``, ``normalize_by`` and ``learning_rate`` are not
            needed. Default: none, as published.
        guard: Whether the plain average replaces a model that has collapsed, as in :class:`FedHAWCallback`. Default:
            no, as published.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``gamma`` [] and ``lambda_`` [N] in float64 on the CPU; after the first cohort also its client numbers
            and its vectors, ``previous_clients`` and ``previous``.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``hyper_optimizer`` makes no optimizer that steps on a given gradient, or an argument is unknown.

    Example:
        >>> rule = PublishedFedHAWCallback(lr_gamma=1e-3, lr_lambda=1e-2)
        >>> rule.init(torch.zeros(4), torch.tensor([10, 30]))["lambda_"].exp().tolist()
        [0.25, 0.75]
    """

    key = "PublishedFedHAWCallback"

    prog_bar = ("scale",)

    arguments_elsewhere = dict.fromkeys(("lr_step", "step_bounds", "momentum", "damping"), "FedHAWCallback")

    def __init__(
        self,
        lr_gamma: float = 1e-3,
        lr_lambda: float = 1e-2,
        *,
        jacobian: Jacobian = "diagonal",
        gamma_for_lambda: GammaForLambda | None = None,
        pseudo_gradient: PseudoGradient = "weighted",
        normalize_by: NormalizeBy = "lr",
        learning_rate: float | None = None,
        scale_bounds: tuple[float, float] | None = None,
        hyper_optimizer: OptimizerFactory | None = None,
        memory: Memory = "device",
        takes_substitutes: bool = True,
        probe: Probe | None = None,
        guard: bool = False,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.takes_substitutes = arguments.flag("takes_substitutes", takes_substitutes)
        self.probe = arguments.optional(arguments.instance, "probe", probe, Probe, example='Probe("validation")')
        self.guard = arguments.flag("guard", guard)
        self.lr_gamma = arguments.number("lr_gamma", lr_gamma, minimum=0)
        self.lr_lambda = arguments.number("lr_lambda", lr_lambda, minimum=0)
        self.jacobian: Jacobian = arguments.choice("jacobian", jacobian, Jacobian)
        if gamma_for_lambda is None:
            gamma_for_lambda = "new" if self.jacobian == "diagonal" else "old"
        self.gamma_for_lambda: GammaForLambda = arguments.choice("gamma_for_lambda", gamma_for_lambda, GammaForLambda)
        self.pseudo_gradient: PseudoGradient = arguments.choice("pseudo_gradient", pseudo_gradient, PseudoGradient)
        self.normalize_by: NormalizeBy = arguments.choice(
            "normalize_by", normalize_by, NormalizeBy, hint="The rule that divides by norms is `FedHAWCallback`."
        )
        self.learning_rate = arguments.optional(arguments.number, "learning_rate", learning_rate, above=0)
        self.scale_bounds = arguments.optional(arguments.bounds_around_one, "scale_bounds", scale_bounds)
        self.memory: Memory = arguments.choice("memory", memory, Memory)
        if hyper_optimizer is not None:
            check_optimizer("hyper_optimizer", hyper_optimizer, self.lr_lambda)
        self._chooses_hyper_optimizer = hyper_optimizer is None and self.normalize_by == "lr*steps"
        self.hyper_optimizer = hyper_optimizer or torch.optim.SGD

    @property
    def needs_learning_rates(self) -> bool:  # type: ignore[override]
        """Whether the local learning rate is read from the clients' optimizer."""
        return self.learning_rate is None and self.probe is None

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Choose the hyper-optimizer by the clients' optimizer, if it was not given and the choice depends on that."""
        if self._chooses_hyper_optimizer:
            optimizers = local_training.optimizers
            clients_use_sgd = all(isinstance(optimizer, torch.optim.SGD) for optimizer in optimizers)
            self.hyper_optimizer = torch.optim.SGD if clients_use_sgd else torch.optim.Adam

    @property
    def resume_key(self) -> str:
        """The settings that the hyper-optimizer's memory depends on; step sizes may change."""
        optimizer_name = getattr(self.hyper_optimizer, "__name__", "given")
        if self._chooses_hyper_optimizer:
            # The choice itself is not known before `fit`, and the same clients lead to the same choice.
            optimizer_name = "chosen"
        return f"{type(self).key}(normalize_by={self.normalize_by}, hyper_optimizer={optimizer_name})"

    def divergence_hint(self) -> str:
        """Return the scale, if it has left its usual range."""
        if self.has_usual_scale:
            return ""
        return (
            f" FedHAW's scale stands at {self.scale:.3g}, and it multiplies the model every round: lower"
            f" `lr_gamma` ({self.lr_gamma}), set `scale_bounds`, or use `hyper_optimizer=torch.optim.Adam`."
        )

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Take one hypergradient step if there was a previous cohort, then aggregate."""
        vectors = cohort.vectors
        # Not a deep copy: entries are replaced, and the tensors in them never changed.
        before = state
        state = dict(state)
        previous_scale = state["gamma"].exp().item()
        metrics: dict[str, float] = {"hypergradient_gamma": 0.0, "hypergradient_lambda": 0.0}
        if self.probe is not None:
            # Learned from the probe already, or after this step.
            metrics = {}
        elif "previous_clients" in state:
            r = self._pseudo_gradient(cohort, state["lambda_"], server)  # [P]
            state, metrics = self._hyper_step(r, cohort.start, cohort.round, state)
        weights = torch.softmax(state["lambda_"][cohort.clients], 0)  # [K]
        scale = state["gamma"].exp()  # []
        state.pop("learned_from_previous", None)
        state["previous_clients"] = cohort.clients.clone()
        state["previous"] = vectors.to(self.memory_device(cohort.start))
        metrics |= scale_and_weight_metrics(state["gamma"], state["lambda_"], cohort.clients, weights)
        _warn_if_scale_becomes_unusual(previous_scale, scale.item(), cohort.round)
        output = RuleOutput(vectors.weighted_sum(scale * weights), state, weights, metrics)
        return self.guarded(output, cohort, before, server)

    def learn_from(self, probe: ProbeResult, state: State, server: ServerView) -> tuple[State, Mapping[str, float]]:
        """Take one hypergradient step with the true gradient, if there was a previous cohort."""
        if "previous_clients" not in state or state.get("learned_from_previous"):
            return state, {}
        new_state, metrics = self._hyper_step(probe.gradient, probe.model, probe.round, state)
        # Once for each model: without an update the next round would learn from the same one.
        return {**new_state, "learned_from_previous": True}, metrics

    def _hyper_step(self, r: Tensor, model: Tensor, round_idx: int, state: State) -> tuple[State, dict[str, float]]:
        """Step the log-scale and the previous cohort's logits; return the new state and numbers for the log.

        Args:
            r: ``[P]``, the pseudo-gradient, or the gradient of the probe.
            model: ``[P]``, the model that the previous cohort's was made into.
            round_idx: The round's number.
            state: The rule's state. Not changed.
        """
        # The true gradient has no factor of its own.
        pseudo_gradient = self.pseudo_gradient if self.probe is None else "plain"
        gamma = state["gamma"]  # []
        lambda_ = state["lambda_"]  # [N]
        previous_clients = state["previous_clients"]  # [A]
        r_w = dot(r, model)  # []
        r_u = state["previous"].inner(r)  # [A]
        shares = torch.softmax(lambda_[previous_clients], 0)  # [A]

        gamma_grad = gamma_hypergradient(r_w, gamma, pseudo_gradient)  # []
        new_gamma, gamma_memory = self.descend("gamma", gamma, gamma_grad, self.lr_gamma, state)
        if self.scale_bounds is not None:
            smallest, largest = self.scale_bounds
            new_gamma = new_gamma.clamp(math.log(smallest), math.log(largest))

        gamma_for_lambda = new_gamma if self.gamma_for_lambda == "new" else gamma  # []
        lambda_grad = torch.zeros_like(lambda_)  # [N]
        lambda_grad[previous_clients] = lambda_hypergradient(
            r_u, shares, gamma_for_lambda, self.jacobian, pseudo_gradient
        )
        stepped_lambda, lambda_memory = self.descend("lambda", lambda_, lambda_grad, self.lr_lambda, state)
        new_lambda = learned_logits(lambda_, stepped_lambda, previous_clients)  # [N]

        # A step that is not usable is refused as a whole, and the memory of the hyper-optimizer with it.
        has_scale = bool(torch.isfinite(new_gamma)) and bool(new_gamma.abs() < _largest_log_scale(r.dtype))
        if not (has_scale and torch.isfinite(new_lambda).all()):
            self._warn_of_refusal(new_gamma, has_scale, round_idx)
            return state, {"hypergradient_gamma": 0.0, "hypergradient_lambda": 0.0, "hyper_steps_refused": 1.0}
        metrics = {"hypergradient_gamma": gamma_grad.abs().item(), "hypergradient_lambda": lambda_grad.norm().item()}
        return {**state, **gamma_memory, **lambda_memory, "gamma": new_gamma, "lambda_": new_lambda}, metrics

    def _warn_of_refusal(self, gamma: Tensor, has_scale: bool, round_idx: int) -> None:
        cause = f"gamma {gamma.item():.3g}, and the scale exp(gamma) vanish or overflow"
        if has_scale:
            cause = "not all of lambda finite"
        rank_zero_warn(
            f"FedHAW's hypergradient step of round {round_idx} would make {cause}, and was refused: gamma and"
            f" lambda stay as they were. Lower `lr_gamma` ({self.lr_gamma}) or `lr_lambda` ({self.lr_lambda}), or"
            " set `scale_bounds=(0.5, 2.0)`."
        )

    def _pseudo_gradient(self, cohort: Cohort, lambda_: Tensor, server: ServerView) -> Tensor:
        """Compute ``r`` [P], the weighted mean of the displacements per unit of learning rate (and step).

        Args:
            cohort: The updates that the server received.
            lambda_: ``[N]``, the logits that the weights come from.
            server: The parameter layout, where learning rates differ between parameters.
        """
        shares = torch.softmax(lambda_[cohort.clients], 0)  # [K]
        if self.normalize_by == "lr*steps":
            # A client without a step has a displacement of zero, which any number may divide.
            shares = shares / cohort.num_steps.clamp(min=1)
        rates = cohort.learning_rates
        if self.learning_rate is not None:
            rates = (self.learning_rate,)
        if min(rates) <= 0:
            raise ValueError(
                f"FedHAW divides by the local learning rate, and that of round {cohort.round} is {min(rates)}. Use a"
                " schedule that stays above 0, or give the rate as `learning_rate=`."
            )
        displacements = cohort.vectors.displacements
        if len(set(rates)) == 1:
            # On K shares instead of P parameters: one pass over the vectors less.
            return displacements.weighted_sum(-shares / rates[0])
        r = displacements.weighted_sum(-shares)  # [P]
        for parameter, rate in zip(server.layout.views(r).values(), rates, strict=True):
            parameter.div_(rate)
        return r


def _warn_if_scale_becomes_unusual(previous_scale: float, scale: float, round_idx: int) -> None:
    smallest, largest = USUAL_SCALES
    was_usual = smallest <= previous_scale <= largest
    is_usual = smallest <= scale <= largest
    # Once, in the round in which the scale leaves the range, and not in every round after it.
    if was_usual and not is_usual:
        rank_zero_warn(
            f"FedHAW's scale left [{smallest}, {largest}] in round {round_idx} ({scale:.3g}); it multiplies the model"
            " every round. If training suffers, lower `lr_gamma`, set `scale_bounds`, or use"
            " `hyper_optimizer=torch.optim.Adam`."
        )


def _largest_log_scale(dtype: torch.dtype) -> float:
    """Return the largest log-scale whose scale can be squared in the parameters' dtype."""
    return math.log(torch.finfo(dtype).max) / 2
