"""The processes that share the work of a run, and their communication.

All processes run the same federation on replicated values; only the clients' vectors and data are distributed. With one
process nothing here communicates.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


BLOCK = 1 << 18
"""The number of columns that a process receives at a time in :meth:`Ranks.columns`, which bounds its memory."""


class Ranks:
    """The processes of a run, from the point of view of one of them.

    Args:
        rank: The number of this process, from 0.
        size: The number of processes.
        device: The device from which tensors are sent: the process's GPU for NCCL, the CPU for gloo.

    Example:
        >>> Ranks().gather("here")
        ['here']
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @classmethod
    def of_group(cls, device: torch.device) -> Ranks:
        """Return the processes of the default process group, or this process alone if there is none.

        Args:
            device: The device of this process's model.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        # Gloo sends from the CPU.
        sending_device = device if "nccl" in dist.get_backend() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), sending_device)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes files and logs."""
        return self.rank == 0

    @contextmanager
    def _communication(self) -> Iterator[None]:
        """Explain the errors that the backend raises if another process has ended."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size} lost contact with the others: one of them died or was stopped (see"
                " its own output for the reason). Start the run again with `fit(ckpt_path=...)`, which resumes it from"
                " the last checkpoint; on CPUs the results are bit-identical to those of an uninterrupted run."
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process be the only one for other libraries inside the context.

        A metric or a module that would exchange something with all processes there works with its own values: the
        others may be busy with something else, and would never answer. All processes have to enter the context.
        """
        if self.size == 1:
            yield
            return
        all_processes = dist.group.WORLD
        with self._communication():
            # Every process takes part in making every group.
            groups = [dist.new_group([rank]) for rank in range(self.size)]
        # That of another process is a number here.
        own_group = cast(dist.ProcessGroup, groups[self.rank])
        dist.group.WORLD = own_group
        try:
            yield
        finally:
            dist.group.WORLD = all_processes
            dist.destroy_process_group(own_group)

    # ------------------------------------------------------------------ objects

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, on every process.

        Args:
            value: The value of this process; it is pickled.
        """
        if self.size == 1:
            return [value]
        # `None` only until the call below has filled in the values.
        values: list[Any] = [None] * self.size
        with self._communication():
            dist.all_gather_object(values, value)
        return values

    def gather_to_first(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, on process 0, and an empty list on the others.

        Args:
            value: The value of this process; it is pickled.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._communication():
            dist.gather_object(value, values)
        return values or []

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Do this process's share of the work, and return the results of all processes, by rank.

        Args:
            work: A function that does the share and returns its result.

        Raises:
            RuntimeError: If the work failed on another process. The process on which it failed raises the error itself.
        """
        if self.size == 1:
            return [work()]
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            # Any error, an interrupt included: the other processes wait for this one's outcome, and would wait forever.
            failure = error
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        try:
            try:
                outcomes = self.gather((result, message))
            except RuntimeError:
                # Contact was lost as well, but the own failure is the reason that the user can act on.
                if failure is not None:
                    raise failure from None
                raise
            if failure is not None:
                raise failure
        finally:
            # The traceback of the error refers to this frame; without this the frame would refer back to the error, and
            # everything in its frames would stay in memory until a garbage collection.
            failure = None
        results = []
        for rank, (other_result, other_message) in enumerate(outcomes):
            if other_message is not None:
                raise RuntimeError(f"Process {rank} of {self.size} failed, so this one stopped too: {other_message}")
            results.append(other_result)
        return results

    # ------------------------------------------------------------------ tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it.

        Args:
            tensor: The summand of this process; of the same shape on all processes.
        """
        if self.size == 1:
            return tensor
        total = tensor.to(self.device).contiguous()
        with self._communication():
            dist.all_reduce(total)
        # `to` and `contiguous` return the tensor itself if there is nothing to do: then the sum is in place already.
        if total.data_ptr() != tensor.data_ptr():
            tensor.copy_(total)
        return tensor

    def share_model(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of process 0 to all processes.

        Args:
            module: The module of this process, which is changed in place.
        """
        if self.size == 1:
            return
        with torch.no_grad(), self._communication():
            for tensor in (*module.parameters(), *module.buffers()):
                message = tensor.detach().to(self.device).contiguous()
                dist.broadcast(message, 0)
                tensor.copy_(message)

    def rows_to_first(self, rows: Tensor, owners: Sequence[int]) -> Tensor:
        """Gather a matrix whose rows are distributed over the processes.

        Args:
            rows: ``[K_p, P]``, the rows of this process, in their order in the matrix.
            owners: ``[K]``, the process of each row.

        Returns:
            ``[K, P]`` in host memory on process 0, and ``[0, P]`` on the others.
        """
        if not self.is_first:
            with self._communication():
                for row in rows:
                    dist.send(row.to(self.device).contiguous(), 0)
            return rows[:0].cpu()
        matrix = torch.empty(len(owners), rows.shape[1], dtype=rows.dtype)
        message = torch.empty(rows.shape[1], dtype=rows.dtype, device=self.device)
        local_rows = iter(rows)
        # One row per message, so that the memory for messages does not grow with the cohort. Each process sends its
        # rows in their order, so the next message of a row's owner is that row.
        for slot, owner in enumerate(owners):
            if owner == self.rank:
                matrix[slot] = next(local_rows)
                continue
            with self._communication():
                dist.recv(message, owner)
            matrix[slot] = message
        return matrix

    def columns(self, rows: Tensor, owners: Sequence[int], block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Exchange a matrix whose rows are distributed, so that each process gets all rows of some columns.

        The columns are exchanged in blocks. All processes have to iterate to the end, because every step communicates.

        Args:
            rows: ``[K_p, P]``, the rows of this process, in their order in the matrix.
            owners: ``[K]``, the process of each row.
            block: The number of columns that a process receives at a time.

        Yields:
            A range of columns, which is empty if there are none left for this process, and the columns
            ``[K, columns]`` on ``device``.
        """
        counts = [owners.count(rank) for rank in range(self.size)]
        # Rows are received sender by sender: the slot of each received row. The sort is stable, so that the rows of one
        # sender keep their order.
        slot_order = sorted(range(len(owners)), key=lambda slot: owners[slot])
        slots = torch.tensor(slot_order, dtype=torch.int64, device=self.device)
        num_columns = rows.shape[1]
        dtype = rows.dtype
        for begin in range(0, num_columns, block * self.size):
            ranges = self._column_ranges(begin, block, num_columns)
            widths = [columns.stop - columns.start for columns in ranges]
            # As bytes: they are only moved, and not every backend knows every dtype.
            sent = torch.cat([rows[:, columns].reshape(-1) for columns in ranges]).to(self.device).view(torch.uint8)
            width = widths[self.rank]
            received = torch.empty(len(owners) * width, dtype=dtype, device=self.device)
            with self._communication():
                dist.all_to_all_single(
                    received.view(torch.uint8),
                    sent,
                    [count * width * dtype.itemsize for count in counts],
                    [len(rows) * other_width * dtype.itemsize for other_width in widths],
                )
            by_slot = torch.empty(len(owners), width, dtype=dtype, device=self.device)
            by_slot[slots] = received.view(len(owners), width)
            yield ranges[self.rank], by_slot

    def _column_ranges(self, begin: int, block: int, num_columns: int) -> list[slice]:
        """Return one range of columns per process, from a first column on; ranges beyond the last column are empty."""
        ranges = []
        for rank in range(self.size):
            start = min(begin + rank * block, num_columns)
            end = min(start + block, num_columns)
            ranges.append(slice(start, end))
        return ranges


def assign(costs: Sequence[float], size: int, fixed: Mapping[int, int] | None = None) -> list[int]:
    """Assign pieces of work to processes: the most expensive first, each to the process with the least work so far.

    Args:
        costs: The estimated cost of each piece, in any unit.
        size: The number of processes.
        fixed: The process of each piece that must be done by a certain process.

    Returns:
        The process of each piece.

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
    # Pieces of equal cost in their order, so that all processes compute the same assignment.
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        if piece not in fixed:
            load, rank = heapq.heappop(heap)
            assigned[piece] = rank
            heapq.heappush(heap, (load + costs[piece], rank))
    return assigned
