"""The history of a run, round by round: collected while it trains, saved in checkpoints and logs, and read again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_fedhaw.federation.client_statistics import MOST_CLIENTS, OF_CLIENTS
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.files import load_checked
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.observer import FederatedCallback

MOST_ROUNDS = 1_000_000
"""A round number from which a log is taken for damaged: one spoilt number would fill the memory with empty rounds."""

LOG = "metrics.csv"
CLIENT_TABLE = "per_client.csv"
WEIGHT_TABLE = "weights.csv"
_LABEL = "label_"

# Weights are stored in float32: a smaller relative change is rounding, and not learned.
_SMALLEST_CHANGE = 1e-4


def is_of_a_client(name: str) -> bool:
    """Return whether a metric is of a single client, such as its weight in a round."""
    return "/client_" in name


def _of_all_clients(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return metrics as numbers, without those of single clients."""
    numbers = {}
    for name, value in metrics.items():
        if not is_of_a_client(name):
            numbers[name] = float(value)
    return numbers


def first_rounds(tables: Mapping[str, Mapping[int, Tensor]], rounds: int) -> dict[str, dict[int, Tensor]]:
    """Return the tables of the first rounds; a name without any is left out."""
    kept: dict[str, dict[int, Tensor]] = {}
    for name, by_round in tables.items():
        for round_idx, table in by_round.items():
            if round_idx < rounds:
                kept.setdefault(name, {})[round_idx] = table
    return kept


class RunHistory(KeyedCallback, FederatedCallback):
    """Collects what a run logs, for its run summary and its pictures.

    Every federation has one: a trainer without it gets one added. It is part of the checkpoints, so a resumed run has
    the history of all its rounds.

    Attributes:
        metrics: One mapping a round, of everything callbacks can see at its end but the numbers of single clients.
        sizes: Training samples of each client.
        labels: ``[N, C]``, samples of each client in each class, where the data set shows its labels.
        class_names: The name of each class, where that is not its number.
        clients: Metrics of the final model on each client's own data, ``[N]`` each; empty before the end of ``fit``.
        tables: What observers and the evaluation of the clients keep of rounds: by name, and by the number of the
            round. Checkpoints hold them, logs do not.
    """

    key = "History"

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.sizes: list[int] = []
        self.labels: Tensor | None = None
        self.class_names: tuple[str, ...] | None = None
        self.clients: dict[str, list[float]] = {}
        self.tables: dict[str, dict[int, Tensor]] = {}
        self._weights: list[Tensor] = []
        # All names that rounds have logged. Lightning shows the last value of each until there is a new one, which
        # looks like one of the present round.
        self._logged_by_rounds: set[str] = set()

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Begin an empty history, or cut or fill the present one to the rounds that are over."""
        rounds = trainer.global_step
        if rounds == 0:
            self._clear()
        self.sizes = federation.data.num_examples.tolist()
        self.labels = None
        self.class_names = None
        histogram = federation.data.class_histogram() if self._collects_clients else None
        if histogram is not None:
            self.labels = histogram.counts
            self.class_names = histogram.names
        # A checkpoint may be older than the history in memory, or have been written without one.
        self._cut_or_fill(rounds)

    def admit(self, num_examples: int) -> None:
        """Make room for a client that joins a run, with so many training examples."""
        self.sizes = [*self.sizes, num_examples]
        column = self._no_weights()[-1:]
        self._weights = [torch.cat([row, column]) for row in self._weights]

    def _cut_or_fill(self, rounds: int) -> None:
        """Have one row for each of some rounds."""
        self.metrics = self.metrics[:rounds]
        self._weights = self._weights[:rounds]
        self.tables = first_rounds(self.tables, rounds)
        while len(self.metrics) < rounds:
            self.metrics.append({})
        if self._collects_clients:
            while len(self._weights) < rounds:
                self._weights.append(self._no_weights())

    def latest(self) -> dict[str, float]:
        """Return the latest value of every name."""
        values: dict[str, float] = {}
        for row in self.metrics:
            values.update(row)
        return values

    def add_round(self, report: Report, logged: Mapping[str, float]) -> None:
        """Begin the row of a round that is over and counted, so that nothing of it can be undone any more.

        Args:
            report: The round's report.
            logged: What it logged, under the names in ``trainer.callback_metrics``.
        """
        self._cut_or_fill(report.round)
        self.metrics.append(_of_all_clients(logged))
        self._logged_by_rounds.update(logged)
        for name, table in report.tables.items():
            self.tables.setdefault(name, {})[report.round] = table
        if self._collects_clients:
            weights = self._no_weights()
            weights[list(report.weights)] = torch.tensor(list(report.weights.values()))
            self._weights.append(weights)

    def add_validation(self, shown: Mapping[str, Tensor]) -> None:
        """Add the validation to the round's row, before any callback can write a checkpoint or fail.

        Args:
            shown: Everything that callbacks can see after the validation.
        """
        if not self.metrics:
            return
        # The row has precedence: Lightning still shows the previous round's mean of what is logged for an epoch.
        self.metrics[-1] = {**self._of_this_round(shown), **self.metrics[-1]}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the round's row by everything that callbacks can see at the end of the epoch."""
        if self.metrics:
            self.metrics[-1].update(self._of_this_round(trainer.callback_metrics))

    def _of_this_round(self, shown: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what callbacks can see, without the values that only earlier rounds have logged."""
        row = _of_all_clients(shown)
        for name in self._logged_by_rounds - self.metrics[-1].keys():
            row.pop(name, None)
        return row

    @property
    def _collects_clients(self) -> bool:
        return len(self.sizes) <= MOST_CLIENTS

    def _no_weights(self) -> Tensor:
        """Return the weights ``[N]`` of a round in which no update was received."""
        return torch.full((len(self.sizes),), nan)

    def curve(self, name: str) -> list[float]:
        """Return a metric over rounds; NaN where it was not logged."""
        return [row.get(name, nan) for row in self.metrics]

    def client_curves(self, metric: str) -> Tensor:
        """Return a metric of each client over rounds, as ``client_eval_every_n_rounds`` measured it.

        Args:
            metric: The metric, as ``validation_step`` logs it.

        Returns:
            ``[rounds, N]``, NaN in rounds without the measurement and for clients where it is undefined. Of no clients
            if nothing is kept: without the argument, with more than 1,000 clients, and of a run that is read from a
            log.
        """
        tables = self.tables.get(f"{metric}{OF_CLIENTS}", {})
        curves = torch.full((len(self.metrics), len(self.sizes) if tables else 0), nan)
        for round_idx, values in tables.items():
            curves[round_idx] = values
        return curves

    @property
    def names(self) -> list[str]:
        """The metrics that were logged."""
        return sorted(set().union(*self.metrics))

    @property
    def weights(self) -> Tensor:
        """``[rounds, N]``: the aggregation weights; NaN where a client's update was not received.

        Empty with more than 1,000 clients.
        """
        if not self._weights:
            return torch.empty(0, len(self.sizes))
        return torch.stack(self._weights)

    def weight_changes(self) -> Tensor | None:
        """Compute each weight divided by the client's share of the samples received that round, minus one.

        Returns:
            ``[rounds, N]``, NaN where a client's update was not received; None if every weight is that share, as in
            FedAvg, or no weights were collected.
        """
        # In float64, so that the division adds no rounding to the float32 weights.
        weights = self.weights.double()
        sizes = torch.where(weights.isnan(), 0, torch.tensor(self.sizes, dtype=torch.float64))
        changes = weights * sizes.sum(1, keepdim=True) / sizes - 1
        received = changes[~changes.isnan()]
        if received.numel() == 0 or received.abs().max() <= _SMALLEST_CHANGE:
            return None
        return changes

    def client_table(self, *, labels: bool = False) -> tuple[list[str], list[list[float]]]:
        """Return one row per client: its number, its samples, its last weight, and its metrics.

        Args:
            labels: Whether the samples in each class are among the columns.

        Returns:
            The columns' names, and the rows.
        """
        columns: dict[str, Sequence[float]] = {"client": range(len(self.sizes)), "samples": self.sizes}
        if self._weights:
            columns["weight"] = self._last_weights().tolist()
        columns |= self.clients
        if labels and self.labels is not None:
            names = self.class_names or range(self.labels.shape[1])
            for name, counts in zip(names, self.labels.T.tolist(), strict=True):
                columns[f"{_LABEL}{name}"] = counts
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        return list(columns), rows

    def _last_weights(self) -> Tensor:
        """Return each client's weight ``[N]`` in the last round that received its update; NaN if there is none."""
        weights = self.weights
        numbers = torch.arange(1, len(weights) + 1)[:, None]
        # Rounds without the client's update count 0, so the largest number is that of the last round with it.
        rounds = (~weights.isnan() * numbers).argmax(0)
        return weights.gather(0, rounds[None])[0]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values, for a checkpoint."""
        state = {
            # Copies, because the last row is completed later.
            "metrics": [dict(row) for row in self.metrics],
            "sizes": list(self.sizes),
            "clients": dict(self.clients),
            "labels": self.labels,
            "weights": self.weights,
        }
        if self._logged_by_rounds:
            state["logged_by_rounds"] = sorted(self._logged_by_rounds)
        if self.class_names is not None:
            state["class_names"] = self.class_names
        if self.tables:
            state["tables"] = {name: dict(tables) for name, tables in self.tables.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.metrics = list(state_dict["metrics"])
        self.sizes = list(state_dict["sizes"])
        self.clients = dict(state_dict["clients"])
        self.labels = state_dict["labels"]
        self.class_names = state_dict.get("class_names")
        self._logged_by_rounds = set(state_dict.get("logged_by_rounds", ()))
        self.tables = {name: dict(tables) for name, tables in state_dict.get("tables", {}).items()}
        self._weights = list(state_dict["weights"])


def add_history(callbacks: list[pl.Callback]) -> None:
    """Add a history to a trainer's callbacks, if there is none.

    Args:
        callbacks: The trainer's own list; changed in place.
    """
    if any(isinstance(callback, RunHistory) for callback in callbacks):
        return
    # Before the callbacks that write checkpoints, so that a round's metrics are in the checkpoint after it.
    position = len(callbacks)
    for index, callback in enumerate(callbacks):
        if isinstance(callback, Checkpoint):
            position = index
            break
    callbacks.insert(position, RunHistory())


def find_history(callbacks: Iterable[pl.Callback]) -> RunHistory:
    """Return the history among a trainer's callbacks; every federation has one."""
    return next(callback for callback in callbacks if isinstance(callback, RunHistory))


def read_run(path: str | Path) -> RunHistory:
    """Read a run from its log or a checkpoint.

    Args:
        path: The folder of a ``CSVLogger``, or a checkpoint, or a folder around one of them. A checkpoint is written
            before the clients are evaluated, so their metrics are in the log only.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If it is not of a federation, or of several.
    """
    runs = read_runs(path)
    if len(runs) > 1:
        raise ValueError(f"{str(path)!r} holds {len(runs)} runs; give the folder of one, or take `read_runs`.")
    return runs[0]


def read_runs(path: str | Path) -> list[RunHistory]:
    """Read all runs at or below a path: every log, or, where there is none, the newest checkpoint of each folder.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there is no run, or something is not of a federation.
    """
    root = Path(path)
    if root.is_file():
        if root.name == LOG:
            return [_from_log(root.parent)]
        return [_from_checkpoint(root)]
    if not root.is_dir():
        raise FileNotFoundError(f"A run is a folder with a `{LOG}`, or a checkpoint; there is no {str(path)!r}.")
    logs = sorted(root.rglob(LOG))
    if logs:
        return [_from_log(log.parent) for log in logs]
    checkpoints = _newest_checkpoints(root)
    if not checkpoints:
        contents = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing at all"
        raise ValueError(
            f"{str(path)!r} has neither a `{LOG}` nor a checkpoint in it, but {contents}. Log with a `CSVLogger`, or"
            " give the folder of the checkpoints."
        )
    return [_from_checkpoint(checkpoint) for checkpoint in checkpoints]


def _newest_checkpoints(root: Path) -> list[Path]:
    """Return the newest checkpoint of each folder below a folder, sorted by folder."""
    newest: dict[Path, Path] = {}
    for checkpoint in sorted(root.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime):
        newest[checkpoint.parent] = checkpoint
    return [newest[folder] for folder in sorted(newest)]


def _from_checkpoint(path: Path) -> RunHistory:
    checkpoint = _load_checkpoint(path)
    states = {}
    if isinstance(checkpoint, Mapping):
        states = checkpoint.get("callbacks", {})
    if RunHistory.key not in states:
        raise ValueError(f"{str(path)!r} was not written by a federation: it holds no history.")
    history = RunHistory()
    history.load_state_dict(states[RunHistory.key])
    return history


def _load_checkpoint(path: Path) -> object:
    """Load the content of a checkpoint.

    Raises:
        ValueError: If the file is none, is damaged, or could run code when it is loaded.
    """
    try:
        with path.open("rb") as file:
            content = load_checked(file, str(path))
    except ValueError as error:
        raise ValueError(f"{error} Give another `.ckpt` file, or the folder of the run's `{LOG}`.") from error
    return content


def _from_log(folder: Path) -> RunHistory:
    try:
        history = _read_tables(folder)
    except (ValueError, LookupError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"The tables in {str(folder)!r} are damaged ({type(error).__name__}: {error}). Give a checkpoint of the"
            f" run, or remove `{CLIENT_TABLE}` or `{WEIGHT_TABLE}` if it is one of them."
        ) from error
    if not history.metrics:
        raise ValueError(f"{str(folder / LOG)!r} holds no metrics: was the run cut off in its first round?")
    return history


def _read_tables(folder: Path) -> RunHistory:
    history = RunHistory()
    history.metrics = _read_metrics(folder / LOG)
    clients = list(_read_numbers(folder / CLIENT_TABLE))
    if clients:
        history.sizes = [int(row["samples"]) for row in clients]
        history.labels = _label_counts(clients)
        history.class_names = _class_names(clients)
        for name in clients[0]:
            if name not in ("client", "samples", "weight") and not name.startswith(_LABEL):
                history.clients[name] = [row.get(name, nan) for row in clients]
        for row in _read_numbers(folder / WEIGHT_TABLE):
            weights = [row.get(f"client_{client}", nan) for client in range(len(clients))]
            history._weights.append(torch.tensor(weights))
    return history


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the metrics of each round, which a ``CSVLogger`` may write in several rows."""
    metrics: list[dict[str, float]] = []
    for row in _read_numbers(path):
        is_of_summary = any(name.startswith("summary/") for name in row)
        if "step" not in row or is_of_summary:
            continue
        round_idx = int(row.pop("step"))
        if not 0 <= round_idx < MOST_ROUNDS:
            raise ValueError(f"`{LOG}` has a round number {round_idx}")
        while len(metrics) <= round_idx:
            metrics.append({})
        for name, value in row.items():
            if name != "epoch" and "/client_" not in name:
                metrics[round_idx][name] = value
    return metrics


def _label_counts(clients: Sequence[Mapping[str, float]]) -> Tensor | None:
    """Return the samples ``[N, C]`` of each client in each class; None if the table of the clients has no labels."""
    counts = []
    for row in clients:
        counts_of_client = []
        for name, value in row.items():
            if name.startswith(_LABEL):
                counts_of_client.append(int(value))
        counts.append(counts_of_client)
    if not counts[0]:
        return None
    return torch.tensor(counts)


def _class_names(clients: Sequence[Mapping[str, float]]) -> tuple[str, ...] | None:
    """Return the names of the classes in the table of the clients; None where they are numbered."""
    names = []
    for column in clients[0]:
        if column.startswith(_LABEL):
            names.append(column.removeprefix(_LABEL))
    if names == list(map(str, range(len(names)))):
        return None
    return tuple(names)


def _read_numbers(path: Path) -> Iterator[dict[str, float]]:
    """Read the numbers of a CSV file, row by row; empty cells, words, and a last line that was cut off are left out."""
    text = ""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    complete_lines = text[: text.rfind("\n") + 1]
    for row in csv.DictReader(io.StringIO(complete_lines)):
        numbers = {}
        for name, cell in row.items():
            try:
                numbers[name] = float(cell)
            except (TypeError, ValueError):
                continue
        yield numbers
