"""Checkpoints that are complete or not there, and that are checked before they are loaded."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.serialization import MAP_LOCATION as MapLocation

from lightning_fedhaw.adapter.checkpoint_folder import files_of_run
from lightning_fedhaw.adapter.trainer_attributes import is_development_run
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.files import load_checked, remove_abandoned, write_whole

PARTS_OF_A_MODEL = ("state_dict", "pytorch-lightning_version")
"""What a checkpoint must hold to evaluate its model."""

PARTS_OF_A_RUN = (*PARTS_OF_A_MODEL, "loops", "callbacks", "optimizer_states", "lr_schedulers")
"""What a checkpoint must hold to resume its run."""


LAUNCHER_FILE = ".temp.ckpt"
"""The name of a file in which Lightning's launchers bring the weights home from other processes, and nothing else."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """A writer of checkpoints that leaves the previous file in place if the process is killed while it writes.

    It writes another file next to the old one and renames it. What a killed run has left is removed. Paths with a
    protocol, such as ``s3://``, are left to Lightning.

    A checkpoint that is loaded, from wherever, runs no code: it may hold tensors and plain values only. A file that is
    damaged is refused.

    Attributes:
        required: The parts that a checkpoint must hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.required: tuple[str, ...] = PARTS_OF_A_MODEL
        self._tidied: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The content.
            path: The path of the file.
            storage_options: Not used, as in Lightning.

        Raises:
            OSError: If the file cannot be written, as on a full disk.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        self._tidy(target.parent)
        write_whole(target, partial(torch.save, checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: MapLocation = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: A path or an address.
            map_location: As in ``torch.load``.
            weights_only: Whether only tensors and plain values are loaded, which cannot run code: they are, unless it
                is False.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, lacks a part, or could run code.
        """
        name = str(path)
        if "://" not in name:
            self._tidy(Path(path).parent)
        with _opened(name) as file:
            content = load_checked(file, name, weights_only=weights_only is not False, map_location=map_location)
        if not isinstance(content, dict):
            raise ValueError(f"{name!r} is no checkpoint: it holds a {type(content).__name__}.")
        if Path(name).name == LAUNCHER_FILE:
            return content
        missing = [part for part in self.required if part not in content]
        if missing:
            raise ValueError(
                f"{name!r} lacks {', '.join(f'`{part}`' for part in missing)}, which Lightning writes into every"
                " checkpoint of a run unless it is asked for the weights only (`save_weights_only=True`). Resume from"
                " a whole checkpoint, or load the weights of this one into the module and start a new run."
            )
        return content

    def _tidy(self, folder: Path) -> None:
        """Remove what killed runs have left in a folder, once."""
        if folder not in self._tidied:
            self._tidied.add(folder)
            remove_abandoned(folder)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a local file, or a copy of one at an address.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    filesystem = get_filesystem(path)
    if not filesystem.exists(path):
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    if "://" not in path:
        with open(path, "rb") as file:
            yield file
        return
    # A copy, because the file is read twice, and at an address it may be another one the second time.
    with tempfile.TemporaryFile() as copy:
        with filesystem.open(path, "rb") as remote:
            shutil.copyfileobj(remote, copy, 1 << 20)
        yield copy


def check_files(strategy: Strategy, stage: str) -> None:
    """Use :class:`AtomicCheckpointIO` unless the user chose another writer.

    Args:
        strategy: The trainer's strategy.
        stage: What the trainer does, which determines what a checkpoint must hold: ``"fit"``, ``"validate"``, ...
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    checkpoint_io = strategy.checkpoint_io
    if isinstance(checkpoint_io, AtomicCheckpointIO):
        checkpoint_io.required = PARTS_OF_A_MODEL
        if stage == "fit":
            checkpoint_io.required = PARTS_OF_A_RUN


class RoundCheckpoint(ModelCheckpoint):
    """A callback that keeps the latest checkpoint, written every so many rounds and at the end, also an early one.

    ``last.ckpt`` is the same. A run that is resumed replaces its earlier files, whichever of them it is resumed from;
    files of other runs stay, except for ``last.ckpt``.

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
        # The files that this run wrote before it was resumed, and their rounds.
        self._earlier: dict[str, int] = {}

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Find the files that this run wrote before it was resumed."""
        earlier: dict[str, int] = {}
        if trainer.is_global_zero and trainer.global_step > 0 and "://" not in str(self.dirpath):
            for path in files_of_run(Path(str(self.dirpath)), "round=*.ckpt", federation.run_state.identity.run):
                number = re.match(r"round=(\d+)", path.name)
                if number is not None:
                    # As Lightning puts it together, which compares such paths as texts.
                    earlier[os.path.join(str(self.dirpath), path.name)] = int(number[1])
        self._earlier = trainer.strategy.broadcast(earlier)

    def file_exists(self, filepath: str | Path, trainer: pl.Trainer) -> bool:
        """Return whether a file must not be replaced: it is of another run, and not ``last.ckpt``."""
        is_last = Path(filepath).stem == self.CHECKPOINT_NAME_LAST
        if is_last or str(filepath) in self._earlier:
            return False
        return super().file_exists(filepath, trainer)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save the latest round, and remove the earlier files, which Lightning would keep in some orders of events."""
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        for path, rounds in list(self._earlier.items()):
            if rounds <= trainer.global_step:
                del self._earlier[path]
                if path != self.best_model_path:
                    self._remove_checkpoint(trainer, path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the rounds since the last checkpoint."""
        if is_development_run(trainer):
            # Lightning's own method would write `last.ckpt`, and a development run writes nothing.
            return
        super().on_train_end(trainer, pl_module)
        self._save_rest(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the full rounds since the last checkpoint, if the run was asked to end (SIGTERM, Ctrl+C)."""
        super().on_exception(trainer, pl_module, exception)
        is_asked_to_end = isinstance(exception, SIGTERMException)
        # Ctrl+C may reach several processes at different moments, and one that saves waits for the others.
        if isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1:
            is_asked_to_end = True
        if is_asked_to_end and not is_development_run(trainer):
            self._save_rest(trainer)

    def _save_rest(self, trainer: pl.Trainer) -> None:
        """Save the rounds since the last checkpoint."""
        is_saved = trainer.global_step <= self._last_global_step_saved
        if not is_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
