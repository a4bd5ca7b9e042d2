"""Draw docs/images/channels.png: what each channel does to an update, and which updates it loses."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from pictures import save_for_pages
from torch import Tensor, nn

import lightning_fedhaw as fed
from lightning_fedhaw.channel import AggregateChannel, Arrivals, Channel, ChannelContext, MessageSize
from lightning_fedhaw.channel.awgn import rms
from lightning_fedhaw.extending import ParameterLayout
from lightning_fedhaw.figures.base import new_figure

NUMBERS = 120
CLIENTS = 10
ROUNDS = 60
MESSAGES: dict[str, Channel] = {
    "AWGNChannel(snr_db=5)": fed.AWGNChannel(5.0),
    "FadingChannel(snr_db=10)": fed.FadingChannel(10.0),
    'QuantizationChannel(3, "nearest")': fed.QuantizationChannel(3, "nearest"),
    'QuantizationChannel(3, "qsgd")': fed.QuantizationChannel(3, "qsgd"),
    "SparsificationChannel(0.2)": fed.SparsificationChannel(0.2),
    'SparsificationChannel(0.2, "random")': fed.SparsificationChannel(0.2, "random"),
    "BitFlipChannel(0.02, bits=8)": fed.BitFlipChannel(0.02, bits=8),
    "PacketLossChannel(0.3, 48)": fed.PacketLossChannel(0.3, 48),
    "OverTheAirChannel(10): the average": fed.OverTheAirChannel(10.0),
    "DifferentialPrivacyChannel(clip=6, noise_multiplier=0.5): the average": fed.DifferentialPrivacyChannel(
        6.0, 0.5, delta=None
    ),
}
LOSSES: dict[str, Channel] = {
    "ErasureChannel(max_probability=0.8)": fed.ErasureChannel(max_probability=0.8),
    "ErasureChannel(burst=GilbertElliott(0.05, 0.2))": fed.ErasureChannel(burst=fed.GilbertElliott(0.05, 0.2)),
    "StragglerChannel(1.0, seconds_per_sample=0.01)": fed.StragglerChannel(1.0, 0.01),
    "AvailabilityChannel(period=24)": fed.AvailabilityChannel(),
}


def prepare(channel: Channel) -> None:
    """Describe a federation of ``CLIENTS`` clients with a model of ``NUMBERS`` parameters to a channel."""
    layout = ParameterLayout.of(nn.Linear(NUMBERS - 1, 1))
    channel.prepare(
        ChannelContext(
            layout=layout,
            num_examples=torch.linspace(20, 150, CLIENTS),
            size=MessageSize(NUMBERS, 32),
            channels=[channel],
            rule="FedAvgCallback",
            unnormalized_weight=lambda update: 1.0,
            side_payloads=[],
            drawn_uniformly=CLIENTS,
        )
    )


def updates() -> Tensor:
    """Return updates ``[clients, numbers]`` that are smooth and differ between clients."""
    x = torch.linspace(0, 1, NUMBERS)
    phases = torch.rand(CLIENTS, 2, generator=torch.Generator().manual_seed(3))
    rows = []
    for slow, fast in phases:
        rows.append(torch.sin(9 * (x + 0.2 * slow)) + 0.6 * torch.sin(31 * (x + fast)))
    return torch.stack(rows)


def transmit(channel: Channel) -> tuple[Tensor, Tensor]:
    """Return what was sent and what was received: an update, or the average for channels that act on the sum."""
    rows = updates()
    if not isinstance(channel, AggregateChannel):
        return rows[0], channel.transmit(rows[0], round_idx=1, client=0, seed=0)
    is_received = ~channel.outage(0, list(range(CLIENTS)), 0)
    clients = is_received.nonzero().flatten().tolist()
    received = [channel.transmit(rows[client], round_idx=0, client=client, seed=0) for client in clients]
    arrivals = Arrivals(
        round=0,
        seed=0,
        drawn=CLIENTS,
        clients=clients,
        weights=torch.ones(len(received), dtype=torch.float64),
        rms=torch.tensor([rms(row) for row in received], dtype=torch.float64),
    )
    return rows.mean(0), channel.superpose(torch.stack(received).sum(0), arrivals) / len(received)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "channels.png")
    save_for_pages(draw, parser.parse_args().output, dpi=75)


def draw() -> Figure:
    """Draw what was sent and received by every channel, and which updates were lost."""
    figure = new_figure(13, 13)
    panels = iter(figure.subplots(7, 2).flat)
    for name, channel in MESSAGES.items():
        prepare(channel)
        sent, received = transmit(channel)
        axes = next(panels)
        axes.plot(sent, color="#999999", linewidth=3, label="sent")
        axes.plot(received, color="#D55E00", linewidth=1, label="received")
        axes.set_title(name, fontsize=10, family="monospace")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks([])
    figure.axes[0].legend(frameon=False, ncols=2, fontsize=9)
    for name, channel in LOSSES.items():
        prepare(channel)
        lost = torch.stack([channel.outage(t, list(range(CLIENTS)), 0) for t in range(ROUNDS)], 1)
        axes = next(panels)
        page = rcParams["axes.facecolor"]
        # Lost updates in gray on the page.
        colors = ListedColormap([page, "#777777"])
        axes.imshow(lost, aspect="auto", cmap=colors, interpolation="nearest")
        axes.set_title(name, fontsize=10, family="monospace")
        axes.set(xlabel="round", ylabel="client")
    return figure


if __name__ == "__main__":
    main()
