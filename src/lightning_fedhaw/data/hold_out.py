"""The part of each client's data that is held out of training.

Shapes: N clients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.streams import stream
from lightning_fedhaw.user_functions import called

Keys = Iterable[Hashable] | Callable[[Any], Iterable[Hashable]]


class HoldOut(argument_names.NamedArguments):
    """What is held out of each client's data: a random part, by class or by group, or given samples.

    At least one sample of each client is held out, and at least one stays in training. A client with a single sample
    (or a single group) holds out nothing, and is evaluated on its training data. Give one of ``fraction``, ``samples``
    and ``indices``.

    Args:
        fraction: The fraction of each client's samples.
        samples: The number of samples of each client.
        indices: The held-out samples of each client, by their indices in the data set: a list for each client, or a
            mapping from clients; clients that are not in the mapping hold out nothing.
        stratify: Whether the classes are held out in the client's proportions, rounded up or down.
        groups: The group of every sample ``[samples]``, such as the patient, or a function of the data set that returns
            it. A group is held out as a whole: at no client is it trained on as well. So more samples than asked for
            may be held out.

    Raises:
        ValueError: If not exactly one of the first three is given, or ``stratify`` and ``groups`` contradict the rest.

    Example:
        >>> clients = [torch.arange(10), torch.arange(10, 14)]
        >>> list(map(len, HoldOut(0.2).hold_out(clients, seed=0)))
        [2, 1]
        >>> HoldOut(indices={1: [12, 13]}).hold_out(clients, seed=0)[1].tolist()
        [12, 13]
    """

    def __init__(
        self,
        fraction: float | None = None,
        *,
        samples: int | None = None,
        indices: Sequence[Sequence[int]] | Mapping[int, Sequence[int]] | None = None,
        stratify: bool = False,
        groups: Keys | None = None,
    ) -> None:
        kinds = {"fraction": fraction, "samples": samples, "indices": indices}
        names = [name for name, value in kinds.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"`HoldOut` must be given one of `fraction`, `samples` and `indices`, got"
                f" {' and '.join(names) or 'none'}. `HoldOut(0.2)` holds out a fifth of each client's data."
            )
        self.fraction = arguments.optional(arguments.number, "fraction", fraction, above=0, below=1)
        self.samples = arguments.optional(arguments.integer, "samples", samples, minimum=1)
        self.indices = _checked_indices(indices)
        self.stratify = arguments.flag("stratify", stratify)
        self.groups = _checked_groups(groups)
        if self.stratify and groups is not None:
            raise ValueError(
                "Give `stratify` or `groups`, not both: groups are held out as a whole, whatever their classes."
            )
        if self.indices is not None and (self.stratify or groups is not None):
            raise ValueError("`indices` names the held-out samples; leave `stratify` and `groups` out.")

    def hold_out(
        self,
        clients: Sequence[Tensor],
        *,
        seed: int,
        dataset: Dataset[object] | None = None,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the held-out samples of each client, in ascending order.

        Args:
            clients: For each client the indices of its samples, in ascending order.
            seed: The federation's seed.
            dataset: The data set, for ``groups``.
            labels: ``[samples]`` of the data set, for ``stratify``.

        Raises:
            ValueError: If ``indices``, ``groups`` or ``labels`` do not fit the data.
        """
        if self.indices is not None:
            return _listed_samples(self.indices, clients)
        if self.groups is not None:
            return self._whole_groups(clients, _group_numbers(self.groups, dataset), seed)
        if self.stratify and labels is None:
            raise ValueError(
                "`stratify=True` needs integer labels, and none were found in the data set. Give `labels=` to the"
                " trainer or the data module."
            )
        held_out = []
        for client, samples in enumerate(clients):
            count = self._count(len(samples))
            order = torch.randperm(len(samples), generator=stream(seed, "client", client, "held out"))
            chosen = order[:count]
            if self.stratify and count:
                assert labels is not None
                chosen = _spread(order, labels[samples], count)
            held_out.append(samples[chosen.sort().values])
        return held_out

    def _count(self, num_samples: int) -> int:
        """Return how many of a client's samples are held out; at least one stays."""
        count = self.samples
        if count is None:
            assert self.fraction is not None
            count = max(1, round(self.fraction * num_samples))
        # At least one sample stays in training.
        return min(count, num_samples - 1)

    def _whole_groups(self, clients: Sequence[Tensor], group_of: Tensor, seed: int) -> list[Tensor]:
        """Hold out groups in a random order, at all their clients, until each client has as many samples as asked for.

        Args:
            clients: For each client the indices of its samples.
            group_of: ``[samples]``, the number of each sample's group.
            seed: The federation's seed.
        """
        missing = [self._count(len(samples)) for samples in clients]
        groups_left = []
        members: dict[int, list[tuple[int, int]]] = {}
        for client, samples in enumerate(clients):
            numbers, counts = torch.unique(group_of[samples], return_counts=True)
            groups_left.append(len(numbers))
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                members.setdefault(number, []).append((client, count))
        is_held_out = torch.zeros(int(group_of.max()) + 1, dtype=torch.bool)
        for number in torch.randperm(len(is_held_out), generator=stream(seed, "held out", "groups")).tolist():
            owners = members.get(number, [])
            is_wanted = any(missing[client] > 0 for client, _ in owners)
            # No client may be left without data to train on.
            is_possible = all(groups_left[client] > 1 for client, _ in owners)
            if is_wanted and is_possible:
                is_held_out[number] = True
                for client, count in owners:
                    missing[client] -= count
                    groups_left[client] -= 1
        held_out = []
        empty = []
        for client, samples in enumerate(clients):
            chosen = samples[is_held_out[group_of[samples]]]
            held_out.append(chosen)
            if not len(chosen):
                empty.append(client)
        if empty:
            rank_zero_warn(
                f"Clients {empty[:10]} hold out nothing, because a whole group would leave a client without data to"
                " train on; they are evaluated on their training data."
            )
        return held_out


def _checked_groups(groups: Any) -> Keys | None:
    """Refuse what is neither one key per sample nor a function."""
    keys: Keys
    if groups is None:
        return None
    if callable(groups):
        keys = groups
        return keys
    if isinstance(groups, (str, bytes)) or not hasattr(groups, "__iter__"):
        raise arguments.invalid("groups", "one group per sample, or a function of the data set", groups)
    keys = arguments.plain_list(groups)
    return keys


def _checked_indices(indices: Any) -> dict[int, list[int]] | None:
    """Return the held-out samples by client."""
    if indices is None:
        return None
    allowed = "a list of sample indices for each client, or a mapping from clients to such lists"
    if isinstance(indices, (str, bytes)) or not hasattr(indices, "__iter__"):
        raise arguments.invalid("indices", allowed, indices)
    pairs = indices.items() if isinstance(indices, Mapping) else enumerate(indices)
    checked = {}
    for client, samples in pairs:
        hint = f"That is the list of client {client}."
        number = arguments.integer("indices", client, minimum=0, hint="That is a client.")
        checked[number] = arguments.integers("indices", samples, minimum=0, allowed=allowed, hint=hint)
    return checked


def _listed_samples(indices: Mapping[int, list[int]], clients: Sequence[Tensor]) -> list[Tensor]:
    """Return the given samples of each client, and refuse those that are not its own."""
    unknown = [client for client in indices if client >= len(clients)]
    if unknown:
        raise ValueError(f"`indices` must name clients of 0 to {len(clients) - 1}, got {unknown[:10]}.")
    held_out = []
    for client, samples in enumerate(clients):
        chosen = torch.tensor(sorted(set(indices.get(client, []))), dtype=torch.int64)
        foreign = chosen[~torch.isin(chosen, samples)].tolist()
        if foreign:
            raise ValueError(f"`indices` must name the client's own samples, got {foreign[:10]} for client {client}.")
        if len(chosen) == len(samples):
            raise ValueError(f"`indices` must leave each client data to train on, got all samples of client {client}.")
        held_out.append(chosen)
    return held_out


def _group_numbers(groups: Keys, dataset: Dataset[object] | None) -> Tensor:
    """Number the groups in the order of their first samples, and return each sample's number ``[samples]``."""
    if callable(groups):
        groups = called("groups", groups, dataset)
    keys = arguments.plain_list(groups)
    num_samples = len(dataset) if dataset is not None else len(keys)  # type: ignore[arg-type]
    if len(keys) != num_samples:
        raise ValueError(f"`groups` must have one entry per sample ({num_samples}), got {len(keys)}.")
    number_of: dict[Hashable, int] = {}
    numbers = []
    for key in keys:
        # A key that is new gets the next number.
        numbers.append(number_of.setdefault(key, len(number_of)))
    return torch.tensor(numbers)


def _spread(order: Tensor, labels: Tensor, count: int) -> Tensor:
    """Choose samples at equal distances in a random order that is sorted by class, so that each gets its share.

    Args:
        order: ``[samples]``, a random order.
        labels: ``[samples]``.
        count: The number of samples to choose.
    """
    by_class = order[labels[order].argsort(stable=True)]
    positions = (torch.arange(count) + 0.5) * len(order) / count
    return by_class[positions.long()]
