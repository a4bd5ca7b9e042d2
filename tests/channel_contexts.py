"""What channels are told of a federation, without one."""

from __future__ import annotations

import torch
from torch import nn

from lightning_fedhaw.channel import ChannelContext, MessageSize
from lightning_fedhaw.extending import ParameterLayout


def context(parameters: int = 8, num_clients: int = 10, **kwargs) -> ChannelContext:
    """N clients with 10, 20, ... samples and a model of one layer."""
    layout = ParameterLayout.of(nn.Linear(parameters - 1, 1))
    return ChannelContext(
        **{
            "layout": layout,
            "num_examples": 10 * torch.arange(1, num_clients + 1),
            "size": MessageSize(parameters, 32),
            "channels": (),
            "rule": "FedAvgCallback",
            "unnormalized_weight": lambda update: 1.0,
            "side_payloads": (),
            "drawn_uniformly": num_clients,
            **kwargs,
        }
    )


def prepared(channel, parameters: int = 8, num_clients: int = 10, **kwargs):
    """The channel, with such a federation around it."""
    channel.prepare(context(parameters, num_clients, channels=(channel,), **kwargs))
    return channel


def received(channel, message, rounds: int = 1, client: int = 0, seed: int = 0):
    """What comes of a message in many rounds, ``[rounds, P]``."""
    return torch.stack([channel.transmit(message, round_idx=t, client=client, seed=seed) for t in range(rounds)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
