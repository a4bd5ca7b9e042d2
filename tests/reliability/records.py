"""What two runs must have in common to be called identical, and where they first differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

Record = dict[str, Any]

# Times, and names of files and runs: they differ between runs whose results are the same.
NOT_COMPARED = ("seconds", "ModelCheckpoint", "RoundCheckpoint", "OnExceptionCheckpoint", "run_id", "identity")


def record_of(trainer: pl.Trainer, checkpoint: Path) -> Record:
    """Return all that a run has led to: its last checkpoint, its metrics and its summary."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    summary = dict(getattr(trainer, "federation_summary", {}))
    # The time and the memory of the run, and the places of its files.
    summary.pop("run", None)
    return {
        "state_dict": saved["state_dict"],
        "global_step": saved["global_step"],
        "epoch": saved["epoch"],
        "callbacks": saved["callbacks"],
        "optimizers": saved["optimizer_states"],
        "schedules": saved["lr_schedulers"],
        "federation": saved["loops"]["fit_loop"]["state_dict"]["federation"],
        "metrics": dict(trainer.callback_metrics),
        "summary": summary,
    }


def first_difference(first: Any, second: Any, path: str = "") -> str:
    """Return the path of the first difference between two nested values; empty if their bits are equal."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return "" if is_same_tensor(first, second) else f"{path}: {spread(first, second)}"
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return difference_of_mappings(first, second, path)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return f"{path}: {len(first)} and {len(second)} entries"
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (first_difference(*pair, f"{path}/{index}") for index, pair in pairs)), "")
    # NaN is equal to itself here.
    return "" if repr(first) == repr(second) else f"{path}: {first!r} and {second!r}"


def difference_of_mappings(first: Mapping[Any, Any], second: Mapping[Any, Any], path: str) -> str:
    """Compare two mappings key by key."""
    for key in [*first, *second]:
        name = str(key)
        if any(part in name for part in NOT_COMPARED):
            continue
        if key not in first or key not in second:
            return f"{path}/{name}: only in the {'first' if key in first else 'second'}"
        difference = first_difference(first[key], second[key], f"{path}/{name}")
        if difference:
            return difference
    return ""


def is_same_tensor(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


def spread(first: Tensor, second: Tensor) -> str:
    """Describe how far two tensors are apart."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return f"{first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}"
    return f"up to {(first.double() - second.double()).abs().max().item():.3g} apart"
