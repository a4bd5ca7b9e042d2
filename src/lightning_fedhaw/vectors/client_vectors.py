"""The parameter vectors of a cohort, stored as a matrix.

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
"""The entry by which vectors are recognized among the dictionaries of a checkpoint."""


class ClientVectors(CohortVectors):
    """K parameter vectors, used through a few linear operations.

    The vectors are stored as displacements from a common start, because client models are nearly equal and the
    information is in the difference. Vector k is ``start + matrix[k]``.

    Operations are computed on the device of the matrix, in pieces that suit it (:func:`pieces_for`). Results on the
    CPU are moved there once, at the end.

    ``weighted_sum`` and ``inner`` are differentiable, and each is the other's transpose. On the CPU and with an equal
    number of threads, an element of ``weighted_sum`` depends to the last bit on its own column alone, and a number of
    ``inner``, ``norms`` and ``distances`` on its own row.

    Args:
        matrix: ``[K, P]`` displacements; on any device, in any floating dtype.
        start: ``[P]``, the model that displacements are measured from. ``None`` stands for zero.

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
        """The same vectors measured from the start: the matrix without the start."""
        if self.start is None:
            return self
        return self._like(self.matrix, None)

    def _like(self, matrix: Tensor, start: Tensor | None) -> ClientVectors:
        return ClientVectors(matrix, start)

    def to(self, device: torch.device) -> ClientVectors:
        """Move the vectors to a device; return this object if they are there already."""
        matrix = self.matrix.to(device)
        start = self.start
        if start is not None:
            start = start.to(device)
        if matrix is self.matrix and start is self.start:
            return self
        return self._like(matrix, start)

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors as plain tensors, for a checkpoint; :meth:`from_state` reads them."""
        matrix = self.matrix
        # A file would hold a view's whole storage, with the unused rows of lost clients.
        if matrix.untyped_storage().nbytes() > matrix.numel() * matrix.element_size():
            matrix = matrix.clone()
        return {"type": STATE_TYPE, "matrix": matrix, "start": self.start}

    @staticmethod
    def is_state(value: object) -> bool:
        """Return whether a value of a checkpoint was returned by :meth:`state_dict`."""
        return isinstance(value, Mapping) and value.get("type") == STATE_TYPE

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClientVectors:
        """Make vectors from what :meth:`state_dict` returned."""
        return cls(state["matrix"], state["start"])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute ``sum_k weights[k] * vector_k``.

        Args:
            weights: ``[K]``; gradients flow back to it.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        check_length("weights", weights, len(self))
        mixed: Tensor = _WeightedSum.apply(weights, self)
        return mixed

    def inner(self, vector: Tensor) -> Tensor:
        """Compute ``<vector, vector_k>`` for every client: the transpose of :meth:`weighted_sum`.

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
        """Compute the inner products of all pairs of vectors, on the device of the matrix."""
        near = self.to(self.matrix.device)
        dtype = pieces_for(self.matrix.device).dtype or self._working_dtype
        total = near._products(dtype)
        if dtype == torch.float64:
            return total
        # Products that overflowed, or are so small that float32 has rounded them away, are computed again in float64.
        is_lost = ~torch.isfinite(total) | (total.abs().amax() < LEAST_SUM)
        if not is_lost.any():
            return total
        return torch.where(is_lost, near._products(torch.float64), total)

    def _products(self, dtype: torch.dtype) -> Tensor:
        """Compute the inner products of all pairs of vectors, formed in ``dtype`` and added in float64."""
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
            groups: Slices of the flat vector by name, for the distance within each.

        Returns:
            ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU.
        """
        near = self.to(self.matrix.device)
        if center is not None:
            center = center.to(self.matrix.device)

        def write_squares(rows: slice, columns: slice, out: Tensor) -> None:
            near._rows(rows, columns, out)
            if center is not None:
                out -= center[columns].to(out)
            out.square_()

        def squared_distances(columns: slice) -> Tensor:
            begin, end, _ = columns.indices(self.matrix.shape[1])
            return row_sums(write_squares, len(self), begin, end, self.matrix, self._working_dtype)

        if groups is None:
            return self._without_overflow(squared_distances(slice(None)).sqrt().cpu(), center, [slice(None)])
        totals = []
        for slices in groups.values():
            squares = torch.stack([squared_distances(columns) for columns in slices])
            totals.append(squares.sum(0))
        # Moved to the CPU once, for all groups.
        lengths = torch.stack(totals).sqrt().cpu()
        for row, slices in zip(lengths, groups.values(), strict=True):
            self._without_overflow(row, center, slices)
        return lengths

    def _without_overflow(self, lengths: Tensor, center: Tensor | None, slices: Sequence[slice]) -> Tensor:
        """Compute those distances ``[K]`` again, in place, whose square is infinite even in float64."""
        if self._working_dtype != torch.float64:
            # The square of any float32 number is a number of float64.
            return lengths
        for k in lengths.isinf().nonzero().flatten().tolist():
            pieces = []
            for columns in slices:
                # Half of each, because the difference itself may overflow.
                half = self.matrix[k, columns].double() / 2
                if self.start is not None:
                    half += self.start[columns].to(half) / 2
                if center is not None:
                    half -= center[columns].to(half) / 2
                pieces.append(half)
            halves = torch.cat(pieces)
            largest = halves.abs().amax()
            if torch.isfinite(largest):
                lengths[k] = 2 * largest * torch.linalg.vector_norm(halves / largest)
        return lengths

    def gather(self) -> Tensor:
        """Copy all vectors into one new matrix ``[K, P]``, for rules that need every value at once."""
        device = self.matrix.device
        if self.start is not None:
            device = self.start.device
        vectors = torch.empty_like(self.matrix, dtype=self._working_dtype, device=device)
        return self._rows(slice(None), slice(None), vectors)

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute one number for every parameter from all clients' values of it, such as their median.

        No second matrix is made: the function is called for a piece of the columns at a time.

        Args:
            function: ``[K, columns] -> [columns]``, for any number of columns at a time. Its argument may be changed.

        Returns:
            ``[P]`` on the start's device (the matrix's without a start).
        """
        count, length = self.matrix.shape
        near = self.to(self.matrix.device)
        result = torch.empty(length, dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in column_pieces(count, 0, length, self.matrix, self._working_dtype):
            result[columns] = function(near._rows(slice(None), columns, rows))
        if self.start is None:
            return result
        return result.to(self.start.device)

    def _rows(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Write a piece of the vectors, start included, into ``[rows, columns]`` of the working dtype."""
        out.copy_(self.matrix[rows, columns])
        if self.start is not None:
            out += self.start[columns].to(out.device)
        return out

    @property
    def _working_dtype(self) -> torch.dtype:
        """The dtype of computations: at least float32, also where displacements are stored in half precision."""
        dtype = torch.promote_types(self.matrix.dtype, torch.float32)
        if self.start is None:
            return dtype
        return torch.promote_types(dtype, self.start.dtype)

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
        near = vector.to(matrix.device, torch.promote_types(matrix.dtype, torch.float32))

        def write_products(rows: slice, columns: slice, out: Tensor) -> None:
            torch.mul(matrix[rows, columns], near[columns].to(out), out=out)

        products = row_sums(write_products, len(self), 0, len(near), near, near.dtype)
        if self.start is not None:
            products = products + dot_on_device(vector, self.start).to(products.device)
        return products.cpu()


class _WeightedSum(torch.autograd.Function):
    """The function ``weights [K] -> [P]``, whose derivative with respect to the weights is ``inner``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors = vectors
        ctx.like = weights
        return vectors._weighted_sum(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.inner(grad).to(ctx.like), None


class _Inner(torch.autograd.Function):
    """The function ``vector [P] -> [K]``, whose derivative with respect to the vector is ``weighted_sum``."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, vectors: ClientVectors) -> Tensor:
        ctx.vectors = vectors
        ctx.like = vector
        return vectors._inner(vector)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.vectors.weighted_sum(grad).to(ctx.like), None
