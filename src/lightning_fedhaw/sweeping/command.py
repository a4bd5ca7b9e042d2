"""The command ``fedhaw sweep``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_fedhaw.comparing.command import report
from lightning_fedhaw.comparing.execution import cores
from lightning_fedhaw.comparing.study import PICTURE_FORMATS
from lightning_fedhaw.figures.command_line import add_picture_options
from lightning_fedhaw.sweeping.study import best_run, sweep
from lightning_fedhaw.sweeping.sweep_file import read_sweep

_DESCRIPTION = "Run a W&B sweep file on this machine, without an account: a grid, or random draws."
_EPILOG = """\
Options that this command does not have are given to every run: `fedhaw sweep fedavg.yaml --trainer.rounds=5`.
Finished runs are kept in the output folder and not repeated.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fedhaw sweep``.

    Args:
        argv: The arguments after the command; those of the process by default.

    Returns:
        The exit status: 1 if a run failed.
    """
    parser = _parser()
    args, further = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    try:
        comparison = sweep(
            args.file,
            runs=args.runs,
            seeds=args.seeds,
            draw_seed=args.draw_seed,
            further=further,
            output=args.output,
            jobs=args.jobs,
            metric=args.metric,
            target=args.target,
            progress=lambda line: print(line, flush=True),
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # Mistakes in the file and the arguments, which all have been looked at before the first run.
        parser.error(str(error))
    status = report(comparison, args.formats, args.theme)
    record = best_run(comparison, read_sweep(args.file).goal)
    if record is not None:
        print(f"best: {record['metric']} {record['curve'][-1]:.4g}, of")
        print(f"  fedhaw fit {shlex.join(record['run']['arguments'])}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedhaw sweep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the sweep file")
    parser.add_argument("--runs", type=int, help="draws, or the first so many of a grid; default: `run_cap`, or all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run each combination with these seeds")
    parser.add_argument("--draw-seed", type=int, default=0, metavar="SEED", help="of random draws; default: 0")
    parser.add_argument("--metric", help="default: that of the file")
    parser.add_argument("--target", type=float, help="a value of the metric: adds the rounds that it takes")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes; default: one a core, here %(default)s")
    parser.add_argument("--output", type=Path, help="folder; default: sweeps/NAME")
    add_picture_options(parser, PICTURE_FORMATS)
    return parser
