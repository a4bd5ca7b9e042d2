"""Features of a frozen network, computed once and kept in files."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_fedhaw import arguments
from lightning_fedhaw.files import remove_abandoned, write_bytes
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.streams import stream

_NUM_PROBES = 8
"""Samples whose content identifies a data set."""


def cache_features(
    extract: Callable[[Tensor], Tensor],
    dataset: Dataset[object],
    folder: str | Path,
    *,
    key: str,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_size: int = 4096,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ConcatDataset[tuple[Tensor, ...]]:
    """Return the features of every sample: read from files where these exist, else computed and written.

    Files are identified by ``key``, the transform and the content of a few samples. Each holds a shard of the samples,
    and is written under a temporary name and renamed: a run that was interrupted resumes at the next shard, and two
    runs at the same time do not disturb each other. A file's name holds the checksum of its content; features whose
    file does not match its checksum are computed again.

    Args:
        extract: From images ``[B, ...]`` to features ``[B, F]``. A module, or a method of one, runs in eval mode.
        dataset: Map-style, of pairs of an image and a label, without randomness.
        folder: Where the files are kept, in a subfolder for every key.
        key: Names the network and its weights, such as ``TimmClassifier.feature_key()``.
        batch_size: Images at a time.
        num_workers: Worker processes that read images.
        shard_size: Samples in a file.
        device: Where ``extract`` computes. Default: where the module's parameters are, else the CPU.
        dtype: The dtype in which features are kept. Default: that of ``extract``'s result.
        progress: Whether a bar is shown while features are computed.

    Returns:
        Pairs of features ``[F]`` and label, memory-mapped: tensors, so that a federation slices them.

    Raises:
        TypeError: If samples are not such pairs.
        ValueError: If the data set is empty, returns a sample differently when it is read again, or ``extract`` does
            not return a row for every image.
    """
    arguments.function("extract", extract, "extract(images)")
    key = arguments.text("key", key)
    batch_size = arguments.integer("batch_size", batch_size, minimum=1)
    num_workers = arguments.integer("num_workers", num_workers, minimum=0)
    shard_size = arguments.integer("shard_size", shard_size, minimum=1)
    progress = arguments.flag("progress", progress)
    module = _module_of(extract)
    compute_device = _device_of(module) if device is None else torch.device(device)
    extraction = _Extraction(extract, dataset, batch_size, num_workers, compute_device, dtype)

    description = _describe(dataset, key, shard_size, dtype)
    shards = Path(folder).expanduser() / hashlib.blake2b(description, digest_size=8).hexdigest()
    shards.mkdir(parents=True, exist_ok=True)
    paths, missing = _find_shards(shards, len(cast(Sized, dataset)), shard_size)
    if missing:
        remove_abandoned(shards)
        write_bytes(shards / "about.json", description)
        num_missing = sum(map(len, missing))
        with (
            _inference_mode(module),
            Tqdm(total=num_missing, desc="Features", unit="image", disable=not progress) as bar,
        ):
            for samples in missing:
                features, labels = extraction.run(samples, bar)
                paths[samples.start] = _save_shard(shards, samples.start, features, labels)
    return ConcatDataset([_load_shard(paths[start]) for start in sorted(paths)])


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def _module_of(extract: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """Return the module that is called, or whose method is called; None for a plain function."""
    owner = getattr(extract, "__self__", None)
    for candidate in (extract, owner):
        if isinstance(candidate, nn.Module):
            return candidate
    return None


def _device_of(module: nn.Module | None) -> torch.device:
    """Return the device of a module's parameters; the CPU if there are none."""
    if module is not None:
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")


@contextmanager
def _inference_mode(module: nn.Module | None) -> Iterator[None]:
    """Compute no gradients, with the module in eval mode; restore the mode of each of its submodules at the end."""
    modes: dict[nn.Module, bool] = {}
    if module is not None:
        modes = {submodule: submodule.training for submodule in module.modules()}
    try:
        # `train` and `eval` act on all submodules at once, and a user's module may override them.
        for submodule in modes:
            submodule.training = False
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


@dataclass(frozen=True)
class _Extraction:
    """The computation of features, for the samples that have none in a file.

    Attributes:
        extract: From images ``[B, ...]`` to features ``[B, F]``.
        dataset: Pairs of an image and a label.
        batch_size: Images at a time.
        num_workers: Worker processes that read images.
        device: Where ``extract`` computes.
        dtype: The dtype in which features are kept; None for that of ``extract``'s result.
    """

    extract: Callable[[Tensor], Tensor]
    dataset: Dataset[object]
    batch_size: int
    num_workers: int
    device: torch.device
    dtype: torch.dtype | None

    def run(self, samples: range, bar: Tqdm) -> tuple[Tensor, Tensor]:
        """Compute the features of some samples.

        Args:
            samples: Their indices.
            bar: Advances by the images of each batch.

        Returns:
            Features ``[images, F]`` and labels ``[images, ...]``, on the CPU.

        Raises:
            ValueError: If ``extract`` does not return a row for every image.
        """
        loader = DataLoader(
            Subset(self.dataset, samples),
            self.batch_size,
            num_workers=self.num_workers,
            # Without a generator of its own, the loader would draw from the global random state.
            generator=stream(0, "cached features"),
        )
        feature_batches = []
        label_batches = []
        for images, labels in loader:
            features = self.extract(images.to(self.device))
            _check_rows(features, len(images))
            feature_batches.append(features.to("cpu", self.dtype))
            label_batches.append(labels)
            bar.update(len(images))
        return torch.cat(feature_batches), torch.cat(label_batches)


def _check_rows(features: object, num_images: int) -> None:
    """Refuse features that are not a tensor with a row for every image."""
    if not isinstance(features, Tensor):
        received = type(features).__name__
    elif features.ndim == 0 or len(features) != num_images:
        received = str(list(features.shape))
    else:
        return
    raise ValueError(f"`extract` must return a row of features for each of {num_images} images, got {received}.")


# ---------------------------------------------------------------------------------------------------------------------
# The identity of a data set
# ---------------------------------------------------------------------------------------------------------------------


def _describe(dataset: Dataset[object], key: str, shard_size: int, dtype: torch.dtype | None) -> bytes:
    """Describe what the features are made of, as JSON; another description is another cache."""
    num_samples = len(cast(Sized, dataset))
    # The address in the name of a function or an object is another one in every run.
    transform = re.sub(" at 0x[0-9a-fA-F]+", "", repr(getattr(dataset, "transform", None)))
    description = {
        "key": key,
        "transform": transform,
        "samples": num_samples,
        "probes": _hash_probes(dataset, num_samples),
        "shard_size": shard_size,
        "dtype": str(dtype),
    }
    return json.dumps(description, indent=2).encode()


def _hash_probes(dataset: Dataset[object], num_samples: int) -> str:
    """Hash a few samples, spread over the data set.

    Raises:
        TypeError: If they are not pairs of an image and a label.
        ValueError: If there are none, or reading them again gives other values.
    """
    if not num_samples:
        raise ValueError("`dataset` must hold at least one sample, got none.")
    probes = sorted(set(torch.linspace(0, num_samples - 1, _NUM_PROBES).long().tolist()))
    with isolated_randomness(torch.device("cpu")):
        digest = _hash_samples(dataset, probes)
        # The features of a random transform would be those of a single draw, so the samples must be reproducible.
        second_digest = _hash_samples(dataset, probes)
    if digest != second_digest:
        raise ValueError(
            "`dataset` returns a sample differently when it is read again: features are computed once, so its transform"
            " must not draw at random."
        )
    return digest


def _hash_samples(dataset: Dataset[object], indices: list[int]) -> str:
    """Hash the images and labels of some samples."""
    digest = hashlib.blake2b(digest_size=8)
    for index in indices:
        sample: Any = dataset[index]
        _check_sample(sample)
        for value in sample:
            digest.update(torch.as_tensor(value).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_sample(sample: Any) -> None:
    """Refuse a sample that is not a pair of an image, as a tensor, and a label that is a number or a tensor."""
    is_sequence = isinstance(sample, (tuple, list)) and len(sample) > 0
    image = sample[0] if is_sequence else sample
    if not (is_sequence and len(sample) == 2 and isinstance(image, Tensor)):
        raise TypeError(
            "`dataset` must give pairs of an image, as a tensor, and a label, got"
            f" {type(image).__name__}. Set its `transform`."
        )
    label = sample[1]
    if not isinstance(label, (int, float, np.generic, np.ndarray, Tensor)):
        raise TypeError(
            "`dataset` must give a number or a tensor as label, got"
            f" {type(label).__name__}. Set its `target_transform`."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _find_shards(shards: Path, num_samples: int, shard_size: int) -> tuple[dict[int, Path], list[range]]:
    """Find out which shards have a file.

    Returns:
        The files by the first sample of their shard; and the samples of each shard that has none.
    """
    paths = {}
    missing = []
    for start in range(0, num_samples, shard_size):
        path = _find_shard(shards, start)
        if path is None:
            missing.append(range(start, min(start + shard_size, num_samples)))
        else:
            paths[start] = path
    return paths, missing


def _find_shard(shards: Path, start: int) -> Path | None:
    """Find the file of the shard that begins with a sample; delete files that do not match their checksum."""
    for path in sorted(shards.glob(f"{start:09d}-*.pt")):
        if path.stem.endswith(f"-{zlib.crc32(path.read_bytes()):08x}"):
            return path
        warnings.warn(
            f"{path} is corrupt or truncated; its features are computed again.",
            stacklevel=4,  # the caller of `cache_features`
        )
        path.unlink(missing_ok=True)
    return None


def _load_shard(path: Path) -> TensorDataset:
    """Map a file into memory."""
    return TensorDataset(*torch.load(str(path), map_location="cpu", mmap=True, weights_only=True))


def _save_shard(shards: Path, start: int, features: Tensor, labels: Tensor) -> Path:
    """Write the shard that begins with a sample, under a name with its checksum."""
    buffer = io.BytesIO()
    torch.save((features, labels), buffer)
    content = buffer.getvalue()
    path = shards / f"{start:09d}-{zlib.crc32(content):08x}.pt"
    write_bytes(path, content)
    return path
