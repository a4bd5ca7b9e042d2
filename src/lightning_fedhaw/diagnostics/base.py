"""What all diagnostics share: when they measure, and what they refuse before the first round."""

from __future__ import annotations

from abc import ABC, abstractmethod

import lightning.pytorch as pl

from lightning_fedhaw import arguments
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.observer import FederatedCallback


class Diagnostic(FederatedCallback, ABC):
    """An observer that measures something after some rounds and changes nothing.

    What it measures is in the loggers and in the history, under names that begin with ``diagnostics/``. It has no state
    of its own, so it survives checkpoints and rounds that are undone.

    Args:
        every_n_rounds: It measures after every n-th round.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        super().__init__()
        self.every_n_rounds = arguments.integer("every_n_rounds", every_n_rounds, minimum=1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that runs no rounds, and a second observer of the same kind.

        Raises:
            ValueError: Naming the observer.
        """
        super().setup(trainer, pl_module, stage)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        of_this_kind = [callback for callback in callbacks if type(callback) is type(self)]
        if len(of_this_kind) > 1:
            name = type(self).__name__
            raise ValueError(
                f"`callbacks` has {len(of_this_kind)} of `{name}`, which would log under the same names. Leave one of"
                " them."
            )

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Refuse a federation in which nothing can be measured, before the first round."""
        self.check(federation)

    def on_aggregation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, aggregated: Aggregated) -> None:
        """Measure, if it is the turn of the round."""
        if (aggregated.round + 1) % self.every_n_rounds == 0:
            self.measure(aggregated)

    def check(self, federation: Federation) -> None:
        """Refuse a federation in which nothing can be measured.

        Raises:
            ValueError: Naming the observer, the reason and the remedy.
        """

    @abstractmethod
    def measure(self, aggregated: Aggregated) -> None:
        """Measure an aggregation, and log the numbers."""


def check_single_updates(name: str, federation: Federation) -> None:
    """Refuse a federation that keeps only the sum of a cohort's updates.

    Args:
        name: The observer, for the message.
        federation: The federation.

    Raises:
        ValueError: With the remedy.
    """
    rule = type(federation.rule).__name__
    if federation.transport.is_summed:
        raise ValueError(
            f"`{name}` needs the update of each client, and the server receives only their sum from the channel."
            f" Remove the channel or `{name}`."
        )
    if federation.rule.unnormalized_weight is not None and federation.options.storage == "auto":
        raise ValueError(
            f'`{name}` needs the update of each client, and `{rule}` adds them up as they come with `storage="auto"`.'
            ' Set `storage="device"` or `storage="host"`.'
        )
