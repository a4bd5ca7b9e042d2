"""Pictures of runs. Needs matplotlib: ``pip install "lightning-fedhaw[plot]"``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fedhaw.data.preview import draw_histogram
from lightning_fedhaw.report.history import RunHistory, read_run, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "RunHistory",
    "draw_bands",
    "draw_clients",
    "draw_comparison",
    "draw_curves",
    "draw_labels",
    "draw_lines",
    "draw_weights",
    "main",
    "read_run",
    "read_runs",
]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MOST_LABELS = 40


def draw_comparison(
    runs: Mapping[str, RunHistory],
    learned: str,
    sizes: Sequence[int],
    path: str | Path | None = None,
    metric: str = "val_acc",
) -> Figure:
    """Several runs' metric and scale over rounds, and the weights that one of them learned.

    Args:
        runs: What each run logged, by name.
        learned: The run whose weights are drawn.
        sizes: Training samples of each client, ``[N]``.
        path: Where the picture goes; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = _figure(11, 4.8)
    panels = figure.subplot_mosaic([["curves", "heat"], ["scale", "heat"]], width_ratios=(1, 1.1), height_ratios=(2, 1))
    curves, scale, heat = panels["curves"], panels["scale"], panels["heat"]
    for color, (name, history) in zip(_COLORS, runs.items(), strict=False):
        values = history.curve(metric)
        rounds = range(1, len(values) + 1)
        curves.plot(rounds, values, color=color, label=name, linewidth=2)
        scales = [1.0 if value != value else value for value in history.curve("scale")]
        scale.plot(rounds, scales, color=color, linewidth=2)
    curves.set(ylabel=metric, title=f"{metric} of the global model")
    curves.legend(frameon=False)
    scale.set(xlabel="round", ylabel="scale")
    _whole_numbers(curves, scale)
    _tidy(curves, scale)
    _heat(heat, runs[learned], sizes)
    heat.set_title(f"weights that {learned} learned")
    return _saved(figure, path)


def draw_curves(runs: Mapping[str, RunHistory], path: str | Path | None = None, metric: str = "val_acc") -> Figure:
    """Many runs' metric over rounds, each labeled at its end, and its mean over the last ten rounds.

    Args:
        runs: What each run logged, by name.
        path: Where the picture goes; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = _figure(11, 2.6 + 0.14 * len(runs))
    curves, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
    values = {name: history.curve(metric) for name, history in runs.items()}
    means = {name: sum(curve[-10:]) / len(curve[-10:]) for name, curve in values.items()}
    order = sorted(means, key=means.__getitem__)
    for i, name in enumerate(reversed(order)):
        color, style = _look(i)
        curves.plot(range(1, len(values[name]) + 1), values[name], style, color=color, label=name, linewidth=1.5)
        bars.plot(means[name], len(order) - 1 - i, "o", color=color)
        bars.hlines(len(order) - 1 - i, min(means.values()), means[name], colors=color, linestyles=style)
    curves.set(xlabel="round", ylabel=metric, title=f"{metric} of the global model")
    bars.set(title="mean of the last ten rounds", xlabel=metric)
    bars.set_yticks(range(len(order)), order)
    _whole_numbers(curves)
    _tidy(curves, bars)
    return _saved(figure, path)


def draw_lines(
    positions: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    path: str | Path | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """One line for each of several methods over some quantity.

    Args:
        positions: Where the values belong.
        lines: As many values for each name.
        path: Where the picture goes; its suffix chooses the format.
        xlabel: What the positions are.
        ylabel: What the values are.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    for i, (name, values) in enumerate(lines.items()):
        style = ("o-", "s--", "^:", "D-.")[i // len(_COLORS) % 4]
        axes.plot(positions, values, style, color=_COLORS[i % len(_COLORS)], label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    _tidy(axes)
    return _saved(figure, path)


def draw_bands(
    groups: Mapping[str, Sequence[RunHistory]],
    metrics: Sequence[str],
    path: str | Path | None = None,
    *,
    log: bool = False,
) -> Figure:
    """Metrics over rounds, a panel for each: means over the runs of a group, and bands of one standard deviation.

    Args:
        groups: The runs of each method, such as one for each seed, by name.
        metrics: The metrics. Groups that did not log one are absent from its panel.
        path: Where the picture goes; its suffix chooses the format.
        log: Whether the metrics' axes are logarithmic; values of 0 are left out then.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = _figure(1.4 + 5.2 * len(metrics), 4.2)
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        for i, (name, runs) in enumerate(groups.items()):
            color, style = _look(i)
            curves = _aligned([run.curve(metric) for run in runs])
            rounds = (~curves.isnan()).any(0).nonzero()[:, 0]
            mean, deviation = _spread(curves[:, rounds])
            keep = (mean > 0) if log else torch.ones_like(mean, dtype=torch.bool)
            if not keep.any():
                continue
            at, mean, deviation = rounds[keep] + 1, mean[keep], deviation[keep]
            low = torch.maximum(mean - deviation, mean / 10) if log else mean - deviation
            axes.plot(at, mean, style, marker="o" if len(at) == 1 else None, color=color, label=name, linewidth=2)
            if len(runs) > 1:
                axes.fill_between(at, low, mean + deviation, color=color, alpha=0.18, linewidth=0)
        axes.set(xlabel="round", title=metric, yscale="log" if log else "linear")
        axes.margins(x=0.02)
        _whole_numbers(axes)
        if axes.get_lines():
            axes.legend(frameon=False)
        _tidy(axes)
    seeds = max(len(runs) for runs in groups.values())
    if seeds > 1:
        figure.supxlabel(f"mean and standard deviation over up to {seeds} runs", fontsize=9, color="0.4")
    return _saved(figure, path)


def draw_weights(history: RunHistory, path: str | Path | None = None, title: str = "aggregation weights") -> Figure:
    """Weights over rounds, against each client's share of the samples received that round; largest client on top.

    Args:
        history: The run.
        path: Where the picture goes; its suffix chooses the format.
        title: The picture's title.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the run kept no weights.
    """
    if not len(history.weights):
        raise ValueError("The run kept no weights: it has no `weights.csv` and no round, or more than 1,000 clients.")
    figure = _figure(7.2, min(1.8 + 0.24 * len(history.sizes), 8.0))
    axes = figure.subplots()
    _heat(axes, history, history.sizes)
    axes.set_title(title)
    return _saved(figure, path)


def draw_clients(groups: Mapping[str, Sequence[RunHistory]], metric: str, path: str | Path | None = None) -> Figure:
    """A metric of the final model on each client's own data: client by client, and from the worst client to the best.

    Args:
        groups: The runs of each method, by name. The left panel shows the first of each.
        metric: The metric.
        path: Where the picture goes; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has the metric.
    """
    measured = {name: [run for run in runs if metric in run.clients] for name, runs in groups.items()}
    measured = {name: runs for name, runs in measured.items() if runs}
    if not measured:
        there = sorted({known for runs in groups.values() for run in runs for known in run.clients})
        raise ValueError(f"`metric` must be one that was measured on the clients ({_list(there)}), got {metric!r}.")
    sizes = max((runs[0].sizes for runs in measured.values()), key=len)
    figure = _figure(11, min(1.6 + 0.24 * len(sizes), 8.0) if len(sizes) > 12 else 4.2)
    each, ranked = figure.subplots(1, 2, width_ratios=(1, 1.15))
    row = {client: i for i, client in enumerate(_largest_first(sizes))}
    for i, (name, runs) in enumerate(measured.items()):
        color, style = _look(i)
        values = runs[0].clients[metric]
        each.plot(values, [row[k] for k in range(len(values))], "o", color=color, alpha=0.85, markersize=5, label=name)
        mean, deviation = _spread(_aligned([sorted(run.clients[metric]) for run in runs]))
        at = 100 * torch.arange(1, len(mean) + 1) / len(mean)
        ranked.plot(at, mean, style, color=color, linewidth=2, label=name)
        if len(runs) > 1:
            ranked.fill_between(at, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
    _client_ticks(each, sizes)
    each.set_ylim(len(sizes) - 0.4, -0.6)
    seeds = max(map(len, measured.values()))
    each.set(xlabel=metric, title="client by client" + ", first run" * (seeds > 1))
    ranked.set(xlabel="clients, worst first, %", ylabel=metric, title="from the worst client to the best")
    ranked.legend(frameon=False)
    _tidy(each, ranked)
    return _saved(figure, path)


def draw_labels(history: RunHistory, path: str | Path | None = None) -> Figure:
    """Who owned what: one bar per client with a color for each class, or its size where the labels are not known.

    Args:
        history: The run.
        path: Where the picture goes; its suffix chooses the format.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if history.labels is not None:
        return draw_histogram(history.labels, path, history.class_names)
    return draw_histogram(torch.tensor(history.sizes)[:, None], path, ["any"])


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw what there is to draw of some runs, and say where it went: the command ``fedhaw plot``.

    Args:
        argv: The command line; that of the process by default.

    Returns:
        The pictures.
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
    """Runs by name.

    Args:
        runs: Each ``path`` or ``name=path``. Without a name, a path's own is taken, and that of the folder around it
            where Lightning has numbered the runs. All runs below a path have its name.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there is no run below it.
    """
    groups: dict[str, list[RunHistory]] = {}
    for each in runs:
        name, is_named, path = each.partition("=")
        if not is_named or "/" in name or Path(each).exists():
            name, path = "", each
        groups.setdefault(name or _name(Path(path)), []).extend(read_runs(path))
    return groups


def _name(path: Path) -> str:
    where = path.resolve()
    while where.is_file() or where.name == "checkpoints":
        where = where.parent
    return (
        f"{where.parent.name}/{where.name}"
        if re.fullmatch(r"((version|seed|run)[_-]?)?\d+", where.name)
        else where.name
    )


def _draw_all(groups: Mapping[str, Sequence[RunHistory]], metric: str | None, folder: Path) -> list[Path]:
    """Everything that some run has the numbers for."""
    logged = sorted({name for runs in groups.values() for run in runs for name in run.names})
    if metric is None:
        metric = next((n for part in ("val_acc", "acc", "val_loss", "loss") for n in logged if part in n), None)
    if metric is None or metric not in logged:
        raise ValueError(f"`--metric` must be one that the runs logged ({_list(logged)}), got {metric!r}.")
    pictures = []

    def draw(name: str, function: Any, *arguments: Any, **options: Any) -> None:
        pictures.append(folder / f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)}.png")
        function(*arguments, path=pictures[-1], **options)

    draw(metric, draw_bands, groups, [metric])
    if "scale" in logged:
        draw("scale", draw_bands, groups, ["scale"])
    if hypergradients := [name for name in logged if name.startswith("hypergradient_")]:
        draw("hypergradients", draw_bands, groups, hypergradients, log=True)
    if any(metric in run.clients for runs in groups.values() for run in runs):
        draw(f"{metric}_of_clients", draw_clients, groups, metric)
    for name, (run, *_) in groups.items():
        if run.sizes:
            draw(f"{name}_labels", draw_labels, run)
        if run.weight_changes() is not None:
            draw(f"{name}_weights", draw_weights, run, title=f"weights that {name} learned")
    return pictures


def _figure(width: float, height: float) -> Any:
    """A figure that belongs to no window and to no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pictures need matplotlib, which is not installed: `pip install "lightning-fedhaw[plot]"`.'
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure  # type: ignore[no-any-return]


def _tidy(*panels: Any) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _look(i: int) -> tuple[str, str]:
    """Color and line style of the i-th method."""
    return _COLORS[i % len(_COLORS)], _STYLES[i // len(_COLORS) % len(_STYLES)]


def _heat(axes: Any, history: RunHistory, sizes: Sequence[int]) -> None:
    """The change of weights against shares of samples, and its color bar."""
    changes = history.weight_changes()
    if changes is None:
        changes = torch.where(history.weights.isnan(), torch.nan, 0.0)
    limit = max(1e-3, changes.nan_to_num(0.0).abs().max().item())
    order = _largest_first(sizes)
    image = axes.imshow(
        changes.T[order].numpy() * 100,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-100 * limit,
        vmax=100 * limit,
        interpolation="nearest",
        extent=(0.5, len(changes) + 0.5, len(sizes) - 0.5, -0.5),
    )
    axes.set_facecolor("0.85")
    axes.set(xlabel="round")
    _whole_numbers(axes)
    _client_ticks(axes, sizes)
    axes.figure.colorbar(image, ax=axes, label="change against the share of samples, %")


def _client_ticks(axes: Any, sizes: Sequence[int]) -> None:
    names = [f"client {k}  ({sizes[k]:,})" for k in _largest_first(sizes)]
    if len(sizes) <= _MOST_LABELS:
        axes.set_yticks(range(len(sizes)), names)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(sizes)} clients, largest first")
    axes.tick_params(axis="y", length=0)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda client: -sizes[client])


def _whole_numbers(*panels: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def _aligned(curves: Sequence[Sequence[float]]) -> Tensor:
    """``[runs, rounds]``, short runs filled up with NaN."""
    longest = max(len(curve) for curve in curves)
    rows = [[*curve, *[torch.nan] * (longest - len(curve))] for curve in curves]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(curves), longest)


def _spread(curves: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over runs, of those that have a value."""
    mean = curves.nanmean(0)
    return mean, (curves - mean).square().nanmean(0).sqrt()


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
