"""The base of every aggregation rule: a rule of the round that is a callback, and so an entry point of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.attach import attach
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

    arguments_elsewhere: ClassVar[Mapping[str, str]] = {}
    """Arguments that a user may look for here, and the class that takes them instead."""

    def __init__(self, **federation: Any) -> None:
        super().__init__()
        own_names = arguments.constructor_names(type(self))
        option_names = arguments.constructor_names(FederationOptions)
        arguments.check_names(type(self).__name__, federation, [*own_names, *option_names], self.arguments_elsewhere)
        self.options = FederationOptions(**federation)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make a stock trainer run rounds, and give any trainer the federation's arguments."""
        if stage == "fit":
            attach(trainer, self.options)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the rule's client objectives check the clients' optimizers."""
        for objective in self.objectives:
            objective.on_fit_start(trainer, pl_module)


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


def client_weights(cohort: Cohort, weighting: Weighting) -> Tensor:
    """Weigh the clients of a cohort by their numbers of examples, or equally.

    Returns:
        ``[K]`` float64, summing to one.
    """
    if weighting == "examples":
        return normalized(cohort.example_weights)
    return normalized(torch.ones(len(cohort)))


def unnormalized_client_weight(update: ClientUpdate, weighting: Weighting) -> float:
    """Return a client's weight of :func:`client_weights` before normalization."""
    if weighting == "examples":
        return float(update.example_weight)
    return 1.0
