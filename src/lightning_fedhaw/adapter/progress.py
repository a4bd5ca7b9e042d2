"""A progress bar that counts rounds."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.keys import check_has_rule

_REFRESH_SECONDS = 0.2


class RoundProgressBar(arguments.NamedArguments, TQDMProgressBar):
    """One bar over all rounds of a fit, with the clients that are training in its description.

    Args:
        refresh_rate: Rounds between two updates; 0 turns the bar off.
        process_position: Lines to move the bar down.
        leave: Has no effect: the one bar always stays.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        arguments.flag("leave", leave)
        super().__init__(
            refresh_rate=arguments.integer("refresh_rate", refresh_rate, minimum=0),
            process_position=arguments.integer("process_position", process_position, minimum=0),
            leave=False,
        )
        self._cohort_size = 0
        self._clients_trained = 0
        self._described_at = 0.0
        self._federation: Federation | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that runs no rounds."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_has_rule(type(self).__name__, callbacks_of(trainer))

    def init_train_tqdm(self) -> Tqdm:
        """Create the bar over rounds."""
        bar = super().init_train_tqdm()
        bar.unit = "round"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """Create no second bar while rounds are counted: it would flicker."""
        if self.trainer.state.fn == "fit":
            return Tqdm(disable=True)
        return super().init_validation_tqdm()

    def on_train_start(self, *_: Any) -> None:
        """Open the bar at the rounds that are over, which are not 0 in a resumed run."""
        super().on_train_start()
        bar = self.train_progress_bar
        bar.total = None
        rounds = self.trainer.max_epochs
        if rounds is not None and rounds > 0:
            bar.total = rounds
        bar.initial = self.trainer.global_step
        bar.n = self.trainer.global_step
        bar.set_description("Rounds")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave the bar as it is, where the stock one begins again."""

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Store the federation, whose engine says how many clients train at once."""
        self._federation = federation

    def on_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, round_idx: int, clients: list[int]
    ) -> None:
        """Describe the first clients of a cohort."""
        self._cohort_size = len(clients)
        self._clients_trained = 0
        self._describe()

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """Count a client, and describe the next ones."""
        self._clients_trained += 1
        # Clients that train at once end together: the next ones begin after the last of them.
        if self._clients_trained < self._cohort_size and self._clients_trained % self._clients_at_once == 0:
            self._describe()

    @property
    def _clients_at_once(self) -> int:
        # Asked again every time: the engine is chosen after `on_federation_start`, and where memory runs out in the
        # middle of a round it trains fewer clients at once from there on.
        assert self._federation is not None
        return self._federation.engine.clients_at_once

    def _describe(self) -> None:
        """Describe which clients of the round begin to train, not more often than a person can read."""
        now = time.monotonic()
        if not self.is_enabled or now - self._described_at <= _REFRESH_SECONDS:
            return
        self._described_at = now
        first = self._clients_trained + 1
        last = min(self._clients_trained + self._clients_at_once, self._cohort_size)
        clients = f"client {first}"
        if last != first:
            clients = f"clients {first}-{last} at once"
        self.train_progress_bar.set_description(f"Rounds ({clients} of {self._cohort_size})")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a round and show its metrics."""
        bar = self.train_progress_bar
        rounds = trainer.global_step
        if bar.disable:
            return
        if rounds % self.refresh_rate == 0 or rounds == bar.total:
            bar.n = rounds
            bar.set_description("Rounds", refresh=False)
            bar.set_postfix(self.get_metrics(trainer, pl_module))


def replace_default_bar(trainer: pl.Trainer) -> None:
    """Replace a trainer's stock progress bar by the one that counts rounds; a customized bar is left alone."""
    callbacks = callbacks_of(trainer)
    for index, callback in enumerate(callbacks):
        if type(callback) is TQDMProgressBar:
            refresh_rate = callback.refresh_rate
        elif type(callback) is RichProgressBar:
            # Its rate counts refreshes a second, which has no meaning for this one.
            refresh_rate = 1
        else:
            continue
        bar = RoundProgressBar(refresh_rate=refresh_rate)
        # Lightning sets it in `setup`, which a bar that replaces another one may have missed.
        bar._trainer = trainer
        if callback.is_disabled:
            bar.disable()
        callbacks[index] = bar
