"""FedHAW: learn the aggregation weights and the global scale by one hypergradient step a round.

A. Nakai-Kasai and T. Wadayama: FedHAW, arXiv 2605.00458, and the authors' code (github.com/a-nakai-k/FedHAW, function
``train_fedhaw``), whose formulas these are. The server uses only models it already has: no proxy data, no extra bytes.

Symbols, here and in every state and log of the rule:

==============  =====  ===================================================================================
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the averaged model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
``u_k``         [P]    what client k sent in the previous cohort A; these models built ``w``
``w_k``         [P]    what client k sent in this cohort B
``w``           [P]    the global model that was broadcast: ``w = scale * sum_A s_k u_k``
``mu``                 local learning rate (a number, or one per parameter)
``r``           [P]    ``sum_B s_k (w - w_k) / mu``, the plain pseudo-gradient: what local training did to ``w``
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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.aggregation.base import AggregationRule, RuleStep, ServerView, State, normalised
from lightning_fedhaw.cohort import AccumulatedVectors, ClientVectors, Cohort, dot

Jacobian = Literal["diagonal", "exact"]
GammaForLambda = Literal["new", "old"]
PseudoGradient = Literal["weighted", "plain"]
NormaliseBy = Literal["lr*steps", "lr"]
Memory = Literal["device", "host"]

LOGIT_FLOOR = 30.0
"""How far a logit may fall below the largest: a weight of exp(-30) can come back, one of 0 never could."""

USUAL_SCALES = (0.5, 2.0)
"""A scale outside of this range is worth a word: it multiplies the model every round."""

SUMMARY_ABOVE = 20
"""With more clients than this, the log gets the range of the weights instead of one curve per client."""


def gamma_hypergradient(r_w: Tensor, gamma: Tensor, pseudo_gradient: PseudoGradient = "weighted") -> Tensor:
    """Derivative of the objective with respect to the log-scale: ``<g, w>``.

    Args:
        r_w: ``[]``, the inner product of the plain pseudo-gradient and the broadcast model.
        gamma: ``[]``, the log-scale that built the broadcast model.
        pseudo_gradient: Whether ``g`` carries the factor ``scale``.
    """
    return r_w * gamma.exp() if pseudo_gradient == "weighted" else r_w.clone()


def lambda_hypergradient(
    r_u: Tensor,
    shares: Tensor,
    gamma: Tensor,
    jacobian: Jacobian = "diagonal",
    pseudo_gradient: PseudoGradient = "weighted",
) -> Tensor:
    """Derivative of the objective with respect to the previous cohort's logits.

    Args:
        r_u: ``[A]``, inner products of the plain pseudo-gradient and each previous local model.
        shares: ``[A]``, the softmax of the logits over the previous cohort.
        gamma: ``[]``, the log-scale to use.
        jacobian: ``"exact"``: the derivative of the softmax. ``"diagonal"``: its diagonal alone.
        pseudo_gradient: Whether ``g`` carries the factor ``scale``.

    Returns:
        ``[A]``. The exact one sums to zero.
    """
    factor = (2 * gamma).exp() if pseudo_gradient == "weighted" else gamma.exp()
    if jacobian == "exact":
        return factor * shares * (r_u - (shares * r_u).sum())
    return factor * shares * (1 - shares) * r_u


class FedHAWCallback(AggregationRule):
    """Learn the scale of the global model and the weight of each client, online and without any server data.

    The first round is FedAvg; so is every round before a cohort has come back.

    Args:
        lr_gamma: Step size of the log-scale.
        lr_lambda: Step size of the logits.
        jacobian: ``"diagonal"``, as in the authors' code, or ``"exact"``, the derivative.
        gamma_for_lambda: Whether the step of the logits sees the log-scale before or after its own step. Default:
            ``"new"`` with ``"diagonal"`` (the authors' code), ``"old"`` with ``"exact"`` (the derivative).
        pseudo_gradient: ``"weighted"``: ``scale * r``, the gradient of the weighted loss, as in the authors' code.
            ``"plain"``: ``r``. They agree while the scale is 1.
        normalise_by: ``"lr*steps"``: each client's displacement is divided by its learning rate and its number of
            steps, so that step sizes keep their meaning whatever the local optimiser and epochs. ``"lr"``: by the
            learning rate alone, as in the paper, whose step sizes belong to it.
        learning_rate: The local learning rate. Default: read every round from the clients' optimiser, per parameter
            group and as scheduled.
        scale_bounds: The smallest and largest scale allowed, such as ``(0.5, 2.0)``. Default: no bounds, as published.
        hyper_optimizer: Makes the optimiser of ``gamma`` and that of ``lambda_`` from ``(parameters, lr=...)``, such
            as ``torch.optim.Adam`` or a ``functools.partial`` of it; one that steps on a given gradient. Default:
            ``torch.optim.SGD``, as published. Where ``normalise_by="lr*steps"`` and clients do not train with SGD,
            ``torch.optim.Adam``: a client's displacement is then not in the units of a gradient, and a step that does
            not depend on units keeps the step sizes meaningful.
        memory: Where the previous cohort's models are kept.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``gamma`` [] and ``lambda_`` [N] in float64 on the CPU; after the first cohort also its client numbers
            and its vectors, ``previous_clients`` and ``previous``.

    Raises:
        ValueError: If an argument is not one of the allowed values.

    Example:
        >>> rule = FedHAWCallback(lr_gamma=1e-3, lr_lambda=1e-2, jacobian="exact")
        >>> rule.init(torch.zeros(4), torch.tensor([10, 30]))["lambda_"].exp().tolist()
        [0.25, 0.75]
    """

    def __init__(
        self,
        lr_gamma: float = 1e-3,
        lr_lambda: float = 1e-2,
        *,
        jacobian: Jacobian = "diagonal",
        gamma_for_lambda: GammaForLambda | None = None,
        pseudo_gradient: PseudoGradient = "weighted",
        normalise_by: NormaliseBy = "lr*steps",
        learning_rate: float | None = None,
        scale_bounds: tuple[float, float] | None = None,
        hyper_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        memory: Memory = "device",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        for name, rate in (("lr_gamma", lr_gamma), ("lr_lambda", lr_lambda)):
            if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0):
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {rate!r}.")
        for name, value, allowed in (
            ("jacobian", jacobian, get_args(Jacobian)),
            ("gamma_for_lambda", gamma_for_lambda, (*get_args(GammaForLambda), None)),
            ("pseudo_gradient", pseudo_gradient, get_args(PseudoGradient)),
            ("normalise_by", normalise_by, get_args(NormaliseBy)),
            ("memory", memory, get_args(Memory)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"`learning_rate` must be a positive number, got {learning_rate!r}.")
        if scale_bounds is not None and not (
            isinstance(scale_bounds, Sequence)
            and len(scale_bounds) == 2
            and 0 < scale_bounds[0] <= 1 <= scale_bounds[1] < math.inf
        ):
            raise ValueError(
                f"`scale_bounds` must be two positive numbers around 1, such as (0.5, 2.0), got {scale_bounds!r}."
            )
        if hyper_optimizer is not None and not callable(hyper_optimizer):
            raise TypeError(
                "`hyper_optimizer` must make an optimiser from parameters and `lr`, such as `torch.optim.Adam` or a"
                f" `functools.partial` of it, got an object of type {type(hyper_optimizer).__name__}: what it will"
                " step on does not exist yet."
            )
        self.lr_gamma = float(lr_gamma)
        self.lr_lambda = float(lr_lambda)
        self.jacobian: Jacobian = jacobian
        self.gamma_for_lambda = gamma_for_lambda or ("new" if jacobian == "diagonal" else "old")
        self.pseudo_gradient: PseudoGradient = pseudo_gradient
        self.normalise_by = normalise_by
        self.learning_rate = learning_rate
        self.scale_bounds = scale_bounds
        self._chooses_hyper_optimizer = hyper_optimizer is None and normalise_by == "lr*steps"
        self.hyper_optimizer = hyper_optimizer or torch.optim.SGD
        self.memory = memory

    prog_bar = ("scale",)
    keeps_cohort = True

    @property
    def needs_learning_rates(self) -> bool:  # type: ignore[override]
        """Whether the local learning rate is read from the clients' optimiser."""
        return self.learning_rate is None

    @property
    def scale(self) -> float:
        """The scale in force, ``exp(gamma)``; 1 before the first round."""
        return float(self.state["gamma"].exp()) if "gamma" in self.state else 1.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the hyper-optimiser by what the clients train with, if nobody else did."""
        if self._chooses_hyper_optimizer:
            plain = all(isinstance(optimizer, torch.optim.SGD) for optimizer in trainer.optimizers)
            self.hyper_optimizer = torch.optim.SGD if plain else torch.optim.Adam

    def describe(self) -> str:
        """The rule and its settings, for the line that opens a run."""
        hyper = getattr(self.hyper_optimizer, "__name__", self.hyper_optimizer)
        return (
            f"FedHAWCallback(lr_gamma={self.lr_gamma}, lr_lambda={self.lr_lambda}, jacobian={self.jacobian},"
            f" normalise_by={self.normalise_by}, hyper_optimizer={hyper})"
        )

    def summary(self) -> dict[str, float]:
        """The scale, and the range of the weights over all clients."""
        weights = torch.softmax(self.state["lambda_"], 0)
        return {"scale": self.scale, "weight_min": weights.min().item(), "weight_max": weights.max().item()}

    def advice(self) -> str:
        """The scale, if it has left the range in which models live."""
        low, high = USUAL_SCALES
        if low <= self.scale <= high:
            return ""
        return (
            f" FedHAW's scale stands at {self.scale:.3g}, and it multiplies the model every round: lower"
            f" `lr_gamma` ({self.lr_gamma}), set `scale_bounds`, or use `hyper_optimizer=torch.optim.Adam`."
        )

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """``gamma = 0`` and ``lambda_k = log(n_k / sum_j n_j)``: the weights of FedAvg."""
        return {
            "gamma": torch.zeros((), dtype=torch.float64),
            "lambda_": normalised(num_examples).log(),
        }

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleStep:
        """One hypergradient step where a previous cohort exists, then the aggregation."""
        vectors = cohort.vectors
        if isinstance(vectors, AccumulatedVectors):
            raise TypeError("FedHAW needs the clients' vectors, not their accumulated sum.")
        state = dict(state)
        previous_scale = state["gamma"].exp().item()
        metrics: dict[str, float] = {"hypergradient_gamma": 0.0, "hypergradient_lambda": 0.0}
        if "previous_clients" in state:
            state, metrics = self._hyper_step(cohort, vectors, state, server)
        weights = torch.softmax(state["lambda_"][cohort.clients], 0)
        scale = state["gamma"].exp()
        device = torch.device("cpu") if self.memory == "host" else cohort.start.device
        state |= {
            "previous_clients": cohort.clients.clone(),
            "previous": vectors.to(device),
        }
        metrics |= _summary(state["gamma"], state["lambda_"], cohort.clients, weights)
        low, high = USUAL_SCALES
        if not low <= scale <= high and low <= previous_scale <= high:
            rank_zero_warn(
                f"FedHAW's scale left [{low}, {high}] in round {cohort.round} ({scale:.3g}); it multiplies the model"
                " every round. If training suffers, lower `lr_gamma`, set `scale_bounds`, or use"
                " `hyper_optimizer=torch.optim.Adam`."
            )
        return RuleStep(vectors.weighted_sum(scale * weights), state, weights, metrics)

    def _hyper_step(
        self, cohort: Cohort, vectors: ClientVectors, state: State, server: ServerView
    ) -> tuple[State, dict[str, float]]:
        gamma, lambda_, previous = state["gamma"], state["lambda_"], state["previous_clients"]
        r = self._pseudo_gradient(cohort, vectors, lambda_, server)
        r_w = dot(r, cohort.start)
        r_u = state["previous"].inner(r)
        shares = torch.softmax(lambda_[previous], 0)

        gamma_grad = gamma_hypergradient(r_w, gamma, self.pseudo_gradient)
        new_gamma, gamma_memory = self._descend("gamma", gamma, gamma_grad, self.lr_gamma, state)
        if self.scale_bounds is not None:
            new_gamma = new_gamma.clamp(*(math.log(bound) for bound in self.scale_bounds))

        seen = new_gamma if self.gamma_for_lambda == "new" else gamma
        grad = torch.zeros_like(lambda_)
        grad[previous] = lambda_hypergradient(r_u, shares, seen, self.jacobian, self.pseudo_gradient)
        moved, lambda_memory = self._descend("lambda", lambda_, grad, self.lr_lambda, state)
        new_lambda = lambda_.clone()
        new_lambda[previous] = moved[previous]
        new_lambda = new_lambda.clamp(min=new_lambda.max() - LOGIT_FLOOR)

        metrics = {"hypergradient_gamma": gamma_grad.abs().item(), "hypergradient_lambda": grad.norm().item()}
        has_scale = bool(torch.isfinite(new_gamma)) and bool(new_gamma.abs() < _largest(r.dtype))
        if not (has_scale and torch.isfinite(new_lambda).all()):
            cause = (
                "not all of lambda finite"
                if has_scale
                else f"gamma {new_gamma.item():.3g}, and the scale exp(gamma) vanish or overflow"
            )
            rank_zero_warn(
                f"FedHAW's hypergradient step of round {cohort.round} would make {cause}, and was refused: gamma and"
                f" lambda stay as they were. Lower `lr_gamma` ({self.lr_gamma}) or `lr_lambda` ({self.lr_lambda}), or"
                " set `scale_bounds=(0.5, 2.0)`."
            )
            return state, {"hypergradient_gamma": 0.0, "hypergradient_lambda": 0.0, "hyper_steps_refused": 1.0}
        return {**state, **gamma_memory, **lambda_memory, "gamma": new_gamma, "lambda_": new_lambda}, metrics

    def _pseudo_gradient(self, cohort: Cohort, vectors: ClientVectors, lambda_: Tensor, server: ServerView) -> Tensor:
        """``r`` [P]: the weighted mean of what the clients did, per unit of learning rate (and step)."""
        shares = torch.softmax(lambda_[cohort.clients], 0)
        if self.normalise_by == "lr*steps":
            shares = shares / cohort.num_steps.clamp(min=1)
        rates = cohort.learning_rates if self.learning_rate is None else (self.learning_rate,)
        if min(rates) <= 0:
            raise ValueError(
                f"FedHAW divides by the local learning rate, and that of round {cohort.round} is {min(rates)}. Use a"
                " schedule that stays above 0, or give the rate as `learning_rate=`."
            )
        moved = vectors.displacements
        if len(set(rates)) == 1:
            return moved.weighted_sum(-shares / rates[0])
        r = moved.weighted_sum(-shares)
        for part, rate in zip(server.layout.views(r).values(), rates, strict=True):
            part.div_(rate)
        return r

    def _descend(
        self, name: str, value: Tensor, grad: Tensor, lr: float, state: Mapping[str, Any]
    ) -> tuple[Tensor, State]:
        """One step of the hyper-optimiser, with its memory taken from and returned to the state."""
        variable = value.clone().requires_grad_()
        optimizer = self.hyper_optimizer([variable], lr=lr)
        memory = f"{name}_optimizer"
        if memory in state:
            # Copies: an optimiser changes its memory in place, and the old state is not ours to change.
            old = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state[memory].items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: old}})
        variable.grad = grad.clone()
        optimizer.step()
        kept = optimizer.state_dict()["state"].get(0, {})
        return variable.detach(), {memory: dict(kept)} if kept else {}


def _largest(dtype: torch.dtype) -> float:
    """The largest log-scale whose square still fits into the parameters' dtype."""
    return math.log(torch.finfo(dtype).max) / 2


def _summary(gamma: Tensor, lambda_: Tensor, clients: Tensor, weights: Tensor) -> dict[str, float]:
    metrics = {"gamma": gamma.item(), "scale": gamma.exp().item()}
    if len(lambda_) <= SUMMARY_ABOVE:
        metrics |= {f"lambda/client_{k}": value for k, value in enumerate(lambda_.tolist())}
        metrics |= {f"weight/client_{k}": w for k, w in zip(clients.tolist(), weights.tolist(), strict=True)}
    else:
        metrics |= {"lambda/min": lambda_.min().item(), "lambda/max": lambda_.max().item()}
        metrics |= {"lambda/mean": lambda_.mean().item()}
        metrics |= {"weight/min": weights.min().item(), "weight/max": weights.max().item()}
        metrics |= {"weight/effective_clients": (1 / weights.square().sum()).item()}
    return metrics
