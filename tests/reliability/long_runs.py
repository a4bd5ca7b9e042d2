"""A thousand rounds: with losses no NaN and no stop, and no memory that grows."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from random import Random

import lightning.pytorch as pl
import torch

from reliability.endings import Outcome
from reliability.plans import CLIENTS, LOSSES, Plan

ROUNDS = 1000
EARLY = 100
GROWTH = 0.01

LOSSY_RULES = (
    *("fedavg", "fedhaw", "scaffold II", "geometric median", "fedadam", "fedadp"),
    *("feddyn", "published fedhaw", "median", "fedhyper G", "multi-krum", "fedopt on fedhaw"),
)
MEMORY_PLANS = (
    Plan("fedhaw", model={"optimizer": "stepped"}, federation={"engine": "vectorized"}),
    Plan("scaffold I", ["erasure, reuse update"], model={"optimizer": "adam"}, federation={"optimizer_state": "kept"}),
    Plan(
        "fedavg",
        ["sparsified"],
        ["moon"],
        {"norm": True},
        {"buffers": "local", "engine": "sequential"},
        drops_last=True,  # a batch of one sample is none for BatchNorm
    ),
    Plan("fedadam", ["erasure, downlink, reuse"], model={"optimizer": "momentum"}, federation={"storage": "host"}),
)


def lossy(number: int, random: Random, folder: Path) -> Outcome:
    """Train for a thousand rounds over links that lose messages."""
    plan = Plan(
        rule=LOSSY_RULES[number % len(LOSSY_RULES)],
        channels=[list(LOSSES)[number % len(LOSSES)]],
        model={"optimizer": "sgd"},
        federation={**common(random), "engine": ("sequential", "vectorized")[number // 2 % 2], "num_clients": 7},
    )
    module = plan.net()
    trainer = plan.trainer(ROUNDS, [])
    trainer.fit(module, plan.data())
    losses = [row["train_loss"] for row in history(trainer) if "train_loss" in row]
    situation = f"{len(losses)} rounds with a loss, the last {losses[-1]:.3g}: {plan}"
    if trainer.global_step != ROUNDS:
        return Outcome(False, "rounds are missing", f"{trainer.global_step} rounds. {situation}")
    if not all(bool(torch.isfinite(value).all()) for value in module.state_dict().values()):
        return Outcome(False, "the model is not finite", situation)
    return Outcome(True, "finite to the end", situation)


def common(random: Random) -> dict[str, object]:
    return {"num_clients": CLIENTS, "alpha": 5.0, "seed": random.randrange(1000), "client_eval": False}


def history(trainer: pl.Trainer) -> list[dict[str, float]]:
    """Return the rows of the run's history."""
    return next(callback.metrics for callback in trainer.callbacks if type(callback).__name__ == "RunHistory")


class ResidentSet(pl.Callback):
    """Measures the memory of this process after some rounds."""

    def __init__(self, *rounds: int) -> None:
        self.rounds = rounds
        self.bytes: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 in self.rounds:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))


def memory(number: int, random: Random, folder: Path) -> Outcome:
    """Compare the resident set after the last round with that after a tenth of the rounds."""
    plan = MEMORY_PLANS[number % len(MEMORY_PLANS)]
    resident = ResidentSet(EARLY, ROUNDS)
    plan.federation = {**common(random), **plan.federation}
    plan.trainer(ROUNDS, [resident]).fit(plan.net(), plan.data())
    early, late = resident.bytes
    growth = late / early - 1
    situation = f"{growth:+.2%} from {early / 2**20:.1f} MiB after {EARLY} rounds: {plan}"
    return Outcome(growth <= GROWTH, "within 1 %" if growth <= GROWTH else "grows", situation)


TRIALS = {"lossy": lossy, "memory": memory}
