"""How a figure is divided into panels, and what a panel's axis covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_fedhaw.figures.base import plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

LINES_IN_PANEL = 10
"""Lines at most that a panel has; more of them get a small panel each."""

_COLUMNS = 3

_SMALL_COLUMNS = 4

_MANY_TIMES = 10.0
"""An outlier is this many times as large as what the lines of a panel usually are."""


def shape_of_grid(number: int, columns: int = _COLUMNS) -> tuple[int, int]:
    """Return rows and columns of a grid of panels.

    Args:
        number: The panels.
        columns: The columns at most.
    """
    columns = min(columns, number)
    return ceil(number / columns), columns


def grid_of_panels(figure: Figure | SubFigure, number: int, columns: int = _COLUMNS) -> list[Axes]:
    """Divide a figure into panels, row by row; what is left of the last row stays empty.

    Args:
        figure: The figure.
        number: The panels.
        columns: The columns at most.
    """
    rows, columns = shape_of_grid(number, columns)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[number:]:
        axes.remove()
    return panels[:number]


def panels_of_lines(
    figure: Figure | SubFigure, names: Sequence[str], xlabel: str, ylabel: str, lines_each: int = 1
) -> dict[str, Axes]:
    """Return the panel in which each method is drawn: one for all, or a small one for each if there are too many lines.

    Small panels have the same axes, and the name of the method as title.

    Args:
        figure: The figure, or a part of it.
        names: The names of the methods.
        xlabel: The label of the horizontal axes.
        ylabel: The label of the vertical axes.
        lines_each: The lines of each method.
    """
    if lines_each * len(names) <= LINES_IN_PANEL:
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return dict.fromkeys(names, axes)
    rows, columns = shape_of_grid(len(names), _SMALL_COLUMNS)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = {}
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.remove()
            continue
        axes.set_title(names[place], fontsize=9)
        axes.tick_params(labelsize=8)
        # The panel below may be one that was removed, and its numbers with it.
        axes.tick_params(labelbottom=place + columns >= len(names))
        panels[names[place]] = axes
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return panels


def height_of_lines(number: int, height: float, lines_each: int = 1) -> float:
    """Return the height in inches of a panel, or of the small panels that take its place.

    Args:
        number: The methods.
        height: The height of one panel for all.
        lines_each: The lines of each method.
    """
    if lines_each * number <= LINES_IN_PANEL:
        return height
    rows, _ = shape_of_grid(number, _SMALL_COLUMNS)
    return 0.8 + 1.35 * rows


def distinct(panels: Iterable[Axes]) -> list[Axes]:
    """Return every panel once, in order."""
    return list(dict.fromkeys(panels))


def add_legends(*panels: Axes) -> None:
    """Name the lines of each panel that has several, or one whose name is not its title."""
    for axes in panels:
        _, labels = axes.get_legend_handles_labels()
        # Without a line there is no legend, and matplotlib would warn.
        if labels and labels != [axes.get_title()]:
            axes.legend(frameon=False)


def draw_median(
    panels: Sequence[Axes], curves: Sequence[Sequence[float]], positions: Sequence[float] | None = None
) -> None:
    """Draw the median of all curves into small panels, so that each can be held against it; nothing into a single one.

    Args:
        panels: The panels.
        curves: The curve of each method.
        positions: Where the values of the longest curve are on the horizontal axis; by default in rounds from 1.
    """
    if len(panels) < 2:
        return
    stack = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(stack, curves, strict=True):
        row[: len(curve)] = curve
    if positions is None:
        positions = range(1, stack.shape[1] + 1)
    has_values = ~np.isnan(stack).all(axis=0)
    median = np.nanmedian(stack[:, has_values], axis=0)
    for axes in panels:
        axes.plot(np.asarray(positions)[has_values], median, color="0.55", linewidth=1, label="_median", zorder=1)


def keep_outliers_out(panels: Sequence[Axes], metric: str = "") -> None:
    """End the vertical axis where the lines usually are, and name the lines that go on outside of it.

    A value is an outlier if it is more than ten times as large as the lines of the panels usually are. An accuracy has
    none, whether it is a share or in percent, and neither have values between -1 and 1. Logarithmic axes stay as they
    are.

    Args:
        panels: Panels that have lines, and the same vertical axis if they are several.
        metric: What the lines show.
    """
    if "acc" in metric.lower():
        return
    lines = []
    for axes in panels:
        if axes.get_yscale() == "log":
            return
        for line in axes.get_lines():
            values = _finite_values(line)
            if len(values):
                lines.append(values)
    limits = _limits(lines)
    if limits is None:
        return
    low, high = limits
    for axes in panels:
        axes.set_ylim(low, high)
        _name_lines_outside(axes, low, high)


def _name_lines_outside(axes: Axes, low: float, high: float) -> None:
    """Write the lines of a panel that leave its axis, and how far, above the panel."""
    notes = []
    for line in axes.get_lines():
        values = _finite_values(line)
        name = str(line.get_label())
        outside = values[(values < low) | (values > high)]
        # matplotlib and this file call lines "_..." that have no name of their own.
        if len(outside) and not name.startswith("_"):
            farthest = float(outside[np.abs(outside).argmax()])
            notes.append(f"{name} to {plain_number(float(f'{farthest:.3g}'))}")
    if notes:
        text = "off the axis: " + ", ".join(notes)
        axes.annotate(
            text,
            (1, 1),
            xytext=(0, 3),
            textcoords="offset points",
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize=7,
            annotation_clip=False,
        )


def _finite_values(line: Line2D) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.asarray(line.get_ydata(), dtype=np.float64)
    finite: NDArray[np.float64] = values[np.isfinite(values)]
    return finite


def _limits(lines: Sequence[NDArray[np.float64]]) -> tuple[float, float] | None:
    """Return the ends of an axis without outliers; ``None`` if there is none.

    Args:
        lines: The finite values of each line.
    """
    if not lines:
        return None
    values = np.concatenate(lines)
    if np.abs(values).max() <= 1:
        return None
    sizes = []
    for line in lines:
        # Without its few largest and smallest values, which may be a single bad round.
        low = np.quantile(line, 0.02, method="higher")
        high = np.quantile(line, 0.98, method="lower")
        sizes.append(max(abs(low), abs(high)))
    # The lower one of two: of two lines, the one that explodes must not be the usual one.
    usual = sorted(sizes)[(len(sizes) - 1) // 2]
    inside = values[np.abs(values) <= _MANY_TIMES * usual]
    if usual == 0 or len(inside) == len(values):
        return None
    margin = 0.05 * (inside.max() - inside.min()) or 0.05 * usual
    return float(inside.min() - margin), float(inside.max() + margin)
