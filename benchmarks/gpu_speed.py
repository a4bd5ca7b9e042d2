"""Measure within five minutes how fast a federation trains on a GPU, the most important workloads first.

    python benchmarks/gpu_speed.py --device cuda --out FOLDER
    python benchmarks/gpu_speed.py --device cpu --out outputs          (small sizes, as a test)

The script compares a ViT-B/16 with a stock Trainer, runs the workloads for which other simulators publish their speed
(with random data of the same shape), and compares W1 to W4 with the tuned loop. Each workload is a process with its own
time limit, which runs its contenders one after another: first the rounds that are not timed, then 20 timed ones, or as
many as fit. The tables say how many. Results are written as soon as they are available. The exit code is 0 if
everything that is installed was measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import sheet
import torch
from speed import COMPILED, CONTENDERS, HERE, SEQUENTIAL, VECTORIZED, machine, play
from vit_throughput import report as vit_report
from workloads import WORKLOADS, Clock, Job, prepare

sys.path.insert(0, str(HERE / "contenders"))

ROUNDS = 20
"""Timed rounds of each contender, if the time is sufficient."""
TUNED = "tuned loop"
OURS = "ours"
JAX = "JAX, a round in one program"
WAYS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, sequential": SEQUENTIAL,
    "ours, vectorized": VECTORIZED,
    "ours, vectorized, compiled": {**VECTORIZED, **COMPILED},
}
"""Arguments of ``FederatedTrainer`` that differ from its defaults."""
WAIT = 3
"""A contender is not started if fewer seconds than these are left."""
MISSING = "not installed"
NOT_RUN = "not run: no time left"


@dataclass(frozen=True)
class Entry:
    """A workload in the tables.

    Attributes:
        ways: Contenders, the most important first.
        limit: Seconds for all of them together.
        published: Seconds per round that the simulator publishes.
        aim: Target for the seconds per round.
        total: Rounds of the published run, to which the time of a round is extrapolated.
        changes: Attributes of the workload that are changed.
        share: Fraction of the published cohort that is trained; the time is extrapolated to the whole cohort.
        precision: The argument ``precision`` of the trainer.
    """

    ways: tuple[str, ...]
    limit: float
    published: float | None = None
    aim: float = 0.0
    total: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    precision: str = "32-true"


BOTH = (OURS, "ours, vectorized", TUNED)
PUBLISHED = {
    # FLUTE publishes 95 s for 100 rounds and 502 s for 1,500 on several GPUs, including evaluations. BlazeFL's times
    # are read off its plot, on an A100. The target for pfl-research is all of its rounds in one minute.
    "pfl": Entry(("ours", "ours, vectorized", "ours, sequential"), 40, None, 60 / 1500, 1500),
    "flute_lr": Entry(BOTH, 25, 0.95, 0.01, 100),
    "flute_cnn": Entry(BOTH, 45, 0.33, 0.02, 1500),
    "blazefl_cnn": Entry(BOTH, 45, 6.0, 2.0, 5),
    # A full round has 5,000 steps of a ResNet, which takes too long.
    "blazefl_resnet": Entry(BOTH, 50, 23.0, 12.0, 5, changes={"cohort": 20}, share=0.2),
}
OWN = {
    "W1": Entry((TUNED, *WAYS, JAX), 45),
    "W3": Entry((TUNED, *WAYS, JAX), 45),
    "W2": Entry((TUNED, OURS, "ours, vectorized"), 30),
    "W4": Entry((TUNED, OURS, "ours, vectorized"), 30, precision="bf16-mixed"),
}
ENTRIES = {**PUBLISHED, **OWN}
VIT_LIMIT = 110
VIT = ["--images", "384", "--rounds", "2", "--repetitions", "3", "--seconds", "75"]
VIT_QUICK = ["--model", "test_vit", "--image-size", "64", "--clients", "4", "--images", "32", "--batch-size", "16"]
VIT_QUICK += ["--precision", "32-true", "--repetitions", "1"]

Records = dict[str, dict[str, sheet.Record]]
"""Results by workload and contender."""


def ways(work: str, is_quick: bool) -> list[str]:
    """Return the contenders of a workload; a quick run omits those that take long even with small sizes."""
    return [way for way in ENTRIES[work].ways if not (is_quick and "compiled" in way)]


# ---------------------------------------------------------------------- a step: run workloads in this process


def run_works(works: list[str], device: str, is_quick: bool, seconds: float) -> None:
    """Run the contenders of workloads, and report the time of each."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    deadline = sheet.Deadline(seconds)
    waiting = sum(len(ways(work, is_quick)) for work in works)
    for work in works:
        job = job_of(work, device, is_quick)
        for way in ways(work, is_quick):
            sheet.tell({"work": work, "way": way, **attempt(way, job, deadline.left, waiting)})
            waiting -= 1


def precision(work: str, device: str) -> str:
    """Return the precision of a workload; on a CPU lower precisions are not faster."""
    return ENTRIES[work].precision if device.startswith("cuda") else "32-true"


def job_of(work: str, device: str, is_quick: bool) -> Job:
    """Return the job that the contenders of a workload share."""
    changes: dict[str, Any] = {} if is_quick else {"rounds": ROUNDS, **ENTRIES[work].changes}
    return Job(work, "", is_quick, device, precision(work, device), changes=changes)


def attempt(way: str, job: Job, left: float, waiting: int) -> sheet.Record:
    """Return the times of a contender, or the error if there are none."""
    if left < WAIT:
        return {"error": NOT_RUN}
    # Half of the contender's time is reserved for what is not timed: the first rounds, moving data, compiling.
    job = replace(job, seconds=0.5 * left / waiting)
    try:
        return run_contender(way, job, left)
    except Exception as error:
        return {"error": sheet.shortened(f"{type(error).__name__}: {error}")}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_contender(way: str, job: Job, left: float) -> sheet.Record:
    """Run a contender in this process, and return its times and memory."""
    if way == JAX:
        return run_jax(job, left)
    is_on_gpu = job.device.startswith("cuda")
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    engine = ""
    if way == TUNED:
        clock, _ = importlib.import_module("tuned").play(job)
    else:
        job = replace(job, options=WAYS[way], skip=CONTENDERS.get(way, CONTENDERS[OURS]).skip)
        clock = Clock(job.device, skip=job.skip, seconds=job.seconds)
        with redirect_stdout(StringIO()):  # hides the run summary
            trainer, _ = importlib.import_module("ours").fit(job, clock)
        engine = type(trainer.fit_loop.federation.engine).__name__.removesuffix("Engine").lower()
    record = {"seconds": clock.seconds[job.skip :], "ready": sum(clock.seconds[: job.skip]), "engine": engine}
    if is_on_gpu:
        record["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return record


def run_jax(job: Job, left: float) -> sheet.Record:
    """Run DrJAX from its own environment, or plain JAX if it is installed in this environment."""
    peers = Path("outputs/peers").absolute()
    contender = CONTENDERS["DrJAX"]
    if not (peers / contender.peer / "bin" / "python").exists():
        if importlib.util.find_spec("jax") is None:
            return {"error": MISSING}
        contender = replace(contender, peer="")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process uses the GPU as well
    settings = argparse.Namespace(peers=peers, threads=None)
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, data=str(Path(folder) / "data.npz"))
        prepare(job.workload, Path(job.data))
        report = play(contender, job.work, job, settings, limit=left)
    if "error" in report:
        return report
    return {"seconds": report["seconds"][1:], "ready": report["seconds"][0], "engine": ""}


# ---------------------------------------------------------------------- tables


def number(value: float | None) -> str:
    """Format a number for a table cell."""
    return "" if value is None else f"{value:.3g}"


def published_rows(records: Records, is_quick: bool) -> Iterator[list[str]]:
    """Yield a row for each contender of each published workload; a quick run is not compared with targets."""
    for work, entry in PUBLISHED.items():
        for way, record in records.get(work, {}).items():
            cells = [WORKLOADS[work].title, way]
            goals = ["", ""] if is_quick else [number(entry.published), number(entry.aim)]
            if "error" in record:
                yield [*cells, record["error"], "", "", "", *goals, ""]
                continue
            seconds = statistics.median(record["seconds"])
            count = str(len(record["seconds"]))
            if is_quick:
                yield [*cells, f"{seconds:.4g}", record["engine"], count, "", *goals, ""]
                continue
            seconds /= entry.share
            if entry.share < 1:
                count += f", of {entry.share:g} of the cohort, extrapolated"
            whole = f"{seconds * entry.total:.3g} ({entry.total:,})"
            is_met = "yes" if seconds <= entry.aim else "no"
            yield [*cells, f"{seconds:.4g}", record["engine"], count, whole, *goals, is_met]


def own_rows(records: Records) -> Iterator[list[str]]:
    """Yield a row for each contender of W1 to W4."""
    for work in OWN:
        found = records.get(work, {})
        tuned = found.get(TUNED, {}).get("seconds")
        for way, record in found.items():
            if "error" in record:
                yield [work, way, record["error"], "", "", "", "", ""]
                continue
            seconds = statistics.median(record["seconds"])
            ratio = f"{seconds / statistics.median(tuned):.2f}" if tuned else ""
            memory = f"{record['gpu_mb']:.0f}" if "gpu_mb" in record else ""
            count = str(len(record["seconds"]))
            yield [work, way, f"{seconds:.4g}", ratio, record["engine"], count, f"{record['ready']:.2f}", memory]


def text(results: Results) -> str:
    """Return all tables as Markdown."""
    head = sheet.heading(results.machine, results.device, results.is_quick)
    vit = f"{results.vit['error']}"
    if "seconds" in results.vit:
        vit = f"{vit_report(results.vit)}\n\n{vit}".rstrip()
    names = ["workload", "contender", "s a round", "engine", "timed rounds", "s for all (rounds)"]
    rows = published_rows(results.records, results.is_quick)
    published = sheet.table([*names, "published", "aim", "met"], rows)
    titles = [f"- {work}: {WORKLOADS[work].title}; {precision(work, results.device)}" for work in OWN]
    names = [
        "work",
        "contender",
        "s a round",
        "ratio",
        "engine",
        "timed rounds",
        "s of the rounds before",
        "peak GPU MB",
    ]
    own = sheet.table(names, own_rows(results.records))
    parts = [
        "# Speed on a GPU",
        head,
        "## A federated ViT against a stock Trainer",
        vit,
        "## Workloads that other simulators publish",
        "Random data of the same shape; seconds a round are medians. The published numbers are those of the simulators"
        " themselves, on other machines.",
        published,
        "## W1 to W4",
        "Seconds a round are medians, ratios are to the tuned loop.",
        "\n".join(titles),
        own,
    ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------- running


class Results:
    """All results, including what is missing; written as soon as a result is available.

    Args:
        works: Workloads in the tables.
        device: The argument ``--device``.
        is_quick: Whether small sizes are used.
        folders: Folders for the result files.
    """

    def __init__(self, works: list[str], device: str, is_quick: bool, folders: list[Path]) -> None:
        self.machine, self.device, self.is_quick, self.folders = machine(), device, is_quick, folders
        self.records: Records = {
            work: {way: {"error": NOT_RUN} for way in ways(work, is_quick)} for work in ENTRIES if work in works
        }
        self.vit: dict[str, Any] = {"error": NOT_RUN}

    def add(self, record: sheet.Record) -> None:
        self.records[record.pop("work")][record.pop("way")] = record
        self.write()

    def close(self, works: list[str], ending: str) -> None:
        """Record how a process ended as the result of the first contender that has none."""
        for work in works:
            for way, record in self.records[work].items():
                if record.get("error") == NOT_RUN:
                    self.add({"work": work, "way": way, "error": ending})
                    return

    @property
    def failures(self) -> int:
        errors = [record.get("error") for found in self.records.values() for record in found.values()]
        return sum(error not in (None, MISSING) for error in errors) + bool(self.vit["error"])

    def write(self) -> None:
        sheet.write(text(self), "gpu_speed.md", self.folders)
        found = {
            "machine": self.machine,
            "device": self.device,
            "quick": self.is_quick,
            "vit": self.vit,
            "works": self.records,
        }
        sheet.write(json.dumps(found, indent=1), "gpu_speed.json", self.folders)


def measure_vit(results: Results, deadline: sheet.Deadline) -> None:
    """Compare the federated ViT with the stock Trainer."""
    limit = min(VIT_LIMIT, deadline.left)
    if limit < WAIT:
        return
    file = results.folders[0] / "logs" / "vit.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "vit_throughput.py"), "--device", results.device, "--json", str(file)]
    command += VIT_QUICK if results.is_quick else VIT
    ending = sheet.run(command, limit, file.with_suffix(".log"), lambda record: None)
    results.vit = {**(json.loads(file.read_text()) if file.exists() else {}), "error": ending}
    results.write()


def measure_works(works: list[str], results: Results, deadline: sheet.Deadline) -> None:
    """Run workloads in a new process."""
    limit = min(sum(ENTRIES[work].limit for work in works), deadline.left)
    if limit < 10:  # the imports alone take most of this time
        return
    command = [sys.executable, str(Path(__file__)), "--here", "--device", results.device, "--works", *works]
    command += ["--seconds", f"{limit - 8:.1f}", *(["--quick"] if results.is_quick else [])]
    log = results.folders[0] / "logs" / f"speed_{works[0]}.log"
    ending = sheet.run(command, limit, log, results.add)
    if ending:
        results.close(works, ending)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu; a CPU runs small sizes")
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("outputs")], help="folders for gpu_speed.*")
    parser.add_argument("--works", nargs="*", choices=["vit", *ENTRIES], default=["vit", *ENTRIES], metavar="WORK")
    parser.add_argument("--quick", action="store_true", help="small sizes, also on a GPU")
    parser.add_argument("--seconds", type=float, default=290, help="time limit for everything")
    parser.add_argument("--since", type=float, help="start of this time, in seconds since 1970; default now")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a step: the workloads in this process
    args = parser.parse_args()
    is_quick = args.quick or not args.device.startswith("cuda")
    if args.here:
        run_works(args.works, args.device, is_quick, args.seconds)
        return
    deadline = sheet.Deadline(args.seconds, args.since)
    results = Results(args.works, args.device, is_quick, args.out)
    results.write()
    if "vit" in args.works:
        measure_vit(results, deadline)
    else:
        results.vit = {"error": ""}
    works = [work for work in ENTRIES if work in args.works]
    # In a quick run, one process for all workloads avoids repeated imports, which would dominate the time.
    for step in [works] if is_quick else [[work] for work in works]:
        if step:
            measure_works(step, results, deadline)
    results.write()
    print((args.out[0] / "gpu_speed.md").read_text())
    sys.exit(f"{results.failures} results are missing." if results.failures else 0)


if __name__ == "__main__":
    main()
