"""What rules and client objectives may read of the clients' local training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import lightning.pytorch as pl
from torch.optim import Optimizer


class Reader(Protocol):
    """A rule or a client objective."""

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Read what is needed."""


@dataclass(frozen=True)
class LocalTraining:
    """How clients train: what a rule or a client objective may read of it.

    It holds the optimizers and not their settings, which schedules change from round to round and which a checkpoint
    replaces. So they are read where they are needed, and not kept from one round to the next.

    Attributes:
        module: The user's module.
        optimizers: The optimizers that ``configure_optimizers`` returned, with the settings of the coming round.
        proximal: The sum of the proximal coefficients of all client objectives.
        optimizer_state: Whether clients keep their optimizer states from round to round (``"kept"``), or begin every
            round without any (``"fresh"``).
    """

    module: pl.LightningModule
    optimizers: Sequence[Optimizer]
    proximal: float
    optimizer_state: Literal["fresh", "kept"]

    def show(self, *readers: Reader) -> None:
        """Let a rule and client objectives read what they need."""
        for reader in readers:
            reader.read_local_training(self)
