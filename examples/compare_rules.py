"""Every aggregation rule on one federation: the same clients, cohorts, batches, proxy data and initial model.

    python examples/compare_rules.py                                        scikit-learn's digits
    python examples/compare_rules.py --data MNIST --clients-per-round 0.5   by torchvision, which downloads it
    python examples/compare_rules.py --data mnist.npz --rules FedAvg FedLAW FedHAW

An npz file holds `train_x` [samples, ...], `train_y`, `test_x` and `test_y`; images of bytes are scaled to [0, 1].
Rules are named after their classes, without "Callback". Prints a table (final, mean of the last ten and best accuracy,
rounds to a given accuracy, the server's time per round, bytes and memory beyond FedAvg's) and draws the curves. Rules
that learn on the server's data get `--proxy` samples of the training data; no rule trains its clients on them.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fedhaw as fed
from lightning_fedhaw.extending import AggregationRule, ClientVectors
from lightning_fedhaw.plotting import RunHistory, draw_curves

SERVER_EPOCHS = 20
# A rule is named after its class, without "Callback"; variants of a rule have a word more.
RULES: dict[str, Callable[[], AggregationRule]] = {
    "FedAvg": fed.FedAvgCallback,
    "FedNova": fed.FedNovaCallback,
    "FedAvgM": lambda: fed.FedAvgMCallback(lr=0.5, momentum=0.5),
    "FedAdagrad": lambda: fed.FedAdagradCallback(lr=0.03),
    "FedAdam": lambda: fed.FedAdamCallback(lr=0.03),
    "FedYogi": lambda: fed.FedYogiCallback(lr=0.03),
    "FedAdp": fed.FedAdpCallback,
    "FedExP": fed.FedExPCallback,
    "FedAWA": fed.FedAWACallback,
    "FedVG": fed.FedVGCallback,
    "FedLWS": fed.FedLWSCallback,
    "FedHyper G": lambda: fed.FedHyperCallback("G", normalize_by="norms", hyper_lr=0.1),
    "FedHyper G+SL": lambda: fed.FedHyperCallback("G+SL", normalize_by="norms", hyper_lr=0.1),
    "FedHyper G+CL": lambda: fed.FedHyperCallback("G+CL", normalize_by="norms", hyper_lr=0.1),
    "FedHAW": fed.FedHAWCallback,
    "PublishedFedHAW": fed.PublishedFedHAWCallback,
    "Scaffold": fed.ScaffoldCallback,
    "FedDyn": lambda: fed.FedDynCallback(regularization=0.1),
    "FedLAW": lambda: fed.FedLAWCallback(server_epochs=SERVER_EPOCHS),
    "FedLAW in stages": lambda: fed.FedLAWCallback("in_stages", server_epochs=SERVER_EPOCHS),
    "ServerFineTuning": fed.ServerFineTuningCallback,
    "FedDF": lambda: fed.FedDFCallback(server_epochs=SERVER_EPOCHS),
    "FedBE": lambda: fed.FedBECallback(server_epochs=SERVER_EPOCHS),
    "CoordinateMedian": fed.CoordinateMedianCallback,
    "TrimmedMean": lambda: fed.TrimmedMeanCallback(num_byzantine=1),
    "Krum": lambda: fed.KrumCallback(num_byzantine=1),
    "MultiKrum": lambda: fed.MultiKrumCallback(num_byzantine=1),
    "GeometricMedian": fed.GeometricMedianCallback,
}


class Split(NamedTuple):
    """Training and test data: inputs ``[samples, ...]`` in [0, 1] and labels ``[samples]``."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Classifier(pl.LightningModule):
    """An ordinary module: a perceptron for flat samples, a small convolutional network for images."""

    def __init__(self, shape: tuple[int, ...], classes: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        features = math.prod(shape)
        is_image = len(shape) == 3 and shape[-1] >= 16
        if is_image:
            layers += [nn.Conv2d(shape[0], 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            features = 64 * (shape[1] // 4) * (shape[2] // 4)
        layers += [nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes)]
        self.net = nn.Sequential(*layers)
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.val_accuracy(logits, batch[1])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def load(source: str, folder: Path) -> Split:
    """Load training and test data.

    Args:
        source: ``digits``, the name of a data set of torchvision, or the path of an npz file.
        folder: Where torchvision stores what it downloads.
    """
    if source == "digits":
        return _load_digits()
    if source.endswith(".npz"):
        with np.load(source) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
    else:
        arrays = _load_torchvision(source, folder)
    x, y, test_x, test_y = arrays
    return Split(_images(x), y.long(), _images(test_x), test_y.long())


def _load_digits() -> Split:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    arrays = train_test_split(pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x, test_x, y, test_y = (torch.as_tensor(array) for array in arrays)
    return Split(x.float(), y.long(), test_x.float(), test_y.long())


def _load_torchvision(name: str, folder: Path) -> list[Tensor]:
    import torchvision.datasets

    if name not in ("MNIST", "FashionMNIST", "CIFAR10"):
        raise SystemExit(f"--data is digits, MNIST, FashionMNIST, CIFAR10 or an npz file, got {name!r}.")
    arrays = []
    for is_training in (True, False):
        dataset = getattr(torchvision.datasets, name)(folder, train=is_training, download=True)
        arrays += [torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)]
    return arrays


def _images(x: Tensor) -> Tensor:
    """Return inputs in [0, 1], images as ``[samples, channels, height, width]``."""
    is_bytes = x.dtype == torch.uint8
    x = x.float()
    if is_bytes:
        x = x / 255
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim == 4 and x.shape[-1] in (1, 3):
        return x.movedim(-1, 1)
    return x


def run(
    rule: AggregationRule, split: Split, args: argparse.Namespace, *callbacks: pl.Callback
) -> tuple[RunHistory, dict[str, Any]]:
    """Run one federation.

    Returns:
        Its history and its summary.
    """
    history = RunHistory()
    torch.manual_seed(args.seed)
    trainer = fed.FederatedTrainer(
        rounds=args.rounds,
        clients_per_round=args.clients_per_round,
        local_epochs=args.local_epochs,
        client_eval=False,
        seed=args.seed,
        callbacks=[rule, *callbacks, history],
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = fed.FederatedDataModule(
        TensorDataset(split.x, split.y),
        num_clients=args.clients,
        partitioner=fed.DirichletPartitioner(args.alpha),
        batch_size=args.batch_size,
        val=TensorDataset(split.test_x, split.test_y),
        proxy=args.proxy,
        seed=args.seed,
    )
    classes = int(split.y.max()) + 1
    trainer.fit(Classifier(tuple(split.x.shape[1:]), classes, args.lr), data)
    return history, trainer.federation_summary


def state_bytes(state: Any) -> int:
    """Count the bytes of the tensors in a rule's state."""
    if isinstance(state, ClientVectors):
        return state.matrix.nbytes
    if isinstance(state, Mapping):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, Tensor):
        return state.nbytes
    return 0


def mean_of_last(values: Sequence[float], rounds: int = 10) -> float:
    """Return the mean of the last rounds."""
    last_values = values[-rounds:]
    return sum(last_values) / len(last_values)


def table_row(
    name: str, rule: AggregationRule, history: RunHistory, summary: Mapping[str, Any], target: float
) -> list[str]:
    """Format the line of a rule in the table."""
    accuracy = history.curve("val_acc")
    row = [name]
    for value in (accuracy[-1], mean_of_last(accuracy), max(accuracy)):
        row.append(f"{value:.1%}")
    row.append(first_round_with(accuracy, target))
    row.append(f"{1e3 * summary['seconds']['aggregation'] / summary['rounds']:.1f}")
    # No message is lost here, so the models cost the same both ways, and the rest is what a rule sends in addition.
    row.append(f"{(summary['bytes_down'] - summary['bytes_up']) / 1e6:.2f}")
    row.append(f"{state_bytes(rule.state) / 1e6:.2f}")
    return row


def first_round_with(accuracy: Sequence[float], target: float) -> str:
    """Return the number of the first round, from 1, that reaches an accuracy; a dash if none does."""
    for number, value in enumerate(accuracy, 1):
        if value >= target:
            return str(number)
    return "-"


def federation_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the options of a federation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, MNIST, FashionMNIST, CIFAR10, or an npz file")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where torchvision stores downloads")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--clients-per-round", type=float, default=1.0, help="share of the clients")
    parser.add_argument("--alpha", type=float, default=0.1, help="Dirichlet concentration: small is unequal")
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05, help="of the clients' SGD")
    parser.add_argument("--proxy", type=int, default=100, help="samples of the server's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser


def silence() -> None:
    """Use one thread, which is fastest for models this small, and turn off Lightning's advice."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, in aligned columns."""
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column))
    print()
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}"]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(f"{cell:>{width}}")
        print(*cells)


def main(argv: list[str] | None = None) -> dict[str, RunHistory]:
    parser = federation_parser(__doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose first round is printed")
    args = parser.parse_args(argv)
    silence()
    split = load(args.data, args.folder)
    histories: dict[str, RunHistory] = {}
    table = [["rule", "final", "last 10", "best", f"to {args.target:.0%}", "server ms", "extra MB", "kept MB"]]
    for name in args.rules:
        print(f"\n{name}")
        rule = RULES[name]()
        history, summary = run(rule, split, args)
        histories[name] = history
        table.append(table_row(name, rule, history, summary, args.target))
    print_table(table)
    picture = args.output / "rules.png"
    draw_curves(histories, picture)
    print("\nserver ms: of aggregation, a round. extra MB: sent in addition to the models. kept MB: the rule's state.")
    print(f"picture: {picture}")
    return histories


if __name__ == "__main__":
    main()
