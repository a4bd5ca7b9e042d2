"""The parameter vectors of a cohort, kept as a matrix.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.vectors.base import CohortVectors, check_length
from lightning_fedhaw.vectors.kernels import (
    CPU,
    LEAST_SUM,
    accumulate,
    column_pieces,
    dot_on_device,
    from_start,
    pieces_for,
    row_sums,
)
from lightning_fedhaw.vectors.memory import empty

STATE_TYPE = "ClientVectors"
"""By what a checkpoint's reader tells vectors from other dictionaries."""


class ClientVectors(CohortVectors):
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
        if self.start is None:
            return self
        return self._like(self.matrix, None)

    def _like(self, matrix: Tensor, start: Tensor | None) -> ClientVectors:
        return ClientVectors(matrix, start)

    def to(self, device: torch.device) -> ClientVectors:
        """Move the vectors to a device; they stay themselves if they are there already."""
        matrix = self.matrix.to(device)
        start = None if self.start is None else self.start.to(device)
        if matrix is self.matrix and start is self.start:
            return self
        return self._like(matrix, start)

    def state_dict(self) -> dict[str, Any]:
        """Take the vectors apart into plain tensors, for a checkpoint; :meth:`from_state` puts them together again."""
        matrix = self.matrix
        # A file holds a view's whole storage, rows of nobody included.
        if matrix.untyped_storage().nbytes() > matrix.numel() * matrix.element_size():
            matrix = matrix.clone()
        return {"type": STATE_TYPE, "matrix": matrix, "start": self.start}

    @staticmethod
    def is_state(value: Any) -> bool:
        """Say whether a value of a checkpoint is what :meth:`state_dict` gave."""
        return isinstance(value, Mapping) and value.get("type") == STATE_TYPE

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClientVectors:
        """Put the vectors of a checkpoint together."""
        return cls(state["matrix"], state["start"])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Mix the clients: ``sum_k weights[k] * vector_k``.

        Args:
            weights: ``[K]``; gradients flow back to it.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        check_length("weights", weights, len(self))
        mixed: Tensor = _WeightedSum.apply(weights, self)
        return mixed

    def inner(self, vector: Tensor) -> Tensor:
        """Pull a server vector back onto the clients: ``<vector, vector_k>`` for every client.

        Args:
            vector: ``[P]``; gradients flow back to it.

        Returns:
            ``[K]`` float64, on the CPU: sums over parameters are kept in double precision.
        """
        check_length("vector", vector, self.matrix.shape[1])
        products: Tensor = _Inner.apply(vector, self)
        return products

    def gram(self) -> Tensor:
        """Compute the inner products of all pairs of vectors, ``[K, K]`` float64 on the CPU."""
        return self._gram().cpu()

    def _gram(self) -> Tensor:
        """Compute the same, and leave it where the matrix is."""
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
        for columns, rows in column_pieces(count, 0, length, self.matrix, dtype):
            self._rows(slice(None), columns, rows)
            total += rows @ rows.T
        return total

    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean norms, ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU."""
        return self.distances(None, groups)

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean distances from a point ``[P]``, or from the origin where it is ``None``.

        Args:
            center: The point.
            groups: Slices of the flat vector by name: a distance within each.

        Returns:
            ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU.
        """
        near = self.to(self.matrix.device)
        middle = None if center is None else center.to(self.matrix.device)

        def squares(rows: slice, columns: slice, out: Tensor) -> None:
            near._rows(rows, columns, out)
            if middle is not None:
                out -= middle[columns].to(out)
            out.square_()

        def squared(part: slice) -> Tensor:
            begin, end, _ = part.indices(self.matrix.shape[1])
            return row_sums(squares, len(self), begin, end, self.matrix, self._working_dtype)

        if groups is None:
            return squared(slice(None)).sqrt().cpu()
        sums = [torch.stack([squared(part) for part in parts]).sum(0) for parts in groups.values()]
        return torch.stack(sums).sqrt().cpu()

    def gather(self) -> Tensor:
        """Copy all vectors into one new matrix ``[K, P]``, for rules that need every value at once."""
        like = self.matrix if self.start is None else self.start
        whole = torch.empty_like(self.matrix, dtype=self._working_dtype, device=like.device)
        return self._rows(slice(None), slice(None), whole)

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Make one number of every parameter from all clients' values of it: order statistics without a second matrix.

        Args:
            function: ``[K, columns] -> [columns]``, for any number of columns at a time. Its argument may be changed.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        count, length = self.matrix.shape
        near = self.to(self.matrix.device)
        found = torch.empty(length, dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in column_pieces(count, 0, length, self.matrix, self._working_dtype):
            found[columns] = function(near._rows(slice(None), columns, rows))
        if self.start is None:
            return found
        return found.to(self.start.device)

    def _rows(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Write a piece of the vectors themselves into ``[rows, columns]`` of the working dtype."""
        out.copy_(self.matrix[rows, columns])
        if self.start is not None:
            out += self.start[columns].to(out.device)
        return out

    @property
    def _working_dtype(self) -> torch.dtype:
        own = torch.promote_types(self.matrix.dtype, torch.float32)
        if self.start is None:
            return own
        return torch.promote_types(own, self.start.dtype)

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        matrix = self.matrix
        dtype = self._working_dtype
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

        found = row_sums(products, len(self), 0, len(moved), moved, moved.dtype)
        if self.start is not None:
            found = found + dot_on_device(vector, self.start).to(found.device)
        return found.cpu()


class _WeightedSum(torch.autograd.Function):
    """``weights [K] -> [P]``; its derivative with respect to the weights is ``inner``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors = vectors
        ctx.like = weights
        return vectors._weighted_sum(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.inner(grad).to(ctx.like), None


class _Inner(torch.autograd.Function):
    """``vector [P] -> [K]``; its derivative with respect to the vector is ``weighted_sum``."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors = vectors
        ctx.like = vector
        return vectors._inner(vector)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.weighted_sum(grad).to(ctx.like), None
