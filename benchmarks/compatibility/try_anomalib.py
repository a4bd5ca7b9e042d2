"""Anomalib: its feature-reconstruction model on drawn images, trained by its `Engine`."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Fre, Ganomaly
from common import Setting, Trained, hold
from PIL import Image


@cache
def images() -> str:
    """Draw a folder of images."""
    root = Path(tempfile.mkdtemp())
    generator = np.random.default_rng(0)
    for folder, count in (("good", 24), ("bad", 8)):
        (root / folder).mkdir()
        for index in range(count):
            pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8)
            if folder == "bad":
                pixels[8:16, 8:16] += 120
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return str(root)


class SameOrder(Folder):
    def train_dataloader(self) -> torch.utils.data.DataLoader:
        loader = super().train_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)


def trained_with(setting: Setting, model: torch.nn.Module) -> Trained:
    folder = SameOrder if setting.comparable else Folder
    data = folder(
        "drawn",
        normal_dir="good",
        abnormal_dir="bad",
        root=images(),
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        seed=0,
    )
    arguments = {**setting.arguments, "enable_checkpointing": True}
    engine = Engine(**arguments)
    engine.fit(model=model, datamodule=data)
    return Trained(engine.trainer, model)


def train(setting: Setting) -> Trained:
    size = Fre.configure_pre_processor(image_size=(64, 64))
    model = Fre("resnet18", "layer3", pre_trained=False, input_dim=256 * 2 * 2, latent_dim=16, pre_processor=size)
    return trained_with(setting, model)


def train_adversarial(setting: Setting) -> Trained:
    """Train a model with two optimizers that it steps itself."""
    size = Ganomaly.configure_pre_processor(image_size=(32, 32))
    model = Ganomaly(batch_size=4, n_features=8, latent_vec_size=8, pre_processor=size)
    return trained_with(setting, model)


if __name__ == "__main__":
    hold("anomalib", train, case="FRE", own_trainer=False)
    hold("anomalib", train_adversarial, case="GANomaly", own_trainer=False)
