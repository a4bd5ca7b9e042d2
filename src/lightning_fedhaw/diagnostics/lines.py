"""The loss of a trained module along lines: of scaled models, of an eigenvector, and between two checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_fedhaw.diagnostics.held_out import HeldOutLoss
from lightning_fedhaw.files import load_checked
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.layout import ParameterLayout


def loss_of_module(module: pl.LightningModule, batches: Iterable[Any]) -> HeldOutLoss:
    """Return the training loss of a module, in evaluation mode, as a function of its parameters.

    Args:
        module: The module. It is copied, so later changes of it have no effect.
        batches: All samples of the loss, such as a loader.

    Returns:
        The loss; ``loss.server.parameters()`` are the parameters ``[P]`` of the module.
    """
    own = copy.deepcopy(module)
    own.trainer = None
    sized = [(extract_batch_size(batch), batch) for batch in batches]
    if not sized:
        raise ValueError("`batches` must be at least one batch, such as a loader with samples, got none.")
    return HeldOutLoss(Server(own, ParameterLayout.of(own)), sized)


def scale_losses(loss: HeldOutLoss, scales: Sequence[float]) -> list[float]:
    """Return the loss of the module's parameters times each scale."""
    vector = loss.server.parameters()
    return [loss(scale * vector) for scale in scales]


def eigenvector_losses(loss: HeldOutLoss, distances: Sequence[float], steps: int = 50) -> list[float]:
    """Return the loss along the direction of the Hessian's largest eigenvalue.

    Args:
        loss: The loss of a module.
        distances: How far to go from the module's parameters; negative numbers go the other way.
        steps: The steps of Lanczos' method.
    """
    vector = loss.server.parameters()
    direction = loss.top_eigenvector(vector, steps)
    return [loss(vector + distance * direction) for distance in distances]


def segment_losses(loss: HeldOutLoss, first: str | Path, second: str | Path, positions: Sequence[float]) -> list[float]:
    """Return the loss on the segment between the models of two checkpoints, whose buffers are interpolated too.

    Args:
        loss: The loss of a module of the checkpoints' class.
        first: The checkpoint at position 0.
        second: The checkpoint at position 1.
        positions: Where to compute the loss.
    """
    start = _state(loss, first)
    end = _state(loss, second)
    losses = []
    for position in positions:
        mixed: dict[str, Tensor] = {}
        for name, tensor in start.items():
            mixed[name] = tensor
            if tensor.is_floating_point():
                mixed[name] = torch.lerp(tensor, end[name].to(tensor), position)
        layout = loss.server.layout
        vector = layout.read([mixed[name] for name in layout.names])
        losses.append(loss(vector, mixed))
    return losses


def _state(loss: HeldOutLoss, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint.

    Raises:
        ValueError: If it is not of the module.
    """
    with Path(path).open("rb") as file:
        content: Any = load_checked(file, str(path))
    state: dict[str, Tensor] = {}
    if isinstance(content, dict):
        state = content.get("state_dict", {})
    missing = [name for name in loss.server.layout.names if name not in state]
    if missing:
        raise ValueError(f"{str(path)!r} is not a checkpoint of this module: it has no {missing[0]!r}.")
    return state
