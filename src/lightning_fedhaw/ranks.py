"""The processes that share the work of a run, and what they say to each other.

Every process runs the same federation on replicated values; only the clients' vectors and data are spread. With one
process nothing here communicates.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

BLOCK = 1 << 18
"""Columns that a process sums at a time when rows are exchanged: bounds the memory of an exchange."""


class Ranks:
    """This process among those of a run.

    Args:
        rank: Its number, from 0.
        size: How many there are.
        device: Where tensors have to be to be sent: the process's GPU for NCCL, the CPU for gloo.

    Example:
        >>> Ranks().gather("here")
        ['here']
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @classmethod
    def of_group(cls, device: torch.device) -> Ranks:
        """The processes of the default process group; this one alone where there is none.

        Args:
            device: The device of this process's model.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(
            dist.get_rank(), dist.get_world_size(), device if "nccl" in dist.get_backend() else torch.device("cpu")
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size} lost contact with the others: one of them died or was stopped (its"
                " own output says why). Start the run again with `fit(ckpt_path=...)`; it goes on from the last"
                " checkpoint, bit by bit on CPUs."
            ) from error

    # ------------------------------------------------------------------ objects

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, on every process. Values are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value)
        return values

    def gather_to_first(self, value: T) -> list[T]:
        """Everybody's value, by rank, on process 0; elsewhere nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._talking():
            dist.gather_object(value, values)
        return values or []

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Do this process's part of the work, and get everybody's result, by rank.

        Raises:
            RuntimeError: If the work failed on another process. Where it failed, the error itself is raised.
        """
        if self.size == 1:
            return [work()]
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        try:
            try:
                outcomes = self.gather((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
            except RuntimeError:
                if failure is not None:
                    raise failure from None
                raise
            if failure is not None:
                raise failure
        finally:
            # An error that its own frames know keeps all that they hold, until a garbage collection.
            failure = None
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise RuntimeError(f"Process {rank} of {self.size} failed, so this one stopped too: {message}")
        return [each for each, _ in outcomes]

    # ------------------------------------------------------------------ tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place, of a tensor that each of them holds."""
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        with self._talking():
            dist.all_reduce(moved)
        return tensor.copy_(moved) if moved.data_ptr() != tensor.data_ptr() else tensor

    def share_model(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of process 0."""
        if self.size == 1:
            return
        with torch.no_grad(), self._talking():
            for tensor in (*module.parameters(), *module.buffers()):
                moved = tensor.detach().to(self.device).contiguous()
                dist.broadcast(moved, 0)
                tensor.copy_(moved)

    def rows_to_first(self, rows: Tensor, owners: Sequence[int]) -> Tensor:
        """A matrix whose rows are spread, whole on process 0 in host memory; elsewhere no rows.

        Args:
            rows: ``[own rows, P]``, in order.
            owners: ``[K]``, the process of each row.
        """
        if not self.is_first:
            with self._talking():
                for row in rows:
                    dist.send(row.to(self.device).contiguous(), 0)
            return rows[:0].cpu()
        whole = torch.empty(len(owners), rows.shape[1], dtype=rows.dtype)
        incoming = torch.empty(rows.shape[1], dtype=rows.dtype, device=self.device)
        own = iter(rows)
        # Row by row, and of each sender in its order: a message is one row, whatever the cohort.
        for slot, owner in enumerate(owners):
            if owner == self.rank:
                whole[slot] = next(own)
                continue
            with self._talking():
                dist.recv(incoming, owner)
            whole[slot] = incoming
        return whole

    def columns(self, rows: Tensor, owners: Sequence[int], block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """All rows of a spread matrix, a range of columns at a time, each process getting ranges of its own.

        Everybody has to iterate to the end.

        Args:
            rows: ``[own rows, P]``, in order.
            owners: ``[K]``, the process of each row.
            block: Columns a process gets at a time.

        Yields:
            A range of columns (empty where none is left), and ``[K, columns]`` on ``device``.
        """
        counts = [owners.count(rank) for rank in range(self.size)]
        order = torch.tensor([slot for rank in range(self.size) for slot, own in enumerate(owners) if own == rank])
        total, dtype = rows.shape[1], rows.dtype
        for begin in range(0, total, block * self.size):
            ends = [min(begin + (rank + 1) * block, total) for rank in range(self.size)]
            parts = [slice(min(begin + rank * block, total), end) for rank, end in enumerate(ends)]
            widths = [part.stop - part.start for part in parts]
            # As bytes: they are only moved, and not every backend knows every dtype.
            sent = torch.cat([rows[:, part].reshape(-1) for part in parts]).to(self.device).view(torch.uint8)
            mine = widths[self.rank]
            received = torch.empty(sum(counts) * mine, dtype=dtype, device=self.device)
            with self._talking():
                dist.all_to_all_single(
                    received.view(torch.uint8),
                    sent,
                    [count * mine * dtype.itemsize for count in counts],
                    [len(rows) * width * dtype.itemsize for width in widths],
                )
            by_slot = torch.empty(len(owners), mine, dtype=dtype, device=self.device)
            by_slot[order.to(self.device)] = received.view(len(owners), mine)
            yield parts[self.rank], by_slot


def assign(costs: Sequence[float], size: int, fixed: Mapping[int, int] | None = None) -> list[int]:
    """Which process does which piece of work: the longest first, always to the one with the least to do.

    Args:
        costs: What each piece is estimated to cost, in any unit.
        size: The number of processes.
        fixed: Pieces that have to be done by a certain process.

    Returns:
        A process for each piece.

    Example:
        >>> assign([5, 1, 4, 2], 2)
        [0, 0, 1, 1]
    """
    fixed = fixed or {}
    assigned = [fixed.get(piece, 0) for piece in range(len(costs))]
    loads = [0.0] * size
    for piece, rank in fixed.items():
        loads[rank] += costs[piece]
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        if piece not in fixed:
            load, rank = heapq.heappop(heap)
            assigned[piece] = rank
            heapq.heappush(heap, (load + costs[piece], rank))
    return assigned
