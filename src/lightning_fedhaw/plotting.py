"""Figures of finished runs, under the name that projects import."""

from lightning_fedhaw.report.client_pictures import draw_client_curves, draw_spread
from lightning_fedhaw.report.history import RunHistory, read_run, read_runs
from lightning_fedhaw.report.plot_command import main
from lightning_fedhaw.report.plotting import (
    draw_bands,
    draw_clients,
    draw_comparison,
    draw_curves,
    draw_labels,
    draw_lines,
    draw_weights,
)

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
]
