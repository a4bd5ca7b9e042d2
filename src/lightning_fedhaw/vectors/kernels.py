"""The arithmetic of a cohort's vectors: sums over long rows and columns, piece by piece.

A kernel never sees a whole ``[K, P]`` temporary: it goes through the numbers in the pieces that suit the device. What
holds the numbers, and what they mean, is the business of the vectors that call it.

Shapes: K vectors, P parameters each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 1 << 10
"""Products that are summed in the precision they have; the sums of runs are added in float64."""

LEAST_SUM = 2.0**-90
"""A float32 sum of products that is smaller may be made of products that were rounded away, up to 2^-149 each."""


@dataclass(frozen=True)
class Pieces:
    """The pieces in which a kind of device goes through a cohort's ``[K, P]`` numbers.

    Attributes:
        columns: Columns of a piece at most.
        elements: Numbers of a ``[rows, columns]`` piece at most, of which one temporary exists at a time.
        rows: Rows of a piece at most, where rows are summed.
        dtype: What products are formed and summed in; ``None``: in the vectors' own precision.
    """

    columns: int
    elements: int
    rows: int
    dtype: torch.dtype | None

    def width(self, rows: int) -> int:
        """Columns of a piece of so many rows: whole runs."""
        return max(RUN, min(self.columns, self.elements // max(rows, 1)) // RUN * RUN)


CPU = Pieces(columns=1 << 18, elements=1 << 19, rows=8, dtype=None)
"""A piece stays in cache. Of more rows, pieces of a row are too short for the memory to keep up."""

ACCELERATOR = Pieces(columns=1 << 25, elements=1 << 25, rows=1 << 15, dtype=torch.float64)
"""A piece is worth the launch of its kernels and takes 256 MiB at most, little beside a cohort that needs several.
Products are float64: they wait for the memory anyway, and float32 ones of matrices may be TensorFloat-32's."""


def pieces_for(device: torch.device) -> Pieces:
    """The pieces of a device."""
    return CPU if device.type == "cpu" else ACCELERATOR


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors ``[P]`` as a float64 CPU scalar: runs of products, added in double precision."""
    return dot_on_device(a, b).cpu()


def dot_on_device(a: Tensor, b: Tensor) -> Tensor:
    """The same, on the device of the first."""
    return row_sums(lambda _, c, out: torch.mul(a[c], b[c].to(out), out=out[0]), 1, 0, len(a), a, a.dtype)[0]


def accumulate(out: Tensor, rows: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Add ``sum_k weights[k] * rows[k]`` to a vector, one row after another.

    On the CPU each element depends on its own column alone: columns may be shared out between processes anyhow, and
    rows may come in several calls; the bits stay the same.

    Args:
        out: ``[P]``, changed in place.
        rows: K rows ``[P]`` of any floating dtype, on the device of ``out``; a matrix ``[K, P]`` will do.
        weights: K numbers.

    Returns:
        ``out``.
    """
    terms = list(zip(rows, weights, strict=True))
    width = pieces_for(out.device).columns
    for i in range(0, out.numel(), width):
        block = out[i : i + width]
        for row, weight in terms:
            block.add_(row[i : i + width], alpha=weight)
    return out


def from_start(start: Tensor, weights: Tensor, mixed: Tensor) -> Tensor:
    """Turn a mix of displacements ``[P]``, which is used up, into a mix of vectors."""
    # The start's share is one scalar times one vector; weights that sum to one leave it exactly alone.
    return mixed.to(start).add_(start, alpha=weights.sum().item())


def row_sums(
    write: Callable[[slice, slice, Tensor], object], rows: int, begin: int, end: int, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """``[K]`` float64 on a tensor's device: sums along the rows of a ``[K, columns]`` matrix, written piece by piece.

    On the CPU, the bits of a row's sum depend on that row alone: not on the other rows or their number, and not on
    where it lies in memory, as those of a library's inner product do.

    Args:
        write: ``write(rows, columns, out)`` fills a piece, whatever its dtype.
        rows: K.
        begin: The first column.
        end: The column after the last.
        like: Whose device it is.
        dtype: The vectors' own precision. Rows whose sum it cannot hold are summed again in float64.
    """
    pieces = pieces_for(like.device)
    dtype = pieces.dtype or dtype
    if not rows:
        return torch.zeros(0, dtype=torch.float64, device=like.device)
    sums = torch.empty(rows, -(-(end - begin) // RUN), dtype=dtype, device=like.device)
    for first in range(0, rows, pieces.rows):
        group = slice(first, min(first + pieces.rows, rows))
        # Runs of a fixed length are summed first, so that the bits do not depend on the width of a piece.
        num_summed = 0
        for columns, piece in column_pieces(group.stop - first, begin, end, like, dtype):
            write(group, columns, piece)
            runs = piece.view(len(piece), -1, min(RUN, piece.shape[1]))
            torch.sum(runs, 2, out=sums[group, num_summed : num_summed + runs.shape[1]])
            num_summed += runs.shape[1]
    if pieces is not CPU:
        return sums.sum(1, dtype=torch.float64)
    totals = torch.stack([row.sum() for row in sums.double()])
    if dtype == torch.float64:
        return totals
    is_lost = ~torch.isfinite(totals) | (totals.abs() < LEAST_SUM)
    for k in is_lost.nonzero().flatten().tolist():

        def write_row(_: slice, columns: slice, out: Tensor, row: slice = slice(k, k + 1)) -> None:
            write(row, columns, out)

        totals[k] = row_sums(write_row, 1, begin, end, like, torch.float64)[0]
    return totals


def column_pieces(rows: int, begin: int, end: int, like: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns in pieces of whole runs (the last few columns by themselves), each with a place ``[K, columns]``.

    It is one place for all: a temporary a piece, small things kept between them, would leave the heap in shreds.
    """
    end_of_whole_runs = end - (end - begin) % RUN
    span = pieces_for(like.device).width(rows)
    memory = torch.empty(rows * min(span, end - begin), dtype=dtype, device=like.device)
    ranges = []
    for first in range(begin, end_of_whole_runs, span):
        ranges.append(slice(first, min(first + span, end_of_whole_runs)))
    if end_of_whole_runs < end:
        ranges.append(slice(end_of_whole_runs, end))
    for columns in ranges:
        width = columns.stop - columns.start
        yield columns, memory[: rows * width].view(rows, width)


def all_finite(tensor: Tensor) -> bool:
    """Return whether every element is finite, in one read of the tensor where it is."""
    # A finite sum proves it without a temporary; a sum can overflow, though, so the other answer is checked.
    if torch.isfinite(tensor.sum()):
        return True
    return bool(torch.isfinite(tensor).all())
