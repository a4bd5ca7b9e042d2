"""The weight decay of the clients' optimizers, which is a part of the problem that clients solve.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_fedhaw.vectors.layout import ParameterLayout

ADDS_DECAY_TO_GRADIENT = (
    optim.SGD,
    optim.Adam,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.ASGD,
)
"""Optimizers whose weight decay adds half a squared norm to the loss, unless a group says that it is decoupled."""


def weight_decay(module: pl.LightningModule, optimizers: Iterable[Optimizer], layout: ParameterLayout) -> Tensor | None:
    """Return the coefficient of half the squared norm of each parameter in the loss that the optimizers minimize.

    Returns:
        A scalar or ``[P]``; ``None`` if all of them are zero.
    """
    decays: dict[Tensor, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decay = float(group.get("weight_decay") or 0.0)
            if decay and not is_decoupled(optimizer, group):
                decays.update(dict.fromkeys(group["params"], decay))
    if not decays:
        return None
    parameters = layout.tensors(module)
    return layout.expand([decays.get(parameter, 0.0) for parameter in parameters], parameters[0].device)


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether an optimizer shrinks parameters by itself, which is the gradient of no loss (AdamW).

    Args:
        optimizer: The optimizer. Of one that is not torch's nothing is known, and it is taken for one that does.
        group: One of its parameter groups.
    """
    if group.get("decoupled_weight_decay", False) or isinstance(optimizer, optim.AdamW):
        return True
    return not isinstance(optimizer, ADDS_DECAY_TO_GRADIENT)
