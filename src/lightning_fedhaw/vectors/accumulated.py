"""A cohort's vectors that were added to a running sum when they were received, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_fedhaw.vectors.base import CohortVectors, check_length


class AccumulatedVectors(CohortVectors):
    """The weighted sum of vectors that were never kept, for rules that name each client's weight beforehand.

    The memory is that of one vector for any number of clients. Only the weighted sum with the accumulated weights
    exists; every other operation needs the vectors, and raises a ``RuntimeError`` that says so.

    Args:
        total: ``[P]``, the sum of unnormalized weight times displacement.
        unnormalized_weights: ``[K]``, the unnormalized weight of each client that was added.
        start: ``[P]``, the model that the displacements are measured from. ``None`` stands for zero.
        rule: Name of the rule, for error messages.
    """

    def __init__(self, total: Tensor, unnormalized_weights: Tensor, start: Tensor | None, rule: str) -> None:
        self.total = total
        self.unnormalized_weights = unnormalized_weights
        self.start = start
        self.rule = rule

    def __len__(self) -> int:
        return len(self.unnormalized_weights)

    @property
    def weights(self) -> Tensor:
        """The weights, normalized to sum to one, ``[K]`` float64."""
        return self.unnormalized_weights / self.unnormalized_weights.sum()

    @property
    def displacements(self) -> AccumulatedVectors:
        """The same sum measured from the start."""
        return AccumulatedVectors(self.total, self.unnormalized_weights, None, self.rule)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute the weighted sum with the weights that were accumulated (up to a common factor), ``[P]``.

        Raises:
            RuntimeError: If the weights are others, or require gradients.
        """
        check_length("weights", weights, len(self))
        if weights.requires_grad and torch.is_grad_enabled():
            # The derivative is `inner`, which needs the vectors. A detached sum would silently teach the rule nothing.
            raise self._not_kept("the derivative of a weighted sum")
        requested = weights.detach().double()
        scale = requested.sum() / self.unnormalized_weights.sum()
        if not torch.allclose(requested, self.unnormalized_weights * scale, rtol=1e-9, atol=0.0):
            raise self._not_kept("a weighted sum with weights other than its `unnormalized_weight`")
        mixed = self.total * scale.item()
        if self.start is None:
            return mixed
        return mixed.add_(self.start, alpha=weights.sum().item())

    def to(self, device: torch.device) -> AccumulatedVectors:
        """Raise an error: there are no vectors to keep."""
        raise self._not_kept("`to`")

    def inner(self, vector: Tensor) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`inner`")

    def gram(self) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`gram`")

    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`norms`")

    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`distances`")

    def gather(self) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`gather`")

    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Raise an error: this needs the vectors."""
        raise self._not_kept("`map_columns`")

    @property
    def matrix(self) -> Tensor:
        """Raise an error. This is no operation of a cohort, but rules tried with kept vectors may read their rows."""
        raise self._not_kept("`matrix`")

    def _not_kept(self, operation: str) -> RuntimeError:
        return RuntimeError(
            f"`{self.rule}` declares `unnormalized_weight`, so the clients' vectors were summed as they came and not"
            f" kept, but it then asked for {operation}. Remove `unnormalized_weight` from the rule, or set"
            ' `storage="device"`.'
        )
