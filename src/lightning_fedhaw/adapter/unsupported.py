"""Refuses arguments and callbacks of a stock trainer that are not supported in federated training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

import lightning.pytorch as pl
from lightning.pytorch import callbacks as stock
from lightning.pytorch.accelerators import Accelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedhaw import arguments

# By name: not every version of Lightning has all of them.
_CALLBACKS: dict[str, str] = {
    "StochasticWeightAveraging": "it replaces learning-rate schedules and batch-norm statistics in the middle of a fit."
    " Average global models with `EMAWeightAveraging`",
    "BatchSizeFinder": "it runs trial fits of single batches. Give the clients' `batch_size`",
    "LearningRateFinder": "it runs trial fits of single batches. Give the clients' learning rate, or find one with a"
    " stock `Trainer`, without the rule",
    "BaseFinetuning": "it changes which parameters are trainable during `fit`, and clients and server must agree on"
    " what travels. Freeze before `fit`, or call `fit` once per stage",
    "ModelPruning": "it changes the set of parameters during `fit`. Prune before or after",
    "ThroughputMonitor": "it measures batches of a central loader. The run summary has the seconds per phase",
    "SpikeDetection": "it watches the loss of single batches and restarts the run without them. Use"
    ' `on_nonfinite="exclude"` for clients that diverge',
}

_SPREADS_ONE_MODEL = (
    "it spreads one model over the devices, and a federation spreads the clients, each with a whole model. Set"
    ' `strategy="federated"`'
)


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse those of Lightning's callbacks that have no meaning in a federation.

    Raises:
        ValueError: Naming the callback, the reason, and the remedy.
    """
    for name, reason in _CALLBACKS.items():
        kind = getattr(stock, name, None)
        if kind is None:
            continue
        for callback in callbacks:
            if isinstance(callback, kind):
                raise ValueError(
                    f"`callbacks`: {type(callback).__name__} is not supported in federated training: {reason}."
                )


def check_strategy(strategy: str | Strategy) -> None:
    """Refuse strategies that spread one model, before Lightning asks for the packages that they need.

    Args:
        strategy: The trainer's argument.

    Raises:
        ValueError: Naming the argument, what came, and the remedy.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if re.match(r"fsdp|deepspeed|model_?parallel|xla_fsdp", name, re.IGNORECASE):
        _refuse(f"strategy={name}", _SPREADS_ONE_MODEL)


def check_accelerator(accelerator: str | Accelerator | None) -> None:
    """Refuse Apple's GPUs.

    Args:
        accelerator: The argument or the attribute of a trainer.

    Raises:
        ValueError: Naming the argument, the reason, and the remedy.
    """
    if accelerator == "mps" or isinstance(accelerator, MPSAccelerator):
        _refuse(
            "accelerator=mps",
            "Apple's GPUs have no float64, in which sums over clients are kept, and no random states that could be"
            ' restored. Set `accelerator="cpu"`',
        )


def default_accelerator(accelerator: str | Accelerator, strategy: str | Strategy) -> str | Accelerator:
    """Return the accelerator of a trainer: the CPU where Lightning would choose Apple's GPU by itself.

    Args:
        accelerator: The trainer's argument.
        strategy: Its strategy; an object may have an accelerator of its own.
    """
    if accelerator == "auto" and isinstance(strategy, str) and MPSAccelerator.is_available():
        rank_zero_info(
            'A federation computes on the CPU here (`accelerator="cpu"`): Apple\'s GPU has no float64, in which sums'
            " over clients are kept."
        )
        return "cpu"
    return accelerator


def check_trainer(trainer: pl.Trainer, *, sync_batchnorm: bool = False) -> None:
    """Refuse arguments of a trainer that have no meaning in a federation.

    Args:
        trainer: The trainer.
        sync_batchnorm: Whether the trainer was given ``sync_batchnorm=True``, which it does not keep as an attribute.

    Raises:
        ValueError: Naming the argument, what came, the reason, and the remedy.
    """
    check_accelerator(trainer.accelerator)
    strategy = type(trainer.strategy)
    if not issubclass(strategy, (SingleDeviceStrategy, DDPStrategy)):
        _refuse(f"strategy={strategy.__name__}", _SPREADS_ONE_MODEL)
    if trainer.barebones:
        _refuse("barebones=True", "it turns off the logging that a round reports through. Turn off parts one by one")
    overfit_batches = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit_batches:
        _refuse(
            f"overfit_batches={overfit_batches}",
            "it repeats batches of one central loader. Use `limit_train_batches`, which counts per client and pass",
        )
    reload_epochs = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if reload_epochs:
        _refuse(
            f"reload_dataloaders_every_n_epochs={reload_epochs}",
            "the training data is assigned to the clients once. Remove it",
        )
    if sync_batchnorm:
        _refuse("sync_batchnorm=True", "clients never see each other's batches. Choose a policy with `buffers=`")
    _check_numbers(trainer)
    _check_validation_interval(trainer)


def _check_numbers(trainer: pl.Trainer) -> None:
    """Refuse numbers that Lightning accepts, and fails with in the middle of a run."""
    arguments.integer("accumulate_grad_batches", trainer.accumulate_grad_batches, minimum=1)
    if trainer.check_val_every_n_epoch is not None:
        arguments.integer("check_val_every_n_epoch", trainer.check_val_every_n_epoch, minimum=1)
    if trainer.gradient_clip_val is not None:
        arguments.number("gradient_clip_val", trainer.gradient_clip_val, infinite=True)


def _check_validation_interval(trainer: pl.Trainer) -> None:
    """Refuse a ``val_check_interval`` within a round."""
    # Lightning leaves the attribute out where the interval is a time.
    interval: object = getattr(trainer, "val_check_interval", None)
    rounds = trainer.check_val_every_n_epoch
    if isinstance(interval, float) and interval != 1.0:
        _refuse(
            f"val_check_interval={interval}",
            "validation sees global models, which exist between rounds only. Use `check_val_every_n_epoch`, in rounds",
        )
    if isinstance(interval, int) and interval > 1 and rounds is not None:
        _refuse(
            f"val_check_interval={interval}, check_val_every_n_epoch={rounds}",
            f"a round is one step. Use `check_val_every_n_epoch={interval}`",
        )


def _refuse(argument: str, reason: str) -> NoReturn:
    raise ValueError(f"`Trainer({argument})` is not supported in federated training: {reason}.")
