"""Clients that have too few samples to take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw.data.partitioners import Partition


def large_clients(partition: Partition, minimum: int) -> list[int]:
    """Return the clients that have at least so many samples, and warn of the others.

    Args:
        partition: The split.
        minimum: The argument ``min_client_samples``.

    Raises:
        ValueError: If there are none.
    """
    sizes = partition.sizes.tolist()
    large = []
    small = []
    num_dropped = 0
    for client, size in enumerate(sizes):
        if size >= minimum:
            large.append(client)
        else:
            small.append(client)
            num_dropped += size
    if not large:
        raise ValueError(
            f"`min_client_samples`={minimum} leaves no client: the largest has {max(sizes)} samples. Lower it, or split"
            " over fewer clients."
        )
    if small:
        listed = f"{small[:10]} ..." if len(small) > 10 else f"{small}"
        rank_zero_warn(
            f"`min_client_samples`={minimum} leaves out {len(small)} of {len(sizes)} clients, {listed}, with"
            f" {num_dropped} samples. The others are numbered 0 to {len(large) - 1} in their order."
        )
    return large


def only(partition: Partition, clients: Sequence[int]) -> Partition:
    """Return the partition of some of the clients, who are renumbered in their order.

    Args:
        partition: The split.
        clients: The clients that stay, in ascending order.
    """
    if len(clients) == len(partition.indices):
        return partition
    swaps = {}
    for number, client in enumerate(clients):
        if client in partition.label_swaps:
            swaps[number] = partition.label_swaps[client]
    indices = tuple(partition.indices[client] for client in clients)
    num_dropped = int(partition.sizes.sum()) - sum(map(len, indices))
    return replace(partition, indices=indices, dropped=partition.dropped + num_dropped, label_swaps=swaps)
