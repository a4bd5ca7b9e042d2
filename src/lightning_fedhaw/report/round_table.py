"""A table on the screen with one line a round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.observer import FederatedCallback
from lightning_fedhaw.report.history import is_of_a_client
from lightning_fedhaw.report.metric_names import names_of_results, written

_MOST_COLUMNS = 8
_NARROWEST = 7
_LINES_A_HEAD = 40
"""Lines after which the names of the columns are printed again."""

_MISSING = "-"


class RoundTable(argument_names.NamedArguments, FederatedCallback):
    """Prints one line a round: its number, the clients whose updates arrived, its seconds, and metrics.

    It takes the place of the default progress bar where the output is no terminal, such as a file or the log of a
    cluster. Next to a bar in a terminal, its lines come above the bar.

    Args:
        metrics: The names of the metrics. Default: up to eight, of those that the module logs and of the rule's main
            numbers. An accuracy between 0 and 1 is shown in percent.
        every_n_rounds: Rounds between two lines; the last round has a line in any case.

    Example:
        >>> from lightning_fedhaw import RoundTable
        >>> RoundTable(["val_acc"], every_n_rounds=10).every_n_rounds
        10
    """

    def __init__(self, metrics: Sequence[str] | None = None, every_n_rounds: int = 1) -> None:
        super().__init__()
        self.metrics: list[str] | None = None
        if metrics is not None:
            is_list = isinstance(metrics, (list, tuple)) and all(isinstance(name, str) for name in metrics)
            if not is_list:
                raise arguments.invalid("metrics", "a list of names, such as `['val_acc']`, or None", metrics)
            self.metrics = list(metrics)
        self.every_n_rounds = arguments.integer("every_n_rounds", every_n_rounds, minimum=1)
        self._rule_numbers: Sequence[str] = ()
        self._report: Report | None = None
        self._head: list[str] = []
        self._lines = 0
        self._begin = 0.0
        self._validated_in_round = False
        self._columns: list[str] = []
        # Names that rounds have reported so far. Callbacks go on seeing their last values in rounds without them.
        self._rule_metrics: set[str] = set()
        self._logged_names: set[str] = set()

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Begin a new table."""
        self._rule_numbers = federation.rule.prog_bar
        self._report = None
        self._head = []
        self._columns = []
        self._rule_metrics = set()
        self._logged_names = set()
        self._begin = time.monotonic()
        self._validated_in_round = False

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: Report) -> None:
        """Keep the report of the round until it has been validated."""
        self._report = report
        self._rule_metrics |= report.metrics.keys()
        self._logged_names |= report.logged.keys()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that the metrics of the validation are of this round."""
        self._validated_in_round = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line of the round."""
        report = self._report
        self._report = None
        if report is None:
            # The round was over before the run was resumed.
            return
        now = time.monotonic()
        seconds = now - self._begin
        self._begin = now
        rounds = trainer.max_epochs
        is_last = report.round + 1 == rounds
        if trainer.is_global_zero and (is_last or (report.round + 1) % self.every_n_rounds == 0):
            names = self._shown_names(trainer.callback_metrics, report, trainer.callbacks)  # type: ignore[attr-defined]
            cells = {"round": _round_in_words(report.round + 1, rounds)}
            cells["clients"] = f"{report.metrics['clients_received']:.0f}/{len(report.clients)}"
            cells["seconds"] = f"{seconds:.2f}"
            for name in names:
                cells[name] = self._cell(trainer.callback_metrics, report, name)
            self._print_row(cells, trainer.progress_bar_callback)
        self._validated_in_round = False

    def _print_row(self, cells: Mapping[str, str], bar: ProgressBar | None) -> None:
        """Print a line, and before it the names of the columns where they are new or far above."""
        if list(cells) != self._head or self._lines == _LINES_A_HEAD:
            # A metric that is not logged from the first round on is a new column.
            self._head = list(cells)
            self._lines = 0
            _print_line(self._head, self._head, bar)
        self._lines += 1
        _print_line(self._head, list(cells.values()), bar)

    def _shown_names(
        self, metrics: Mapping[str, Tensor], report: Report, callbacks: Sequence[pl.Callback]
    ) -> list[str]:
        if self.metrics is not None:
            return self.metrics
        names = list(self._columns)
        for name in names_of_results(metrics, self._rule_metrics, callbacks):
            # A round that is skipped reports none of the rule's numbers, whose earlier values callbacks still see.
            if name not in self._rule_numbers and not is_of_a_client(name):
                names.append(name)
        for name in self._rule_numbers:
            if name in metrics:
                names.append(name)
        # Those that were shown stay, so that the table keeps its form where a metric is not of every round.
        self._columns = list(dict.fromkeys(names))[:_MOST_COLUMNS]
        return self._columns

    def _cell(self, metrics: Mapping[str, Tensor], report: Report, name: str) -> str:
        """Write a metric of the round; a value that is left from an earlier round is none of it."""
        logged_name = name.removesuffix("_step").removesuffix("_epoch")
        is_of_round = self._validated_in_round
        if name in self._rule_metrics:
            is_of_round = name in report.metrics
        elif logged_name in self._logged_names:
            is_of_round = logged_name in report.logged
        if name not in metrics or not is_of_round:
            return _MISSING
        return written(name, float(metrics[name]))


def _round_in_words(number: int, rounds: int | None) -> str:
    """Return the number of a round, and of how many if the run has an end."""
    if rounds is None or rounds < 0:
        return str(number)
    return f"{number}/{rounds}"


def _print_line(head: Sequence[str], cells: Sequence[str], bar: ProgressBar | None) -> None:
    """Print cells in columns that are wide enough for their names, above the progress bar if there is one."""
    columns = []
    for name, cell in zip(head, cells, strict=True):
        columns.append(f"{cell:>{max(len(name), _NARROWEST)}}")
    line = "  ".join(columns)
    # A bar that is turned off prints nothing.
    if bar is not None and getattr(bar, "is_enabled", True):
        bar.print(line)
    else:
        # At once, so that a file shows how far a run is.
        print(line, flush=True)
