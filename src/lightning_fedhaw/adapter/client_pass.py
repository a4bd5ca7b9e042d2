"""What the trainer says about its batches while a client trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isinf

import lightning.pytorch as pl

from lightning_fedhaw.clients.steps import BatchProgress


@contextmanager
def client_pass(trainer: pl.Trainer, num_batches: int) -> Iterator[BatchProgress]:
    """Let the trainer's numbers of batches be those of one client inside the context.

    Between rounds the trainer's epoch has one batch, which is the round.

    Args:
        trainer: The trainer, with a round loop.
        num_batches: The number of batches in a pass over the client's data.

    Yields:
        The trainer's progress, whose ``is_last_batch`` the engine sets in the last batch of the client's task.
    """
    loop = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    is_last_batch = progress.is_last_batch
    max_batches = loop.max_batches
    max_steps = loop.epoch_loop.max_steps
    # Lightning computes it from the number of batches, and it remains the number of rounds.
    rounds = trainer.estimated_stepping_batches
    try:
        progress.is_last_batch = False
        loop.max_batches = num_batches
        if not isinf(rounds):
            loop.epoch_loop.max_steps = int(rounds)
        yield progress
    finally:
        progress.is_last_batch = is_last_batch
        loop.max_batches = max_batches
        loop.epoch_loop.max_steps = max_steps
