"""The size of a probe's batches: larger than in training where that changes nothing but the time.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from lightning_fedhaw.data.client_data import Batch, ClientData

LARGEST_BATCH = 1024
"""The samples of a larger batch at most: beyond, a pass was not measured to be faster."""

LARGEST_NUMBERS = 2**20
"""The numbers in a larger batch at most, because the memory of a pass grows with them."""

TOLERANCE = 1e-3
"""The difference of two gradients that counts as rounding, relative to their length."""


def with_batch_size(data: ClientData, batch_size: int) -> ClientData:
    """Return the same clients, with batches of another size of tensors in memory."""
    reader = copy.copy(data)
    if data.is_sliced:
        reader.settings = replace(data.settings, batch_size=batch_size, drop_last=False)
    if data.evaluation is not None:
        reader.evaluation = with_batch_size(data.evaluation, batch_size)
    return reader


def with_larger_batches(
    data: ClientData,
    gradients: Callable[[int, Iterable[Batch]], Sequence[Tensor]],
    *,
    held_out: bool,
    limit: int | float | None,
) -> ClientData:
    """Return the same clients with larger batches, if two batches in one have the mean of their gradients.

    That is found out by trying it, because nothing else tells for sure: batch statistics, dropout, and losses that
    compare samples or add them up all fail it. Every process finds the same.

    Args:
        data: The clients' data, with the batches of training.
        gradients: Returns the mean gradients over a client's batches, one a kind of variables; all have to agree.
        held_out: Whether the probe is of held-out data.
        limit: Batches of a pass at most, which would be other samples in larger batches.
    """
    source = data
    if held_out and data.evaluation is not None:
        source = data.evaluation
    batch_size = source.settings.batch_size
    if limit is not None or not source.is_sliced or source.settings.drop_last:
        return data
    samples = source.train_indices
    if held_out and data.evaluation is None:
        samples = data.held_out_indices
    largest = max(range(len(samples)), key=lambda client: len(samples[client]))
    if len(samples[largest]) <= batch_size:
        return data
    pair = list(islice(data.full_pass(largest, 0, held_out=held_out), 2))
    larger = min(LARGEST_BATCH, LARGEST_NUMBERS // max(1, _numbers(pair[0])))
    if larger < 2 * batch_size:
        return data
    together = islice(with_batch_size(data, 2 * batch_size).full_pass(largest, 0, held_out=held_out), 1)
    # Of single batches, too: the mean of their gradients is near zero where training has converged.
    parts = [gradients(largest, [batch]) for batch in pair]
    for joint, split, *singles in zip(gradients(largest, together), gradients(largest, pair), *parts, strict=True):
        difference = torch.linalg.vector_norm(joint - split)
        length = sum(torch.linalg.vector_norm(single) for single in singles) / len(singles)
        if not difference <= TOLERANCE * length:
            return data
    return with_batch_size(data, larger)


def _numbers(batch: Batch) -> int:
    """Count the numbers of a sample of a batch."""
    numbers = 0
    for tensor in batch.data:
        numbers += tensor[0].numel()
    return numbers
