"""Pictures of runs over rounds. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fedhaw.federation.client_statistics import SPREAD, metrics_with_spread
from lightning_fedhaw.figures.base import (
    axis_label,
    color_and_style,
    new_figure,
    save_figure,
    tidy,
    use_whole_numbers,
)
from lightning_fedhaw.figures.panels import (
    LINES_IN_PANEL,
    add_legends,
    distinct,
    draw_median,
    grid_of_panels,
    height_of_lines,
    keep_outliers_out,
    panels_of_lines,
    shape_of_grid,
)
from lightning_fedhaw.report.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKED_STYLES = ("o-", "s--", "^:", "D-.")


def draw_curves(runs: Mapping[str, RunHistory], path: str | Path | None = None, metric: str = "val_acc") -> Figure:
    """Draw many runs' metric over rounds, and its mean over the last ten rounds, sorted.

    More than ten runs have a small panel each, with the median of all in gray.

    Args:
        runs: The history of each run, by name.
        path: Where the picture is saved; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    values = {}
    means = {}
    for name, history in runs.items():
        curve = history.curve(metric)
        values[name] = curve
        means[name] = sum(curve[-10:]) / len(curve[-10:])
    # The best run first, at the top of both parts.
    names = sorted(means, key=means.__getitem__, reverse=True)
    figure = new_figure(12, max(height_of_lines(len(runs), 2.6), 2.6 + 0.14 * len(runs)))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.6, 1))[0]
    panels = panels_of_lines(left, names, "round", axis_label(metric))
    bars = right.subplots()
    for index, name in enumerate(names):
        color, style = color_and_style(index)
        rounds = range(1, len(values[name]) + 1)
        panels[name].plot(rounds, values[name], style, color=color, label=name, linewidth=1.5)
        height = len(names) - 1 - index
        bars.plot(means[name], height, "o", color=color)
        bars.hlines(height, min(means.values()), means[name], colors=color, linestyles=style)
    bars.set(title="mean of the last ten rounds", xlabel=axis_label(metric))
    bars.set_yticks(range(len(names)), reversed(names))
    shown = distinct(panels.values())
    draw_median(shown, list(values.values()))
    use_whole_numbers(*shown)
    tidy(*shown, bars)
    keep_outliers_out(shown, metric)
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

    More than ten lines have a small panel each, with the median of all in gray.

    Args:
        positions: The values of the quantity, on the horizontal axis.
        lines: As many values for each method, by name.
        path: Where the picture is saved; its suffix chooses the format.
        xlabel: The label of the positions.
        ylabel: The label of the values.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = new_figure(7, height_of_lines(len(lines), 4.4))
    panels = panels_of_lines(figure, list(lines), xlabel, ylabel)
    for index, (name, values) in enumerate(lines.items()):
        color, _ = color_and_style(index)
        style = _MARKED_STYLES[index % len(_MARKED_STYLES)]
        panels[name].plot(positions, values, style, color=color, label=name, linewidth=1.5)
    shown = distinct(panels.values())
    draw_median(shown, list(lines.values()), positions)
    add_legends(*shown)
    tidy(*shown)
    keep_outliers_out(shown, ylabel)
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

    With more than ten groups each has a small panel, with the median of all in gray.

    Args:
        groups: The runs of each method, such as one for each seed, by name.
        metrics: The metrics. Groups that did not log one are absent from its panel.
        path: Where the picture is saved; its suffix chooses the format.
        log: Whether the metrics' axes are logarithmic; values of 0 are left out then.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    labels = {}
    for metric in metrics:
        labels[metric] = axis_label(metric)
    figure = figure_of_series(groups, labels, log=log)
    seeds = max(len(runs) for runs in groups.values())
    if seeds > 1:
        figure.supxlabel(f"mean and standard deviation over up to {seeds} runs", fontsize=9, alpha=0.7)
    save_figure(figure, path)
    return figure


def figure_of_series(
    groups: Mapping[str, Sequence[RunHistory]], labels: Mapping[str, str], *, log: bool = False
) -> Figure:
    """Draw series over rounds: a panel for each, or with more than ten groups a small panel for each group in it.

    Args:
        groups: The runs of each method, by name.
        labels: The label of each series, by the name under which it was logged.
        log: Whether the vertical axes are logarithmic.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    if len(groups) <= LINES_IN_PANEL:
        rows, columns = shape_of_grid(len(labels))
        figure = new_figure(1.0 + 4.4 * columns, 3.8 * rows)
        for (metric, label), axes in zip(labels.items(), grid_of_panels(figure, len(labels)), strict=True):
            axes.set(xlabel="round", ylabel=label)
            draw_series(dict.fromkeys(groups, axes), groups, metric, log=log)
        return figure
    figure = new_figure(10, height_of_lines(len(groups), 0) * len(labels))
    parts = figure.subfigures(len(labels), 1, squeeze=False)[:, 0]
    for (metric, label), part in zip(labels.items(), parts, strict=True):
        draw_series(panels_of_lines(part, list(groups), "round", label), groups, metric, log=log)
    return figure


def draw_series(
    panels: Mapping[str, Axes], groups: Mapping[str, Sequence[RunHistory]], metric: str, *, log: bool = False
) -> None:
    """Draw one metric of several methods over rounds.

    Args:
        panels: The panel of each method, by name; it may be the same for all.
        groups: The runs of each method, by name.
        metric: The name under which the metric was logged.
        log: Whether the vertical axis is logarithmic.
    """
    means = []
    for index, (name, runs) in enumerate(groups.items()):
        curves = [run.curve(metric) for run in runs]
        draw_band(panels[name], index, name, curves, log)
        means.append(mean_and_deviation(padded(curves))[0].tolist())
    shown = distinct(panels.values())
    draw_median(shown, means)
    for axes in shown:
        axes.margins(x=0.02)
        if log:
            axes.set_yscale("log")
    use_whole_numbers(*shown)
    add_legends(*shown)
    tidy(*shown)
    keep_outliers_out(shown, metric)


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
    mean, deviation = mean_and_deviation(values[:, rounds])
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


def draw_spread(groups: Mapping[str, Sequence[RunHistory]], metric: str, path: str | Path | None = None) -> Figure:
    """Draw how a metric is spread over the clients, round by round: the mean, between the worst and the best decile.

    Of several runs of a method, the means of their lines are drawn. A second panel has the standard deviations.
    More than three methods have small panels, because each has three lines.

    Args:
        groups: The runs of each method with ``client_eval_every_n_rounds``, by name.
        metric: The metric, as ``validation_step`` logs it.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has the metric.
    """
    logged = {name for runs in groups.values() for run in runs for name in run.names}
    measured = metrics_with_spread(sorted(logged))
    if metric not in measured:
        raise ValueError(
            "`metric` must be one whose spread was logged after rounds, with `client_eval_every_n_rounds`"
            f" ({readable_list(measured)}), got {metric!r}."
        )
    figure = new_figure(11, height_of_lines(len(groups), 4.2, lines_each=3))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.4, 1))[0]
    values = panels_of_lines(left, list(groups), "round", axis_label(metric), lines_each=3)
    deviations = panels_of_lines(right, list(groups), "round", f"standard deviation of {metric}")
    for index, (name, runs) in enumerate(groups.items()):
        _draw_deciles(values[name], index, name, runs, metric)
    shown = distinct(values.values())
    if len(shown) == 1:
        shown[0].set_title("mean of the clients, worst to best decile")
    else:
        left.suptitle("mean of the clients, worst to best decile")
    draw_series(deviations, groups, f"{metric}{SPREAD}std")
    use_whole_numbers(*shown)
    add_legends(*shown)
    tidy(*shown)
    keep_outliers_out(shown, metric)
    save_figure(figure, path)
    return figure


def _draw_deciles(axes: Axes, index: int, name: str, runs: Sequence[RunHistory], metric: str) -> None:
    """Draw the mean over clients and a band between the deciles, in the rounds in which they were measured."""
    lines = []
    for statistic in ("mean", "worst_decile", "best_decile"):
        curves = padded([run.curve(f"{metric}{SPREAD}{statistic}") for run in runs])
        lines.append(curves.nanmean(0))
    mean = lines[0]
    rounds = (~mean.isnan()).nonzero()[:, 0]
    if len(rounds) == 0:
        return
    color, style = color_and_style(index)
    # A curve of a single point has no line to see.
    marker = "o" if len(rounds) == 1 else None
    axes.plot(rounds + 1, mean[rounds], style, marker=marker, color=color, label=name, linewidth=2)
    axes.fill_between(rounds + 1, lines[1][rounds], lines[2][rounds], color=color, alpha=0.15, linewidth=0)
    # Edges in the method's style, which tell overlapping bands apart, in print too.
    for edge in lines[1:]:
        axes.plot(rounds + 1, edge[rounds], style, color=color, linewidth=0.6, label="_edge")


def padded(curves: Sequence[Sequence[float]]) -> Tensor:
    """Stack curves to ``[runs, rounds]``; short ones are filled up with NaN."""
    longest = max(len(curve) for curve in curves)
    stack = torch.full((len(curves), longest), nan, dtype=torch.float64)
    for row, curve in zip(stack, curves, strict=True):
        row[: len(curve)] = torch.tensor(curve, dtype=torch.float64)
    return stack


def mean_and_deviation(curves: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[rounds]`` over the runs that have a value, of curves ``[runs, rounds]``.

    The deviation is that of a sample, with n - 1; it is NaN where a single run has a value.
    """
    mean = curves.nanmean(0)
    counts = (~curves.isnan()).sum(0)
    deviation = ((curves - mean).square().nansum(0) / (counts - 1)).sqrt()
    return mean, deviation


def readable_list(names: Sequence[str]) -> str:
    """List names for a message."""
    return ", ".join(f"`{name}`" for name in names) or "none"
