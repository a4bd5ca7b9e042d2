"""The final report to the loggers: the numbers of a run, a table of the clients, and a picture of their weights."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Mapping, Sequence
from math import isnan

import numpy as np
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lightning_fedhaw.report.client_pictures import draw_weights
from lightning_fedhaw.report.history import CLIENT_TABLE, WEIGHT_TABLE, RunHistory

_TABLE = "federation/per_client"
_PICTURE = "federation/weights"


def report(loggers: Sequence[Logger], history: RunHistory, numbers: dict[str, float], step: int) -> None:
    """Give every logger the numbers of the run, and those that can take them the table of clients and a heat map.

    A ``CSVLogger`` gets both as files next to its ``metrics.csv``. Where matplotlib is missing, or the weights are the
    shares of samples, there is no picture. No run fails because of its report.

    Args:
        loggers: The trainer's loggers.
        history: The history of the run.
        numbers: The numbers of the run summary, by flat names.
        step: The step under which they are logged.
    """
    for logger in loggers:
        try:
            logger.log_metrics(numbers, step=step)
            logger.save()
            _log_clients(logger, history, step)
        except Exception as error:
            # The run is over and its model is good, and a logger may fail in any way: full disks, lost connections,
            # errors of its own. Its failure must not cost the user the model.
            rank_zero_warn(
                f"The numbers of the run summary, the table of the clients and the picture of their weights could not"
                f" all be given to the {type(logger).__name__} ({type(error).__name__}: {error})."
            )


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, object]) -> None:
    """Give the rule's and the federation's settings to the loggers that keep a configuration: CSV, W&B and MLflow.

    Args:
        loggers: The trainer's loggers.
        settings: The settings as plain values, by the names of the command line.
    """
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                _to_wandb_config(logger, settings)
            elif isinstance(logger, (CSVLogger, MLFlowLogger)):
                logger.log_hyperparams(dict(settings))
        except Exception as error:
            # As with the final report: a logger may fail in any way, and must not cost the user the run.
            rank_zero_warn(
                f"The settings of the run could not be given to the {type(logger).__name__}"
                f" ({type(error).__name__}: {error})."
            )


def _to_wandb_config(logger: WandbLogger, settings: Mapping[str, object]) -> None:
    run = logger.experiment
    changes = dict(settings)
    if run.sweep_id:
        # A sweep has set its own parameters, under the same names, and refuses to have them changed.
        changes = {name: value for name, value in settings.items() if name not in run.config}
    logger.log_hyperparams(changes)


def _log_clients(logger: Logger, history: RunHistory, step: int) -> None:
    """Log the table and the picture in the way of the logger's class; other classes have none that is common."""
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
    weights = history.weights
    if len(weights):
        clients = [f"client_{client}" for client in range(len(history.sizes))]
        _write(logger.log_dir, WEIGHT_TABLE, clients, weights.tolist())


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


def _picture(history: RunHistory) -> NDArray[np.uint8] | None:
    """Draw the heat map of the weights as pixels ``[height, width, 3]``.

    Returns:
        The pixels; ``None`` where the weights are the shares of samples, or matplotlib is missing.
    """
    if history.weight_changes() is None:
        return None
    try:
        figure = draw_weights(history)
    except ModuleNotFoundError:
        return None
    figure.set_dpi(120)
    figure.canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    # Without the opacity, which not every logger takes; a copy, because the canvas reuses its memory.
    return pixels[..., :3].copy()


def _write(folder: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Write a table into a folder, which may lie on a remote file system."""
    with get_filesystem(folder).open(posixpath.join(folder, name), "w") as file:
        file.write(_csv(columns, rows))


def _csv(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(value) for value in row])
    return text.getvalue()


def _csv_cell(value: float) -> float | str:
    """Return an empty cell for NaN, which readers of CSV files take for a missing value."""
    if isnan(value):
        return ""
    return value


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    lines = [_markdown_line(columns), _markdown_line(["---"] * len(columns))]
    for row in rows:
        lines.append(_markdown_line([_markdown_cell(value) for value in row]))
    return "\n".join(lines)


def _markdown_cell(value: int | float) -> str:
    """Format a number: counts in full, measurements to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
