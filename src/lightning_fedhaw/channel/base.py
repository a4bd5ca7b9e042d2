"""Base class of channel models: the communication channels between the server and the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.streams import PathPart, stream
from lightning_fedhaw.vectors.layout import ParameterLayout

Link = Literal["uplink", "downlink"]
Fallback = Literal["zero_update", "reuse_update", "reuse_model", "discard"]
DownlinkFallback = Literal["reuse_model", "discard"]
Per = Literal["update", "layer"]


@dataclass(frozen=True)
class Substitute:
    """The update that the server uses instead of a message that was not received.

    Attributes:
        displacement: ``[P]``, measured from the model that was broadcast this round.
        num_steps: Optimizer steps that led to the displacement; 0 for a zero update.
    """

    displacement: Tensor
    num_steps: int


class ReceivedMessage(TypedDict):
    """The last message that was received over one client's link; a dictionary, because checkpoints hold it as it is.

    Attributes:
        vector: ``[P]`` in host memory: a displacement for ``"reuse_update"``, a model for ``"reuse_model"``.
        num_steps: Optimizer steps that led to it; 0 for a broadcast model.
    """

    vector: Tensor
    num_steps: int


@dataclass(frozen=True)
class MessageSize:
    """The size of a message on the link.

    Attributes:
        values: The number of numbers in the message.
        bits: Bits of each number.
        side: Bits of side information: scales, ranges, positions, headers.

    Example:
        >>> MessageSize(values=10, bits=3, side=64).bytes
        12
    """

    values: int
    bits: float
    side: int = 0

    @property
    def bytes(self) -> int:
        """The size in bytes, rounded up."""
        return ceil((self.values * self.bits + self.side) / 8)


@dataclass(frozen=True)
class ChannelContext:
    """The description of the federation that a channel receives in :meth:`Channel.prepare`.

    Attributes:
        layout: The position of each trainable parameter in a message.
        num_examples: ``[N]`` int64, the number of training examples of each client.
        size: The size of a message after the channels before this one.
        channels: All channels of the link, in list order.
        rule: The class name of the aggregation rule.
        unnormalized_weight: The rule's ``unnormalized_weight``, which gives a client's weight without looking at other
            clients; ``None`` if the rule has none.
        side_payloads: The names of what clients send in addition to the message, such as buffers.
        drawn_uniformly: The number of clients per round, if every set of that many clients is equally likely;
            ``None`` with any other sampler.
        clients_remember: Whether what a client sends depends on earlier rounds in which it participated.
        is_probe: Whether the messages are those of a rule's probe or inquiry, which clients send in addition to their
            updates or instead of them.
    """

    layout: ParameterLayout
    num_examples: Tensor
    size: MessageSize
    channels: Sequence[Channel]
    rule: str
    unnormalized_weight: Callable[[ClientUpdate], float] | None
    side_payloads: Sequence[str]
    drawn_uniformly: int | None
    clients_remember: bool = False
    is_probe: bool = False

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return len(self.num_examples)


class Channel(KeyedCallback):
    """Base class of channel models, which change, delay or lose the messages of one link.

    Several channels on one link are applied in list order. A new channel overrides :meth:`outage` (which messages are
    lost), :meth:`transmit` (what is received of a message that is not lost), or both. Losses are drawn before local
    training, so a client whose uplink fails does not train; messages are transmitted one client at a time.

    On the uplink the message is the client's displacement from the model it received, on the downlink it is the global
    model. Buffers are not changed.

    A channel that changes the size of a message overrides :meth:`encode`, and one that cannot work with every
    federation refuses it in :meth:`prepare`. A channel with state of its own overrides :meth:`state_dict`,
    :meth:`load_state_dict` and :meth:`reset`. It replaces values instead of changing them in place, because a round
    that is interrupted is undone by restoring the old values.

    Args:
        link: ``"uplink"``: from the clients to the server. ``"downlink"``: from the server to the clients.
        fallback: What the receiver uses instead of a message that it did not receive. On the uplink:
            ``"zero_update"``: the model just broadcast, which keeps the client's weight (the client error of the
            published FedHAW). ``"reuse_update"``: the client's last received update, applied to the current model.
            ``"reuse_model"``: the client's last received model. ``"discard"``: nothing, and the weights of the other
            clients are normalized. The two reuse policies use a zero update until something has been received. On the
            downlink: ``"reuse_model"``: the client trains the last global model it received, and does not participate
            until it has received one. ``"discard"``: the client does not participate. Default: ``"zero_update"`` on
            the uplink, ``"discard"`` on the downlink.
        name: Distinguishes two channels of one class on one link in a checkpoint.

    Raises:
        ValueError: If ``link`` or ``fallback`` is unknown, the fallback has no meaning on the link, or the name is not
            a string.
    """

    key = "Channel"

    def __init__(self, link: Link = "uplink", fallback: Fallback | None = None, name: str | None = None) -> None:
        super().__init__()
        self.link: Link = arguments.choice("link", link, Link)
        default: Fallback = "zero_update"
        allowed: object = Fallback
        if self.link == "downlink":
            default = "discard"
            allowed = DownlinkFallback
        if fallback is None:
            fallback = default
        self.fallback: Fallback = arguments.choice(
            "fallback", fallback, allowed, hint=f"The channel is on the {self.link}."
        )
        self.name = arguments.optional(arguments.text, "name", name)
        self._received: dict[int, ReceivedMessage] = {}

    @property
    def state_key(self) -> str:
        """The key, link and name: Lightning keeps one state per key, and random draws are addressed by it."""
        address = [type(self).key, self.link]
        if self.name:
            address.append(self.name)
        return "/".join(address)

    context: ChannelContext
    """The description of the federation, from :meth:`prepare` on."""

    def prepare(self, context: ChannelContext) -> None:
        """Refuse a federation that the channel cannot work with; called at the start of a fit.

        An override calls ``super().prepare(context)``, which keeps the context.

        Args:
            context: The description of the federation.

        Raises:
            ValueError: If the channel cannot work with the federation.
        """
        self.context = context

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which messages of the round are lost, ``[K]`` bool; none by default.

        Args:
            round_idx: The round's number.
            clients: The K clients of the round.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return torch.zeros(len(clients), dtype=torch.bool)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return what is received of a message ``[P]`` that is not lost; the message itself by default.

        Args:
            message: ``[P]``. Not to be changed: return a new tensor.
            round_idx: The round's number.
            client: The client that sends the message, or on the downlink receives it.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return message

    def on_sent(self, function: Callable[[Tensor], Tensor], message: Tensor) -> Tensor:
        """Apply a function to the numbers of a message, or of a part of it, that are transmitted.

        These are all numbers, or those that a :class:`SparsificationChannel` before this channel selected. The numbers
        that it did not select are not transmitted, and stay zero.

        Args:
            function: ``[d] -> [d]``.
            message: The message, or a part of it.
        """
        if self.context.size.values >= self.context.layout.numel:
            return function(message)
        positions = message.nonzero().squeeze(1)
        if len(positions) == 0:
            return message
        return message.index_copy(0, positions, function(message[positions]))

    def encode(self, size: MessageSize) -> MessageSize:
        """Return the size of a message after this channel has encoded it; the same size by default.

        Args:
            size: The size before.
        """
        return size

    def retransmitted_bytes(self, *, round_idx: int, client: int, seed: int) -> int:
        """Return the bytes of one client's message that are sent again in a round; none by default."""
        return 0

    def summary(self) -> dict[str, float]:
        """Return the channel's entries of the run summary; none by default."""
        return {}

    def stream(self, seed: int, round_idx: int, client: int, purpose: str) -> torch.Generator:
        """Return the channel's own random stream for one client, one round and one purpose."""
        return self._named_stream(seed, "client", client, "round", round_idx, purpose)

    def _named_stream(self, seed: int, *path: PathPart) -> torch.Generator:
        return stream(seed, "channel", self.state_key, *path)

    def _uniform_draws(self, seed: int, round_idx: int, clients: Sequence[int], purpose: str) -> Tensor:
        """Draw one number in [0, 1) for each client, ``[K]`` float64."""
        draws = torch.empty(len(clients), dtype=torch.float64)
        for slot, client in enumerate(clients):
            # One stream per client, so that a client's number does not depend on the other clients of the round.
            generator = self.stream(seed, round_idx, client, purpose)
            draws[slot] = torch.rand((), generator=generator, dtype=torch.float64)
        return draws

    def substitute(self, client: int, start: Tensor) -> Substitute | None:
        """Return what the server uses instead of an uplink message that was not received.

        Args:
            client: The client whose update was not received.
            start: ``[P]``, the model that was broadcast this round.

        Returns:
            The substitute, or ``None`` if the client is left out of the round.
        """
        if self.fallback == "discard":
            return None
        message = self._received.get(client)
        if message is None or self.fallback == "zero_update":
            # Without steps, as the server knows nothing of the client's work.
            return Substitute(torch.zeros_like(start), 0)
        displacement = message["vector"].to(start)
        if self.fallback == "reuse_model":
            # The model was kept, and the global model has moved since.
            displacement = displacement - start
        return Substitute(displacement, message["num_steps"])

    def remember(self, client: int, start: Tensor, displacement: Tensor, num_steps: int) -> None:
        """Keep what was received from a client in host memory, if the fallback may reuse it.

        Args:
            client: The client whose update was received.
            start: ``[P]``, the model that the displacement is measured from.
            displacement: ``[P]``, as received.
            num_steps: Optimizer steps that led to it.
        """
        if self.fallback.startswith("reuse"):
            vector = displacement if self.fallback == "reuse_update" else start + displacement
            # A copy, because the displacement's memory is used again for other clients.
            self._received[client] = {"vector": vector.to("cpu", copy=True), "num_steps": num_steps}

    def remember_broadcast(self, client: int, model: Tensor) -> None:
        """Keep the model ``[P]`` that a client received in host memory, if the fallback may reuse it."""
        if self.fallback == "reuse_model":
            # No copy: models are never changed in place, so clients that received the same one share it.
            self._received[client] = {"vector": model.cpu(), "num_steps": 0}

    @property
    def remembers(self) -> bool:
        """Whether messages depend on earlier messages."""
        return self.fallback.startswith("reuse") or type(self).state_dict is not Channel.state_dict

    def last_broadcast(self, client: int) -> Tensor | None:
        """Return the last global model ``[P]`` that a client received, on a downlink that reuses it.

        Args:
            client: The client.

        Returns:
            The model, or ``None`` if the client has not received one.
        """
        message = self._received.get(client)
        if message is None:
            return None
        return message["vector"]

    def reset(self) -> None:
        """Forget the state of an earlier run."""
        self._received = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the messages received last, for a checkpoint."""
        if not self._received:
            return {}
        return {"received": dict(self._received)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the messages received last from a checkpoint."""
        self._received = dict(state_dict.get("received", {}))


class BlockChannel(Channel):
    """Base class of channels that compute a power, range, norm or top-k per message or per layer.

    Args:
        per: ``"update"``: over the whole message. ``"layer"``: over the parameters of each module that has any.
        channel: The arguments of :class:`Channel`.

    Raises:
        ValueError: If ``per`` is unknown.
    """

    key = "BlockChannel"

    def __init__(self, per: Per = "update", **channel: Any) -> None:
        argument_names.check_names(type(self).__name__, channel, argument_names.constructor_names(type(self)))
        super().__init__(**channel)
        self.per: Per = arguments.choice("per", per, Per)

    @property
    def blocks(self) -> list[slice]:
        """The ranges of a message that are treated separately."""
        if self.per == "update":
            return [slice(0, self.context.layout.numel)]
        blocks = []
        for ranges in self.context.layout.groups().values():
            # The parameters of one module are contiguous in a message.
            blocks.append(slice(ranges[0].start, ranges[-1].stop))
        return blocks

    def blockwise(self, function: Callable[[Tensor], Tensor], message: Tensor) -> Tensor:
        """Apply a function to the transmitted numbers of each block of a message.

        Args:
            function: ``[d] -> [d]``.
            message: ``[P]``.
        """
        return torch.cat([self.on_sent(function, message[block]) for block in self.blocks])


@dataclass(frozen=True)
class Arrivals:
    """The updates in a sum that an :class:`AggregateChannel` acts on.

    Attributes:
        round: The round's number.
        seed: The federation's seed.
        drawn: The number of clients that were drawn for the round.
        clients: The K clients in the sum.
        weights: ``[K]`` float64, their unnormalized weights.
        rms: ``[K]`` float64, root mean square of each displacement; 0 for clients whose update was not received.
    """

    round: int
    seed: int
    drawn: int
    clients: Sequence[int]
    weights: Tensor
    rms: Tensor


class AggregateChannel(Channel):
    """Base class of uplink channels that act on the sum of the cohort, so that the server sees no single update.

    Such a channel works with aggregation rules that need only a weighted sum with weights known in advance, which
    declare ``unnormalized_weight``, and with fallbacks that reuse no client's last update. A new one overrides
    :meth:`superpose`.
    """

    key = "SumChannel"

    def __init__(self, fallback: Fallback | None = "discard", name: str | None = None) -> None:
        super().__init__("uplink", fallback, name)

    def prepare(self, context: ChannelContext) -> None:
        """Refuse rules and fallbacks that need single updates.

        Raises:
            ValueError: If the rule or the fallback of a channel needs single updates.
        """
        name = type(self).__name__
        if context.unnormalized_weight is None:
            raise ValueError(
                f"`{name}` gives the server only the sum of the updates, and {context.rule} needs each client's update."
                " Use a rule that needs only a weighted sum (FedAvg, FedOpt, FedHyper, FedNova), or remove the channel."
            )
        for channel in context.channels:
            if channel.fallback.startswith("reuse"):
                raise ValueError(
                    f"`{name}` gives the server only the sum of the updates, and `{type(channel).__name__}` with"
                    f' fallback="{channel.fallback}" reuses single updates. Use "zero_update" or "discard".'
                )
        super().prepare(context)

    def superpose(self, total: Tensor, arrivals: Arrivals) -> Tensor:
        """Return what the server receives of the sum of unnormalized weight times displacement.

        Args:
            total: ``[P]``, the sum. Not to be changed: return a new tensor.
            arrivals: The updates in the sum.
        """
        return total


def check_keys(callbacks: Iterable[object]) -> None:
    """Refuse two channels that a checkpoint could not tell apart.

    Args:
        callbacks: The trainer's callbacks; those that are not channels are ignored.

    Raises:
        ValueError: If two channels have the same class, link and name.
    """
    state_keys: set[str] = set()
    for channel in callbacks:
        if not isinstance(channel, Channel):
            continue
        if channel.state_key in state_keys:
            kind = type(channel).__name__
            name = f"the name {channel.name!r}" if channel.name else "no name"
            raise ValueError(
                f"`callbacks` holds two `{kind}` on the {channel.link} with {name}, which a checkpoint could not tell"
                f' apart. Give each a name: `{kind}(..., name="second")`.'
            )
        state_keys.add(channel.state_key)
