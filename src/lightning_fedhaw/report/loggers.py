"""What loggers are given at the end of a run: its numbers, a table of the clients, and a picture of their weights."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw.report.history import CLIENT_TABLE, WEIGHT_TABLE, RunHistory
from lightning_fedhaw.report.plotting import draw_weights

_TABLE = "federation/per_client"
_PICTURE = "federation/weights"


def report(loggers: Sequence[Any], history: RunHistory, numbers: dict[str, float], step: int) -> None:
    """Give every logger the numbers of the run, and those that can take them the table of clients and a heat map.

    A ``CSVLogger`` gets both as files beside its ``metrics.csv``. Where matplotlib is missing, or the weights are the
    shares of samples, there is no picture. No run fails because of its report.

    Args:
        loggers: The trainer's.
        history: The run.
        numbers: Those of the run summary.
        step: The step to file them under.
    """
    for logger in loggers:
        try:
            logger.log_metrics(numbers, step=step)
            logger.save()
            _report(logger, history, step)
        except Exception as error:
            # The run is over and its model is good; a logger may fail in any way, as with a full disk.
            rank_zero_warn(
                f"The closing numbers, the table of the clients and the picture of their weights could not all be"
                f" given to the {type(logger).__name__} ({type(error).__name__}: {error})."
            )


def _report(logger: Any, history: RunHistory, step: int) -> None:
    """Give a logger the table and the picture, in the way that its kind takes them."""
    if isinstance(logger, CSVLogger):
        _to_csv(logger, history)
    elif isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger, history, step)
    elif isinstance(logger, WandbLogger):
        _to_wandb(logger, history, step)
    elif isinstance(logger, MLFlowLogger):
        _to_mlflow(logger, history)


def _to_csv(logger: CSVLogger, history: RunHistory) -> None:
    columns, rows = history.client_table(labels=True)
    _write(logger.log_dir, CLIENT_TABLE, columns, rows)
    if len(history.weights):
        clients = [f"client_{k}" for k in range(len(history.sizes))]
        _write(logger.log_dir, WEIGHT_TABLE, clients, history.weights.tolist())


def _to_tensorboard(logger: TensorBoardLogger, history: RunHistory, step: int) -> None:
    columns, rows = history.client_table()
    logger.experiment.add_text(_TABLE, _markdown(columns, rows), step)
    picture = _picture(history)
    if picture is not None:
        logger.experiment.add_image(_PICTURE, picture, step, dataformats="HWC")


def _to_wandb(logger: WandbLogger, history: RunHistory, step: int) -> None:
    columns, rows = history.client_table()
    logger.log_table(_TABLE, columns=columns, data=rows, step=step)
    picture = _picture(history)
    if picture is not None:
        logger.log_image(_PICTURE, [picture], step=step)


def _to_mlflow(logger: MLFlowLogger, history: RunHistory) -> None:
    columns, rows = history.client_table()
    logger.experiment.log_text(logger.run_id, _csv(columns, rows), f"{_TABLE}.csv")
    picture = _picture(history)
    if picture is not None:
        logger.experiment.log_image(logger.run_id, picture, f"{_PICTURE}.png")


def _picture(history: RunHistory) -> Any | None:
    """Draw the heat map, ``[height, width, 3]``; ``None`` where there is nothing to draw, or nothing to draw with."""
    if history.weight_changes() is None:
        return None
    try:
        figure = draw_weights(history)
    except ModuleNotFoundError:
        return None
    figure.set_dpi(120)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def _write(folder: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Write a table into a folder, which may lie on a remote file system."""
    with get_filesystem(folder).open(posixpath.join(folder, name), "w") as file:
        file.write(_csv(columns, rows))


def _csv(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        # An empty cell for what is not a number, which the reader leaves out.
        writer.writerow(["" if isnan(value) else value for value in row])
    return text.getvalue()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    lines = [_markdown_line(columns), _markdown_line(["---"] * len(columns))]
    for row in rows:
        lines.append(_markdown_line([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]))
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
