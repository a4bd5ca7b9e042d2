"""A cohort's vectors whose rows are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors.client_vectors import ClientVectors, from_start


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
        self.owners, self.ranks, self.ordered = list(owners), ranks, ordered
        self._own = torch.tensor([slot for slot, owner in enumerate(owners) if owner == ranks.rank], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.owners)

    def _like(self, matrix: Tensor, start: Tensor | None) -> SpreadVectors:
        return SpreadVectors(matrix, start, self.owners, self.ranks, ordered=self.ordered)

    @property
    def _here(self) -> ClientVectors:
        return ClientVectors(self.matrix, self.start)

    def _everywhere(self, values: Tensor) -> Tensor:
        """``[..., own rows]`` of every process as ``[..., K]``: each number has one owner, so adding moves it."""
        whole = torch.zeros(*values.shape[:-1], len(self), dtype=values.dtype)
        whole[..., self._own] = values
        return self.ranks.sum(whole)

    def gram(self) -> Tensor:
        """``[K, K]`` float64 on the CPU: inner products of all pairs of vectors."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.ranks.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            start = None if self.start is None else self.start[columns].to(rows.device)
            total += ClientVectors(rows, start)._gram()
        return self.ranks.sum(total.cpu())

    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Euclidean norms of the vectors, ``[K]``; with parameter groups, ``[groups, K]``. Float64 on the CPU."""
        return self._everywhere(self._here.norms(groups))

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Euclidean distances from a point ``[P]`` (``None``: the origin), ``[K]`` or ``[groups, K]``, float64, CPU."""
        return self._everywhere(self._here.distances(center, groups))

    def gather(self) -> Tensor:
        """All vectors as one new matrix ``[K, P]``, on every process."""
        own = self._here.gather()
        whole = torch.zeros(len(self), own.shape[1], dtype=own.dtype, device=own.device)
        whole[self._own.to(own.device)] = own
        return self.ranks.sum(whole)

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """One number of every parameter from all clients' values of it, ``[P]``; each process works on its share."""
        found = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
        for columns, rows in self.ranks.columns(self.matrix, self.owners):
            start = None if self.start is None else self.start[columns].to(rows.device)
            found[columns] = ClientVectors(rows, start).map_columns(function).to(found)
        found = self.ranks.sum(found)
        return found if self.start is None else found.to(self.start.device)

    def state_dict(self) -> dict[str, Any]:
        """The vectors, whole on process 0; every process has to ask."""
        return ClientVectors(self.ranks.rows_to_first(self.matrix, self.owners), self.start).state_dict()

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        if not self.ordered:
            mixed = self.ranks.sum(ClientVectors(self.matrix)._weighted_sum(weights[self._own]))
        else:
            mixed = torch.zeros(self.matrix.shape[1], dtype=self._working_dtype, device=self.matrix.device)
            for columns, rows in self.ranks.columns(self.matrix, self.owners):
                if rows.numel():
                    mixed[columns] = ClientVectors(rows)._weighted_sum(weights).to(mixed.device)
            mixed = self.ranks.sum(mixed)
        return mixed if self.start is None else from_start(self.start, weights, mixed)

    def _inner(self, vector: Tensor) -> Tensor:
        return self._everywhere(self._here._inner(vector))
