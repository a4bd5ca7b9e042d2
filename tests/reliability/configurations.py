"""Federations with anything in their arguments and their data: each ends with a result or with a sentence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fedhaw as fl
from federations import samples
from reliability import endings, plans
from reliability.endings import Outcome

ROUNDS = 2

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**70, 0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "keep", "average", b"x", [], [1], [1, 2, 3, 4, 5], [0.5] * 5, [math.nan] * 5, ["x"] * 5, (), {}, {0: 1}),
    *({"x": "keep"}, {"*": "local"}, {"*": 3}, set(), 1j, object(), int, len, print, range(5), np.int64(2), np.nan),
    *(np.float32(0.5), np.array([1, 2, 3]), torch.tensor(2), torch.tensor([0.5, 0.5]), torch.tensor(math.nan)),
    *(torch.float32, torch.int64, torch.bfloat16, torch.optim.SGD, torch.nn.Linear(1, 1)),
)
"""Values for any argument, wrong ones and right ones of a wrong place."""

OPTIONS = tuple(fl.FederationOptions.__dataclass_fields__)

RULES = tuple(getattr(fl, name) for name in fl.__all__ if name.endswith("Callback") and name != "FederatedCallback")
CHANNELS = tuple(getattr(fl, name) for name in fl.__all__ if name.endswith("Channel"))
OBJECTIVES = (fl.FedProx, fl.FedNTD, fl.MOON)
PARTITIONERS = tuple(getattr(fl, name) for name in fl.__all__ if name.endswith("Partitioner"))
SAMPLERS = tuple(getattr(fl, name) for name in fl.__all__ if name.endswith("Sampler"))

SOUND: dict[str, tuple[Any, ...]] = {
    "probability": (0.3, 0.0, 1.0, [0.1, 0.2, 0.3, 0.4, 1.0]),
    "rate": (1e-5, 1e-2, 0.5),
    "bits": (1, 4, 8, 32),
    "fraction": (0.1, 1.0),
    "snr_db": (10.0, -300.0, 300.0),
    "clip": (0.5, 1e-12),
    "noise_multiplier": (0.1, 1e6),
    "deadline": (1.0, 1e-9),
    "seconds_per_sample": (0.03, 10.0),
    "alpha": (0.1, 1e-6, 1e6),
    "sigma": (0.5,),
    "rho": (4.0, 1e6),
    "base": (fl.IIDPartitioner(), fl.DirichletPartitioner(0.5)),
    "keys": (list(range(5)) * 24, [0] * 120, ["a", "b", "c"] * 40),
    "indices": ([[0, 1, 2], [3, 4], [5], [6, 7], [8, 9]], [[0], [0]], [[500]], [[]]),
    "clients_per_round": (1, 3, 0.5),
    "cohorts": ([[0, 1], [2, 3, 4]], [[9]], [[]]),
    "representation": ("body", "nothing"),
    "mean": (0.6, 0.0, 1.0),
    "server_epochs": (1, 0, 3),
    "packet_bytes": (64, 1),
    "lr": (0.01, 1e-30, 1e30),
    "upper": ("net.0", "net.*.bias", "nothing"),
}
"""Values that are sound, or just about, for arguments that have no default."""


TOGETHER = ("snr_db", "probability", "sigma")
"""Arguments with a default of ``None`` that stands for another argument."""


def made(kind: type, random: Random, odds: float, **others: Any) -> Any:
    """Create an object of a class with some arguments that are sound and some that may be anything."""
    chosen: dict[str, Any] = dict(others)
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.default is parameter.empty or name in TOGETHER or (name in SOUND and random.random() < 0.2):
            chosen[name] = random.choice(SOUND.get(name, ODD))
        if random.random() < odds:
            chosen[name] = random.choice(ODD)
    print(f"{kind.__name__}({chosen})")
    return kind(**chosen)


def data_sets(*, norm: bool) -> dict[str, Callable[[], Any]]:
    """Name the data that a federation may be given, by the kind of module."""
    ordinary = samples(120)
    inputs, labels = ordinary.tensors
    return {
        "ordinary": lambda: ordinary,
        "a loader": lambda: DataLoader(ordinary, batch_size=7, shuffle=True, drop_last=norm),
        "few samples": lambda: samples(7),
        "one sample": lambda: samples(1),
        "no samples": lambda: TensorDataset(inputs[:0], labels[:0]),
        "NaN": lambda: TensorDataset(torch.full_like(inputs, torch.nan), labels),
        "one NaN": lambda: TensorDataset(with_value(inputs, torch.nan), labels),
        "infinity": lambda: TensorDataset(with_value(inputs, torch.inf), labels),
        "huge": lambda: TensorDataset(inputs * 1e30, labels),
        "one class": lambda: TensorDataset(inputs, torch.zeros_like(labels)),
        "list of clients": lambda: [samples(20 + client, seed=client) for client in range(5)],
        "lists of unequal clients": lambda: [samples(1), samples(30)],
        "no list of clients": lambda: [],
        "a number": lambda: 3,
        "nothing": lambda: None,
    }


def with_value(inputs: Tensor, value: float) -> Tensor:
    spoilt = inputs.clone()
    spoilt[5, 2] = value
    return spoilt


def federation(random: Random, odds: float, *, norm: bool) -> tuple[bool, dict[str, Any], list[Any], dict[str, Any]]:
    """Draw whether a stock trainer runs it, options, callbacks and arguments of Lightning's trainer."""
    is_stock = random.random() < 0.3
    chosen = plans.options(random, norm=norm)
    for name in OPTIONS:
        if random.random() < odds / 8:
            chosen[name] = random.choice(ODD)
    if random.random() < 0.2:
        chosen["partitioner"] = made(random.choice(PARTITIONERS), random, odds / 2)
        chosen.pop("alpha", None)
    if random.random() < 0.2:
        chosen["sampler"] = made(random.choice(SAMPLERS), random, odds / 2)
        chosen.pop("clients_per_round", None)
    if random.random() < 0.05:
        chosen["num_clients"] = random.choice([1, 2, 100, 1000])
    print(chosen)
    callbacks = [made(random.choice(RULES), random, odds / 4, **(chosen if is_stock else {}))]
    for kind in random.sample(CHANNELS, random.choice([0, 0, 1, 2])):
        callbacks.append(made(kind, random, odds / 4))
    for kind in random.sample(OBJECTIVES, random.choice([0, 0, 0, 1])):
        callbacks.append(made(kind, random, odds / 4))
    lightning = {
        "precision": random.choice(["32-true"] * 4 + ["64-true", "bf16-mixed", "bf16-true"]),
        "accumulate_grad_batches": random.choice([1, 1, 1, 3]),
        "gradient_clip_val": random.choice([None, None, 0.5]),
        "limit_train_batches": random.choice([1.0, 1.0, 1.0, 2]),
        "check_val_every_n_epoch": random.choice([1, 1, 2]),
        "num_sanity_val_steps": random.choice([0, 2]),
    }
    return is_stock, chosen, callbacks, lightning


def play(random: Random, folder: Path) -> Outcome:
    """Create and train one federation."""
    norm = random.random() < 0.2
    odds = random.choice([0.0, 0.0, 0.05, 0.2])
    is_stock, chosen, callbacks, lightning = federation(random, odds, norm=norm)
    name = random.choice(["ordinary"] * 20 + list(data_sets(norm=norm)))
    model = {"optimizer": random.choice(list(plans.OPTIMIZERS)), "norm": norm, "dropout": 0.1}
    print(name, model, lightning)
    common = {**plans.QUIET, "devices": 1, "default_root_dir": folder, **lightning}
    trainer: pl.Trainer
    if is_stock:
        trainer = pl.Trainer(max_epochs=ROUNDS, callbacks=callbacks, **common)
    else:
        trainer = fl.FederatedTrainer(rounds=ROUNDS, callbacks=callbacks, **chosen, **common)
    module = plans.Net(**model)
    before = state_of(module)
    data = data_sets(norm=norm)[name]()
    if name == "a loader" or name == "nothing":
        trainer.fit(module, data)
    else:
        proxy = random.choice([None, 24, 24, 24])
        # BatchNorm refuses a batch of one sample, which is the module's own error.
        size = 7 if norm else random.choice([1, 7, 7, 7, 7, 500])
        batches = {"batch_size": size, "drop_last": norm}
        print(batches, proxy)
        trainer.fit(module, fl.FederatedDataModule(data, val=samples(40, seed=1), proxy=proxy, **batches))
    for key, value in module.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            return Outcome(False, "silent NaN", f"{key}: {value.flatten()[:3].tolist()}")
    moved = not torch.equal(before, state_of(module))
    return Outcome(True, "a result" if moved else "a result, the model did not move")


def state_of(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in module.parameters()])


def trial(number: int, random: Random, folder: Path) -> Outcome:
    """Play one federation, and classify its end."""
    try:
        return play(random, folder)
    except Exception as error:
        outcome = endings.of_error(error)
        if not outcome.passed:
            notes = "; ".join(getattr(error, "__notes__", []))
            return Outcome(False, outcome.label, f"{outcome.detail} {notes}")
        print(outcome.detail)
        return outcome
