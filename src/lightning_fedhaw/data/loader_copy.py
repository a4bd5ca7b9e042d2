"""Copies of a data loader whose class makes its batches in code of its own, for the samples of one client."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Subset

_ITERATION_METHODS = ("__iter__", "_get_iterator")
"""Methods of ``DataLoader`` in which a subclass can work on batches."""

_END = object()
"""What an iterator returns here at its end."""


def iterates_by_itself(loader: DataLoader[object]) -> bool:
    """Return whether a loader's class overrides how batches are made, such as for mix-up, prefetching or scaling."""
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in _ITERATION_METHODS)


class LoaderCopy:
    """A copy of the user's loader over the samples of one pass of a client.

    The copy is made without the constructor, whose arguments are unknown. Its ``dataset``, ``sampler`` and
    ``batch_sampler`` are those of the pass; all other attributes are those of the user's loader.

    Args:
        loader: The user's loader, which does not change.
        dataset: The data set of all clients.
        batches: For each batch the indices of its samples.
        generator: The source of the worker processes' seeds.
    """

    def __init__(
        self,
        loader: DataLoader[object],
        dataset: Dataset[object],
        batches: Sequence[list[int]],
        generator: torch.Generator,
    ) -> None:
        self._name = type(loader).__name__
        self._num_batches = len(batches)
        samples: list[int] = []
        positions = []
        for batch in batches:
            positions.append(list(range(len(samples), len(samples) + len(batch))))
            samples.extend(batch)
        self._batches = _Planned(positions)
        self._samples = _Planned(range(len(samples)))
        self._copy = copy.copy(loader)
        attributes = vars(self._copy)
        # Not by assignment: a loader refuses new values of these attributes.
        attributes["dataset"] = Subset(dataset, samples)
        if loader.batch_sampler is None:
            # Bulk fetching: the sampler gives lists of indices.
            attributes["sampler"] = self._batches
        else:
            attributes["sampler"] = self._samples
            attributes["batch_sampler"] = self._batches
        attributes["generator"] = generator
        # Workers of one pass cannot serve the next one, which has another data set.
        attributes["persistent_workers"] = False
        attributes["_iterator"] = None
        self._attributes = dict(attributes)

    def __iter__(self) -> Iterator[Any]:
        """Make the batches of the pass.

        Raises:
            ValueError: If they are not made of the client's samples, or are not as many as planned.
        """
        iterator = iter(self._copy)
        for number in range(self._num_batches):
            data = next(iterator, _END)
            if not (self._batches.is_used or self._samples.is_used):
                raise ValueError(
                    f"`{self._name}.__iter__` does not take its batches from `DataLoader.__iter__`, so that they would"
                    " not be those of one client. Iterate `super().__iter__()` in it, or give a plain `DataLoader` and"
                    " do its work in `collate_fn=`."
                )
            if data is _END:
                raise self._wrong_number(str(number))
            yield data
        if next(iterator, _END) is not _END:
            raise self._wrong_number("more")
        self._warn_of_lost_state()

    def _wrong_number(self, received: str) -> ValueError:
        return ValueError(
            f"`{self._name}.__iter__` must give one batch for each that `DataLoader.__iter__` gives, since the steps of"
            f" a client are planned by their number, got {received} of {self._num_batches}. Leave samples out by"
            " `torch.utils.data.Subset` instead, or add some in `collate_fn=`."
        )

    def _warn_of_lost_state(self) -> None:
        """Name the attributes that iterating has changed, because the next pass begins without the changes."""
        changed = []
        for name, value in vars(self._copy).items():
            is_private_to_torch = name in ("_iterator", "_IterableDataset_len_called")
            if not is_private_to_torch and self._attributes.get(name, _END) is not value:
                changed.append(name)
        if changed:
            names = ", ".join(f"`{name}`" for name in sorted(changed))
            rank_zero_warn(
                f"`{self._name}.__iter__` sets {names} of the loader. Every"
                " pass of a client begins with the attributes that the loader had when `fit` began, so nothing is kept"
                " from one pass to the next. Keep counters in the module, or use `trainer.current_epoch`."
            )


class _Planned:
    """The batches or samples of a pass, in the place of a sampler; it remembers whether it was used."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self.is_used = False

    def __iter__(self) -> Iterator[Any]:
        self.is_used = True
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
