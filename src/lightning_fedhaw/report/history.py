"""What a run has been, round by round: kept while it trains, in its checkpoints and beside its log, and read again."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.observer import FederatedCallback
from lightning_fedhaw.rule import Rule

MOST_CLIENTS = 1000
LOG, CLIENT_TABLE, WEIGHT_TABLE = "metrics.csv", "per_client.csv", "weights.csv"
_LABEL = "label_"


class RunHistory(KeyedCallback, FederatedCallback):
    """Keeps what a run logged, for its run summary and its pictures.

    Every federation has one: where nobody gives it as a callback, it is added. It is part of the checkpoints, so a run
    that goes on has all of it.

    Attributes:
        metrics: One mapping a round, of everything callbacks can see at its end but the numbers of single clients.
        sizes: Training samples of each client.
        labels: ``[N, C]``, samples of each client in each class, where the data set shows its labels.
        class_names: The name of each class, where that is not its number.
        clients: Metrics of the final model on each client's own data, ``[N]`` each; empty before the end of ``fit``.
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
        self._weights: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a trainer that plays no federation."""
        if not any(isinstance(callback, Rule) for callback in trainer.callbacks):
            raise ValueError(
                "`RunHistory` keeps what a federation logs. Add a rule such as `FedHAWCallback()`, or remove it."
            )

    def on_federation_start(self, trainer: Any, pl_module: Any, federation: Federation) -> None:
        """Begin, or go on where the run stands."""
        rounds, data = trainer.global_step, federation.data
        if rounds == 0:
            self._clear()
        self.sizes = data.num_examples.tolist()
        histogram = data.class_histogram() if self._keeps_clients else None
        self.labels = None if histogram is None else histogram.counts
        self.class_names = None if histogram is None else histogram.names
        absent = torch.full((len(self.sizes),), torch.nan)
        self.metrics = [*self.metrics[:rounds], *({} for _ in range(rounds - len(self.metrics)))]
        self._weights = [*self._weights[:rounds], *(absent for _ in range(rounds - len(self._weights)))]

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        """Keep the round's weights."""
        if self._keeps_clients:
            row = torch.full((len(self.sizes),), torch.nan)
            row[list(report.weights)] = torch.tensor(list(report.weights.values()))
            self._weights.append(row)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the round's metrics, validation included."""
        metrics = trainer.callback_metrics.items()
        self.metrics.append({name: float(value) for name, value in metrics if "/client_" not in name})

    @property
    def _keeps_clients(self) -> bool:
        return len(self.sizes) <= MOST_CLIENTS

    def curve(self, name: str) -> list[float]:
        """A metric over rounds; NaN where it was not logged."""
        return [row.get(name, float("nan")) for row in self.metrics]

    @property
    def names(self) -> list[str]:
        """The metrics that were logged."""
        return sorted(set().union(*self.metrics))

    @property
    def weights(self) -> Tensor:
        """``[rounds, N]``: the aggregation weights; NaN where a client's update was not received.

        Empty with more than 1,000 clients.
        """
        return torch.stack(self._weights) if self._weights else torch.empty(0, len(self.sizes))

    def weight_changes(self) -> Tensor | None:
        """``[rounds, N]``: each weight by the client's share of the samples received that round, less one.

        NaN where a client's update was not received; None if every weight is that share, as in FedAvg, or none was
        kept.
        """
        weights = self.weights.double()
        sizes = torch.where(weights.isnan(), 0, torch.tensor(self.sizes, dtype=torch.float64))
        changes = weights * sizes.sum(1, keepdim=True) / sizes - 1
        seen = changes[~changes.isnan()]
        return changes if seen.numel() and seen.abs().max() > 1e-4 else None

    def client_table(self, *, labels: bool = False) -> tuple[list[str], list[list[float]]]:
        """One row per client: its number, its samples, its last weight, and its metrics.

        Args:
            labels: Whether samples in each class belong to it.

        Returns:
            The columns' names, and the rows.
        """
        columns: dict[str, Sequence[float]] = {"client": range(len(self.sizes)), "samples": self.sizes}
        if self._weights:
            received = ~self.weights.isnan()
            last = (received * torch.arange(1, len(received) + 1)[:, None]).argmax(0)
            columns["weight"] = self.weights.gather(0, last[None])[0].tolist()
        columns |= self.clients
        if labels and self.labels is not None:
            names = self.class_names or range(self.labels.shape[1])
            for name, counts in zip(names, self.labels.T.tolist(), strict=True):
                columns[f"{_LABEL}{name}"] = counts
        return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, for a checkpoint."""
        kept = {"metrics": list(self.metrics), "sizes": list(self.sizes), "clients": dict(self.clients)}
        if self.class_names is not None:
            kept["class_names"] = self.class_names
        return {**kept, "labels": self.labels, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.metrics, self.sizes = list(state_dict["metrics"]), list(state_dict["sizes"])
        self.clients, self.labels = dict(state_dict["clients"]), state_dict["labels"]
        self.class_names = state_dict.get("class_names")
        self._weights = list(state_dict["weights"])


def keep_history(trainer: Any) -> None:
    """Give a trainer a history, before the callbacks that write checkpoints, if it has none."""
    callbacks = trainer.callbacks
    if not any(isinstance(callback, RunHistory) for callback in callbacks):
        end = next((i for i, each in enumerate(callbacks) if isinstance(each, Checkpoint)), len(callbacks))
        callbacks.insert(end, RunHistory())


def history_of(trainer: Any) -> RunHistory:
    """A trainer's history."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, RunHistory))


def read_run(path: str | Path) -> RunHistory:
    """A run from what it left behind.

    Args:
        path: The folder of a ``CSVLogger``, or a checkpoint, or a folder around one of them. A checkpoint was written
            before the clients were measured, so their metrics are in the log only.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If it is not of a federation, or of several.
    """
    found = read_runs(path)
    if len(found) > 1:
        raise ValueError(f"{str(path)!r} holds {len(found)} runs; give the folder of one, or take `read_runs`.")
    return found[0]


def read_runs(path: str | Path) -> list[RunHistory]:
    """All runs at or below a path: every log, or, where there is none, the newest checkpoint of each folder.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there is no run, or something is not of a federation.
    """
    where = Path(path)
    if where.is_file():
        return [_from_log(where.parent) if where.name == LOG else _from_checkpoint(where)]
    if not where.is_dir():
        raise FileNotFoundError(f"A run is a folder with a `{LOG}`, or a checkpoint; there is no {str(path)!r}.")
    if logs := sorted(where.rglob(LOG)):
        return [_from_log(file.parent) for file in logs]
    newest = {file.parent: file for file in sorted(where.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)}
    if not newest:
        there = ", ".join(sorted(each.name for each in where.iterdir())[:8]) or "nothing at all"
        raise ValueError(
            f"{str(path)!r} has neither a `{LOG}` nor a checkpoint in it, but {there}. Log with a `CSVLogger`, or give"
            " the folder of the checkpoints."
        )
    return [_from_checkpoint(newest[folder]) for folder in sorted(newest)]


def _from_checkpoint(path: Path) -> RunHistory:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if is_zipfile(path) else None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values, and is not opened for safety. Give the folder"
            f" of the run's `{LOG}`."
        ) from error
    except (RuntimeError, ValueError, EOFError):  # an archive of something else, or with a spoilt byte
        checkpoint = None
    if checkpoint is None:
        raise ValueError(f"{str(path)!r} is no checkpoint. Give a `.ckpt` file, or the folder of the run's `{LOG}`.")
    states = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    if RunHistory.key not in states:
        raise ValueError(f"{str(path)!r} was not written by a federation: it holds no history.")
    history = RunHistory()
    history.load_state_dict(states[RunHistory.key])
    return history


def _from_log(folder: Path) -> RunHistory:
    try:
        history = _tables(folder)
    except (ValueError, LookupError, OverflowError) as error:
        raise ValueError(
            f"The tables in {str(folder)!r} are damaged ({type(error).__name__}: {error}). Give a checkpoint of the"
            f" run, or take away `{CLIENT_TABLE}` or `{WEIGHT_TABLE}` if it is one of them."
        ) from error
    if not history.metrics:
        raise ValueError(f"{str(folder / LOG)!r} holds no metrics: was the run cut off in its first round?")
    return history


def _tables(folder: Path) -> RunHistory:
    history = RunHistory()
    for row in _rows(folder / LOG):
        if row.get("step") is None or any(name.startswith("summary/") for name in row):
            continue
        round_idx = int(row.pop("step") or 0)
        history.metrics += [{} for _ in range(round_idx + 1 - len(history.metrics))]
        history.metrics[round_idx] |= {k: v for k, v in row.items() if "/client_" not in k and k != "epoch"}
    if table := list(_rows(folder / CLIENT_TABLE)):
        history.sizes = [int(row["samples"]) for row in table]
        counts = [[int(v) for name, v in row.items() if name.startswith(_LABEL)] for row in table]
        history.labels = torch.tensor(counts) if counts and counts[0] else None
        classes = tuple(name.removeprefix(_LABEL) for name in table[0] if name.startswith(_LABEL))
        if classes != tuple(map(str, range(len(classes)))):
            history.class_names = classes
        names = [n for n in table[0] if n not in ("client", "samples", "weight") and not n.startswith(_LABEL)]
        history.clients = {name: [row.get(name, torch.nan) for row in table] for name in names}
    if history.sizes:
        count = len(history.sizes)
        rows = ([row.get(f"client_{k}", torch.nan) for k in range(count)] for row in _rows(folder / WEIGHT_TABLE))
        history._weights = [torch.tensor(row) for row in rows]
    return history


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """The numbers of a CSV file, row by row; empty cells, words, and a last line that was cut off are left out."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        numbers = {}
        for name, cell in row.items():
            try:
                numbers[name] = float(cell)
            except (TypeError, ValueError):
                continue
        yield numbers
