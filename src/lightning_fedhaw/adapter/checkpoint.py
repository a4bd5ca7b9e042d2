"""Checkpoints that are complete or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_fedhaw.adapter.trainer_attributes import is_development_run


class AtomicCheckpointIO(TorchCheckpointIO):
    """A writer of checkpoints that leaves the previous file in place if the process is killed while it writes.

    It writes another file next to the old one and renames it. Paths with a protocol, such as ``s3://``, are left to
    Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The content.
            path: The path of the file.
            storage_options: Not used, as in Lightning.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            # On the disk before the renaming: after a power failure the new name could hold an empty file otherwise.
            os.fsync(file.fileno())
        part.replace(target)


def write_atomically(strategy: Strategy) -> None:
    """Use :class:`AtomicCheckpointIO` unless the user chose another writer."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


class RoundCheckpoint(ModelCheckpoint):
    """A callback that keeps the latest checkpoint, written every so many rounds, after the last one and on SIGTERM.

    ``last.ckpt`` is the same.

    Args:
        rounds: Rounds between two checkpoints.
        dirpath: The folder. Default: below the logger's, or the trainer's root.
    """

    def __init__(self, rounds: int, dirpath: str | Path | None = None) -> None:
        super().__init__(
            dirpath,
            filename="round={step}",
            auto_insert_metric_name=False,
            every_n_epochs=rounds,
            save_on_train_epoch_end=True,
            save_top_k=1,
            save_last=True,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the rounds since the last checkpoint."""
        if is_development_run(trainer):
            # Lightning's own method would write `last.ckpt`, and a development run writes nothing.
            return
        super().on_train_end(trainer, pl_module)
        self._save_rest(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the full rounds since the last checkpoint, if the run was asked to end (SIGTERM)."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, SIGTERMException) and not is_development_run(trainer):
            self._save_rest(trainer)

    def _save_rest(self, trainer: pl.Trainer) -> None:
        """Save the rounds since the last checkpoint."""
        is_saved = trainer.global_step <= self._last_global_step_saved
        if not is_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
