"""Clients that the data itself names: LEAF's JSON files, and rows with a column that says whose they are.

    python examples/natural_clients.py

Without arguments it first writes small files in the form of LEAF's Shakespeare and in Hugging Face's form of rows, so
that it needs no download. For the data sets themselves, run LEAF's scripts and give their folder:

    python examples/natural_clients.py --leaf leaf/data/shakespeare/data
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_fedhaw import FedAvgCallback, FederatedTrainer
from lightning_fedhaw.data import LeafDataModule, RowsDataModule

ROLES = {"ROMEO": "but soft what light ", "JULIET": "o romeo wherefore art thou ", "NURSE": "peace i have done god "}


class NextLetter(pl.LightningModule):
    """Predicts the next character of a role, as LEAF's model of Shakespeare does, with a smaller network."""

    def __init__(self, letters: int = 80, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 8)
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, text: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(text))
        return self.head(outputs[:, -1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        text, letter = batch
        loss = cross_entropy(self(text), letter)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        text, letter = batch
        self.log("val_acc", (self(text).argmax(1) == letter).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Rating(pl.LightningModule):
    """A classifier whose batches are dictionaries, as those of Hugging Face's data sets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch["features"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch["features"]).argmax(1) == batch["label"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def write_leaf(folder: Path) -> Path:
    """Write a tiny federation in the form of LEAF's Shakespeare: 20 characters, and the next one."""
    for stage, repeats in (("train", 6), ("test", 2)):
        user_data = {}
        for role, line in ROLES.items():
            text = line * (repeats + 1)
            count = len(line) * repeats - 20
            windows = [text[begin : begin + 20] for begin in range(count)]
            user_data[role] = {"x": windows, "y": [text[begin + 20] for begin in range(count)]}
        sizes = [len(samples["y"]) for samples in user_data.values()]
        content = {"users": list(user_data), "num_samples": sizes, "user_data": user_data}
        path = folder / stage / "all_data.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def write_rows(path: Path, seed: int) -> Path:
    """Write rows of five users: who, four numbers, and a class."""
    draw = random.Random(seed)
    lines = []
    for number in range(300):
        features = [draw.gauss(0, 1) for _ in range(4)]
        row = {"user": f"user {number % 5}", "features": features, "label": int(features[0] + features[1] > 0)}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


def train(module: pl.LightningModule, data: pl.LightningDataModule, rounds: int) -> None:
    """Train a federation, and print its summary."""
    pl.seed_everything(0)
    trainer = FederatedTrainer(
        rounds=rounds,
        callbacks=[FedAvgCallback()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaf", type=Path, help="the folder with LEAF's `train` and `test`")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    folder = Path("natural_clients")
    leaf = LeafDataModule(args.leaf or write_leaf(folder / "leaf"), batch_size=10)
    print(f"clients: {', '.join(leaf.users[:10])}")
    train(NextLetter(), leaf, args.rounds)
    rows = RowsDataModule(
        write_rows(folder / "train.jsonl", 0),
        client="user",
        label="label",
        val=write_rows(folder / "val.jsonl", 1),
        batch_size=10,
    )
    print(f"clients: {', '.join(map(str, rows.clients))}")
    train(Rating(), rows, args.rounds)


if __name__ == "__main__":
    main()
