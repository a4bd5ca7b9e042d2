"""Packet losses: a message is sent in packets, some of which are lost."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, Fallback, Link, MessageSize

Lost = Literal["zero", "last"]


class PacketLossChannel(Channel):
    """A channel that loses packets of a message.

    The numbers in a lost packet are replaced by zeros, or by the numbers that were received last at their positions.

    Args:
        probability: The probability that a packet is lost, independently each time it is sent.
        packet_bytes: Payload of a packet; how many numbers it holds depends on the channels before this one.
        header_bytes: Header of a packet, for the byte counts; 40 is IPv4 with TCP.
        retries: How often a lost packet is sent again; it is permanently lost with ``probability^(1 + retries)``.
        lost: What replaces the numbers of a lost packet. ``"zero"``: zeros, which is no change of the parameters; only
            on the uplink, because on the downlink they would be parameters of zero. ``"last"``: those of the client's
            last received update, or on the downlink of the last model it received; zeros if nothing has been received
            yet. Default: ``"zero"`` on the uplink, ``"last"`` on the downlink.
        link: As in :class:`Channel`.
        name: As in :class:`Channel`.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "PacketLossChannel"

    def __init__(
        self,
        probability: float,
        packet_bytes: int = 1460,
        *,
        header_bytes: int = 40,
        retries: int = 0,
        lost: Lost | None = None,
        link: Link = "uplink",
        name: str | None = None,
    ) -> None:
        on_uplink = arguments.choice("link", link, Link) == "uplink"
        if lost is None:
            lost = "zero" if on_uplink else "last"
        self.lost = arguments.choice("lost", lost, Lost)
        if self.lost == "zero" and not on_uplink:
            hint = "On the downlink zeros would be parameters of the model."
            raise arguments.invalid("lost", "'last' on the downlink", lost, hint)
        fallback: Fallback | None = None
        if self.lost == "last":
            # The base class keeps the messages received last for a channel with a reuse fallback.
            fallback = "reuse_update" if on_uplink else "reuse_model"
        super().__init__(link, fallback, name)
        self.probability = arguments.probability("probability", probability)
        self.packet_bytes = arguments.integer("packet_bytes", packet_bytes, minimum=8)
        self.header_bytes = arguments.integer("header_bytes", header_bytes, minimum=0)
        self.retries = arguments.integer("retries", retries, minimum=0)

    @property
    def packets(self) -> int:
        """The number of packets of a message."""
        return ceil(self.context.size.bytes / self.packet_bytes)

    def encode(self, size: MessageSize) -> MessageSize:
        """Add a header for each packet."""
        return MessageSize(size.values, size.bits, size.side + 8 * self.header_bytes * self.packets)

    def sendings(self, *, round_idx: int, client: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw how often each packet of a message is sent, and whether it is lost in the end.

        Args:
            round_idx: The round's number.
            client: The client at the other end of the link.
            seed: The federation's seed.

        Returns:
            How often each packet is sent, ``[packets]`` int64, and whether it is lost, ``[packets]`` bool.
        """
        attempts = 1 + self.retries
        generator = self.stream(seed, round_idx, client, "packets")
        draws = torch.rand(self.packets, attempts, generator=generator, dtype=torch.float64)
        failed = draws < self.probability
        # The product is 1 up to the first success, so that the sum counts the failures before it.
        failures = failed.long().cumprod(1).sum(1)
        return (failures + 1).clamp(max=attempts), failures > self.retries

    def retransmitted_bytes(self, *, round_idx: int, client: int, seed: int) -> int:
        """Return the bytes of packets that are sent again; the last packet counts as full."""
        if not self.retries:
            return 0
        times_sent, _ = self.sendings(round_idx=round_idx, client=client, seed=seed)
        return int((times_sent - 1).sum()) * (self.packet_bytes + self.header_bytes)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the message with the numbers of lost packets replaced; see :meth:`Channel.transmit`."""
        _, lost = self.sendings(round_idx=round_idx, client=client, seed=seed)
        if not lost.any():
            return message
        # Numbers are spread evenly over the packets, whatever encoding the channels before this one use.
        packet_of_number = torch.arange(len(message), device=message.device) * self.packets // len(message)
        is_lost = lost.to(message.device)[packet_of_number]
        last_message = self._received.get(client)
        replacement = torch.zeros_like(message) if last_message is None else last_message["vector"].to(message)
        return torch.where(is_lost, replacement, message)
