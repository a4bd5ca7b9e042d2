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
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

T = TypeVar("T")

SIGTERM_EXIT_CODE = 128 + 15
"""What a process returns that SIGTERM has ended, as a shell reports it."""


class CheckpointRequested(BaseException):
    """Interrupts a round, so that a checkpoint can be written; all processes raise it together."""


class Requests:
    """What this process was asked for by a signal or by another process, until all processes answer together.

    Several processes cannot answer in a signal handler: each is somewhere else, and waits for the others. So a handler
    leaves the request here, and it is sent along with the next message that all processes exchange anyway.

    Attributes:
        end: ``"SIGTERM"`` or ``"SIGINT"`` once the run is to end.
        is_ending: Whether all processes know, and end.
        checkpoint: Whether a checkpoint is to be written within the round.
        num_checkpoints: How many of those requests have been answered.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all requests, when another run begins."""
        self.end: str | None = None
        self.is_ending = False
        self.checkpoint = False
        self.num_checkpoints = 0

    @property
    def must_end(self) -> bool:
        """Whether the run is to end, and does not yet."""
        return self.end is not None and not self.is_ending

    def ask_to_end(self, reason: str) -> None:
        """Ask for the end of the run; the first reason counts."""
        if self.end is None:
            self.end = reason

    def raise_if_any(self) -> None:
        """Interrupt this process's share of a round, between two batches.

        Raises:
            SIGTERMException: After SIGTERM.
            KeyboardInterrupt: After Ctrl+C.
            CheckpointRequested: If a checkpoint was asked for.
        """
        if self.must_end:
            raise self._error()
        if self.checkpoint:
            raise CheckpointRequested

    def end_together(self, reasons: Sequence[str | None]) -> None:
        """End the run, if any process was asked to. All processes call this at the same point.

        Args:
            reasons: ``end`` of every process.

        Raises:
            SIGTERMException: After SIGTERM.
            KeyboardInterrupt: After Ctrl+C.
        """
        if self.is_ending:
            return
        for reason in reasons:
            if reason is not None:
                self.end = reason
                self.end_now()

    def end_now(self) -> None:
        """End the run on this process; the others end too, or have ended."""
        self.is_ending = True
        raise self._error()

    def _error(self) -> BaseException:
        if self.end == "SIGTERM":
            return SIGTERMException(SIGTERM_EXIT_CODE)
        return KeyboardInterrupt()

    def answer_checkpoint(self) -> None:
        """Note that a checkpoint is written. All processes call this at the same point."""
        self.checkpoint = False
        self.num_checkpoints += 1


REQUESTS = Requests()
"""The requests to this process: of all its trainers, because signals are sent to a process."""


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
    def communication(self) -> Iterator[None]:
        """Explain the errors that the backend raises if another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if REQUESTS.must_end:
                # The others have ended before.
                REQUESTS.end_now()
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
        with self.communication():
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

        This is also where processes learn that one of them was asked to end, and end together.

        Args:
            value: The value of this process; it is pickled.

        Raises:
            SIGTERMException: If one of the processes was asked to end by SIGTERM.
            KeyboardInterrupt: If one of the processes was asked to end by Ctrl+C.
        """
        if self.size == 1:
            return [value]
        # `None` only until the call below has filled in the messages.
        messages: list[Any] = [None] * self.size
        with self.communication():
            dist.all_gather_object(messages, (value, REQUESTS.end))
        REQUESTS.end_together([end for _, end in messages])
        return [other_value for other_value, _ in messages]

    def gather_to_first(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, on process 0, and an empty list on the others.

        Args:
            value: The value of this process; it is pickled.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self.communication():
            dist.gather_object(value, values)
        return values or []

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Do this process's share of the work, and return the results of all processes, by rank.

        Args:
            work: A function that does the share and returns its result.

        Raises:
            RuntimeError: If the work failed on another process. The process on which it failed raises the error itself.
            CheckpointRequested: If the work was interrupted for a checkpoint, on any process.
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
            if isinstance(error, KeyboardInterrupt):
                # All of them end in the same way.
                REQUESTS.ask_to_end("SIGINT")
        is_interrupted = isinstance(failure, CheckpointRequested)
        message = None
        if failure is not None and not is_interrupted:
            message = f"{type(failure).__name__}: {failure}"
        try:
            try:
                outcomes = self.gather((result, message, is_interrupted))
            except RuntimeError:
                # Contact was lost as well, but the own failure is the reason that the user can act on.
                if failure is not None:
                    raise failure from None
                raise
            if failure is not None and not is_interrupted:
                raise failure
        finally:
            # The traceback of the error refers to this frame; without this the frame would refer back to the error, and
            # everything in its frames would stay in memory until a garbage collection.
            failure = None
        results = []
        for rank, (other_result, other_message, _) in enumerate(outcomes):
            if other_message is not None:
                raise RuntimeError(f"Process {rank} of {self.size} failed, so this one stopped too: {other_message}")
            results.append(other_result)
        if any(was_interrupted for _, _, was_interrupted in outcomes):
            raise CheckpointRequested
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
        with self.communication():
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
        with torch.no_grad(), self.communication():
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
            with self.communication():
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
            with self.communication():
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
            with self.communication():
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
