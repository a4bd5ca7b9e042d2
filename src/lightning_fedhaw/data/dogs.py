"""Stanford Dogs: 20,580 photographs of 120 breeds."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from lightning_fedhaw import arguments

SITE = "http://vision.stanford.edu/aditya86/ImageNetDogs"
# What each archive holds, and its md5.
ARCHIVES = {
    "images.tar": (("Images",), "1bb1f2a596ae7057f99d7d75860002ef"),
    "lists.tar": (("train_list.mat", "test_list.mat"), "edbb9f16854ec66506b5f09b583e0656"),
}

Split = Literal["train", "test"]


class StanfordDogs(Dataset[tuple[Any, Any]]):
    """Stanford Dogs (Khosla et al., 2011) with its official split: 12,000 images to train on, 8,580 to test on.

    The folder holds what the official archives hold: ``Images/n02085620-Chihuahua/n02085620_10074.jpg`` and so on,
    ``train_list.mat`` and ``test_list.mat``. Archives that lie there are checked and unpacked. Lists may name
    fewer images and classes than the official ones. Needs scipy, which reads the lists.

    Args:
        root: The folder.
        split: Which of the two lists.
        transform: Takes an RGB ``PIL.Image``.
        target_transform: Takes a class number.
        download: Whether archives are fetched where neither they nor what they hold is there; 800 MB.

    Attributes:
        classes: The breeds, in the order of their numbers.
        files: Images below ``Images``, in the order of the list.
        targets: The class number of each image, from 0: where partitioners find labels without opening images.

    Raises:
        FileNotFoundError: If something is missing; the message says what to put where.
        ConnectionError: If an archive cannot be downloaded.
        RuntimeError: If an archive or a list is corrupt.
        ValueError: If ``split`` is neither of the two.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = Path(root).expanduser()
        self.split = arguments.choice("split", split, Split)
        self.transform = arguments.optional(arguments.function, "transform", transform, "transform(image)")
        self.target_transform = arguments.optional(
            arguments.function, "target_transform", target_transform, "target_transform(class_number)"
        )
        _provide(self.root, arguments.flag("download", download))
        self.files, self.targets = _read_list(self.root / f"{split}_list.mat")
        folders = {target: file.split("/")[0] for file, target in zip(self.files, self.targets, strict=True)}
        self.classes = [folders[i].partition("-")[2] for i in range(len(folders))]
        self._check_images()

    def _check_images(self) -> None:
        images = self.root / "Images"
        folders = sorted({file.split("/")[0] for file in self.files})
        there = {f"{name}/{p.name}" for name in folders if (images / name).is_dir() for p in (images / name).iterdir()}
        missing = [file for file in self.files if file not in there]
        if missing:
            lost = sum(not (images / name).is_dir() for name in folders)
            raise FileNotFoundError(
                f"{images} lacks {len(missing):,} of the {len(self.files):,} images that {self.split}_list.mat names,"
                f" such as {missing[0]!r}, and {lost} of the {len(folders)} classes' folders. Delete the folder and put"
                f" `images.tar` from {SITE} into {self.root}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """An image and its class number, transformed."""
        from PIL import Image

        with Image.open(self.root / "Images" / self.files[index]) as file:
            image: Any = file.convert("RGB")
        target: Any = self.targets[index]
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )

    def __repr__(self) -> str:
        return f"StanfordDogs({self.split}, {len(self):,} images of {len(self.classes)} breeds in {self.root})"


def _provide(root: Path, download: bool) -> None:
    """Unpack what is not there yet, and download it if asked."""
    for name, (contents, md5) in ARCHIVES.items():
        lacking = [item for item in contents if not (root / item).exists()]
        if not lacking:
            continue
        archive = root / name
        remedy = (
            f"Put `images.tar` and `lists.tar` from {SITE} into {root}, or what they hold: the folder `Images`,"
            " `train_list.mat` and `test_list.mat`"
        )
        if not archive.exists() and not download:
            raise FileNotFoundError(
                f"{root} holds neither `{lacking[0]}` of Stanford Dogs nor `{name}`. {remedy}; or set `download=True`."
            )
        if not archive.exists():
            root.mkdir(parents=True, exist_ok=True)
            part = archive.with_name(f".{name}.{uuid.uuid4().hex}")
            try:
                torch.hub.download_url_to_file(f"{SITE}/{name}", str(part))
                if (got := _md5(part)) != md5:  # a connection that breaks off says nothing
                    raise OSError(f"what arrived ({part.stat().st_size:,} bytes with md5 {got}) is not the whole of it")
                part.replace(archive)
            except (OSError, HTTPException) as error:
                raise ConnectionError(f"{SITE}/{name} could not be downloaded: {error}. {remedy}.") from error
            finally:
                part.unlink(missing_ok=True)
        _unpack(archive, contents, md5)


def _unpack(archive: Path, contents: tuple[str, ...], md5: str) -> None:
    """Beside its place, and renamed: an interrupted run, or two at a time, leave no half of a folder."""
    if (got := _md5(archive)) != md5:
        raise RuntimeError(
            f"{archive} is corrupt or truncated ({archive.stat().st_size:,} bytes with md5 {got} instead of"
            f" {md5}). Delete it and run again with `download=True`."
        )
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as folder:
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(folder)
        for name in contents:
            if not (archive.parent / name).exists():
                (Path(folder) / name).rename(archive.parent / name)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The lists of Stanford Dogs need scipy, which is not installed: `pip install scipy`."
        ) from error
    try:
        table = loadmat(path)
        files, labels = ([entry.item() for entry in table[name].ravel()] for name in ("file_list", "labels"))
        targets = [int(label) - 1 for label in labels]
        if not files or len(files) != len(targets) or set(targets) != set(range(max(targets) + 1)):
            raise ValueError(f"{len(files)} files and {len(targets)} labels")
        return [str(file) for file in files], targets
    except Exception as error:  # what scipy raises depends on the byte at which it stumbles
        raise RuntimeError(
            f"{path} is no list of Stanford Dogs ({type(error).__name__}: {error}). Delete it and put `lists.tar` from"
            f" {SITE} into {path.parent}."
        ) from error
