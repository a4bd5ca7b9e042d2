"""Darts: its N-BEATS forecaster. It imports `pytorch_lightning`; see `lightning_fedhaw.alias_pytorch_lightning`."""

from __future__ import annotations

import sys

if "--no-alias" not in sys.argv:
    import lightning_fedhaw.alias_pytorch_lightning  # noqa: F401  before darts

import lightning.pytorch as pl
import numpy as np
from common import Setting, Trained, hold
from darts import TimeSeries
from darts.models import NBEATSModel


def train(setting: Setting) -> Trained:
    generator = np.random.default_rng(0)
    times = np.arange(120)
    values = np.sin(times / 5) + 0.05 * generator.normal(size=120)
    series = TimeSeries.from_values(values.astype(np.float32))
    by_user = setting.trainer_class is not pl.Trainer
    arguments = setting.arguments
    arguments.pop("max_epochs")
    arguments.pop("default_root_dir")
    model = NBEATSModel(
        input_chunk_length=12,
        output_chunk_length=4,
        num_stacks=2,
        num_blocks=1,
        layer_widths=16,
        dropout=0.1,
        batch_size=8,
        n_epochs=setting.epochs,
        random_state=None,
        pl_trainer_kwargs=None if by_user else arguments,
    )
    loader = {"shuffle": not setting.comparable}
    model.fit(
        series[:80], val_series=series[80:], trainer=setting.trainer() if by_user else None, dataloader_kwargs=loader
    )
    return Trained(model.trainer, model.model)


if __name__ == "__main__":
    hold("darts", train, case="without the alias" if "--no-alias" in sys.argv else "with the alias")
