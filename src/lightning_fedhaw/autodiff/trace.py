"""What a federated program and its derivative cost, found by running the program on tensors without values."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_fedhaw.autodiff import tape
from lightning_fedhaw.autodiff.primitives import ACCOUNT, Traffic


@dataclass(frozen=True, eq=False)
class Message:
    """One broadcast or one sum.

    Attributes:
        is_sum: Whether it goes from the clients to the server.
        numbers: Numbers that each client receives or sends.
        inputs: How many of the numbers that the derivative is taken in it depends on.
        broadcasts: Of a sum, the differentiated broadcasts that it depends on.
        block: The checkpointed round that it belongs to.
    """

    is_sum: bool
    numbers: int
    inputs: int
    broadcasts: tuple[Message, ...] = ()
    block: int | None = None

    def count(self, traffic: Traffic) -> None:
        """Account for it."""
        if self.is_sum:
            traffic.count_sum(self.numbers)
        else:
            traffic.count_broadcast(self.numbers)

    def count_transpose(self, traffic: Traffic) -> None:
        """Account for its transpose."""
        if self.is_sum:
            traffic.count_broadcast(self.numbers)
        else:
            traffic.count_sum(self.numbers)


@dataclass
class Trace:
    """The messages of a program, in order.

    Attributes:
        messages: What is sent.
        sums_only: Whether the server reads nothing but sums over clients.
        tape: Numbers that a client keeps for a reverse pass, by checkpointed round.
    """

    messages: list[Message] = field(default_factory=list)
    sums_only: bool = True
    tape: Counter[int | None] = field(default_factory=Counter)
    _block: int | None = None
    _results: list[list[Tensor]] = field(default_factory=list)
    _by_row: dict[int, tuple[Message, Tensor]] = field(default_factory=dict)
    _nodes: dict[Message, Any] = field(default_factory=dict)

    def add_broadcast(self, value: Tensor, row: Tensor) -> None:
        """Note a broadcast.

        Args:
            value: At the server.
            row: What a client receives.
        """
        message = Message(False, value.numel(), _inputs_of([value]), block=self._block)
        self.messages.append(message)
        self._by_row[id(row)] = (message, row)

    def add_sum(self, numbers: int, values: Sequence[Tensor], rows: Sequence[Tensor], total: Tensor) -> None:
        """Note a sum over clients.

        Args:
            numbers: What a client sends.
            values: The broadcast values that it depends on, at the server.
            rows: The same at a client.
            total: The sum, which depends on the values.
        """
        broadcasts = tuple(self._by_row[id(row)][0] for row in rows)
        message = Message(True, numbers, _inputs_of(values), broadcasts, self._block)
        self.messages.append(message)
        self._nodes[message] = total.grad_fn

    def add_tape(self, values: Iterable[Tensor]) -> None:
        """Note what a client keeps for the reverse pass of some values."""
        self.tape[self._block] += tape.saved_numbers(values)

    @contextmanager
    def checkpointed_round(self) -> Iterator[list[Tensor]]:
        """Note that a reverse pass computes a round again.

        Yields:
            A list that takes the round's results.
        """
        results: list[Tensor] = []
        self._block = len(self._results)
        self._results.append(results)
        try:
            yield results
        finally:
            self._block = None

    @property
    def client_memory(self) -> int:
        """Numbers that a client keeps for a reverse pass; of checkpointed rounds, one at a time."""
        largest = 0
        for block, numbers in self.tape.items():
            # What is in no checkpointed round is kept all the time.
            if block is not None:
                largest = max(largest, numbers)
        return self.tape[None] + largest

    def reverse_traffic(self, result: Tensor, passes: int) -> Traffic:
        """Account for the program and for reverse passes over it.

        Args:
            result: What the program returns.
            passes: One for each number of it.
        """
        traffic = Traffic()
        for message in self.messages:
            message.count(traffic)
        again, transposed = self._reached_from(result)
        for _ in range(passes):
            for block, group in itertools.groupby(reversed(self.messages), key=lambda message: message.block):
                messages = list(group)
                if block in again:
                    for message in reversed(messages):
                        message.count(traffic)
                for message in messages:
                    if message in transposed:
                        message.count_transpose(traffic)
        return traffic

    def _reached_from(self, result: Tensor) -> tuple[set[int | None], set[Message]]:
        """Find the checkpointed rounds that are computed again, and the messages that are transposed."""
        roots = [result]
        again: set[int | None] = set()
        for block in reversed(range(len(self._results))):
            reached = set(tape.nodes(roots))
            if not reached.isdisjoint(tape.last_nodes(self._results[block])):
                again.add(block)
                # A round is differentiated as a whole.
                roots += self._results[block]
        reached = set(tape.nodes(roots))
        transposed = set()
        for message in self.messages:
            if self._nodes.get(message) in reached:
                transposed.update({message, *message.broadcasts})
        return again, transposed


def _inputs_of(values: Sequence[Tensor]) -> int:
    """Count the numbers that the derivative is taken in and that some values depend on."""
    account = ACCOUNT.get()
    if account is None:
        return 0
    reached = tape.leaves(values)
    count = 0
    for leaf in account.inputs:
        if id(leaf) in reached:
            count += leaf.numel()
    return count
