"""A sheet of results, filled step by step: each step is a process of its own with a time limit of its own.

A step reports by :func:`tell`, one record at a time, so that what it found before it was stopped, crashed or broke the
GPU's context is kept. :func:`run` hands the records on, and says how the step ended.
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
"""What the lines of records begin with; whatever else a step prints goes into a file beside its log."""
ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
"""How the last line of a traceback begins."""

Record = dict[str, Any]


class Deadline:
    """When everything has to be over.

    Args:
        seconds: How long it may take.
        since: When that begins, in seconds since 1970; now by default. A caller's clock counts a slow import, too.
    """

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self.end = (time.time() if since is None else since) + seconds

    @property
    def left(self) -> float:
        return self.end - time.time()


def tell(record: Record) -> None:
    """Report from within a step."""
    sys.stdout.write(f"{MARK}{json.dumps(record)}\n")
    sys.stdout.flush()


def environment() -> dict[str, str]:
    """What a step sees: this folder's files and the package, and no network of wandb."""
    paths = [str(HERE), str(HERE / "contenders"), str(SOURCE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
    }


def run(command: Iterable[str], limit: float, log: Path, take: Callable[[Record], None]) -> str:
    """Run a step to its end, or until its time is over.

    Args:
        command: What is run.
        limit: Seconds after which it and its children are killed.
        log: Where its errors go.
        take: Is given each record as it comes.

    Returns:
        How it failed, or nothing.
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
            with suppress(ProcessLookupError):  # it ended by itself just now
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
    said = [line for line in log.read_text().splitlines() if line.strip()]
    if not said:
        return f"ended with code {code} and said nothing"
    # An error of CUDA has many lines, and its name stands in the first.
    errors = [line for line in said if ERROR.match(line)]
    return shortened((errors or said)[-1])


def shortened(text: str, length: int = 160) -> str:
    """The first line of a text, fit for a cell of a table."""
    lines = text.strip().splitlines() or [""]
    return lines[0].replace("|", "/")[:length]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def heading(machine: Record, device: str, is_quick: bool) -> str:
    """What the numbers of a sheet belong to.

    Args:
        machine: What ``speed.machine`` found.
        device: The argument ``--device``.
        is_quick: Whether everything was small.
    """
    name = machine["processor"] if device == "cpu" else machine["gpu"] or "no GPU"
    text = (
        f"{name}; {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python"
        f" {machine['python']}, torch {machine['torch']}, Lightning {machine['lightning']}; device {device};"
        f" {time.strftime('%Y-%m-%d')}."
    )
    if is_quick:
        text += "\n\n**A run of small sizes: it shows that the sheet works.**"
    return text


def write(text: str, name: str, folders: Iterable[Path]) -> None:
    """Write a file of results into every folder."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.rstrip("\n") + "\n")
