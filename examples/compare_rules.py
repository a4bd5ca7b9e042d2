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
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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

Split = tuple[Tensor, Tensor, Tensor, Tensor]
EPOCHS = {"server_epochs": 20}
# A rule is named after its class, without "Callback"; variants of a rule have a word more.
RULES: dict[str, Callable[[], AggregationRule]] = {
    "FedAvg": fed.FedAvgCallback,
    "FedNova": fed.FedNovaCallback,
    "FedAvgM": lambda: fed.FedAvgMCallback(lr=0.5, momentum=0.5),
    "FedAdagrad": lambda: fed.FedAdagradCallback(lr=0.03),
    "FedAdam": lambda: fed.FedAdamCallback(lr=0.03),
    "FedYogi": lambda: fed.FedYogiCallback(lr=0.03),
    "FedAdp": fed.FedAdpCallback,
    "FedLWS": fed.FedLWSCallback,
    "FedHyper G": lambda: fed.FedHyperCallback("G", normalize_by="norms", hyper_lr=0.1),
    "FedHyper G+SL": lambda: fed.FedHyperCallback("G+SL", normalize_by="norms", hyper_lr=0.1),
    "FedHyper G+CL": lambda: fed.FedHyperCallback("G+CL", normalize_by="norms", hyper_lr=0.1),
    "FedHAW": fed.FedHAWCallback,
    "PublishedFedHAW": fed.PublishedFedHAWCallback,
    "Scaffold": fed.ScaffoldCallback,
    "FedDyn": lambda: fed.FedDynCallback(regularization=0.1),
    "FedLAW": lambda: fed.FedLAWCallback(**EPOCHS),
    "FedLAW in stages": lambda: fed.FedLAWCallback("in_stages", **EPOCHS),
    "ServerFineTuning": fed.ServerFineTuningCallback,
    "FedDF": lambda: fed.FedDFCallback(**EPOCHS),
    "FedBE": lambda: fed.FedBECallback(**EPOCHS),
    "CoordinateMedian": fed.CoordinateMedianCallback,
    "TrimmedMean": lambda: fed.TrimmedMeanCallback(num_byzantine=1),
    "Krum": lambda: fed.KrumCallback(num_byzantine=1),
    "MultiKrum": lambda: fed.MultiKrumCallback(num_byzantine=1),
    "GeometricMedian": fed.GeometricMedianCallback,
}


class Classifier(pl.LightningModule):
    """An ordinary module: a perceptron for flat samples, a small convolutional network for images."""

    def __init__(self, shape: tuple[int, ...], classes: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        if len(shape) == 3 and shape[-1] >= 16:
            layers: list[nn.Module] = []
            for inner, outer in ((shape[0], 32), (32, 64)):
                layers += [nn.Conv2d(inner, outer, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            features = 64 * (shape[1] // 4) * (shape[2] // 4)
            self.net = nn.Sequential(
                *layers, nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes)
            )
        else:
            features = int(np.prod(shape))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes))
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
    """Training and test data, inputs in [0, 1]."""
    if source == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
        x, test_x, y, test_y = (torch.as_tensor(part) for part in parts)
        return x.float(), y.long(), test_x.float(), test_y.long()
    if source.endswith(".npz"):
        with np.load(source) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
    else:
        import torchvision.datasets as sets

        if source not in ("MNIST", "FashionMNIST", "CIFAR10"):
            raise SystemExit(f"--data is digits, MNIST, FashionMNIST, CIFAR10 or an npz file, got {source!r}.")
        made = [getattr(sets, source)(folder, train=train, download=True) for train in (True, False)]
        arrays = [torch.as_tensor(part) for each in made for part in (each.data, each.targets)]
    x, y, test_x, test_y = arrays
    return _images(x), y.long(), _images(test_x), test_y.long()


def _images(x: Tensor) -> Tensor:
    """``[samples, channels, height, width]`` where there are rows and columns."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return x.unsqueeze(1) if x.ndim == 3 else x.movedim(-1, 1) if x.ndim == 4 and x.shape[-1] in (1, 3) else x


def play(
    rule: AggregationRule, split: Split, args: argparse.Namespace, *callbacks: pl.Callback
) -> tuple[RunHistory, dict[str, Any], int]:
    """One run: its history, its summary, and the bytes that the rule keeps."""
    x, y, test_x, test_y = split
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
        TensorDataset(x, y),
        num_clients=args.clients,
        partitioner=fed.DirichletPartitioner(args.alpha),
        batch_size=args.batch_size,
        val=TensorDataset(test_x, test_y),
        proxy=args.proxy,
        seed=args.seed,
    )
    trainer.fit(Classifier(tuple(x.shape[1:]), int(y.max()) + 1, args.lr), data)
    return history, trainer.federation_summary, held(rule.state)


def held(state: Any) -> int:
    """Bytes of the tensors in a rule's state."""
    if isinstance(state, ClientVectors):
        return state.matrix.nbytes
    if isinstance(state, Mapping):
        return sum(map(held, state.values()))
    return state.nbytes if isinstance(state, Tensor) else 0


def row(name: str, history: RunHistory, summary: Mapping[str, Any], kept: int, args: argparse.Namespace) -> list[str]:
    """A line of the table."""
    accuracy = history.curve("val_acc")
    last = accuracy[-10:]
    reached = next((str(i) for i, value in enumerate(accuracy, 1) if value >= args.target), "-")
    milliseconds = 1e3 * summary["seconds"]["aggregation"] / summary["rounds"]
    extra = summary["bytes_down"] - summary["bytes_up"]  # nothing is lost here, so models down are models up
    percent = (f"{value:.1%}" for value in (accuracy[-1], sum(last) / len(last), max(accuracy)))
    return [name, *percent, reached, f"{milliseconds:.1f}", f"{extra / 1e6:.2f}", f"{kept / 1e6:.2f}"]


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of a federation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, MNIST, FashionMNIST, CIFAR10, or an npz file")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where torchvision puts what it downloads")
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


def quietly() -> None:
    """One thread, and no advice from Lightning."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for known in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=known)


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Rows under a head, columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print(
            f"{line[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        )


def main(argv: list[str] | None = None) -> dict[str, RunHistory]:
    parser = options(__doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose round is named")
    args = parser.parse_args(argv)
    quietly()
    split = load(args.data, args.folder)
    histories: dict[str, RunHistory] = {}
    head = ["rule", "final", "last 10", "best", f"to {args.target:.0%}", "server ms", "extra MB", "kept MB"]
    table = [head]
    for name in args.rules:
        print(f"\n{name}")
        histories[name], summary, kept = play(RULES[name](), split, args)
        table.append(row(name, histories[name], summary, kept, args))
    print_table(table)
    picture = args.output / "rules.png"
    draw_curves(histories, picture)
    print("\nserver ms: of aggregation, a round. extra MB: sent in all beyond the models. kept MB: the rule's state.")
    print(f"picture: {picture}")
    return histories


if __name__ == "__main__":
    main()
