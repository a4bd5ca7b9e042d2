"""Callbacks with hooks inside of a communication round."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.keys import check_has_rule


class FederatedCallback(pl.Callback):
    """A callback with hooks inside of a round; any callback with methods of these names is called in the same way.

    These hooks observe and must not change anything: weights are determined by rules, messages by channels, and losses
    by client objectives.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that runs no rounds."""
        if stage == "fit":
            check_has_rule(type(self).__name__, trainer.callbacks)  # type: ignore[attr-defined]

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Observe the federation, before the first round of a ``fit``.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model.
            federation: The federation, new or resumed.
        """

    def on_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, round_idx: int, clients: list[int]
    ) -> None:
        """Observe the clients of a round, before any of them trains.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model.
            round_idx: The round's number, from 0.
            clients: The K clients of the round.
        """

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """Observe a client before it trains. The vectorized engine starts several clients before the first ends.

        Args:
            trainer: The trainer.
            pl_module: The module, with the model that the client starts from.
            client: The client's number.
        """

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """Observe a client's update, after it has passed the channels of the uplink.

        Args:
            trainer: The trainer.
            pl_module: The module, with the client's model.
            update: The client's update. Its displacement is only valid during the call, because its memory is used
                again for other clients.
        """

    def on_aggregation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, aggregated: Aggregated) -> None:
        """Observe an aggregation, with the new global model in the module, and log numbers of it.

        Every process calls it with the same cohort, whose operations are computed together, so all of them have to use
        it alike. A round that is skipped aggregates nothing.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model.
            aggregated: The cohort and what the rule has made of it; ``aggregated.log(name, value)`` logs a number.
        """

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: Report) -> None:
        """Observe the end of a round, with the new global model in the module.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model.
            report: The round's report.
        """
