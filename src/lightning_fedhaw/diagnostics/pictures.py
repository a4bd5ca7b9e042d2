"""Pictures of diagnostics. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fedhaw.diagnostics.coherence import critical_round
from lightning_fedhaw.diagnostics.landscape import barycentric, simplex_grid
from lightning_fedhaw.diagnostics.scores import client_scores, scores_of, shapley_errors
from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.figures.base import (
    color_and_style,
    ink,
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
    grid_of_panels,
    height_of_lines,
    panels_of_lines,
)
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.plotting import draw_series, figure_of_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Groups = Mapping[str, Sequence[RunHistory]]
"""The runs of each method, such as one for each seed, by the name of the method."""


def draw_coherence(groups: Groups, path: str | Path | None = None, window: int = 5) -> Figure:
    """Draw the coherence of the clients' updates over rounds, with the critical round of each method's first run.

    Args:
        groups: The runs of each method, by name; with :class:`Coherence` among their callbacks.
        path: Where the picture is saved; its suffix chooses the format.
        window: The measurements in the mean that finds the critical round.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has measured it.
    """
    metric = f"{PREFIX}coherence"
    figure = _series(groups, {metric: "coherence of the cohort, cosine"})
    for axes in figure.axes:
        axes.axhline(0, color=ink(), alpha=0.6, linewidth=0.8)
    for index, runs in enumerate(groups.values()):
        critical = critical_round(runs[0].curve(metric), window)
        if critical is not None:
            color, style = color_and_style(index)
            # The panel of the method, where it has one of its own.
            axes = figure.axes[index % len(figure.axes)]
            axes.axvline(critical + 1, color=color, linestyle=style, linewidth=0.8)
    save_figure(figure, path)
    return figure


def draw_shrinking(groups: Groups, path: str | Path | None = None) -> Figure:
    """Draw the norm of the model, the norm of its change and the ratio of the two terms over rounds.

    Args:
        groups: The runs of each method, by name; with :class:`Shrinking` among their callbacks.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has measured it.
    """
    panels = {
        f"{PREFIX}shrinking/model_norm": "norm of the global model",
        f"{PREFIX}shrinking/update_norm": "norm of the global update",
        f"{PREFIX}shrinking/ratio": "optimization / regularization",
    }
    figure = _series(groups, panels)
    save_figure(figure, path)
    return figure


def draw_curvature(groups: Groups, path: str | Path | None = None) -> Figure:
    """Draw the largest eigenvalue, the flatness ratio and the fifth eigenvalue of the Hessian over rounds.

    Args:
        groups: The runs of each method, by name; with :class:`Curvature` among their callbacks.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If no run has measured it.
    """
    panels = {
        f"{PREFIX}curvature/eigenvalue_1": "largest eigenvalue",
        f"{PREFIX}curvature/eigenvalue_5": "fifth eigenvalue",
        f"{PREFIX}curvature/ratio": "largest / fifth eigenvalue",
    }
    figure = _series(groups, panels)
    save_figure(figure, path)
    return figure


def draw_drift(run: RunHistory, path: str | Path | None = None) -> Figure:
    """Draw the mean distance of the clients' models from the global one over rounds, and the layers' shares in it.

    Args:
        run: The history of a run with :class:`Drift` among its callbacks.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the run has not measured it.
    """
    metric = f"{PREFIX}drift/mean"
    _check_logged([run], [metric])
    figure = new_figure(10, 3.8)
    distance, shares = grid_of_panels(figure, 2)
    distance.set(xlabel="round", ylabel="distance from the global model")
    draw_series({"mean of the clients": distance}, {"mean of the clients": [run]}, metric)
    for index, (name, values) in enumerate(_largest_shares(run).items()):
        _draw_measured(shares, index, name, values)
    shares.set(xlabel="round", ylabel="share of the layer, %")
    use_whole_numbers(shares)
    add_legends(shares)
    tidy(shares)
    save_figure(figure, path)
    return figure


def _largest_shares(run: RunHistory) -> dict[str, list[float]]:
    """Return the share of each layer in the drift over rounds, in percent; of many layers, the rest is one line."""
    prefix = f"{PREFIX}drift/share/"
    curves: dict[str, list[float]] = {}
    for name in run.names:
        if name.startswith(prefix):
            curves[name.removeprefix(prefix)] = [100 * value for value in run.curve(name)]
    if len(curves) <= LINES_IN_PANEL:
        return curves
    stack = torch.tensor(list(curves.values()), dtype=torch.float64)
    order = stack.nanmean(1).argsort(descending=True)
    is_largest = torch.zeros(len(stack), dtype=torch.bool)
    is_largest[order[: LINES_IN_PANEL - 1]] = True
    shares = {}
    for name, large in zip(curves, is_largest, strict=True):
        if large:
            shares[name] = curves[name]
    shares[f"{int((~is_largest).sum())} other layers"] = stack[~is_largest].sum(0).tolist()
    return shares


def draw_cosines(run: RunHistory, path: str | Path | None = None, *, round_idx: int | None = None) -> Figure:
    """Draw the cosines of all pairs of client updates of a round as a heat map.

    Args:
        run: The history of a run with :class:`Coherence` among its callbacks, or a checkpoint of it.
        path: Where the picture is saved; its suffix chooses the format.
        round_idx: The round, from 0; by default the last that was measured.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the round was not measured.
    """
    chosen, pairs = table_of(run, "cosines", round_idx)
    clients = run.tables[f"{PREFIX}cosines_of"][chosen].int().tolist()
    figure = new_figure(5.6, 4.6)
    axes = figure.subplots()
    # White in the middle and dark at both ends: opposite signs differ in their hue, and numbers tell them in print.
    image = axes.imshow(pairs.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    if len(clients) <= 12:
        _write_numbers(axes, pairs)
    if len(clients) <= 40:
        axes.set_xticks(range(len(clients)), clients)
        axes.set_yticks(range(len(clients)), clients)
    axes.set(xlabel="client", ylabel="client", title=f"round {chosen + 1}")
    figure.colorbar(image, ax=axes, label="cosine of the updates", format=plain_number)
    save_figure(figure, path)
    return figure


def draw_contributions(run: RunHistory, path: str | Path | None = None) -> Figure:
    """Draw the scores of the clients over a run, a panel for each score; the largest client is on top.

    Args:
        run: The history of a run; with :class:`Contributions` among its callbacks, or a checkpoint of it, for more than
            the weights.
        path: Where the picture is saved; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the run has no score.
    """
    scores = scores_of(run)
    if not scores:
        raise ValueError("The run has kept neither weights nor contributions: it is a log, or has over 1,000 clients.")
    labels = {
        "weight": "mean weight",
        "leave_one_out": "loss without the client, minus loss with it",
        "shapley": "Shapley value: fall of the loss",
    }
    order = sorted(range(len(run.sizes)), key=lambda client: run.sizes[client])
    figure = new_figure(1.2 + 3.4 * len(scores), min(1.6 + 0.24 * len(order), 8.0))
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for index, (score, axes) in enumerate(zip(scores, panels, strict=True)):
        values = client_scores(run, score)[order].tolist()
        errors = None
        if score == "shapley":
            errors = shapley_errors(run)[order].nan_to_num().tolist()
        color, _ = color_and_style(index)
        axes.barh(range(len(order)), values, xerr=errors, color=color, ecolor=ink(), capsize=2)
        axes.axvline(0, color=ink(), alpha=0.6, linewidth=0.8)
        axes.set(xlabel=labels[score])
        tidy(axes)
    if len(order) <= 40:
        panels[0].set_yticks(range(len(order)), [f"client {client}  ({run.sizes[client]:,})" for client in order])
    else:
        panels[0].set(ylabel=f"{len(order)} clients, largest on top")
    save_figure(figure, path)
    return figure


def draw_parameters(
    runs: Mapping[str, RunHistory], path: str | Path | None = None, *, round_idx: int | None = None
) -> Figure:
    """Draw the density of the global model's parameters, a line for each run.

    Args:
        runs: The history of each run with :class:`ParameterHistogram` among its callbacks, or a checkpoint, by name.
        path: Where the picture is saved; its suffix chooses the format.
        round_idx: The round, from 0; by default the last of each run that was measured.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If a run has not measured the round.
    """
    figure = new_figure(6.4, height_of_lines(len(runs), 4.2))
    panels = panels_of_lines(figure, list(runs), "value of a parameter", "density, 1 / unit of the value")
    for index, (name, run) in enumerate(runs.items()):
        chosen, shares = table_of(run, "parameters/shares", round_idx)
        low, high = run.tables[f"{PREFIX}parameters/ends"][chosen].tolist()
        edges = torch.linspace(low, high, len(shares) + 1)
        density = shares * len(shares) / (high - low)
        # Empty bins have no height on a logarithmic axis.
        filled = density.where(density > 0, torch.nan)
        color, style = color_and_style(index)
        centers = (edges[1:] + edges[:-1]) / 2
        label = f"{name}, round {chosen + 1}"
        panels[name].plot(centers, filled, style, color=color, label=label, linewidth=1.5, drawstyle="steps-mid")
        panels[name].set_yscale("log")
    shown = distinct(panels.values())
    add_legends(*shown)
    tidy(*shown)
    save_figure(figure, path)
    return figure


def draw_landscape(run: RunHistory, path: str | Path | None = None, *, round_idx: int | None = None) -> Figure:
    """Draw the loss over the weights of three clients, with the points of FedAvg, of the rule, and of the minimum.

    A line joins the minima of the rounds that were measured up to this one.

    Args:
        run: The history of a run with :class:`Landscape` among its callbacks, or a checkpoint of it.
        path: Where the picture is saved; its suffix chooses the format.
        round_idx: The round, from 0; by default the last that was measured.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the round was not measured.
    """
    chosen, losses = table_of(run, "landscape/losses", round_idx)
    clients = run.tables[f"{PREFIX}landscape/clients"][chosen].int().tolist()
    points = run.tables[f"{PREFIX}landscape/points"]
    # The number of points is (n + 1) (n + 2) / 2.
    resolution = round((8 * len(losses) + 1) ** 0.5 - 3) // 2
    x, y = barycentric(simplex_grid(resolution)).T.numpy()
    figure = new_figure(6.4, 4.8)
    axes = figure.subplots()
    image = axes.tricontourf(x, y, losses.numpy(), levels=16, cmap="viridis")
    axes.tricontour(x, y, losses.numpy(), levels=16, colors="white", linewidths=0.4)
    minima = []
    for number, table in sorted(points.items()):
        if number <= chosen:
            # The third point, after those of FedAvg and of the rule.
            minima.append(table[2])
    axes.plot(*barycentric(torch.stack(minima)).T.numpy(), "-", color="white", linewidth=1)
    # Of different sizes, because a rule may choose the point of FedAvg.
    marks = zip(("FedAvg", "rule", "minimum"), "^so", (15, 7, 9), points[chosen], strict=True)
    for name, marker, size, weights in marks:
        place = barycentric(weights).tolist()
        axes.plot(*place, marker, color="white", markeredgecolor="black", markersize=size, label=name)
    for client, corner, shift in zip(clients, barycentric(torch.eye(3)).tolist(), (-0.05, -0.05, 0.04), strict=True):
        axes.text(corner[0], corner[1] + shift, f"client {client}", ha="center", va="center")
    axes.set_axis_off()
    axes.set(aspect="equal", title=f"round {chosen + 1}", ylim=(-0.1, 0.95))
    axes.legend(loc="upper left", facecolor="0.75", labelcolor="black")
    figure.colorbar(image, ax=axes, label="loss of the weighted mean of the models", format=plain_number)
    save_figure(figure, path)
    return figure


def table_of(run: RunHistory, name: str, round_idx: int | None) -> tuple[int, Tensor]:
    """Return a round and the table that an observer has kept of it.

    Args:
        run: The history of the run.
        name: The name of the table, without the prefix of diagnostics.
        round_idx: The round, from 0; ``None`` for the last that has the table.

    Raises:
        ValueError: If there is no such table.
    """
    tables = run.tables.get(f"{PREFIX}{name}", {})
    if round_idx is None and tables:
        round_idx = max(tables)
    if round_idx is None or round_idx not in tables:
        rounds = ", ".join(str(number) for number in sorted(tables)) or "none"
        raise ValueError(
            f"`round_idx` must be a round of which the run has kept {PREFIX + name!r} ({rounds}), got {round_idx}."
            " A log has no tables: take the run itself or a checkpoint."
        )
    return round_idx, tables[round_idx]


def _series(groups: Groups, labels: Mapping[str, str]) -> Figure:
    """Draw series over rounds, a panel for each.

    Args:
        groups: The runs of each method, by name.
        labels: The label of each series, by its name.

    Raises:
        ValueError: If no run has one of them.
    """
    _check_logged([run for runs in groups.values() for run in runs], labels)
    return figure_of_series(groups, labels)


def _check_logged(runs: Iterable[RunHistory], metrics: Iterable[str]) -> None:
    """Refuse runs of which none has a metric."""
    logged: set[str] = set()
    for run in runs:
        logged.update(run.names)
    for metric in metrics:
        if metric not in logged:
            raise ValueError(f"No run has {metric!r}: add its observer to `callbacks` of the run.")


def _draw_measured(axes: Axes, index: int, label: str, values: Sequence[float]) -> None:
    """Draw a curve of the rounds in which something was measured."""
    rounds = []
    measured = []
    for number, value in enumerate(values, start=1):
        # A gap would be drawn where the observer measures in every tenth round only.
        if not isnan(value):
            rounds.append(number)
            measured.append(value)
    color, style = color_and_style(index)
    axes.plot(rounds, measured, style, color=color, label=label, linewidth=1.5)


def _write_numbers(axes: Axes, values: Tensor) -> None:
    """Write every number of a matrix into its cell."""
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            shade = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=7)
