"""Means over a batch of which only the first samples count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_LOSSES: frozenset[Callable[..., Tensor]] = frozenset(
    {
        functional.binary_cross_entropy,
        functional.binary_cross_entropy_with_logits,
        functional.cross_entropy,
        functional.huber_loss,
        functional.l1_loss,
        functional.mse_loss,
        functional.nll_loss,
        functional.smooth_l1_loss,
        functional.soft_margin_loss,
    }
)
"""The losses that are a mean over samples."""

MEANS = frozenset({*_LOSSES, torch.mean, Tensor.mean})
"""The functions that are replaced in a call whose batches have different lengths."""


class Counted(NamedTuple):
    """The samples of a batch that count: the first ones.

    Attributes:
        size: The number of samples in the batch.
        length: The number of those that count, a scalar tensor.
    """

    size: int
    length: Tensor

    def call(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Call one of :data:`MEANS`; where it is a mean over the batch, of the samples that count.

        A function is a mean over the batch if the first axis of its input is as long as the batch. That may be wrong;
        the trial compares all values with those of the samples that count alone.
        """
        if function in _LOSSES:
            return self._loss(function, args, kwargs)
        values: Tensor = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        plain = set(kwargs) <= {"input", "dim"} and len(args) <= 2
        if plain and self._is_batch(values) and values.is_floating_point():
            if dim is None:
                return self._mean(values)
            if dim in (0, (0,), [0], -values.ndim):
                return ((values * self._counts(values)).sum(0) / self.length).to(values.dtype)
        mean: Tensor = function(*args, **kwargs)
        return mean

    def _loss(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Call a loss function; the mean is over the samples that count."""
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        is_mean = arguments.get("reduction", "mean") == "mean" and self._is_batch(arguments["input"])
        # Arguments that are no longer documented, and weights, by whose sum the mean is divided.
        for name in ("size_average", "reduce", "weight"):
            is_mean &= arguments.get(name) is None
        if not is_mean:
            return function(*args, **kwargs)
        values = function(**{**arguments, "reduction": "none"})
        target = arguments["target"]
        if function in (functional.cross_entropy, functional.nll_loss) and not target.is_floating_point():
            return self._mean(values, target != arguments.get("ignore_index", -100))
        return self._mean(values)

    def _is_batch(self, values: Tensor) -> bool:
        return values.ndim > 0 and len(values) == self.size

    def _counts(self, values: Tensor) -> Tensor:
        """Return 1 for each sample that counts and 0 for each other, to be multiplied with values."""
        counts = torch.arange(self.size, device=values.device) < self.length
        return counts.to(values.dtype).view(-1, *[1] * (values.ndim - 1))

    def _mean(self, values: Tensor, is_used: Tensor | None = None) -> Tensor:
        """Return the mean of the elements of samples that count.

        Args:
            values: ``[size, ...]``.
            is_used: Of the same shape, elements that are used at all. Default: all.
        """
        counts = self._counts(values)
        if is_used is None:
            number = self.length * values[0].numel()
        else:
            counts = counts * is_used
            number = counts.sum()
        # The number is exact in float32 only, which must not decide the precision of the mean.
        return ((values * counts).sum() / number).to(values.dtype)
