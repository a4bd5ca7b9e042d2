"""GluonTS: its feed-forward forecaster, by `estimator.train`, and by its LightningModule with a data loader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Setting, Trained, fitted, hold
from gluonts.dataset.common import ListDataset
from gluonts.torch import SimpleFeedForwardEstimator
from gluonts.torch.batchify import batchify
from gluonts.torch.model.simple_feedforward.estimator import TRAINING_INPUT_NAMES
from torch.utils.data import DataLoader


def series() -> ListDataset:
    generator = np.random.default_rng(0)
    times = np.arange(80)
    targets = [10 + np.sin(times / 3 + shop) + 0.1 * generator.normal(size=80) for shop in range(12)]
    return ListDataset([{"start": pd.Period("2024-01-01", "D"), "target": target} for target in targets], freq="D")


def estimator(**trainer: Any) -> SimpleFeedForwardEstimator:
    return SimpleFeedForwardEstimator(
        prediction_length=6,
        context_length=12,
        hidden_dimensions=[16],
        batch_size=8,
        num_batches_per_epoch=10,
        trainer_kwargs=trainer,
    )


def train_as_documented(setting: Setting) -> Trained:
    arguments = {**setting.arguments, "enable_checkpointing": True}
    output = estimator(**arguments).train_model(series())
    return Trained(output.trainer, output.trained_net)


def floats(windows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in batchify(windows).items()}


def train(setting: Setting) -> Trained:
    """Cut the windows once, because the package's own loader is a stream without an end."""
    forecaster = estimator()
    module = forecaster.create_lightning_module()
    transformed = forecaster.create_transformation().apply(series(), is_train=True)
    splitter = forecaster._create_instance_splitter(module, "training")
    windows = [
        {name: window[name] for name in TRAINING_INPUT_NAMES}
        for _ in range(8)
        for window in splitter.apply(transformed)
    ]
    loader = DataLoader(windows, batch_size=8, shuffle=not setting.comparable, collate_fn=floats)
    return fitted(setting, module, loader)


if __name__ == "__main__":
    hold("gluonts", train, as_documented=train_as_documented)
