"""Pictures of single clients: their weights, labels and results. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_fedhaw.data.preview import draw_histogram
from lightning_fedhaw.figures.base import (
    axis_label,
    color_and_style,
    new_figure,
    plain_number,
    save_figure,
    tidy,
    use_whole_numbers,
)
from lightning_fedhaw.figures.panels import (
    LINES_IN_PANEL,
    add_legends,
    distinct,
    height_of_lines,
    keep_outliers_out,
    panels_of_lines,
)
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.plotting import mean_and_deviation, padded, readable_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

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
    for index, (name, history) in enumerate(runs.items()):
        color, style = color_and_style(index)
        values = history.curve(metric)
        rounds = range(1, len(values) + 1)
        curves.plot(rounds, values, style, color=color, label=name, linewidth=2)
        # A rule that learns no scale uses 1, and so does every rule in a round that was skipped.
        scales = [1.0 if isnan(value) else value for value in history.curve("scale")]
        scale.plot(rounds, scales, style, color=color, linewidth=2)
    curves.set(ylabel=metric, title=f"{metric} of the global model")
    curves.legend(frameon=False)
    scale.set(xlabel="round", ylabel="scale")
    use_whole_numbers(curves, scale)
    tidy(curves, scale)
    keep_outliers_out([curves], metric)
    keep_outliers_out([scale])
    _draw_heat_map(heat, runs[learned], sizes)
    heat.set_title(f"weights that {learned} learned")
    save_figure(figure, path)
    return figure


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

    More than ten methods are drawn from the worst client to the best only, in a small panel each.

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
    if len(measured) > LINES_IN_PANEL:
        figure = new_figure(10, height_of_lines(len(measured), 0))
        _draw_ranks(figure, measured, metric)
        save_figure(figure, path)
        return figure
    height = 4.2
    if len(sizes) > 12:
        height = min(1.6 + 0.24 * len(sizes), 8.0)
    figure = new_figure(11, height)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.15))[0]
    by_client = left.subplots()
    row_of = {client: row for row, client in enumerate(_largest_first(sizes))}
    for index, (name, runs) in enumerate(measured.items()):
        color, _ = color_and_style(index)
        values = runs[0].clients[metric]
        rows = [row_of[client] for client in range(len(values))]
        by_client.plot(values, rows, "o", color=color, alpha=0.85, markersize=5, label=name)
    _label_clients(by_client, sizes)
    by_client.set_ylim(len(sizes) - 0.4, -0.6)
    title = "client by client"
    if any(len(runs) > 1 for runs in measured.values()):
        title += ", first run"
    by_client.set(xlabel=axis_label(metric), title=title)
    tidy(by_client)
    _draw_ranks(right, measured, metric)
    save_figure(figure, path)
    return figure


def _draw_ranks(figure: Figure | SubFigure, measured: Mapping[str, Sequence[RunHistory]], metric: str) -> None:
    """Draw a metric from the worst client to the best, as mean and deviation over the runs of a method.

    Args:
        figure: The figure, or a part of it.
        measured: The runs of each method that measured the metric, by name.
        metric: The metric.
    """
    panels = panels_of_lines(figure, list(measured), "clients, worst first, %", axis_label(metric))
    for index, (name, runs) in enumerate(measured.items()):
        color, style = color_and_style(index)
        # Ranks, because client 3 of one seed is another client than client 3 of the next.
        values_by_rank = [_sorted_values(run.clients[metric]) for run in runs]
        mean, deviation = mean_and_deviation(padded(values_by_rank))
        percent = 100 * torch.arange(1, len(mean) + 1) / len(mean)
        # A curve of a single client has no line to see.
        marker = "o" if len(mean) == 1 else None
        panels[name].plot(percent, mean, style, marker=marker, color=color, linewidth=2, label=name)
        if len(runs) > 1:
            panels[name].fill_between(percent, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
    shown = distinct(panels.values())
    if len(shown) == 1:
        shown[0].set_title("from the worst client to the best")
    add_legends(*shown)
    tidy(*shown)
    keep_outliers_out(shown, metric)


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
    axes.figure.colorbar(image, ax=axes, label="change against the share of samples, %", format=plain_number)


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


def _sorted_values(values: Sequence[float]) -> list[float]:
    """Sort values, without those of clients for which a metric is undefined."""
    return sorted(value for value in values if not isnan(value))
