"""How clients make batches of their samples: the settings of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from math import ceil
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
    Subset,
    default_collate,
    default_convert,
)

from lightning_fedhaw.data.loader_copy import LoaderCopy, iterates_by_itself
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.sampling import Draws, Sampling


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
        draws: Random draws that are more than a shuffle; None if a pass visits every sample once.
        bulk: Whether the data set is given the list of a batch's indices at once (``batch_size=None`` with a sampler of
            batches); then ``collate_fn`` converts what it returns.
        template: The user's loader, if its class makes batches in code of its own: clients use copies of it.
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
    draws: Draws | None = None
    bulk: bool = False
    template: DataLoader[object] | None = None

    @classmethod
    def of(cls, loader: object) -> LoaderSettings:
        """Read the settings of a training data loader.

        Raises:
            TypeError: If it is not a single ``DataLoader`` over a map-style data set.
            ValueError: If it has a custom sampler or batch sampler: a client draws from its own samples only.
        """
        checked = _map_style_loader(loader)
        batches = _batches_of(checked)
        sampling = _sampling_of(checked)
        template = None
        if iterates_by_itself(checked):
            template = checked
        return cls(
            batch_size=batches.batch_size,
            shuffle=sampling.shuffle,
            drop_last=batches.drop_last,
            collate_fn=checked.collate_fn,
            num_workers=checked.num_workers,
            pin_memory=checked.pin_memory,
            worker_init_fn=checked.worker_init_fn,
            prefetch_factor=checked.prefetch_factor,
            timeout=checked.timeout,
            multiprocessing_context=checked.multiprocessing_context,
            draws=sampling.draws,
            bulk=checked.batch_sampler is None,
            template=template,
        )

    @property
    def is_default(self) -> bool:
        """Whether batches of tensors in memory are slices of them, because nothing else is done to them."""
        if self.template is not None:
            return False
        if self.bulk:
            return self.collate_fn is default_convert
        return self.collate_fn is default_collate

    @property
    def collate_samples(self) -> Callable[[list[Any]], Any]:
        """The function that makes a batch of single samples, such as those of a server's proxy set."""
        if self.bulk:
            # The loader's own function converts whole batches.
            return default_collate
        return self.collate_fn

    def num_batches(self, samples: int) -> int:
        """Count the batches of a pass over so many samples."""
        if self.drop_last:
            return samples // self.batch_size
        # Rounded up: the last batch may be incomplete.
        return -(-samples // self.batch_size)

    def loader(
        self, dataset: Dataset[object], batches: list[list[int]], generator: torch.Generator
    ) -> DataLoader[object] | LoaderCopy:
        """Make a data loader for batches whose samples are drawn already.

        Args:
            dataset: A map-style data set.
            batches: For each batch the indices of its samples.
            generator: The source of the worker processes' seeds.
        """
        if self.template is not None:
            return LoaderCopy(self.template, dataset, batches, generator)
        # Any iterable of lists of indices serves; torch's annotation asks for its own class.
        batch_sampler = cast(Sampler[list[int]], batches)
        if self.bulk:
            return self._over(dataset, generator, batch_size=None, sampler=batch_sampler)
        return self._over(dataset, generator, batch_sampler=batch_sampler)

    def central_loader(self, dataset: Dataset[object]) -> DataLoader[object]:
        """Make a loader of all training data with these settings; not for a loader with a template."""
        assert self.template is None
        samples: Sampler[int]
        if self.draws is not None:
            samples = self.draws.sampler(cast(Sized, dataset))
        elif self.shuffle:
            samples = RandomSampler(cast(Sized, dataset))
        else:
            samples = SequentialSampler(cast(Sized, dataset))
        if self.bulk:
            batches = BatchSampler(samples, self.batch_size, self.drop_last)
            return self._over(dataset, None, batch_size=None, sampler=batches)
        return self._over(dataset, None, batch_size=self.batch_size, sampler=samples, drop_last=self.drop_last)

    def _over(
        self, dataset: Dataset[object], generator: torch.Generator | None, **sampling: object
    ) -> DataLoader[object]:
        """Make a data loader over a data set; ``sampling`` are the loader's arguments that say what is in a batch."""
        return DataLoader(
            dataset,
            **cast(Any, sampling),
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            generator=generator,
        )


def training_samples(
    loader: DataLoader[object], labels: object, partitioner: Partitioner | None
) -> tuple[Dataset[object], object]:
    """Return the data set that is split over the clients, and its labels.

    Args:
        loader: A training loader that :meth:`LoaderSettings.of` takes.
        labels: The argument ``labels``.
        partitioner: The scheme of the split, if it is known.

    Returns:
        The loader's data set, or the ``Subset`` of it to which the loader's sampler is restricted; and the labels, of
        the subset's samples where they were those of all samples.

    Raises:
        ValueError: If the scheme lists samples, whose numbers would be other ones in the subset.
    """
    indices = _sampling_of(loader).indices
    if indices is None:
        return loader.dataset, labels
    num_total = len(cast(Sized, loader.dataset))
    name = type(_sampler_of(loader)).__name__
    if partitioner is not None and partitioner.num_clients is not None:
        raise ValueError(
            f"`partitioner`={partitioner!r} lists the samples of each client, and the loader's {name} visits"
            f" {len(indices)} of {num_total} samples only. Give the loader `torch.utils.data.Subset(dataset, indices)`"
            " with `shuffle=True` instead of the sampler, and the partitioner the samples by their place in the subset."
        )
    is_of_all_samples = isinstance(labels, Sized) and len(labels) == num_total
    if is_of_all_samples and len(indices) != num_total:
        chosen = cast(Any, labels)
        # One by one: labels may be a list, an array, a tensor or a column.
        values = list(chosen)
        labels = [values[index] for index in indices]
    return Subset(loader.dataset, indices), labels


def _map_style_loader(loader: object) -> DataLoader[object]:
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


def _batches_of(loader: DataLoader[object]) -> BatchSampler:
    """Return the batch sampler; refuse a custom one, since every client draws its own batches.

    It is that of ``batch_size=``, or was given as ``batch_sampler=``, or with ``batch_size=None`` as ``sampler=``.
    """
    batches = loader.batch_sampler
    if batches is None:
        batches = loader.sampler
    is_plain = isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__
    if is_plain:
        return cast(BatchSampler, batches)
    if loader.batch_sampler is None:
        raise ValueError(
            "`train_dataloaders` has `batch_size=None` and a data set whose items are whole batches, which cannot be"
            " assigned to clients sample by sample. Give a data set of single samples and `batch_size=`; to fetch many"
            " samples at once, give `sampler=BatchSampler(RandomSampler(dataset), batch_size, drop_last)`."
        )
    raise ValueError(
        "`train_dataloaders` must make its batches by `batch_size` or a `torch.utils.data.BatchSampler`, got the custom"
        f" `batch_sampler` {type(batches).__name__}, which draws from all samples and not from those of one client."
        " Give `batch_size=` and `shuffle=`; to draw some samples more often, as class-balanced samplers do, give"
        " `sampler=WeightedRandomSampler(weights, num_samples=len(weights))` with one weight per sample."
    )


def _sampler_of(loader: DataLoader[object]) -> Sampler[object] | Sequence[int]:
    """Return the sampler of single samples."""
    return cast("Sampler[object]", _batches_of(loader).sampler)


def _sampling_of(loader: DataLoader[object]) -> Sampling:
    """Read the sampler of single samples."""
    return Sampling.of(cast("Sampler[object]", _sampler_of(loader)), len(cast(Sized, loader.dataset)))


def pass_lengths(per_pass: int, epochs: int | float) -> list[int]:
    """Count the batches of each pass; the last pass of a fractional number of epochs is cut short, rounded up.

    Args:
        per_pass: Batches of a whole pass.
        epochs: The number of passes.

    Example:
        >>> pass_lengths(10, 2), pass_lengths(10, 1.25), pass_lengths(2, 0.25)
        ([10, 10], [10, 3], [1])
    """
    num_whole = int(epochs)
    lengths = [per_pass] * num_whole
    # Less a little, because 1.1 - 1 is a little more than 0.1, and 0.1 of 10 batches is one.
    batches = ceil((epochs - num_whole) * per_pass - 1e-9)
    if batches:
        lengths.append(batches)
    return lengths
