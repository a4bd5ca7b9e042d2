"""A progress bar that counts rounds."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_fedhaw import arguments

_REFRESH_SECONDS = 0.2


class RoundProgressBar(TQDMProgressBar):
    """One bar over all rounds of a fit, with the clients of the running round in its description.

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
        self._clients, self._done, self._drawn_at = 0, 0, 0.0

    def init_train_tqdm(self) -> Tqdm:
        """The bar over rounds."""
        bar = super().init_train_tqdm()
        bar.unit = "round"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """No second bar while rounds are counted: it would flicker."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()

    def on_train_start(self, *_: Any) -> None:
        """Open the bar where the run stands."""
        super().on_train_start()
        bar, rounds = self.train_progress_bar, self.trainer.max_epochs
        bar.total = rounds if rounds and rounds > 0 else None
        bar.n = bar.initial = self.trainer.global_step
        bar.set_description("Rounds")

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        """The bar goes on."""

    def on_round_start(self, trainer: Any, pl_module: Any, round_idx: int, clients: list[int]) -> None:
        """A cohort was drawn."""
        self._clients, self._done = len(clients), 0

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        """A client is back."""
        self._done += 1
        now = time.monotonic()
        if self.is_enabled and now - self._drawn_at > _REFRESH_SECONDS:
            self._drawn_at = now
            self.train_progress_bar.set_description(f"Rounds (client {self._done}/{self._clients})")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A round is over."""
        bar, done = self.train_progress_bar, trainer.global_step
        if not bar.disable and (done % self.refresh_rate == 0 or done == bar.total):
            bar.n = done
            bar.set_description("Rounds", refresh=False)
            bar.set_postfix(self.get_metrics(trainer, pl_module))


def replace_default_bar(trainer: Any) -> None:
    """Give a trainer that has a stock progress bar the one that counts rounds; a customized bar is left alone."""
    for i, callback in enumerate(trainer.callbacks):
        if type(callback) in (TQDMProgressBar, RichProgressBar):
            # A rich bar's rate counts refreshes a second, which means nothing to this one.
            rate = callback.refresh_rate if isinstance(callback, TQDMProgressBar) else 1
            bar = RoundProgressBar(refresh_rate=rate)
            bar._trainer = trainer
            if callback.is_disabled:
                bar.disable()
            trainer.callbacks[i] = bar
