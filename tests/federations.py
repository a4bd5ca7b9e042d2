"""Small real federations that tests are made of."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import FedAvgCallback, FederatedTrainer

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "accelerator": "cpu",
}


def samples(count: int = 120, features: int = 6, classes: int = 3, seed: int = 0, dtype=torch.float32) -> TensorDataset:
    """Learnable classification samples."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=g, dtype=dtype)
    rule = torch.randn(features, classes, generator=torch.Generator().manual_seed(99), dtype=dtype)
    return TensorDataset(x, (x @ rule).argmax(1))


def loader(count: int = 120, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    """A shuffled training loader."""
    return DataLoader(samples(count), batch_size=batch_size, shuffle=True, **kwargs)


def val_loader() -> DataLoader:
    """Validation data."""
    return DataLoader(samples(60, seed=1), batch_size=32)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum, where a spawned process can find it."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Classifier(pl.LightningModule):
    """An ordinary module: nothing in it knows of a federation."""

    def __init__(
        self,
        optimizer: Any = None,
        hidden: int = 8,
        norm: bool = False,
        dropout: float = 0.0,
        seed: int = 3,
        classes: int = 3,
    ):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Linear(6, hidden)]
            layers += [nn.BatchNorm1d(hidden)] if norm else []
            layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)]
            self.net = nn.Sequential(*layers)
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=classes)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        z = self.net(x)
        self.log("val_loss", cross_entropy(z, y))
        self.accuracy(z, y)
        self.log("val_acc", self.accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def flat(module: nn.Module) -> Tensor:
    """All parameters and floating buffers as one vector."""
    tensors = [p.detach() for p in module.parameters()] + [b for b in module.buffers() if b.is_floating_point()]
    return torch.cat([t.flatten().double() for t in tensors])


def trainer(rounds: int = 3, rule: Any = None, callbacks: Any = (), **kwargs: Any) -> FederatedTrainer:
    """A quiet federated trainer with four IID-ish clients."""
    kwargs = {**QUIET, "num_clients": 4, "alpha": 10.0, **kwargs}
    return FederatedTrainer(rounds=rounds, callbacks=[rule or FedAvgCallback(), *callbacks], **kwargs)


def train(module: nn.Module | None = None, data: Any = None, val: Any = None, **kwargs: Any):
    """Fit and return trainer and module."""
    module = module or Classifier()
    runner = trainer(**kwargs)
    runner.fit(module, data or loader(), val)
    return runner, module
