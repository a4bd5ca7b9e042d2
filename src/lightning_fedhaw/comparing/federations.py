"""The built-in federations of ``fedhaw compare``, and those of arrays in a file and of torchvision's data sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedhaw import arguments
from lightning_fedhaw.comparing.cells import Cell
from lightning_fedhaw.data import FederatedDataModule, IndexPartitioner

OPTIMIZERS = ("SGD", "Adam")


class Arrays(NamedTuple):
    """Training and test data.

    Attributes:
        x: Inputs of training ``[samples, ...]``.
        y: Classes, or numbers to predict, ``[samples]``.
        test_x: Inputs of the test.
        test_y: Their classes or numbers.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Network(pl.LightningModule):
    """An ordinary module: a perceptron for flat samples, a small convolutional network for images.

    Args:
        shape: The shape of a sample.
        classes: Number of classes; None for one number to predict.
        lr: Learning rate of the clients.
        optimizer: ``"SGD"`` or ``"Adam"``.
        hidden: Widths of the hidden layers; none for a linear model, which starts at zero.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int | None,
        lr: float = 0.05,
        optimizer: str = "SGD",
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.classes = classes
        self.lr = arguments.number("lr", lr, above=0)
        self.optimizer = arguments.choice("optimizer", optimizer, OPTIMIZERS)
        widths = arguments.integers("hidden", hidden, minimum=1, allowed="widths of hidden layers")
        layers, features = _convolutions(shape)
        for width in widths:
            layers += [nn.Linear(features, width), nn.ReLU()]
            features = width
        layers.append(nn.Linear(features, classes or 1))
        self.net = nn.Sequential(*layers)
        if not widths:
            # The loss of a linear model is convex: nothing asks for different weights at the start.
            for parameter in self.net[-1].parameters():
                nn.init.zeros_(parameter)
        self.scores = MetricCollection({"val_r2": R2Score()})
        if classes is not None:
            self.scores = MetricCollection({"val_acc": MulticlassAccuracy(classes, average="micro")})

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[batch, classes]``, or predicted numbers ``[batch]``."""
        outputs: Tensor = self.net(inputs)
        if self.classes is None:
            return outputs[:, 0]
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy, or the mean squared error."""
        if self.classes is None:
            return mse_loss(outputs, targets)
        return cross_entropy(outputs, targets)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log accuracy, or the coefficient of determination, and the loss."""
        outputs = self(batch[0])
        self.scores.update(outputs, batch[1])
        self.log("val_loss", self.loss(outputs, batch[1]))
        self.log_dict(self.scores)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of a client."""
        kind: Any = getattr(torch.optim, self.optimizer)
        optimizer: torch.optim.Optimizer = kind(self.parameters(), lr=self.lr)
        return optimizer


def _convolutions(shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    """Return the layers before the first linear one, and the number of features that they leave."""
    # Two poolings leave a quarter of each side: smaller images, such as the digits of 8 x 8 pixels, are flattened.
    is_image = len(shape) == 3 and shape[-1] >= 16
    if not is_image:
        return [nn.Flatten()], math.prod(shape)
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return layers, 64 * (shape[1] // 4) * (shape[2] // 4)


def data_module(source: Callable[[], Arrays], batch_size: int = 32, proxy: int = 0) -> FederatedDataModule:
    """Return arrays as a data module.

    Args:
        source: Returns the arrays.
        batch_size: Samples in a batch.
        proxy: Samples of the training data that only the server has, for rules that need some.
    """
    arrays = source()
    num_proxy: int | None = None
    if proxy:
        num_proxy = proxy
    return FederatedDataModule(
        TensorDataset(arrays.x, arrays.y),
        batch_size=batch_size,
        val=TensorDataset(arrays.test_x, arrays.test_y),
        proxy=num_proxy,
    )


def cell_of(name: str, source: Callable[[], Arrays], lr: float, **options: Any) -> Cell:
    """Return the cell of some arrays.

    Args:
        name: The name of the cell.
        source: Returns the arrays.
        lr: Learning rate of the clients.
        options: ``hidden``, ``optimizer`` and ``batch_size``, and options of the federation.
    """
    arrays = source()
    classes = None
    metric = "val_r2"
    if not arrays.y.is_floating_point():
        classes = int(arrays.y.max()) + 1
        metric = "val_acc"
    settings: dict[str, Any] = {}
    for setting in ("hidden", "optimizer"):
        if setting in options:
            settings[setting] = options.pop(setting)
    data: dict[str, Any] = {}
    if "batch_size" in options:
        data["batch_size"] = options.pop("batch_size")
    model = partial(Network, tuple(arrays.x.shape[1:]), classes, lr=lr, **settings)
    return Cell(name, model, partial(data_module, source, **data), options, metric)


def digits(lr: float = 0.05, **options: Any) -> Cell:
    """Return scikit-learn's digits: 1,437 images of 8x8 pixels; 360 are for the test."""
    return cell_of("digits", load_digits, lr, **{"hidden": (128, 128), "batch_size": 16, "alpha": 0.1, **options})


def mislabeled_digits(lr: float = 0.05, **options: Any) -> Cell:
    """Return the digits in an even split, where three of ten clients have random labels."""
    partitioner = IndexPartitioner(_owners(load_digits().y))
    return cell_of(
        "mislabeled_digits",
        _mislabeled_digits,
        lr,
        **{"hidden": (128, 128), "batch_size": 16, "partitioner": partitioner, **options},
    )


def wine(lr: float = 0.05, **options: Any) -> Cell:
    """Return scikit-learn's wine: 178 samples of 13 numbers, three classes, five clients."""
    return cell_of("wine", _wine, lr, **{"hidden": (32,), "batch_size": 8, "num_clients": 5, "alpha": 0.3, **options})


def breast_cancer(lr: float = 0.02, **options: Any) -> Cell:
    """Return scikit-learn's breast cancer: 569 samples of 30 numbers, two classes, ten clients."""
    return cell_of(
        "breast_cancer", load_breast_cancer, lr, **{"hidden": (32,), "batch_size": 8, "alpha": 0.3, **options}
    )


def diabetes(lr: float = 0.02, **options: Any) -> Cell:
    """Return scikit-learn's diabetes: a regression on 442 samples of 10 numbers, ten clients."""
    return cell_of("diabetes", _diabetes, lr, **{"hidden": (32,), "batch_size": 8, **options})


def synthetic(lr: float = 0.02, clients: int = 30, **options: Any) -> Cell:
    """Return Synthetic(1, 1) (Li et al., FedProx), a logistic regression: clients differ in inputs and true model."""
    source = partial(_synthetic, clients)
    _, sizes = _draw_synthetic(clients)
    ends = np.cumsum([0, *sizes]).tolist()
    partitioner = IndexPartitioner([range(begin, end) for begin, end in itertools.pairwise(ends)])
    return cell_of("synthetic", source, lr, **{"hidden": (), "batch_size": 10, "partitioner": partitioner, **options})


def npz(path: str, lr: float = 0.05, **options: Any) -> Cell:
    """Return the arrays ``train_x`` ``[samples, ...]``, ``train_y``, ``test_x`` and ``test_y`` of a file."""
    return cell_of(Path(path).stem, partial(_from_file, path), lr, **options)


def torchvision(name: str, root: str = "data", lr: float = 0.05, **options: Any) -> Cell:
    """Return a data set of torchvision that holds its images in memory, such as MNIST or CIFAR10.

    Args:
        name: The class of the data set.
        root: Its folder; what is not there is downloaded.
        lr: Learning rate of the clients.
        options: As of the other cells.
    """
    return cell_of(name, partial(_from_torchvision, name, root), lr, **options)


def custom(
    model: Callable[..., pl.LightningModule], data: Callable[..., pl.LightningDataModule], **options: object
) -> Cell:
    """Return a module and a data module of the user's own, both given by class path."""
    return Cell("custom", model, data, options)


CELLS: dict[str, Callable[..., Cell]] = {
    "digits": digits,
    "mislabeled_digits": mislabeled_digits,
    "synthetic": synthetic,
    "wine": wine,
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
    "npz": npz,
    "torchvision": torchvision,
    "custom": custom,
}
"""The cells by the names that an expression may use."""


# ---------------------------------------------------------------------- data


def _split(x: NDArray[Any], y: NDArray[Any], *, stratify: bool = True) -> Arrays:
    """Set a fifth of some samples aside for the test, and scale nothing."""
    from sklearn.model_selection import train_test_split

    classes = y if stratify else None
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0, stratify=classes)
    kind = torch.int64 if stratify else torch.float32
    return Arrays(
        torch.as_tensor(train_x, dtype=torch.float32),
        torch.as_tensor(train_y, dtype=kind),
        torch.as_tensor(test_x, dtype=torch.float32),
        torch.as_tensor(test_y, dtype=kind),
    )


def _scikit_learn() -> Any:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "This cell needs scikit-learn, which is not installed: `pip install scikit-learn`."
        ) from error
    return datasets


@lru_cache
def load_digits() -> Arrays:
    """Return scikit-learn's digits."""
    pixels, labels = _scikit_learn().load_digits(return_X_y=True)
    return _split(pixels / 16, labels)


def _owners(labels: Tensor) -> list[list[int]]:
    """Return an even split of samples over ten clients."""
    owner = np.random.default_rng(0).integers(0, 10, len(labels))
    return [np.flatnonzero(owner == client).tolist() for client in range(10)]


@lru_cache
def _mislabeled_digits() -> Arrays:
    arrays = load_digits()
    labels = arrays.y.clone()
    owners = _owners(labels)
    draw = np.random.default_rng(1)
    for client in (1, 4, 7):
        labels[owners[client]] = torch.as_tensor(draw.integers(0, 10, len(owners[client])))
    return arrays._replace(y=labels)


@lru_cache
def _wine() -> Arrays:
    x, y = _scikit_learn().load_wine(return_X_y=True)
    return _split((x - x.mean(0)) / x.std(0), y)


@lru_cache
def load_breast_cancer() -> Arrays:
    """Return scikit-learn's breast cancer."""
    x, y = _scikit_learn().load_breast_cancer(return_X_y=True)
    return _split((x - x.mean(0)) / x.std(0), y)


@lru_cache
def _diabetes() -> Arrays:
    x, y = _scikit_learn().load_diabetes(return_X_y=True)
    return _split((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(), stratify=False)


@lru_cache
def _draw_synthetic(clients: int) -> tuple[Arrays, list[int]]:
    """Draw Synthetic(1, 1), of which 80 % are for training.

    Returns:
        The samples, client after client, and the training samples of each client.
    """
    draw = np.random.default_rng(0)
    deviation = np.sqrt(np.arange(1.0, 61) ** -1.2)
    inputs: dict[str, list[NDArray[Any]]] = {"train": [], "test": []}
    labels: dict[str, list[NDArray[Any]]] = {"train": [], "test": []}
    sizes = []
    for _ in range(clients):
        samples = int(min(50 + np.exp(draw.normal(4, 1)), 600))
        # The order of the draws is part of the data set: another one would give other samples.
        model_mean = draw.normal(0, 1)
        input_mean = draw.normal(0, 1)
        mean = draw.normal(input_mean, 1, 60)
        weight = draw.normal(model_mean, 1, (10, 60))
        bias = draw.normal(model_mean, 1, 10)
        x = draw.normal(mean, deviation, (samples, 60))
        y = (x @ weight.T + bias).argmax(1)
        size = int(0.8 * samples)
        sizes.append(size)
        inputs["train"].append(x[:size])
        labels["train"].append(y[:size])
        inputs["test"].append(x[size:])
        labels["test"].append(y[size:])
    tensors = []
    for stage in ("train", "test"):
        tensors.append(torch.tensor(np.concatenate(inputs[stage]), dtype=torch.float32))
        tensors.append(torch.tensor(np.concatenate(labels[stage])))
    return Arrays(*tensors), sizes


def _synthetic(clients: int) -> Arrays:
    arrays, _ = _draw_synthetic(clients)
    return arrays


@lru_cache
def _from_file(path: str) -> Arrays:
    names = ("train_x", "train_y", "test_x", "test_y")
    if not Path(path).is_file():
        raise ValueError(f"`path` must be an npz file with {', '.join(names)}, and there is no file {path!r}.")
    with np.load(path) as file:
        missing = [name for name in names if name not in file]
        if missing:
            raise ValueError(f"{path!r} must hold {', '.join(names)}; it holds {', '.join(file.files)}.")
        return _prepared([torch.from_numpy(file[name]) for name in names])


@lru_cache
def _from_torchvision(name: str, root: str) -> Arrays:
    import torchvision.datasets as available  # type: ignore[import-untyped]

    kind = getattr(available, name, None)
    if kind is None:
        raise ValueError(f"`name` must be a data set of torchvision, such as MNIST or CIFAR10, got {name!r}.")
    tensors = []
    for is_training in (True, False):
        dataset = kind(root, train=is_training, download=True)
        tensors += [torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)]
    return _prepared(tensors)


def _prepared(tensors: Sequence[Tensor]) -> Arrays:
    x, y, test_x, test_y = tensors
    return Arrays(_inputs(x), _targets(y), _inputs(test_x), _targets(test_y))


def _targets(y: Tensor) -> Tensor:
    """Return classes as integers, and numbers to predict in single precision."""
    if y.is_floating_point():
        return y.float()
    return y.long()


def _inputs(x: Tensor) -> Tensor:
    """Return inputs, bytes scaled to [0, 1], and images as ``[samples, channels, height, width]``."""
    # Asked before the conversion: floating-point inputs may have any scale, which is left as it is.
    is_bytes = x.dtype == torch.uint8
    x = x.float()
    if is_bytes:
        x = x / 255
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim == 4 and x.shape[-1] in (1, 3):
        return x.movedim(-1, 1)
    return x
