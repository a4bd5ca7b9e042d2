"""Runs in forked processes: what is imported once serves all of them, and a process costs milliseconds."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Job = Callable[["Forked"], Any]

POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        value: What its job returned; ``None`` if it returned nothing.
        error: The error that ended the job, as a line of type and message; empty if there was none.
        code: The exit status; negative: the signal that killed it.
        timed_out: Whether it was killed because its time was over.
    """

    value: Any
    error: str
    code: int
    timed_out: bool


class Forked:
    """A job in a process of its own.

    Args:
        job: The job. It gets this object, and returns something that JSON can hold.
        folder: The folder that the process works in; it also gets the process's output (``log``) and its result.
        is_session: Whether the process begins a session, with which everything that it starts can be ended.
    """

    def __init__(self, job: Job, folder: Path, *, is_session: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.is_session = is_session
        self._result = folder / "result.json"
        self._result.unlink(missing_ok=True)
        self._events, self._teller = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(job)
        os.close(self._teller)

    def _run(self, job: Job) -> None:
        code = 1
        try:
            os.close(self._events)
            if self.is_session:
                os.setsid()
            else:
                os.setpgid(0, 0)
            log = (self.folder / "log").open("w", buffering=1)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = log
            sys.stderr = log
            os.chdir(self.folder)
            # A shell that starts the campaign in the background lets it ignore this signal, and so its children.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._write({"value": job(self)})
            code = 0
        except BaseException as error:  # the end of this process, whatever it was
            traceback.print_exc()
            self._write({"error": f"{type(error).__name__}: {error}"})
        finally:
            # Without the parent's handlers: it might be a test session, or a campaign with other processes.
            os._exit(code)

    def _write(self, result: dict[str, Any]) -> None:
        self._result.write_text(json.dumps(result))

    def tell(self) -> None:
        """In the process: wake up whoever listens."""
        os.write(self._teller, b".")

    def listen(self, seconds: float) -> bool:
        """Wait until the process tells something; return whether it did."""
        ready, _, _ = select.select([self._events], [], [], seconds)
        return bool(ready and os.read(self._events, 1))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it is still there."""
        if self.is_running:
            os.kill(self.pid, number)

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float) -> Ending:
        """Wait for the end of the process, and end it and what it started if that takes too long."""
        deadline = time.monotonic() + seconds
        while self.is_running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        timed_out = self.is_running
        if self.is_session:
            end_session(self.pid)
        if timed_out:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._events)
        result = json.loads(self._result.read_text() or "{}") if self._result.exists() else {}
        return Ending(result.get("value"), result.get("error", ""), os.waitstatus_to_exitcode(status), timed_out)


def end_session(session: int) -> None:
    """Kill what a process has left behind: all others of its session."""
    for pid in members_of(session):
        if pid != session:
            os.kill(pid, signal.SIGKILL)


def members_of(session: int) -> list[int]:
    """List the running processes of a session."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold anything: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(folder.name))
    return members
