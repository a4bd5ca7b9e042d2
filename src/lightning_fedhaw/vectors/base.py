"""The operations of a rule on a cohort's vectors, wherever they are stored.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class CohortVectors(ABC):
    """The K parameter vectors of a cohort, used through a few linear operations.

    A rule that uses these operations only works the same for vectors in one matrix, on the device or in host memory
    (:class:`~lightning_fedhaw.extending.ClientVectors`), for vectors that are spread over processes, and for vectors
    that were added to a running sum and not kept. Of a sum, only :meth:`weighted_sum` can be computed; the other
    operations raise an error that says how to keep the vectors.

    Attributes:
        start: ``[P]``, the model that displacements are measured from. ``None`` stands for zero.
    """

    start: Tensor | None

    @abstractmethod
    def __len__(self) -> int:
        """K, the number of vectors."""

    @property
    @abstractmethod
    def displacements(self) -> CohortVectors:
        """The same vectors measured from the start."""

    @abstractmethod
    def to(self, device: torch.device) -> CohortVectors:
        """Move the vectors to a device, to keep them there beyond the round."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute ``sum_k weights[k] * vector_k``.

        Args:
            weights: ``[K]``.

        Returns:
            ``[P]``.
        """

    @abstractmethod
    def inner(self, vector: Tensor) -> Tensor:
        """Compute ``<vector, vector_k>`` for every client: the transpose of :meth:`weighted_sum`.

        Args:
            vector: ``[P]``.

        Returns:
            ``[K]`` float64, on the CPU.
        """

    @abstractmethod
    def gram(self) -> Tensor:
        """Compute the inner products of all pairs of vectors, ``[K, K]`` float64 on the CPU."""

    @abstractmethod
    def norms(self, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean norms of the vectors, ``[K]`` float64 on the CPU.

        Args:
            groups: Slices of the flat vector by name, as ``ParameterLayout.groups`` returns them, for the norm of each.

        Returns:
            ``[K]``; with groups, ``[groups, K]``.
        """

    @abstractmethod
    def distances(self, center: Tensor | None, groups: Mapping[str, Sequence[slice]] | None = None) -> Tensor:
        """Compute the Euclidean distances of the vectors from a point, ``[K]`` float64 on the CPU.

        Args:
            center: The point ``[P]``; ``None``: the origin.
            groups: As for :meth:`norms`.

        Returns:
            ``[K]``; with groups, ``[groups, K]``.
        """

    @abstractmethod
    def gather(self) -> Tensor:
        """Copy all vectors into one new matrix ``[K, P]``."""

    @abstractmethod
    def map_columns(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute one number for every parameter from all clients' values of it, such as their median.

        Args:
            function: ``[K, columns] -> [columns]``, for any number of columns at a time. Its argument may be changed.

        Returns:
            ``[P]``.
        """


def check_length(name: str, tensor: Tensor, length: int) -> None:
    """Refuse a tensor that is not a vector of this length.

    Raises:
        ValueError: Naming the argument, the allowed shape, and the actual one.
    """
    if tensor.shape != (length,):
        raise ValueError(f"`{name}` must have the shape [{length}], got {list(tensor.shape)}.")
