"""A model and its data, as in any Lightning project: nothing here knows that they are trained in a federation."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A small network. Its arguments are `model.hidden` and `model.lr` in config.yaml and on the command line.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate of the clients.
    """

    def __init__(self, hidden: int = 32, lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of one client."""
        inputs, labels = batch
        loss = cross_entropy(self.net(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Evaluate the global model after each round, and at the end each client's own samples."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of a client."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Spirals(pl.LightningDataModule):
    """Three spirals of generated points. Put your own data in their place; `data.batch_size` is an argument.

    Args:
        count: Training samples.
        batch_size: Samples in a batch of a client.
    """

    def __init__(self, count: int = 3000, batch_size: int = 32) -> None:
        super().__init__()
        self.count = count
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Generate the points."""
        self.train = spirals(self.count, seed=0)
        self.val = spirals(600, seed=1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all training data: the federation splits it over the clients, by its labels."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the data on which the global model is validated after each round."""
        return DataLoader(self.val, batch_size=600)


def spirals(count: int, seed: int) -> TensorDataset:
    """Return points on three spirals, and the number of each one's spiral."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator).sqrt()
    angle = 4 * radius + labels * 2 * torch.pi / 3
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = 0.03 * torch.randn(count, 2, generator=generator)
    return TensorDataset(3 * (points + noise), labels)
