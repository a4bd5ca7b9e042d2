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

**Scale-free** (``normalize_by="norms"``, the default). The published steps are in units of the loss, the model and the
learning rate, so their sizes have to be found anew for every problem (the authors' ``lr_gamma`` runs from 1e-3 to
1e-7), and they multiply the model in every round, which makes the scale a hardly damped oscillator. Here every
hypergradient is divided by the lengths of what it is made of, the learned step belongs to the cohort's displacement,
and the scale is bounded and forgets. With displacements ``d_k = w_k - w`` of this cohort, ``d'_k`` of the previous one,
``d = sum_B p_k d_k`` weighted by examples, and ``d' = sum_A s_k d'_k``, the direction that was taken::

    c        =  cos(d, d')                                      do two rounds agree?
    beta     <- clip(beta + (lr_step if c > 0 else 1) c)        log of the server's step, from 1 to 8 by default
    gamma    <- clip(0.8 gamma + lr_gamma exp(beta) <d, w> / |w|^2)         the relative growth of the model, leaking
    lambda_k <- lambda_k + lr_lambda s_k <d, d'_k - d'> / (|d| rms_A |d'_k|)
    w        <- exp(gamma) (w + exp(beta) sum_B softmax_B(lambda)_k d_k)

A step that grows while rounds agree and falls at once when they do not stays where the loss allows it. ``d`` is
weighted by examples so that a weight is judged by what it does to everybody's loss, and not to the loss that it has
made its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, check_optimizer, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.options import described
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.kernels import dot

Jacobian = Literal["diagonal", "exact"]
GammaForLambda = Literal["new", "old"]
PseudoGradient = Literal["weighted", "plain"]
NormaliseBy = Literal["norms", "lr*steps", "lr"]
Memory = Literal["device", "host"]

LOGIT_FLOOR = 30.0
"""How far a logit may fall below the largest: a weight of exp(-30) can come back, one of 0 never could."""

USUAL_SCALES = (0.5, 2.0)
"""A scale outside of this range is worth a word: it multiplies the model every round."""

DAMPING = 0.8
"""What is left of the log-scale after a round, where it forgets."""

FALL = 1.0
"""The step size with which the server's step falls when two rounds disagree: by ``exp(cosine)``."""

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


def next_server_step(beta: Tensor, cosine: Tensor, lr: float, bounds: tuple[float, float] = (1.0, 8.0)) -> Tensor:
    """The log of the server's step: it grows while rounds agree, and falls faster when they do not.

    Args:
        beta: ``[]``, the log of the step now.
        cosine: ``[]``, between this round's displacement and the last one's.
        lr: Step size upwards.
        bounds: Of the step itself.
    """
    low, high = (math.log(bound) for bound in bounds)
    return (beta + (lr if cosine > 0 else FALL) * cosine).clamp(low, high)


def next_scale(gamma: Tensor, growth: Tensor, lr: float, bounds: tuple[float, float] = (0.9, 1.1)) -> Tensor:
    """The log-scale of the model: a multiple of what the model grows by itself, and forgotten in a few rounds.

    Args:
        gamma: ``[]``, the log-scale now.
        growth: ``[]``, the part of the displacement along the model, relative to the model: ``<d, w> / |w|^2``.
        lr: How many times that part is to be repeated.
        bounds: Of the scale itself.
    """
    low, high = (math.log(bound) for bound in bounds)
    return (DAMPING * gamma + lr * growth).clamp(low, high)


class FedHAWCallback(AggregationRule):
    """Learn the scale of the global model and the weight of each client, online and without any server data.

    The first round is FedAvg; so is every round before a cohort has come back.

    Args:
        lr_gamma: Step size of the log-scale. Default: 0.5 with ``normalize_by="norms"``, else 1e-3.
        lr_lambda: Step size of the logits. Default: 0.3 with ``normalize_by="norms"``, else 1e-2.
        lr_step: Step size of the logarithm of the server's step; with ``normalize_by="norms"`` only. Default: 0.3.
        jacobian: ``"diagonal"``, as in the authors' code, or ``"exact"``, the derivative. Default: ``"exact"`` with
            ``normalize_by="norms"``, else ``"diagonal"``.
        gamma_for_lambda: Whether the step of the logits sees the log-scale before or after its own step. Default:
            ``"new"`` with ``"diagonal"`` (the authors' code), ``"old"`` with ``"exact"`` (the derivative). Not with
            ``normalize_by="norms"``, like the following one: there neither matters.
        pseudo_gradient: ``"weighted"``: ``scale * r``, the gradient of the weighted loss, as in the authors' code.
            ``"plain"``: ``r``. They agree while the scale is 1. Default: ``"weighted"``.
        normalize_by: ``"norms"``: the scale-free rule, whose step sizes need not be chosen. ``"lr*steps"``: the
            published rule, where each client's displacement is divided by its learning rate and its number of
            steps. ``"lr"``: by the learning rate alone, as in the paper, whose step sizes belong to it.
        learning_rate: The local learning rate. Default: read every round from the clients' optimizer, per parameter
            group and as scheduled. Not with ``normalize_by="norms"``, which does not ask for it.
        scale_bounds: The smallest and largest scale allowed, such as ``(0.5, 2.0)``. Default: (0.9, 1.1) with
            ``normalize_by="norms"``; else none, as published.
        step_bounds: The smallest and largest step of the server; with ``normalize_by="norms"`` only. The smallest is 1
            by default: a round goes at least as far as FedAvg. Default: (1.0, 8.0).
        hyper_optimizer: Makes the optimizer of ``gamma`` and that of ``lambda_`` from ``(parameters, lr=...)``, such
            as ``torch.optim.Adam`` or a ``functools.partial`` of it; one that steps on a given gradient. Default:
            ``torch.optim.SGD``, as published. Where ``normalize_by="lr*steps"`` and clients do not train with SGD,
            ``torch.optim.Adam``: a client's displacement is then not in the units of a gradient, and a step that does
            not depend on units keeps the step sizes meaningful. With ``normalize_by="norms"`` it serves ``lambda_``
            alone.
        memory: Where the previous cohort's models are kept.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``gamma`` [] and ``lambda_`` [N] in float64 on the CPU; after the first cohort also its client numbers
            and its vectors, ``previous_clients`` and ``previous``. With ``normalize_by="norms"`` also ``beta`` [] and
            ``direction`` [P], and the vectors only where weights are learned.

    Raises:
        ValueError: If an argument is not one of the allowed values, or has no meaning with this ``normalize_by``.
        TypeError: If ``hyper_optimizer`` makes none that steps on a given gradient.

    Example:
        >>> rule = FedHAWCallback(lr_gamma=1e-3, lr_lambda=1e-2, normalize_by="lr")  # as published
        >>> rule.init(torch.zeros(4), torch.tensor([10, 30]))["lambda_"].exp().tolist()
        [0.25, 0.75]
    """

    key = "FedHAWCallback"

    def __init__(
        self,
        lr_gamma: float | None = None,
        lr_lambda: float | None = None,
        *,
        lr_step: float | None = None,
        jacobian: Jacobian | None = None,
        gamma_for_lambda: GammaForLambda | None = None,
        pseudo_gradient: PseudoGradient | None = None,
        normalize_by: NormaliseBy = "norms",
        learning_rate: float | None = None,
        scale_bounds: tuple[float, float] | None = None,
        step_bounds: tuple[float, float] | None = None,
        hyper_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        memory: Memory = "device",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.normalize_by = arguments.choice("normalize_by", normalize_by, NormaliseBy)
        free = self.normalize_by == "norms"
        without_meaning: dict[str, Any] = (
            {"gamma_for_lambda": gamma_for_lambda, "pseudo_gradient": pseudo_gradient, "learning_rate": learning_rate}
            if free
            else {"lr_step": lr_step, "step_bounds": step_bounds}
        )
        lr_step = 0.3 if lr_step is None else lr_step
        step_bounds = (1.0, 8.0) if step_bounds is None else step_bounds
        pseudo_gradient = "weighted" if pseudo_gradient is None else pseudo_gradient
        lr_gamma = (0.5 if free else 1e-3) if lr_gamma is None else lr_gamma
        lr_lambda = (0.3 if free else 1e-2) if lr_lambda is None else lr_lambda
        jacobian = ("exact" if free else "diagonal") if jacobian is None else jacobian
        scale_bounds = (0.9, 1.1) if free and scale_bounds is None else scale_bounds
        self.lr_gamma = arguments.number("lr_gamma", lr_gamma, minimum=0)
        self.lr_lambda = arguments.number("lr_lambda", lr_lambda, minimum=0)
        self.lr_step = arguments.number("lr_step", lr_step, minimum=0)
        self.jacobian: Jacobian = arguments.choice("jacobian", jacobian, Jacobian)
        if gamma_for_lambda is None:
            self.gamma_for_lambda = "new" if self.jacobian == "diagonal" else "old"
        else:
            self.gamma_for_lambda = arguments.choice("gamma_for_lambda", gamma_for_lambda, GammaForLambda)
        self.pseudo_gradient: PseudoGradient = arguments.choice("pseudo_gradient", pseudo_gradient, PseudoGradient)
        self.learning_rate = arguments.optional(arguments.number, "learning_rate", learning_rate, above=0)
        self.scale_bounds = arguments.optional(arguments.bounds_around_one, "scale_bounds", scale_bounds)
        self.step_bounds = arguments.bounds_around_one("step_bounds", step_bounds)
        self.memory = arguments.choice("memory", memory, Memory)
        for name, given in without_meaning.items():
            if given is not None:
                raise ValueError(
                    f"`{name}`={given!r} has no meaning with `normalize_by={normalize_by!r}`: leave it out, or set"
                    f" `normalize_by={'lr' if free else 'norms'!r}`."
                )
        if hyper_optimizer is not None:
            check_optimizer("hyper_optimizer", hyper_optimizer, self.lr_lambda)
        self._chooses_hyper_optimizer = hyper_optimizer is None and self.normalize_by == "lr*steps"
        self.hyper_optimizer = hyper_optimizer or torch.optim.SGD
        self._without_meaning = tuple(without_meaning)

    prog_bar = ("scale", "server_step")
    keeps_cohort = True

    @property
    def needs_learning_rates(self) -> bool:  # type: ignore[override]
        """Whether the local learning rate is read from the clients' optimizer."""
        return self.normalize_by != "norms" and self.learning_rate is None

    @property
    def scale(self) -> float:
        """The scale in force, ``exp(gamma)``; 1 before the first round."""
        return float(self.state["gamma"].exp()) if "gamma" in self.state else 1.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the hyper-optimizer by what the clients train with, if nobody else did."""
        if self._chooses_hyper_optimizer:
            plain = all(isinstance(optimizer, torch.optim.SGD) for optimizer in trainer.optimizers)
            self.hyper_optimizer = torch.optim.SGD if plain else torch.optim.Adam

    def describe(self) -> str:
        """The rule and its settings, for the line that opens a run."""
        return described(self, *self._without_meaning)

    @property
    def identity(self) -> str:
        """What the kept vectors and the hyper-optimizer's memory are made for; step sizes may change."""
        hyper = "chosen" if self._chooses_hyper_optimizer else getattr(self.hyper_optimizer, "__name__", "given")
        learns = "lr_lambda=0" if self.lr_lambda == 0 else "lr_lambda>0"
        return f"{type(self).key}(normalize_by={self.normalize_by}, {learns}, hyper_optimizer={hyper})"

    def summary(self) -> dict[str, float]:
        """The scale and the server's step, and the range of the weights over all clients."""
        weights = torch.softmax(self.state["lambda_"], 0)
        step = {"server_step": self.state["beta"].exp().item()} if "beta" in self.state else {}
        return {"scale": self.scale, **step, "weight_min": weights.min().item(), "weight_max": weights.max().item()}

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
        """``gamma = 0`` and ``lambda_k = log(n_k / sum_j n_j)``: FedAvg."""
        logs = ("gamma", "beta") if self.normalize_by == "norms" else ("gamma",)
        return {name: torch.zeros((), dtype=torch.float64) for name in logs} | {
            "lambda_": normalized(num_examples).log()
        }

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One hypergradient step where a previous cohort exists, then the aggregation."""
        vectors = cohort.vectors
        state = dict(state)
        if self.normalize_by == "norms":
            return self._scale_free_step(cohort, vectors, state)
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
        return RuleOutput(vectors.weighted_sum(scale * weights), state, weights, metrics)

    def _scale_free_step(self, cohort: Cohort, vectors: CohortVectors, state: State) -> RuleOutput:
        """The whole step where hypergradients have no units."""
        moved, examples = vectors.displacements, normalized(cohort.num_examples)
        now = moved.weighted_sum(examples)
        metrics: dict[str, float] = {"agreement": 0.0}
        if "direction" in state:
            state, metrics = self._scale_free_hyper_step(cohort, now, state)
        weights = torch.softmax(state["lambda_"][cohort.clients], 0) if self.lr_lambda else examples
        direction = moved.weighted_sum(weights) if self.lr_lambda else now
        device = torch.device("cpu") if self.memory == "host" else cohort.start.device
        state |= {"direction": direction}
        if self.lr_lambda:
            state |= {"previous_clients": cohort.clients.clone(), "previous": vectors.to(device)}
        metrics |= _summary(state["gamma"], state["lambda_"], cohort.clients, weights)
        metrics |= {"server_step": state["beta"].exp().item()}
        scale, step = state["gamma"].exp().item(), state["beta"].exp().item()
        return RuleOutput((cohort.start + step * direction).mul_(scale), state, weights, metrics)

    def _scale_free_hyper_step(self, cohort: Cohort, now: Tensor, state: State) -> tuple[State, dict[str, float]]:
        w, before = cohort.start, state["direction"].to(now)
        length = dot(now, now).sqrt()
        cosine = _ratio(dot(now, before), length * dot(before, before).sqrt())
        beta = next_server_step(state["beta"], cosine, self.lr_step, self.step_bounds)
        growth = beta.exp() * _ratio(dot(now, w), dot(w, w))
        assert self.scale_bounds is not None  # (0.9, 1.1) unless given
        gamma = next_scale(state["gamma"], growth, self.lr_gamma, self.scale_bounds)
        state = {**state, "beta": beta, "gamma": gamma}
        metrics = {"agreement": cosine.item(), "hypergradient_lambda": 0.0}
        if self.lr_lambda:
            lambda_, clients, previous = state["lambda_"], state["previous_clients"], state["previous"].displacements
            shares = torch.softmax(lambda_[clients], 0)
            spread = (shares * previous.norms().square()).sum().sqrt()
            gained = _ratio(previous.inner(now), length * spread)
            grad = torch.zeros_like(lambda_)
            grad[clients] = lambda_hypergradient(-gained, shares, torch.zeros_like(beta), self.jacobian)
            moved, memory = self._descend("lambda", lambda_, grad, self.lr_lambda, state)
            state |= {"lambda_": _learned(lambda_, moved, clients), **memory}
            metrics["hypergradient_lambda"] = grad.norm().item()
        return state, metrics

    def _hyper_step(
        self, cohort: Cohort, vectors: CohortVectors, state: State, server: ServerView
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
        new_lambda = _learned(lambda_, moved, previous)

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

    def _pseudo_gradient(self, cohort: Cohort, vectors: CohortVectors, lambda_: Tensor, server: ServerView) -> Tensor:
        """``r`` [P]: the weighted mean of what the clients did, per unit of learning rate (and step)."""
        shares = torch.softmax(lambda_[cohort.clients], 0)
        if self.normalize_by == "lr*steps":
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
        """One step of the hyper-optimizer, with its memory taken from and returned to the state."""
        variable = value.clone().requires_grad_()
        optimizer = self.hyper_optimizer([variable], lr=lr)
        memory = f"{name}_optimizer"
        if memory in state:
            # Copies: an optimizer changes its memory in place, and the old state is not ours to change.
            old = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state[memory].items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: old}})
        variable.grad = grad.clone()
        optimizer.step()
        kept = optimizer.state_dict()["state"].get(0, {})
        return variable.detach(), {memory: dict(kept)} if kept else {}


def _learned(old: Tensor, moved: Tensor, clients: Tensor) -> Tensor:
    """Logits ``[N]`` after a step of those who took part in it."""
    new = old.clone()
    new[clients] = moved[clients]
    return new.clamp(min=new.max() - LOGIT_FLOOR)


def _ratio(product: Tensor, lengths: Tensor) -> Tensor:
    """A product of vectors without its units; 0 where one of them is zero, or nothing finite comes of it."""
    ratio = torch.where(lengths > 0, product / lengths, torch.zeros_like(product))
    return torch.nan_to_num(ratio, nan=0.0, posinf=0.0, neginf=0.0)


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
