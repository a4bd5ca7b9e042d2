"""Messages that travel in packets, some of which are lost."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, Fallback, Link, MessageSize

Lost = Literal["zero", "last"]


class PacketLossChannel(Channel):
    """Loses packets of a message: the numbers in them are zero, or what was received in their place before.

    Args:
        probability: Of each packet, independently, each time it is sent.
        packet_bytes: Payload of a packet; how many numbers fit depends on the channels before this one.
        header_bytes: Bytes of a packet beside its payload, for the byte counts; 40 is IPv4 with TCP.
        retries: How often a lost packet is sent again; it is lost for good with ``probability^(1 + retries)``.
        lost: What stands in a lost packet's place. ``"zero"``: no change (on the uplink alone: a model of zeros helps
            nobody). ``"last"``: the client's last update that was received, or on the downlink the last model it
            received; zeros where there was none yet. Default: ``"zero"`` on the uplink, ``"last"`` on the downlink.
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
            raise arguments.invalid("lost", "'last' on the downlink", lost, "A model of zeros helps nobody.")
        fallback: Fallback | None = None
        if self.lost == "last":
            # What was received last is kept as for messages that are lost whole.
            fallback = "reuse_update" if on_uplink else "reuse_model"
        super().__init__(link, fallback, name)
        self.probability = arguments.probability("probability", probability)
        self.packet_bytes = arguments.integer("packet_bytes", packet_bytes, minimum=8)
        self.header_bytes = arguments.integer("header_bytes", header_bytes, minimum=0)
        self.retries = arguments.integer("retries", retries, minimum=0)

    @property
    def packets(self) -> int:
        """Packets of a message."""
        return ceil(self.context.size.bytes / self.packet_bytes)

    def encode(self, size: MessageSize) -> MessageSize:
        """A header for each packet."""
        return MessageSize(size.values, size.bits, size.side + 8 * self.header_bytes * self.packets)

    def sendings(self, *, round_idx: int, client: int, seed: int) -> tuple[Tensor, Tensor]:
        """How often each packet is sent ``[packets]`` int64, and whether it is lost all the same, bool."""
        generator = self.stream(seed, round_idx, client, "packets")
        failed = torch.rand(self.packets, 1 + self.retries, generator=generator, dtype=torch.float64) < self.probability
        failures = failed.long().cumprod(1).sum(1)
        return (failures + 1).clamp(max=1 + self.retries), failures > self.retries

    def retransmitted_bytes(self, *, round_idx: int, client: int, seed: int) -> int:
        """Bytes of packets that were sent again; the last packet counts as full."""
        if not self.retries:
            return 0
        sent, _ = self.sendings(round_idx=round_idx, client=client, seed=seed)
        return int((sent - 1).sum()) * (self.packet_bytes + self.header_bytes)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The message with gaps filled; see :meth:`Channel.transmit`."""
        _, lost = self.sendings(round_idx=round_idx, client=client, seed=seed)
        if not lost.any():
            return message
        # Numbers share the packets evenly, whatever was done to them before.
        packet = torch.arange(len(message), device=message.device) * self.packets // len(message)
        last = self._received.get(client)
        instead = torch.zeros_like(message) if last is None else last["vector"].to(message)
        return torch.where(lost.to(message.device)[packet], instead, message)
