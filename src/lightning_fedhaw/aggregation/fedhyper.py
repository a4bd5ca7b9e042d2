"""FedHyper: learn the server's rate, or the clients', from products of consecutive pseudo-gradients.

Z. Wang, J. Wang, A. Li: FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
Hypergradient Descent. ICLR 2024.

With ``D_t = sum_k p_k (w_t - w_k)`` [P], the round's pseudo-gradient, ``g_j`` a client's gradient in its local step j
of J, and ``clip`` to bounds relative to the initial rates::

    G     alpha <- clip(alpha + <D_t, D_(t-1)>)                        server, from alpha = 1
          w     <- w - alpha D_t
    SL    beta  <- clip(beta + <D_t, D_(t-1)>)                         server, for all clients' next round
    CL    beta  <- clip(beta + <g_j, g_(j-1)> + <g_j, D_(t-1)> / J)    each client, before each step but the first

The clients' rate ``beta`` starts from that of their optimizer: with G and SL the learned rate stays from round to
round, with CL it starts again in every round. The products of gradients do not have the units of a rate, so that
``beta`` may jump between its bounds; ``normalize_by`` has remedies. ``docs/parity.md`` lists what differs from the
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import (
    AggregationRule,
    Weighting,
    unnormalized_client_weight,
)
from lightning_fedhaw.aggregation.shared_rate import SharedRate
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.rule import LocalLRScale, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot
from lightning_fedhaw.vectors.layout import ParameterLayout

Adapt = Literal["G", "SL", "CL", "G+SL", "G+CL"]
NormalizeBy = Literal["none", "norms", "lr"]
Bounds = tuple[float, float]

CODE_LARGEST_GROWTH = 1.1
"""In the authors' code for clients: the largest factor by which a rate grows in one step."""

CODE_GLOBAL_FACTOR = 0.1
"""In that code: the factor on the product with the previous round's pseudo-gradient."""


def next_rate(rate: Tensor, product: Tensor, bounds: Bounds, *, relative: bool = False) -> Tensor:
    """Return a rate after a hypergradient step, clipped; the old rate where the step is not finite.

    Args:
        rate: ``[...]``.
        product: ``[...]``, the increase of the rate.
        bounds: The smallest and the largest rate.
        relative: Whether the product is a share of the rate.
    """
    stepped = rate * (1 + product) if relative else rate + product  # [...]
    return torch.where(torch.isfinite(stepped), stepped.clamp(*bounds), rate)


class FedHyperCallback(AggregationRule):
    """Average with a learned server rate, a learned local rate, or both.

    Args:
        adapt: Which rates are learned: the server's (``"G"``), the clients' by the server (``"SL"``), the clients' by
            each client within its local steps (``"CL"``), ``"G+SL"`` or ``"G+CL"``.
        alpha_bounds: Bounds of the server's rate: ``(1/3, 3)`` as published, ``(0.2, 5.0)`` in the authors' code.
        beta_bounds: Bounds of the local rate, as multiples of the optimizer's.
        normalize_by: ``"none"``: products as published. ``"norms"``: cosines instead of products, as shares of the
            present rate. ``"lr"``: products of displacements as shares of the initial rate; for CL the form of the
            authors' code.
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

    prog_bar = ("alpha",)

    def __init__(
        self,
        adapt: Adapt = "G",
        *,
        alpha_bounds: Bounds = (1 / 3, 3.0),
        beta_bounds: Bounds = (0.1, 10.0),
        normalize_by: NormalizeBy = "none",
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
        self.adapt: Adapt = arguments.choice("adapt", adapt, Adapt)
        self.alpha_bounds = arguments.bounds_around_one("alpha_bounds", alpha_bounds)
        self.beta_bounds = arguments.bounds_around_one("beta_bounds", beta_bounds)
        self.normalize_by: NormalizeBy = arguments.choice("normalize_by", normalize_by, NormalizeBy)
        self.hyper_lr = arguments.number("hyper_lr", hyper_lr, minimum=0)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)

    @property
    def needs_learning_rates(self) -> bool:  # type: ignore[override]
        """Whether the clients' rate is learned, which is a multiple of their optimizer's."""
        return self.adapt != "G"

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Refuse clients whose rate is not one number."""
        if not self.needs_learning_rates:
            return
        rates: set[float] = set()
        for optimizer in local_training.optimizers:
            rates.update(float(group["lr"]) for group in optimizer.param_groups)
        if len(local_training.optimizers) != 1 or len(rates) != 1:
            raise ValueError(
                f"`adapt`={self.adapt!r} learns the clients' one rate, and {type(local_training.module).__name__} has"
                f" {len(local_training.optimizers)} optimizers with the rates {sorted(rates)}. Give it one optimizer"
                " with one rate, or use `adapt='G'`."
            )

    @property
    def resume_key(self) -> str:
        """The rates that are learned."""
        return f"{type(self).key}(adapt={self.adapt})"

    def summary(self) -> dict[str, float]:
        """Return the rates of the server, and of the clients as a multiple of their optimizer's."""
        rates: dict[str, float] = {}
        for name in ("alpha", "beta"):
            # `adapt` says which of them are learned.
            if name in self.state:
                rates[name] = float(self.state[name])
        return rates

    def divergence_hint(self) -> str:
        """Return the learned rates, and the arguments that bound them."""
        learned = ", ".join(f"{name} {value:.3g}" for name, value in self.summary().items())
        return (
            f" FedHyper learns rates (adapt={self.adapt}; {learned}): narrow `alpha_bounds` or `beta_bounds`, lower"
            f" `hyper_lr` ({self.hyper_lr:g}), or use `normalize_by='norms'`."
        )

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization."""
        return unnormalized_client_weight(update, self.weighting)

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return rates of 1: those that the server and the optimizer have without the rule."""
        return {"alpha": torch.ones((), dtype=torch.float64), "beta": torch.ones((), dtype=torch.float64)}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Step the rates that the server learns, then aggregate."""
        weights = self.cohort_weights(cohort)  # [K]
        displacement = cohort.vectors.displacements.weighted_sum(weights)  # [P], -D_t
        alpha = state["alpha"]  # []
        beta = state["beta"]  # []
        metrics: dict[str, float] = {}
        if "delta" in state:
            product = self._product(displacement, state["delta"])  # []
            alpha, beta = self._next_rates(product, cohort, state)
            metrics["product"] = product.item()
        metrics["alpha"] = alpha.item()
        if "SL" in self.adapt:
            metrics["beta"] = beta.item() * _single_rate(cohort.learning_rates)
        new_state = {
            "alpha": alpha.clone(),
            "beta": beta.clone(),
            "delta": -displacement,
            "cohort_size": torch.tensor(len(cohort)),
        }
        parameters = cohort.start + alpha.item() * displacement  # [P]
        return RuleOutput(parameters, new_state, weights, metrics)

    def _product(self, displacement: Tensor, previous_delta: Tensor) -> Tensor:
        """Return the product of two consecutive pseudo-gradients, or their cosine; ``[]`` float64.

        Args:
            displacement: ``[P]``, minus this round's pseudo-gradient.
            previous_delta: ``[P]``, the previous round's pseudo-gradient.
        """
        product = -dot(displacement, previous_delta)
        if self.normalize_by == "norms":
            lengths = dot(displacement, displacement).sqrt() * dot(previous_delta, previous_delta).sqrt()
            # The least number above 0: where a vector is zero the product is too, and the cosine shall be 0.
            product = product / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        return product

    def _next_rates(self, product: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, Tensor]:
        """Return the rates of the server and of the clients, ``[]`` each, after a step along a product ``[]``."""
        alpha = state["alpha"]
        beta = state["beta"]
        increase = self.hyper_lr * product
        if not torch.isfinite(increase):
            rank_zero_warn(f"FedHyper's product of round {cohort.round} is not finite: the rates stay as they were.")
        relative = self.normalize_by == "norms"
        if "G" in self.adapt:
            alpha = next_rate(alpha, increase, self.alpha_bounds, relative=relative)
        if "SL" in self.adapt:
            if self.normalize_by == "none":
                # The published step is added to the rate itself, and `beta` is a multiple of it.
                increase = increase / _single_rate(cohort.learning_rates)
            beta = next_rate(beta, increase, self.beta_bounds, relative=relative)
        return alpha, beta

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale | None:
        """Return the factor on the clients' rates: SL's one factor for all clients, or CL's in each client."""
        if "SL" in self.adapt:
            return SharedRate(float(state["beta"]))
        if "CL" in self.adapt:
            delta = layout.views(state["delta"]) if "delta" in state else None
            return ClientRate(
                delta, self.beta_bounds, self.normalize_by, self.hyper_lr, cohort_size=int(state.get("cohort_size", 1))
            )
        return None


class ClientRate(LocalLRScale):
    """A client's own rate, by the products of its gradients with the previous one and the previous round's change.

    A client's state is ``multiple``, the present rate as a multiple of the optimizer's; ``rate``, the optimizer's;
    ``num_steps``; ``is_first``, 1 before the first step and 0 after it; all ``[...]``. And for each parameter
    ``last NAME`` ``[..., *shape]``, the gradient of the last step, or its displacement with ``normalize_by="lr"``.

    Args:
        delta: ``D_(t-1)`` by name of the parameter; ``None`` before the first round.
        bounds: Bounds of the rate, as multiples of the optimizer's.
        normalize_by: As in :class:`FedHyperCallback`.
        hyper_lr: As in :class:`FedHyperCallback`.
        cohort_size: Clients of the previous round.
    """

    def __init__(
        self,
        delta: Mapping[str, Tensor] | None,
        bounds: Bounds = (0.1, 10.0),
        normalize_by: NormalizeBy = "none",
        hyper_lr: float = 1.0,
        cohort_size: int = 1,
    ) -> None:
        self.delta = delta
        self.bounds = bounds
        self.normalize_by: NormalizeBy = normalize_by
        self.hyper_lr = hyper_lr
        self.cohort_size = cohort_size
        self.numbers_sent = 0
        if delta is not None:
            self.numbers_sent = sum(value.numel() for value in delta.values())

    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """Return the state before the first step, with the optimizer's own rate.

        The last gradient is zero. In the form of the authors' code it is the previous round's change instead.
        """
        if self.delta is not None:
            # On another device, if it comes from a checkpoint.
            self.delta = {name: self.delta[name].to(parameter) for name, parameter in start.items()}
        last: Mapping[str, Tensor] = {}
        if self.normalize_by == "lr" and self.delta is not None:
            last = self.delta
        number = next(iter(start.values())).new_tensor
        state = {
            "multiple": number(1.0),
            "is_first": number(1.0),
            "rate": number(_single_rate(rates)),
            "num_steps": number(max(num_steps, 1)),
        }
        for name, parameter in start.items():
            state[f"last {name}"] = last[name] if name in last else torch.zeros_like(parameter)
        return state

    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the factor of this step; in the form of the authors' code it does not depend on this gradient."""
        multiple = state["multiple"]  # [...]
        rate = state["rate"]  # [...]
        is_first = state["is_first"] > 0  # [...]
        last = {name: state[f"last {name}"] for name in gradients}
        increase = self.hyper_lr * self._product(gradients, last, state)  # [...]
        stepped = next_rate(multiple, increase, self.bounds, relative=self.normalize_by != "none")  # [...]
        next_multiple = torch.where(is_first, multiple, stepped)  # [...]
        new_state = {**state, "multiple": next_multiple, "is_first": torch.zeros_like(multiple)}
        if self.normalize_by != "lr":
            ones = torch.ones_like(rate)
            for name, gradient in gradients.items():
                # The product is a copy: the optimizer's own gradients change with the next batch.
                new_state[f"last {name}"] = _broadcastable(ones, gradient) * gradient  # [..., *shape]
            return next_multiple, new_state
        step_size = multiple * rate  # [...]
        for name, gradient in gradients.items():
            displacement = _broadcastable(step_size, gradient) * gradient  # [..., *shape]
            # The authors' code does not look at the first step.
            new_state[f"last {name}"] = torch.where(_broadcastable(is_first, gradient), last[name], displacement)
        return multiple, new_state

    def _product(
        self, gradients: Mapping[str, Tensor], last: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Tensor:
        """Return ``<g_j, g_(j-1)> + <g_j, D_(t-1)> / J`` in the chosen form, as a multiple of the rate; ``[...]``.

        Args:
            gradients: ``g_j``, each ``[..., *shape]``.
            last: ``g_(j-1)``, each ``[..., *shape]``.
            state: The client's state.
        """
        lead = state["multiple"].ndim
        # No change before the first round.
        delta = self.delta or {name: torch.zeros_like(value) for name, value in last.items()}
        if self.normalize_by == "norms":
            return _cosine(gradients, last, lead) + _cosine(gradients, delta, lead) / state["num_steps"]
        local = _inner(gradients, last, lead)  # [...]
        global_ = _inner(gradients, delta, lead)  # [...]
        if self.normalize_by == "none":
            return (local + global_ / state["num_steps"]) / state["rate"]
        share = CODE_GLOBAL_FACTOR / self.cohort_size
        product = state["multiple"] * state["rate"] * (local + share * global_)  # [...]
        # The rate grows by the factor `1 + hyper_lr * product`; a `hyper_lr` of 0 must not divide.
        return product.clamp(max=(CODE_LARGEST_GROWTH - 1) / max(self.hyper_lr, 1e-12))


def _single_rate(rates: Sequence[float]) -> float:
    """Return the rate that all parameter tensors share, and refuse different ones."""
    if len(set(rates)) != 1:
        raise ValueError(f"FedHyper's local rate is one number, and the optimizer has {sorted(set(rates))}.")
    return rates[0]


def _broadcastable(value: Tensor, parameter: Tensor) -> Tensor:
    """Give a tensor ``[...]`` axes of length one for those of a parameter ``[..., *shape]``."""
    return value.reshape(value.shape + (1,) * (parameter.ndim - value.ndim))


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lead: int) -> Tensor:
    """Return the inner product of two sets of named tensors, ``[...]`` with ``lead`` leading axes."""
    products = [value * b[name] for name, value in a.items()]
    return torch.stack([product.reshape(*product.shape[:lead], -1).sum(-1) for product in products]).sum(0)


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lead: int) -> Tensor:
    """Return the cosine between two sets of named tensors, ``[...]`` with ``lead`` leading axes; 0 if one is zero."""
    # `b` may be the same for all clients, and so lack the leading axes.
    expanded = {name: b[name].expand_as(value) for name, value in a.items()}
    lengths = _inner(a, a, lead).sqrt() * _inner(expanded, expanded, lead).sqrt()  # [...]
    return _inner(a, b, lead) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
