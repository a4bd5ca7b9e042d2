"""Try what the package promises: kills, resumes, signals, damaged files, any arguments, liars, long runs.

    python -m tests.reliability --full [--only kills,resumes] [--seed 1] [--jobs 2] [--out REPORT.md]
    python -m tests.reliability --only kills --trial 7 --seed 1

The full campaign takes about ten minutes on two idle cores. Every result is written at once to a journal beside the
report (`REPORT.jsonl`): the same command goes on where the campaign was stopped. A failure prints the one line that
repeats it; its folder stays, with the trial's output in `log`.
"""

import argparse
import os
import sys
from pathlib import Path

# Before torch is imported: forked processes cannot use its threads, and the bits depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from reliability import campaign  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the numbers of docs/reliability.md; else a hundredth")
    parser.add_argument("--only", default=",".join(campaign.KINDS), help="kinds, separated by commas")
    parser.add_argument("--trial", type=int, help="one trial, by its number")
    parser.add_argument("--count", type=int, help="this many trials of each kind")
    parser.add_argument("--seed", type=int, default=campaign.SEED)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path, help="the report, in Markdown; the journal is beside it")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in campaign.KINDS]
    if unknown:
        parser.error(f"--only must name kinds among {', '.join(campaign.KINDS)}, got {', '.join(unknown)}.")
    if arguments.trial is not None:
        todo = [(name, arguments.trial) for name in names]
    else:
        todo = campaign.in_turn({name: trials(name, arguments) for name in campaign.KINDS if name in names})
    out = None if arguments.out is None else arguments.out.absolute()
    journal = campaign.Journal(None if out is None else out.with_suffix(".jsonl"), arguments.seed)
    return 0 if campaign.run(todo, journal, arguments.seed, arguments.jobs, out) else 1


def trials(name: str, arguments: argparse.Namespace) -> int:
    """Return how many trials of a kind were asked for."""
    whole = campaign.KINDS[name].trials
    if arguments.count is not None:
        return arguments.count
    return whole if arguments.full else max(1, whole // 100)


sys.exit(main())
