"""The command ``fedhaw compare``."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_fedhaw.comparing import expressions
from lightning_fedhaw.comparing.execution import cores
from lightning_fedhaw.comparing.federations import CELLS
from lightning_fedhaw.comparing.plan import BASELINES, SETTINGS
from lightning_fedhaw.comparing.study import PICTURE_FORMATS, Comparison, compare
from lightning_fedhaw.figures.base import theme
from lightning_fedhaw.figures.command_line import add_picture_options

_DESCRIPTION = "Compare methods: the same federations, cohorts, batches and initial models, over seeds."
_EPILOG = f"""\
Rules and cells are expressions, with a label if you like: FedAvg, "FedAvgM(lr=0.5)", "tuned=FedAdam(lr=0.03)",
"FedAvg + FedProx(mu=0.01)", "mine.MyRule(step=2)". Built-in cells: {", ".join(CELLS)}; or
split.npz, "npz('split.npz', lr=0.1)", "torchvision(name='MNIST')", and mine.my_cell, a function that returns a Cell.
A setting takes one value or several, which are combined. Finished runs are kept in the output folder and not repeated.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fedhaw compare``.

    Modules in the working directory can be named in import paths.

    Args:
        argv: The arguments after the command; those of the process by default.

    Returns:
        The exit status: 1 if a run failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    parser = _parser(_dotted(arguments))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown_sentence(parser, unknown[0]))
    try:
        comparison = compare(
            args.rules,
            _cells(args),
            seeds=args.seeds,
            rounds=args.rounds,
            settings=_settings(args),
            baselines=args.baselines,
            output=args.output,
            jobs=args.jobs,
            metric=args.metric,
            target=args.target,
            reference=args.reference,
            accelerator=args.accelerator,
            progress=lambda line: print(line, flush=True),
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # Mistakes in the arguments, which all have been looked at before the first run, and processes that died.
        parser.error(str(error))
    return report(comparison, args.formats, args.theme)


def _parser(dotted: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        dotted: Options of the form ``--model.NAME`` and ``--data.NAME`` that the command line holds.
    """
    parser = argparse.ArgumentParser(
        prog="fedhaw compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cells", nargs="*", default=[], metavar="CELL", help="the federations; default: digits")
    parser.add_argument("--rules", nargs="+", required=True, metavar="RULE", help="the methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--model", metavar="CLASS", help="instead of a cell: a LightningModule by import path")
    parser.add_argument("--data", metavar="CLASS", help="instead of a cell: a LightningDataModule by import path")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[], help="what no federation does")
    parser.add_argument("--metric", help="default: an accuracy that is logged, else a loss")
    parser.add_argument("--target", type=float, help="a value of the metric: adds the rounds that it takes")
    parser.add_argument("--reference", metavar="LABEL", help="what the others are compared with; default: the first")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes; default: one a core, here %(default)s")
    parser.add_argument("--accelerator", default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder; default: %(default)s")
    add_picture_options(parser, PICTURE_FORMATS)
    settings = parser.add_argument_group("settings, each with one value or several")
    for name in SETTINGS:
        settings.add_argument(*_flags(name), nargs="+", type=_value, dest=f"setting {name}", metavar="VALUE")
    settings.add_argument(
        "--model.NAME", metavar="VALUE", dest="model_argument", help="an argument of the model; `--data.NAME` likewise"
    )
    for name in dotted:
        settings.add_argument(
            f"--{name}", nargs="+", type=_value, dest=f"setting {name}", metavar="VALUE", help=argparse.SUPPRESS
        )
    return parser


def _flags(name: str) -> list[str]:
    """Return the options of a setting: with hyphens, and as it is called in Python."""
    flags = [f"--{name.replace('_', '-')}"]
    if "_" in name:
        flags.append(f"--{name}")
    return flags


def _dotted(arguments: Sequence[str]) -> list[str]:
    """Return the names of all ``--model.NAME`` and ``--data.NAME``, each once."""
    names: dict[str, None] = {}
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        group, dot, setting = name.partition(".")
        is_dotted = argument.startswith("--") and dot and group in ("model", "data") and setting.isidentifier()
        # `--model.NAME` itself stands in the help, and is no setting.
        if is_dotted and setting != "NAME":
            names[name] = None
    return list(names)


def _value(text: str) -> object:
    """Return a number or another plain value; anything else stays text, which is read as an expression later."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _settings(args: argparse.Namespace) -> dict[str, list[object]]:
    settings: dict[str, list[object]] = {}
    for name, values in vars(args).items():
        if name.startswith("setting ") and values is not None:
            settings[name.removeprefix("setting ")] = values
    return settings


def _cells(args: argparse.Namespace) -> list[str]:
    """Return the cells, one of them perhaps of a module and a data module.

    Raises:
        ValueError: If only one of the two is given.
    """
    cells: list[str] = list(args.cells)
    if (args.model is None) != (args.data is None):
        raise ValueError("`--model` and `--data` come together: the class of the module and that of its data.")
    if args.model is not None:
        label = args.model.rpartition(".")[2]
        cells.append(f"{label}=custom(model={args.model}, data={args.data})")
    return cells or ["digits"]


def _unknown_sentence(parser: argparse.ArgumentParser, option: str) -> str:
    """Name the option that is nearest to an unknown one."""
    known: list[str] = []
    for action in parser._actions:
        known.extend(action.option_strings)
    name = option.partition("=")[0]
    if name == "--lr":
        return "There is no `--lr`: the learning rate is an argument of the model, `--model.lr`."
    matches = expressions.nearest(name, known)
    hint = matches if matches.startswith("Did") else "`fedhaw compare --help` lists all options."
    return f"There is no option `{name}`. {hint}"


def report(comparison: Comparison, formats: Sequence[str], theme_name: str) -> int:
    """Print tables and paths, draw the curves, and return the exit status: 1 if a run failed.

    Args:
        comparison: The results.
        formats: The formats of the pictures.
        theme_name: The theme of the pictures.
    """
    paths = [comparison.output / name for name in ("table.tex", "table.md", "results.csv", "results.json")]
    if comparison.records:
        print(f"\n{comparison.table()}\n{comparison.differences()}")
        try:
            with theme(theme_name):
                paths += comparison.draw(formats)
        except ModuleNotFoundError as error:
            print(f"{error} The tables are there without.", file=sys.stderr)
        print("written: " + ", ".join(map(str, paths)))
        first = comparison.records[0]["log"].split("/")
        print(f"draw again: fedhaw plot {comparison.output.joinpath(*first[:-2])}/*")
    for failure in comparison.failures:
        print(f"failed: {failure.plan.title}: {failure.error}", file=sys.stderr)
    if comparison.failures:
        path = comparison.output / "failures.txt"
        entries = [f"{failure.plan.title}\n{failure.details}" for failure in comparison.failures]
        path.write_text("\n".join(entries), encoding="utf-8")
        print(f"The tracebacks are in {path}; the same command tries these runs again.", file=sys.stderr)
        return 1
    return 0
