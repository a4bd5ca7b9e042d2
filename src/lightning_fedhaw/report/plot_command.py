"""The command ``fedhaw plot``: every picture that some finished runs have the numbers for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_fedhaw.federation.client_statistics import SPREAD, metrics_with_spread
from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.figures.base import save_figure, theme
from lightning_fedhaw.figures.command_line import add_picture_options
from lightning_fedhaw.report.client_curves import draw_client_curves, metrics_of_each_client
from lightning_fedhaw.report.client_pictures import draw_clients, draw_labels, draw_weights
from lightning_fedhaw.report.history import RunHistory, read_runs
from lightning_fedhaw.report.plotting import draw_bands, draw_spread, readable_list

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    add_picture_options(parser)
    args = parser.parse_args(argv)
    pictures = []
    try:
        groups = read_groups(args.runs)
        with theme(args.theme):
            for name, figure in _draw_all(groups, args.metric):
                for suffix in args.formats:
                    picture = args.output / f"{name}.{suffix}"
                    save_figure(figure, picture)
                    pictures.append(picture)
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


def _draw_all(groups: Mapping[str, Sequence[RunHistory]], metric: str | None) -> Iterator[tuple[str, Figure]]:
    """Draw every picture for which some run has the numbers.

    Args:
        groups: The runs of each method, by name.
        metric: The metric of the curves; by default an accuracy if one was logged, else a loss.

    Yields:
        The name of each picture's file, without a suffix, and the picture.
    """
    for name, figure in chain(_pictures_of_rounds(groups, metric), _pictures_of_methods(groups)):
        # Names of metrics have slashes, and those of methods brackets.
        yield re.sub(r"[^A-Za-z0-9.=+-]+", "_", name), figure


def _pictures_of_rounds(groups: Mapping[str, Sequence[RunHistory]], metric: str | None) -> Iterator[tuple[str, Figure]]:
    """Draw what all methods logged over rounds, and their results on the clients."""
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
    yield metric, draw_bands(groups, [metric])
    if "scale" in logged:
        yield "scale", draw_bands(groups, ["scale"])
    learned = []
    hypergradients = []
    for name in logged:
        if name.startswith("learned/"):
            learned.append(name)
        elif name.startswith("hypergradient_"):
            hypergradients.append(name)
    if learned:
        yield "learned", draw_bands(groups, learned)
    if hypergradients:
        yield "hypergradients", draw_bands(groups, hypergradients, log=True)
    for diagnostic, series in _observed(logged).items():
        yield diagnostic, draw_bands(groups, series)
    for spread in metrics_with_spread(logged):
        yield f"{spread}_over_clients", draw_spread(groups, spread)
    if any(metric in run.clients for run in runs):
        yield f"{metric}_of_clients", draw_clients(groups, metric)
    for name, group in groups.items():
        if metric in metrics_of_each_client(group[0]):
            yield f"{name}_{metric}_of_each_client", draw_client_curves(group[0], metric)


def _pictures_of_methods(groups: Mapping[str, Sequence[RunHistory]]) -> Iterator[tuple[str, Figure]]:
    """Draw each split and the weights of each method; one run a method, since its runs differ by their seeds only."""
    splits = _distinct_splits(groups)
    for name, run in splits.items():
        # The name of the method says nothing where all have the same split.
        picture = "labels"
        if len(splits) > 1:
            picture = f"{name}_labels"
        yield picture, draw_labels(run)
    for name, group in groups.items():
        if group[0].weight_changes() is not None:
            yield f"{name}_weights", draw_weights(group[0], title=f"weights that {name} learned")


def _distinct_splits(groups: Mapping[str, Sequence[RunHistory]]) -> dict[str, RunHistory]:
    """Return a run for each split of the data, by the name of the first method that has it."""
    splits: dict[str, RunHistory] = {}
    for name, group in groups.items():
        run = group[0]
        if run.sizes and not any(_have_same_split(run, other) for other in splits.values()):
            splits[name] = run
    return splits


def _have_same_split(run: RunHistory, other: RunHistory) -> bool:
    """Return whether the clients of two runs have as many samples of each class."""
    if run.labels is None or other.labels is None:
        return run.labels is other.labels and run.sizes == other.sizes
    return torch.equal(run.labels, other.labels)


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
