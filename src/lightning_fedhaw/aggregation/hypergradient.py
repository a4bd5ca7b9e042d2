"""The part shared by rules that learn a scale and a weight per client by hypergradient steps; no rule itself.

Both rules of FedHAW keep these numbers between rounds:

==============  =====  ===================================================================================
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
==============  =====  ===================================================================================

N clients exist, K are in a cohort, A were in the previous one; a model has P trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_fedhaw.aggregation.base import normalized
from lightning_fedhaw.aggregation.factories import OptimizerFactory
from lightning_fedhaw.aggregation.guard import GuardedRule
from lightning_fedhaw.rule import State

Memory = Literal["device", "host"]

LOGIT_FLOOR = 30.0
"""How far a logit may fall below the largest: a weight of exp(-30) can grow again, one of 0 never could."""

USUAL_SCALES = (0.5, 2.0)
"""A scale outside of this range deserves a warning, because it multiplies the model every round."""

SUMMARY_ABOVE = 20
"""With more clients than this, the log gets the range of the weights instead of one curve per client."""


def learned_logits(logits: Tensor, stepped_logits: Tensor, clients: Tensor) -> Tensor:
    """Take the new logits of the clients that took part in a step, and the old ones of all others.

    Args:
        logits: ``[N]``, before the step.
        stepped_logits: ``[N]``, after it; an optimizer's momentum may have changed those of absent clients.
        clients: ``[A]``, the numbers of the clients that took part.

    Returns:
        ``[N]``, none more than ``LOGIT_FLOOR`` below the largest.
    """
    learned = logits.clone()
    learned[clients] = stepped_logits[clients]
    return learned.clamp(min=learned.max() - LOGIT_FLOOR)


def scale_and_weight_metrics(gamma: Tensor, lambda_: Tensor, clients: Tensor, weights: Tensor) -> dict[str, float]:
    """Return the scale, all clients' logits and the cohort's weights, for the log.

    Args:
        gamma: ``[]``, the log-scale.
        lambda_: ``[N]``, the logits.
        clients: ``[K]``, the numbers of the cohort's clients.
        weights: ``[K]``, their weights.
    """
    metrics = {"gamma": gamma.item(), "scale": gamma.exp().item()}
    if len(lambda_) > SUMMARY_ABOVE:
        metrics["lambda/min"] = lambda_.min().item()
        metrics["lambda/max"] = lambda_.max().item()
        metrics["lambda/mean"] = lambda_.mean().item()
        metrics["weight/min"] = weights.min().item()
        metrics["weight/max"] = weights.max().item()
        metrics["weight/effective_clients"] = (1 / weights.square().sum()).item()
        return metrics
    for client, logit in enumerate(lambda_.tolist()):
        metrics[f"lambda/client_{client}"] = logit
    for client, weight in zip(clients.tolist(), weights.tolist(), strict=True):
        metrics[f"weight/client_{client}"] = weight
    return metrics


class HypergradientRule(GuardedRule):
    """A rule that keeps a log-scale and a logit per client, and steps them with a hyper-optimizer.

    A subclass checks its arguments and sets the attributes below.

    Attributes:
        lr_lambda: Step size of the logits.
        hyper_optimizer: Makes an optimizer from ``(parameters, lr=...)``.
        memory: Where the previous cohort's vectors are kept.
    """

    lr_lambda: float
    hyper_optimizer: OptimizerFactory
    memory: Memory

    keeps_cohort = True

    takes_substitutes = False

    @property
    def scale(self) -> float:
        """The current scale, ``exp(gamma)``; 1 before the first round."""
        if "gamma" not in self.state:
            return 1.0
        return float(self.state["gamma"].exp())

    @property
    def has_usual_scale(self) -> bool:
        """Whether the scale is in its usual range."""
        low, high = USUAL_SCALES
        return low <= self.scale <= high

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return ``gamma = 0`` and ``lambda_k = log(n_k / sum_j n_j)``, with which the first round is FedAvg."""
        # Float64: step sizes as small as the published 1e-7 would be lost in the rounding of a float32 logit.
        return {"gamma": torch.zeros((), dtype=torch.float64), "lambda_": normalized(num_examples).log()}

    def admit(self, state: State, num_examples: Tensor) -> State:
        """Return the state with a logit for a client that joins, ``log(n / sum_j n_j)`` over the clients before it."""
        others = num_examples[:-1].sum()
        logit = (num_examples[-1:].to(torch.float64) / others).log().to(state["lambda_"])
        new_state = {**state, "lambda_": torch.cat([state["lambda_"], logit])}
        memory = state.get("lambda_optimizer")
        if isinstance(memory, dict):
            new_state["lambda_optimizer"] = {name: _with_zero(value, len(logit)) for name, value in memory.items()}
        return new_state

    def summary(self) -> dict[str, float]:
        """Return the scale, and the range of the weights over all clients."""
        weights = torch.softmax(self.state["lambda_"], 0)
        return {
            "scale": self.scale,
            "weight_min": weights.min().item(),
            "weight_max": weights.max().item(),
            **self.guard_summary(),
        }

    def memory_device(self, start: Tensor) -> torch.device:
        """Return the device on which vectors are kept between rounds."""
        if self.memory == "host":
            return torch.device("cpu")
        return start.device

    def descend(
        self, name: str, value: Tensor, grad: Tensor, lr: float, state: Mapping[str, object]
    ) -> tuple[Tensor, State]:
        """Take one step of the hyper-optimizer.

        Args:
            name: The name of the variable; the optimizer's memory is the state's entry ``{name}_optimizer``.
            value: The variable before the step.
            grad: Its hypergradient.
            lr: The step size.
            state: The rule's state. Not changed.

        Returns:
            The variable after the step, and the entry of the optimizer's new memory, if it has any.
        """
        variable = value.clone().requires_grad_()
        optimizer = self.hyper_optimizer([variable], lr=lr)
        entry = f"{name}_optimizer"
        memory = state.get(entry)
        if isinstance(memory, dict):
            # Copies: an optimizer changes its memory in place, and the old state must not change.
            memory = copy.deepcopy(memory)
            # The new optimizer's own settings, so that a resumed run may change them; 0 is its only variable.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: memory}})
        variable.grad = grad.clone()
        optimizer.step()
        new_memory = optimizer.state_dict()["state"].get(0, {})
        if not new_memory:
            return variable.detach(), {}
        return variable.detach(), {entry: dict(new_memory)}


def _with_zero(value: object, count: int) -> object:
    """Append zeros to what an optimizer remembers of each logit; its counters stay."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return torch.cat([value, value.new_zeros(count)])
    return value
