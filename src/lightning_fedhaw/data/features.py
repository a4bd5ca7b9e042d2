"""Features of a frozen network, computed once and kept in files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_fedhaw import arguments
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.streams import stream

_PROBES = 8


def cache_features(
    extract: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
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
    """The features of every sample: read from files where they are there, else computed and written.

    What is there is found by ``key``, the transform and a few samples. Files are written beside their place and
    renamed, a shard at a time: a run that was cut off goes on with the next shard, and two at a time do not disturb
    each other. A file's name holds the checksum of its content, and one that does not fit is computed again.

    Args:
        extract: From images ``[B, ...]`` to features ``[B, F]``. A module, or a method of one, runs in eval mode.
        dataset: Map-style, of pairs of an image and a label, without randomness.
        folder: Where the files go, in a folder of their own for every key.
        key: Names the network and its weights, such as ``TimmClassifier.feature_key()``.
        batch_size: Images at a time.
        num_workers: Worker processes that read images.
        shard_size: Samples in a file.
        device: Where ``extract`` computes. Default: where the module's parameters are, else the CPU.
        dtype: In which features are kept. Default: as they come.
        progress: Whether a bar is shown while features are computed.

    Returns:
        Pairs of features ``[F]`` and label, memory-mapped: tensors, so that a federation slices them.

    Raises:
        TypeError: If samples are not such pairs.
        ValueError: If the data set is empty, gives the same sample twice differently, or ``extract`` does not return
            a row for every image.
    """
    arguments.function("extract", extract, "extract(images)")
    key = arguments.text("key", key)
    batch_size = arguments.integer("batch_size", batch_size, minimum=1)
    num_workers = arguments.integer("num_workers", num_workers, minimum=0)
    shard_size = arguments.integer("shard_size", shard_size, minimum=1)
    progress = arguments.flag("progress", progress)
    module = extract if isinstance(extract, nn.Module) else getattr(extract, "__self__", None)
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    place = torch.device(device or ("cpu" if parameter is None else parameter.device))
    length = len(dataset)  # type: ignore[arg-type]
    about = {
        "key": key,
        "transform": re.sub(" at 0x[0-9a-fA-F]+", "", repr(getattr(dataset, "transform", None))),
        "samples": length,
        "probes": _probe(dataset, length),
        "shard_size": shard_size,
        "dtype": str(dtype),
    }
    text = json.dumps(about, indent=2)
    shards = Path(folder).expanduser() / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    shards.mkdir(parents=True, exist_ok=True)
    starts = range(0, length, shard_size)
    found = {start: _find(shards, start) for start in starts}
    missing = [start for start in starts if found[start] is None]
    if missing:
        _write(shards / "about.json", text.encode())
        total = sum(min(shard_size, length - start) for start in missing)
        with _frozen(module), Tqdm(total=total, desc="Features", unit="image", disable=not progress) as bar:
            for start in missing:
                rows = Subset(dataset, range(start, min(start + shard_size, length)))
                loader = DataLoader(rows, batch_size, num_workers=num_workers, generator=stream(0, "cached features"))
                features, labels = [], []
                for images, own in loader:
                    result = extract(images.to(place))
                    if not isinstance(result, Tensor) or result.shape[:1] != images.shape[:1]:
                        raise ValueError(
                            f"`extract` must return a row of features for each of {len(images)} images, got"
                            f" {list(result.shape) if isinstance(result, Tensor) else type(result).__name__}."
                        )
                    features.append(result.to("cpu", dtype))
                    labels.append(own)
                    bar.update(len(images))
                found[start] = _save(shards, start, torch.cat(features), torch.cat(labels))
    paths = [str(path) for path in found.values() if path is not None]
    return ConcatDataset(
        [TensorDataset(*torch.load(path, map_location="cpu", mmap=True, weights_only=True)) for path in paths]
    )


def _probe(dataset: Dataset[Any], length: int) -> str:
    """A hash of a few samples, each read twice."""
    if not length:
        raise ValueError("`dataset` must hold at least one sample, got none.")
    rows = sorted(set(torch.linspace(0, length - 1, _PROBES).long().tolist()))
    digests = []
    with isolated_randomness(torch.device("cpu")):
        for _ in range(2):
            digest = hashlib.blake2b(digest_size=8)
            for row in rows:
                sample = dataset[row]
                if not (isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], Tensor)):
                    raise TypeError(
                        "`dataset` must give pairs of an image, as a tensor, and a label, got"
                        f" {type(sample[0] if isinstance(sample, (tuple, list)) and sample else sample).__name__}. Set"
                        " its `transform`."
                    )
                if not isinstance(sample[1], (int, float, np.generic, np.ndarray, Tensor)):
                    raise TypeError(
                        "`dataset` must give a number or a tensor as label, got"
                        f" {type(sample[1]).__name__}. Set its `target_transform`."
                    )
                for part in sample:
                    digest.update(torch.as_tensor(part).reshape(-1).view(torch.uint8).numpy().tobytes())
            digests.append(digest.hexdigest())
    if digests[0] != digests[1]:
        raise ValueError(
            "`dataset` gives a sample differently when it is read again: features are computed once, so its transform"
            " must not draw at random."
        )
    return digests[0]


@contextmanager
def _frozen(module: Any) -> Iterator[None]:
    """Without gradients, and with the module in eval mode."""
    modes = {part: part.training for part in module.modules()} if isinstance(module, nn.Module) else {}
    try:
        for part in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _find(shards: Path, start: int) -> Path | None:
    """The shard that begins with a sample, if it is whole."""
    for path in sorted(shards.glob(f"{start:09d}-*.pt")):
        if path.stem.endswith(f"-{zlib.crc32(path.read_bytes()):08x}"):
            return path
        warnings.warn(f"{path} is corrupt or truncated; its features are computed again.", stacklevel=3)
        path.unlink(missing_ok=True)
    return None


def _save(shards: Path, start: int, features: Tensor, labels: Tensor) -> Path:
    buffer = io.BytesIO()
    torch.save((features, labels), buffer)
    content = buffer.getvalue()
    path = shards / f"{start:09d}-{zlib.crc32(content):08x}.pt"
    _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
