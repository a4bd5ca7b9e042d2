"""What a round logs: its numbers, the names under which callbacks see them, and what must not outlast the round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor
from torchmetrics import Metric

from lightning_fedhaw.adapter.evaluation import same_value
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.report.history import find_history, is_of_a_client

MARKS = ("round_skipped", "server_steps_refused", "hyper_steps_refused")
"""Metrics that are logged in some rounds only, because it says something that they are there."""


class RoundLog:
    """The log of a run's rounds: what clients, rule and round report, as if ``training_step`` had logged it.

    Args:
        trainer: The trainer.

    Attributes:
        rule_metrics: Names of all metrics that the rule and the rounds have logged.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.rule_metrics: set[str] = set()
        self._logged_options: dict[str, dict[str, Any]] = {}

    def add(self, report: Report, results: _ResultCollection, in_progress_bar: Collection[str]) -> None:
        """Log what a round has reported, and add it to the history.

        Args:
            report: The report of the round.
            results: Lightning's record of what a training loop logs.
            in_progress_bar: Names of the rule's numbers that progress bars show.
        """
        module = self.trainer.lightning_module
        values = {name: _merged_value(logged, module) for name, logged in report.logged.items()}
        self._add_to_history(report, values)
        # A metric that is composed of others reads theirs, so none is reset before all have been read.
        for logged in report.logged.values():
            metric = _metric_behind(logged, module)
            if metric is not None:
                metric.reset()
        for name, logged in report.logged.items():
            options = {option: logged.options[option] for option in ("prog_bar", "logger", "on_step", "on_epoch")}
            self._log_value(results, name, values[name], options)
        forget_earlier_rounds(self.trainer, self.rule_metrics, report.metrics)
        self.rule_metrics |= report.metrics.keys()
        for name, value in report.metrics.items():
            options = {"on_step": True, "on_epoch": False, "prog_bar": name in in_progress_bar}
            self._log_value(results, name, value, options)

    def _add_to_history(self, report: Report, values: Mapping[str, float]) -> None:
        row = {name: float(as_logged(value)) for name, value in report.metrics.items()}
        for name, value in values.items():
            row.update(dict.fromkeys(names_for_callbacks(name, report.logged[name].options), float(as_logged(value))))
        find_history(callbacks_of(self.trainer)).add_round(report, row)

    def _log_value(self, results: _ResultCollection, name: str, value: float, options: dict[str, Any]) -> None:
        if self._logged_options.get(name) == options:
            # `log` would build and move Lightning's whole record again, which takes a third of a round of tiny clients.
            results.update_metrics(f"training_step.{name}", as_logged(value), batch_size=1)
            return
        self._logged_options[name] = options
        results.log(
            "training_step",
            name,
            as_logged(value),
            batch_size=1,
            # Every process has the same value: there is nothing to synchronize.
            sync_dist=True,
            sync_dist_fn=same_value,
            **options,
        )


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


def _merged_value(logged: Logged, module: pl.LightningModule) -> float:
    """Return the value of a logged name over all clients of a round.

    Args:
        logged: The merged record.
        module: The module, in which a record from another process names its metric.
    """
    metric = _metric_behind(logged, module)
    if metric is None:
        return logged.value
    return float(metric.compute())


def _metric_behind(logged: Logged, module: pl.LightningModule) -> Metric | None:
    """Return the metric that was logged under a name; None if a value was."""
    if isinstance(logged.metric, str):
        submodule = module.get_submodule(logged.metric)
        assert isinstance(submodule, Metric)
        return submodule
    return logged.metric
