"""The clients' data: one data set, seen by each client through its own indices."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_fedhaw.data.partitioners.partition import Partition, swap_labels
from lightning_fedhaw.streams import PathPart, stream

_HASHED_ROWS = 1000
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class LoaderSettings:
    """How a client turns its samples into batches: what a ``DataLoader`` says, without its data set.

    Attributes:
        batch_size: Samples in a batch.
        shuffle: Whether a client's samples are shuffled anew in every local epoch.
        drop_last: Whether an incomplete last batch of a local epoch is left out.
        collate_fn: Makes a batch from a list of samples.
        num_workers: Worker processes for data that has to be fetched sample by sample; started for every client's pass.
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
    multiprocessing_context: Any = None

    @classmethod
    def of(cls, loader: Any) -> LoaderSettings:
        """The settings of a training data loader.

        Raises:
            TypeError: If it is not a single ``DataLoader`` over a map-style data set.
            ValueError: If it draws samples in a way that clients could not keep.
        """
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
                f" iterable {type(loader.dataset).__name__}, whose samples cannot be dealt to clients. Read it into a"
                " list or a TensorDataset first."
            )
        if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
            raise ValueError(
                "`train_dataloaders` must make its batches by `batch_size`, got the custom `batch_sampler`"
                f" {type(loader.batch_sampler).__name__}: every client draws its own batches. Give `batch_size=`."
            )
        if type(loader.sampler) not in (RandomSampler, SequentialSampler) or (
            isinstance(loader.sampler, RandomSampler)
            and (loader.sampler.replacement or loader.sampler.num_samples != len(cast(Sized, loader.dataset)))
        ):
            raise ValueError(
                f"`train_dataloaders` must sample with `shuffle=True` or `False`, got the custom sampler"
                f" {type(loader.sampler).__name__}: every client draws its own samples. Remove `sampler=`; unequal"
                " clients come from the partitioner."
            )
        return cls(
            batch_size=loader.batch_size,
            shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
            timeout=loader.timeout,
            multiprocessing_context=loader.multiprocessing_context,
        )


@dataclass(slots=True)  # not frozen, which would triple the cost of making one
class Batch:
    """One batch of a client.

    Attributes:
        data: What ``training_step`` gets.
        size: Samples in it.
        index: Its number from 0: within the local epoch, or within the visit where a visit is counted in steps.
        last: Whether it is the last of those.
    """

    data: Any
    size: int
    index: int
    last: bool


class ClientData:
    """All clients' training data: a data set, and the indices that each client owns.

    Data that is tensors in memory (a ``TensorDataset``, also under ``Subset`` or ``ConcatDataset``) is sliced; anything
    else is fetched and collated sample by sample.

    Args:
        dataset: A map-style data set.
        partition: Who owns which sample.
        settings: How batches are made.
        seed: The federation's seed.
        held_out: Share of each client's samples that is kept out of training.
        labels: Labels ``[samples]`` of the data set, where they are known.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        partition: Partition,
        settings: LoaderSettings,
        *,
        seed: int,
        held_out: float = 0.0,
        labels: Tensor | None = None,
    ) -> None:
        self.dataset = dataset
        self.labels = labels
        self.partition = partition
        self.settings = settings
        self.seed = seed
        self._channels_last = False
        self.train_indices, self.held_out_indices = _split_each(partition.indices, held_out, seed)
        if settings.drop_last:
            short = [k for k, own in enumerate(self.train_indices) if len(own) < settings.batch_size]
            if short:
                raise ValueError(
                    f"`drop_last=True` leaves clients {short[:10]} without a batch: they own fewer than"
                    f" `batch_size`={settings.batch_size} samples. Set `drop_last=False` or a smaller `batch_size`."
                )

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...] | None:
        """The tensors in memory, as they are placed; ``None`` where samples are fetched one by one."""
        return tensors_of(self.dataset) if self.settings.collate_fn is default_collate else None

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.train_indices)

    @property
    def num_examples(self) -> Tensor:
        """``[N]`` int64, training examples of each client."""
        return torch.tensor([len(own) for own in self.train_indices])

    def label_counts(self) -> Tensor | None:
        """``[N, C]`` int64, samples of each client in each class; None where no class numbers are known."""
        is_classes = self.labels is not None and self.labels.min() >= 0 and self.labels.max() < _MOST_CLASSES
        return self.partition.histogram(self.labels) if self.labels is not None and is_classes else None

    @property
    def is_sliced(self) -> bool:
        """Whether batches are slices of tensors in memory."""
        return self._tensors is not None

    def sample_hash(self) -> str:
        """A hash of some samples in memory, by which processes see whether they were given the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self._tensors or ():
            rows = tensor[:: max(1, len(tensor) // _HASHED_ROWS)].contiguous().cpu()
            digest.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device | None:
        """Where batches come from: the device of the tensors in memory, ``None`` where there are several or none."""
        devices = {tensor.device for tensor in self._tensors or ()}
        return devices.pop() if len(devices) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors or ())

    def place(self, device: torch.device | None = None, *, channels_last: bool = False) -> None:
        """Choose where tensors in memory are kept and how batches are laid out; the data set itself stays as it is.

        Args:
            device: Where tensors in memory are moved; they stay where they are without it.
            channels_last: Whether 4-D tensors ``[B, C, H, W]`` are laid out channels-last: tensors in memory once and
                for all, other data batch by batch.
        """
        tensors = self._tensors or ()
        if channels_last != self._channels_last:
            # Stored as [samples, H, W, C], because a gather of rows keeps no other layout than the plain one.
            order = (0, 2, 3, 1) if channels_last else (0, 3, 1, 2)
            tensors = tuple(t.permute(order).contiguous() if t.ndim == 4 else t for t in tensors)
        self._channels_last = channels_last
        if self._tensors is not None:
            self._tensors = tuple(t if device is None else t.to(device) for t in tensors)

    def release(self) -> None:
        """Let go of copies of the data set's tensors, wherever they are; what is asked for again is made again."""
        vars(self).pop("_tensors", None)
        self._channels_last = False

    def gather(self, index: Tensor) -> list[Tensor]:
        """The rows of the tensors in memory, ``[*index.shape, ...]`` each."""
        assert self._tensors is not None
        flat = index.reshape(-1)
        if self.device is not None and self.device.type == "cuda":
            # Out of page-locked memory, so that the host need not wait until the device has come this far.
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        rows = [t.index_select(0, flat.to(t.device)).view(*index.shape, *t.shape[1:]) for t in self._tensors]
        if self._channels_last:
            rows = [row.movedim(-1, -3) if t.ndim == 4 else row for row, t in zip(rows, self._tensors, strict=True)]
        return rows

    def orders(
        self,
        client: int,
        round_: int,
        *,
        epochs: int | None = None,
        num_batches: int | None = None,
        limit: int | float | None = None,
    ) -> Iterator[Tensor]:
        """The samples of each of a client's passes of one round, in the order that :meth:`batches` takes them in.

        The order is drawn from the stream named by client and round: it does not depend on who else trains.

        Args:
            client: The client's number.
            round_: The round's number.
            epochs: Passes over the client's data; or
            num_batches: batches in all, going on into further passes.
            limit: Batches a pass at most: a number, or a share of the pass.

        Yields:
            ``[samples of the pass]`` int64, indices into the data set.
        """
        own = self.train_indices[client]
        generator = stream(self.seed, "client", client, "round", round_, "batches")
        per_pass, left = self.batches_per_pass(len(own), limit), num_batches
        shuffle, size = self.settings.shuffle, self.settings.batch_size
        for _ in itertools.count() if epochs is None else range(epochs):
            shuffled = own.index_select(0, torch.randperm(len(own), generator=generator)) if shuffle else own
            count = per_pass if left is None else min(per_pass, left)
            yield shuffled[: count * size] if count * size < len(own) else shuffled
            if left is not None:
                left -= count
                if not left:
                    return

    def batches(
        self,
        client: int,
        round_: int,
        *,
        epochs: int | None = None,
        num_batches: int | None = None,
        limit: int | float | None = None,
    ) -> Iterator[Batch]:
        """A client's batches of one round; the arguments are those of :meth:`orders`."""
        done = 0
        orders = self.orders(client, round_, epochs=epochs, num_batches=num_batches, limit=limit)
        for epoch, order in enumerate(orders):
            count = -(-len(order) // self.settings.batch_size)
            for index, (data, size) in enumerate(self._pass(client, order, "round", round_, "workers", epoch)):
                if num_batches is None:
                    yield Batch(data, size, index, last=index + 1 == count)
                else:
                    done += 1
                    yield Batch(data, size, done - 1, last=done == num_batches)

    def evaluation_batches(self, client: int, at_most: int) -> Iterator[Batch]:
        """Batches for evaluating a model on a client: its held-out samples, else its training samples, in order.

        Args:
            client: The client's number.
            at_most: Samples at most; more are thinned evenly by a draw that depends on the client alone.
        """
        own = self.held_out_indices[client]
        own = own if len(own) else self.train_indices[client]
        if len(own) > at_most:
            chosen = torch.randperm(len(own), generator=stream(self.seed, "client", client, "evaluation"))[:at_most]
            own = own[chosen.sort().values]
        count = -(-len(own) // self.settings.batch_size)
        for index, (data, size) in enumerate(self._pass(client, own, "evaluation", "workers")):
            yield Batch(data, size, index, last=index + 1 == count)

    def batches_per_pass(self, samples: int, limit: int | float | None = None) -> int:
        """Batches of a pass over so many samples, with a limit as in :meth:`orders`."""
        size = self.settings.batch_size
        full = samples // size if self.settings.drop_last else -(-samples // size)
        if limit is None:
            return full
        return min(full, limit) if isinstance(limit, int) else max(1, int(full * limit))

    def _pass(self, client: int, order: Tensor, *workers: PathPart) -> Iterator[tuple[Any, int]]:
        """Batches of samples in the given order, with the size of each.

        Args:
            client: The client's number.
            order: ``[samples]``, indices into the data set.
            workers: The name of the client's stream that worker processes draw from.
        """
        size = self.settings.batch_size
        swap = self.partition.label_swaps.get(client)
        if self._tensors is not None:
            # One gather a pass; batches are views of it.
            gathered = self.gather(order)
            if swap is not None:
                gathered[1] = swap_labels(gathered[1], swap)
            if self.settings.pin_memory and torch.cuda.is_available():
                gathered = [t.pin_memory() if t.device.type == "cpu" else t for t in gathered]
            for views in zip(*(torch.split(tensor, size) for tensor in gathered), strict=True):
                yield list(views), len(views[0])
            return
        chunks = [chunk.tolist() for chunk in torch.split(order, size)]
        dataset = self.dataset if swap is None else _SwappedLabels(self.dataset, swap)
        loader = DataLoader(
            dataset,
            batch_sampler=cast(Any, chunks),
            collate_fn=self.settings.collate_fn,
            num_workers=self.settings.num_workers,
            pin_memory=self.settings.pin_memory,
            worker_init_fn=self.settings.worker_init_fn,
            prefetch_factor=self.settings.prefetch_factor,
            timeout=self.settings.timeout,
            multiprocessing_context=self.settings.multiprocessing_context,
            generator=stream(self.seed, "client", client, *workers),
        )
        for data, chunk in zip(loader, chunks, strict=True):
            yield apply_to_collection(data, Tensor, _channels_last) if self._channels_last else data, len(chunk)


class _SwappedLabels(Dataset[Any]):
    """A data set seen by a client that takes two labels for each other."""

    def __init__(self, dataset: Dataset[Any], swap: tuple[int, int]) -> None:
        self.dataset, self.swap = dataset, swap

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        label = swap_labels(torch.as_tensor(sample[1]), self.swap)
        return (sample[0], label if isinstance(sample[1], Tensor) else label.item(), *sample[2:])


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def tensors_of(dataset: Dataset[Any]) -> tuple[Tensor, ...] | None:
    """The tensors behind a data set whose samples are their rows; ``None`` if it is something else."""
    if type(dataset) is TensorDataset:
        return dataset.tensors
    if type(dataset) is Subset:
        inner = tensors_of(dataset.dataset)
        if inner is None:
            return None
        index = torch.as_tensor(dataset.indices, dtype=torch.int64)
        return tuple(tensor[index.to(tensor.device)] for tensor in inner)
    if type(dataset) is ConcatDataset:
        parts = [tensors_of(part) for part in dataset.datasets]
        if any(part is None for part in parts) or len({_signature(part) for part in parts if part}) != 1:
            return None
        return tuple(torch.cat(columns) for columns in zip(*cast(list[tuple[Tensor, ...]], parts), strict=True))
    return None


def _signature(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape[1:], t.dtype, t.device) for t in tensors)


def _split_each(indices: Sequence[Tensor], share: float, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Each client's training and held-out indices."""
    if share == 0.0:
        return tuple(indices), tuple(own[:0] for own in indices)
    train, held_out = [], []
    for client, own in enumerate(indices):
        # A client with one sample keeps it for training: without it there would be no client.
        count = min(max(1, round(share * len(own))), len(own) - 1)
        order = torch.randperm(len(own), generator=stream(seed, "client", client, "held out"))
        held_out.append(own[order[:count].sort().values])
        train.append(own[order[count:].sort().values])
    return tuple(train), tuple(held_out)
