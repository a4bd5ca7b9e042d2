"""What the sampler of a training loader says, for clients that draw from their own samples.

Shapes: n samples of one client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler


@dataclass(frozen=True, eq=False)
class Draws:
    """Random draws that are more than one shuffle: with weights, with replacement, or another number of them.

    Attributes:
        num_samples: Draws in a pass over all training data; each client makes its share of them.
        num_total: Samples of all training data.
        replacement: Whether a sample may be drawn twice in a pass.
        weights: float64 ``[num_total]``, the weight of each sample; None if all are equal.
    """

    num_samples: int
    num_total: int
    replacement: bool
    weights: Tensor | None = None

    def count(self, samples: Tensor) -> int:
        """Count the draws of a client in a pass: its share by size, at least one.

        Args:
            samples: The client's samples, int64 ``[n]``.
        """
        share = max(1, round(len(samples) * self.num_samples / self.num_total))
        if self.weights is None or self.replacement:
            return share
        # Without replacement, samples of weight 0 cannot be drawn even when no others are left.
        return min(share, int(self.weights[samples].count_nonzero()))

    def order(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the samples of a pass, int64 ``[draws]``, from a client's own ``[n]``."""
        count = self.count(samples)
        if self.weights is not None:
            chosen = torch.multinomial(self.weights[samples], count, self.replacement, generator=generator)
        elif self.replacement:
            chosen = torch.randint(len(samples), (count,), generator=generator)
        else:
            # As in torch, more draws than samples are several shuffles, the last of which may be cut short.
            num_shuffles = -(-count // len(samples))
            shuffles = [torch.randperm(len(samples), generator=generator) for _ in range(num_shuffles)]
            chosen = torch.cat(shuffles)[:count]
        return samples.index_select(0, chosen)

    def check_clients(self, samples_of_clients: Sequence[Tensor]) -> None:
        """Refuse clients that can draw nothing, because all their samples have the weight 0."""
        if self.weights is None:
            return
        empty = []
        for client, samples in enumerate(samples_of_clients):
            if not self.weights[samples].any():
                empty.append(client)
        if empty:
            raise ValueError(
                f"`weights` of the WeightedRandomSampler are 0 for all samples of clients {empty[:10]}, which could"
                " draw nothing. Give positive weights, fewer clients or a less skewed split, or leave samples of weight"
                " 0 out by `torch.utils.data.Subset`."
            )

    def of_subset(self, indices: Sequence[int]) -> Draws:
        """Return the draws from some of the samples: their weights, and their share of the number."""
        weights = self.weights
        if weights is not None:
            weights = weights[torch.as_tensor(indices, dtype=torch.int64)]
        num_samples = max(1, round(len(indices) * self.num_samples / self.num_total))
        return Draws(num_samples, len(indices), self.replacement, weights)

    def sampler(self, dataset: Sized) -> Sampler[int]:
        """Return torch's sampler that makes these draws from all training data."""
        if self.weights is not None:
            weights = cast(Sequence[float], self.weights)
            return WeightedRandomSampler(weights, self.num_samples, self.replacement)
        return RandomSampler(dataset, self.replacement, self.num_samples)


@dataclass(frozen=True, eq=False)
class Sampling:
    """How samples are drawn in a pass.

    Attributes:
        shuffle: Whether samples are shuffled again in every pass.
        draws: Draws that are more than a shuffle; None if every sample is visited once.
        indices: The samples that are visited at all; None if all are.
    """

    shuffle: bool
    draws: Draws | None = None
    indices: Sequence[int] | None = None

    @classmethod
    def of(cls, sampler: Sampler[object] | Iterable[Any], num_total: int) -> Sampling:
        """Read a sampler; its generator is not used, since clients draw from the federation's seed.

        Args:
            sampler: The sampler of a loader.
            num_total: Samples of the loader's data set.

        Raises:
            ValueError: If it is none of torch's own, which act on the samples of one client as on all.
        """
        if _is_plain(sampler, SubsetRandomSampler):
            chosen = [int(index) for index in cast(SubsetRandomSampler, sampler).indices]
            if sorted(chosen) == list(range(num_total)):
                return cls(shuffle=True)
            return cls(shuffle=True, indices=chosen)
        if _is_plain(sampler, WeightedRandomSampler):
            return cls(shuffle=True, draws=_weighted(cast(WeightedRandomSampler, sampler), num_total))
        if _is_plain(sampler, SequentialSampler):
            indices = _first_samples(cast(SequentialSampler, sampler).data_source, num_total)
            return cls(shuffle=False, indices=indices)
        if _is_plain(sampler, RandomSampler):
            return _random(cast(RandomSampler, sampler), num_total)
        raise ValueError(
            "`train_dataloaders` must sample in order, with `shuffle=True`, or with a sampler of `torch.utils.data`,"
            f" got the custom sampler {type(sampler).__name__}, which draws from all samples and not from those of one"
            " client. To draw some samples more often, as class-balanced samplers do, give"
            " `WeightedRandomSampler(weights, num_samples=len(weights))` with one weight per sample, such as 1 /"
            " (samples of its class); to leave samples out, give a `torch.utils.data.Subset`; otherwise remove"
            " `sampler=`. Unequal clients come from the partitioner."
        )


def _is_plain(sampler: object, kind: type[Sampler[object]]) -> bool:
    """Return whether a sampler draws as torch's own does: a subclass that changes only the constructor is one, too."""
    if not isinstance(sampler, kind):
        return False
    # `Any`, because not every class of samplers has a length.
    custom: Any = type(sampler)
    original: Any = kind
    return custom.__iter__ is original.__iter__ and custom.__len__ is original.__len__


def _random(sampler: RandomSampler, num_total: int) -> Sampling:
    """Read a shuffle, or draws with equal weights."""
    indices = _first_samples(sampler.data_source, num_total)
    num_available = len(sampler.data_source)
    if not sampler.replacement and sampler.num_samples == num_available:
        return Sampling(shuffle=True, indices=indices)
    draws = Draws(sampler.num_samples, num_available, sampler.replacement)
    return Sampling(shuffle=True, draws=draws, indices=indices)


def _weighted(sampler: WeightedRandomSampler, num_total: int) -> Draws:
    """Read draws with weights."""
    weights = sampler.weights.to("cpu", torch.float64)
    if len(weights) != num_total:
        raise ValueError(
            f"`weights` of the WeightedRandomSampler must have one entry per sample ({num_total}), got {len(weights)}."
            " Give one weight for each sample of the loader's data set."
        )
    if not weights.isfinite().all() or (weights < 0).any():
        raise ValueError(
            "`weights` of the WeightedRandomSampler must be finite and not negative, got values from"
            f" {float(weights.min())} to {float(weights.max())}."
        )
    return Draws(sampler.num_samples, num_total, sampler.replacement, weights)


def _first_samples(source: Sized, num_total: int) -> Sequence[int] | None:
    """Return the samples that a sampler over ``source`` visits; None if they are all."""
    num_visited = len(source)
    if num_visited == num_total:
        return None
    if num_visited > num_total:
        raise ValueError(
            f"`train_dataloaders` has a sampler over {num_visited} samples and a data set of {num_total}. Make the"
            " sampler from the loader's data set."
        )
    return range(num_visited)
