"""What a run says at its beginning and at its end, to the user and to the loggers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, is_development_run, logs_settings, publish_summary
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.report.history import find_history
from lightning_fedhaw.report.loggers import log_settings, report
from lightning_fedhaw.report.run_summary import EvaluatedClients, RunFacts, evaluate_clients, run_summary
from lightning_fedhaw.report.settings_in_words import brief, plain_settings
from lightning_fedhaw.report.start_up import start_up_block
from lightning_fedhaw.report.summary import flat_numbers, format_summary


@dataclass(frozen=True)
class RunClock:
    """When a run began.

    Attributes:
        begin: The time, as ``time.monotonic`` has it.
        first_round: The number of its first round, which is not 0 in a resumed run.
    """

    begin: float
    first_round: int

    @classmethod
    def start(cls, first_round: int) -> RunClock:
        """Return a clock that begins now."""
        return cls(time.monotonic(), first_round)


def open_run(
    trainer: pl.Trainer, federation: Federation, partitioner: Partitioner, assumed: Sequence[str], first_round: int
) -> None:
    """Say what will run, and give the loggers its settings.

    Args:
        trainer: The trainer.
        federation: The federation.
        partitioner: How the training data is split.
        assumed: The assumptions about the split of the data.
        first_round: The number of the first round that will run.
    """
    callbacks = callbacks_of(trainer)
    rank_zero_info(start_up_block(federation, callbacks, partitioner, assumed, first_round))
    if trainer.is_global_zero and logs_settings(trainer):
        log_settings(trainer.loggers, plain_settings(federation.rule, federation.options, callbacks))


def close_run(
    trainer: pl.Trainer,
    federation: Federation,
    *,
    rounds: int,
    clock: RunClock,
    partitioner: Partitioner,
    rule_metrics: set[str],
    is_validated: bool,
    holding_present_state: Callable[[], AbstractContextManager[None]],
) -> None:
    """Evaluate the clients, and report the run summary.

    Args:
        trainer: The trainer.
        federation: The federation.
        rounds: Rounds that are over, with those before a checkpoint.
        clock: When the run began.
        partitioner: How the training data is split.
        rule_metrics: Names of the rule's and the round's own numbers.
        is_validated: Whether the global model is validated.
        holding_present_state: Lets checkpoints hold the present state while the module holds other values.
    """
    history = find_history(callbacks_of(trainer))
    federation.run_state.share_own_tensors(federation.engine)
    clients = EvaluatedClients()
    if federation.options.client_eval and federation.host.can_evaluate and not is_development_run(trainer):
        validated: Mapping[str, torch.Tensor] = {}
        if is_validated:
            validated = trainer.callback_metrics
        with holding_present_state():
            clients = evaluate_clients(federation, history, validated)
    facts = RunFacts(
        rounds=rounds,
        rounds_of_fit=rounds - clock.first_round,
        wall_seconds=time.monotonic() - clock.begin,
        peak_memory_bytes=_peak_memory(federation.host.device),
        split=brief(partitioner),
        **_paths(trainer),
    )
    summary = run_summary(
        federation, facts, trainer.callback_metrics, rule_metrics, callbacks_of(trainer), history, clients
    )
    publish_summary(trainer, summary)
    if trainer.is_global_zero:
        last_round = max(rounds - 1, 0)
        report(trainer.loggers, history, flat_numbers(summary), last_round)
        if federation.options.run_summary:
            print(format_summary(summary))


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: on a GPU those of its tensors, on the CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In kilobytes, but on a Mac in bytes.
    if sys.platform == "darwin":
        return peak
    return 1024 * peak


def _paths(trainer: pl.Trainer) -> dict[str, str]:
    """Return where the log and the checkpoint are, and what draws the pictures; empty texts where there is none."""
    paths = {"log": "", "checkpoint": "", "pictures": ""}
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder and not paths["log"]:
            paths["log"] = _short(str(folder))
        if isinstance(logger, CSVLogger):
            paths["pictures"] = f"fedhaw plot {_short(logger.log_dir)}"
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and not paths["checkpoint"]:
            path = callback.best_model_path or callback.last_model_path
            paths["checkpoint"] = _short(path) if path else ""
    if not paths["pictures"] and paths["checkpoint"]:
        paths["pictures"] = f"fedhaw plot {paths['checkpoint']}"
    return paths


def _short(path: str) -> str:
    """Return a path from the working directory, if it lies in it."""
    normalized = Path(path)
    if normalized.is_absolute() and normalized.is_relative_to(Path.cwd()):
        normalized = normalized.relative_to(Path.cwd())
    # An address such as s3://... is no path of this machine.
    if "://" in path:
        return path
    return str(normalized)
