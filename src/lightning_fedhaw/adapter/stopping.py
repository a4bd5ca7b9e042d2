"""Signals to a run on several processes: whichever process gets one, all of them answer it together.

Lightning's own handler communicates in the middle of anything, and hangs. Here a signal leaves a request
(:class:`~lightning_fedhaw.ranks.Requests`), which a thread passes on to the other processes, whatever they compute.
Each interrupts its own work between two batches, and all of them answer in the exchange that follows.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import _get_default_store
from torch.multiprocessing.spawn import ProcessExitedException

from lightning_fedhaw.ranks import REQUESTS, SIGTERM_EXIT_CODE, Ranks

GRACE_SECONDS = 20.0
"""Seconds after which a process ends itself that was asked to end and could not: it computes, or waits for another."""

_SECONDS_BETWEEN_LOOKS = 0.5

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class TogetherConnector(_SignalConnector):
    """Lightning's handlers of signals; with several processes they leave requests, which all processes answer."""

    def register_signal_handlers(self) -> None:
        """Begin to answer signals."""
        REQUESTS.clear()
        super().register_signal_handlers()

    def _sigterm_notifier_fn(self, signum: int, frame: Any) -> None:
        if self.trainer.world_size == 1:
            super()._sigterm_notifier_fn(signum, frame)
            return
        is_first = REQUESTS.end is None
        REQUESTS.ask_to_end("SIGTERM")
        launcher = self.trainer.strategy.launcher
        if is_first and launcher is not None:
            # Those that still begin do not look for requests yet.
            launcher.kill(signum)

    def _slurm_sigusr_handler_fn(self, signum: int, frame: Any) -> None:
        if self.trainer.world_size == 1:
            super()._slurm_sigusr_handler_fn(signum, frame)
        else:
            REQUESTS.checkpoint = True

    @property
    def requeue_signal(self) -> int | None:
        """The signal after which a Slurm job saves and is queued again; None outside of such a job."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return environment.requeue_signal
        return None

    def save_and_requeue(self) -> None:
        """Answer the request for a checkpoint, as Lightning's handler does. All processes call this together."""
        REQUESTS.answer_checkpoint()
        super()._slurm_sigusr_handler_fn(self.requeue_signal or signal.SIGUSR1, None)  # type: ignore[arg-type]


def answer_together(trainer: pl.Trainer) -> None:
    """Let all processes of a trainer answer signals together."""
    stock = trainer._signal_connector
    if type(stock) is _SignalConnector:
        connector = TogetherConnector(trainer)
        vars(connector).update(vars(stock))
        trainer._signal_connector = connector


def save_and_requeue(trainer: pl.Trainer) -> None:
    """Write the checkpoint that was asked for within a round, which has been undone."""
    connector = trainer._signal_connector
    assert isinstance(connector, TogetherConnector)
    connector.save_and_requeue()


# ---------------------------------------------------------------------- a process of a run


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """Let all processes of a run end together inside the context; nothing changes with one process."""
    if Ranks.of_group(trainer.strategy.root_device).size == 1:
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    watched = {int(signal.SIGTERM): "SIGTERM"}
    takes_interrupts = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if takes_interrupts:
        signal.signal(signal.SIGINT, _on_interrupt)
        watched[int(signal.SIGINT)] = "SIGINT"
    connector = trainer._signal_connector
    if isinstance(connector, TogetherConnector) and connector.requeue_signal is not None:
        watched[int(connector.requeue_signal)] = "checkpoint"
    watch = _Watch(watched, is_main)
    watch.start()
    try:
        yield
    except (SIGTERMException, KeyboardInterrupt) as error:
        connector.received_sigterm = isinstance(error, SIGTERMException)
        _leave_to_themselves(trainer)
        raise
    finally:
        watch.close()
        if takes_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    if REQUESTS.end is not None:
        # A second Ctrl+C is impatient.
        signal.default_int_handler(signum, frame)
    REQUESTS.ask_to_end("SIGINT")


def _leave_to_themselves(trainer: pl.Trainer) -> None:
    """Keep Lightning from killing this process, which may still save, because the others have ended before."""
    launcher = trainer.strategy.launcher
    if REQUESTS.is_ending and isinstance(launcher, _SubprocessScriptLauncher):
        _ENDING.extend(launcher.procs)
        # Its observer looks at this very list.
        launcher.procs.clear()


_ENDING: list[Any] = []
"""Processes that end by themselves. Python warns of the end of an object whose process runs."""


class _Watch(threading.Thread):
    """A thread that passes requests on: to the other processes, and from them.

    The main thread cannot: while it waits for another process, no signal handler runs.

    Args:
        watched: What signals ask for, by their numbers.
        is_main: Whether the main thread starts it. It alone may ask to be told of signals at once.
    """

    def __init__(self, watched: dict[int, str], is_main: bool) -> None:
        super().__init__(daemon=True, name="lightning_fedhaw-requests")
        self._watched = watched
        self._store = _get_default_store()
        self._key = f"lightning_fedhaw/requests/{_count_run()}"
        self._is_over = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._is_told = False
        if is_main:
            previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._is_told = previous == -1
            if not self._is_told:
                # Somebody else is told, such as an event loop.
                signal.set_wakeup_fd(previous)
        _WAKEUPS.is_ours = self._is_told

    def run(self) -> None:
        """Pass requests on until the run is over."""
        ends_at: float | None = None
        # What this thread has told the others, or was told.
        known: set[str] = set()
        while True:
            select.select([self._reader], [], [], _SECONDS_BETWEEN_LOOKS)
            if self._is_over:
                return
            self._read_signals()
            # The process that keeps the store may have gone; then the next communication says so.
            with suppress(RuntimeError):
                self._pass_on(known)
            if REQUESTS.end is not None and ends_at is None:
                ends_at = time.monotonic() + GRACE_SECONDS
            if ends_at is not None and REQUESTS.must_end and time.monotonic() > ends_at:
                _end_process()

    def _read_signals(self) -> None:
        try:
            numbers = os.read(self._reader, 64)
        except BlockingIOError:
            return
        for number in numbers:
            request = self._watched.get(number)
            if request == "checkpoint":
                REQUESTS.checkpoint = True
            elif request is not None:
                REQUESTS.ask_to_end(request)

    def _pass_on(self, known: set[str]) -> None:
        end_key = f"{self._key}/end"
        if end_key not in known:
            if REQUESTS.end is not None:
                self._store.set(end_key, REQUESTS.end)
                known.add(end_key)
            elif self._store.check([end_key]):
                REQUESTS.ask_to_end(self._store.get(end_key).decode())
                known.add(end_key)
        if "checkpoint" not in self._watched.values():
            return
        number = REQUESTS.num_checkpoints
        checkpoint_key = f"{self._key}/checkpoint {number}"
        if checkpoint_key in known:
            return
        if REQUESTS.checkpoint:
            self._store.set(checkpoint_key, "asked")
            known.add(checkpoint_key)
        elif self._store.check([checkpoint_key]) and number == REQUESTS.num_checkpoints:
            REQUESTS.checkpoint = True
            known.add(checkpoint_key)

    def close(self) -> None:
        """End the thread."""
        if self._is_told:
            signal.set_wakeup_fd(-1)
            _WAKEUPS.is_ours = False
        self._is_over = True
        os.write(self._writer, b"\0")
        self.join(timeout=5 * _SECONDS_BETWEEN_LOOKS)
        if not self.is_alive():
            os.close(self._reader)
            os.close(self._writer)


def _count_run() -> int:
    """Return the number of this run in this process, which is the same in all of them."""
    _WAKEUPS.runs += 1
    return _WAKEUPS.runs


class _Wakeups:
    """What this process has to do with signals.

    Attributes:
        runs: Runs on several processes so far.
        is_ours: Whether Python tells a watch of this module of signals.
    """

    runs = 0
    is_ours = False

    def forget(self) -> None:
        """In a process that was forked, for example a worker of a loader: its signals are not those of the run."""
        if self.is_ours:
            signal.set_wakeup_fd(-1)
            self.is_ours = False


_WAKEUPS = _Wakeups()
os.register_at_fork(after_in_child=_WAKEUPS.forget)


def _end_process() -> None:
    """End this process at once."""
    print(
        f"This process was asked to end ({REQUESTS.end}) and could not for {GRACE_SECONDS:g} seconds: it waits for"
        " another process, or is in a long step. It ends now; the checkpoints that were written are whole.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(SIGTERM_EXIT_CODE)


# ---------------------------------------------------------------------- the process that has started the others


class PassesSigtermOn:
    """A handler of SIGTERM for a process that only waits for those that it has started.

    Args:
        launcher: The launcher that starts them.
        previous: The handler before.
    """

    def __init__(self, launcher: _MultiProcessingLauncher, previous: Handler) -> None:
        self.launcher = launcher
        self.previous = previous
        self.was_called = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Ask the processes to end."""
        self.was_called = True
        started = multiprocessing.active_children()
        if self.launcher.procs:
            self.launcher.kill(signum)
        elif started:
            # In the middle of starting: what is still to be started ends with those that have.
            for process in started:
                process.terminate()
        else:
            raise SIGTERMException(SIGTERM_EXIT_CODE)


@contextmanager
def waiting_for_processes(launcher: _MultiProcessingLauncher) -> Iterator[None]:
    """Pass on signals to the processes that are started inside the context, and end as they end.

    Raises:
        SIGTERMException: If SIGTERM has ended them.
    """
    handler = PassesSigtermOn(launcher, signal.getsignal(signal.SIGTERM))
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except ProcessExitedException as error:
        if handler.was_called or error.exit_code == SIGTERM_EXIT_CODE:
            raise SIGTERMException(SIGTERM_EXIT_CODE) from error
        raise
    except KeyboardInterrupt:
        # Not SIGINT, which a terminal has sent to all of them: a second one would be impatient.
        launcher.kill(signal.SIGTERM)
        _wait_for(launcher)
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler.previous)


def _wait_for(launcher: _MultiProcessingLauncher) -> None:
    """Wait until the processes of a launcher have ended, and kill those that do not."""
    deadline = time.monotonic() + GRACE_SECONDS + 5.0
    for process in launcher.procs:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def handle_as_before() -> None:
    """In a process that was forked: undo what is meant for the process that waits."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, PassesSigtermOn):
        signal.signal(signal.SIGTERM, handler.previous)
