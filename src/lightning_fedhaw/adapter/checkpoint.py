"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: whoever is killed while writing leaves the previous checkpoint in place.

    Paths with a protocol, such as ``s3://``, are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where to.
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
            os.fsync(file.fileno())
        part.replace(target)


def write_atomically(strategy: Any) -> None:
    """Use :class:`AtomicCheckpointIO` where nobody asked for another writer."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


class RoundCheckpoint(ModelCheckpoint):
    """Keeps the latest checkpoint, written every so many rounds and after the last one; ``last.ckpt`` is the same.

    Args:
        rounds: How many.
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

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save what the last rounds have added."""
        if trainer.fast_dev_run:  # Lightning's own would write `last.ckpt` here
            return
        super().on_train_end(trainer, pl_module)
        if trainer.global_step > self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
