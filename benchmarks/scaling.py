"""Measure rounds per second for different sizes of the cohort and numbers of processes.

    python benchmarks/scaling.py [--quick] [--plot-only]

The cohorts have 10 to 10,000 clients with 10 samples each and train logistic regression 60-10 in one process. W1 and W3
run on one and on two processes. The script writes ``scaling.json`` and ``scaling.png`` into ``results`` (a quick run
into ``outputs``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from speed import HERE, Contender, data_of, machine, play, save
from workloads import Job, prepare

COHORTS = (10, 100, 1000, 10_000)
ENGINES = {
    "tuned loop": Contender("tuned", ""),
    "ours, sequential": Contender("ours", "", {"engine": "sequential"}),
    "ours, vectorized": Contender("ours", "", {"engine": "vectorized"}),
}
PROCESSES = {
    ("W1", "ours"): {},
    ("W3", "ours, sequential"): {"engine": "sequential"},
    ("W3", "ours, vectorized"): {"engine": "vectorized"},
}
# Okabe and Ito's colors can be distinguished with any color vision; markers distinguish the lines in gray.
STYLES = {
    "tuned loop": ("#000000", "s--"),
    "ours, sequential": ("#0072B2", "o-"),
    "ours, vectorized": ("#D55E00", "D-"),
}


def speed(contender: Contender, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Return rounds per second as the median of the repetitions, or the error of a run that failed."""
    rates = []
    for _ in range(args.repetitions):
        run = play(contender, job.work, job, args)
        if "error" in run:
            return run
        rates.append(1 / statistics.median(run["seconds"][1:]))
    return {"rounds_per_second": statistics.median(rates)}


def against_cohort(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every engine with cohorts of increasing size."""
    points = []
    for cohort in COHORTS[: 2 if args.quick else None]:
        rounds = 20 if cohort <= 100 else 3
        job = Job(
            "W6", str(folder / f"{cohort}.npz"), changes={"sizes": [10] * cohort, "cohort": cohort, "rounds": rounds}
        )
        prepare(job.workload, Path(job.data))
        for name, contender in ENGINES.items():
            variant = Job(job.work, job.data, options=contender.options, changes=job.changes)
            points.append({"cohort": cohort, "contender": name, **speed(contender, variant, args)})
            print(points[-1], flush=True)
    return points


def against_processes(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure W1 and W3 on one and on two processes."""
    points = []
    for (work, name), options in PROCESSES.items():
        path = folder / f"{work}.npz"
        if not path.exists():
            prepare(Job(work, "", quick=args.quick).workload, path, args.mnist)
        for processes in (1, 2):
            job = Job(work, str(path), quick=args.quick, options={**options, "devices": processes})
            run = speed(Contender("ours", ""), job, args)
            data = data_of(work, args)
            points.append({"work": work, "data": data, "contender": name, "processes": processes, **run})
            print(points[-1], flush=True)
    return points


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw both pictures into one file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, (color, style) in STYLES.items():
        points = [p for p in results["cohort"] if p["contender"] == name and "rounds_per_second" in p]
        left.plot(
            [p["cohort"] for p in points], [p["rounds_per_second"] for p in points], style, color=color, label=name
        )
    left.set(xscale="log", yscale="log", xlabel="clients in a round", ylabel="rounds per second")
    left.set_title("Logistic regression 60-10, 10 samples a client, one process", fontsize=10)
    left.legend(frameon=False)

    kinds = list(dict.fromkeys((p["work"], p["contender"]) for p in results["processes"]))
    for at, kind in enumerate(kinds):
        points = [p for p in results["processes"] if (p["work"], p["contender"]) == kind and "rounds_per_second" in p]
        for point in points:
            rate = point["rounds_per_second"] / points[0]["rounds_per_second"]
            x = at + (point["processes"] - 1.5) * 0.36
            right.bar(x, rate, 0.34, color="#0072B2" if point["processes"] == 2 else "#BBBBBB")
            right.annotate(f"{point['rounds_per_second']:.3g}/s", (x, rate), ha="center", va="bottom", fontsize=8)
    labels = [f"{work}\n{'default' if name == 'ours' else name.removeprefix('ours, ')}" for work, name in kinds]
    right.set_xticks(range(len(kinds)), labels)
    right.set(ylabel="speed, relative to one process")
    right.set_title("One process (gray) and two (blue)", fontsize=10)
    right.margins(y=0.12)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6, axis="y" if axes is right else "both")
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mnist", help="as for speed.py")
    parser.add_argument("--threads", type=int, help="as for speed.py")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot-only", action="store_true", help="run nothing, draw the stored results")
    args = parser.parse_args()
    args.peers, args.repetitions = Path(), 1 if args.quick else args.repetitions
    base = Path("outputs/scaling") if args.quick else HERE / "results" / "scaling"
    if not args.plot_only:
        with tempfile.TemporaryDirectory() as folder:
            cohort = against_cohort(Path(folder), args)
            processes = against_processes(Path(folder), args)
        about = {"machine": machine(), "date": date.today().isoformat(), "quick": args.quick}
        save({**about, "cohort": cohort, "processes": processes}, base.with_suffix(".json"))
    draw(json.loads(base.with_suffix(".json").read_text()), base.with_suffix(".png"))


if __name__ == "__main__":
    main()
