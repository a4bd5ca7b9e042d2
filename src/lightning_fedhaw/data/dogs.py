"""Stanford Dogs: 20,580 photographs of 120 breeds."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from lightning_fedhaw import argument_names, arguments

SITE = "http://vision.stanford.edu/aditya86/ImageNetDogs"

ARCHIVES = {
    "images.tar": (("Images",), "1bb1f2a596ae7057f99d7d75860002ef"),
    "lists.tar": (("train_list.mat", "test_list.mat"), "edbb9f16854ec66506b5f09b583e0656"),
}
"""The content of each archive, and its MD5 checksum."""

Split = Literal["train", "test"]


class StanfordDogs(argument_names.NamedArguments, Dataset[tuple[Any, Any]]):
    """Stanford Dogs (Khosla et al., 2011) with its official split: 12,000 training images and 8,580 test images.

    The folder has the content of the official archives: ``Images/n02085620-Chihuahua/n02085620_10074.jpg`` and so on,
    ``train_list.mat`` and ``test_list.mat``. Archives in the folder are checked and unpacked. The lists may name
    fewer images and classes than the official ones. Needs scipy, which reads the lists.

    Args:
        root: The folder.
        split: The list to read.
        transform: Takes an RGB ``PIL.Image``.
        target_transform: Takes a class number.
        download: Whether to download an archive if neither it nor its content is in the folder; 800 MB.

    Attributes:
        classes: The breeds, in the order of their numbers.
        files: Images below ``Images``, in the order of the list.
        targets: The class number of each image, from 0: where partitioners find labels without opening images.

    Raises:
        FileNotFoundError: If a file is missing; the message says which one, and where to put it.
        ConnectionError: If an archive cannot be downloaded.
        RuntimeError: If an archive or a list is corrupt.
        ValueError: If ``split`` is neither ``"train"`` nor ``"test"``.
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
        self.classes = _breeds(self.files, self.targets)
        self._check_images()

    def _check_images(self) -> None:
        """Refuse a folder that lacks any image of the list."""
        images = self.root / "Images"
        folders = sorted({_folder_of(file) for file in self.files})
        # Listing 120 folders is much faster than asking for each of 20,580 files.
        existing = _files_in(images, folders)
        missing = [file for file in self.files if file not in existing]
        if missing:
            missing_folders = sum(not (images / folder).is_dir() for folder in folders)
            raise FileNotFoundError(
                f"{images} lacks {len(missing):,} of the {len(self.files):,} images that {self.split}_list.mat names,"
                f" such as {missing[0]!r}, and {missing_folders} of the {len(folders)} classes' folders. Delete the"
                f" folder and put `images.tar` from {SITE} into {self.root}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return an image and its class number, transformed."""
        from PIL import Image

        with Image.open(self.root / "Images" / self.files[index]) as file:
            image: Any = file.convert("RGB")
        target: Any = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def __repr__(self) -> str:
        return f"StanfordDogs({self.split}, {len(self):,} images of {len(self.classes)} breeds in {self.root})"


# ---------------------------------------------------------------------------------------------------------------------
# Lists and images
# ---------------------------------------------------------------------------------------------------------------------


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Read the images of a list, and their class numbers from 0.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        RuntimeError: If the file is not such a list.
    """
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The lists of Stanford Dogs need scipy, which is not installed: `pip install scipy`."
        ) from error
    try:
        table = loadmat(path)
        # Every entry of the two columns is an array of its own, with a single element.
        files = [str(entry.item()) for entry in table["file_list"].ravel()]
        targets = [int(entry.item()) - 1 for entry in table["labels"].ravel()]
        if not files or len(files) != len(targets) or set(targets) != set(range(max(targets) + 1)):
            raise ValueError(f"{len(files)} files and {len(targets)} labels")
    except Exception as error:
        # Of any kind: scipy's errors depend on the byte at which reading fails.
        raise RuntimeError(
            f"{path} is not a list of Stanford Dogs ({type(error).__name__}: {error}). Delete it and put `lists.tar`"
            f" from {SITE} into {path.parent}."
        ) from error
    return files, targets


def _breeds(files: list[str], targets: list[int]) -> list[str]:
    """List the breeds in the order of their numbers; the folder ``n02085620-Chihuahua`` holds Chihuahuas."""
    breeds = {}
    for file, target in zip(files, targets, strict=True):
        breeds[target] = _folder_of(file).partition("-")[2]
    return [breeds[target] for target in range(len(breeds))]


def _folder_of(file: str) -> str:
    """Return the folder of an image, which is that of its class."""
    return file.split("/")[0]


def _files_in(images: Path, folders: Iterable[str]) -> set[str]:
    """List the files of those folders that exist, as the lists name them: ``folder/file``."""
    files: set[str] = set()
    for folder in folders:
        if not (images / folder).is_dir():
            continue
        for path in (images / folder).iterdir():
            files.add(f"{folder}/{path.name}")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------------------------------


def _provide(root: Path, download: bool) -> None:
    """Unpack the archives whose content is missing, and download those that are missing themselves.

    Raises:
        FileNotFoundError: If an archive is missing and ``download`` is off.
        ConnectionError: If an archive cannot be downloaded.
        RuntimeError: If an archive is corrupt.
    """
    remedy = (
        f"Put `images.tar` and `lists.tar` from {SITE} into {root}, or their content: the folder `Images`,"
        " `train_list.mat` and `test_list.mat`"
    )
    for name, (contents, md5) in ARCHIVES.items():
        missing = [item for item in contents if not (root / item).exists()]
        if not missing:
            continue
        archive = root / name
        if not archive.exists():
            if not download:
                raise FileNotFoundError(
                    f"{root} has neither `{missing[0]}` of Stanford Dogs nor `{name}`. {remedy}; or set"
                    " `download=True`."
                )
            _download(archive, md5, remedy)
        _unpack(archive, contents, md5)


def _download(archive: Path, md5: str, remedy: str) -> None:
    """Download an archive under a temporary name and rename it, so that an interruption leaves no part of a file.

    Raises:
        ConnectionError: If that fails, or the file is incomplete.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    url = f"{SITE}/{archive.name}"
    # The name is unique, so that two processes do not write into the same file.
    temporary = archive.with_name(f".{archive.name}.{uuid.uuid4().hex}")
    try:
        torch.hub.download_url_to_file(url, str(temporary))
        # A connection that breaks raises no error: only the checksum tells.
        received = _md5(temporary)
        if received != md5:
            raise OSError(
                f"the file is incomplete ({temporary.stat().st_size:,} bytes received, with md5 {received} instead of"
                f" {md5})"
            )
        temporary.replace(archive)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{url} could not be downloaded: {error}. {remedy}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _unpack(archive: Path, contents: tuple[str, ...], md5: str) -> None:
    """Unpack an archive into a temporary folder and rename its contents.

    An interrupted run, or two runs at the same time, thereby leave no incomplete folder.

    Raises:
        RuntimeError: If the archive is corrupt.
    """
    actual = _md5(archive)
    if actual != md5:
        raise RuntimeError(
            f"{archive} is corrupt or truncated ({archive.stat().st_size:,} bytes with md5 {actual} instead of"
            f" {md5}). Delete it and run again with `download=True`."
        )
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as folder:
        with tarfile.open(archive) as tar:
            # Only later patch releases of Python 3.10 and 3.11 have the filter.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(folder)
        for name in contents:
            if not (archive.parent / name).exists():
                (Path(folder) / name).rename(archive.parent / name)


def _md5(path: Path) -> str:
    """Compute the MD5 checksum of a file, one MiB at a time."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
