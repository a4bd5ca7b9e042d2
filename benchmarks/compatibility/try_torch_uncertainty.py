"""Torch-uncertainty: deep ensembles in one network (packed layers) with its classification routine and `TUTrainer`."""

from __future__ import annotations

import torch
from common import Setting, Trained, fitted, hold
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty import TUTrainer
from torch_uncertainty.layers import PackedLinear
from torch_uncertainty.routines import ClassificationRoutine
from torch_uncertainty.transforms import RepeatTarget

ESTIMATORS = 4


def packed() -> nn.Module:
    first = PackedLinear(16, 32, alpha=2, num_estimators=ESTIMATORS, first=True)
    last = PackedLinear(32, 4, alpha=2, num_estimators=ESTIMATORS, last=True)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.1), last)


def train(setting: Setting) -> Trained:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 16, generator=generator)
    y = x[:, :4].argmax(1)
    model = packed()
    routine = ClassificationRoutine(
        model=model,
        num_classes=4,
        loss=nn.CrossEntropyLoss(),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(ESTIMATORS),
        optim_recipe=torch.optim.Adam(model.parameters(), lr=1e-2),
    )
    if setting.trainer_class is Trainer:
        setting.trainer_class = TUTrainer
    train_loader = DataLoader(TensorDataset(x[:128], y[:128]), batch_size=16, shuffle=not setting.comparable)
    return fitted(setting, routine, train_loader, DataLoader(TensorDataset(x[128:], y[128:]), batch_size=16))


if __name__ == "__main__":
    hold("torch-uncertainty", train)
