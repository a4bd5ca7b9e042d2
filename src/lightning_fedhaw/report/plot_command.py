"""The command ``fedhaw plot``: every picture that some finished runs have the numbers for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from lightning_fedhaw.federation.client_statistics import SPREAD, metrics_with_spread
from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.report.client_pictures import draw_client_curves, draw_spread, metrics_of_each_client
from lightning_fedhaw.report.history import RunHistory, read_runs
from lightning_fedhaw.report.plotting import (
    draw_bands,
    draw_clients,
    draw_labels,
    draw_weights,
    readable_list,
)

_BEST_METRICS = ("val_acc", "acc", "val_loss", "loss")


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the pictures of some runs and print their paths: the command ``fedhaw plot``.

    Args:
        argv: The command line; that of the process by default.

    Returns:
        The paths of the pictures.
    """
    parser = argparse.ArgumentParser(
        prog="fedhaw plot",
        description="Pictures of finished runs: metric, scale and hypergradients over rounds, and each run's learned"
        " weights, label histogram and clients.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a CSVLogger's folder, a checkpoint, or a folder of either; runs of one name are seeds of one method",
    )
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder of the pictures")
    parser.add_argument("--metric", help="what the curves show; default: an accuracy, else a loss")
    args = parser.parse_args(argv)
    try:
        groups = read_groups(args.runs)
        pictures = _draw_all(groups, args.metric, args.output)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    for picture in pictures:
        print(picture)
    return pictures


def read_groups(runs: Sequence[str]) -> dict[str, list[RunHistory]]:
    """Read runs and group them by name.

    Args:
        runs: Each ``path`` or ``name=path``. Without a name, that of the path is used, with that of the folder around
            it where Lightning has numbered the runs. All runs below a path have its name.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there is no run below it.
    """
    groups: dict[str, list[RunHistory]] = {}
    for argument in runs:
        name, separator, path = argument.partition("=")
        # Paths may hold "=" themselves, as the names of checkpoints do.
        is_path = not separator or "/" in name or Path(argument).exists()
        if is_path:
            name = ""
            path = argument
        groups.setdefault(name or _name(Path(path)), []).extend(read_runs(path))
    return groups


def _name(path: Path) -> str:
    """Return the name of a run by the folder that it is in."""
    folder = path.resolve()
    while folder.is_file() or folder.name == "checkpoints":
        folder = folder.parent
    if re.fullmatch(r"((version|seed|run)[_-]?)?\d+", folder.name):
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


def _draw_all(groups: Mapping[str, Sequence[RunHistory]], metric: str | None, folder: Path) -> list[Path]:
    """Draw every picture for which some run has the numbers.

    Args:
        groups: The runs of each method, by name.
        metric: The metric of the curves; by default an accuracy if one was logged, else a loss.
        folder: Where the pictures are saved.

    Returns:
        The paths of the pictures.
    """
    runs = list(chain.from_iterable(groups.values()))
    names: set[str] = set()
    for run in runs:
        names.update(run.names)
    logged = sorted(names)
    if metric is None:
        # Of the global model, if it was validated.
        metric = best_metric([name for name in logged if SPREAD not in name]) or best_metric(logged)
    if metric is None or metric not in logged:
        raise ValueError(f"`--metric` must be one that the runs logged ({readable_list(logged)}), got {metric!r}.")
    pictures: list[Path] = []

    def path_of(name: str) -> Path:
        """Return the path of the next picture, and add it to the list."""
        # Names of metrics have slashes, and those of methods brackets.
        pictures.append(folder / f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)}.png")
        return pictures[-1]

    draw_bands(groups, [metric], path_of(metric))
    if "scale" in logged:
        draw_bands(groups, ["scale"], path_of("scale"))
    learned = []
    hypergradients = []
    for name in logged:
        if name.startswith("learned/"):
            learned.append(name)
        elif name.startswith("hypergradient_"):
            hypergradients.append(name)
    if learned:
        draw_bands(groups, learned, path_of("learned"))
    if hypergradients:
        draw_bands(groups, hypergradients, path_of("hypergradients"), log=True)
    for diagnostic, series in _observed(logged).items():
        draw_bands(groups, series, path_of(diagnostic))
    for spread in metrics_with_spread(logged):
        draw_spread(groups, spread, path_of(f"{spread}_over_clients"))
    if any(metric in run.clients for run in runs):
        draw_clients(groups, metric, path_of(f"{metric}_of_clients"))
    for name, group in groups.items():
        # One picture a method: its runs differ by their seeds only.
        run = group[0]
        if run.sizes:
            draw_labels(run, path_of(f"{name}_labels"))
        if metric in metrics_of_each_client(run):
            draw_client_curves(run, metric, path_of(f"{name}_{metric}_of_each_client"))
        if run.weight_changes() is not None:
            draw_weights(run, path_of(f"{name}_weights"), f"weights that {name} learned")
    return pictures


def _observed(names: Sequence[str]) -> dict[str, list[str]]:
    """Group what observers have measured by the observer; numbers of single layers are left out."""
    observed: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        if name.startswith(PREFIX) and len(parts) <= 3:
            observed.setdefault(parts[1], []).append(name)
    return observed


def best_metric(names: Sequence[str]) -> str | None:
    """Return the first name that is of an accuracy, else of a loss; None if there is neither."""
    for kind in _BEST_METRICS:
        for name in names:
            if kind in name:
                return name
    return None
