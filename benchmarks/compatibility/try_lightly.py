"""Lightly: SimCLR with its projection head, loss and transform, as in its documentation."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from common import Setting, Trained, fitted, hold
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor


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


if __name__ == "__main__":
    hold("lightly", train)
