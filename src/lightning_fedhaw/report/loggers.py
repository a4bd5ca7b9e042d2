"""What loggers are given at the end of a run beside numbers: the clients' table, and a picture of what was learned."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw.report.history import CLIENT_TABLE, WEIGHT_TABLE, History
from lightning_fedhaw.report.plotting import draw_weights

_TABLE, _PICTURE = "federation/per_client", "federation/weights"


def report(loggers: Sequence[Any], history: History, numbers: dict[str, float], step: int) -> None:
    """Give every logger the closing numbers, and those that can take them the table of clients and a heat map.

    A ``CSVLogger`` gets both as files beside its ``metrics.csv``. Where matplotlib is missing, or the weights are the
    shares of samples, there is no picture. Nobody's run fails for a report.

    Args:
        loggers: The trainer's.
        history: The run.
        numbers: Those of the closing table.
        step: The step to file them under.
    """
    for logger in loggers:
        try:
            logger.log_metrics(numbers, step=step)
            logger.save()
            _report(logger, history, step)
        except Exception as error:
            # The run is over and its model is good.
            rank_zero_warn(
                f"The closing numbers, the table of the clients and the picture of their weights could not all be"
                f" given to the {type(logger).__name__} ({type(error).__name__}: {error})."
            )


def _report(logger: Any, history: History, step: int) -> None:
    names, rows = history.client_table()
    if isinstance(logger, CSVLogger):
        _write(logger.log_dir, CLIENT_TABLE, *history.client_table(labels=True))
        if len(history.weights):
            clients = [f"client_{k}" for k in range(len(history.sizes))]
            _write(logger.log_dir, WEIGHT_TABLE, clients, history.weights.tolist())
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(_TABLE, _markdown(names, rows), step)
        if (picture := _picture(history)) is not None:
            logger.experiment.add_image(_PICTURE, picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_table(_TABLE, columns=names, data=rows, step=step)
        if (picture := _picture(history)) is not None:
            logger.log_image(_PICTURE, [picture], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, _csv(names, rows), f"{_TABLE}.csv")
        if (picture := _picture(history)) is not None:
            logger.experiment.log_image(logger.run_id, picture, f"{_PICTURE}.png")


def _picture(history: History) -> Any | None:
    """The heat map's pixels, ``[height, width, 3]``; None where there is nothing to draw, or nothing to draw with."""
    if history.weight_changes() is None:
        return None
    try:
        figure = draw_weights(history)
    except ModuleNotFoundError:
        return None
    figure.set_dpi(120)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def _csv(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if value != value else value for value in row] for row in rows])
    return text.getvalue()


def _write(folder: str, name: str, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    with get_filesystem(folder).open(posixpath.join(folder, name), "w") as file:
        file.write(_csv(names, rows))


def _markdown(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    body = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *body))
