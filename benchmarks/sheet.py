"""Collect results from separate processes, each with its own time limit, into Markdown tables.

Each process is a step. It reports one record at a time with :func:`tell`, so the results up to a timeout, a crash or a
broken GPU context are not lost. :func:`run` passes the records on and returns how the step ended.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
MARK = "sheet: "
"""Prefix of the lines with records. All other output of a step goes into a file next to its log."""
ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
"""The beginning of the last line of a traceback."""

Record = dict[str, Any]


class Deadline:
    """The time at which everything must have ended.

    Args:
        seconds: The time that is available.
        since: The start of this time, in seconds since 1970. Default: now. A start that the caller measured includes
            slow imports.
    """

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self.end = (time.time() if since is None else since) + seconds

    @property
    def left(self) -> float:
        return self.end - time.time()


def tell(record: Record) -> None:
    """Report a record from within a step."""
    sys.stdout.write(f"{MARK}{json.dumps(record)}\n")
    sys.stdout.flush()


def environment() -> dict[str, str]:
    """Return the environment of a step: it finds this folder's files and the package, and wandb stays offline."""
    paths = [str(HERE), str(HERE / "contenders"), str(SOURCE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
    }


def run(command: Iterable[str], limit: float, log: Path, take: Callable[[Record], None]) -> str:
    """Run a step until it ends or its time is over.

    Args:
        command: The command of the step.
        limit: Seconds after which the step and its children are killed.
        log: The file for its error output.
        take: Called with each record as soon as it is reported.

    Returns:
        The reason of a failure, or an empty string.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    is_late = threading.Event()
    with log.open("w") as errors, log.with_suffix(".out").open("w") as output:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
            start_new_session=True,
        )

        def kill() -> None:
            with suppress(ProcessLookupError):  # the process has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            is_late.set()
            kill()

        killer = threading.Timer(max(limit, 0.0), stop)
        killer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    take(json.loads(line[len(MARK) :]))
                else:
                    output.write(line)
            code = process.wait()
        except BaseException:
            kill()
            raise
        finally:
            killer.cancel()
            process.stdout.close()
    if is_late.is_set():
        return f"not finished after {limit:.0f} s"
    if code == 0:
        return ""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    if not lines:
        return f"ended with code {code} and said nothing"
    # A CUDA error has many lines, and only the first names it.
    errors = [line for line in lines if ERROR.match(line)]
    return shortened((errors or lines)[-1])


def shortened(text: str, length: int = 160) -> str:
    """Return the first line of a text, in a form that fits into a table cell."""
    lines = text.strip().splitlines() or [""]
    return lines[0].replace("|", "/")[:length]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def heading(machine: Record, device: str, is_quick: bool) -> str:
    """Return the machine, versions and date that the numbers belong to.

    Args:
        machine: The result of ``speed.machine``.
        device: The argument ``--device``.
        is_quick: Whether small sizes were used.
    """
    name = machine["processor"] if device == "cpu" else machine["gpu"] or "no GPU"
    text = (
        f"{name}; {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python"
        f" {machine['python']}, torch {machine['torch']}, Lightning {machine['lightning']}; device {device};"
        f" {time.strftime('%Y-%m-%d')}."
    )
    if is_quick:
        text += "\n\n**A run with small sizes. It only shows that the script works.**"
    return text


def write(text: str, name: str, folders: Iterable[Path]) -> None:
    """Write a file into every folder."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.rstrip("\n") + "\n")
