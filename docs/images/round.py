"""Draws the picture of a round: ``python docs/images/round.py``."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Ink, server, channels, client, absent client and page, on light and on dark pages.
PALETTES = {
    "": ("#222222", "#cfe3f5", "#f3e6c8", "#d9eedd", "#eeeeee", "#ffffff"),
    "_dark": ("#dfe1e6", "#27435e", "#57482a", "#2a4a34", "#2b2e36", "#1e2129"),
}
INK, SERVER, AIR, CLIENT, AWAY, PAGE = PALETTES[""]
HISTOGRAMS = ((5, 1, 0), (0, 4, 2), (1, 1, 5), (3, 3, 0), (0, 2, 4))
COMES, LOST = (0, 1, 3, 4), 3


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", **style: object
) -> None:
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=INK, lw=1, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    properties = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=properties)


def draw(path: Path) -> None:
    figure = Figure(figsize=(11, 5.2), dpi=130, facecolor=PAGE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11), ylim=(0, 5.2))
    axes.axis("off")
    box(axes, 0.2, 1.9, 1.8, 1.7, SERVER, "server\n\nglobal model w\nrule's state")
    box(axes, 2.75, 0.9, 0.95, 3.7, AIR, "downlink\nchannels")
    box(axes, 7.1, 0.9, 0.95, 3.7, AIR, "uplink\nchannels")
    box(axes, 8.95, 1.9, 1.85, 1.7, SERVER, "rule\n\nw, state, cohort\n→ w, state, weights")
    for client, counts in enumerate(HISTOGRAMS):
        y = 3.95 - 0.76 * client
        comes, lost = client in COMES, client == LOST
        box(axes, 4.5, y, 1.8, 0.62, CLIENT if comes else AWAY, linestyle="-" if comes else "--")
        axes.text(4.6, y + 0.31, f"client {client}", va="center", fontsize=10, color=INK if comes else "#888888")
        for label, count in enumerate(counts):
            left, color = 5.6 + 0.2 * label, ("#0072B2", "#D55E00", "#009E73")[label]
            axes.bar(left, 0.09 * count, 0.15, y + 0.07, color=color, alpha=1 if comes else 0.35)
        if comes:
            arrow(axes, (2.0, 2.75), (2.75, y + 0.31))
            arrow(axes, (3.7, y + 0.31), (4.5, y + 0.31))
            arrow(axes, (6.3, y + 0.31), (7.1, y + 0.31))
        if comes and not lost:
            arrow(axes, (8.05, y + 0.31), (8.95, 2.75))
        if lost:
            axes.text(8.25, y + 0.31, "×", ha="center", va="center", fontsize=20, color="#d62728")
    axes.plot((9.9, 9.9, 1.1), (1.9, 0.3, 0.3), color=INK, lw=1.2)
    arrow(axes, (1.1, 0.3), (1.1, 1.9))
    for x, y, text in (
        (1.1, 3.95, "1  sample a cohort\n(sampler)"),
        (3.2, 4.85, "2  broadcast"),
        (5.4, 4.85, "3  train (engine, objectives)"),
        (7.6, 4.85, "4  send"),
        (9.9, 3.95, "5  aggregate the updates"),
        (5.4, 0.5, "6  install, log, validate, save; the next round"),
    ):
        axes.text(x, y, text, ha="center", va="center", fontsize=10.5, weight="bold", color=INK)
    figure.savefig(path)


if __name__ == "__main__":
    for suffix, palette in PALETTES.items():
        INK, SERVER, AIR, CLIENT, AWAY, PAGE = palette
        draw(Path(__file__).with_name(f"round{suffix}.png"))
