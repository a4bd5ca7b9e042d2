"""The label histogram of a partition, as text or as a picture, to look at before a run."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedhaw.figures.base import new_figure, save_figure, use_plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Counts = NDArray[np.int64]
_Colors = NDArray[np.float64]

_MOST_ROWS = 20
"""Clients at most that have a row each in a table."""

_MOST_COLUMNS = 12
"""Classes at most that have a column each in a table."""

_MOST_DISTINCT_COLORS = 20
"""Classes at most whose colors can be told apart, and which are all named in the legend."""


def format_histogram(histogram: Tensor, class_names: Sequence[str] | None = None) -> str:
    """Format a label histogram as a table for the terminal.

    Up to 20 clients have a row each, with a column per class, or with their largest classes if there are more than 12.
    More clients are summarized by smallest, median and largest values.

    Args:
        histogram: Samples of each client in each class, ``[N, C]``, as ``Partition.histogram`` returns it.
        class_names: Names of the classes. Default: their numbers.

    Returns:
        Lines of text without a final line break.

    Raises:
        ValueError: If the histogram is not a table of counts, or there are not C names.
    """
    counts = _checked_counts(histogram)
    names = _checked_names(class_names, counts.shape[1])
    if len(counts) > _MOST_ROWS:
        return _summary(counts)
    if len(names) > _MOST_COLUMNS:
        return _table_of_largest_classes(counts, names)
    return _table_of_all_classes(counts, names)


def draw_histogram(
    histogram: Tensor, path: str | PathLike[str] | None = None, class_names: Sequence[str] | None = None
) -> Figure:
    """Draw a label histogram: a bar per client, whose length is its number of samples, with a color for each class.

    Args:
        histogram: Samples of each client in each class, ``[N, C]``, as ``Partition.histogram`` returns it.
        path: The file in which the picture is saved; its suffix determines the format.
        class_names: Names of the classes. Default: their numbers.

    Returns:
        The matplotlib figure, which belongs to no window and to no global state.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the histogram is not a table of counts, or there are not C names.
    """
    counts = _checked_counts(histogram)
    names = _checked_names(class_names, counts.shape[1])
    num_clients, num_classes = counts.shape
    height_of_bars = 1.2 + 0.26 * num_clients
    height_of_legend = 0.9 + 0.22 * min(num_classes, _MOST_DISTINCT_COLORS)
    height = min(max(height_of_bars, height_of_legend), 10.0)
    missing = "`draw_histogram` needs matplotlib, which is not installed; run `pip install matplotlib`."
    figure = new_figure(7.0, height, missing)

    from matplotlib import colormaps

    if num_classes <= 10:
        colors = colormaps["tab10"](np.arange(num_classes))
    elif num_classes <= _MOST_DISTINCT_COLORS:
        colors = colormaps["tab20"](np.arange(num_classes))
    else:
        # Both ends of this colormap are nearly black, and would look alike.
        colors = colormaps["turbo"](np.linspace(0.02, 0.98, num_classes))

    axes = figure.add_subplot()
    _draw_bars(axes, counts, colors)
    _format_axes(axes, counts)
    _draw_legend(figure, names, colors)
    save_figure(figure, path)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def _draw_bars(axes: Axes, counts: _Counts, colors: _Colors) -> None:
    """Draw one rectangle for each class of each client, those of a client in a row.

    Args:
        axes: Where to draw.
        counts: ``[N, C]``.
        colors: RGBA, ``[C, 4]``.
    """
    from matplotlib.collections import PolyCollection

    num_clients, num_classes = counts.shape
    # One collection of all rectangles: an artist for each would take a minute for a thousand clients.
    client, label = np.nonzero(counts)  # [rectangles] each
    ends = counts.cumsum(axis=1)[client, label]
    starts = ends - counts[client, label]
    # Gaps between the bars of many clients would be narrower than a pixel.
    half_height = 0.4 if num_clients <= 200 else 0.5
    x = np.stack([starts, ends, ends, starts], axis=1)
    y = client[:, None] + half_height * np.array([-1, -1, 1, 1])
    # A thin line between neighbors, but not around narrow rectangles, which it would hide.
    is_wide = ends - starts > 0.01 * _longest_bar(counts)
    has_room = num_classes <= _MOST_DISTINCT_COLORS and num_clients <= 60
    line_widths = np.where(is_wide & has_room, 0.6, 0.0)
    rectangles = list(np.stack([x, y], axis=2))  # [4, 2] each
    axes.add_collection(
        PolyCollection(rectangles, facecolors=colors[label], edgecolors=axes.get_facecolor(), linewidths=line_widths)
    )


def _format_axes(axes: Axes, counts: _Counts) -> None:
    """Set the limits, labels, ticks and grid; the first client is on top."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, 1.02 * _longest_bar(counts))
    axes.set_ylim(len(counts) - 0.4, -0.6)
    axes.set_xlabel("training samples")
    axes.set_ylabel("client")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=20, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.8)
    use_plain_numbers(axes)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_legend(figure: Figure, names: list[str], colors: _Colors) -> None:
    """Name the classes; of very many classes only some, since neighbors have nearly the same color."""
    from matplotlib.patches import Patch

    classes = np.arange(len(names))
    if len(names) > _MOST_DISTINCT_COLORS:
        classes = np.linspace(0, len(names) - 1, 11).round().astype(int)
    handles = [Patch(facecolor=colors[label], label=names[label]) for label in classes]
    figure.legend(handles=handles, title="class", loc="outside right upper", frameon=False, handlelength=1.0)


def _longest_bar(counts: _Counts) -> int:
    """Return the number of samples of the largest client, at least 1 so that an axis has a length."""
    return max(int(counts.sum(axis=1).max()), 1)


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------


def _table_of_all_classes(counts: _Counts, names: list[str]) -> str:
    """Format a table with a row per client and a column per class."""
    rows = [["client", "samples", *names]]
    for client, row in enumerate(counts):
        rows.append([str(client), str(row.sum()), *map(str, row)])
    rows.append(["all", str(counts.sum()), *map(str, counts.sum(axis=0))])
    return _aligned(rows)


def _table_of_largest_classes(counts: _Counts, names: list[str]) -> str:
    """Format a table with a row per client, which names its five largest classes."""
    rows = [["client", "samples", "classes", "largest classes"]]
    for client, row in enumerate(counts):
        # A stable sort, so that of equal classes the first comes first.
        by_size = np.argsort(-row, kind="stable")
        largest = []
        for label in by_size[:5]:
            if row[label]:
                largest.append(f"{names[label]}: {row[label]}")
        rows.append([str(client), str(row.sum()), str((row > 0).sum()), "  ".join(largest)])
    rows.append(["all", str(counts.sum()), str((counts.sum(axis=0) > 0).sum()), ""])
    return _aligned(rows, left_column=3)


def _summary(counts: _Counts) -> str:
    """Format a table of the smallest, median and largest value of each measure of a partition."""
    sizes = counts.sum(axis=1)
    # A client without samples has a share of 0 in each class.
    percent_of_largest_class = 100 * counts.max(axis=1) / np.maximum(sizes, 1)
    measures = {
        "samples of a client": sizes,
        "classes of a client": (counts > 0).sum(axis=1),
        "largest class of a client, %": percent_of_largest_class.round().astype(int),
        "clients that have a class": (counts > 0).sum(axis=0),
    }
    rows = [["", "smallest", "median", "largest"]]
    for name, values in measures.items():
        rows.append([name, f"{values.min()}", f"{np.median(values):g}", f"{values.max()}"])
    headline = f"{len(counts)} clients, {counts.sum()} samples, {counts.shape[1]} classes"
    return f"{headline}\n{_aligned(rows, left_column=0)}"


def _aligned(rows: list[list[str]], left_column: int | None = None) -> str:
    """Align columns, two spaces apart: all flush right, except for the one numbered ``left_column``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            if column == left_column:
                cells.append(cell.ljust(width))
            else:
                cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _checked_counts(histogram: Tensor) -> _Counts:
    """Convert a histogram to int64 counts ``[N, C]``, or refuse it."""
    table = torch.as_tensor(histogram)
    if table.ndim != 2 or 0 in table.shape or table.is_floating_point() or (table < 0).any():
        raise ValueError(
            "`histogram` must be a table of counts of shape [clients, classes], got"
            f" {table.dtype} of shape {list(table.shape)}; see `Partition.histogram`."
        )
    return table.cpu().numpy().astype(np.int64)


def _checked_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return the name of each class, by default its number."""
    if class_names is None:
        return [str(label) for label in range(num_classes)]
    names = [str(name) for name in class_names]
    if len(names) != num_classes:
        raise ValueError(f"`class_names` must have one name per class ({num_classes}), got {len(names)}.")
    return names
