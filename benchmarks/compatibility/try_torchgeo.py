"""TorchGeo: its classification task and its base data module, on drawn images; and its geographic samplers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import rasterio
import torch
from common import Setting, Trained, fitted, hold
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.datamodules import GeoDataModule, NonGeoDataModule
from torchgeo.datasets import NonGeoDataset, RasterDataset
from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask


class Drawn(NonGeoDataset):
    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.images = torch.rand(96, 3, 32, 32, generator=generator)
        self.labels = torch.randint(4, (96,), generator=generator)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}

    def __len__(self) -> int:
        return len(self.images)


class DrawnDataModule(NonGeoDataModule):
    mean = torch.tensor(0.5)
    std = torch.tensor(0.25)

    def __init__(self, comparable: bool) -> None:
        super().__init__(Drawn, batch_size=4)
        self.comparable = comparable
        if not comparable:
            self.train_aug = K.AugmentationSequential(
                K.Normalize(self.mean, self.std), K.RandomHorizontalFlip(p=0.5), data_keys=None, keepdim=True
            )

    def setup(self, stage: str) -> None:
        self.train_dataset = Drawn("train")
        self.val_dataset = Drawn("val")

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.comparable:
            return super().train_dataloader()
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.collate_fn)


def train(setting: Setting) -> Trained:
    task = ClassificationTask(model="mobilenetv3_small_050", in_channels=3, num_classes=4, lr=1e-3, patience=100)
    return fitted(setting, task, datamodule=DrawnDataModule(setting.comparable))


class Rasters(RasterDataset):
    filename_glob = "image_*.tif"


class GeographicDataModule(GeoDataModule):
    def __init__(self, root: str) -> None:
        super().__init__(Rasters, batch_size=4, patch_size=16, length=16, paths=root)

    def setup(self, stage: str) -> None:
        self.train_dataset = self.dataset_class(**self.kwargs)
        self.train_batch_sampler = RandomBatchGeoSampler(
            self.train_dataset, self.patch_size, self.batch_size, self.length
        )
        self.val_dataset = self.train_dataset
        self.val_sampler = GridGeoSampler(self.val_dataset, self.patch_size, self.patch_size)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return {"image": batch["image"].float(), "mask": (batch["image"][:, 0] > 128).long()}


def train_geographic(setting: Setting) -> Trained:
    """Train on patches that a geographic sampler draws from rasters."""
    root = tempfile.mkdtemp()
    generator = np.random.default_rng(0)
    place = rasterio.transform.from_origin(0, 640, 10, 10)
    profile = {"driver": "GTiff", "height": 64, "width": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(Path(root) / "image_0.tif", "w", transform=place, **profile) as file:
        file.write(generator.integers(0, 255, (3, 64, 64), dtype=np.uint8))
    task = SemanticSegmentationTask(model="fcn", in_channels=3, num_classes=2, num_filters=4)
    return fitted(setting, task, datamodule=GeographicDataModule(root))


if __name__ == "__main__":
    # Its data modules leave out an incomplete last batch, so every client needs a full one: no extreme label skew.
    hold("torchgeo", train, case="classification", rule_arguments={"alpha": 10.0})
    hold("torchgeo", train_geographic, case="segmentation, geographic sampler")
