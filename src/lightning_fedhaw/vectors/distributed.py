"""A cohort's vectors whose rows are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.kernels import from_start


class SpreadVectors(ClientVectors):
    """K parameter vectors, each on the process that trained the client; a rule uses them like any others.

    Every process calls the same operations in the same order, and gets the same results.

    Args:
        matrix: ``[own rows, P]``, the displacements on this process, in the cohort's order.
        start: ``[P]``, the model that displacements are measured from. ``None`` stands for zero.
        owners: ``[K]``, the process of each row.
        ranks: The processes.
        ordered: Whether a weighted sum is computed in the order of the rows, which is bit-identical to one process;
            otherwise each process sums its own rows first.
    """

    def __init__(
        self, matrix: Tensor, start: Tensor | None, owners: Sequence[int], ranks: Ranks, *, ordered: bool
    ) -> None:
        super().__init__(matrix, start)
        self.owners = list(owners)
        self.ranks = ranks
        self.ordered = ordered
        # [own rows]: the positions in the cohort of the rows that this process holds.
        self._positions = (torch.tensor(self.owners, dtype=torch.int64) == ranks.rank).nonzero().flatten()

    def __len__(self) -> int:
        return len(self.owners)

    def _like(self, matrix: Tensor, start: Tensor | None) -> SpreadVectors:
        return SpreadVectors(matrix, start, self.owners, self.ranks, ordered=self.ordered)

    @property
    def _local(self) -> ClientVectors:
        """The rows of this process only."""
        return ClientVectors(self.matrix, self.start)

    def _gathered(self, values: Tensor) -> Tensor:
        """Gather ``[..., own rows]`` of every process as ``[..., K]``."""
        # Each number has one owner and is zero elsewhere, so that adding moves it and rounds nothing.
        gathered = torch.zeros(*values.shape[:-1], len(self), dtype=values.dtype)
        gathered[..., self._positions] = values
        return self.ranks.sum(gathered)

    def _columns(self, columns: slice, rows: Tensor) -> ClientVectors:
        """Return some columns of all vectors, whose displacements ``[K, columns]`` this process has received."""
        if self.start is None:
            return ClientVectors(rows)
        return ClientVectors(rows, self.start[columns].to(rows.device))

    def gram(self) -> Tensor:
        """Compute the inner products of all pairs of vectors, ``[K, K]`` float64 on the CPU."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.ranks.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            total += self._columns(columns, rows)._gram()
        return self.ranks.sum(total.cpu())

    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean norms, ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU."""
        return self._gathered(self._local.norms(groups))

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean distances from a point ``[P]``, ``[K]`` or ``[groups, K]``, float64 on the CPU."""
        return self._gathered(self._local.distances(center, groups))

    def gather(self) -> Tensor:
        """Copy all vectors into one new matrix ``[K, P]``, on every process."""
        local = self._local.gather()
        gathered = torch.zeros(len(self), local.shape[1], dtype=local.dtype, device=local.device)
        gathered[self._positions.to(local.device)] = local
        return self.ranks.sum(gathered)

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute one number for every parameter from all clients' values, ``[P]``; each process takes its share."""
        result = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            result[columns] = self._columns(columns, rows).map_columns(function).to(result)
        result = self.ranks.sum(result)
        if self.start is None:
            return result
        return result.to(self.start.device)

    def state_dict(self) -> dict[str, Any]:
        """Return all vectors as plain tensors on process 0, for a checkpoint; every process has to call it."""
        matrix = self.ranks.rows_to_first(self.matrix, self.owners)
        return ClientVectors(matrix, self.start).state_dict()

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        if self.ordered:
            mixed = self._ordered_sum(weights)
        else:
            mixed = self.ranks.sum(ClientVectors(self.matrix)._weighted_sum(weights[self._positions]))
        if self.start is None:
            return mixed
        return from_start(self.start, weights, mixed)

    def _ordered_sum(self, weights: Tensor) -> Tensor:
        """Sum the displacements in the order of the rows, ``[P]``; each process computes its share of the columns."""
        mixed = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            if rows.numel():
                mixed[columns] = ClientVectors(rows)._weighted_sum(weights).to(mixed.device)
        return self.ranks.sum(mixed)

    def _inner(self, vector: Tensor) -> Tensor:
        return self._gathered(self._local._inner(vector))
