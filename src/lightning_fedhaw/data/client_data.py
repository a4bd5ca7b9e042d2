"""The clients' data: one data set, and the indices of each client's samples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_fedhaw.data.class_histogram import ClassHistogram, class_histogram
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.labels import ClassLabels
from lightning_fedhaw.data.loader_settings import LoaderSettings, pass_lengths
from lightning_fedhaw.data.partitioners.partition import Partition
from lightning_fedhaw.data.samples import Samples, SwappedLabels
from lightning_fedhaw.streams import PathPart, stream


@dataclass(slots=True)  # not frozen, which would triple the time to construct one, for every batch
class Batch:
    """One batch of a client.

    Attributes:
        data: What ``training_step`` receives.
        size: Number of samples.
        index: Its number from 0: within the local epoch, or within the task where a task is counted in steps.
        last: Whether it is the last one of that local epoch or task.
        ends_task: Whether it is the last one of the task.
    """

    data: Any
    size: int
    index: int
    last: bool
    ends_task: bool = False


class ClientData:
    """All clients' training data: a data set, and the indices of each client's samples.

    Args:
        dataset: A map-style data set.
        partition: The samples of each client.
        settings: How batches are made.
        seed: The federation's seed.
        held_out: What is held out of each client's data; nothing by default.
        labels: Labels ``[samples]`` of the data set, if they are known.
        class_names: The name of each class, where labels number names.
        evaluation: The clients' own data sets for evaluation, where they have some.
        evaluation_dataset: The same samples in the same order, as they are read for evaluation. Default: as for
            training.

    Attributes:
        samples: The samples as batches are made of them. Clients that are read in another way share them.
    """

    def __init__(
        self,
        dataset: Dataset[object],
        partition: Partition,
        settings: LoaderSettings,
        *,
        seed: int,
        held_out: HoldOut | None = None,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] | None = None,
        evaluation: ClientData | None = None,
        evaluation_dataset: Dataset[object] | None = None,
    ) -> None:
        self.samples = Samples(dataset, may_be_sliced=settings.is_default)
        self.evaluation_dataset = evaluation_dataset
        self.labels = labels
        self.class_names = class_names
        self.partition = partition
        self.settings = settings
        self.seed = seed
        self.evaluation = evaluation
        self.train_indices = tuple(partition.indices)
        self.held_out_indices = tuple(samples[:0] for samples in partition.indices)
        if held_out is not None:
            self.held_out_indices = tuple(
                held_out.hold_out(partition.indices, seed=seed, dataset=dataset, labels=labels)
            )
            train_indices = []
            for samples, held_out_samples in zip(partition.indices, self.held_out_indices, strict=True):
                train_indices.append(samples[~torch.isin(samples, held_out_samples)])
            self.train_indices = tuple(train_indices)
        self._num_examples = torch.tensor([len(samples) for samples in self.train_indices])
        if settings.draws is not None:
            settings.draws.check_clients(self.train_indices)
        if settings.drop_last:
            self._check_whole_batches()

    @classmethod
    def of_sets(cls, datasets: Sequence[Dataset[object]], settings: LoaderSettings, *, seed: int) -> ClientData:
        """Make the data of clients that have a data set each.

        Args:
            datasets: One map-style data set per client.
            settings: How batches are made.
            seed: The federation's seed.
        """
        ends = list(itertools.accumulate(len(dataset) for dataset in datasets))  # type: ignore[arg-type]
        indices = tuple(torch.arange(begin, end) for begin, end in itertools.pairwise([0, *ends]))
        # Evaluation uses every sample.
        return cls(ConcatDataset(datasets), Partition(indices), replace(settings, drop_last=False), seed=seed)

    def _check_whole_batches(self) -> None:
        """Refuse clients with less than a batch of samples, since incomplete batches are left out."""
        batch_size = self.settings.batch_size
        short = [client for client in range(self.num_clients) if self.samples_per_pass(client) < batch_size]
        if short:
            # Of samples before any is held out, which is what `min_client_samples` counts.
            enough = 1 + max(len(self.partition.indices[client]) for client in short)
            remedy = f"Leave such clients out by `min_client_samples={enough}`, or set a smaller `batch_size`."
            if enough > self.partition.sizes.max():
                remedy = "Set a smaller `batch_size`."
            raise ValueError(
                f"`drop_last=True` leaves clients {short[:10]} without a batch: they have fewer than"
                f" `batch_size`={batch_size} training samples. {remedy}"
            )

    @property
    def dataset(self) -> Dataset[object]:
        """The data set of which all clients have their samples."""
        return self.samples.dataset

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.train_indices)

    @property
    def num_examples(self) -> Tensor:
        """``[N]`` int64, training examples of each client."""
        # A copy: samplers and rules, which may be the user's, receive it.
        return self._num_examples.clone()

    def append(self, num_examples: int) -> None:
        """Add a client that is elsewhere, with the last number and so many training examples."""
        begin = sum(len(samples) for samples in self.partition.indices)
        samples = torch.arange(begin, begin + num_examples)
        self.partition = replace(self.partition, indices=(*self.partition.indices, samples))
        self.train_indices = (*self.train_indices, samples)
        self.held_out_indices = (*self.held_out_indices, samples[:0])
        self._num_examples = torch.tensor([len(samples) for samples in self.train_indices])

    def subset(self, client: int, indices: Tensor, *, for_evaluation: bool = False) -> Dataset[object]:
        """Return some of a client's samples as a data set, with the labels that the client sees.

        Args:
            client: The client's number.
            indices: ``[samples]``, indices into the data set.
            for_evaluation: Whether the samples are read as for evaluation, where that is another way.
        """
        dataset = self.dataset
        if for_evaluation and self.evaluation_dataset is not None:
            dataset = self.evaluation_dataset
        if client in self.partition.label_swaps:
            dataset = SwappedLabels(dataset, self.partition.label_swaps[client])
        return Subset(dataset, indices.tolist())

    def class_histogram(self) -> ClassHistogram | None:
        """Count the samples of each client in each class; None if no classes are known."""
        if self.labels is None:
            return None
        return class_histogram(self.partition, ClassLabels(self.labels, self.class_names))

    @property
    def is_sliced(self) -> bool:
        """Whether batches are slices of tensors in memory."""
        return self.samples.tensors is not None

    def sample_hash(self) -> str:
        """Hash some samples in memory and weights, by which processes find out whether they have the same data."""
        weights: list[Tensor] = []
        if self.settings.draws is not None and self.settings.draws.weights is not None:
            weights.append(self.settings.draws.weights)
        return self.samples.hash(weights)

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors in memory, and so of the batches; ``None`` if there are several or none."""
        return self.samples.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        nbytes = self.samples.nbytes
        if self.evaluation is not None:
            nbytes += self.evaluation.nbytes
        return nbytes

    @property
    def has_held_out_data(self) -> bool:
        """Whether clients are evaluated on other data than they train on."""
        return self.evaluation is not None or any(len(samples) for samples in self.held_out_indices)

    @property
    def device_of_batches(self) -> torch.device | None:
        """The device of all batches, those for evaluation included; ``None`` if it is not known."""
        if self.evaluation is not None and self.evaluation.device != self.device:
            return None
        return self.device

    def place(self, device: torch.device | None = None, *, channels_last: bool = False) -> None:
        """Choose the device of tensors in memory and the layout of batches; the data set itself does not change.

        Args:
            device: The device to which tensors in memory are moved. Default: they are not moved.
            channels_last: Whether 4-D tensors ``[B, C, H, W]`` are laid out channels-last: tensors in memory in this
                call, other data batch by batch.
        """
        if self.evaluation is not None:
            self.evaluation.place(device, channels_last=channels_last)
        self.samples.place(device, channels_last=channels_last)

    def release(self) -> None:
        """Release copies of the data set's tensors, on any device; they are made again when they are needed."""
        self.samples.release()
        if self.evaluation is not None:
            self.evaluation.release()

    def gather(self, index: Tensor) -> list[Tensor]:
        """Take rows of the tensors in memory.

        Args:
            index: Indices into the data set, of any shape.

        Returns:
            ``[*index.shape, ...]`` for each tensor.
        """
        return self.samples.gather(index)

    def orders(
        self,
        client: int,
        round_idx: int,
        *,
        epochs: int | float | None = None,
        num_batches: int | None = None,
        limit: int | float | None = None,
    ) -> Iterator[Tensor]:
        """Draw the order of the samples in each of a client's passes of one round, which :meth:`batches` follows.

        The order is drawn from the stream named by client and round: it does not depend on which other clients train.

        Args:
            client: The client's number.
            round_idx: The round's number.
            epochs: Passes over the client's data, the last of which may be a fraction; or
            num_batches: batches in total, over as many passes as that takes.
            limit: Batches in a pass, at most: a number, or a share of the pass.

        Yields:
            ``[samples of the pass]`` int64, indices into the data set.
        """
        samples = self.train_indices[client]
        generator = stream(self.seed, "client", client, "round", round_idx, "batches")
        per_pass = self.batches_per_pass(self.samples_per_pass(client), limit)
        lengths: Iterable[int] = itertools.repeat(per_pass)
        if epochs is not None:
            lengths = pass_lengths(per_pass, epochs)
        remaining = num_batches
        for count in lengths:
            order = samples
            if self.settings.draws is not None:
                order = self.settings.draws.order(samples, generator)
            elif self.settings.shuffle:
                order = samples.index_select(0, torch.randperm(samples.numel(), generator=generator))
            if remaining is not None:
                count = min(count, remaining)
            at_most = count * self.settings.batch_size
            if at_most < order.numel():
                # With `drop_last` or a limit, a pass does not use all samples.
                order = order[:at_most]
            yield order
            if remaining is not None:
                remaining -= count
                if remaining == 0:
                    return

    def batches(
        self,
        client: int,
        round_idx: int,
        *,
        epochs: int | float | None = None,
        num_batches: int | None = None,
        limit: int | float | None = None,
    ) -> Iterator[Batch]:
        """Make a client's batches of one round; the arguments are those of :meth:`orders`."""
        batches_of_task = 0
        total = num_batches
        if epochs is not None:
            per_pass = self.batches_per_pass(self.samples_per_pass(client), limit)
            total = sum(pass_lengths(per_pass, epochs))
        orders = self.orders(client, round_idx, epochs=epochs, num_batches=num_batches, limit=limit)
        for epoch, order in enumerate(orders):
            count = self._batches_of(order)
            for index, (data, size) in enumerate(self._pass(client, order, "round", round_idx, "workers", epoch)):
                batches_of_task += 1
                ends_task = batches_of_task == total
                if num_batches is None:
                    yield Batch(data, size, index, last=index + 1 == count, ends_task=ends_task)
                else:
                    yield Batch(data, size, batches_of_task - 1, last=ends_task, ends_task=ends_task)

    def for_evaluation(
        self, collate_fn: Callable[[list[Any]], Any] | None, batch_size: int | None = None
    ) -> ClientData:
        """Return the same clients as they are read for evaluation.

        Args:
            collate_fn: The function by which validation makes batches; ``None`` for that of training.
            batch_size: Samples in a batch; ``None`` for those of training.
        """
        reader = copy.copy(self)
        if self.evaluation is not None:
            reader.evaluation = self.evaluation.for_evaluation(collate_fn, batch_size)
            return reader
        collate_fn = collate_fn or self.settings.collate_fn
        reader.settings = replace(
            self.settings, collate_fn=collate_fn, batch_size=batch_size or self.settings.batch_size
        )
        if self.evaluation_dataset is None and collate_fn is self.settings.collate_fn:
            return reader
        dataset = self.dataset
        if self.evaluation_dataset is not None:
            dataset = self.evaluation_dataset
        reader.samples = Samples(dataset, may_be_sliced=reader.settings.is_default)
        reader.samples.place(None, channels_last=self.samples.channels_last)
        return reader

    def _evaluation_samples(self, client: int) -> Tensor:
        """Return the indices of a client's held-out samples, or of its training samples if none are held out."""
        samples = self.held_out_indices[client]
        if len(samples):
            return samples
        return self.train_indices[client]

    @property
    def num_evaluation_examples(self) -> Tensor:
        """``[N]`` int64, the samples of each client from which those of :meth:`evaluation_batches` are drawn."""
        if self.evaluation is not None:
            return self.evaluation.num_evaluation_examples
        return torch.tensor([len(self._evaluation_samples(client)) for client in range(self.num_clients)])

    def evaluation_batches(self, client: int, at_most: int) -> Iterator[Batch]:
        """Make batches to evaluate a model on a client, in the order of the data set.

        They are made of its own data set for evaluation; without one of its held-out samples, or of its training
        samples if none are held out.

        Args:
            client: The client's number.
            at_most: The largest number of samples. If there are more, this many are drawn; the draw depends on the
                client alone.
        """
        if self.evaluation is not None:
            yield from self.evaluation.evaluation_batches(client, at_most)
            return
        samples = self._evaluation_samples(client)
        if len(samples) > at_most:
            generator = stream(self.seed, "client", client, "evaluation")
            chosen = torch.randperm(len(samples), generator=generator)[:at_most]
            samples = samples[chosen.sort().values]
        count = self._batches_of(samples)
        for index, (data, size) in enumerate(self._pass(client, samples, "evaluation", "workers")):
            yield Batch(data, size, index, last=index + 1 == count)

    def full_pass(
        self, client: int, round_idx: int, *, held_out: bool = False, limit: int | float | None = None
    ) -> Iterator[Batch]:
        """Make batches of all samples of a client, in the order of the data set.

        Args:
            client: The client's number.
            round_idx: The round's number, from whose streams worker processes draw.
            held_out: Whether of its held-out samples or own evaluation set, instead of its training samples.
            limit: Batches at most, as in :meth:`orders`.
        """
        if held_out and self.evaluation is not None:
            yield from self.evaluation.full_pass(client, round_idx, limit=limit)
            return
        samples = self.train_indices[client]
        if held_out:
            samples = self.held_out_indices[client]
        # As a pass of training ends; a client with less than a batch of held-out samples has one incomplete batch.
        whole_batches = max(1, self.batches_per_pass(len(samples), limit))
        samples = samples[: whole_batches * self.settings.batch_size]
        count = self._batches_of(samples)
        for index, (data, size) in enumerate(self._pass(client, samples, "round", round_idx, "probe workers")):
            yield Batch(data, size, index, last=index + 1 == count)

    def typical_pass(self, client: int, round_idx: int, *, limit: int | float | None = None) -> Iterator[Batch]:
        """Make batches whose mean loss is that of a client's training: every call of a round makes the same ones.

        They are those of :meth:`full_pass`, whose arguments these are. Where training leaves samples out, or draws some
        more often, they are those of the first pass of the round, so that no sample is left out for good.
        """
        if limit is None and self.settings.draws is None and not self.settings.drop_last:
            yield from self.full_pass(client, round_idx)
            return
        (order,) = self.orders(client, round_idx, epochs=1, limit=limit)
        count = self._batches_of(order)
        for index, (data, size) in enumerate(self._pass(client, order, "round", round_idx, "probe workers")):
            yield Batch(data, size, index, last=index + 1 == count)

    def _batches_of(self, order: Tensor) -> int:
        """Count the batches that :meth:`_pass` makes of samples; it uses all of them, so the last may be incomplete."""
        return -(-len(order) // self.settings.batch_size)

    def samples_per_pass(self, client: int) -> int:
        """Count the samples of a client's pass: its training samples, or the draws that a sampler makes of them."""
        samples = self.train_indices[client]
        if self.settings.draws is None:
            return len(samples)
        return self.settings.draws.count(samples)

    def batches_per_pass(self, samples: int, limit: int | float | None = None) -> int:
        """Count the batches of a pass over so many samples, with a limit as in :meth:`orders`."""
        num_batches = self.settings.num_batches(samples)
        if limit is None:
            return num_batches
        if isinstance(limit, int):
            return min(num_batches, limit)
        # A small share of a small client's batches may round down to none, and every client has to train.
        return max(1, int(num_batches * limit))

    def _pass(self, client: int, order: Tensor, *workers: PathPart) -> Iterator[tuple[Any, int]]:
        """Make batches of samples in the given order, each with its size.

        Args:
            client: The client's number.
            order: ``[samples]``, indices into the data set.
            workers: The name, within the client's streams, of the one from which worker processes draw.
        """
        swap = self.partition.label_swaps.get(client)
        if self.is_sliced:
            return self.samples.slices(order, swap, self.settings)
        return self.samples.fetched(order, swap, self.settings, stream(self.seed, "client", client, *workers))
