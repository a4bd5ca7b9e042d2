"""One run of a sweep, from its plan to its record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.cli import FederatedCLI, entry
from lightning_fedhaw.cli_messages import sentence
from lightning_fedhaw.comparing.plan import file_name, key_of
from lightning_fedhaw.comparing.running import Outcome, Record, logger_of, recorded, state_bytes
from lightning_fedhaw.report.history import find_history
from lightning_fedhaw.rule import find_rule

Read = TypeVar("Read")

_QUIETLY = (
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
"""What no run of a sweep shows; the log of each is a folder of its own."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, in a form that another process can carry out.

    Attributes:
        sweep: The name of the sweep.
        arguments: The arguments of ``fedhaw fit``.
        method: What is compared in one table: the rule, and the values of the model and of local training.
        settings: What tells the tables apart: the values of the federation, its channels and its data.
        seed: The seed of the run.
        rounds: The number of rounds.
        metric: The metric that is compared; None for an accuracy or a loss that is logged.
        configurations: Checksums of the configuration files, so that a changed one is another run.
    """

    sweep: str
    arguments: tuple[str, ...]
    method: str
    settings: tuple[tuple[str, object], ...]
    seed: int
    rounds: int
    metric: str | None
    configurations: tuple[int, ...] = ()

    def describe(self) -> dict[str, object]:
        """Return what identifies the run, as plain values."""
        return {
            "cell": self.sweep,
            "method": self.method,
            "settings": dict(self.settings),
            "seed": self.seed,
            "rounds": self.rounds,
            "kind": "sweep",
            "arguments": list(self.arguments),
            "configurations": list(self.configurations),
        }

    @property
    def key(self) -> str:
        """The identity of the run, for its record."""
        return key_of(self.describe())

    @property
    def title(self) -> str:
        """The run in words."""
        return f"{', '.join([self.sweep, *self._setting_words(), self.method])}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The folder of the method's runs below that of all results; each seed has its own in it."""
        names = [file_name(self.sweep)]
        if self.settings:
            names.append(file_name("_".join(self._setting_words())))
        names.append(file_name(self.method))
        return "/".join(names)

    def _setting_words(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.settings]


@dataclass
class _Trained:
    """The trainer of a run, which is needed after an error too."""

    trainers: list[Trainer] = field(default_factory=list)


class _SweepCLI(FederatedCLI):
    """The command line of one run, which writes its log into a folder of the sweep.

    Args:
        arguments: The arguments of ``fedhaw fit``.
        folder: The folder of the log.
        trained: Receives the trainer.
    """

    def __init__(self, arguments: list[str], folder: Path, trained: _Trained) -> None:
        self._folder = folder
        self._trained = trained
        super().__init__(args=["fit", *arguments], parser_kwargs={**_raising(), "fit": _raising()})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer with a log of its own, and without checkpoints unless a callback writes them."""
        callbacks = entry(self, self.config_init, "trainer").get("callbacks") or []
        if not isinstance(callbacks, list):
            callbacks = [callbacks]
        has_checkpoint = any(isinstance(callback, Checkpoint) for callback in callbacks)
        trainer = super().instantiate_trainer(
            logger=logger_of(self._folder), enable_checkpointing=has_checkpoint, **kwargs
        )
        self._trained.trainers.append(trainer)
        return trainer


class ArgumentReader(FederatedCLI):
    """A command line that reads arguments and creates nothing.

    Args:
        arguments: The arguments of ``fedhaw fit``.
    """

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(args=arguments, run=False, parser_kwargs=_raising())

    def instantiate_classes(self) -> None:
        """Create nothing."""


def _raising() -> dict[str, object]:
    """Return the settings of a parser that raises its errors, where one of a command ends the process."""
    return {"exit_on_error": False}


def refusing(read: Callable[[list[str]], Read], arguments: list[str]) -> Read:
    """Read arguments of a command line.

    Args:
        read: Reads them.
        arguments: The arguments.

    Returns:
        What it returns.

    Raises:
        ValueError: If they are refused.
    """
    # Lightning warns where a process has arguments of its own.
    process_arguments = sys.argv
    sys.argv = process_arguments[:1]
    try:
        return read(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(sentence(str(error))) from error
    finally:
        sys.argv = process_arguments


def run(plan: SweepRun, output: Path) -> Record:
    """Carry out one run with one thread, without any effect on the process's random states.

    Args:
        plan: The run.
        output: The folder of the sweep, which receives the run's log.

    Raises:
        ValueError: If the metric was not logged.
    """
    return recorded(plan, output, _train)


def _train(plan: SweepRun, folder: Path) -> Outcome:
    trained = _Trained()
    diverged = False
    try:
        refusing(partial(_SweepCLI, folder=folder, trained=trained), [*plan.arguments, *_QUIETLY])
    except FloatingPointError:
        # The end of a method that diverges is a result, which a comparison shows.
        diverged = True
    (trainer,) = trained.trainers
    history = find_history(callbacks_of(trainer))
    if diverged:
        return Outcome(history, None, diverged=True)
    rule: Any = find_rule(callbacks_of(trainer))
    summary: dict[str, Any] = trainer.federation_summary  # type: ignore[attr-defined]
    return Outcome(history, None, summary=summary, state_bytes=state_bytes(rule.state))
