"""What the air does to a message between server and client: the base of every channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.streams import PathPart, stream
from lightning_fedhaw.vectors.layout import ParameterLayout

Link = Literal["uplink", "downlink"]
Fallback = Literal["zero_update", "reuse_update", "reuse_model", "discard"]
DownlinkFallback = Literal["reuse_model", "discard"]
Per = Literal["update", "layer"]


@dataclass(frozen=True)
class Substitute:
    """What stands in for a message that was not received.

    Attributes:
        displacement: ``[P]``, measured from the model that was broadcast this round.
        num_steps: Optimizer steps behind it; 0 for a zero update.
    """

    displacement: Tensor
    num_steps: int


@dataclass(frozen=True)
class MessageSize:
    """What a message is on the link, for counting bytes.

    Attributes:
        values: Numbers in it.
        bits: Bits of each number.
        side: Bits beside them: scales, ranges, positions, headers.

    Example:
        >>> MessageSize(values=10, bits=3, side=64).bytes
        12
    """

    values: int
    bits: float
    side: int = 0

    @property
    def bytes(self) -> int:
        """Whole bytes."""
        return ceil((self.values * self.bits + self.side) / 8)


@dataclass(frozen=True)
class ChannelContext:
    """What a channel may know of the federation around it.

    Attributes:
        layout: Where each trainable parameter lives in a message.
        num_examples: ``[N]`` int64, training examples of every client.
        size: A message as the channels before this one leave it.
        channels: All channels of the link, in list order.
        rule: The rule's name.
        unnormalized_weight: The rule's ``unnormalized_weight``, if it names clients' weights beforehand.
        side_payloads: What leaves the clients beside the message, in words.
        drawn_uniformly: The number of clients a round, where all sets of so many are equally likely; ``None`` where
            they come by another sampler.
        clients_remember: Whether what a client sends depends on the rounds it was in before.
    """

    layout: ParameterLayout
    num_examples: Tensor
    size: MessageSize
    channels: Sequence[Channel]
    rule: str
    unnormalized_weight: Callable[[Any], float] | None
    side_payloads: Sequence[str]
    drawn_uniformly: int | None
    clients_remember: bool = False

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.num_examples)


class Channel(KeyedCallback):
    """Changes, delays or loses the messages of one link. Several compose in list order.

    A new channel overrides :meth:`outage` (which messages are lost), :meth:`transmit` (what the receiver gets of the
    rest), or both. Losses are drawn before local training, so a client whose uplink fails does not train; messages are
    changed one client at a time.

    On the uplink the message is the client's displacement from the model it received, on the downlink it is the global
    model. Buffers are not changed.

    What a channel makes of the size of a message it says in :meth:`encode`, and what it cannot work with in
    :meth:`prepare`. A channel with state of its own overrides :meth:`state_dict`, :meth:`load_state_dict` and
    :meth:`reset`, and replaces values instead of changing them in place: a round that is interrupted is undone by
    putting back the old ones.

    Args:
        link: ``"uplink"``: from the clients to the server. ``"downlink"``: from the server to the clients.
        fallback: What the receiver uses for a message it did not receive. On the uplink: ``"zero_update"``: the model
            just broadcast, in a slot that keeps its weight (the published client error of FedHAW). ``"reuse_update"``:
            the client's last update that was received, applied to the current model. ``"reuse_model"``: its last model
            that was received. ``"discard"``: nothing, and the weights of the others are normalized. The reuse policies
            are a zero update until something was received. On the downlink: ``"reuse_model"``: the client trains the
            last global model it received, and does not take part before it received one. ``"discard"``: it does not
            take part. Default: ``"zero_update"`` on the uplink, ``"discard"`` on the downlink.
        name: Tells two channels of one class on one link apart in a checkpoint.

    Raises:
        ValueError: If ``link`` or ``fallback`` is unknown, the fallback has no meaning on the link, or the name is no
            string.
    """

    key = "Channel"

    def __init__(self, link: Link = "uplink", fallback: Fallback | None = None, name: str | None = None) -> None:
        super().__init__()
        self.link: Link = arguments.choice("link", link, Link)
        if fallback is None:
            fallback = "zero_update" if self.link == "uplink" else "discard"
        self.fallback: Fallback = arguments.choice(
            "fallback",
            fallback,
            Fallback if self.link == "uplink" else DownlinkFallback,
            hint=f"The channel is on the {self.link}.",
        )
        self.name = arguments.optional(arguments.text, "name", name)
        self._received: dict[int, dict[str, Any]] = {}

    @property
    def state_key(self) -> str:
        """Key, link and name: Lightning keeps one state per key, and draws are addressed by it."""
        return "/".join(filter(None, (type(self).key, self.link, self.name)))

    context: ChannelContext
    """The federation around the channel, from :meth:`prepare` on."""

    def prepare(self, context: ChannelContext) -> None:
        """Called at the start of a fit: a channel refuses here what it cannot work with, and calls ``super()``.

        Raises:
            ValueError: If so.
        """
        self.context = context

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Which messages of the round are lost, ``[K]`` bool. None by default.

        Args:
            round_idx: The round's number.
            clients: The cohort.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return torch.zeros(len(clients), dtype=torch.bool)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """What the receiver gets of a message ``[P]`` that is not lost. The message itself by default.

        Args:
            message: ``[P]``. Not to be changed: return a new tensor.
            round_idx: The round's number.
            client: The client at the far end.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return message

    def on_sent(self, function: Callable[[Tensor], Tensor], message: Tensor) -> Tensor:
        """``function: [d] -> [d]`` on the numbers of a message that travel, or of a part of it.

        These are all, or those that a :class:`SparsificationChannel` before this one chose: the others are no part of
        the message, and stay zero.
        """
        if self.context.size.values >= self.context.layout.numel:
            return function(message)
        sent = message.nonzero().squeeze(1)
        return message.index_copy(0, sent, function(message[sent])) if len(sent) else message

    def encode(self, size: MessageSize) -> MessageSize:
        """A message's size after this channel has packed it; the same by default."""
        return size

    def retransmitted_bytes(self, *, round_idx: int, client: int, seed: int) -> int:
        """Bytes of one message that were sent more than once."""
        return 0

    def summary(self) -> dict[str, float]:
        """What a user wants to know at the end of a run; nothing by default."""
        return {}

    def stream(self, seed: int, round_idx: int, client: int, purpose: str) -> torch.Generator:
        """The channel's own randomness for one client and round."""
        return self._stream(seed, "client", client, "round", round_idx, purpose)

    def _stream(self, seed: int, *path: PathPart) -> torch.Generator:
        return stream(seed, "channel", self.state_key, *path)

    def _uniform(self, seed: int, round_idx: int, clients: Sequence[int], purpose: str) -> Tensor:
        """One number of [0, 1) for each client, ``[K]`` float64."""
        draws = [
            torch.rand((), generator=self.stream(seed, round_idx, client, purpose), dtype=torch.float64)
            for client in clients
        ]
        return torch.stack(draws) if draws else torch.zeros(0, dtype=torch.float64)

    def substitute(self, client: int, start: Tensor) -> Substitute | None:
        """What the server uses for an uplink message it did not hear; ``None`` if the client is left out.

        Args:
            client: The client whose update was not received.
            start: ``[P]``, the model that was broadcast this round.
        """
        if self.fallback == "discard":
            return None
        last = self._received.get(client)
        if last is None or self.fallback == "zero_update":
            return Substitute(torch.zeros_like(start), 0)
        kept = last["vector"].to(start)
        return Substitute(kept if self.fallback == "reuse_update" else kept - start, last["num_steps"])

    def remember(self, client: int, start: Tensor, displacement: Tensor, num_steps: int) -> None:
        """Keep what was received from a client, in host memory, if the fallback will want it."""
        if self.fallback.startswith("reuse"):
            vector = displacement if self.fallback == "reuse_update" else start + displacement
            self._received[client] = {"vector": vector.to("cpu", copy=True), "num_steps": num_steps}

    def remember_broadcast(self, client: int, model: Tensor) -> None:
        """Keep the model ``[P]`` that a client received, in host memory, if the fallback will want it."""
        if self.fallback == "reuse_model":
            # Nobody changes a model in place, so clients that received the same one share it.
            self._received[client] = {"vector": model.cpu(), "num_steps": 0}

    @property
    def remembers(self) -> bool:
        """Whether messages depend on those before them."""
        return self.fallback.startswith("reuse") or type(self).state_dict is not Channel.state_dict

    def last_broadcast(self, client: int) -> Tensor | None:
        """The last global model ``[P]`` a client received, on a downlink that reuses it."""
        kept = self._received.get(client)
        return None if kept is None else kept["vector"]

    def reset(self) -> None:
        """Forget what another run left behind."""
        self._received = {}

    def state_dict(self) -> dict[str, Any]:
        """What was received last, for a checkpoint."""
        return {"received": dict(self._received)} if self._received else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was received last from a checkpoint."""
        self._received = dict(state_dict.get("received", {}))


class BlockChannel(Channel):
    """A channel whose numbers (power, range, norm, the k largest) are a whole message's, or each layer's own.

    Args:
        per: ``"update"``: the whole message. ``"layer"``: each module's own parameters together.
        channel: The arguments of :class:`Channel`.

    Raises:
        ValueError: If ``per`` is unknown.
    """

    key = "BlockChannel"

    def __init__(self, per: Per = "update", **channel: Any) -> None:
        arguments.check_names(type(self).__name__, channel, arguments.constructor_names(type(self)))
        super().__init__(**channel)
        self.per: Per = arguments.choice("per", per, Per)

    @property
    def blocks(self) -> list[slice]:
        """The parts of a message that are treated by themselves."""
        if self.per == "update":
            return [slice(0, self.context.layout.numel)]
        # A module's own parameters follow each other.
        return [slice(parts[0].start, parts[-1].stop) for parts in self.context.layout.groups().values()]

    def blockwise(self, function: Callable[[Tensor], Tensor], message: Tensor) -> Tensor:
        """``function: [d] -> [d]`` on what travels of every part of a message ``[P]``."""
        return torch.cat([self.on_sent(function, message[block]) for block in self.blocks])


@dataclass(frozen=True)
class Arrivals:
    """Who is in a sum that a :class:`AggregateChannel` acts on.

    Attributes:
        round: The round's number.
        seed: The federation's seed.
        drawn: How many clients were drawn for the round.
        clients: The K clients in the sum.
        weights: ``[K]`` float64, their raw weights.
        rms: ``[K]`` float64, root mean square of each displacement; 0 of those that were not received.
    """

    round: int
    seed: int
    drawn: int
    clients: Sequence[int]
    weights: Tensor
    rms: Tensor


class AggregateChannel(Channel):
    """An uplink channel that acts on the sum of the whole cohort, so that nobody sees single updates.

    It works with rules that need a weighted sum with weights known beforehand, those that declare
    ``unnormalized_weight``, and with fallbacks that need no client's last update. A new one overrides
    :meth:`superpose`.
    """

    key = "SumChannel"

    def __init__(self, fallback: Fallback | None = "discard", name: str | None = None) -> None:
        super().__init__("uplink", fallback, name)

    def prepare(self, context: ChannelContext) -> None:
        """Refuse rules and fallbacks that need single updates."""
        own = type(self).__name__
        if context.unnormalized_weight is None:
            raise ValueError(
                f"`{own}` gives the server the sum of the updates alone, and {context.rule} needs each client's. Use a"
                " rule that needs sums (FedAvg, FedOpt, FedHyper, FedNova), or leave the channel out."
            )
        for channel in context.channels:
            if channel.fallback.startswith("reuse"):
                raise ValueError(
                    f"`{own}` gives the server the sum of the updates alone, and `{type(channel).__name__}` with"
                    f' fallback="{channel.fallback}" reuses single ones. Use "zero_update" or "discard".'
                )
        super().prepare(context)

    def superpose(self, total: Tensor, arrivals: Arrivals) -> Tensor:
        """What the server gets of the sum ``[P]`` of raw weight times displacement.

        The sum is not to be changed: return a new tensor.
        """
        return total


def check_keys(callbacks: Iterable[Any]) -> None:
    """Refuse two channels that a checkpoint could not tell apart.

    Raises:
        ValueError: Naming them, and the remedy.
    """
    seen = set()
    for channel in callbacks:
        if isinstance(channel, Channel):
            if channel.state_key in seen:
                own = type(channel).__name__
                raise ValueError(
                    f"`callbacks` holds two `{own}` on the {channel.link} with"
                    f" {f'the name {channel.name!r}' if channel.name else 'no name'}, which a checkpoint could not tell"
                    f' apart. Give each a name: `{own}(..., name="second")`.'
                )
            seen.add(channel.state_key)
