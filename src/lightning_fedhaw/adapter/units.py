"""Warns where a number was chosen in batches and now counts rounds.

In federated training a step of the trainer is a communication round. A learning-rate schedule or a moving average that
was set up for thousands of batches hardly begins in a run of twenty rounds, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import lr_scheduler

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of

# The attribute of a scheduler that holds the number of its steps after which it ends or changes.
_LENGTHS: dict[type[lr_scheduler.LRScheduler], str] = {
    lr_scheduler.OneCycleLR: "total_steps",
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.PolynomialLR: "total_iters",
    lr_scheduler.StepLR: "step_size",
}


def warn_of_units(trainer: pl.Trainer, rounds: int) -> None:
    """Warn of schedules and averages that are longer than the run.

    Args:
        trainer: The trainer, when ``fit`` begins.
        rounds: The rounds of the run; nothing is said if the number is not limited.
    """
    if rounds < 1:
        return
    for config in trainer.lr_scheduler_configs:
        for sentence in _schedule_sentences(config, rounds):
            rank_zero_warn(sentence)
    for sentence in _average_sentences(callbacks_of(trainer), rounds):
        rank_zero_warn(sentence)


def _schedule_sentences(config: LRSchedulerConfig, rounds: int) -> Iterator[str]:
    """Describe what in a schedule does not fit the run.

    A schedule with ``interval="epoch"`` counts rounds as it counted epochs, so its numbers keep their meaning; only
    ``OneCycleLR`` is usually made for steps whatever its interval.
    """
    counts_steps = config.interval == "step"
    for scheduler in _parts(config.scheduler):
        name = type(scheduler).__name__
        if not counts_steps and not isinstance(scheduler, lr_scheduler.OneCycleLR):
            continue
        length = _length(scheduler)
        if length is not None and length > rounds:
            yield (
                f"The learning-rate schedule `{name}` is set to {length} steps, and this run has {rounds}: in federated"
                " training a schedule is stepped once per round. Set it to the number of rounds, for example by"
                " `trainer.estimated_stepping_batches`."
            )
        if isinstance(scheduler, lr_scheduler.LambdaLR) and _still_rises(scheduler, rounds):
            factor = scheduler.lr_lambdas[0](rounds - 1)
            yield (
                f"The learning-rate schedule `{name}` is still warming up when this run ends, at {factor:.3g} times the"
                f" rate: it is stepped once per round, {rounds} times in all. Count its warm-up in rounds."
            )


def _parts(scheduler: object) -> Iterator[object]:
    """Yield a schedule and those that it consists of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _length(scheduler: object) -> int | None:
    """Return after how many steps a schedule ends or changes; None where it cannot be known."""
    for kind, attribute in _LENGTHS.items():
        if isinstance(scheduler, kind):
            return int(getattr(scheduler, attribute))
    if isinstance(scheduler, (lr_scheduler.MultiStepLR, lr_scheduler.SequentialLR)):
        # A sequence of schedules keeps its milestones under a protected name.
        milestones = getattr(scheduler, "milestones", None) or getattr(scheduler, "_milestones", None) or ()
        return max(milestones, default=None)
    return None


def _still_rises(scheduler: lr_scheduler.LambdaLR, rounds: int) -> bool:
    """Return whether a schedule of the user's own has only risen when the run ends, and would rise further."""
    factors = []
    for round_idx in (*range(rounds), 2 * rounds):
        factors.append(float(scheduler.lr_lambdas[0](round_idx)))
    return len(factors) > 2 and all(later > earlier for earlier, later in pairwise(factors))


def _average_sentences(callbacks: Sequence[pl.Callback], rounds: int) -> Iterator[str]:
    """Describe the moving averages of weights whose memory is longer than the run."""
    # Not every version of Lightning has it.
    kind = getattr(stock, "EMAWeightAveraging", None)
    if kind is None:
        return
    for callback in callbacks:
        if not isinstance(callback, kind):
            continue
        average = callback._kwargs.get("avg_fn")
        if average is None:
            continue
        # What is left of the old value after one update is the decay.
        decay = float(average(torch.tensor(1.0), torch.tensor(0.0), 1))
        interval = int(callback.update_every_n_steps)
        if 0 < decay < 1 and interval / (1 - decay) > rounds:
            yield (
                f"`{type(callback).__name__}` with `decay={decay:.6g}` averages over about {interval / (1 - decay):.0f}"
                f" updates, and it is updated once per round: this run has {rounds}, after which"
                f" {decay ** (rounds / interval):.0%} of the average is still the initial model. Choose `decay` for"
                f" rounds, such as {1 - 5 / max(rounds, 10):.2g}."
            )
