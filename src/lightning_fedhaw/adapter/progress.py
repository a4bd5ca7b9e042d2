"""Progress bars that count rounds: the same for both kinds of bar that Lightning has."""

from __future__ import annotations

import logging
import sys
import time
from abc import abstractmethod
from collections.abc import Collection
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.keys import check_has_rule
from lightning_fedhaw.report.round_table import RoundTable

_REFRESH_SECONDS = 0.2
_TITLE = "Rounds"

_MOST_REFRESHES = 10
"""Refreshes a second of a rich bar of which nothing says how many. Lightning's 100 would cost tiny clients time."""


class _CohortDescription:
    """Describes which clients of the round are training, not more often than a person can read."""

    def __init__(self) -> None:
        self._cohort_size = 0
        self._clients_trained = 0
        self._described_at = 0.0
        self._federation: Federation | None = None

    def begin(self, federation: Federation) -> None:
        """Take a federation, whose engine says how many clients train at once."""
        self._federation = federation

    def begin_round(self, cohort_size: int) -> str | None:
        """Return the description of the first clients of a cohort; None if it is too early for one."""
        self._cohort_size = cohort_size
        self._clients_trained = 0
        return self._description()

    def count_client(self) -> str | None:
        """Count a client, and return the description of the next ones, if there are and it is time."""
        self._clients_trained += 1
        # Clients that train at once end together: the next ones begin after the last of them.
        if self._clients_trained < self._cohort_size and self._clients_trained % self._clients_at_once == 0:
            return self._description()
        return None

    @property
    def _clients_at_once(self) -> int:
        # Asked again every time: the engine is chosen after `on_federation_start`, and where memory runs out in the
        # middle of a round it trains fewer clients at once from there on.
        assert self._federation is not None
        return self._federation.engine.clients_at_once

    def _description(self) -> str | None:
        now = time.monotonic()
        if now - self._described_at <= _REFRESH_SECONDS:
            return None
        self._described_at = now
        first = self._clients_trained + 1
        last = min(self._clients_trained + self._clients_at_once, self._cohort_size)
        clients = f"client {first}"
        if last != first:
            clients = f"clients {first}-{last} at once"
        return f"{_TITLE} ({clients} of {self._cohort_size})"


class _CohortBar(ProgressBar):
    """What bars of both kinds share: they describe which clients of the round are training."""

    _description: _CohortDescription

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Store the federation, whose engine says how many clients train at once."""
        self._description.begin(federation)

    def on_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, round_idx: int, clients: list[int]
    ) -> None:
        """Describe the first clients of a cohort."""
        if self.is_enabled:  # type: ignore[attr-defined]  # both kinds of bar have it, their base has not
            self._describe(self._description.begin_round(len(clients)))

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: ClientUpdate) -> None:
        """Count a client, and describe the next ones."""
        if self.is_enabled:  # type: ignore[attr-defined]  # both kinds of bar have it, their base has not
            self._describe(self._description.count_client())

    @abstractmethod
    def _describe(self, text: str | None) -> None:
        """Show a description; None leaves the one that is shown."""


class _PrintedLines:
    """A stream that clears the line of a bar before each line that is printed.

    Args:
        stream: The stream of the process, to which the bar itself writes.
        bar: The bar.
    """

    def __init__(self, stream: TextIO, bar: Tqdm) -> None:
        # `tqdm.write`, which `self.print` of a module calls, looks for the stream of the bar under this name.
        self._wrapped = stream
        self._bar = bar
        self._begins_line = True

    def __getattr__(self, name: str) -> Any:
        """Return everything else as the stream has it."""
        return getattr(self._wrapped, name)

    def write(self, text: str) -> int:
        """Write a text, above the bar if a line begins with it."""
        if self._begins_line:
            self._bar.clear()
        self._begins_line = text.endswith("\n")
        return self._wrapped.write(text)


class _ClearedLine(logging.Filter):
    """Clears the line of a bar before what others write, which would otherwise begin in the middle of it.

    These are prints, warnings, which Python prints to the present ``sys.stderr``, and messages of Lightning's log,
    which holds the stream of before. The bar appears again below the message with its next update.

    Args:
        bar: The bar, in a terminal.
    """

    def __init__(self, bar: Tqdm) -> None:
        super().__init__()
        self._bar = bar
        self._handlers = list(logging.getLogger("lightning.pytorch").handlers)
        for handler in self._handlers:
            handler.addFilter(self)
        self._streams: dict[str, _PrintedLines] = {}
        for name in ("stdout", "stderr"):
            self._streams[name] = _PrintedLines(getattr(sys, name), bar)
            setattr(sys, name, self._streams[name])

    def filter(self, record: logging.LogRecord) -> bool:
        """Clear the line, and let the record pass."""
        self._bar.clear()
        return True

    def end(self) -> None:
        """Leave messages alone again."""
        for handler in self._handlers:
            handler.removeFilter(self)
        for name, stream in self._streams.items():
            # What somebody else has put there in the meantime stays.
            if getattr(sys, name) is stream:
                setattr(sys, name, stream._wrapped)


class RoundProgressBar(argument_names.NamedArguments, _CohortBar, TQDMProgressBar):
    """One bar over all rounds of a fit, with the clients that are training in its description.

    Args:
        refresh_rate: Rounds between two updates; 0 turns the bar off.
        process_position: Lines to move the bar down.
        leave: Has no effect: the one bar always stays.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        arguments.flag("leave", leave)
        super().__init__(
            refresh_rate=arguments.integer("refresh_rate", refresh_rate, minimum=0),
            process_position=arguments.integer("process_position", process_position, minimum=0),
            leave=False,
        )
        self._description = _CohortDescription()
        self._cleared_line: _ClearedLine | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that runs no rounds."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_has_rule(type(self).__name__, callbacks_of(trainer))

    def init_train_tqdm(self) -> Tqdm:
        """Create the bar over rounds."""
        bar = super().init_train_tqdm()
        bar.unit = "round"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """Create no second bar while rounds are counted: it would flicker."""
        if self.trainer.state.fn == "fit":
            return Tqdm(disable=True)
        return super().init_validation_tqdm()

    def on_train_start(self, *_: Any) -> None:
        """Wait: what is said before the first round comes above the bar."""
        self.train_progress_bar = Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Open the bar before the first round, at the rounds that are over, which are not 0 in a resumed run."""
        if not self.train_progress_bar.disable or self.is_disabled:
            return
        self.train_progress_bar = self.init_train_tqdm()
        bar = self.train_progress_bar
        bar.total = None
        rounds = trainer.max_epochs
        if rounds is not None and rounds > 0:
            bar.total = rounds
        bar.initial = trainer.global_step
        bar.n = trainer.global_step
        bar.set_description(_TITLE)
        if sys.stdout.isatty():
            self._cleared_line = _ClearedLine(bar)

    def _describe(self, text: str | None) -> None:
        if text is not None:
            self.train_progress_bar.set_description(text)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a round and show its metrics."""
        bar = self.train_progress_bar
        rounds = trainer.global_step
        if bar.disable:
            return
        if rounds % self.refresh_rate == 0 or rounds == bar.total:
            bar.n = rounds
            bar.set_description(_TITLE, refresh=False)
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_end(self, *_: Any) -> None:
        """Close the bar, before the run summary is printed."""
        super().on_train_end()
        self._leave_messages_alone()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar of a run that has failed too, so that the error begins on a line of its own."""
        if self._cleared_line is not None:
            self.train_progress_bar.close()
        self._leave_messages_alone()

    def _leave_messages_alone(self) -> None:
        if self._cleared_line is not None:
            self._cleared_line.end()
        self._cleared_line = None


class RichRoundProgressBar(_CohortBar, RichProgressBar):
    """Lightning's bar by ``rich``, over all rounds of a fit. It replaces a ``RichProgressBar`` and has its settings.

    Args:
        bar: The bar that it replaces.
    """

    def __init__(self, bar: RichProgressBar) -> None:
        refresh_rate = bar.refresh_rate
        if refresh_rate == RichProgressBar().refresh_rate:
            refresh_rate = min(refresh_rate, _MOST_REFRESHES)
        super().__init__(
            refresh_rate=refresh_rate,  # type: ignore[arg-type]  # a number of any kind, that an older version declares whole
            leave=False,
            theme=bar.theme,
            console_kwargs=bar._console_kwargs,
        )
        self._description = _CohortDescription()
        self._log_streams: dict[logging.StreamHandler[TextIO], TextIO] = {}

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar of the sanity check: what is said before the first round comes above the next one."""
        super().on_sanity_check_end(trainer, pl_module)
        self._stop_progress()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first round."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar before the first round, at the rounds that are over, which are not 0 in a resumed run."""
        is_open = self.progress is not None and not self._progress_stopped
        if self.is_disabled or is_open:
            return
        self._init_progress(trainer)
        self._redirect_log()
        assert self.progress is not None
        rounds: int | float = float("inf")
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            rounds = trainer.max_epochs
        self.train_progress_bar_id = self._add_task(rounds, _TITLE)
        self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)

    def _redirect_log(self) -> None:
        """Let Lightning's log come above the bar.

        While it is open, ``rich`` takes what is written to ``sys.stderr``, and the log holds the stream of before.
        """
        for handler in logging.getLogger("lightning.pytorch").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                stream: TextIO = handler.stream  # type: ignore[assignment]  # compared with the stream, which is there
                self._log_streams[handler] = stream
                handler.setStream(sys.stderr)

    def _stop_progress(self) -> None:
        super()._stop_progress()
        for handler, stream in self._log_streams.items():
            handler.setStream(stream)
        self._log_streams = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a bar, except while rounds are counted."""
        if trainer.state.fn != "fit":
            super().on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Open no second bar while rounds are counted."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def _describe(self, text: str | None) -> None:
        if text is not None and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=text)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a round and show its metrics."""
        self._describe(_TITLE)
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar, before the run summary is printed below it."""
        self.refresh(hard=True)
        self._stop_progress()


_STOCK_BARS = (TQDMProgressBar, RichProgressBar)


def is_shown_live() -> bool:
    """Return whether the output shows a bar that moves: a terminal, or a notebook."""
    if sys.stdout.isatty():
        return True
    # A package that only starts notebooks imports the kernel, too, but has no shell with one.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def replace_default_bar(trainer: pl.Trainer, user_callbacks: Collection[object] = ()) -> None:
    """Replace a stock progress bar by one that counts rounds, or by a table; customized classes are left alone.

    Where the output is no terminal, the trainer's default bar becomes a :class:`~lightning_fedhaw.RoundTable`.

    Args:
        trainer: The trainer.
        user_callbacks: The callbacks that the user gave to the trainer, as far as they are known. A stock trainer does
            not tell them from its own; there, a bar with other settings than the default's is the user's.
    """
    callbacks = callbacks_of(trainer)
    has_table = any(isinstance(callback, RoundTable) for callback in callbacks)
    for index, callback in enumerate(callbacks):
        # Subclasses are of the user, and do what they do.
        if not isinstance(callback, (TQDMProgressBar, RichProgressBar)) or type(callback) not in _STOCK_BARS:
            continue
        is_users = any(callback is other for other in user_callbacks) or _is_customized(callback)
        if not is_users and not is_shown_live() and not callback.is_disabled:
            callbacks[index : index + 1] = [] if has_table else [RoundTable()]
        else:
            callbacks[index] = _over_rounds(callback, trainer)
        return


def _is_customized(bar: TQDMProgressBar | RichProgressBar) -> bool:
    """Return whether a bar has other settings than a default one, so that a user must have given it."""
    if isinstance(bar, RichProgressBar):
        default = RichProgressBar()
        return (
            bar.refresh_rate != default.refresh_rate
            or bar.theme != default.theme
            or bar._leave != default._leave
            or bool(bar._console_kwargs)
        )
    return bar.refresh_rate != TQDMProgressBar().refresh_rate or bar.process_position != 0 or bar._leave


def _over_rounds(callback: TQDMProgressBar | RichProgressBar, trainer: pl.Trainer) -> ProgressBar:
    """Return the bar over rounds of the same kind as a stock bar, with its settings."""
    bar: ProgressBar
    if isinstance(callback, RichProgressBar):
        bar = RichRoundProgressBar(callback)
    else:
        bar = RoundProgressBar(refresh_rate=callback.refresh_rate, process_position=callback.process_position)
    # Lightning sets it in `setup`, which a bar that replaces another one may have missed.
    bar._trainer = trainer
    if callback.is_disabled:
        bar.disable()
    return bar
