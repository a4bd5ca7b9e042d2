"""Pictures of runs. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fedhaw.data.preview import draw_histogram
from lightning_fedhaw.report.history import RunHistory, read_run, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    "read_run",
    "read_runs",
]

# Okabe and Ito's palette, which color-blind people can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MARKED_STYLES = ("o-", "s--", "^:", "D-.")
_MOST_LABELS = 40


def draw_comparison(
    runs: Mapping[str, RunHistory],
    learned: str,
    sizes: Sequence[int],
    path: str | Path | None = None,
    metric: str = "val_acc",
) -> Figure:
    """Draw several runs' metric and scale over rounds, and the weights that one of them learned.

    Args:
        runs: The history of each run, by name.
        learned: The name of the run whose weights are drawn.
        sizes: Training samples of each client, ``[N]``.
        path: Where the picture is saved; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = new_figure(11, 4.8)
    panels = figure.subplot_mosaic([["curves", "heat"], ["scale", "heat"]], width_ratios=(1, 1.1), height_ratios=(2, 1))
    curves = panels["curves"]
    scale = panels["scale"]
    heat = panels["heat"]
    for color, (name, history) in zip(_COLORS, runs.items(), strict=False):
        values = history.curve(metric)
        rounds = range(1, len(values) + 1)
        curves.plot(rounds, values, color=color, label=name, linewidth=2)
        # A rule that learns no scale uses 1, and so does every rule in a round that was skipped.
        scales = [1.0 if isnan(value) else value for value in history.curve("scale")]
        scale.plot(rounds, scales, color=color, linewidth=2)
    curves.set(ylabel=metric, title=f"{metric} of the global model")
    curves.legend(frameon=False)
    scale.set(xlabel="round", ylabel="scale")
    use_whole_numbers(curves, scale)
    tidy(curves, scale)
    _draw_heat_map(heat, runs[learned], sizes)
    heat.set_title(f"weights that {learned} learned")
    save_figure(figure, path)
    return figure


def draw_curves(runs: Mapping[str, RunHistory], path: str | Path | None = None, metric: str = "val_acc") -> Figure:
    """Draw many runs' metric over rounds, and its mean over the last ten rounds, sorted.

    Args:
        runs: The history of each run, by name.
        path: Where the picture is saved; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = new_figure(11, 2.6 + 0.14 * len(runs))
    curves, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
    values = {}
    means = {}
    for name, history in runs.items():
        curve = history.curve(metric)
        values[name] = curve
        means[name] = sum(curve[-10:]) / len(curve[-10:])
    names = sorted(means, key=means.__getitem__)
    for index, name in enumerate(reversed(names)):
        color, style = color_and_style(index)
        curves.plot(range(1, len(values[name]) + 1), values[name], style, color=color, label=name, linewidth=1.5)
        # The best run is at the top, where the curves' colors begin.
        height = len(names) - 1 - index
        bars.plot(means[name], height, "o", color=color)
        bars.hlines(height, min(means.values()), means[name], colors=color, linestyles=style)
    curves.set(xlabel="round", ylabel=metric, title=f"{metric} of the global model")
    bars.set(title="mean of the last ten rounds", xlabel=metric)
    bars.set_yticks(range(len(names)), names)
    use_whole_numbers(curves)
    tidy(curves, bars)
    save_figure(figure, path)
    return figure


def draw_lines(
    positions: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    path: str | Path | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Draw one line for each of several methods over some quantity.

    Args:
        positions: The values of the quantity, on the horizontal axis.
        lines: As many values for each method, by name.
        path: Where the picture is saved; its suffix chooses the format.
        xlabel: The label of the positions.
        ylabel: The label of the values.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    for index, (name, values) in enumerate(lines.items()):
        color, _ = color_and_style(index)
        style = _MARKED_STYLES[index % len(_MARKED_STYLES)]
        axes.plot(positions, values, style, color=color, label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    tidy(axes)
    save_figure(figure, path)
    return figure


def draw_bands(
    groups: Mapping[str, Sequence[RunHistory]],
    metrics: Sequence[str],
    path: str | Path | None = None,
    *,
    log: bool = False,
) -> Figure:
    """Draw metrics over rounds, a panel for each: means over the runs of a group, and bands of one standard deviation.

    Args:
        groups: The runs of each method, such as one for each seed, by name.
        metrics: The metrics. Groups that did not log one are absent from its panel.
        path: Where the picture is saved; its suffix chooses the format.
        log: Whether the metrics' axes are logarithmic; values of 0 are left out then.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = new_figure(1.4 + 5.2 * len(metrics), 4.2)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    scale = "log" if log else "linear"
    for metric, axes in zip(metrics, panels, strict=True):
        for index, (name, runs) in enumerate(groups.items()):
            draw_band(axes, index, name, [run.curve(metric) for run in runs], log)
        axes.set(xlabel="round", title=metric, yscale=scale)
        axes.margins(x=0.02)
        use_whole_numbers(axes)
        # Without a line there is no legend, and matplotlib would warn.
        if axes.get_lines():
            axes.legend(frameon=False)
        tidy(axes)
    seeds = max(len(runs) for runs in groups.values())
    if seeds > 1:
        figure.supxlabel(f"mean and standard deviation over up to {seeds} runs", fontsize=9, color="0.4")
    save_figure(figure, path)
    return figure


def draw_band(axes: Axes, index: int, name: str, curves: Sequence[Sequence[float]], log: bool) -> None:
    """Draw the mean of some curves and, where there are several, a band of one standard deviation.

    Args:
        axes: The panel.
        index: The place of the method among all, which chooses color and style.
        name: The name of the method.
        curves: One curve of each run.
        log: Whether the axis is logarithmic.
    """
    color, style = color_and_style(index)
    values = padded(curves)
    rounds = (~values.isnan()).any(0).nonzero()[:, 0]
    mean, deviation = _mean_and_deviation(values[:, rounds])
    if log:
        is_positive = mean > 0
        rounds = rounds[is_positive]
        mean = mean[is_positive]
        deviation = deviation[is_positive]
    if len(mean) == 0:
        return
    # A curve of a single point has no line to see.
    marker = "o" if len(mean) == 1 else None
    axes.plot(rounds + 1, mean, style, marker=marker, color=color, label=name, linewidth=2)
    if len(curves) > 1:
        low = mean - deviation
        if log:
            # A band that reaches 0 would have no lower edge on a logarithmic axis.
            low = torch.maximum(low, mean / 10)
        axes.fill_between(rounds + 1, low, mean + deviation, color=color, alpha=0.18, linewidth=0)


def draw_weights(history: RunHistory, path: str | Path | None = None, title: str = "aggregation weights") -> Figure:
    """Draw weights over rounds, relative to each client's share of the samples received that round.

    The largest client is on top.

    Args:
        history: The history of the run.
        path: Where the picture is saved; its suffix chooses the format.
        title: The title of the picture.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the history has no weights.
    """
    if not len(history.weights):
        raise ValueError("The run kept no weights: it has no `weights.csv` and no round, or more than 1,000 clients.")
    figure = new_figure(7.2, min(1.8 + 0.24 * len(history.sizes), 8.0))
    axes = figure.subplots()
    _draw_heat_map(axes, history, history.sizes)
    axes.set_title(title)
    save_figure(figure, path)
    return figure


def draw_clients(groups: Mapping[str, Sequence[RunHistory]], metric: str, path: str | Path | None = None) -> Figure:
    """Draw a metric of the final model on each client's own data: client by client, and from the worst to the best.

    Args:
        groups: The runs of each method, by name. The left panel shows the first of each.
        metric: The metric.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has the metric.
    """
    measured = _runs_with_client_metric(groups, metric)
    if not measured:
        raise ValueError(
            f"`metric` must be one that was measured on the clients ({readable_list(_client_metrics(groups))}),"
            f" got {metric!r}."
        )
    sizes = max((runs[0].sizes for runs in measured.values()), key=len)
    height = 4.2
    if len(sizes) > 12:
        height = min(1.6 + 0.24 * len(sizes), 8.0)
    figure = new_figure(11, height)
    by_client, ranked = figure.subplots(1, 2, width_ratios=(1, 1.15))
    row_of = {client: row for row, client in enumerate(_largest_first(sizes))}
    for index, (name, runs) in enumerate(measured.items()):
        color, style = color_and_style(index)
        values = runs[0].clients[metric]
        rows = [row_of[client] for client in range(len(values))]
        by_client.plot(values, rows, "o", color=color, alpha=0.85, markersize=5, label=name)
        # Ranks, because client 3 of one seed is another client than client 3 of the next.
        values_by_rank = [_sorted_values(run.clients[metric]) for run in runs]
        mean, deviation = _mean_and_deviation(padded(values_by_rank))
        percent = 100 * torch.arange(1, len(mean) + 1) / len(mean)
        ranked.plot(percent, mean, style, color=color, linewidth=2, label=name)
        if len(runs) > 1:
            ranked.fill_between(percent, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
    _label_clients(by_client, sizes)
    by_client.set_ylim(len(sizes) - 0.4, -0.6)
    title = "client by client"
    if any(len(runs) > 1 for runs in measured.values()):
        title += ", first run"
    by_client.set(xlabel=metric, title=title)
    ranked.set(xlabel="clients, worst first, %", ylabel=metric, title="from the worst client to the best")
    ranked.legend(frameon=False)
    tidy(by_client, ranked)
    save_figure(figure, path)
    return figure


def _runs_with_client_metric(
    groups: Mapping[str, Sequence[RunHistory]], metric: str
) -> dict[str, Sequence[RunHistory]]:
    """Return the runs that measured a metric on each client; groups without such a run are left out."""
    measured: dict[str, Sequence[RunHistory]] = {}
    for name, runs in groups.items():
        runs_with_metric = []
        for run in runs:
            if metric in run.clients:
                runs_with_metric.append(run)
        if runs_with_metric:
            measured[name] = runs_with_metric
    return measured


def _client_metrics(groups: Mapping[str, Sequence[RunHistory]]) -> list[str]:
    """List all metrics that some run measured on each client."""
    metrics: set[str] = set()
    for runs in groups.values():
        for run in runs:
            metrics |= run.clients.keys()
    return sorted(metrics)


def draw_labels(history: RunHistory, path: str | Path | None = None) -> Figure:
    """Draw the label histogram of every client, or its size where the labels are not known.

    Args:
        history: The history of the run.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if history.labels is not None:
        return draw_histogram(history.labels, path, history.class_names)
    return draw_histogram(torch.tensor(history.sizes)[:, None], path, ["any"])


def new_figure(width: float, height: float) -> Figure:
    """Create a figure that belongs to no window and to no global state.

    Args:
        width: Its width in inches.
        height: Its height in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed: `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def tidy(*panels: Axes) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def color_and_style(index: int) -> tuple[str, str]:
    """Return color and line style of the method with a number; both differ between neighbors, for prints in gray."""
    color = _COLORS[index % len(_COLORS)]
    style = _STYLES[index % len(_STYLES)]
    return color, style


def _draw_heat_map(axes: Axes, history: RunHistory, sizes: Sequence[int]) -> None:
    """Draw the change of weights relative to the shares of samples, and its color bar.

    Args:
        axes: The panel.
        history: The history of the run.
        sizes: Training samples of each client, ``[N]``.
    """
    changes = history.weight_changes()
    if changes is None:
        # Every weight is its share of the samples: a change of 0 where an update was received.
        changes = torch.where(history.weights.isnan(), nan, 0.0)
    # Symmetric around 0, so that white is no change; the smallest range keeps rounding from filling the colors.
    limit = 100 * max(1e-3, changes.nan_to_num(0.0).abs().max().item())
    image = axes.imshow(
        changes.T[_largest_first(sizes)].numpy() * 100,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=(0.5, len(changes) + 0.5, len(sizes) - 0.5, -0.5),
    )
    axes.set_facecolor("0.85")
    axes.set(xlabel="round")
    use_whole_numbers(axes)
    _label_clients(axes, sizes)
    axes.figure.colorbar(image, ax=axes, label="change against the share of samples, %")


def _label_clients(axes: Axes, sizes: Sequence[int]) -> None:
    """Label the rows of a panel with the clients and their samples, or say how many there are if they are too many."""
    if len(sizes) <= _MOST_LABELS:
        names = [f"client {client}  ({sizes[client]:,})" for client in _largest_first(sizes)]
        axes.set_yticks(range(len(sizes)), names)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(sizes)} clients, largest first")
    axes.tick_params(axis="y", length=0)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    """Sort clients by their samples; clients of one size stay in order."""
    return sorted(range(len(sizes)), key=lambda client: -sizes[client])


def use_whole_numbers(*panels: Axes) -> None:
    """Label the horizontal axis with whole numbers: there is no round 2.5."""
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def padded(curves: Sequence[Sequence[float]]) -> Tensor:
    """Stack curves to ``[runs, rounds]``; short ones are filled up with NaN."""
    longest = max(len(curve) for curve in curves)
    stack = torch.full((len(curves), longest), nan, dtype=torch.float64)
    for row, curve in zip(stack, curves, strict=True):
        row[: len(curve)] = torch.tensor(curve, dtype=torch.float64)
    return stack


def _sorted_values(values: Sequence[float]) -> list[float]:
    """Sort values, without those of clients for which a metric is undefined."""
    return sorted(value for value in values if not isnan(value))


def _mean_and_deviation(curves: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[rounds]`` over the runs that have a value, of curves ``[runs, rounds]``.

    The deviation is that of a sample, with n - 1; it is NaN where a single run has a value.
    """
    mean = curves.nanmean(0)
    counts = (~curves.isnan()).sum(0)
    deviation = ((curves - mean).square().nansum(0) / (counts - 1)).sqrt()
    return mean, deviation


def readable_list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
