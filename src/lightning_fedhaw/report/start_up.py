"""The start-up block: what will run, and what is assumed because no argument says it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch import Callback
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.settings_in_words import (
    brief,
    described_callbacks,
    local_work_in_words,
    optimizers_in_words,
)

_MOST_NAMES = 5


def start_up_block(
    federation: Federation,
    callbacks: Iterable[Callback],
    partitioner: Partitioner,
    assumed: Sequence[str],
    round_idx: int,
) -> str:
    """Describe a run in a few lines.

    Args:
        federation: The federation.
        callbacks: The trainer's callbacks, of which channels and objectives are described.
        partitioner: How the training data is split.
        assumed: The assumptions about the split of the data.
        round_idx: The number of the first round that will run.
    """
    entries = _entries(federation, list(callbacks), partitioner, cohort_size=len(federation.cohort(round_idx)))
    assumptions = [*assumed, *_assumptions(federation.options)]
    if assumptions:
        entries.append(("assumed", "; ".join(assumptions)))
    width = max(len(name) for name, _ in entries)
    lines = ["Federation:"]
    for name, text in entries:
        lines.append(f"  {name:<{width}}  {text}")
    return "\n".join(lines)


def _entries(
    federation: Federation, callbacks: Sequence[Callback], partitioner: Partitioner, cohort_size: int
) -> list[tuple[str, str]]:
    """Describe the parts of a run, each under its name.

    Args:
        federation: The federation.
        callbacks: The trainer's callbacks.
        partitioner: How the training data is split.
        cohort_size: The number of clients in the first round.
    """
    data = federation.data
    options = federation.options
    layout = federation.layout
    entries = [("rule", federation.rule.describe())]
    for name, kind in (("channels", Channel), ("objectives", ClientObjective)):
        described = described_callbacks(callbacks, kind)
        if described:
            entries.append((name, ", ".join(described)))
    entries += [
        (
            "clients",
            f"{data.num_clients} clients with {_range(data.num_examples)} samples, {cohort_size} a round, by"
            f" {brief(partitioner)}, seed {options.resolved_seed}",
        ),
        (
            "training",
            f"{local_work_in_words(options)}, batch size {data.settings.batch_size},"
            f" {optimizers_in_words(federation.host.optimizers)}",
        ),
        ("model", f"{layout.numel:,} parameters, {_traffic(federation, cohort_size)} a round"),
    ]
    if layout.local:
        # Said at the start, because whoever validates the global model would not expect it.
        names = ", ".join(layout.local[:_MOST_NAMES])
        if len(layout.local) > _MOST_NAMES:
            names += " ..."
        entries.append(("local", f"{names}: of each client; the global model keeps their initial values"))
    if federation.rule.keeps_cohort:
        megabytes = cohort_size * layout.numel * layout.dtype.itemsize / 1e6
        entries.append(("checkpoint", f"holds {megabytes:.3g} MB of client vectors"))
    if federation.ranks.size > 1:
        entries.append(("processes", str(federation.ranks.size)))
    return entries


def _traffic(federation: Federation, cohort_size: int) -> str:
    """Describe how much is sent in a round: one message down and one up for each client that takes part."""
    down = cohort_size * federation.transport.message_bytes("downlink") / 1e6
    up = cohort_size * federation.transport.message_bytes("uplink") / 1e6
    if down == up:
        return f"{down:.3g} MB each way"
    return f"{down:.3g} MB down and {up:.3g} MB up"


def _assumptions(options: FederationOptions) -> list[str]:
    """List what is assumed of a round because no argument says it."""
    assumptions = []
    if options.clients_per_round is None and options.sampler is None:
        assumptions.append("all clients participate")
    if options.local_epochs is None and options.local_steps is None:
        assumptions.append("one local epoch")
    return assumptions


def _range(sizes: Tensor) -> str:
    """Format the smallest and the largest of some sizes ``[N]``."""
    smallest = int(sizes.min())
    largest = int(sizes.max())
    if smallest == largest:
        return f"{smallest}"
    return f"{smallest} to {largest}"
