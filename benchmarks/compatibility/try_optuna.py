"""Optuna: a study whose trials train by rounds, with the pruning callback of optuna-integration, as in its examples."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import lightning.pytorch as pl
import optuna
import torch
from common import Setting, Trained, fitted, hold
from optuna_integration import PyTorchLightningPruningCallback
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Network(pl.LightningModule):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        first = torch.nn.Linear(16, hidden)
        self.layers = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(hidden, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train(setting: Setting) -> Trained:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 16, generator=generator)
    y = x[:, :4].argmax(1)
    results: list[Trained] = []

    def objective(trial: optuna.Trial) -> float:
        network = Network(trial.suggest_int("hidden", 8, 32), trial.suggest_float("dropout", 0.1, 0.3))
        train_loader = DataLoader(TensorDataset(x[:128], y[:128]), batch_size=16, shuffle=not setting.comparable)
        val_loader = DataLoader(TensorDataset(x[128:], y[128:]), batch_size=16)
        pruning = PyTorchLightningPruningCallback(trial, monitor="val_loss")
        trained = fitted(
            replace(setting, callbacks=deepcopy(setting.callbacks)),
            network,
            train_loader,
            val_loader,
            more={"callbacks": [pruning]},
        )
        results.append(trained)
        return float(trained.trainer.callback_metrics["val_loss"])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A loss above the bound prunes: the first study has none, the second one has no other.
    for bound, state, epochs in ((9.0, "COMPLETE", setting.epochs), (0.0, "PRUNED", 1)):
        pruner = optuna.pruners.ThresholdPruner(upper=bound)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0), pruner=pruner)
        study.optimize(objective, n_trials=1)
        assert study.trials[0].state.name == state
        assert sorted(study.trials[0].intermediate_values) == list(range(epochs))
    return results[0]


if __name__ == "__main__":
    hold("optuna", train, others=("optuna-integration",))
