"""The samples of a data set as batches are made of them: slices of tensors in memory, or fetched one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw.data.loader_settings import LoaderSettings
from lightning_fedhaw.data.partitioners.partition import swap_labels
from lightning_fedhaw.data.tensors import tensors_of

_HASHED_ROWS = 1000
"""About how many rows of each tensor are hashed, at most: enough to distinguish two data sets."""

ClassSwap = tuple[int, int]
"""Two classes that are swapped in a client's labels."""


class Samples:
    """The samples of a data set, with the device and the layout in which batches get them.

    Data that is tensors in memory (a ``TensorDataset``, also under ``Subset`` or ``ConcatDataset``) is sliced; anything
    else is fetched and collated sample by sample.

    Args:
        dataset: A map-style data set.
        may_be_sliced: Whether batches may be slices. A custom collate function may make anything of a list of samples,
            so it has to receive such a list.
    """

    def __init__(self, dataset: Dataset[object], *, may_be_sliced: bool) -> None:
        self.dataset = dataset
        self._may_be_sliced = may_be_sliced
        self.channels_last = False

    @cached_property
    def tensors(self) -> tuple[Tensor, ...] | None:
        """The tensors in memory, on the device and in the layout of :meth:`place`; ``None`` if samples are fetched."""
        if not self._may_be_sliced:
            return None
        return tensors_of(self.dataset)

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors in memory, and so of the batches; ``None`` if there are several or none."""
        devices = {tensor.device for tensor in self.tensors or ()}
        return devices.pop() if len(devices) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors or ())

    def hash(self, further: Sequence[Tensor]) -> str:
        """Hash some of the samples in memory.

        Args:
            further: Tensors that are hashed as well, some rows of each.
        """
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (*(self.tensors or ()), *further):
            step = max(1, len(tensor) // _HASHED_ROWS)
            rows = tensor[::step].cpu()
            if self.channels_last and rows.ndim == 4:
                rows = rows.movedim(-1, 1)
            rows = rows.contiguous()
            digest.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------------ device and layout

    def place(self, device: torch.device | None, *, channels_last: bool) -> None:
        """Choose the device of tensors in memory and the layout of batches; the data set itself does not change.

        Args:
            device: The device to which tensors in memory are moved; ``None`` to leave them where they are.
            channels_last: Whether 4-D tensors ``[B, C, H, W]`` are laid out channels-last: tensors in memory in this
                call, other data batch by batch.
        """
        placed = None
        if self.tensors is not None:
            placed = tuple(self._placed(tensor, device, channels_last) for tensor in self.tensors)
        # Both are set at the end: if memory runs out above, nothing has changed.
        self.tensors = placed
        self.channels_last = channels_last

    def _placed(self, tensor: Tensor, device: torch.device | None, channels_last: bool) -> Tensor:
        """Move a tensor in memory to a device and into a layout."""
        if channels_last != self.channels_last and tensor.ndim == 4:
            # Stored as [samples, H, W, C], because a gather of rows keeps the contiguous layout only.
            axes = (0, 2, 3, 1) if channels_last else (0, 3, 1, 2)
            tensor = tensor.permute(axes).contiguous()
        if device is not None:
            tensor = tensor.to(device)
        return tensor

    def release(self) -> None:
        """Release copies of the data set's tensors, on any device; they are made again when they are needed."""
        # The value of the `cached_property`: its next use reads the data set again.
        vars(self).pop("tensors", None)
        self.channels_last = False

    # ------------------------------------------------------------------ batches

    def gather(self, index: Tensor) -> list[Tensor]:
        """Take rows of the tensors in memory.

        Args:
            index: Indices into the data set, of any shape.

        Returns:
            ``[*index.shape, ...]`` for each tensor.
        """
        assert self.tensors is not None
        flat = index.reshape(-1)
        device = self.device
        if device is not None and device.type == "cuda":
            # From page-locked memory the copy is asynchronous: the host does not wait for the device's earlier work.
            flat = flat.pin_memory().to(device, non_blocking=True)
        gathered = []
        for tensor in self.tensors:
            rows = tensor.index_select(0, flat.to(tensor.device)).view(*index.shape, *tensor.shape[1:])
            if self.channels_last and tensor.ndim == 4:
                rows = rows.movedim(-1, -3)  # [..., C, H, W] for the model, in memory as [..., H, W, C]
            gathered.append(rows)
        return gathered

    def slices(self, order: Tensor, swap: ClassSwap | None, settings: LoaderSettings) -> Iterator[tuple[Any, int]]:
        """Make batches as slices of the tensors in memory, each with its size.

        Args:
            order: ``[samples]``, indices into the data set.
            swap: The classes that are swapped in the labels.
            settings: How batches are made.
        """
        # One gather for the whole pass, of which batches are views, is faster than one for each batch.
        gathered = self.gather(order)
        if swap is not None:
            gathered[1] = swap_labels(gathered[1], swap)
        if settings.pin_memory and torch.cuda.is_available():
            gathered = [_pinned(tensor) for tensor in gathered]
        columns = [torch.split(tensor, settings.batch_size) for tensor in gathered]
        for views in zip(*columns, strict=True):
            yield list(views), len(views[0])

    def fetched(
        self, order: Tensor, swap: ClassSwap | None, settings: LoaderSettings, generator: torch.Generator
    ) -> Iterator[tuple[Any, int]]:
        """Fetch and collate batches sample by sample, each with its size.

        Args:
            order: ``[samples]``, indices into the data set.
            swap: The classes that are swapped in the labels.
            settings: How batches are made.
            generator: The source of the worker processes' seeds.
        """
        dataset = self.dataset
        if swap is not None:
            dataset = SwappedLabels(dataset, swap)
        chunks = [chunk.tolist() for chunk in torch.split(order, settings.batch_size)]
        loader = settings.loader(dataset, chunks, generator)
        for data, chunk in zip(loader, chunks, strict=True):
            if self.channels_last:
                data = apply_to_collection(data, Tensor, _channels_last)
            yield data, len(chunk)


class SwappedLabels(Dataset[object]):
    """The data set of a client in whose labels two classes are swapped.

    Args:
        dataset: The data set, whose samples have their label in the second place.
        swap: The two classes.
    """

    def __init__(self, dataset: Dataset[Any], swap: ClassSwap) -> None:
        self.dataset = dataset
        self.swap = swap

    def __getitem__(self, index: int) -> Any:
        # With bulk fetching, a list of indices and an array of labels.
        sample = self.dataset[index]
        label: Any = swap_labels(torch.as_tensor(sample[1]), self.swap)
        # A Python number or list remains one, because a collate function may treat tensors differently.
        if isinstance(sample[1], np.ndarray) and sample[1].ndim:
            label = label.numpy()
        elif not isinstance(sample[1], Tensor):
            label = label.tolist()
        return (sample[0], label, *sample[2:])


def _pinned(tensor: Tensor) -> Tensor:
    """Copy a tensor of the CPU into page-locked memory."""
    if tensor.device.type != "cpu":
        return tensor
    return tensor.pin_memory()


def _channels_last(tensor: Tensor) -> Tensor:
    """Lay out a batch of images ``[B, C, H, W]`` channels-last; return other tensors unchanged."""
    if tensor.ndim != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
