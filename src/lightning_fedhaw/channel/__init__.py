"""Communication channels between the server and the clients: one family of models per file."""

from lightning_fedhaw.channel.awgn import AWGNChannel
from lightning_fedhaw.channel.base import (
    AggregateChannel,
    Arrivals,
    BlockChannel,
    Channel,
    ChannelContext,
    MessageSize,
    Substitute,
)
from lightning_fedhaw.channel.bitflip import BitFlipChannel
from lightning_fedhaw.channel.erasure import ErasureChannel, GilbertElliott
from lightning_fedhaw.channel.fading import FadingChannel
from lightning_fedhaw.channel.overtheair import OverTheAirChannel
from lightning_fedhaw.channel.packets import PacketLossChannel
from lightning_fedhaw.channel.participation import AvailabilityChannel, StragglerChannel
from lightning_fedhaw.channel.privacy import DifferentialPrivacyChannel
from lightning_fedhaw.channel.quantized import QuantizationChannel
from lightning_fedhaw.channel.sparsified import SparsificationChannel

__all__ = [
    "AWGNChannel",
    "AggregateChannel",
    "Arrivals",
    "AvailabilityChannel",
    "BitFlipChannel",
    "BlockChannel",
    "Channel",
    "ChannelContext",
    "DifferentialPrivacyChannel",
    "ErasureChannel",
    "FadingChannel",
    "GilbertElliott",
    "MessageSize",
    "OverTheAirChannel",
    "PacketLossChannel",
    "QuantizationChannel",
    "SparsificationChannel",
    "StragglerChannel",
    "Substitute",
]
