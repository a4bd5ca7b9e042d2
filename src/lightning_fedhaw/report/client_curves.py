"""A picture of each client's metric, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.federation.client_statistics import OF_CLIENTS, SPREAD
from lightning_fedhaw.figures.base import (
    axis_label,
    color_and_style,
    ink,
    new_figure,
    save_figure,
    tidy,
    use_whole_numbers,
)
from lightning_fedhaw.figures.panels import keep_outliers_out
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.plotting import readable_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED = 6


def draw_client_curves(
    run: RunHistory, metric: str, path: str | Path | None = None, *, clients: Sequence[int] | None = None
) -> Figure:
    """Draw a metric of every client over rounds, with the mean and a band from the worst client to the worst decile.

    Args:
        run: The history of a run with ``client_eval_every_n_rounds``, or a checkpoint of it.
        metric: The metric, as ``validation_step`` logs it.
        path: Where the picture is saved; its suffix chooses the format.
        clients: The clients whose curves are named; by default the worst tenth in the last measurement, up to six.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If the run has not kept the metric of each client, or has no client of such a number.
    """
    curves = run.client_curves(metric)
    if not curves.numel():
        raise ValueError(
            "`metric` must be one of which the run has kept each client's value, with `client_eval_every_n_rounds`"
            f" ({readable_list(metrics_of_each_client(run))}), got {metric!r}. A log has no such values: take the run"
            " itself or a checkpoint."
        )
    if clients is None:
        clients = _worst_clients(run, metric, curves)
    for client in clients:
        arguments.integer("clients", client, minimum=0, maximum=len(run.sizes) - 1)
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    _draw_worst_decile(axes, run, metric, curves)
    _draw_each_client(axes, run, metric, curves, clients)
    axes.set(xlabel="round", ylabel=axis_label(metric), title=f"{metric} of each client")
    use_whole_numbers(axes)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    keep_outliers_out([axes], metric)
    save_figure(figure, path)
    return figure


def _draw_each_client(axes: Axes, run: RunHistory, metric: str, curves: Tensor, named: Sequence[int]) -> None:
    """Draw the curve of every client and their mean, in the rounds in which they were measured."""
    measured = (~curves.isnan()).any(1).nonzero()[:, 0]
    # A curve of a single point has no line to see.
    marker = "o" if len(measured) == 1 else None
    axes.plot(measured + 1, curves[measured], color="0.6", alpha=0.5, marker=marker, linewidth=0.8)
    mean = torch.tensor(run.curve(f"{metric}{SPREAD}mean"))
    axes.plot(measured + 1, mean[measured], color=ink(), marker=marker, linewidth=2, label="mean of the clients")
    for index, client in enumerate(named):
        color, style = color_and_style(index)
        label = f"client {client}  ({run.sizes[client]:,})"
        axes.plot(measured + 1, curves[measured, client], style, color=color, marker=marker, linewidth=1.5, label=label)


def metrics_of_each_client(run: RunHistory) -> list[str]:
    """List the metrics of which a run has kept each client's value over rounds."""
    return [name.removesuffix(OF_CLIENTS) for name in run.tables if name.endswith(OF_CLIENTS)]


def _draw_worst_decile(axes: Axes, run: RunHistory, metric: str, curves: Tensor) -> None:
    """Draw a band from the bound of the worst tenth of the clients to the worst client."""
    bound = torch.tensor(run.curve(f"{metric}{SPREAD}worst_decile"))
    rounds = (~bound.isnan()).nonzero()[:, 0]
    worst = torch.stack([_worst(values[~values.isnan()], run, metric) for values in curves[rounds]])
    # Hatched, so that the band is one in gray prints, too.
    axes.fill_between(
        rounds + 1,
        worst,
        bound[rounds],
        facecolor="#D55E00",
        alpha=0.25,
        hatch="///",
        linewidth=0,
        label="worst decile",
    )


def _worst_clients(run: RunHistory, metric: str, curves: Tensor) -> list[int]:
    """Return the worst tenth of the clients in the last measurement, the worst first."""
    last = curves[~curves.isnan().all(1)][-1]
    clients = (~last.isnan()).nonzero()[:, 0]
    order = last[clients].argsort(descending=not _is_better_when_higher(run, metric), stable=True)
    count = min(ceil(len(clients) / 10), _MOST_NAMED)
    worst: list[int] = clients[order[:count]].tolist()
    return worst


def _worst(values: Tensor, run: RunHistory, metric: str) -> Tensor:
    if _is_better_when_higher(run, metric):
        return values.min()
    return values.max()


def _is_better_when_higher(run: RunHistory, metric: str) -> bool:
    """Return whether a metric is better when higher, by its logged deciles."""
    worst = torch.tensor(run.curve(f"{metric}{SPREAD}worst_decile"))
    best = torch.tensor(run.curve(f"{metric}{SPREAD}best_decile"))
    return bool((best - worst).nansum() >= 0)
