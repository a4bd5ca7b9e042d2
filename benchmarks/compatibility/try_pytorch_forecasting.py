"""PyTorch Forecasting: a temporal fusion transformer on drawn series, as in its tutorial."""

from __future__ import annotations

import numpy as np
import pandas as pd
from common import Setting, Trained, fitted, hold
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import QuantileLoss


def series() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"time": time, "shop": str(shop), "sales": 10.0 + np.sin(time / 3 + shop) + 0.1 * generator.normal()}
        for shop in range(6)
        for time in range(40)
    ]
    return pd.DataFrame(rows)


def train(setting: Setting) -> Trained:
    data = series()
    training = TimeSeriesDataSet(
        data[data.time < 34],
        time_idx="time",
        target="sales",
        group_ids=["shop"],
        max_encoder_length=12,
        max_prediction_length=6,
        static_categoricals=["shop"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["sales"],
        target_normalizer=GroupNormalizer(groups=["shop"]),
    )
    validation = TimeSeriesDataSet.from_dataset(training, data, predict=True, stop_randomization=True)
    # Without these two arguments it shuffles and leaves out the last batch.
    same_order = {"shuffle": False, "drop_last": False} if setting.comparable else {}
    train_loader = training.to_dataloader(train=True, batch_size=16, **same_order)
    val_loader = validation.to_dataloader(train=False, batch_size=16)
    model = TemporalFusionTransformer.from_dataset(
        training,
        learning_rate=0.01,
        hidden_size=8,
        attention_head_size=1,
        hidden_continuous_size=4,
        dropout=0.1,
        loss=QuantileLoss(),
        log_interval=-1,
        optimizer="adam",
    )
    return fitted(setting, model, train_loader, val_loader, more={"gradient_clip_val": 0.1})


if __name__ == "__main__":
    hold("pytorch-forecasting", train)
