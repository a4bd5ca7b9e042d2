"""A look at a partition before a run: its label histogram as text or as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Counts = NDArray[np.int64]
_MOST_ROWS = 20
_MOST_COLUMNS = 12


def format_histogram(histogram: Tensor, class_names: Sequence[str] | None = None) -> str:
    """A table for the terminal.

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
    counts, names = _checked(histogram, class_names)
    if len(counts) > _MOST_ROWS:
        return _summary(counts)
    return _rows_of_classes(counts, names) if len(names) <= _MOST_COLUMNS else _rows_of_largest(counts, names)


def draw_histogram(
    histogram: Tensor, path: str | PathLike[str] | None = None, class_names: Sequence[str] | None = None
) -> Figure:
    """A picture: one bar per client, as long as it has samples, with a color for each class.

    Args:
        histogram: Samples of each client in each class, ``[N, C]``, as ``Partition.histogram`` returns it.
        path: Where to save the picture; the ending says in which format.
        class_names: Names of the classes. Default: their numbers.

    Returns:
        The matplotlib figure, which belongs to no window and to no global state.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the histogram is not a table of counts, or there are not C names.
    """
    counts, names = _checked(histogram, class_names)
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            '`draw_histogram` needs matplotlib, which is not installed; run `pip install "lightning-fedhaw[plot]"`.'
        ) from error

    num_clients, num_classes = counts.shape
    if num_classes <= 20:
        colors = colormaps["tab10" if num_classes <= 10 else "tab20"](np.arange(num_classes))
    else:
        colors = colormaps["turbo"](np.linspace(0.02, 0.98, num_classes))

    height = max(1.2 + 0.26 * num_clients, 0.9 + 0.22 * min(num_classes, 20))  # room for the bars and the legend
    figure = Figure(figsize=(7.0, min(height, 10.0)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    # One collection of all rectangles: an artist for each would take a minute for a thousand clients.
    client, label = np.nonzero(counts)
    ends = counts.cumsum(axis=1)[client, label]
    starts = ends - counts[client, label]
    half = 0.4 if num_clients <= 200 else 0.5
    x = np.stack([starts, ends, ends, starts], axis=1)
    y = client[:, None] + half * np.array([-1, -1, 1, 1])
    longest = max(int(counts.sum(axis=1).max()), 1)
    # A hair between neighbors, but not around slivers, which it would hide.
    lines = np.where((ends - starts > 0.01 * longest) & (num_classes <= 20) & (num_clients <= 60), 0.6, 0.0)
    axes.add_collection(
        PolyCollection(list(np.stack([x, y], axis=2)), facecolors=colors[label], edgecolors="white", linewidths=lines)
    )

    axes.set_xlim(0, 1.02 * longest)
    axes.set_ylim(num_clients - 0.4, -0.6)
    axes.set_xlabel("training samples")
    axes.set_ylabel("client")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=20, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)

    shown = np.arange(num_classes)
    if num_classes > 20:  # a legend of every so many classes; neighbors have nearly the same color
        shown = np.linspace(0, num_classes - 1, 11).round().astype(int)
    handles = [Patch(facecolor=colors[c], label=names[c]) for c in shown]
    figure.legend(handles=handles, title="class", loc="outside right upper", frameon=False, handlelength=1.0)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _checked(histogram: Tensor, class_names: Sequence[str] | None) -> tuple[_Counts, list[str]]:
    table = torch.as_tensor(histogram)
    if table.ndim != 2 or 0 in table.shape or table.is_floating_point() or (table < 0).any():
        raise ValueError(
            "`histogram` must be a table of counts of shape [clients, classes], got"
            f" {table.dtype} of shape {list(table.shape)}; see `Partition.histogram`."
        )
    names = [str(name) for name in (range(table.shape[1]) if class_names is None else class_names)]
    if len(names) != table.shape[1]:
        raise ValueError(f"`class_names` must have one name per class ({table.shape[1]}), got {len(names)}.")
    return table.cpu().numpy().astype(np.int64), names


def _rows_of_classes(counts: _Counts, names: list[str]) -> str:
    body = [[str(k), str(row.sum()), *map(str, row)] for k, row in enumerate(counts)]
    total = ["all", str(counts.sum()), *map(str, counts.sum(axis=0))]
    return _aligned([["client", "samples", *names], *body, total])


def _rows_of_largest(counts: _Counts, names: list[str]) -> str:
    rows = [["client", "samples", "classes", "largest classes"]]
    for k, row in enumerate(counts):
        largest = [c for c in np.argsort(-row, kind="stable")[:5] if row[c]]
        rows.append([str(k), str(row.sum()), str((row > 0).sum()), "  ".join(f"{names[c]}: {row[c]}" for c in largest)])
    rows.append(["all", str(counts.sum()), str((counts.sum(axis=0) > 0).sum()), ""])
    return _aligned(rows, left=3)


def _summary(counts: _Counts) -> str:
    sizes = counts.sum(axis=1)
    measures = {
        "samples of a client": sizes,
        "classes of a client": (counts > 0).sum(axis=1),
        "largest class of a client, %": (100 * counts.max(axis=1) / np.maximum(sizes, 1)).round().astype(int),
        "clients that have a class": (counts > 0).sum(axis=0),
    }
    rows = [["", "smallest", "median", "largest"]]
    rows += [[name, f"{v.min()}", f"{np.median(v):g}", f"{v.max()}"] for name, v in measures.items()]
    return f"{len(counts)} clients, {counts.sum()} samples, {counts.shape[1]} classes\n{_aligned(rows, left=0)}"


def _aligned(rows: list[list[str]], left: int | None = None) -> str:
    """Columns two spaces apart, all flush right but the one numbered ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust if i == left else str.rjust for i in range(len(widths))]
    lines = ("  ".join(put(cell, w) for put, cell, w in zip(align, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
