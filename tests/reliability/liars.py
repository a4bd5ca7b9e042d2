"""Robust rules with liars among the clients, up to the number that a rule states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import lightning_fedhaw as fl
from federations import QUIET, samples
from lightning_fedhaw.extending import Channel
from reliability.endings import Outcome
from reliability.plans import Net

CLIENTS = 11
ROUNDS = 3
VALUES = (1e3, 1e10, 1e20, 3e38)

RULES: dict[str, tuple[int, Callable[[int], Any]]] = {
    "median": (5, lambda liars: fl.CoordinateMedianCallback()),
    "trimmed mean": (5, fl.TrimmedMeanCallback),
    "krum": (4, fl.KrumCallback),
    "multi-krum": (4, fl.MultiKrumCallback),
    "geometric median": (5, lambda liars: fl.GeometricMedianCallback()),
}
"""The largest number of liars among eleven clients that a rule states to bear, and the rule for a number of them."""


def lies(value: float, size: int) -> dict[str, Tensor]:
    """Name the messages of a liar."""
    signs = torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
    one = torch.zeros(size)
    one[size // 2] = value
    return {
        "all": torch.full((size,), value),
        "negative": torch.full((size,), -value),
        "alternating": value * signs,
        "one number": one,
    }


class Liars(Channel):
    """Replaces the messages of the first clients, and remembers those of the others.

    Args:
        count: The number of liars.
        value: The largest number of their messages.
        lie: Its name.
        is_united: Whether all tell the same.
    """

    def __init__(self, count: int, value: float, lie: str, is_united: bool) -> None:
        super().__init__()
        self.count = count
        self.value = value
        self.lie = lie
        self.is_united = is_united
        self.honest: dict[int, Tensor] = {}

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        if client >= self.count:
            self.honest[client] = message.detach().double().clone()
            return message
        scale = 1.0 if self.is_united else 1 / (1 + client)
        return (scale * lies(self.value, message.numel())[self.lie]).to(message)


class Bounds(fl.FederatedCallback):
    """Compares every new global model with what the honest clients sent.

    Args:
        rule: The rule's name.
        channel: The liars.
    """

    def __init__(self, rule: str, channel: Liars) -> None:
        self.rule = rule
        self.channel = channel
        self.before = torch.empty(0)
        self.faults: list[str] = []

    def on_round_start(self, trainer: Any, pl_module: pl.LightningModule, round_idx: int, clients: list[int]) -> None:
        self.before = vector(pl_module)
        self.channel.honest.clear()

    def on_round_end(self, trainer: Any, pl_module: pl.LightningModule, report: Any) -> None:
        moved = vector(pl_module) - self.before
        if not bool(torch.isfinite(moved).all()):
            self.faults.append("the model is not finite")
            return
        honest = torch.stack(list(self.channel.honest.values()))
        fault = self.distance_fault(moved, honest) if self.rule == "geometric median" else range_fault(moved, honest)
        if fault:
            self.faults.append(fault)

    def distance_fault(self, moved: Tensor, honest: Tensor) -> str:
        """Compare with the bound of the geometric median: 2 (1 - q) / (1 - 2 q) times the largest honest distance."""
        share = self.channel.count / CLIENTS
        center = honest.mean(0)
        largest = (honest - center).norm(dim=1).max()
        bound = 2 * (1 - share) / (1 - 2 * share) * largest
        distance = (moved - center).norm()
        return "" if distance <= bound * (1 + 1e-4) else f"{distance:.3g} from the honest mean, at most {bound:.3g}"


def range_fault(moved: Tensor, honest: Tensor) -> str:
    """Compare each coordinate with the range of the honest ones, up to the rounding of float32."""
    slack = 1e-6 * (1 + honest.abs().amax(0))
    outside = torch.maximum(honest.amin(0) - slack - moved, moved - honest.amax(0) - slack).max()
    return "" if outside <= 0 else f"{outside:.3g} outside of the honest clients' range"


def vector(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


# A rule, a value, and one liar, two, or as many as the rule states.
CASES = tuple(product(RULES, VALUES, (1, 2, None)))


def trial(number: int, random: Random, folder: Path) -> Outcome:
    """Let liars take part in a few rounds, and compare each new model with the bounds."""
    rule, value, stated = CASES[number % len(CASES)]
    most, make = RULES[rule]
    count = stated or most
    channel = Liars(count, value, random.choice(list(lies(1.0, 2))), random.random() < 0.5)
    bounds = Bounds(rule, channel)
    situation = f"{rule}, {count} of {CLIENTS} liars, {value:g} {channel.lie}, united {channel.is_united}"
    trainer = fl.FederatedTrainer(
        rounds=ROUNDS,
        num_clients=CLIENTS,
        partitioner=fl.IIDPartitioner(),
        seed=random.randrange(1000),
        engine=random.choice(["sequential", "vectorized"]),
        client_eval=False,
        callbacks=[make(count), channel, bounds],
        **QUIET,
    )
    try:
        trainer.fit(Net(), fl.FederatedDataModule(samples(220), batch_size=10))
    except Exception as error:
        return Outcome(False, "the run ended", f"{type(error).__name__}: {error}. {situation}")
    if bounds.faults:
        return Outcome(False, "moved by the liars", f"{bounds.faults[0]}. {situation}")
    return Outcome(True, "within the bounds", situation)
