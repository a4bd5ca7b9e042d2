"""Figures of finished runs, under the name that projects import."""

from lightning_fedhaw.figures.base import theme
from lightning_fedhaw.report.client_curves import draw_client_curves
from lightning_fedhaw.report.client_pictures import draw_clients, draw_comparison, draw_labels, draw_weights
from lightning_fedhaw.report.history import RunHistory, read_run, read_runs
from lightning_fedhaw.report.plot_command import main
from lightning_fedhaw.report.plotting import draw_bands, draw_curves, draw_lines, draw_spread

__all__ = [
    "RunHistory",
    "draw_bands",
    "draw_client_curves",
    "draw_clients",
    "draw_comparison",
    "draw_curves",
    "draw_labels",
    "draw_lines",
    "draw_spread",
    "draw_weights",
    "main",
    "read_run",
    "read_runs",
    "theme",
]
