"""Lightly: SimCLR with its projection head, loss and transform, and its linear classifier.

The classifier is a LightningModule of `pytorch_lightning`, which the alias makes another name of `lightning.pytorch`.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from common import Setting, Trained, fitted, hold
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.utils.benchmarking import LinearClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

import lightning_fedhaw.alias_pytorch_lightning  # noqa: F401  before lightly


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        pool = nn.AdaptiveAvgPool2d(1)
        self.backbone = nn.Sequential(convolution, nn.BatchNorm2d(16), nn.ReLU(), pool, nn.Flatten())
        self.projection_head = SimCLRProjectionHead(16, 32, 16)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: tuple[list[Tensor], ...], batch_idx: int) -> Tensor:
        first, second = batch[0]
        loss = self.criterion(self(first), self(second))
        self.log("train_loss_ssl", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


def two_views(image: object) -> list[Tensor]:
    """Make two views without a draw, for weights that are compared: augmentations draw in the data loader."""
    view = ToTensor()(image)
    return [view, view.flip(-1)]


def train(setting: Setting) -> Trained:
    transform = two_views if setting.comparable else SimCLRTransform(input_size=16)
    images = LightlyDataset.from_torch_dataset(FakeData(64, (3, 16, 16), 4), transform=transform)
    loader = DataLoader(images, batch_size=16, shuffle=not setting.comparable, drop_last=setting.comparable)
    return fitted(setting, SimCLR(), loader)


def train_classifier(setting: Setting) -> Trained:
    images = FakeData(64, (3, 16, 16), 4, transform=ToTensor())
    loader = DataLoader(images, batch_size=16, shuffle=not setting.comparable)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = LinearClassifier(
        backbone, batch_size_per_device=16, feature_dim=16, num_classes=4, topk=(1, 2), lr=0.1
    )
    return fitted(setting, classifier, loader, DataLoader(images, batch_size=16))


if __name__ == "__main__":
    hold("lightly", train, case="SimCLR")
    schedule = "its schedule counts steps, and a round is one"
    hold("lightly", train_classifier, case="linear classifier, with the alias", why_not_equal=schedule)
