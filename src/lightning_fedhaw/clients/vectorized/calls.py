"""The plan of the batched calls that train a chunk of clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lightning_fedhaw.clients.vectorized.optimizers import RowIndex

PADDING_WORK = 300_000
"""The number of repeated samples times parameters that costs about as much time as a call of its own."""


class Call(NamedTuple):
    """One batched call.

    Attributes:
        rows: The rows that take part, in ascending order.
        row_index: The same as an index.
        samples: ``[rows, batch]`` int64, the indices of their samples.
        batch_index: The batch's number, the second argument of ``training_step``.
        lengths: ``[rows]``, the number of samples that count in each row: the first ones. ``None`` where all do.
    """

    rows: list[int]
    row_index: RowIndex
    samples: Tensor
    batch_index: int
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Sharing:
    """The shorter batches that may be part of a call with longer ones, as the trial finds them.

    Attributes:
        size: The length of the batches in a shared call.
        lengths: The shorter lengths with which the step was tried.
    """

    size: int = 0
    lengths: frozenset[int] = frozenset()


def worth_sharing(size: int, length: int, rows: int, parameters: int) -> bool:
    """Return whether batches of a length are better repeated up to another length than computed by a call of their own.

    Args:
        size: The length of the batches in a shared call.
        length: Their own length.
        rows: Their number.
        parameters: The number of parameters that each trains.
    """
    return (size - length) * rows * parameters <= PADDING_WORK


class CallPlan:
    """The calls of a chunk, whose rows are sorted: those with more samples first.

    Args:
        orders: By row and pass, the samples in the order in which the client sees them.
        batch_size: The loader's batch size.
        counts_steps: Whether batches are numbered through all passes; otherwise each pass begins with 0.
        uses_index: Whether the step reads the number of the batch.
        sharing: The shorter batches that may be part of a call with longer ones.
        parameters: The number of parameters that each client trains.
    """

    def __init__(
        self,
        orders: Sequence[Sequence[Tensor]],
        batch_size: int,
        *,
        counts_steps: bool,
        uses_index: bool,
        sharing: Sharing,
        parameters: int,
    ) -> None:
        self.orders = orders
        self.batch_size = batch_size
        self.counts_steps = counts_steps
        self.uses_index = uses_index
        self.sharing = sharing
        self.parameters = parameters

    def __iter__(self) -> Iterator[Call]:
        """Plan the calls, pass by pass."""
        batches_before = [0] * len(self.orders)
        for pass_idx in range(max(map(len, self.orders))):
            orders = []
            for passes in self.orders:
                # A client without this pass takes part with no samples.
                orders.append(passes[pass_idx] if pass_idx < len(passes) else passes[0][:0])
            if self.sharing.lengths:
                yield from self._shared_calls(orders, batches_before)
            else:
                yield from self._separate_calls(orders, batches_before)
            if self.counts_steps:
                for row, order in enumerate(orders):
                    batches_before[row] += _num_batches(order, self.batch_size)

    def _separate_calls(self, orders: list[Tensor], batches_before: Sequence[int]) -> Iterator[Call]:
        """Plan the calls of one pass: full batches, of fewer and fewer rows, then the shorter last ones by length.

        Args:
            orders: By row, the samples of the pass in their order.
            batches_before: By row, the batches of earlier passes.
        """
        size = self.batch_size
        num_samples = [order.numel() for order in orders]
        num_full = [count // size for count in num_samples]
        samples = pad_sequence(orders, batch_first=True)
        rows = list(range(len(orders)))
        for batch in range(max(num_full)):
            rows = [row for row in rows if num_full[row] > batch]
            for index, group in self._by_index(rows, batches_before, batch):
                row_index = row_index_of(group)
                yield Call(group, row_index, samples[row_index, batch * size : (batch + 1) * size], index)
        batches_before_last = [before + full for before, full in zip(batches_before, num_full, strict=True)]
        rows_by_length: dict[int, list[int]] = {}
        for row, count in enumerate(num_samples):
            if count % size:
                rows_by_length.setdefault(count % size, []).append(row)
        for length, rows in sorted(rows_by_length.items()):
            for index, group in self._by_index(rows, batches_before_last, 0):
                # The last batches of a length begin at other columns in each row.
                begins = torch.tensor([num_full[row] * size for row in group])
                columns = begins[:, None] + torch.arange(length)
                row_index = row_index_of(group)
                yield Call(group, row_index, samples[row_index].gather(1, columns), index)

    def _by_index(self, rows: list[int], batches_before: Sequence[int], batch: int) -> Iterable[tuple[int, list[int]]]:
        """Group rows by the batch index that their step is given; in one group where the step ignores it.

        Args:
            rows: The rows, at least one.
            batches_before: By row, the batches to count before ``batch``.
            batch: The number of the batch after these.
        """
        if not self.uses_index:
            return [(batches_before[rows[0]] + batch, rows)]
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(batches_before[row] + batch, []).append(row)
        return groups.items()

    def _shared_calls(self, orders: list[Tensor], batches_before: Sequence[int]) -> Iterator[Call]:
        """Plan the calls of one pass by the number of the batch, whose shorter ones are part of the same call.

        The arguments are those of :meth:`_separate_calls`. The step ignores the number of the batch.
        """
        size = self.batch_size
        num_samples = [order.numel() for order in orders]
        num_batches = -(-max(num_samples) // size)
        samples = pad_sequence(orders, batch_first=True)
        samples = pad(samples, (0, num_batches * size - samples.shape[1]))
        for batch in range(num_batches):
            begin = batch * size
            rows_by_length: dict[int, list[int]] = {}
            for row, count in enumerate(num_samples):
                if count > begin:
                    rows_by_length.setdefault(min(size, count - begin), []).append(row)
            for rows, length, lengths in self._groups(rows_by_length):
                row_index = row_index_of(rows)
                columns = samples[row_index, begin : begin + length]
                if lengths is not None:
                    # A sample of the client's own, whose values are finite if those of the others are.
                    counts = torch.arange(length) < lengths[:, None]
                    columns = columns.where(counts, columns[:, :1])
                yield Call(rows, row_index, columns, batches_before[rows[0]] + batch, lengths)

    def _groups(self, rows_by_length: dict[int, list[int]]) -> Iterator[tuple[list[int], int, Tensor | None]]:
        """Group the rows of one batch.

        Args:
            rows_by_length: The rows by the length of their batch.

        Yields:
            The rows of a call, the length of its batches, and where they differ how many samples of each row count.
        """
        size = self.sharing.size
        length_of: dict[int, int] = {}
        for length, rows in rows_by_length.items():
            is_tried = length == size or length in self.sharing.lengths
            if is_tried and worth_sharing(size, length, len(rows), self.parameters):
                length_of.update(dict.fromkeys(rows, length))
            else:
                yield rows, length, None
        if not length_of:
            return
        rows = sorted(length_of)
        lengths = [length_of[row] for row in rows]
        if min(lengths) == max(lengths):
            yield rows, lengths[0], None
        else:
            yield rows, size, torch.tensor(lengths, dtype=torch.float32)


def _num_batches(order: Tensor, batch_size: int) -> int:
    """Return the number of batches of a pass, the shorter last one included."""
    return -(-order.numel() // batch_size)


def row_index_of(rows: list[int]) -> RowIndex:
    """Return rows as a slice where they are neighbors, which makes no copies; else as an index tensor."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
