"""One run of a comparison, from its plan to its record."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.comparing.cells import Cell, merged_options
from lightning_fedhaw.comparing.plan import (
    ALONE,
    CALLBACKS,
    CENTRALIZED,
    FEDERATED,
    Plan,
    RunPlan,
    build_callbacks,
    build_cell,
    build_method,
    build_setting,
)
from lightning_fedhaw.data import FixedSequenceSampler, IIDPartitioner
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.report.history import LOG, RunHistory
from lightning_fedhaw.report.plot_command import best_metric
from lightning_fedhaw.trainer import FederatedTrainer
from lightning_fedhaw.vectors.client_vectors import ClientVectors

PlanKind = TypeVar("PlanKind", bound=Plan)

_SPLIT = ("alpha", "partitioner", "num_clients", "min_client_samples")


class Record(TypedDict):
    """What is kept of a finished run, as plain values.

    Attributes:
        run: What identifies it (:meth:`~lightning_fedhaw.comparing.plan.RunPlan.describe`).
        metric: The metric that is compared.
        curve: Its value after each round; a run that diverged keeps its last one.
        diverged: Whether no client returned a finite update any more.
        seconds: Wall time.
        server_seconds: Seconds of aggregation in a round; None for baselines and runs that diverged.
        bytes_down: Bytes that were sent to clients, likewise.
        bytes_up: Bytes that clients sent, likewise.
        state_bytes: Bytes of the rule's state at the end, likewise.
        log: The folder of the log, relative to that of the comparison.
    """

    run: dict[str, Any]
    metric: str
    curve: list[float]
    diverged: bool
    seconds: float
    server_seconds: float | None
    bytes_down: int | None
    bytes_up: int | None
    state_bytes: int | None
    log: str


def run(plan: RunPlan, output: Path) -> Record:
    """Carry out one run with one thread, without any effect on the process's random states.

    Args:
        plan: The run.
        output: The folder of the comparison, which receives the run's log.

    Raises:
        ValueError: If the metric was not logged.
    """
    return recorded(plan, output, _RUNNERS[plan.kind])


def recorded(plan: PlanKind, output: Path, train: Callable[[PlanKind, Path], Outcome]) -> Record:
    """Carry out a planned run of any kind, and return its record.

    Args:
        plan: The run.
        output: The folder of all results.
        train: Trains, with the folder of the run's log.

    Raises:
        ValueError: If the metric was not logged.
    """
    folder = output / "runs" / plan.folder / f"seed_{plan.seed}"
    # A run that was cut off has left a log, to which this one must not be appended.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with quiet(folder.with_suffix(".txt")), seeded(plan.seed), one_thread():
        outcome = train(plan, folder)
    metric = plan.metric or outcome.metric or best_metric(outcome.history.names)
    if metric not in outcome.history.names:
        raise ValueError(
            f"`metric` must be one that `{plan.describe()['cell']}` logs in its validation"
            f" ({', '.join(outcome.history.names) or 'none'}), got {metric!r}."
        )
    summary = outcome.summary
    server_seconds = None
    if summary:
        server_seconds = summary["seconds"]["aggregation"] / max(summary["rounds"], 1)
    return Record(
        run=plan.describe(),
        metric=metric,
        curve=filled(outcome.history.curve(metric), plan.rounds),
        diverged=outcome.diverged,
        seconds=time.perf_counter() - begin,
        server_seconds=server_seconds,
        bytes_down=summary.get("bytes_down"),
        bytes_up=summary.get("bytes_up"),
        state_bytes=outcome.state_bytes,
        log=folder.relative_to(output).as_posix(),
    )


def filled(curve: Sequence[float], rounds: int) -> list[float]:
    """Return one value for each round: where none was logged, the one before."""
    filled = []
    latest = nan
    for number in range(rounds):
        if number < len(curve) and not isnan(curve[number]):
            latest = curve[number]
        filled.append(latest)
    return filled


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        history: Its history.
        metric: The metric that its cell names.
        diverged: Whether it ended early.
        summary: The run summary; empty for baselines and runs that diverged.
        state_bytes: Bytes of the rule's state.
    """

    history: RunHistory
    metric: str | None
    diverged: bool = False
    summary: Mapping[str, Any] = field(default_factory=dict)
    state_bytes: int | None = None


def _run(plan: RunPlan, changes: Mapping[str, Any], callbacks: Sequence[Callback], logger: CSVLogger | bool) -> Outcome:
    """Train one federation.

    Args:
        plan: The run.
        changes: Options of the federation that replace those of the cell.
        callbacks: The rule, channels and objectives.
        logger: The trainer's logger.
    """
    cell = build_cell(plan.cell)
    history = RunHistory()
    module, data = _module_and_data(cell, plan)
    trainer = FederatedTrainer(
        rounds=plan.rounds,
        **merged_options(cell.options, changes),
        seed=plan.seed,
        client_eval=False,
        callbacks=[*callbacks, history],
        accelerator=plan.accelerator,
        devices=1,
        logger=logger,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rule = next(callback for callback in callbacks if isinstance(callback, AggregationRule))
    try:
        trainer.fit(module, datamodule=data)
    except FloatingPointError:
        # The end of a method that diverges is a result, which a comparison shows.
        return Outcome(history, cell.metric, diverged=True)
    return Outcome(history, cell.metric, summary=trainer.federation_summary, state_bytes=state_bytes(rule.state))


def _module_and_data(cell: Cell, plan: RunPlan) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Create data and module; the initial model depends on the seed alone, whatever the data drew."""
    values: dict[str, dict[str, object]] = {"model": {}, "data": {}}
    for name, value in plan.settings:
        group, dot, argument = name.partition(".")
        if dot:
            values[group][argument] = build_setting(name, value)
    data = cell.data(**values["data"])
    seed_randomness(plan.seed, torch.device("cpu"))
    return cell.model(**values["model"]), data


def _changes(plan: RunPlan) -> tuple[dict[str, Any], list[Callback]]:
    """Return the options of the federation among the settings of a run, and its channels and objectives."""
    options: dict[str, Any] = {}
    for name, value in plan.settings:
        if "." not in name:
            options[name] = build_setting(name, value)
    callbacks = build_callbacks(options)
    for name in CALLBACKS:
        options.pop(name, None)
    return options, callbacks


def _federated(plan: RunPlan, folder: Path) -> Outcome:
    options, callbacks = _changes(plan)
    return _run(plan, options, [*build_method(plan.method), *callbacks], logger_of(folder))


def _centralized(plan: RunPlan, folder: Path) -> Outcome:
    """Train on all data at once: one client has it, and keeps its optimizer. A round is its local epochs."""
    options, _ = _changes(plan)
    for name in _SPLIT:
        options.pop(name, None)
    changes = {**options, "partitioner": IIDPartitioner(), "num_clients": 1, "clients_per_round": None}
    changes |= {"min_client_samples": None, "optimizer_state": "kept"}
    outcome = _run(plan, changes, build_method(plan.method), logger_of(folder))
    return Outcome(outcome.history, outcome.metric, outcome.diverged)


def _alone(plan: RunPlan, folder: Path) -> Outcome:
    """Train each client alone, on the data and batches that it has in the federation; curves are means over clients."""
    options, _ = _changes(plan)
    histories: list[RunHistory] = []
    diverged = False
    num_clients = 1
    while len(histories) < num_clients:
        # A federation in which always the same client takes part trains that client's model.
        sampler = FixedSequenceSampler([[len(histories)]] * plan.rounds)
        changes = {**options, "sampler": sampler, "optimizer_state": "kept"}
        changes.pop("clients_per_round", None)
        seed_randomness(plan.seed, torch.device("cpu"))
        outcome = _run(plan, changes, build_method(plan.method), False)
        diverged = diverged or outcome.diverged
        num_clients = len(outcome.history.sizes)
        histories.append(outcome.history)
    mean = _mean_history(histories, plan.rounds)
    _write_log(mean, folder)
    return Outcome(mean, outcome.metric, diverged)


def _mean_history(histories: Sequence[RunHistory], rounds: int) -> RunHistory:
    """Return the mean of each metric over several runs."""
    mean = RunHistory()
    mean.metrics = [{} for _ in range(rounds)]
    for name in histories[0].names:
        curves = torch.tensor([filled(history.curve(name), rounds) for history in histories], dtype=torch.float64)
        for row, value in zip(mean.metrics, curves.mean(0).tolist(), strict=True):
            row[name] = value
    return mean


def _write_log(history: RunHistory, folder: Path) -> None:
    """Write metrics as a ``CSVLogger`` does."""
    folder.mkdir()
    with (folder / LOG).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *history.names, "step"])
        for number, row in enumerate(history.metrics):
            writer.writerow([number, *(row[name] for name in history.names), number])


def logger_of(folder: Path) -> CSVLogger:
    """Return a logger that writes into exactly this folder."""
    return CSVLogger(folder.parent, name="", version=folder.name)


_RUNNERS: dict[str, Callable[[RunPlan, Path], Outcome]] = {
    FEDERATED: _federated,
    CENTRALIZED: _centralized,
    ALONE: _alone,
}


def state_bytes(state: object) -> int:
    """Count the bytes of the tensors in a rule's state."""
    if isinstance(state, ClientVectors):
        return state.matrix.nbytes
    if isinstance(state, Mapping):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, Tensor):
        return state.nbytes
    return 0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed everything that a module or a data module may draw from, and restore it at the end."""
    variable = "PL_GLOBAL_SEED"
    earlier_value = os.environ.get(variable)
    # What a data module takes as its seed, as after Lightning's `seed_everything`.
    os.environ[variable] = str(seed)
    try:
        with isolated_randomness(torch.device("cpu")):
            seed_randomness(seed, torch.device("cpu"))
            yield
    finally:
        if earlier_value is None:
            del os.environ[variable]
        else:
            os.environ[variable] = earlier_value


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, so that the result does not depend on how many runs share the machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Write what is printed and warned of to a file, and turn off Lightning's advice."""
    with without_advice(), path.open("w", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("default")
        with redirect_stdout(file), redirect_stderr(file):
            yield


@contextmanager
def without_advice() -> Iterator[None]:
    """Turn off what Lightning logs for information."""
    levels = {}
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        levels[logger] = logger.level
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
