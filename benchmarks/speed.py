"""Measure how fast a federation trains, compared with a tuned plain PyTorch loop and with other libraries.

    python benchmarks/peers.py install pfl flwr drjax blazefl        (optional: install the other libraries)
    python benchmarks/speed.py --mnist SPLIT.npz                     (everything, about an hour and a half)
    python benchmarks/speed.py --quick                               (a small version of everything, as a test)
    python benchmarks/speed.py --work W1 W3 --contenders "ours*"     (a selection; the baseline is always included)
    python benchmarks/speed.py --before OLD/src --out NEW.json       (an older checkout beside this one, in one run)

Every run is a separate process that prints one JSON report. Runs are interleaved (A, B, C, A, B, C, ...). The figure of
a run is the median of its rounds, a ratio is taken to the baseline of the same repetition, and the table shows medians
over repetitions. The final loss over all training data after equal numbers of rounds shows that no contender skips
work. Results are merged into a JSON file, and its tables are written into a Markdown file, between two markers.

``SPLIT.npz`` holds ``train_x``, ``train_y`` and ``client_alpha01``, as for ``parity/mnist.py``. Without it, W1 and W2
train on random images of the same size.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from workloads import WORKLOADS, Job, installed, prepare

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
TIME_LIMIT = 1800
"""Seconds after which a run is stopped."""


@dataclass(frozen=True)
class Contender:
    """An implementation that runs workloads.

    Attributes:
        script: File in ``contenders``.
        works: Names of the workloads that it runs.
        options: Options of the script.
        peer: Name of the environment, for other libraries.
        threads: Threads of the process by workload, if its default is not its best choice.
        skip: Rounds before the timed ones; more than one if the first rounds compile.
        devices: Kinds of device on which it runs.
        source: The folder that holds the package.
    """

    script: str
    works: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: str = ""
    threads: dict[str, int] = field(default_factory=dict)
    skip: int = 1
    devices: tuple[str, ...] = ("cpu",)
    source: Path = SOURCE


ANY = ("cpu", "cuda")
SEQUENTIAL = {"engine": "sequential"}
VECTORIZED = {"engine": "vectorized"}
COMPILED = {"compile_clients": True}
LAYOUT = {"channels_last": True}
TWO = {"devices": 2}
CONTENDERS = {
    "tuned loop": Contender("tuned", "W0 W1 W2 W3 W4 W6", devices=ANY),
    "ours": Contender("ours", "W0 W1 W2 W3 W4 W6", devices=ANY),
    "ours, logger and bar": Contender("ours", "W0", {"logged": True}, devices=ANY),
    "ours, FedHAW": Contender("ours", "W1 W2", {"rule": "fedhaw"}, devices=ANY),
    "ours, sequential": Contender("ours", "W1 W3", SEQUENTIAL, devices=ANY),
    "ours, vectorized": Contender("ours", "W1 W3 W6", VECTORIZED, devices=ANY),
    "ours, vectorized, compiled": Contender("ours", "W1 W3", {**VECTORIZED, **COMPILED}, skip=3, devices=ANY),
    "ours, channels_last": Contender("ours", "W2 W4", LAYOUT, devices=ANY),
    "ours, 2 processes": Contender("ours", "W1 W2 W3 W4", TWO),
    "ours, 2 processes, vectorized": Contender("ours", "W1 W3", {**TWO, **VECTORIZED}),
    "ours, 2 processes, compiled": Contender("ours", "W3", {**TWO, **VECTORIZED, **COMPILED}, skip=3),
    "ours, 2 processes, channels_last": Contender("ours", "W2 W4", {**TWO, **LAYOUT}),
    "ours, vectorized (CUDA)": Contender("ours", "W2 W4", VECTORIZED, devices=("cuda",)),
    "pfl-research": Contender("peer_pfl", "W1 W2 W3 W4", peer="pfl", threads={"W3": 1}),
    "Flower": Contender("peer_flwr", "W1 W2 W3 W4", peer="flwr"),
    "BlazeFL": Contender("peer_blazefl", "W1 W2 W3 W4", peer="blazefl", threads={"W3": 1}),
    "DrJAX": Contender("peer_drjax", "W1 W3", peer="drjax"),
    "reading the vectors once": Contender("server_step", "W5", {"how": "read"}, devices=ANY),
    "authors' formulas, FedHAW": Contender("server_step", "W5", {"how": "authors"}, devices=ANY),
    "ours, FedHAW step": Contender("server_step", "W5", {"how": "ours"}, devices=ANY),
}
SERVER_STEPS = {f"W5, K={k}": {"clients": k, "parameters": 10_000_000, "rounds": 5} for k in (10, 100)}
WORKS = ("W0", "W1", "W2", "W3", "W4", *SERVER_STEPS, "W6")
TARGETS = {"W1": (1.10, 0.65), "W2": (1.02, 0.82), "W3": (0.25, 0.12), "W4": (1.02, 0.95)}
"""Targets for the ratio to the tuned loop: with default settings, and with the best settings."""


def baseline(work: str) -> str:
    """Return the contender to which the ratios of a workload are taken."""
    return "reading the vectors once" if work.startswith("W5") else "tuned loop"


def title(work: str) -> str:
    """Return the heading of a workload."""
    if work in WORKLOADS:
        return WORKLOADS[work].title
    return "FedHAW's server step alone, 10 million parameters"


# ---------------------------------------------------------------------- running


def environment(contender: Contender, work: str, threads: int | None) -> dict[str, str]:
    """Return the environment of a run: it finds this folder's files, sends no telemetry, and wandb stays offline."""
    paths = [str(HERE), str(contender.source), os.environ.get("PYTHONPATH", "")]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "offline"}
    threads = contender.threads.get(work, threads)
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **quiet, **limit}


def play(
    contender: Contender, work: str, job: Job, args: argparse.Namespace, limit: float = TIME_LIMIT
) -> dict[str, Any]:
    """Run a contender for at most ``limit`` seconds, and return its report or its error."""
    python = args.peers / contender.peer / "bin" / "python" if contender.peer else Path(sys.executable)
    if not python.exists():
        return {"error": f"not installed: python benchmarks/peers.py install {contender.peer}"}
    command = [str(python), str(HERE / "contenders" / f"{contender.script}.py"), json.dumps(asdict(job))]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(contender, work, args.threads),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {"error": f"not finished after {limit:.0f} s"}
    report = next((line for line in reversed(out.splitlines()) if line.startswith('{"seconds"')), None)
    if process.returncode or report is None:
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith("[rank")]
        return {"error": (lines or [f"ended with code {process.returncode} and said nothing"])[-1][:160]}
    return json.loads(report)


def chosen(work: str, args: argparse.Namespace) -> dict[str, Contender]:
    """Return the selected contenders of a workload, the baseline first."""
    kind = args.device.split(":")[0]
    selected = {}
    for name, one in CONTENDERS.items():
        if work.split(",")[0] not in one.works.split() or kind not in one.devices:
            continue
        if name != baseline(work) and not any(fnmatch.fnmatch(name, pattern) for pattern in args.contenders):
            continue
        selected[name] = one
        if args.before is not None and one.script == "ours":
            selected[f"before: {name}"] = replace(one, source=args.before)
    return selected


def jobs(work: str, folder: Path, args: argparse.Namespace) -> tuple[Job, float]:
    """Return the job of a workload without a contender's options, and its number of local steps per round."""
    shared = {"quick": args.quick, "device": args.device, "precision": args.precision.get(work, "32-true")}
    if work in SERVER_STEPS:
        smaller = {"parameters": 100_000} if args.quick else {}
        return Job(work, "", **shared, options={**SERVER_STEPS[work], **smaller}), 0
    path = folder / f"{work}.npz"
    job = Job(work, str(path), **shared)
    prepare(job.workload, path, args.mnist)
    spec = job.workload
    steps = np.array([-(-len(rows) // spec.batch) for rows in job.rows]) * spec.epochs
    return job, float(np.mean([steps[cohort].sum() for cohort in job.cohorts[1:]]))


def measure(work: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run all repetitions of a workload."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen(work, args)}
    with tempfile.TemporaryDirectory() as folder:
        common, steps = jobs(work, Path(folder), args)
        for repetition in range(args.repetitions):
            reference = None
            for name, contender in chosen(work, args).items():
                if runs[name] and "error" in runs[name][-1]:
                    continue
                begin = time.perf_counter()
                job = replace(common, options={**common.options, **contender.options})
                run = play(contender, work, job, args)
                if "error" not in run:
                    run["median"] = statistics.median(run["seconds"][contender.skip :] or run["seconds"])
                    reference = run["median"] if name == baseline(work) else reference
                    run["ratio"] = run["median"] / reference if reference else float("nan")
                runs[name].append(run)
                result = f"{run['median']:.4g} s a round, {run['ratio']:.2f}x" if "median" in run else run["error"]
                duration = time.perf_counter() - begin
                print(f"{work} {repetition + 1}/{args.repetitions} {name}: {result} ({duration:.0f} s)", flush=True)
    return {"steps": steps, "data": data_of(work, args), "contenders": runs}


def data_of(work: str, args: argparse.Namespace) -> str:
    """Return the name of a workload's data, if it is not always the same."""
    if work not in ("W1", "W2"):
        return ""
    if not args.mnist:
        return "random images"
    if work == "W1":
        return "MNIST, the FedHAW authors' split"
    return "MNIST"


def machine() -> dict[str, Any]:
    """Return the hardware and versions that the numbers belong to."""
    import torch

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": installed("lightning"),
    }


# ---------------------------------------------------------------------- tables


HEAD = (
    "contender",
    "s a round",
    "ratio",
    "min to max",
    "µs a step over the loop",
    "s to get ready",
    "peak MB above imports",
    "peak MB, all processes",
    "final loss",
)


def good(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that did not fail."""
    return [run for run in runs if "error" not in run]


def middle(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of a value over the runs that did not fail."""
    return statistics.median(run[key] for run in good(runs))


def row(name: str, runs: Sequence[dict[str, Any]], steps: float, base: float | None) -> str:
    """Return a contender's row.

    Args:
        name: The contender.
        runs: Its runs.
        steps: Local steps per round of the workload; 0 if there are none.
        base: Seconds per round of the baseline.
    """
    if not good(runs):
        return f"| {name} | {runs[-1]['error'].replace('|', '/')} |" + " |" * (len(HEAD) - 2)
    ratios = [run["ratio"] for run in good(runs)]
    seconds = middle(runs, "median")
    skip = CONTENDERS[name].skip if name in CONTENDERS else 1
    ready = statistics.median(sum(run["seconds"][:skip]) - skip * run["median"] for run in good(runs))
    over = f"{1e6 * (seconds - base) / steps:+.1f}" if base is not None and steps else ""
    above = statistics.median(run["peak_mb"] - run["import_mb"] for run in good(runs))
    cells = (
        name,
        f"{seconds:.4g}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        over,
        f"{max(ready, 0):.2f}",
        f"{above:.0f}",
        f"{middle(runs, 'tree_mb'):.0f}",
        f"{middle(runs, 'loss'):.4f}",
    )
    return "| " + " | ".join(cells) + " |"


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the Markdown tables of a results file."""
    about = results["machine"]
    yield (
        f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB"
        + (f", {about['gpu']}" if results["settings"]["device"] != "cpu" else "")
        + f"; Python {about['python']}, torch {about['torch']}, Lightning {about['lightning']}; device"
        f" {results['settings']['device']}; {results['date']}."
    )
    if results["settings"]["quick"]:
        yield "\n**A quick run of small workloads. It only shows that the benchmark works.**"
    yield from summary(results["works"])
    for work, found in results["works"].items():
        data = f" ({found['data']})" if found["data"] else ""
        yield f"\n### {work}: {title(work)}{data}\n"
        yield "| " + " | ".join(HEAD) + " |\n|---|" + "---:|" * (len(HEAD) - 1)
        base_runs = good(found["contenders"].get(baseline(work), []))
        base = middle(base_runs, "median") if base_runs else None
        for name, runs in found["contenders"].items():
            yield row(name, runs, found["steps"], base)


def summary(works: dict[str, Any]) -> Iterator[str]:
    """Yield the table of ratios and their targets."""
    yield "\n| work | ours, default | aim | ours, best choice | aim | best peer |\n|---|---:|---:|---|---:|---|"
    for work, (default_aim, choice_aim) in TARGETS.items():
        ratios = {
            name: statistics.median(run["ratio"] for run in good(runs))
            for name, runs in works.get(work, {"contenders": {}})["contenders"].items()
            if good(runs)
        }
        ours = {name: ratio for name, ratio in ratios.items() if name.startswith("ours")}
        peers = {name: ratio for name, ratio in ratios.items() if name in CONTENDERS and CONTENDERS[name].peer}
        cells = [work, f"{ratios['ours']:.2f}" if "ours" in ratios else "", f"{default_aim:.2f}", best(ours)]
        yield "| " + " | ".join([*cells, f"{choice_aim:.2f}", best(peers)]) + " |"


def best(ratios: dict[str, float]) -> str:
    """Return the smallest ratio and its contender."""
    if not ratios:
        return ""
    name = min(ratios, key=ratios.__getitem__)
    return f"{ratios[name]:.2f} ({name})"


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace the text between ``<!-- marker -->`` and ``<!-- /marker -->``; append the markers if they are missing."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    old = path.read_text() if path.exists() else ""
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2] if rest else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def save(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), metavar="W")
    parser.add_argument("--contenders", nargs="+", default=["*"], help="names or patterns such as 'ours*'")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mnist", help="the FedHAW authors' split of MNIST, an npz file")
    parser.add_argument(
        "--peers", type=Path, default=Path("outputs/peers"), help="folder with the environments of other libraries"
    )
    parser.add_argument("--before", type=Path, help="the `src` of an older checkout, whose package runs as well")
    parser.add_argument("--threads", type=int, help="threads of every process; default: each contender's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="*", default=[], metavar="W=P", help="such as W4=bf16-mixed")
    parser.add_argument("--quick", action="store_true", help="small workloads, one repetition, outputs/quick.*")
    parser.add_argument("--out", type=Path, help="results; default benchmarks/results/speed.json")
    parser.add_argument("--markdown", type=Path, help="file for the tables; default benchmarks/README.md")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables of the stored results")
    args = parser.parse_args()
    args.precision = dict(pair.split("=") for pair in args.precision)
    args.peers = args.peers.absolute()
    if args.before is not None:
        args.before = args.before.absolute()
    args.mnist = os.path.abspath(args.mnist) if args.mnist else None
    if args.quick:
        args.repetitions = 1
    out = args.out or (Path("outputs/quick.json") if args.quick else HERE / "results" / "speed.json")
    markdown = args.markdown or (Path("outputs/quick.md") if args.quick else HERE / "README.md")

    here = {"machine": machine(), "settings": {"device": args.device, "threads": args.threads, "quick": args.quick}}
    results: dict[str, Any] = {**here, "works": {}}
    if out.exists():
        results = json.loads(out.read_text())
        if not args.table and {key: results[key] for key in here} != here:
            sys.exit(f"{out} is from another machine or other settings: move it away, or give another --out.")
    for work in [] if args.table else args.work:
        found = measure(work, args)
        old = results["works"].get(work, {"contenders": {}})
        found["contenders"] = {**old["contenders"], **found["contenders"]}
        results["works"][work] = found
        results["date"] = date.today().isoformat()
        results["works"] = {name: results["works"][name] for name in WORKS if name in results["works"]}
        save(results, out)
        write_between(markdown, "speed", "\n".join(tables(results)))
    if args.table:
        write_between(markdown, "speed", "\n".join(tables(results)))
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
