"""Which run the checkpoints of a folder belong to: several runs may share one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

LAST = "last"
"""How the name of the latest checkpoint begins."""


def run_of(path: Path) -> str | None:
    """Return the identity of the run that wrote a checkpoint; None if the file does not tell.

    The tensors in the file are not read.

    Args:
        path: A local file, which may be damaged or no checkpoint at all.
    """
    try:
        content: object = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError):
        return None
    for key in ("loops", "fit_loop", "state_dict", "federation", "run_id"):
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    if not isinstance(content, str):
        return None
    return content


def files_of_run(folder: Path, pattern: str, run: str) -> list[Path]:
    """List the checkpoints in a folder that one run has written.

    Args:
        folder: The folder, which need not exist.
        pattern: A pattern of the files' names.
        run: The identity of the run.
    """
    return [path for path in sorted(folder.glob(pattern)) if run_of(path) == run]


def warn_of_other_runs(path: str | Path | None, run: str) -> None:
    """Warn if a run is resumed from a ``last.ckpt`` in a folder that also holds checkpoints of another run.

    Args:
        path: The checkpoint that the run is resumed from.
        run: The identity of its run.
    """
    if path is None or "://" in str(path) or not Path(path).name.startswith(LAST):
        return
    for other in sorted(Path(path).parent.glob("*.ckpt")):
        other_run = run_of(other)
        if other_run not in (None, run):
            rank_zero_warn(
                f"{str(path)!r} is of the run that began at {run}, and its folder also holds checkpoints of another"
                f" run, such as {other.name!r} of the run that began at {other_run}: the latest of them wrote"
                f" `{LAST}.ckpt`. Make sure that it is the run to resume, and give every run a folder of its own"
                " (`default_root_dir`)."
            )
            return
