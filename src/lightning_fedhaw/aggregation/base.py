"""The base of every aggregation rule: a rule of the round that is a callback, and so an entry point of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw import argument_names
from lightning_fedhaw.adapter.attach import attach
from lightning_fedhaw.adapter.checkpoint import check_files
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.rule import Rule

Weighting = Literal["examples", "uniform"]


class AggregationRule(Rule, KeyedCallback):
    """A rule by which the server turns a cohort into the next global model.

    A rule is a callback: give it to a :class:`~lightning_fedhaw.FederatedTrainer`, or to a stock
    ``lightning.pytorch.Trainer``, which then runs federated rounds with the training data that ``fit`` is given.

    A new rule implements :meth:`step`, and :meth:`init` if it keeps state between rounds. Both are pure: state goes
    in, state comes out. State holds tensors, plain Python values, whole
    :class:`~lightning_fedhaw.extending.ClientVectors`, and dictionaries of these; a checkpoint holds vectors as
    tensors, so that it can be loaded with ``weights_only=True``.

    Args:
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`, for a rule in a stock trainer.

    Attributes:
        state: The state after the last round; empty before the first.

    Raises:
        TypeError: If the class lacks :meth:`step`, or an argument is unknown.
    """

    key = "AggregationRule"
    is_rule = True

    arguments_elsewhere: ClassVar[Mapping[str, str]] = {}
    """Arguments that a user may look for here, and the class that takes them instead."""

    def __init__(self, **federation: Any) -> None:
        super().__init__()
        own_names = argument_names.constructor_names(type(self))
        option_names = argument_names.constructor_names(FederationOptions)
        argument_names.check_names(
            type(self).__name__, federation, [*own_names, *option_names], self.arguments_elsewhere
        )
        self.options = FederationOptions(**federation)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make a stock trainer run rounds, and give any trainer the federation's arguments."""
        if stage == "fit":
            attach(trainer, pl_module, self.options)
        else:
            check_files(trainer.strategy, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the hook of the rule's client objectives, which are no callbacks of the trainer."""
        for objective in self.objectives:
            objective.on_fit_start(trainer, pl_module)

    def cohort_weights(self, cohort: Cohort) -> Tensor:
        """Return the weights of a cohort by ``unnormalized_weight``, the same as those of a running sum.

        A rule that averages takes its weights from here, so that a subclass changes them by one method. A rule without
        ``unnormalized_weight`` weighs clients by their numbers of examples.

        Returns:
            ``[K]`` float64, summing to one.

        Raises:
            ZeroDivisionError: If all weights are zero.
        """
        if self.unnormalized_weight is None:
            return normalized(cohort.example_weights)
        if len(cohort.unnormalized_weights) == len(cohort):
            return normalized(cohort.unnormalized_weights)
        # A cohort that was made by hand: the weights are computed from what it holds.
        weights = [self.weigh(update) for update in _updates_of(cohort)]
        return normalized(torch.tensor(weights, dtype=torch.float64))


def normalized(weights: Tensor) -> Tensor:
    """Scale weights ``[K]`` to sum to one, in float64.

    Raises:
        ZeroDivisionError: If they sum to zero.
    """
    # Float64, because numbers of examples in float32 would be rounded above 2**24.
    weights = weights.to(torch.float64)
    total = weights.sum()
    # Not `total <= 0`, which is false for NaN.
    if not total > 0:
        raise ZeroDivisionError(f"Aggregation weights must have a positive sum, got {weights.tolist()}.")
    return weights / total


def common_rate(rates: tuple[float, ...], reader: str, remedy: str) -> float:
    """Return the learning rate that all parameter tensors share.

    Args:
        rates: The learning rate of each parameter tensor.
        reader: What needs one rate, for the message.
        remedy: What else the user can do, for the message.

    Raises:
        ValueError: If the rates differ.
    """
    if len(set(rates)) != 1:
        raise ValueError(
            f"{reader} needs one local learning rate for all parameters, got {sorted(set(rates))}. Give all parameter"
            f" groups the same rate, or {remedy}."
        )
    return rates[0]


def client_weights(cohort: Cohort, weighting: Weighting) -> Tensor:
    """Weigh the clients of a cohort by their numbers of examples, or equally.

    Returns:
        ``[K]`` float64, summing to one.
    """
    if weighting == "examples":
        return normalized(cohort.example_weights)
    return normalized(torch.ones(len(cohort)))


def _updates_of(cohort: Cohort) -> list[ClientUpdate]:
    """Return a cohort's clients as updates without vectors, with all numbers that the cohort holds."""
    counts = zip(cohort.clients.tolist(), cohort.num_examples.tolist(), cohort.num_steps.tolist(), strict=True)
    updates: list[ClientUpdate] = []
    for slot, (client, num_examples, num_steps) in enumerate(counts):
        num_batches = 0
        if len(cohort.num_batches):
            num_batches = int(cohort.num_batches[slot])
        lr_scale = 1.0
        if cohort.lr_scales is not None:
            lr_scale = float(cohort.lr_scales[slot])
        inverse_probability = 1.0
        if cohort.inverse_probabilities is not None:
            inverse_probability = float(cohort.inverse_probabilities[slot])
        update = ClientUpdate(
            client,
            num_examples,
            num_steps,
            0,
            torch.empty(0),
            num_batches=num_batches,
            lr_scale=lr_scale,
            inverse_probability=inverse_probability,
        )
        updates.append(update)
    return updates


def unnormalized_client_weight(update: ClientUpdate, weighting: Weighting) -> float:
    """Return a client's weight of :func:`client_weights` before normalization."""
    if weighting == "examples":
        return float(update.example_weight)
    return 1.0
