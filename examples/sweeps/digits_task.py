"""What the sweeps train: an ordinary module and an ordinary data module, on scikit-learn's digits. No download."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitClassifier(pl.LightningModule):
    """A small multilayer perceptron.

    Args:
        lr: Learning rate of the clients.
        hidden: Width of its two hidden layers.
    """

    def __init__(self, lr: float = 0.05, hidden: int = 128) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        self.val_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """1,437 training images of 8x8 pixels, and 360 for validation.

    Args:
        batch_size: Samples in a batch.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels / 16.0, dtype=torch.float32)
        train, val = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        self.train, self.val = (TensorDataset(images[part], torch.as_tensor(labels[part])) for part in (train, val))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)
