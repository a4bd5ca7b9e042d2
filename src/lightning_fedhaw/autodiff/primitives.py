"""The two operations that cross the border between server and clients, and the account of what they send.

Every other operation of a federated program is local. Broadcast and sum are each other's transposes, so the derivative
of a program that uses only them uses only them again: what can be computed by sums over clients (and so under secure
aggregation) can be differentiated by sums over clients.

K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation. arXiv:2301.07806, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lightning_fedhaw import arguments
from lightning_fedhaw.ranks import Ranks

DropOutPolicy = Literal["raise", "drop", "reweight", "stored"]
Reduction = Literal["ordered", "fast"]

ROUND: ContextVar[int | None] = ContextVar("round", default=None)
"""The round that an unrolled program is in; elsewhere rounds are counted by what is sent."""


@dataclass
class Traffic:
    """What was sent between the server and each client.

    Attributes:
        down: Numbers that each client received.
        up: Numbers that each client sent.
        rounds: Communication rounds: how often a broadcast followed a sum, and the first.
        missing_weight: The share of the clients' weight that was gone in the reverse passes, one entry per broadcast.
    """

    down: int = 0
    up: int = 0
    rounds: int = 0
    missing_weight: list[float] = field(default_factory=list)
    _is_answered: bool = field(default=True, repr=False)

    def count_broadcast(self, numbers: int) -> None:
        """Count a broadcast of so many numbers."""
        if self._is_answered:
            self.rounds += 1
            self._is_answered = False
        self.down += numbers

    def count_sum(self, numbers: int) -> None:
        """Count a sum over clients of so many numbers."""
        self._is_answered = True
        self.up += numbers


@dataclass
class Account:
    """What is counted and simulated while one derivative is computed, for all clients that take part.

    Attributes:
        traffic: What is sent.
        drop_outs: Clients that are gone in the reverse pass.
        inputs: The leaves of the tape that the derivative is taken in; none in forward mode.
    """

    traffic: Traffic
    drop_outs: DropOuts | None = None
    inputs: Sequence[Tensor] = ()
    _former: list[tuple[Clients, Traffic, DropOuts | None]] = field(default_factory=list)

    @property
    def clients(self) -> list[Clients]:
        """Those who take part."""
        return [clients for clients, _, _ in self._former]

    def admit(self, clients: Clients) -> None:
        """Let clients take part, when the program first speaks to them."""
        if any(clients is known for known in self.clients):
            return
        self._former.append((clients, clients.traffic, clients.drop_outs))
        clients.traffic = self.traffic
        clients.drop_outs = self.drop_outs

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Count for this account, and give the clients back to the former one in the end."""
        token = ACCOUNT.set(self)
        try:
            yield
        finally:
            ACCOUNT.reset(token)
            for clients, traffic, drop_outs in self._former:
                clients.traffic = traffic
                clients.drop_outs = drop_outs


ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)
"""The account of the derivative that is being computed."""


@dataclass(frozen=True)
class DropOuts:
    """Clients that cannot be reached in the reverse pass, which asks the clients of the program again.

    Args:
        lost: The clients that are gone: the same in every round, or a function of the round's number (from 0): within
            :func:`unroll` its number, elsewhere that of the communication round.
        policy: ``"raise"``: an error. ``"drop"``: what the others send is summed. ``"reweight"``: that sum is divided
            by the share of the weight that is left, which is unbiased where clients drop out independently of what they
            would send. ``"stored"``: nothing is lost, because the simulator has kept what a client would compute.
        weights: ``[K]``, the clients' weights in that share; equal by default.

    Raises:
        ValueError: If the policy is unknown.
    """

    lost: Collection[int] | Callable[[int], Collection[int]]
    policy: DropOutPolicy = "raise"
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        arguments.choice("policy", self.policy, DropOutPolicy)

    def lost_in(self, round_idx: int) -> set[int]:
        """Return the clients that are gone in the reverse pass of a round."""
        lost = self.lost(round_idx) if callable(self.lost) else self.lost
        return set(lost)


class Clients:
    """The clients of a federated program, and which of them live on this process.

    Args:
        ids: The clients' numbers, each once.
        ranks: The processes; clients are assigned to them in turn. One process by default.
        reduction: ``"ordered"``: sums are formed in the order of ``ids``, which gives the same bits for any number of
            processes. ``"fast"``: every process sums its own clients first.

    Raises:
        ValueError: If there is no client, one appears twice, or there are fewer clients than processes.

    Example:
        >>> Clients(range(3)).ids
        (0, 1, 2)
    """

    def __init__(self, ids: Sequence[int], ranks: Ranks | None = None, reduction: Reduction = "ordered") -> None:
        self.ids = tuple(int(client) for client in ids)
        self.ranks = ranks or Ranks()
        self.reduction: Reduction = arguments.choice("reduction", reduction, Reduction)
        if not self.ids or len(set(self.ids)) < len(self.ids):
            raise ValueError(f"`ids` must name at least one client, and each once, got {list(self.ids)}.")
        if len(self.ids) < self.ranks.size:
            raise ValueError(
                f"`ids` names {len(self.ids)} clients, and there are {self.ranks.size} processes. Every process needs"
                " at least one client: start fewer processes."
            )
        self.owners = [slot % self.ranks.size for slot in range(len(self.ids))]
        self.slots_here: list[int] = []
        for slot, owner in enumerate(self.owners):
            if owner == self.ranks.rank:
                self.slots_here.append(slot)
        self.traffic = Traffic()
        self.drop_outs: DropOuts | None = None
        self.is_accounted = True

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Clients({list(self.ids)})"

    @property
    def ids_here(self) -> list[int]:
        """The clients that live on this process, in order."""
        return [self.ids[slot] for slot in self.slots_here]

    @contextmanager
    def unaccounted(self) -> Iterator[None]:
        """Move values that are not sent: what the server works out from messages that it has."""
        before = self.is_accounted
        self.is_accounted = False
        try:
            yield
        finally:
            self.is_accounted = before

    def tell(self, error: BaseException) -> None:
        """Tell the other processes of an error, once: they would wait for this one's sums for ever.

        Raises:
            BaseException: The error itself, when they know.
        """
        if self.ranks.size > 1 and not getattr(error, _IS_TOLD, False):
            setattr(error, _IS_TOLD, True)
            self.ranks.exchange(partial(_raise, error))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other processes of every error."""
        try:
            yield
        except BaseException as error:
            # An interrupt included: the others would wait for this process forever.
            self.tell(error)
            raise

    def agree(self, what: Any) -> None:
        """Make sure that no process has failed, and that all are at the same point of the program.

        Args:
            what: What this process is about to do.

        Raises:
            RuntimeError: If another process has failed, or does something else.
        """
        if self.ranks.size == 1:
            return
        try:
            everyone = self.ranks.exchange(lambda: what)
        except RuntimeError as error:
            # Another process has failed, and every process knows.
            setattr(error, _IS_TOLD, True)
            raise
        if any(each != what for each in everyone):
            raise RuntimeError(
                "The processes run different programs, or their clients send messages of different shapes or dtypes:"
                f" {everyone}. Let no branch of the program depend on what only one process knows."
            )

    def total(self, rows: Tensor) -> Tensor:
        """Sum what the clients send.

        Args:
            rows: ``[clients here, ...]``.

        Returns:
            ``[...]``, the same on every process.

        Raises:
            RuntimeError: If another process has failed, or sends something else.
        """
        if not rows.is_floating_point() and not rows.is_complex():
            # Counts: neither is True + True True, nor may small integers overflow.
            rows = rows.long()
        self.agree(f"the sum of {str(rows.dtype).removeprefix('torch.')}{list(rows.shape[1:])}")
        if self.ranks.size == 1 or self.reduction == "fast":
            return self.ranks.sum(_sum_in_order(rows))
        flat = rows.reshape(len(rows), rows[0].numel())
        total = torch.zeros(flat.shape[1], dtype=rows.dtype, device=rows.device)
        for columns, block in self.ranks.columns(flat, self.owners):
            if block.numel():
                total[columns] = _sum_in_order(block).to(total.device)
        # Each column was summed by one process and is zero on the others, so that adding moves it and rounds nothing.
        return self.ranks.sum(total).reshape(rows.shape[1:])

    def without_lost(self, rows: Tensor, round_idx: int) -> Tensor:
        """Apply the drop-outs of the reverse pass.

        Args:
            rows: ``[clients here, ...]``, what the clients send back.
            round_idx: The round whose broadcast is transposed.

        Returns:
            The rows, with zeros for clients that are gone, scaled by the policy.

        Raises:
            RuntimeError: With ``policy="raise"``, if a client is gone; with ``"reweight"``, if all are.
        """
        drop_outs = self.drop_outs
        if drop_outs is None or drop_outs.policy == "stored":
            return rows
        lost = drop_outs.lost_in(round_idx) & set(self.ids)
        if not lost:
            return rows
        if drop_outs.policy == "raise":
            raise RuntimeError(
                f"Clients {sorted(lost)} are gone in the reverse pass of round {round_idx}, which asks the clients of"
                ' the program again. Differentiate by `mode="forward"` or `"mixed"`, which ask nobody twice, or choose'
                ' what a lost client means by `DropOuts(policy="drop")`, `"reweight"` or `"stored"`.'
            )
        weights = torch.ones(len(self), dtype=torch.float64)
        if drop_outs.weights is not None:
            weights = torch.as_tensor(drop_outs.weights, dtype=torch.float64)
        is_there = torch.tensor([client not in lost for client in self.ids])
        share = float(weights[is_there].sum() / weights.sum())
        self.traffic.missing_weight.append(1 - share)
        if drop_outs.policy == "reweight" and share == 0:
            raise RuntimeError(
                f"All clients are gone in the reverse pass of round {round_idx}: nothing is left to scale."
            )
        mask = is_there[self.slots_here].to(rows)
        if drop_outs.policy == "reweight":
            mask = mask / share
        return rows * mask.reshape(-1, *[1] * (rows.ndim - 1))


_IS_TOLD = "is_told_to_all_processes"
"""Marks an error that the other processes know of."""


def _raise(error: BaseException) -> NoReturn:
    raise error


def _sum_in_order(rows: Tensor) -> Tensor:
    """Add rows one after another: the bits depend on their order alone, and not on how a kernel groups them."""
    # This turns -0.0 into 0.0, as adding the zeros of other processes does.
    total = rows[0] + 0
    for row in rows[1:]:
        total += row
    return total


class Broadcast(torch.autograd.Function):
    """``[...] -> [clients here, ...]``: every client gets the server's value. The transpose is :class:`Sum`."""

    @staticmethod
    def forward(value: Tensor, clients: Clients) -> Tensor:
        """Give every client a copy."""
        if clients.is_accounted:
            clients.traffic.count_broadcast(value.numel())
        return value.expand(len(clients.slots_here), *value.shape).clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember the clients, and the round that the broadcast opened."""
        _, clients = inputs
        ctx.clients = clients  # type: ignore[attr-defined]
        unrolled = ROUND.get()
        ctx.round_idx = clients.traffic.rounds - 1 if unrolled is None else unrolled  # type: ignore[attr-defined]
        ctx.is_accounted = clients.is_accounted  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        """Sum the clients' cotangents."""
        if ctx.is_accounted:
            return Sum.apply(ctx.clients.without_lost(gradients[0], ctx.round_idx), ctx.clients), None
        with ctx.clients.unaccounted():
            return Sum.apply(gradients[0], ctx.clients), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Broadcast the tangent."""
        return Broadcast.apply(tangents[0], ctx.clients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], value: Tensor, clients: Clients) -> tuple[Tensor, int | None]:
        """Broadcast a batch of values in one message."""
        if in_dims[0] is None:
            return Broadcast.apply(value, clients), None
        return Broadcast.apply(value.movedim(in_dims[0], 0), clients), 1


class Sum(torch.autograd.Function):
    """``[clients here, ...] -> [...]``: the sum over all clients. The transpose is :class:`Broadcast`."""

    @staticmethod
    def forward(rows: Tensor, clients: Clients) -> Tensor:
        """Sum over the clients of all processes."""
        if clients.is_accounted:
            clients.traffic.count_sum(rows[0].numel())
        return clients.total(rows)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember the clients, and whether they sent anything."""
        _, clients = inputs
        ctx.clients = clients  # type: ignore[attr-defined]
        ctx.is_accounted = clients.is_accounted  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        """Broadcast the server's cotangent."""
        if ctx.is_accounted:
            return Broadcast.apply(gradients[0], ctx.clients), None
        with ctx.clients.unaccounted():
            return Broadcast.apply(gradients[0], ctx.clients), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Sum the tangents."""
        return Sum.apply(tangents[0], ctx.clients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rows: Tensor, clients: Clients) -> tuple[Tensor, int | None]:
        """Sum a batch of values in one message."""
        if in_dims[0] is None:
            return Sum.apply(rows, clients), None
        return Sum.apply(rows.movedim(in_dims[0], 1), clients), 0
