"""What a round logs: under which names callbacks see it, and what of it must not outlast the round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.report.history import is_of_a_client

MARKS = ("round_skipped", "server_steps_refused", "hyper_steps_refused")
"""Metrics that are logged in some rounds only, because it says something that they are there."""


def as_logged(value: float) -> Tensor:
    """Return a number in the precision in which it is logged."""
    # Lightning logs in float32 unless all of a run is in float64.
    dtype = torch.float32
    if torch.get_default_dtype() == torch.float64:
        dtype = torch.float64
    return torch.tensor(value, dtype=dtype)


def names_for_callbacks(name: str, options: Mapping[str, Any]) -> list[str]:
    """Return the names under which Lightning shows a value to callbacks.

    Args:
        name: The name that was given to ``self.log``.
        options: The options that were given with it.
    """
    if options["on_step"] and options["on_epoch"]:
        return [name, f"{name}_step", f"{name}_epoch"]
    return [name]


def show_earlier_rounds(trainer: pl.Trainer, latest: Mapping[str, float]) -> None:
    """Show callbacks of a resumed run what they would see without the interruption.

    Lightning keeps the last value of every name. A callback that monitors one would otherwise miss it in a first round
    that is skipped, and raise.

    Args:
        trainer: The trainer.
        latest: The latest value of every name in the rounds before.
    """
    shown = trainer._logger_connector._callback_metrics
    for name, value in latest.items():
        if name not in MARKS:
            shown.setdefault(name, as_logged(value))


def forget_earlier_rounds(trainer: pl.Trainer, logged: Iterable[str], present: Mapping[str, float]) -> None:
    """Remove what earlier rounds have logged of single clients, their marks, and what observers measured in them.

    Lightning keeps the last value of every name, and a client's last weight would look like one of this round.

    Args:
        trainer: The trainer.
        logged: The names that rule and rounds have logged so far.
        present: What they log in this round.
    """
    connector = trainer._logger_connector
    for name in logged:
        is_of_some_rounds = is_of_a_client(name) or name in MARKS or name.startswith(PREFIX)
        if name in present or not is_of_some_rounds:
            continue
        for metrics in (connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics):
            metrics.pop(name, None)
