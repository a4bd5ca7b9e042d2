"""The stores of a cohort's vectors until they are aggregated: as rows, or as a running sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fedhaw.clients.tangents import RATE_TANGENT
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.records import UpdateRecord
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.distributed import SpreadVectors
from lightning_fedhaw.vectors.kernels import all_finite
from lightning_fedhaw.vectors.memory import HOST, empty


class VectorStore(ABC):
    """A store of the displacements of a round, of the clients that this process trains.

    Args:
        start: ``[P]``, the model that was broadcast.
        scratch_size: The size of the memory that :meth:`slot` returns; 0 for a store that returns its own rows.
    """

    def __init__(self, start: Tensor, scratch_size: int) -> None:
        self.scratch = empty(scratch_size, dtype=start.dtype, device=start.device)

    def slot(self) -> Tensor:
        """Return memory ``[P]`` on the model's device, to which the next displacement may be written."""
        return self.scratch

    def fits(self, update: ClientUpdate) -> bool:
        """Return whether the store can hold an update; by default any."""
        return True

    def rate_tangents(self, start: Tensor, records: Sequence[UpdateRecord]) -> CohortVectors | None:
        """Return the rate tangents of the whole cohort, where clients send some; as :meth:`vectors`."""
        return None

    @abstractmethod
    def commit(self, update: ClientUpdate, weight: float) -> None:
        """Store an update, whose displacement is in the slot or elsewhere.

        Args:
            update: The update.
            weight: Its unnormalized weight, for stores that sum.
        """

    @abstractmethod
    def vectors(self, start: Tensor, records: Sequence[UpdateRecord]) -> ClientVectors | AccumulatedVectors:
        """Return the vectors of the whole cohort. Every process has to call it.

        Args:
            start: ``[P]``, the model that was broadcast.
            records: The updates of all processes, in the cohort's order.
        """


class RowStore(VectorStore):
    """A store with one row per client, on the model's device or in host memory.

    Args:
        start: ``[P]``, the model that was broadcast.
        capacity: Updates of this process at most.
        options: The federation's arguments: the device of the rows, and how processes add them up.
        ranks: The processes.
        dtype: The dtype of the rows.
    """

    def __init__(
        self, start: Tensor, capacity: int, options: FederationOptions, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        device = HOST if options.storage == "host" else start.device
        # An engine may write directly into the matrix if its rows have the engine's device and dtype.
        self.in_place = device == start.device and dtype == start.dtype
        self.matrix = empty(capacity, start.numel(), dtype=dtype, device=device)
        self.ranks = ranks
        self.ordered = options.reduction == "ordered"
        self.count = 0
        super().__init__(start, scratch_size=0 if self.in_place else start.numel())

    def slot(self) -> Tensor:
        """Return the next row, or memory from which it is copied there."""
        if self.in_place:
            return self.matrix[self.count]
        return self.scratch

    def fits(self, update: ClientUpdate) -> bool:
        """Return whether the largest number of an update is finite in ``storage_dtype``."""
        if self.matrix.dtype == update.displacement.dtype:
            return True
        largest = torch.linalg.vector_norm(update.displacement, torch.inf)
        return bool(torch.isfinite(largest.to(self.matrix.dtype)))

    def commit(self, update: ClientUpdate, weight: float) -> None:
        """Store an update's displacement as the next row.

        Raises:
            FloatingPointError: If it does not fit into ``storage_dtype``, as the substitute of a channel may not.
        """
        row = self.matrix[self.count]
        if update.displacement.data_ptr() != row.data_ptr():
            row.copy_(update.displacement)
            if row.dtype != update.displacement.dtype and not all_finite(row):
                raise FloatingPointError(
                    f"The update of client {update.client} does not fit into `storage_dtype`={row.dtype}. Use"
                    " torch.bfloat16, which has the range of float32, or leave it out."
                )
        self.count += 1

    def rows(self, start: Tensor, records: Sequence[UpdateRecord]) -> ClientVectors:
        """Return the rows of all processes as one set of vectors."""
        # A view, although a rule that keeps it also keeps the unused rows of lost clients: a copy without them would
        # need the memory of a second matrix.
        own_rows = self.matrix[: self.count]
        if self.ranks.size == 1:
            return ClientVectors(own_rows, start)
        owners = [record.rank for record in records]
        return SpreadVectors(own_rows, start, owners, self.ranks, ordered=self.ordered)

    def vectors(self, start: Tensor, records: Sequence[UpdateRecord]) -> ClientVectors | AccumulatedVectors:
        """Return the rows; see :meth:`VectorStore.vectors`."""
        return self.rows(start, records)


class RunningSum(VectorStore):
    """A running sum of displacements, for rules that know a client's weight before the cohort is complete.

    Args:
        start: ``[P]``, the model that was broadcast.
        rule: The aggregation rule, for error messages.
        ranks: The processes.
    """

    def __init__(self, start: Tensor, rule: Rule, ranks: Ranks) -> None:
        super().__init__(start, scratch_size=start.numel())
        self.rule = rule
        self.ranks = ranks
        self.total = empty(*start.shape, dtype=start.dtype, device=start.device).zero_()

    def commit(self, update: ClientUpdate, weight: float) -> None:
        """Add an update's displacement, times its weight."""
        self.total.add_(update.displacement, alpha=weight)

    def vectors(self, start: Tensor, records: Sequence[UpdateRecord]) -> AccumulatedVectors:
        """Return the sum over all processes; see :meth:`VectorStore.vectors`."""
        total = self.ranks.sum(self.total)
        return AccumulatedVectors(total, unnormalized_weights(records), start, type(self.rule).__name__)


class OrderedSum(RowStore):
    """The same sum, bit-identical to that of one process; for this, all rows are stored until the last is there.

    The rows have the dtype of the sum, whatever ``storage_dtype`` is: one process stores no rows that could be rounded.

    Args:
        start: ``[P]``, the model that was broadcast.
        capacity: Updates of this process at most.
        rule: The aggregation rule, for error messages.
        options: The federation's arguments.
        ranks: The processes.
    """

    def __init__(self, start: Tensor, capacity: int, rule: Rule, options: FederationOptions, ranks: Ranks) -> None:
        super().__init__(start, capacity, options, ranks, start.dtype)
        self.rule = rule

    def vectors(self, start: Tensor, records: Sequence[UpdateRecord]) -> AccumulatedVectors:
        """Return the sum over all processes, in the cohort's order; see :meth:`VectorStore.vectors`."""
        weights = unnormalized_weights(records)
        total = self.rows(start, records).displacements.weighted_sum(weights)
        return AccumulatedVectors(total, weights, start, type(self.rule).__name__)


class StoreWithTangents(VectorStore):
    """A store of displacements, with another one for the rate tangents that come with them.

    Args:
        displacements: The store of the displacements.
        tangents: That of the tangents.
    """

    def __init__(self, displacements: VectorStore, tangents: VectorStore) -> None:
        self.displacements = displacements
        self.tangents = tangents

    def slot(self) -> Tensor:
        """Return the memory of the next displacement."""
        return self.displacements.slot()

    def fits(self, update: ClientUpdate) -> bool:
        """Return whether the store can hold a displacement."""
        return self.displacements.fits(update)

    def commit(self, update: ClientUpdate, weight: float) -> None:
        """Store both vectors of an update."""
        self.displacements.commit(update, weight)
        self.tangents.commit(replace(update, displacement=update.memory[RATE_TANGENT]), weight)

    def vectors(self, start: Tensor, records: Sequence[UpdateRecord]) -> ClientVectors | AccumulatedVectors:
        """Return the displacements; see :meth:`VectorStore.vectors`."""
        return self.displacements.vectors(start, records)

    def rate_tangents(self, start: Tensor, records: Sequence[UpdateRecord]) -> CohortVectors:
        """Return the tangents."""
        return self.tangents.vectors(start, records).displacements


@dataclass(frozen=True)
class RoundStores:
    """The stores of a round on one process.

    Attributes:
        displacements: The store of the clients' updates.
        shared: The stores of the changes of shared states, one per state.
    """

    displacements: VectorStore
    shared: Sequence[VectorStore]


def unnormalized_weights(records: Sequence[UpdateRecord]) -> Tensor:
    """Return the unnormalized weight of each update, ``[K]`` float64."""
    return torch.tensor([record.unnormalized_weight for record in records], dtype=torch.float64)


def make_store(
    rule: Rule, options: FederationOptions, start: Tensor, capacity: int, ranks: Ranks, *, summed: bool
) -> VectorStore:
    """Make the store of a cohort's displacements.

    Args:
        rule: The aggregation rule.
        options: The federation's arguments.
        start: ``[P]``, the model that is broadcast.
        capacity: Updates of this process at most.
        ranks: The processes.
        summed: Whether a channel acts on the sum, so that single updates must not be stored, whatever ``storage=`` is.
    """
    store = _make_store(rule, options, start, capacity, ranks, summed=summed)
    if not rule.needs_rate_tangents:
        return store
    # A channel on the sum acts on updates only.
    return StoreWithTangents(store, _make_store(rule, options, start, capacity, ranks, summed=summed))


def _make_store(
    rule: Rule, options: FederationOptions, start: Tensor, capacity: int, ranks: Ranks, *, summed: bool
) -> VectorStore:
    is_summable = rule.unnormalized_weight is not None
    if is_summable and (summed or options.storage == "auto"):
        return make_sum(rule, options, start, capacity, ranks)
    return RowStore(start, capacity, options, ranks, options.storage_dtype or start.dtype)


def make_sum(rule: Rule, options: FederationOptions, start: Tensor, capacity: int, ranks: Ranks) -> VectorStore:
    """Make a store of a weighted sum; the arguments are those of :func:`make_store`."""
    if ranks.size > 1 and options.reduction == "ordered":
        return OrderedSum(start, capacity, rule, options, ranks)
    return RunningSum(start, rule, ranks)
