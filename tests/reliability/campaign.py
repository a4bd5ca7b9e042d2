"""The campaign: kinds of trials, their schedule on a few processes, a journal to go on from, and the table."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import lightning
import torch

import lightning_fedhaw
from reliability import configurations, damage, liars, long_runs, resumes, signals
from reliability.endings import Outcome
from reliability.forked import Ending, Forked

Trial = Callable[[int, Random, Path], Outcome]

SEED = 1


@dataclass(frozen=True)
class Kind:
    """One kind of trials.

    Attributes:
        promise: What every trial must show.
        trials: Their number in the full campaign.
        limit: Seconds after which a trial counts as one that hangs.
        trial: The trial: its number, its random numbers and its folder lead to an outcome.
    """

    promise: str
    trials: int
    limit: float
    trial: Trial


KINDS: dict[str, Kind] = {
    "memory": Kind("resident set after 1,000 rounds within 1 % of that after 100", 4, 900, long_runs.memory),
    "lossy": Kind("1,000 rounds over lossy links: no NaN, no round missing", 12, 900, long_runs.lossy),
    "kills": Kind("SIGKILL, half within a write; resumed: the same bits, no file left", 40, 180, signals.kill),
    "slurm": Kind("SIGUSR1 of a Slurm job: saved, requeued, the same bits", 10, 240, signals.preemption),
    "sigterm": Kind("two processes end within 30 s; resumed: the same bits", 10, 240, signals.termination),
    "resumes": Kind("from a random round of a random federation: the same bits", 500, 120, resumes.trial),
    "configurations": Kind("any arguments and data: a result or one sentence", 2000, 60, configurations.trial),
    "flips": Kind("a flipped bit of a checkpoint: refused with the file's name", 200, 60, damage.flip),
    "cuts": Kind("a checkpoint that is cut off: refused with the file's name", 40, 60, damage.cut),
    "liars": Kind("robust rules, 1e3 to 3e38, up to the stated number of liars", 60, 60, liars.trial),
}
"""The longest trials are first, so that no process is left alone with them at the end."""


@dataclass(frozen=True)
class Result:
    """The outcome of a trial, as it is in the journal."""

    kind: str
    number: int
    passed: bool
    label: str
    detail: str
    seconds: float


def command(kind: str, number: int, seed: int) -> str:
    """Return the one line that repeats a trial."""
    return f"python -m tests.reliability --only {kind} --trial {number} --seed {seed}"


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


class Running:
    """A trial in a process of its own.

    Args:
        name: The kind.
        number: The trial's number.
        seed: The campaign's seed.
        root: The folder for what trials write.
    """

    def __init__(self, name: str, number: int, seed: int, root: Path) -> None:
        self.name = name
        self.number = number
        self.kind = KINDS[name]
        self.folder = root / f"{name} {number}"
        self.begin = time.monotonic()

        def job(me: Forked) -> list[Any]:
            prepare()
            outcome = self.kind.trial(number, Random(f"{seed}/{name}/{number}"), self.folder)
            print(outcome)
            return [outcome.passed, outcome.label, outcome.detail]

        self.process = Forked(job, self.folder, is_session=True)

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended, or its time is over."""
        return not self.process.is_running or time.monotonic() - self.begin > self.kind.limit

    def result(self) -> Result:
        """Take the result, and remove what the trial has written unless somebody has to look at it."""
        outcome = outcome_of(self.process.wait(0), self.kind.limit)
        seconds = round(time.monotonic() - self.begin, 2)
        if outcome.passed:
            shutil.rmtree(self.folder, ignore_errors=True)
        return Result(self.name, self.number, outcome.passed, outcome.label, outcome.detail, seconds)


def outcome_of(ending: Ending, limit: float) -> Outcome:
    """Return what a trial's process has said, or how it ended without a word."""
    if ending.timed_out:
        return Outcome(False, "hangs", f"longer than {limit:g} s")
    if ending.value is None:
        return Outcome(False, "the trial failed", f"exit {ending.code} {ending.error}")
    return Outcome(*ending.value)


def prepare() -> None:
    """Make the process of a trial quiet and deterministic."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def results(todo: list[tuple[str, int]], seed: int, jobs: int, root: Path) -> Iterator[Result]:
    """Run trials, some at a time, and yield each result as soon as it is there."""
    waiting = list(reversed(todo))
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Running(*waiting.pop(), seed, root))
            for trial in [trial for trial in running if trial.is_over]:
                running.remove(trial)
                yield trial.result()
            time.sleep(0.005)
    finally:
        for trial in running:
            trial.process.wait(0)


# ---------------------------------------------------------------------------------------------------------------------
# The journal
# ---------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions that a campaign's results belong to; the package's is that of its files."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(lightning_fedhaw.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "lightning_fedhaw": f"{lightning_fedhaw.__version__}, files {digest.hexdigest()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
    }


class Journal:
    """The results so far, one a line, so that a campaign that was stopped goes on.

    Args:
        path: The file; ``None``: nothing is kept.
        seed: The campaign's seed.
    """

    def __init__(self, path: Path | None, seed: int) -> None:
        self.path = path
        self.head = {"seed": seed, **versions()}
        self.results: list[Result] = []
        if path is None:
            return
        if path.exists():
            self._read(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.head) + "\n")

    def _read(self, path: Path) -> None:
        # A line that was being written when the campaign was killed has no end.
        head, *lines = path.read_text().rpartition("\n")[0].split("\n")
        if json.loads(head) != self.head:
            raise SystemExit(f"{path} is of another seed or other versions: {head}. Remove it, or give another --out.")
        self.results = [Result(**json.loads(line)) for line in lines]
        path.write_text("".join(f"{line}\n" for line in [head, *lines]))

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results.append(result)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    @property
    def done(self) -> set[tuple[str, int]]:
        """The trials that have a result."""
        return {(result.kind, result.number) for result in self.results}


# ---------------------------------------------------------------------------------------------------------------------
# The campaign
# ---------------------------------------------------------------------------------------------------------------------


def run(todo: list[tuple[str, int]], journal: Journal, seed: int, jobs: int, out: Path | None) -> bool:
    """Run trials, print what fails, write the table, and return whether all have passed."""
    root = Path(tempfile.mkdtemp(prefix="reliability-"))
    left = [trial for trial in todo if trial not in journal.done]
    print(f"{len(left)} of {len(todo)} trials, seed {seed}, {jobs} at a time, in {root}", flush=True)
    # One number generator's seed for everything that the user's environment could set differently.
    os.environ.pop("PL_GLOBAL_SEED", None)
    shown = time.monotonic()
    for count, result in enumerate(results(left, seed, jobs, root), start=1):
        journal.add(result)
        if not result.passed:
            print(f"FAILED {result.kind} {result.number}: {result.label}. {result.detail}")
            print(f"  {command(result.kind, result.number, seed)}", flush=True)
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"{count} of {len(left)} trials", flush=True)
    report = table(journal, seed)
    print(report)
    if out is not None:
        out.write_text(report)
    passed = all(result.passed for result in journal.results)
    if passed:
        shutil.rmtree(root, ignore_errors=True)
    return passed


def table(journal: Journal, seed: int) -> str:
    """Write the results as Markdown."""
    lines = [", ".join(f"{name} {version}" for name, version in journal.head.items()), ""]
    lines += ["| kind | what every trial must show | passed | seconds of work | ends |", "|---|---|---|---|---|"]
    for name, kind in KINDS.items():
        mine = [result for result in journal.results if result.kind == name]
        if not mine:
            continue
        passed = sum(result.passed for result in mine)
        ends = ", ".join(f"{label}: {count}" for label, count in Counter(r.label for r in mine).most_common())
        seconds = sum(result.seconds for result in mine)
        lines.append(f"| {name} | {kind.promise} | {passed} of {len(mine)} | {seconds:.0f} | {ends} |")
    failures = [result for result in journal.results if not result.passed]
    lines += ["", f"{len(journal.results) - len(failures)} of {len(journal.results)} trials passed.", ""]
    for result in failures:
        detail = " ".join(result.detail.split())[:400]
        lines.append(f"- `{command(result.kind, result.number, seed)}`: {result.label}. {detail}")
    return "\n".join(lines).rstrip() + "\n"


def in_turn(counts: dict[str, int]) -> list[tuple[str, int]]:
    """List trials by kind and number."""
    return [(name, number) for name, count in counts.items() for number in range(count)]
