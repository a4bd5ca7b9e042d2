"""The base class of the schemes that split one data set over clients.

Shapes: K clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.data.partitioners.partition import Integers, Partition
from lightning_fedhaw.options import repr_settings


class Partitioner(argument_names.NamedArguments, ABC):
    """A scheme that splits the samples of one data set over clients.

    A subclass implements :meth:`split`. Callers use :meth:`partition`, which checks its arguments and its result.

    Attributes:
        needs_labels: Whether the scheme uses labels.
    """

    needs_labels: bool = False

    @property
    def num_clients(self) -> int | None:
        """The number of clients that the scheme determines; None if it accepts any number."""
        return None

    @abstractmethod
    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Decide which client gets which sample; called by :meth:`partition` with arguments that were checked.

        Draw from :func:`~lightning_fedhaw.extending.stream` or another generator made of ``seed``, so that the same
        seed gives the same partition.

        Args:
            num_clients: K, at least 1 and at most the number of samples.
            labels: ``[samples]``; all zero, that is one class, where the scheme does not need labels.
            seed: The federation's seed.

        Returns:
            The partition. :meth:`partition` refuses one that uses a sample twice, leaves a client without data, or
            loses a sample that is not counted in ``dropped``.
        """

    def partition(
        self, num_clients: int | None, *, num_samples: int, labels: Tensor | None = None, seed: int = 0
    ) -> Partition:
        """Split ``num_samples`` samples over ``num_clients`` clients.

        Args:
            num_clients: K. May be None if the scheme determines it.
            num_samples: Samples in the data set.
            labels: Integer labels ``[num_samples]``; only used by schemes with ``needs_labels``.
            seed: The federation's seed. The same seed gives the same partition.

        Returns:
            The partition: no sample twice, no client without data, and no sample lost that is not in ``dropped``.

        Raises:
            TypeError: If labels are needed and are not integers.
            ValueError: If the arguments do not fit each other, or the scheme leaves a client without data.
        """
        clients = self._resolved_clients(num_clients)
        num_samples = arguments.integer("num_samples", num_samples, minimum=1)
        if num_samples < clients:
            raise ValueError(
                f"`num_clients` must be at most the number of samples, {num_samples}, got {clients}; use fewer clients."
            )
        partition = self.split(clients, self._checked_labels(labels, num_samples), seed)
        _check_partition(partition, clients, num_samples, type(self).__name__)
        return replace(partition, scheme=self.description)

    @property
    def description(self) -> str:
        """The scheme and its settings in one line."""
        # A scheme that is an argument of this one is described the same way.
        nested = {}
        for name, value in vars(self).items():
            if isinstance(value, Partitioner):
                nested[name] = value.description
        return repr_settings(self, **nested)

    def _resolved_clients(self, num_clients: int | None) -> int:
        """Find K from the caller's number and the one that the scheme determines."""
        determined = self.num_clients
        name = type(self).__name__
        if num_clients is None:
            if determined is None:
                raise ValueError(f"`num_clients` must be given for {name}, got None; give a whole number, such as 10.")
            return determined
        num_clients = arguments.integer("num_clients", num_clients, minimum=1)
        if determined is not None and determined != num_clients:
            raise ValueError(
                f"`num_clients` must be {determined}, which {name} determines, or None, got {num_clients}."
            )
        return num_clients

    def _checked_labels(self, labels: Tensor | None, num_samples: int) -> Integers:
        """Check the labels, and convert them to those ``[samples]`` that :meth:`split` receives."""
        if labels is None and self.needs_labels:
            raise ValueError(
                f"`labels` must be given for {type(self).__name__}, got None (no integer class labels were found in the"
                " data set); give `labels=`, one entry per sample, or split without labels: leave `alpha` out, or use"
                " `IIDPartitioner()`."
            )
        if labels is not None and len(labels) != num_samples:
            raise ValueError(f"`labels` must have one entry per sample ({num_samples}), got {len(labels)}.")
        if labels is None or not self.needs_labels:
            return np.zeros(num_samples, dtype=np.int64)
        return integer_labels(labels)


def _check_partition(partition: Partition, num_clients: int, num_samples: int, scheme: str) -> None:
    """Refuse a partition that breaks the rules of :meth:`Partitioner.split`."""
    if len(partition.indices) != num_clients:
        raise ValueError(
            f"`indices` of a partition by {scheme} must have one entry per client ({num_clients}), got"
            f" {len(partition.indices)}."
        )
    empty = []
    for client, size in enumerate(partition.sizes.tolist()):
        if size == 0:
            empty.append(str(client))
    if empty:
        raise ValueError(
            f"`indices` of a partition by {scheme} must give every client a sample, got none for client(s)"
            f" {', '.join(empty)}; use fewer clients or a less skewed split."
        )
    # A partitioner may be of the user's own: a sample that two clients share would bias every result silently.
    used = torch.cat(partition.indices)
    if used.min() < 0 or used.max() >= num_samples:
        raise ValueError(
            f"`indices` of a partition by {scheme} must lie in 0 .. {num_samples - 1}, got {int(used.min())} to"
            f" {int(used.max())}."
        )
    times = used.bincount()
    if times.max() > 1:
        raise ValueError(
            f"`indices` of a partition by {scheme} must use each sample at most once, got sample {int(times.argmax())}"
            f" {int(times.max())} times."
        )
    if len(used) + partition.dropped != num_samples:
        raise ValueError(
            f"`indices` and `dropped` of a partition by {scheme} must account for all {num_samples} samples, got"
            f" {len(used)} used and {partition.dropped} dropped."
        )


def checked_base(base: object) -> Partitioner:
    """Check the scheme that another scheme is based on.

    Raises:
        TypeError: If it is no partitioner.
    """
    checked: Any = arguments.instance("base", base, Partitioner, example="IIDPartitioner()")
    return checked  # type: ignore[no-any-return]


def integer_labels(labels: Tensor) -> Integers:
    """Convert labels ``[samples]`` to int64.

    Raises:
        TypeError: If they are not integers, or not one for each sample.
    """
    values = torch.as_tensor(labels)
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        raise TypeError(
            f"`labels` must be integers of shape [samples], got {values.dtype} of shape {list(values.shape)}."
        )
    return values.cpu().numpy().astype(np.int64)
