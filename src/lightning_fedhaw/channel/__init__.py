"""Channels: what happens to a message between server and client. One family each, a pure function and a small class."""

from lightning_fedhaw.channel.awgn import AWGNChannel
from lightning_fedhaw.channel.base import Arrivals, BlockChannel, Channel, Filled, Parcel, Scene, SumChannel
from lightning_fedhaw.channel.bitflip import BitFlipChannel
from lightning_fedhaw.channel.erasure import ErasureChannel, GilbertElliott
from lightning_fedhaw.channel.fading import FadingChannel
from lightning_fedhaw.channel.overtheair import OverTheAirChannel
from lightning_fedhaw.channel.packets import PacketLossChannel
from lightning_fedhaw.channel.participation import AvailabilityChannel, DeadlineChannel
from lightning_fedhaw.channel.privacy import PrivacyChannel
from lightning_fedhaw.channel.quantised import QuantizedChannel
from lightning_fedhaw.channel.sparsified import SparsifiedChannel

__all__ = [
    "AWGNChannel",
    "Arrivals",
    "AvailabilityChannel",
    "BitFlipChannel",
    "BlockChannel",
    "Channel",
    "DeadlineChannel",
    "ErasureChannel",
    "FadingChannel",
    "Filled",
    "GilbertElliott",
    "OverTheAirChannel",
    "PacketLossChannel",
    "Parcel",
    "PrivacyChannel",
    "QuantizedChannel",
    "Scene",
    "SparsifiedChannel",
    "SumChannel",
]
