"""Data cleaning by learned weights of samples, against FedAvg, where labels of half of the clients are wrong.

    python benchmarks/label_noise.py run [MNIST.npz] [--seeds 0 1 2] [--methods ...]
    python benchmarks/label_noise.py table

Ten clients of equal size; 40 % of the training labels of five of them are another class, drawn uniformly. Each client
holds out a fifth of its samples, whose labels are right. All methods make as many communication rounds of five local
epochs:

- FedAvg: on the noisy training samples.
- FedAvg + held out: on the right held-out samples too, which data cleaning reads and FedAvg does not.
- AggITD: one weight for each training sample, by the loss on the held-out samples.
- only right labels: FedAvg on the training samples whose labels are right; nobody knows them.

Without a file, scikit-learn's digits: 1,437 training and 360 test images, an MLP 64-128-10. ``MNIST.npz`` has train_x,
train_y, test_x and test_y; 5,000 training images of it, an MLP 784-128-10. Every run adds one line to
``benchmarks/results/label_noise.jsonl`` and is not repeated. Accuracy is that of the last model, on test samples.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from journal import Journal
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FederatedTrainer, IndexPartitioner
from lightning_fedhaw.bilevel import AggITDCallback, SampleWeights, with_indices

JOURNAL = Journal("label_noise", "data", "method", "seed")
METHODS = ("FedAvg", "AggITD", "FedAvg + held out", "only right labels")
CLIENTS = 10
NOISY_CLIENTS = 5
WRONG = 0.4
HELD_OUT = 0.2
ROUNDS = {"digits": 60, "MNIST": 60}
MNIST_SAMPLES = 5_000
LR = 0.3
LOCAL_EPOCHS = 5
BATCH_SIZE = 16


class Model(pl.LightningModule):
    """An MLP whose training samples have weights."""

    def __init__(self, num_pixels: int, num_samples: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(num_pixels, 128), nn.ReLU(), nn.Linear(128, 10))
        self.weights = SampleWeights(num_samples)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        losses = cross_entropy(self.net(images), labels, reduction="none")
        return (self.weights(index) * losses).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=LR)


class NoisyClients:
    """The samples of the clients.

    Attributes:
        train: Training samples as images, given labels and numbers.
        is_wrong: Whether the label of each is wrong.
        parts: The numbers of each client's training samples.
        held_out: The held-out samples of each client.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        num_held_out = round(HELD_OUT * len(labels))
        checked, trained = order[:num_held_out], order[num_held_out:]
        self.held_out = [TensorDataset(images[own], labels[own]) for own in checked.tensor_split(CLIENTS)]
        self.parts = list(torch.arange(len(trained)).tensor_split(CLIENTS))
        noisy = torch.cat(self.parts[:NOISY_CLIENTS])
        self.is_wrong = torch.zeros(len(trained), dtype=torch.bool)
        self.is_wrong[noisy] = torch.rand(len(noisy), generator=generator) < WRONG
        others = torch.randint(1, 10, (len(trained),), generator=generator)
        given = torch.where(self.is_wrong, (labels[trained] + others) % 10, labels[trained])
        self.train = with_indices(TensorDataset(images[trained], given))

    def data(self, method: str) -> FederatedDataModule:
        """Return what the clients of a method train on, and hold out."""
        if method == "FedAvg + held out":
            sets = []
            for own, checked in zip(self.parts, self.held_out, strict=True):
                images, given, index = self.train[own]
                # A number of any sample of the client: FedAvg's weights are all 1.
                numbers = torch.full((len(checked),), int(index[0]))
                parts = zip((images, given, index), (*checked.tensors, numbers), strict=True)
                sets.append(TensorDataset(*[torch.cat(pair) for pair in parts]))
            return FederatedDataModule(sets, batch_size=BATCH_SIZE)
        parts = self.parts
        if method == "only right labels":
            parts = [own[~self.is_wrong[own]] for own in parts]
        split = IndexPartitioner(parts)
        return FederatedDataModule(self.train, partitioner=split, batch_size=BATCH_SIZE, val=self.held_out)


def rule_of(method: str) -> Any:
    """Return the rule of a method."""
    if method != "AggITD":
        return FedAvgCallback()
    adam = torch.optim.Adam
    return AggITDCallback("weights", lower_rounds=3, q="sum", upper_lr=0.5, upper_optimizer=adam, clip=10.0)


def arrays(path: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read training images, training labels, test images and test labels."""
    if path is None:
        pixels, labels = load_digits(return_X_y=True)
        x_train, x_test, y_train, y_test = train_test_split(
            pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels
        )
    else:
        file = np.load(path)
        x_train, y_train = file["train_x"][:MNIST_SAMPLES], file["train_y"][:MNIST_SAMPLES]
        x_test, y_test = file["test_x"], file["test_y"]
        scale = 255.0 if x_train.max() > 1.5 else 1.0
        x_train, x_test = x_train / scale, x_test / scale
    images = [torch.as_tensor(x).float().flatten(1) for x in (x_train, x_test)]
    labels_of = [torch.as_tensor(y).long() for y in (y_train, y_test)]
    return images[0], labels_of[0], images[1], labels_of[1]


def run(path: str | None, method: str, seed: int) -> dict[str, Any]:
    """Run one federation."""
    data_name = "digits" if path is None else "MNIST"
    images, labels, test_images, test_labels = arrays(path)
    clients = NoisyClients(images, labels, seed)
    torch.manual_seed(seed)
    model = Model(images.shape[1], len(clients.train))
    if method != "AggITD":
        model.weights.requires_grad_(False)
    trainer = FederatedTrainer(
        rounds=ROUNDS[data_name],
        local_epochs=LOCAL_EPOCHS,
        seed=seed,
        callbacks=[rule_of(method)],
        client_eval=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    trainer.fit(model, clients.data(method))
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        accuracy = float((model.net(test_images).argmax(1) == test_labels).float().mean())
    result = {"data": data_name, "method": method, "seed": seed, "accuracy": round(100 * accuracy, 2)}
    result["seconds"] = round(seconds, 1)
    if method == "AggITD":
        weights = model.weights.logits.detach()
        noisy = torch.cat(clients.parts[:NOISY_CLIENTS])
        result["auc"] = round(float(roc_auc_score(~clients.is_wrong, weights)), 4)
        result["auc_in_noisy_clients"] = round(float(roc_auc_score(~clients.is_wrong[noisy], weights[noisy])), 4)
    return result


def table() -> str:
    """Return the table in Markdown: means over seeds, with standard errors."""
    lines = [
        "| data | method | seeds | test accuracy in % | AUC of the weights | AUC within noisy clients | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for data_name in ROUNDS:
        for method in METHODS:
            chosen = [r for r in JOURNAL.runs() if (r["data"], r["method"]) == (data_name, method)]
            if not chosen:
                continue
            row = [data_name, method, str(len(chosen))]
            for name, digits in (("accuracy", 1), ("auc", 3), ("auc_in_noisy_clients", 3)):
                row.append(with_error([r[name] for r in chosen if name in r], digits))
            row.append(f"{np.mean([r['seconds'] for r in chosen]):.0f}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def with_error(values: list[float], digits: int) -> str:
    """Return a mean with its standard error."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("path", nargs="?", help="MNIST; default: scikit-learn's digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.command == "table":
        print(table())
        return
    data_name = "digits" if options.path is None else "MNIST"
    for seed in options.seeds:
        for method in options.methods:
            if not JOURNAL.has(data_name, method, seed):
                JOURNAL.add(run(options.path, method, seed))


if __name__ == "__main__":
    main()
