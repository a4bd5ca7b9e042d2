"""How clients make batches of their samples: the settings of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)


@dataclass(frozen=True)
class LoaderSettings:
    """How a client makes batches of its samples: the settings of a ``DataLoader``, without its data set.

    Attributes:
        batch_size: Samples in a batch.
        shuffle: Whether a client's samples are shuffled again in every local epoch.
        drop_last: Whether an incomplete last batch of a local epoch is left out.
        collate_fn: Makes a batch from a list of samples.
        num_workers: Worker processes for data that has to be fetched sample by sample; they are started again for every
            pass over a client's samples.
        pin_memory: Whether batches are put into page-locked memory.
        worker_init_fn: Called in each worker.
        prefetch_factor: Batches a worker fetches ahead.
        timeout: Seconds to wait for a worker.
        multiprocessing_context: How workers are started.
    """

    batch_size: int = 32
    shuffle: bool = True
    drop_last: bool = False
    collate_fn: Callable[[list[Any]], Any] = default_collate
    num_workers: int = 0
    pin_memory: bool = False
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    timeout: float = 0
    multiprocessing_context: BaseContext | str | None = None

    @classmethod
    def of(cls, loader: object) -> LoaderSettings:
        """Read the settings of a training data loader.

        Raises:
            TypeError: If it is not a single ``DataLoader`` over a map-style data set.
            ValueError: If it has a custom sampler or batch sampler: a client draws from its own samples only.
        """
        checked = _map_style_loader(loader)
        batch_size = _batch_size(checked)
        _check_sampler(checked)
        return cls(
            batch_size=batch_size,
            shuffle=isinstance(checked.sampler, RandomSampler),
            drop_last=checked.drop_last,
            collate_fn=checked.collate_fn,
            num_workers=checked.num_workers,
            pin_memory=checked.pin_memory,
            worker_init_fn=checked.worker_init_fn,
            prefetch_factor=checked.prefetch_factor,
            timeout=checked.timeout,
            multiprocessing_context=checked.multiprocessing_context,
        )

    def num_batches(self, samples: int) -> int:
        """Count the batches of a pass over so many samples."""
        if self.drop_last:
            return samples // self.batch_size
        return -(-samples // self.batch_size)  # rounded up: the last batch may be incomplete

    def loader(self, dataset: Dataset[Any], batches: list[list[int]], generator: torch.Generator) -> DataLoader[Any]:
        """Make a data loader for batches whose samples are drawn already.

        Args:
            dataset: A map-style data set.
            batches: For each batch the indices of its samples.
            generator: The source of the worker processes' seeds.
        """
        return DataLoader(
            dataset,
            # Any iterable of lists of indices serves; torch's annotation asks for its own class.
            batch_sampler=cast(Sampler[list[int]], batches),
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            generator=generator,
        )


def _map_style_loader(loader: object) -> DataLoader[Any]:
    """Refuse anything but one data loader whose samples can be assigned to clients."""
    if isinstance(loader, (list, tuple, dict)) or type(loader).__name__ == "CombinedLoader":
        raise TypeError(
            f"`train_dataloaders` must be one DataLoader, got {type(loader).__name__} of several: a client has one"
            " training set. Combine the data sets (`torch.utils.data.ConcatDataset`) and give one loader."
        )
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"`train_dataloaders` must be a `torch.utils.data.DataLoader`, got {type(loader).__name__}: its data"
            " set is split over the clients. Wrap the data set in a DataLoader, or use `FederatedDataModule`."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        raise TypeError(
            f"`train_dataloaders` must be over a map-style data set (with `__getitem__` and `__len__`), got the"
            f" iterable {type(loader.dataset).__name__}, whose samples cannot be assigned to clients. Read it into a"
            " list or a TensorDataset first."
        )
    return loader


def _batch_size(loader: DataLoader[Any]) -> int:
    """Return the batch size; refuse a custom batch sampler, since every client draws its own batches."""
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            "`train_dataloaders` must make its batches by `batch_size`, got the custom `batch_sampler`"
            f" {type(loader.batch_sampler).__name__}: every client draws its own batches. Give `batch_size=`."
        )
    return loader.batch_size


def _check_sampler(loader: DataLoader[Any]) -> None:
    """Refuse any sampler that does not visit all samples once, in order or shuffled."""
    sampler = loader.sampler
    is_plain = type(sampler) in (RandomSampler, SequentialSampler)
    if is_plain and isinstance(sampler, RandomSampler):
        # It can also draw with replacement, or only some of the samples.
        is_plain = not sampler.replacement and sampler.num_samples == len(cast(Sized, loader.dataset))
    if not is_plain:
        raise ValueError(
            f"`train_dataloaders` must sample with `shuffle=True` or `False`, got the custom sampler"
            f" {type(sampler).__name__}: every client draws its own samples. Remove `sampler=`; unequal"
            " clients come from the partitioner."
        )
