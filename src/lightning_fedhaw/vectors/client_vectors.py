"""What a round brings to the server: frozen records, and the linear algebra of a cohort's parameter vectors.

Shapes: N clients exist, K of them are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.vectors.memory import empty

RUN = 1 << 10
"""Products that are summed in the precision they have; the sums of runs are added in float64."""

LEAST_SUM = 2.0**-90
"""A float32 sum of products that is smaller may be made of products that were rounded away, up to 2^-149 each."""

STATE_TYPE = "ClientVectors"
"""By what a checkpoint's reader tells vectors from other dictionaries."""


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


class ClientVectors:
    """K parameter vectors, used through a few linear verbs.

    The vectors are kept as displacements from a common start, because client models are nearly equal and the
    information is in the difference. As a matrix, row k is ``start + matrix[k]``.

    Work is done where the matrix is, in the pieces of that device (:func:`pieces_for`). A verb whose answer is on the
    CPU moves it there once, at the end.

    ``weighted_sum`` and ``inner`` are differentiable, and each is the other's transpose. On the CPU and with an equal
    number of threads, an element of ``weighted_sum`` depends to the last bit on its own column alone, and a number of
    ``inner``, ``norms`` and ``distances`` on its own row.

    Args:
        matrix: ``[K, P]`` displacements; on any device, in any floating dtype.
        start: ``[P]``, what the rows are displaced from. ``None`` stands for zero.

    Example:
        >>> vectors = ClientVectors(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), start=torch.tensor([1.0, 1.0]))
        >>> vectors.weighted_sum(torch.tensor([0.5, 0.5]))
        tensor([2.0000, 1.5000])
        >>> vectors.inner(torch.tensor([1.0, 0.0])).tolist()
        [1.0, 3.0]
    """

    def __init__(self, matrix: Tensor, start: Tensor | None = None) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"`matrix` must have the shape [clients, parameters], got {list(matrix.shape)}.")
        self.matrix = matrix
        self.start = start

    def __len__(self) -> int:
        return self.matrix.shape[0]

    @property
    def displacements(self) -> ClientVectors:
        """The same rows measured from the start: ``matrix`` alone."""
        return self._like(self.matrix, None) if self.start is not None else self

    def _like(self, matrix: Tensor, start: Tensor | None) -> ClientVectors:
        return ClientVectors(matrix, start)

    def to(self, device: torch.device) -> ClientVectors:
        """The same vectors on a device; themselves if they are there already."""
        start = None if self.start is None else self.start.to(device)
        matrix = self.matrix.to(device)
        return self if matrix is self.matrix and start is self.start else self._like(matrix, start)

    def state_dict(self) -> dict[str, Any]:
        """The vectors as plain tensors, for a checkpoint; :meth:`from_state` makes them vectors again."""
        matrix = self.matrix
        # A file holds a view's whole storage, rows of nobody included.
        if matrix.untyped_storage().nbytes() > matrix.numel() * matrix.element_size():
            matrix = matrix.clone()
        return {"type": STATE_TYPE, "matrix": matrix, "start": self.start}

    @staticmethod
    def is_state(value: Any) -> bool:
        """Whether a value of a checkpoint is what :meth:`state_dict` gave."""
        return isinstance(value, Mapping) and value.get("type") == STATE_TYPE

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClientVectors:
        """The vectors of a checkpoint."""
        return cls(state["matrix"], state["start"])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Mix the clients: ``sum_k weights[k] * vector_k``.

        Args:
            weights: ``[K]``; gradients flow back to it.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        _check_length("weights", weights, len(self))
        return _WeightedSum.apply(weights, self)  # type: ignore[no-any-return]

    def inner(self, vector: Tensor) -> Tensor:
        """Pull a server vector back onto the clients: ``<vector, vector_k>`` for every client.

        Args:
            vector: ``[P]``; gradients flow back to it.

        Returns:
            ``[K]`` float64, on the CPU: sums over parameters are kept in double precision.
        """
        _check_length("vector", vector, self.matrix.shape[1])
        return _Inner.apply(vector, self)  # type: ignore[no-any-return]

    def gram(self) -> Tensor:
        """``[K, K]`` float64 on the CPU: inner products of all pairs of vectors."""
        return self._gram().cpu()

    def _gram(self) -> Tensor:
        """The same, where the matrix is."""
        near = self.to(self.matrix.device)
        dtype = pieces_for(self.matrix.device).dtype or self._working_dtype
        total = near._products(dtype)
        if dtype == torch.float64:
            return total
        lost = ~torch.isfinite(total) | (total.abs().amax() < LEAST_SUM)
        return torch.where(lost, near._products(torch.float64), total) if lost.any() else total

    def _products(self, dtype: torch.dtype) -> Tensor:
        count, length = self.matrix.shape
        total = torch.zeros(count, count, dtype=torch.float64, device=self.matrix.device)
        for columns, rows in _pieces(count, 0, length, self.matrix, dtype):
            self._rows(slice(None), columns, rows)
            total += rows @ rows.T
        return total

    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Euclidean norms of the vectors, ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU."""
        return self.distances(None, groups)

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Euclidean distances from a point ``[P]`` (``None``: the origin), ``[K]`` or ``[groups, K]``, float64, CPU."""
        near = self.to(self.matrix.device)
        middle = None if center is None else center.to(self.matrix.device)

        def squares(rows: slice, columns: slice, out: Tensor) -> None:
            near._rows(rows, columns, out)
            if middle is not None:
                out -= middle[columns].to(out)
            out.square_()

        def squared(part: slice) -> Tensor:
            begin, end, _ = part.indices(self.matrix.shape[1])
            return _row_sums(squares, len(self), begin, end, self.matrix, self._working_dtype)

        if groups is None:
            return squared(slice(None)).sqrt().cpu()
        sums = [torch.stack([squared(part) for part in parts]).sum(0) for parts in groups.values()]
        return torch.stack(sums).sqrt().cpu()

    def gather(self) -> Tensor:
        """All vectors as one new matrix ``[K, P]``: for rules that need order statistics, at the price of a copy."""
        like = self.matrix if self.start is None else self.start
        return self._rows(
            slice(None), slice(None), torch.empty_like(self.matrix, dtype=self._working_dtype, device=like.device)
        )

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """One number of every parameter from all clients' values of it: order statistics without a second matrix.

        Args:
            function: ``[K, columns] -> [columns]``, for any number of columns at a time. Its argument may be changed.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        count, length = self.matrix.shape
        near = self.to(self.matrix.device)
        found = torch.empty(length, dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in _pieces(count, 0, length, self.matrix, self._working_dtype):
            found[columns] = function(near._rows(slice(None), columns, rows))
        return found if self.start is None else found.to(self.start.device)

    def _rows(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """A piece of the vectors themselves, written into ``[rows, columns]`` of the working dtype."""
        out.copy_(self.matrix[rows, columns])
        if self.start is not None:
            out += self.start[columns].to(out.device)
        return out

    @property
    def _working_dtype(self) -> torch.dtype:
        own = torch.promote_types(self.matrix.dtype, torch.float32)
        return own if self.start is None else torch.promote_types(own, self.start.dtype)

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        matrix, dtype = self.matrix, self._working_dtype
        pieces = pieces_for(matrix.device)
        mixed = empty(matrix.shape[1], dtype=dtype, device=matrix.device)
        if pieces is CPU:
            accumulate(mixed.zero_(), matrix, weights.tolist())
        else:
            scaled = weights.to(matrix.device, dtype)
            width = pieces.width(len(matrix))
            for piece, out in zip(torch.split(matrix, width, 1), torch.split(mixed, width), strict=True):
                torch.mv(piece.to(dtype).T, scaled, out=out)
        if self.start is None:
            return mixed
        return from_start(self.start, weights, mixed)

    def _inner(self, vector: Tensor) -> Tensor:
        matrix = self.matrix
        moved = vector.to(matrix.device, torch.promote_types(matrix.dtype, torch.float32))

        def products(rows: slice, columns: slice, out: Tensor) -> None:
            torch.mul(matrix[rows, columns], moved[columns].to(out), out=out)

        found = _row_sums(products, len(self), 0, len(moved), moved, moved.dtype)
        if self.start is not None:
            found = found + _dot(vector, self.start).to(found.device)
        return found.cpu()


class AccumulatedVectors:
    """The weighted sum of vectors that were never kept, for rules that name each client's weight beforehand.

    Memory is one vector, whatever the number of clients. Only the mix for the accumulated weights exists; any other
    verb needs the vectors and says so.

    Args:
        total: ``[P]``, the sum of raw weight times displacement.
        raw_weights: ``[K]``, the raw weight of each client that was added.
        start: ``[P]``, what the displacements are measured from. ``None`` stands for zero.
        rule: Name of the rule, for error messages.
    """

    def __init__(self, total: Tensor, raw_weights: Tensor, start: Tensor | None, rule: str) -> None:
        self.total = total
        self.raw_weights = raw_weights
        self.start = start
        self.rule = rule

    def __len__(self) -> int:
        return len(self.raw_weights)

    @property
    def weights(self) -> Tensor:
        """``[K]`` float64: the raw weights, normalised to sum to one."""
        return self.raw_weights / self.raw_weights.sum()

    @property
    def displacements(self) -> AccumulatedVectors:
        """The same sum measured from the start."""
        return AccumulatedVectors(self.total, self.raw_weights, None, self.rule)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The mix, for the one set of weights that was accumulated (up to a common factor).

        Raises:
            RuntimeError: If other weights are asked for.
        """
        _check_length("weights", weights, len(self))
        scale = weights.detach().double().sum() / self.raw_weights.sum()
        if not torch.allclose(weights.detach().double(), self.raw_weights * scale, rtol=1e-9, atol=0.0):
            raise RuntimeError(self._sentence("a weighted sum with weights other than its `raw_weight`"))
        mixed = self.total * scale.item()
        return mixed if self.start is None else mixed.add_(self.start, alpha=weights.sum().item())

    def __getattr__(self, name: str) -> Any:
        if name in {"inner", "gram", "norms", "distances", "gather", "map_columns", "matrix"}:
            raise RuntimeError(self._sentence(f"`{name}`"))
        raise AttributeError(name)

    def _sentence(self, what: str) -> str:
        return (
            f"`{self.rule}` declares `raw_weight`, so the clients' vectors were summed as they came and not kept, but"
            f' it then asked for {what}. Remove `raw_weight` from the rule, or set `storage="device"`.'
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors ``[P]`` as a float64 CPU scalar: runs of products, added in double precision."""
    return _dot(a, b).cpu()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The same, on the device of the first."""
    return _row_sums(lambda _, c, out: torch.mul(a[c], b[c].to(out), out=out[0]), 1, 0, len(a), a, a.dtype)[0]


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


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors, ctx.like = vectors, weights
        return vectors._weighted_sum(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.inner(grad).to(ctx.like), None


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors, ctx.like = vectors, vector
        return vectors._inner(vector)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.weighted_sum(grad).to(ctx.like), None


def from_start(start: Tensor, weights: Tensor, mixed: Tensor) -> Tensor:
    """A mix of displacements ``[P]``, which is used up, as a mix of vectors."""
    # The start's share is one scalar times one vector; weights that sum to one leave it exactly alone.
    return mixed.to(start).add_(start, alpha=weights.sum().item())


def _row_sums(
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
        done = 0
        for columns, piece in _pieces(group.stop - first, begin, end, like, dtype):
            write(group, columns, piece)
            runs = piece.view(len(piece), -1, min(RUN, piece.shape[1]))
            torch.sum(runs, 2, out=sums[group, done : done + runs.shape[1]])
            done += runs.shape[1]
    if pieces is not CPU:
        return sums.sum(1, dtype=torch.float64)
    totals = torch.stack([row.sum() for row in sums.double()])
    if dtype == torch.float64:
        return totals
    is_lost = ~torch.isfinite(totals) | (totals.abs() < LEAST_SUM)
    for k in is_lost.nonzero().flatten().tolist():

        def write_row(_: slice, columns: slice, out: Tensor, row: slice = slice(k, k + 1)) -> None:
            write(row, columns, out)

        totals[k] = _row_sums(write_row, 1, begin, end, like, torch.float64)[0]
    return totals


def _pieces(rows: int, begin: int, end: int, like: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns in pieces of whole runs (the last few columns by themselves), each with a place ``[K, columns]``.

    It is one place for all: a temporary a piece, small things kept between them, would leave the heap in shreds.
    """
    whole = end - (end - begin) % RUN
    span = pieces_for(like.device).width(rows)
    place = torch.empty(rows * min(span, end - begin), dtype=dtype, device=like.device)
    for i in (*range(begin, whole, span), *([whole] if whole < end else [])):
        columns = slice(i, min(i + span, whole) if i < whole else end)
        width = columns.stop - i
        yield columns, place[: rows * width].view(rows, width)


def _check_length(name: str, tensor: Tensor, length: int) -> None:
    if tensor.shape != (length,):
        raise ValueError(f"`{name}` must have the shape [{length}], got {list(tensor.shape)}.")
