"""Federations drawn at random from all that the package offers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import lightning_fedhaw as fl
from federations import QUIET, samples
from lightning_fedhaw.data import FixedSequenceSampler, QuantitySkewPartitioner
from lightning_fedhaw.objectives import FedDynObjective, ScaffoldObjective

CLIENTS = 5
BATCH = 7

FEW = {"server_epochs": 2, "batch_size": 8, "lr": 0.01}

Factory = Callable[[], Any]

RULES: dict[str, Factory] = {
    "fedavg": fl.FedAvgCallback,
    "fedavg, uniform": partial(fl.FedAvgCallback, "uniform"),
    "fedavg, batches": partial(fl.FedAvgCallback, "batches"),
    "q-fedavg": fl.QFedAvgCallback,
    "fedhaw": fl.FedHAWCallback,
    "fedhaw, Adam": partial(fl.FedHAWCallback, hyper_optimizer=Adam, memory="host"),
    "published fedhaw": partial(fl.PublishedFedHAWCallback, 1e-3, 1e-1, normalize_by="lr*steps"),
    "published fedhaw, exact": partial(fl.PublishedFedHAWCallback, 1e-3, 1e-1, jacobian="exact", memory="host"),
    "fedhyper G": fl.FedHyperCallback,
    "fedhyper G+SL": partial(fl.FedHyperCallback, "G+SL"),
    "fedhyper G+CL": partial(fl.FedHyperCallback, "G+CL", normalize_by="norms", hyper_lr=0.1),
    "fedadp": fl.FedAdpCallback,
    "fedlws": fl.FedLWSCallback,
    "fednova": fl.FedNovaCallback,
    "scaffold II": fl.ScaffoldCallback,
    "scaffold I": partial(fl.ScaffoldCallback, "I", server_lr=0.5),
    "feddyn": partial(fl.FedDynCallback, 0.1),
    "fedopt, scheduled": partial(
        fl.FedOptCallback, partial(SGD, momentum=0.9), 0.5, lr_scheduler=partial(StepLR, step_size=1)
    ),
    "fedopt on fedhaw": lambda: fl.FedAvgMCallback(1.0, 0.5, rule=fl.FedHAWCallback()),
    "fedopt on scaffold": lambda: fl.FedOptCallback(rule=fl.ScaffoldCallback()),
    "fedavgm": fl.FedAvgMCallback,
    "fedadagrad": fl.FedAdagradCallback,
    "fedadam": fl.FedAdamCallback,
    "fedyogi": fl.FedYogiCallback,
    "fedlaw": partial(fl.FedLAWCallback, **FEW),
    "fedlaw, in stages": partial(fl.FedLAWCallback, "in_stages", server_epochs=14, batch_size=24),
    "feddf": partial(fl.FedDFCallback, **FEW),
    "fedbe": partial(fl.FedBECallback, samples=2, **FEW),
    "server fine-tuning": partial(fl.ServerFineTuningCallback, **FEW),
    "median": fl.CoordinateMedianCallback,
    "trimmed mean": fl.TrimmedMeanCallback,
    "krum": fl.KrumCallback,
    "multi-krum": fl.MultiKrumCallback,
    "geometric median": fl.GeometricMedianCallback,
}

LOSSES: dict[str, Factory] = {
    "erasure": partial(fl.ErasureChannel, 0.3),
    "erasure, discard": partial(fl.ErasureChannel, 0.3, fallback="discard"),
    "erasure, reuse update": partial(fl.ErasureChannel, 0.3, fallback="reuse_update"),
    "erasure, reuse model": partial(fl.ErasureChannel, 0.3, fallback="reuse_model"),
    "bursts": lambda: fl.ErasureChannel(burst=fl.GilbertElliott(0.3, 0.4, 0.05, 0.9), fallback="discard"),
    "erasure, downlink": partial(fl.ErasureChannel, 0.3, link="downlink"),
    "erasure, downlink, reuse": partial(fl.ErasureChannel, 0.3, link="downlink", fallback="reuse_model"),
    "deadline": partial(fl.StragglerChannel, 1.0, 0.03, client_spread=0.5),
    "availability": partial(fl.AvailabilityChannel, mean=0.6, period=3),
    "packets": partial(fl.PacketLossChannel, 0.2, 64, retries=1),
}

CHANNELS: dict[str, Factory] = {
    **LOSSES,
    "packets, last": partial(fl.PacketLossChannel, 0.3, 64, lost="last"),
    "noise": partial(fl.AWGNChannel, 20.0),
    "noise, downlink": partial(fl.AWGNChannel, noise_std=0.01, link="downlink"),
    "fading": partial(fl.FadingChannel, 20.0, k_factor=1.0, block=2),
    "bit flips": partial(fl.BitFlipChannel, 1e-2, bits=8),
    "quantized": partial(fl.QuantizationChannel, 6),
    "sparsified": partial(fl.SparsificationChannel, 0.3),
    "sparsified, random": partial(fl.SparsificationChannel, 0.3, "random"),
    "over the air": partial(fl.OverTheAirChannel, 30.0, 0.2),
    "privacy": partial(fl.DifferentialPrivacyChannel, 0.5, 0.1, delta=None),
}

OBJECTIVES: dict[str, Factory] = {
    "fedprox": partial(fl.FedProx, 0.1),
    "feddyn": partial(FedDynObjective, 0.1),
    "scaffold": ScaffoldObjective,
    "scaffold I": partial(ScaffoldObjective, "I"),
    "fedntd": fl.FedNTD,
    "moon": partial(fl.MOON, "body"),
}


def sgd(parameters: Any) -> Any:
    return SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> Any:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> Any:
    return Adam(parameters, lr=0.01)


def adamw(parameters: Any) -> Any:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def stepped(parameters: Any) -> Any:
    optimizer = SGD(parameters, lr=0.2, momentum=0.5)
    return [optimizer], [StepLR(optimizer, 1, 0.5)]


def annealed(parameters: Any) -> Any:
    optimizer = Adam(parameters, lr=0.02)
    # Above 0, because some rules divide by the rate.
    schedule = CosineAnnealingLR(optimizer, 6, eta_min=0.002)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS = {function.__name__: function for function in (sgd, momentum, adam, adamw, stepped, annealed)}


class Net(pl.LightningModule):
    """An ordinary module of a body and a head.

    Args:
        optimizer: A name in ``OPTIMIZERS``.
        norm: Whether it has BatchNorm.
        dropout: The share of dropout.
        hidden: The width, for checkpoints of some size.
        pause: Seconds that a step waits, for signals that arrive while a client trains.
    """

    def __init__(
        self, optimizer: str = "sgd", norm: bool = False, dropout: float = 0.0, hidden: int = 8, pause: float = 0.0
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.pause = pause
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layers: list[nn.Module] = [nn.Linear(6, hidden)]
            if norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(hidden, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.pause:
            time.sleep(self.pause)
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


@dataclass
class Plan:
    """A federation, by names that a person can read.

    Attributes:
        rule: Its name in ``RULES``.
        channels: Names in ``CHANNELS``.
        objectives: Names in ``OBJECTIVES``.
        model: Arguments of :class:`Net`.
        federation: The federation's options.
        lightning: Arguments of Lightning's trainer.
        is_stock: Whether a stock trainer runs it, with the rule as a callback.
        drops_last: Whether the last, smaller batch of a pass is left out.
    """

    rule: str = "fedavg"
    channels: list[str] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    federation: dict[str, Any] = field(default_factory=dict)
    lightning: dict[str, Any] = field(default_factory=dict)
    is_stock: bool = False
    drops_last: bool = False

    def callbacks(self) -> list[Any]:
        """Create the channels and objectives."""
        made: list[Any] = [CHANNELS[name]() for name in self.channels]
        made += [OBJECTIVES[name]() for name in self.objectives]
        return made

    def trainer(self, rounds: int, callbacks: list[Any], **others: Any) -> pl.Trainer:
        """Create a trainer.

        Args:
            rounds: The number of rounds.
            callbacks: Other callbacks.
            others: Arguments of Lightning's trainer that depend on the trial.
        """
        rule = RULES[self.rule]()
        common = {**QUIET, "devices": 1, "num_sanity_val_steps": 0, **self.lightning, **others}
        if self.is_stock:
            add_options(rule, self.federation)
            return pl.Trainer(max_epochs=rounds, callbacks=[rule, *self.callbacks(), *callbacks], **common)
        made = [rule, *self.callbacks(), *callbacks]
        return fl.FederatedTrainer(rounds=rounds, callbacks=made, **self.federation, **common)

    def data(self) -> fl.FederatedDataModule:
        """Create the data."""
        batch = {"batch_size": BATCH, "drop_last": self.drops_last}
        return fl.FederatedDataModule(samples(120), **batch, proxy=24, val=samples(40, seed=1))

    def net(self) -> Net:
        """Create the module."""
        return Net(**self.model)


def add_options(rule: Any, federation: dict[str, Any]) -> None:
    """Give a rule the federation's options, as its constructor would."""
    rule.options = rule.options.merged(fl.FederationOptions(**federation))


def drawn(random: Random, *, processes: int = 1) -> Plan:
    """Draw a federation that the package should run, or refuse for a reason of its own."""
    norm = random.random() < 0.4
    plan = Plan(
        rule=random.choice(list(RULES)),
        channels=some_channels(random),
        objectives=random.sample(list(OBJECTIVES), random.choice([0, 0, 0, 1])),
        model={"optimizer": random.choice(list(OPTIMIZERS)), "norm": norm, "dropout": random.choice([0.0, 0.2])},
        federation=options(random, norm=norm),
        is_stock=random.random() < 0.3,
        # BatchNorm refuses a batch of one sample, which is no business of a federation.
        drops_last=norm,
    )
    plan.lightning["precision"] = random.choice(["32-true"] * 4 + ["64-true", "bf16-mixed", "bf16-true"])
    if random.random() < 0.2:
        plan.lightning["gradient_clip_val"] = 0.5
    if random.random() < 0.1:
        plan.lightning["accumulate_grad_batches"] = 2
    if processes > 1:
        plan.lightning |= {"devices": processes, "strategy": "federated_notebook"}
        plan.is_stock = False
    return plan


def some_channels(random: Random) -> list[str]:
    """Draw channels of different classes: two of one class need names, and Lightning refuses them without."""
    names: dict[type, str] = {}
    for name in random.sample(list(CHANNELS), random.choice([0, 0, 1, 1, 2])):
        names[type(CHANNELS[name]())] = name
    return list(names.values())


def options(random: Random, *, norm: bool) -> dict[str, Any]:
    """Draw the federation's options, for a module with BatchNorm or without."""
    policies: list[Any] = ["average", "keep", "local", "recalibrate"]
    if norm:
        policies.append({"body.*": "local"})
    chosen: dict[str, Any] = {
        "num_clients": CLIENTS,
        "seed": random.randrange(1000),
        "engine": random.choice(["sequential", "vectorized", "auto"]),
        "optimizer_state": random.choice(["fresh", "kept"]),
        "buffers": random.choice(policies),
        "reduction": random.choice(["fast", "ordered"]),
        "storage": random.choice(["auto", "device", "host"]),
        "on_nonfinite": "exclude",
        "empty_round": random.choice(["skip", "skip", "skip", "follow"]),
        "client_eval": random.random() < 0.5,
    }
    chosen |= random.choice([{"alpha": 5.0}, {"partitioner": fl.IIDPartitioner()}, {}, split_by_quantity()])
    cohort: list[dict[str, Any]] = [{}, {"clients_per_round": 3}, {"clients_per_round": 0.6}]
    cohort += [{"sampler": fl.WeightedSampler(3)}, {"sampler": FixedSequenceSampler([[0, 1, 2], [2, 3, 4], [4, 0, 1]])}]
    chosen |= random.choice(cohort)
    work: list[dict[str, Any]] = [{}, {"local_epochs": 2}, {"local_epochs": 0.5}, {"local_steps": 3}]
    work += [{"local_steps": [1, 2, 3, 4, 5]}, {"local_epochs": {0: 1, 1: 2, 2: 1, 3: 1, 4: 2}}]
    chosen |= random.choice(work)
    if random.random() < 0.15:
        chosen["storage_dtype"] = random.choice([torch.bfloat16, torch.float64])
    if random.random() < 0.15:
        chosen["local_parameters"] = "head.*"
    if random.random() < 0.15:
        chosen["client_lr_scale"] = [1.0, 0.5, 1.0, 2.0, 0.1]
    if random.random() < 0.15:
        chosen["client_val_fraction"] = 0.2
    if random.random() < 0.1:
        chosen["chunk_memory"] = 20_000
    return chosen


def split_by_quantity() -> dict[str, Any]:
    return {"partitioner": QuantitySkewPartitioner(1.0, min_size=8)}


def every_round(folder: Path) -> ModelCheckpoint:
    """Keep the checkpoint of every round."""
    return ModelCheckpoint(folder, filename="rounds={step}", auto_insert_metric_name=False, save_top_k=-1)
