"""DeepTab: its tabular network, trained by the `fit` of its scikit-learn interface."""

from __future__ import annotations

import tempfile

import numpy as np
import pandas as pd
from common import Setting, Trained, hold
from deeptab.models import MLPClassifier


def train(setting: Setting) -> Trained:
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(160, 4))
    table = pd.DataFrame(numbers, columns=["a", "b", "c", "d"])
    table["kind"] = np.where(numbers[:, 3] > 0, "x", "y")
    model = MLPClassifier()
    arguments = setting.arguments
    checkpoints = arguments.pop("enable_checkpointing")
    assert not checkpoints  # it always keeps the best model
    model.fit(
        table,
        (numbers[:, 0] > 0).astype(int),
        val_size=0.2,
        batch_size=16,
        random_state=0,
        shuffle=not setting.comparable,
        checkpoint_path=tempfile.mkdtemp(),
        rebuild=True,
        **arguments,
    )
    return Trained(model._trainer, model._task_model)


if __name__ == "__main__":
    hold("deeptab", train, own_trainer=False)
