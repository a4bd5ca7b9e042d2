"""What rules share that learn a scale and a weight per client by hypergradient steps; no rule itself.

Both kinds of FedHAW keep these numbers between rounds:

==============  =====  ===================================================================================
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
==============  =====  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.rule import State

Memory = Literal["device", "host"]
MakesOptimizer = Callable[..., torch.optim.Optimizer]

LOGIT_FLOOR = 30.0
"""How far a logit may fall below the largest: a weight of exp(-30) can come back, one of 0 never could."""

USUAL_SCALES = (0.5, 2.0)
"""A scale outside of this range is worth a word: it multiplies the model every round."""

SUMMARY_ABOVE = 20
"""With more clients than this, the log gets the range of the weights instead of one curve per client."""


def learned_logits(old: Tensor, moved: Tensor, clients: Tensor) -> Tensor:
    """Take over the logits of the clients that took part in a step, and keep those of all others.

    Args:
        old: ``[N]``, before the step.
        moved: ``[N]``, after it; an optimizer's momentum may have moved clients that were absent.
        clients: ``[A]``, the numbers of those who took part.

    Returns:
        ``[N]``, none more than ``LOGIT_FLOOR`` below the largest.
    """
    new = old.clone()
    new[clients] = moved[clients]
    return new.clamp(min=new.max() - LOGIT_FLOOR)


def scale_and_weight_metrics(gamma: Tensor, lambda_: Tensor, clients: Tensor, weights: Tensor) -> dict[str, float]:
    """Give the log the scale, everyone's logits and the cohort's weights.

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


class HypergradientRule(AggregationRule):
    """Keep a log-scale and a logit per client, and step them with a hyper-optimizer.

    A subclass checks its arguments and sets the attributes below.

    Attributes:
        lr_lambda: Step size of the logits.
        hyper_optimizer: Makes an optimizer from ``(parameters, lr=...)``.
        memory: Where the previous cohort's vectors are kept.
    """

    lr_lambda: float
    hyper_optimizer: MakesOptimizer
    memory: Memory

    keeps_cohort = True

    @property
    def scale(self) -> float:
        """The scale in force, ``exp(gamma)``; 1 before the first round."""
        return float(self.state["gamma"].exp()) if "gamma" in self.state else 1.0

    @property
    def has_usual_scale(self) -> bool:
        """Whether the scale is in the range in which models live."""
        low, high = USUAL_SCALES
        return low <= self.scale <= high

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """``gamma = 0`` and ``lambda_k = log(n_k / sum_j n_j)``: FedAvg."""
        return {"gamma": torch.zeros((), dtype=torch.float64), "lambda_": normalized(num_examples).log()}

    def summary(self) -> dict[str, float]:
        """The scale, and the range of the weights over all clients."""
        weights = torch.softmax(self.state["lambda_"], 0)
        return {"scale": self.scale, "weight_min": weights.min().item(), "weight_max": weights.max().item()}

    def memory_device(self, start: Tensor) -> torch.device:
        """Where vectors are kept between rounds."""
        return torch.device("cpu") if self.memory == "host" else start.device

    def descend(
        self, name: str, value: Tensor, grad: Tensor, lr: float, state: Mapping[str, Any]
    ) -> tuple[Tensor, State]:
        """Take one step of the hyper-optimizer.

        Args:
            name: What is stepped; the optimizer's memory is the state's entry ``{name}_optimizer``.
            value: Before the step.
            grad: Its hypergradient.
            lr: The step size.
            state: The rule's state. Not changed.

        Returns:
            The value after the step, and the entry of the optimizer's new memory, if it has any.
        """
        variable = value.clone().requires_grad_()
        optimizer = self.hyper_optimizer([variable], lr=lr)
        entry = f"{name}_optimizer"
        if entry in state:
            # Copies: an optimizer changes its memory in place, and the old state is not ours to change.
            old = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state[entry].items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: old}})
        variable.grad = grad.clone()
        optimizer.step()
        memory = optimizer.state_dict()["state"].get(0, {})
        return variable.detach(), {entry: dict(memory)} if memory else {}
