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

    Every process calls the same verbs in the same order, and gets the same answer.

    Args:
        matrix: ``[own rows, P]``, the displacements on this process, in the cohort's order.
        start: ``[P]``, what they are displaced from. ``None`` stands for zero.
        owners: ``[K]``, the process of each row.
        ranks: The processes.
        ordered: Whether a weighted sum is formed in the order of the rows, which gives the bits of one process;
            otherwise each process sums its own rows first.
    """

    def __init__(
        self, matrix: Tensor, start: Tensor | None, owners: Sequence[int], ranks: Ranks, *, ordered: bool
    ) -> None:
        super().__init__(matrix, start)
        self.owners = list(owners)
        self.ranks = ranks
        self.ordered = ordered
        # [own rows]: the places in the cohort of the rows that this process holds.
        self._own = (torch.tensor(self.owners, dtype=torch.int64) == ranks.rank).nonzero().flatten()

    def __len__(self) -> int:
        return len(self.owners)

    def _like(self, matrix: Tensor, start: Tensor | None) -> SpreadVectors:
        return SpreadVectors(matrix, start, self.owners, self.ranks, ordered=self.ordered)

    @property
    def _here(self) -> ClientVectors:
        """The rows of this process alone."""
        return ClientVectors(self.matrix, self.start)

    def _everywhere(self, values: Tensor) -> Tensor:
        """Bring ``[..., own rows]`` of every process together as ``[..., K]``."""
        # Each number has one owner and is zero elsewhere, so that adding moves it and rounds nothing.
        whole = torch.zeros(*values.shape[:-1], len(self), dtype=values.dtype)
        whole[..., self._own] = values
        return self.ranks.sum(whole)

    def _columns(self, columns: slice, rows: Tensor) -> ClientVectors:
        """Some columns of all vectors, whose displacements ``[K, columns]`` this process was sent."""
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
        return self._everywhere(self._here.norms(groups))

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean distances from a point ``[P]``, ``[K]`` or ``[groups, K]``, float64 on the CPU."""
        return self._everywhere(self._here.distances(center, groups))

    def gather(self) -> Tensor:
        """Copy all vectors into one new matrix ``[K, P]``, on every process."""
        own = self._here.gather()
        whole = torch.zeros(len(self), own.shape[1], dtype=own.dtype, device=own.device)
        whole[self._own.to(own.device)] = own
        return self.ranks.sum(whole)

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Make one number of every parameter from all clients' values, ``[P]``; each process works on its share."""
        found = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            found[columns] = self._columns(columns, rows).map_columns(function).to(found)
        found = self.ranks.sum(found)
        if self.start is None:
            return found
        return found.to(self.start.device)

    def state_dict(self) -> dict[str, Any]:
        """Take the vectors apart for a checkpoint, whole on process 0; every process has to ask."""
        matrix = self.ranks.rows_to_first(self.matrix, self.owners)
        return ClientVectors(matrix, self.start).state_dict()

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        if self.ordered:
            mixed = self._ordered_sum(weights)
        else:
            mixed = self.ranks.sum(ClientVectors(self.matrix)._weighted_sum(weights[self._own]))
        if self.start is None:
            return mixed
        return from_start(self.start, weights, mixed)

    def _ordered_sum(self, weights: Tensor) -> Tensor:
        """Mix the displacements in the order of the rows, ``[P]``: each process mixes its share of the columns."""
        mixed = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            if rows.numel():
                mixed[columns] = ClientVectors(rows)._weighted_sum(weights).to(mixed.device)
        return self.ranks.sum(mixed)

    def _inner(self, vector: Tensor) -> Tensor:
        return self._everywhere(self._here._inner(vector))
