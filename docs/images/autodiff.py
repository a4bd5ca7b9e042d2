"""Draws the three modes of federated automatic differentiation: ``python docs/images/autodiff.py``."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Ink, server, client and derivative on light and on dark pages.
PALETTES = {
    "": ("#222222", "#cfe3f5", "#d9eedd", "#c2410c", "#ffffff"),
    "_dark": ("#dfe1e6", "#27435e", "#2a4a34", "#ff9d66", "#1e2129"),
}
INK, SERVER, CLIENT, DERIVATIVE, PAGE = PALETTES[""]
VALUE = INK
ROWS = (2.75, 1.75, 0.75)

Point = tuple[float, float]


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    shape = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, color=INK, linespacing=1.5)


def arrow(axes: Axes, start: Point, end: Point, color: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=color, connectionstyle=f"arc3,rad={bend}", **style))


def label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=color)


def stage(before: str, client: str, after: str) -> tuple[Figure, Axes]:
    """Draw the server on both sides of three clients."""
    figure = Figure(figsize=(9.6, 4.2), dpi=130, facecolor=PAGE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.6), ylim=(0, 4.2))
    axes.axis("off")
    box(axes, 0.2, 0.75, 1.75, 2.65, SERVER, before)
    box(axes, 7.65, 0.75, 1.75, 2.65, SERVER, after)
    for row in ROWS:
        box(axes, 3.85, row, 1.9, 0.65, CLIENT, client)
    label(axes, 1.07, 3.65, "server", INK)
    label(axes, 4.8, 3.65, "clients", INK)
    label(axes, 8.52, 3.65, "server", INK)
    return figure, axes


def lanes(axes: Axes, down: str, up: str, offset: float, color: str, *, is_reversed: bool = False) -> None:
    """Draw what travels between the server and every client, and name it at the top."""
    for row in ROWS:
        y = row + 0.325 + offset
        for left, right in ((1.95, 3.85), (5.75, 7.65)):
            start = (right, y) if is_reversed else (left, y)
            end = (left, y) if is_reversed else (right, y)
            arrow(axes, start, end, color)
    height = ROWS[0] + 0.325 + offset + (0.17 if offset > 0 else -0.17)
    label(axes, 2.9, height, down, color)
    label(axes, 6.7, height, up, color)


def forward(path: Path) -> None:
    figure, axes = stage("$x$\n\n$u = f(x)$", "$v_k = g_k(u)$", "$s = \\sum_k v_k$\n\n$y = h(s)$")
    lanes(axes, "value $u$", "value $v_k$", 0.12, VALUE)
    lanes(axes, "tangent $\\dot u$", "tangent $\\dot v_k$", -0.12, DERIVATIVE)
    label(axes, 4.8, 0.3, "Tangents travel with the values: one pass for each number of $x$.", DERIVATIVE)
    figure.savefig(path)


def reverse(path: Path) -> None:
    figure, axes = stage("$x$\n\n$u = f(x)$", "$v_k = g_k(u)$", "$s = \\sum_k v_k$\n\n$y = h(s)$")
    lanes(axes, "1: value $u$", "1: value $v_k$", 0.12, VALUE)
    lanes(axes, "2: $\\bar u_k$", "2: $\\bar s$", -0.12, DERIVATIVE, is_reversed=True)
    label(axes, 4.8, 0.3, "A second pass goes back to the same clients; the server adds up $\\bar u_k$.", DERIVATIVE)
    figure.savefig(path)


def mixed(path: Path) -> None:
    figure, axes = stage(
        "$x$\n\n$u = f(x)$", "$v_k = g_k(u)$,  $J_k$", "$s = \\sum_k v_k$\n\n$J = \\sum_k J_k$\n\n$y = h(s)$"
    )
    for row in ROWS:
        y = row + 0.325
        arrow(axes, (1.95, y), (3.85, y), VALUE)
        arrow(axes, (5.75, y + 0.12), (7.65, y + 0.12), VALUE)
        arrow(axes, (5.75, y - 0.12), (7.65, y - 0.12), DERIVATIVE)
    top = ROWS[0] + 0.325
    label(axes, 2.9, top + 0.17, "value $u$", VALUE)
    label(axes, 6.7, top + 0.29, "value $v_k$", VALUE)
    label(axes, 6.7, top - 0.29, "Jacobian $J_k$", DERIVATIVE)
    arrow(axes, (8.5, 0.75), (1.1, 0.75), DERIVATIVE, bend=-0.08)
    label(
        axes,
        4.8,
        0.14,
        "The server goes back by itself, with $\\bar u = J^{\\top} \\bar s$: nobody is asked again.",
        DERIVATIVE,
    )
    figure.savefig(path)


if __name__ == "__main__":
    for suffix, palette in PALETTES.items():
        INK, SERVER, CLIENT, DERIVATIVE, PAGE = palette
        VALUE = INK
        for draw in (forward, reverse, mixed):
            draw(Path(__file__).with_name(f"autodiff_{draw.__name__}{suffix}.png"))
