"""A guard against collapse, for rules that learn weights or a scale; no rule itself.

Such a rule may learn to make the model vanish, explode or forget. The guard compares what the rule made of a round with
the plain average of the same updates, and puts the average in its place where the rule's model is clearly worse:

- where the server has proxy data: if its loss there is more than a quarter larger than the average's;
- without proxy data, by norms: if it is more than three times as long as the average, or shorter than the average and
  less than half as long as the global model has been in any round before;
- in both cases, if it is not finite.

What the rule has learned stays as it is, so that it can recover. Norms do not show that one client has taken all the
weight; only proxy data does.
"""

from __future__ import annotations

import math

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.aggregation.proxy import mean_loss
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import Batch, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot

TOLERATED_LOSS = 0.25
"""The part of the average's loss by which the rule's may be larger: both are measured on the same samples."""

LARGEST_RATIO = 3.0
"""A rule that goes up to 16 times as far as the average, and speeds up gradually, stays below 2 even from zero."""

SMALLEST_PART = 0.5
"""Of the largest norm that the global model has had."""

BATCH_SIZE = 128
"""Proxy samples of a pass at most."""

LONGEST = "longest_norm"
"""The entry of the rule's state with the largest norm that the global model has had, [] float64."""

ROUNDS = "guarded_rounds"
"""The entry with the number of rounds in which the average replaced the rule's model, [] float64."""


class GuardedRule(AggregationRule):
    """A rule that learns weights or a scale, and is guarded where its argument ``guard`` says so.

    A subclass checks its arguments and sets the attribute below.

    Attributes:
        guard: Whether the plain average replaces a model that has collapsed.
    """

    guard: bool

    def check(self, server: ServerView) -> None:
        """Try the guard's loss on proxy data before the first round, if there is some."""
        if self.guard and _has_proxy(server):
            server.check_proxy(type(self).__name__, server.loss)

    def guard_summary(self) -> dict[str, float]:
        """Return the number of rounds in which the guard stepped in, for the run summary; nothing if it never did."""
        rounds = float(self.state.get(ROUNDS, 0.0))
        if not rounds:
            return {}
        return {"guarded_rounds": rounds}

    def guarded(
        self,
        output: RuleOutput,
        cohort: Cohort,
        state: State,
        server: ServerView,
        shares: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> RuleOutput:
        """Return the rule's output, or the plain average where the rule's model has collapsed.

        Args:
            output: What the rule made of the round.
            cohort: The updates that the server received.
            state: The rule's state before the round. Not changed.
            server: The proxy data, if there is some.
            shares: ``[K]``, the weights of the plain average. Default: by examples.
            mean: ``[P]``, the mean displacement with these weights, where the rule has it already.
        """
        if not self.guard:
            return output
        if shares is None:
            shares = normalized(cohort.example_weights)  # [K]
        if mean is None:
            mean = cohort.vectors.displacements.weighted_sum(shares)  # [P]
        nothing = torch.zeros((), dtype=torch.float64)
        mean = mean.to(cohort.start)  # [P]
        longest = torch.maximum(state.get(LONGEST, nothing), _norm(cohort.start))  # []
        complaint = _complaint(output.parameters, mean, longest, cohort.start, server)
        rounds = state.get(ROUNDS, nothing)  # []
        metrics = dict(output.metrics)
        parameters = output.parameters
        weights = output.weights
        if complaint:
            if not rounds:
                rank_zero_warn(
                    f"{type(self).__name__}'s model of round {cohort.round} was replaced by the plain average, because"
                    f" {complaint}. This is said once; the run summary counts the rounds (`guarded_rounds`). If there"
                    " are many, use another rule, or `guard=False` to see what the rule does alone."
                )
            rounds = rounds + 1
            parameters = cohort.start + mean
            weights = shares
        metrics["guarded_rounds"] = float(rounds)
        new_state = {**output.state, LONGEST: longest, ROUNDS: rounds}
        return RuleOutput(parameters, new_state, weights, metrics)


def _complaint(mix: Tensor, mean: Tensor, longest: Tensor, start: Tensor, server: ServerView) -> str:
    """Say what is wrong with a rule's model; an empty string if nothing is."""
    length = _norm(mix).item()
    if not math.isfinite(length):
        return "it is not finite"
    if _has_proxy(server):
        return _loss_complaint(mix, start + mean, server)
    # From three inner products, so that no vector of the model's size has to be made.
    square = dot(start, start) + 2 * dot(start, mean) + dot(mean, mean)  # []
    average_length = square.clamp(min=0).sqrt().item()
    if length > LARGEST_RATIO * average_length > 0:
        return f"its norm is {length:.3g}, and the average's {average_length:.3g}"
    if length < average_length and length < SMALLEST_PART * longest:
        return f"its norm has fallen to {length:.3g}, and has been {longest:.3g}"
    return ""


def _loss_complaint(mix: Tensor, average: Tensor, server: ServerView) -> str:
    """Compare the losses on proxy data."""
    losses: list[float] = []
    for vector in (mix, average):

        def loss(_: Tensor, batch: Batch, vector: Tensor = vector) -> Tensor:
            return server.loss(vector, batch)

        losses.append(mean_loss(loss, server, BATCH_SIZE))
    of_mix, of_average = losses
    # Where the average's loss is not finite either, the average is no better.
    if not math.isfinite(of_average) or of_mix <= of_average + TOLERATED_LOSS * abs(of_average):
        return ""
    return f"its loss on the proxy data is {of_mix:.3g}, and the average's {of_average:.3g}"


def _norm(vector: Tensor) -> Tensor:
    """Return the length of a vector ``[P]``, as a float64 scalar on the CPU."""
    return dot(vector, vector).sqrt()


def _has_proxy(server: ServerView) -> bool:
    return server.proxy_dataset is not None and len(server.proxy_dataset) > 0
