"""Channels: what happens to a message between server and client."""

from lightning_fedhaw.channel.base import Channel, Filled

__all__ = ["Channel", "Filled"]
