"""The messages between server and clients: sent through the channels of both links, with their bytes counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_fedhaw.channel.awgn import rms
from lightning_fedhaw.channel.base import AggregateChannel, Arrivals, Channel, ChannelContext, Link, MessageSize
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.records import UpdateRecord
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.streams import PathPart, seed_of
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.layout import ParameterLayout


class SidePayload(Protocol):
    """Data that is sent in addition to the models: buffers, states that client objectives share, and rate tangents."""

    @property
    def links(self) -> Sequence[Link]:
        """The links on which it is sent."""

    @property
    def message_bytes(self) -> int:
        """Bytes in addition to one model, on each of the links."""

    @property
    def contents(self) -> list[str]:
        """The kinds of data that clients send, in words; empty if there is none."""


@dataclass(frozen=True)
class Broadcast:
    """The result of a round's broadcast.

    Attributes:
        models: The model ``[P]`` that each client starts from; a client that received nothing and has none is absent.
        up_to_date: The clients that received this round's model, and not an older one.
    """

    models: dict[int, Tensor]
    up_to_date: set[int]

    @property
    def outdated(self) -> set[int]:
        """The clients that start from an older model."""
        return set(self.models) - self.up_to_date


class Transport:
    """The transport of messages through the channels of their link, in list order.

    Args:
        channels: The channels of both links.
        layout: Where each trainable parameter lives in a message.
        payloads: The data that is sent in addition to the models.
        seed: The federation's seed, from which channels draw.
    """

    def __init__(
        self, channels: Sequence[Channel], layout: ParameterLayout, payloads: Sequence[SidePayload], seed: int
    ) -> None:
        self.uplink = [channel for channel in channels if channel.link == "uplink"]
        self.downlink = [channel for channel in channels if channel.link == "downlink"]
        self.sum_channels = [channel for channel in self.uplink if isinstance(channel, AggregateChannel)]
        self.layout = layout
        self.payloads = payloads
        self.seed = seed
        self._sizes: dict[Link, MessageSize] = {}

    def prepare(
        self,
        num_examples: Tensor,
        rule: Rule,
        *,
        drawn_uniformly: int | None,
        clients_remember: bool,
        is_probe: bool = False,
    ) -> None:
        """Describe the federation to the channels, and compute the size of a message that each link encodes.

        Args:
            num_examples: ``[N]`` int64, training examples of every client.
            rule: The aggregation rule.
            drawn_uniformly: See :class:`~lightning_fedhaw.channel.base.ChannelContext`.
            clients_remember: Whether messages of clients depend on earlier rounds, apart from the downlink's channels.
            is_probe: Whether the messages are those of a rule's probe or inquiry.
        """
        remember = clients_remember or any(channel.remembers for channel in self.downlink)
        contents = [content for payload in self.payloads for content in payload.contents]
        links: dict[Link, Sequence[Channel]] = {"uplink": self.uplink, "downlink": self.downlink}
        for link, channels in links.items():
            size = MessageSize(self.layout.numel, 8 * self.layout.message_bytes / self.layout.numel)
            for channel in channels:
                context = ChannelContext(
                    layout=self.layout,
                    num_examples=num_examples,
                    size=size,
                    channels=channels,
                    rule=type(rule.base_rule).__name__,
                    unnormalized_weight=rule.unnormalized_weight,
                    side_payloads=contents,
                    drawn_uniformly=drawn_uniformly,
                    clients_remember=remember,
                    is_probe=is_probe,
                )
                channel.prepare(context)
                size = channel.encode(size)
            self._sizes[link] = size

    def for_further_messages(
        self, layout: ParameterLayout, num_examples: Tensor, rule: Rule, *name: PathPart, has_channels: bool = True
    ) -> Transport:
        """Return a transport of the same channels for messages in addition to the updates.

        Its channels are copies with draws of their own, and without what channels keep from round to round, such as
        error feedback, which belongs to the updates.

        Args:
            layout: Where each parameter lives in such a message.
            num_examples: ``[N]`` int64, training examples of every client.
            rule: The aggregation rule.
            name: The name of the messages in random streams.
            has_channels: Whether the messages take the channels; those of the server to itself take none.
        """
        channels: list[Channel] = []
        if has_channels:
            channels = [copy.copy(channel) for channel in (*self.uplink, *self.downlink)]
        transport = Transport(channels, layout, [], seed_of(self.seed, *name))
        transport.forget()
        transport.prepare(num_examples, rule, drawn_uniformly=None, clients_remember=False, is_probe=True)
        return transport

    def forget(self) -> None:
        """Let no message depend on an earlier one."""
        for channel in (*self.uplink, *self.downlink):
            channel.reset()

    # ------------------------------------------------------------------ bytes

    def message_bytes(self, link: Link) -> int:
        """Count the bytes of one message as the channels of its link encode it, side payloads included."""
        return self._sizes[link].bytes + sum(
            payload.message_bytes for payload in self.payloads if link in payload.links
        )

    def sent_bytes(self, link: Link, round_idx: int, clients: Sequence[int]) -> int:
        """Count the bytes of a round's messages on a link, retransmissions included."""
        channels = self.uplink if link == "uplink" else self.downlink
        retransmitted_bytes = 0
        for channel in channels:
            for client in clients:
                retransmitted_bytes += channel.retransmitted_bytes(round_idx=round_idx, client=client, seed=self.seed)
        return len(clients) * self.message_bytes(link) + retransmitted_bytes

    @property
    def is_summed(self) -> bool:
        """Whether a channel acts on the sum of the cohort, so that the server sees no single updates."""
        return bool(self.sum_channels)

    # ------------------------------------------------------------------ down

    @property
    def may_be_outdated(self) -> bool:
        """Whether a client that misses a broadcast trains an older model."""
        return any(channel.fallback == "reuse_model" for channel in self.downlink)

    def broadcast(self, round_idx: int, clients: Sequence[int], start: Tensor) -> Broadcast:
        """Send the global model to the clients of a round.

        Args:
            round_idx: The round's number.
            clients: The clients that were sampled.
            start: ``[P]``, the global parameters.
        """
        sent = self.layout.rounded(start)
        models = dict.fromkeys(clients, sent)
        up_to_date = set(clients)
        for channel in self.downlink:
            present = list(models)
            for client, is_lost in zip(present, self._outage(channel, round_idx, present), strict=True):
                if not is_lost:
                    models[client] = self._through(channel, models[client], round_idx, client)
                    channel.remember_broadcast(client, models[client])
                    continue
                up_to_date.discard(client)
                last_model = channel.last_broadcast(client)
                if last_model is None:
                    del models[client]
                else:
                    models[client] = last_model.to(start)
        received = {}
        for client, model in models.items():
            # The model that most clients share is rounded already.
            received[client] = model if model is sent else self.layout.rounded(model)
        return Broadcast(received, up_to_date)

    def deliver(self, round_idx: int, clients: Sequence[int], vector: Tensor) -> dict[int, Tensor]:
        """Send a vector down in a message that is known to arrive, and return what each client received.

        Args:
            round_idx: The round's number.
            clients: The clients that receive it.
            vector: ``[P]``.
        """
        received: dict[int, Tensor] = {}
        for client in clients:
            received[client] = vector
            for channel in self.downlink:
                received[client] = self._through(channel, received[client], round_idx, client)
        return received

    # ------------------------------------------------------------------ up

    def uplink_outages(self, round_idx: int, clients: Sequence[int]) -> dict[int, Channel]:
        """Draw which updates will be lost, before any client trains.

        Returns:
            The clients, with the first channel that loses their update.
        """
        lost: dict[int, Channel] = {}
        for channel in self.uplink:
            for client, is_lost in zip(clients, self._outage(channel, round_idx, clients), strict=True):
                if is_lost:
                    lost.setdefault(client, channel)
        return lost

    def transmit(self, round_idx: int, update: ClientUpdate) -> bool:
        """Send an update's displacement up, and replace it by the received one.

        Returns:
            Whether a channel has changed it.
        """
        is_changed = False
        for channel in self.uplink:
            received = self._through(channel, update.displacement, round_idx, update.client)
            if received is not update.displacement:
                update.displacement.copy_(received)
                is_changed = True
        return is_changed

    def remember(self, update: ClientUpdate, start: Tensor) -> None:
        """Let the channels keep an update that was received, for later rounds.

        Args:
            update: The update.
            start: ``[P]``, the global parameters of the round.
        """
        for channel in self.uplink:
            channel.remember(update.client, start, update.displacement, update.num_steps)

    def rms(self, update: ClientUpdate) -> float:
        """Compute the root mean square of an update, if a channel acts on the sum and may need it."""
        if not self.sum_channels:
            return 0.0
        return rms(update.displacement)

    def superpose(
        self, vectors: AccumulatedVectors, records: Sequence[UpdateRecord], *, round_idx: int, drawn: int
    ) -> None:
        """Send the sum of a cohort through the channels that act on it, and replace it by the received one.

        Args:
            vectors: The cohort's sum.
            records: The updates in it.
            round_idx: The round's number.
            drawn: The number of clients that were sampled for the round.
        """
        arrivals = Arrivals(
            round=round_idx,
            seed=self.seed,
            drawn=drawn,
            clients=[record.update.client for record in records],
            weights=vectors.unnormalized_weights,
            rms=torch.tensor([record.rms for record in records], dtype=torch.float64),
        )
        for channel in self.sum_channels:
            vectors.total = channel.superpose(vectors.total, arrivals)

    # ------------------------------------------------------------------ one channel

    def _outage(self, channel: Channel, round_idx: int, clients: Sequence[int]) -> list[bool]:
        """Draw for each client whether a channel loses its message."""
        if not clients:
            return []
        lost = torch.as_tensor(channel.outage(round_idx, list(clients), self.seed), dtype=torch.bool)
        if lost.shape != (len(clients),):
            raise ValueError(
                f"`{type(channel).__name__}.outage` must say for each of {len(clients)} clients whether its message is"
                f" lost, got the shape {list(lost.shape)}."
            )
        return lost.tolist()

    def _through(self, channel: Channel, message: Tensor, round_idx: int, client: int) -> Tensor:
        """Send one message through one channel."""
        received = channel.transmit(message, round_idx=round_idx, client=client, seed=self.seed)
        if received.shape != message.shape:
            raise ValueError(
                f"`{type(channel).__name__}.transmit` must return a message of the shape {list(message.shape)}, got"
                f" {list(received.shape)}."
            )
        return received
