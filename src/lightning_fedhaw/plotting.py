"""Pictures of a run. Needs matplotlib: ``pip install "lightning-fedhaw[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fedhaw.observer import RoundObserver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class History(RoundObserver):
    """Keeps what a run logged, round by round, for the pictures.

    Attributes:
        weights: One mapping a round, from client number to aggregation weight.
        metrics: One mapping a round, of everything callbacks can see at its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[int, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        """Keep the round's weights."""
        prefix = "weight/client_"
        own = {int(n.removeprefix(prefix)): w for n, w in report.metrics.items() if n.startswith(prefix)}
        self.weights.append(own)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the round's metrics, validation included."""
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def curve(self, name: str) -> list[float]:
        """A metric over rounds; NaN where it was not logged."""
        return [row.get(name, float("nan")) for row in self.metrics]

    def weight_matrix(self, num_clients: int) -> Tensor:
        """``[N, rounds]``: the weights; NaN where a client did not come."""
        matrix = torch.full((num_clients, len(self.weights)), float("nan"))
        for round_, row in enumerate(self.weights):
            for client, weight in row.items():
                matrix[client, round_] = weight
        return matrix


def draw_comparison(
    runs: Mapping[str, History],
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
    figure_class, canvas = _matplotlib()
    figure: Figure = figure_class(figsize=(11, 4.8), layout="constrained")
    canvas(figure)
    panels = figure.subplot_mosaic([["curves", "heat"], ["scale", "heat"]], width_ratios=(1, 1.1), height_ratios=(2, 1))
    curves, scale, heat = panels["curves"], panels["scale"], panels["heat"]
    for colour, (name, history) in zip(_COLOURS, runs.items(), strict=False):
        values = history.curve(metric)
        rounds = range(1, len(values) + 1)
        curves.plot(rounds, values, color=colour, label=name, linewidth=2)
        scales = [1.0 if value != value else value for value in history.curve("scale")]
        scale.plot(rounds, scales, color=colour, linewidth=2)
    curves.set(ylabel=metric, title=f"{metric} of the global model")
    curves.legend(frameon=False)
    scale.set(xlabel="round", ylabel="scale")
    for axes in (curves, scale):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    change = runs[learned].weight_matrix(len(sizes)).double() / shares[:, None]
    order = shares.argsort(descending=True)
    limit = max(1e-3, (change[~change.isnan()] - 1).abs().max().item())
    image = heat.imshow(
        (change[order] - 1).numpy() * 100,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-100 * limit,
        vmax=100 * limit,
        interpolation="nearest",
        extent=(0.5, change.shape[1] + 0.5, len(sizes) - 0.5, -0.5),
    )
    labels = [f"client {k}  ({sizes[k]:,})" for k in order.tolist()]
    heat.set_yticks(range(len(sizes)), labels if len(sizes) <= 40 else [""] * len(sizes))
    heat.set(xlabel="round", title=f"weights that {learned} learned")
    figure.colorbar(image, ax=heat, label="change against the share of samples, %")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def draw_curves(runs: Mapping[str, History], path: str | Path | None = None, metric: str = "val_acc") -> Figure:
    """Many runs' metric over rounds, each labelled at its end, and its mean over the last ten rounds.

    Args:
        runs: What each run logged, by name.
        path: Where the picture goes; its suffix chooses the format.
        metric: The metric of the curves.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure_class, canvas = _matplotlib()
    figure: Figure = figure_class(figsize=(11, 2.6 + 0.14 * len(runs)), layout="constrained")
    canvas(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
    values = {name: history.curve(metric) for name, history in runs.items()}
    means = {name: sum(curve[-10:]) / len(curve[-10:]) for name, curve in values.items()}
    order = sorted(means, key=means.__getitem__)
    for i, name in enumerate(reversed(order)):
        style = ("-", "--", ":", "-.")[i // len(_COLOURS) % 4]
        colour = _COLOURS[i % len(_COLOURS)]
        curves.plot(range(1, len(values[name]) + 1), values[name], style, color=colour, label=name, linewidth=1.5)
        bars.plot(means[name], len(order) - 1 - i, "o", color=colour)
        bars.hlines(len(order) - 1 - i, min(means.values()), means[name], colors=colour, linestyles=style)
    curves.set(xlabel="round", ylabel=metric, title=f"{metric} of the global model")
    bars.set(title="mean of the last ten rounds", xlabel=metric)
    bars.set_yticks(range(len(order)), order)
    for axes in (curves, bars):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


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
    figure_class, canvas = _matplotlib()
    figure: Figure = figure_class(figsize=(7, 4.4), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    for i, (name, values) in enumerate(lines.items()):
        style = ("o-", "s--", "^:", "D-.")[i // len(_COLOURS) % 4]
        axes.plot(positions, values, style, color=_COLOURS[i % len(_COLOURS)], label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pictures need matplotlib, which is not installed: `pip install "lightning-fedhaw[plot]"`.'
        ) from error
    return Figure, FigureCanvasAgg
