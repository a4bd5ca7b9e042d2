"""FedHyper: learn the server's rate, or the clients', from products of consecutive pseudo-gradients.

Z. Wang, J. Wang, A. Li: FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
Hypergradient Descent. ICLR 2024.

With ``D_t = sum_k p_k (w_t - w_k)`` [P], the round's pseudo-gradient, ``g_j`` a client's gradient in its local step j
of J, and ``clip`` to bounds relative to the initial rates::

    G     alpha <- clip(alpha + <D_t, D_(t-1)>)                        server, from alpha = 1
          w     <- w - alpha D_t
    SL    beta  <- clip(beta + <D_t, D_(t-1)>)                         server, for all clients' next round
    CL    beta  <- clip(beta + <g_j, g_(j-1)> + <g_j, D_(t-1)> / J)    each client, before each step but the first

The clients' rate ``beta`` starts from that of their optimizer: G and SL keep what they have learned, CL begins anew
with every round. The products of gradients are of no natural size beside a rate, so that ``beta`` may jump between its
bounds; ``normalize_by`` has remedies. ``docs/parity.md`` lists what differs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.rule import LocalLRScale, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot
from lightning_fedhaw.vectors.layout import ParameterLayout

Adapt = Literal["G", "SL", "CL", "G+SL", "G+CL"]
NormaliseBy = Literal["none", "norms", "lr"]
Weighting = Literal["examples", "uniform"]
Bounds = tuple[float, float]

CODE_STEP, CODE_GLOBAL = 1.1, 0.1
"""In the authors' code for clients: how much a rate grows in one step at most, and the factor of the global product."""


def next_rate(rate: Tensor, product: Tensor, bounds: Bounds, *, relative: bool = False) -> Tensor:
    """A rate after a hypergradient step, clipped; the rate itself where the step is not finite.

    Args:
        rate: ``[...]``.
        product: ``[...]``, what is added to it.
        bounds: The smallest and the largest rate.
        relative: Whether the product is a share of the rate.
    """
    moved = rate * (1 + product) if relative else rate + product
    return torch.where(torch.isfinite(moved), moved.clamp(*bounds), rate)


class FedHyperCallback(AggregationRule):
    """Average with a learned server rate, a learned local rate, or both.

    Args:
        adapt: Which rates are learned: the server's (``"G"``), the clients' by the server (``"SL"``), the clients' by
            each client within its local steps (``"CL"``), ``"G+SL"`` or ``"G+CL"``.
        alpha_bounds: Bounds of the server's rate: ``(1/3, 3)`` as published, ``(0.2, 5.0)`` in the authors' code.
        beta_bounds: Bounds of the local rate, as multiples of the optimizer's.
        normalize_by: ``"none"``: products as published. ``"norms"``: cosines in their place, as shares of the present
            rate. ``"lr"``: products of displacements as shares of the initial rate; for CL the form of the authors'
            code.
        hyper_lr: Factor on the products; 1 as published.
        weighting: Weights ``p_k``: by ``"examples"``, or ``"uniform"`` as in the authors' code.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``alpha`` [] and ``beta`` [], a multiple of the local rate, in float64 on the CPU; after the first cohort
            also ``delta`` [P], its pseudo-gradient, and ``cohort_size``.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedHyperCallback"

    def __init__(
        self,
        adapt: Adapt = "G",
        *,
        alpha_bounds: Bounds = (1 / 3, 3.0),
        beta_bounds: Bounds = (0.1, 10.0),
        normalize_by: NormaliseBy = "none",
        hyper_lr: float = 1.0,
        weighting: Weighting = "examples",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        if {"SL", "CL"} <= set(str(adapt).split("+")):
            raise ValueError(
                f"`adapt`={adapt!r}: SL and CL both set the clients' rate, so they do not combine. Use 'G+SL' or"
                " 'G+CL'."
            )
        self.adapt = arguments.choice("adapt", adapt, Adapt)
        self.alpha_bounds = arguments.bounds_around_one("alpha_bounds", alpha_bounds)
        self.beta_bounds = arguments.bounds_around_one("beta_bounds", beta_bounds)
        self.normalize_by = arguments.choice("normalize_by", normalize_by, NormaliseBy)
        self.hyper_lr = arguments.number("hyper_lr", hyper_lr, minimum=0)
        self.weighting = arguments.choice("weighting", weighting, Weighting)

    prog_bar = ("alpha",)

    @property
    def needs_learning_rates(self) -> bool:  # type: ignore[override]
        """Whether the clients' rate is learned, which is a multiple of their optimizer's."""
        return self.adapt != "G"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse clients whose rate is not one number."""
        rates = {float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if self.needs_learning_rates and (len(trainer.optimizers) != 1 or len(rates) != 1):
            raise ValueError(
                f"`adapt`={self.adapt!r} learns the clients' one rate, and {type(pl_module).__name__} has"
                f" {len(trainer.optimizers)} optimizers with the rates {sorted(rates)}. Give it one optimizer with one"
                " rate, or use `adapt='G'`."
            )

    @property
    def resume_key(self) -> str:
        """Which rates are learned."""
        return f"{type(self).key}(adapt={self.adapt})"

    def summary(self) -> dict[str, float]:
        """The rates of the server, and of the clients as a multiple of their optimizer's."""
        return {name: float(self.state[name]) for name in ("alpha", "beta") if name in self.state}

    def divergence_hint(self) -> str:
        """The rates that were learned, and how to hold them."""
        learned = ", ".join(f"{name} {value:.3g}" for name, value in self.summary().items())
        return (
            f" FedHyper learns rates (adapt={self.adapt}; {learned}): narrow `alpha_bounds` or `beta_bounds`, lower"
            f" `hyper_lr` ({self.hyper_lr:g}), or use `normalize_by='norms'`."
        )

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """A client's weight before normalization."""
        return float(update.num_examples) if self.weighting == "examples" else 1.0

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Both rates as they are given."""
        return {name: torch.ones((), dtype=torch.float64) for name in ("alpha", "beta")}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """A step of the server's rates, then the aggregation."""
        counts = cohort.num_examples if self.weighting == "examples" else cohort.num_examples.clamp(1, 1)
        weights = normalized(counts)
        moved = cohort.vectors.displacements.weighted_sum(weights)
        alpha, beta = state["alpha"], state["beta"]
        metrics: dict[str, float] = {}
        if "delta" in state:
            previous, relative = state["delta"], self.normalize_by == "norms"
            product = -dot(moved, previous)
            if relative:
                lengths = dot(moved, moved).sqrt() * dot(previous, previous).sqrt()
                product = product / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
            step = self.hyper_lr * product
            if not torch.isfinite(step):
                rank_zero_warn(
                    f"FedHyper's product of round {cohort.round} is not finite: the rates stay as they were."
                )
            if "G" in self.adapt:
                alpha = next_rate(alpha, step, self.alpha_bounds, relative=relative)
            if "SL" in self.adapt:
                own = step / _one(cohort.learning_rates) if self.normalize_by == "none" else step
                beta = next_rate(beta, own, self.beta_bounds, relative=relative)
            metrics = {"product": product.item()}
        new = {"alpha": alpha.clone(), "beta": beta.clone(), "delta": -moved, "cohort_size": torch.tensor(len(cohort))}
        metrics |= {"alpha": alpha.item()}
        if "SL" in self.adapt:
            metrics |= {"beta": beta.item() * _one(cohort.learning_rates)}
        parameters = cohort.start + alpha.item() * moved
        return RuleOutput(parameters, new, weights, metrics)

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """The clients' scheduler: SL's one factor for all, or CL's in each client."""
        if "SL" in self.adapt:
            return SharedRate(float(state["beta"]))
        if "CL" in self.adapt:
            delta = layout.views(state["delta"]) if "delta" in state else None
            return ClientRate(
                delta, self.beta_bounds, self.normalize_by, self.hyper_lr, cohort_size=int(state.get("cohort_size", 1))
            )
        return None


class SharedRate(LocalLRScale):
    """One factor for all clients and steps.

    Args:
        multiple: The factor.
    """

    numbers_sent = 1

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple

    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """The factor."""
        return {"multiple": next(iter(start.values())).new_tensor(self.multiple)}

    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The factor."""
        return state["multiple"], dict(state)


class ClientRate(LocalLRScale):
    """A client's own rate, by the products of its gradients with the last one and with the last round's change.

    Args:
        delta: ``D_(t-1)`` by name of the parameter; ``None`` before the first round.
        bounds: Bounds of the rate, as multiples of the optimizer's.
        normalize_by: As in :class:`FedHyperCallback`.
        hyper_lr: As there.
        cohort_size: Clients of the last round.
    """

    def __init__(
        self,
        delta: Mapping[str, Tensor] | None,
        bounds: Bounds = (0.1, 10.0),
        normalize_by: NormaliseBy = "none",
        hyper_lr: float = 1.0,
        cohort_size: int = 1,
    ) -> None:
        self.delta, self.bounds, self.normalize_by = delta, bounds, normalize_by
        self.hyper_lr, self.cohort_size = hyper_lr, cohort_size
        self.numbers_sent = 0 if delta is None else sum(value.numel() for value in delta.values())

    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """The optimizer's own rate; as the last gradient, nothing, or the last round's change in the code's form."""
        number = next(iter(start.values())).new_tensor
        if self.delta is not None:  # on another device, if it comes from a checkpoint
            self.delta = {name: self.delta[name].to(p) for name, p in start.items()}
        last = self.delta if self.normalize_by == "lr" and self.delta is not None else {}
        return {
            "multiple": number(1.0),
            "is_first": number(1.0),
            "rate": number(_one(rates)),
            "num_steps": number(max(num_steps, 1)),
            **{f"last {name}": last[name] if name in last else torch.zeros_like(p) for name, p in start.items()},
        }

    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The factor of this step, which in the code's form has not seen this step's gradient."""
        multiple, rate, is_first = state["multiple"], state["rate"], state["is_first"] > 0
        lead = multiple.ndim
        last = {name: state[f"last {name}"] for name in gradients}
        delta = self.delta or {name: torch.zeros_like(value) for name, value in last.items()}
        if self.normalize_by == "norms":
            product = _cosine(gradients, last, lead) + _cosine(gradients, delta, lead) / state["num_steps"]
        elif self.normalize_by == "none":
            product = (_inner(gradients, last, lead) + _inner(gradients, delta, lead) / state["num_steps"]) / rate
        else:
            share = CODE_GLOBAL / self.cohort_size
            product = multiple * rate * (_inner(gradients, last, lead) + share * _inner(gradients, delta, lead))
            product = product.clamp(max=(CODE_STEP - 1) / max(self.hyper_lr, 1e-12))
        moved = next_rate(multiple, self.hyper_lr * product, self.bounds, relative=self.normalize_by != "none")
        after = torch.where(is_first, multiple, moved)
        size = multiple * rate if self.normalize_by == "lr" else torch.ones_like(rate)
        kept = {name: _broad(size, value) * value for name, value in gradients.items()}
        if self.normalize_by == "lr":  # the first step is not looked at
            kept = {name: torch.where(_broad(is_first, value), last[name], value) for name, value in kept.items()}
        new = {**state, "multiple": after, "is_first": torch.zeros_like(multiple)}
        new |= {f"last {name}": value for name, value in kept.items()}
        return multiple if self.normalize_by == "lr" else after, new


def _one(rates: Sequence[float]) -> float:
    if len(set(rates)) != 1:
        raise ValueError(f"FedHyper's local rate is one number, and the optimizer has {sorted(set(rates))}.")
    return rates[0]


def _broad(value: Tensor, like: Tensor) -> Tensor:
    """``[...]`` with axes of length one for those of a parameter."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lead: int) -> Tensor:
    """``[...]``, with that many leading axes."""
    products = [value * b[name] for name, value in a.items()]
    return torch.stack([p.reshape(*p.shape[:lead], -1).sum(-1) for p in products]).sum(0)


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lead: int) -> Tensor:
    spread = {name: b[name].expand_as(value) for name, value in a.items()}
    lengths = _inner(a, a, lead).sqrt() * _inner(spread, spread, lead).sqrt()
    return _inner(a, b, lead) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
