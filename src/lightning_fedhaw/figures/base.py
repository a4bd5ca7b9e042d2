"""Figures that belong to no window and to no global state: made, styled and saved. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fedhaw import arguments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
THEMES = ("light", "dark")

_BLACK = "#000000"
# Okabe and Ito's palette, which color-blind people can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", _BLACK)
_STYLES = ("-", "--", ":", "-.")

_DARK_PAGE = "#1e2129"
_DARK_INK = "#dfe1e6"
# Of any type, because matplotlib types the keys as a list of all its settings.
_DARK: dict[Any, str] = {
    "figure.facecolor": _DARK_PAGE,
    "axes.facecolor": _DARK_PAGE,
    "savefig.facecolor": _DARK_PAGE,
    "legend.facecolor": _DARK_PAGE,
    "text.color": _DARK_INK,
    "axes.labelcolor": _DARK_INK,
    "axes.titlecolor": _DARK_INK,
    "axes.edgecolor": _DARK_INK,
    "xtick.color": _DARK_INK,
    "ytick.color": _DARK_INK,
    "grid.color": "#8a8f9c",
}

_MISSING = "Pictures need matplotlib, which is not installed: `pip install matplotlib`."

_LABELS = {"bytes_up": "sent up, bytes", "bytes_down": "sent down, bytes"}


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Draw the figures of a block for light or for dark pages.

    Args:
        name: ``"light"``, which changes nothing, or ``"dark"``, with light lines and text on a dark background.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If there is no such theme.
    """
    arguments.choice("name", name, THEMES)
    if name == "light":
        yield
        return
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MISSING) from error
    with rc_context(_DARK):
        yield


def new_figure(width: float, height: float, missing: str = _MISSING) -> Figure:
    """Create a figure that belongs to no window and to no global state, and that a notebook shows.

    Args:
        width: Its width in inches.
        height: Its height in inches.
        missing: The message of the error if matplotlib is missing.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        # Its parts may have been imported before it was made unavailable.
        import_module("matplotlib")
        kind = _notebook_figure()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing) from error
    return kind(figsize=(width, height), layout="constrained")


def _notebook_figure() -> type[Figure]:
    """Return the class of all figures; it is made when it is needed, because matplotlib is imported late."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    class NotebookFigure(matplotlib.figure.Figure):
        """A figure that a notebook shows as the value of a cell.

        Without pyplot, IPython prints only the size of a matplotlib figure.
        """

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            """Return the figure as a PNG file, which is what IPython asks for."""
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return NotebookFigure


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> None:
    """Save a figure, and make the folder if it is not there.

    Args:
        figure: The figure.
        path: The file, whose suffix chooses the format; ``None`` saves nothing.
    """
    if path is None:
        return
    from matplotlib import rc_context

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Fonts that publishers accept (type 42, not 3), and text in SVG files that stays text.
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150)


def ink() -> str:
    """Return the color of text and axes in the present theme."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def color_and_style(index: int) -> tuple[str, str]:
    """Return color and line style of the method with a number; both differ between neighbors, for prints in gray."""
    color = _COLORS[index % len(_COLORS)]
    if color == _BLACK:
        # It would not be seen on a dark page.
        color = ink()
    style = _STYLES[index % len(_STYLES)]
    return color, style


def axis_label(metric: str) -> str:
    """Return the label of an axis that shows a logged metric, with its unit where it has one."""
    return _LABELS.get(metric, metric)


def tidy(*panels: Axes) -> None:
    """Give panels a grid, no frame, and plain numbers."""
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        use_plain_numbers(axes)


def use_plain_numbers(axes: Axes) -> None:
    """Write every number of an axis in full, instead of a difference from an offset or a part of a power of ten."""
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    for axis in (axes.xaxis, axes.yaxis):
        # Names of clients and logarithms have formatters of their own.
        if type(axis.get_major_formatter()) is ScalarFormatter:
            axis.set_major_formatter(FuncFormatter(plain_number))


def plain_number(value: float, position: int | None = None) -> str:
    """Format the number of a tick.

    Args:
        value: The number.
        position: Its place on the axis, which matplotlib passes; not used.
    """
    # Ticks such as 0.1 + 0.2 have errors in their last digits, which ten digits round away.
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


def use_whole_numbers(*panels: Axes) -> None:
    """Label the horizontal axis with whole numbers: there is no round 2.5."""
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
