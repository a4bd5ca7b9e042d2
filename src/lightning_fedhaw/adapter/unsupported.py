"""What a stock trainer can be told that is not supported in federated training, and the sentence for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import callbacks as stock
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

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


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse Lightning's callbacks that mean nothing here.

    Raises:
        ValueError: Naming the callback, why, and the remedy.
    """
    for name, why in _CALLBACKS.items():
        kind = getattr(stock, name, None)
        for callback in callbacks:
            if kind is not None and isinstance(callback, kind):
                raise ValueError(
                    f"`callbacks`: {type(callback).__name__} is not supported in federated training: {why}."
                )


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that spread one model, before Lightning asks for what they need.

    Raises:
        ValueError: Naming the argument, what came, and the remedy.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if re.match(r"fsdp|deepspeed|model_?parallel|xla_fsdp", name, re.IGNORECASE):
        raise ValueError(f"`Trainer(strategy={name})` is not supported in federated training: {_SPREADS_ONE_MODEL}.")


def check_accelerator(accelerator: Any) -> None:
    """Refuse Apple's GPUs.

    Args:
        accelerator: What a trainer was given, or has.

    Raises:
        ValueError: Naming the argument, why, and the remedy.
    """
    if accelerator == "mps" or isinstance(accelerator, MPSAccelerator):
        raise ValueError(
            "`Trainer(accelerator=mps)` cannot play a federation: Apple's GPUs have no float64, in which sums over"
            ' clients are kept, and no random states that could be restored. Set `accelerator="cpu"`.'
        )


def default_accelerator(accelerator: Any, strategy: Any) -> Any:
    """The accelerator for a trainer that leaves it open: the CPU where Lightning would take Apple's GPU.

    Args:
        accelerator: What the trainer was given.
        strategy: Its strategy; one that was made already may have an accelerator of its own.
    """
    if accelerator == "auto" and isinstance(strategy, str) and MPSAccelerator.is_available():
        rank_zero_info(
            'A federation computes on the CPU here (`accelerator="cpu"`): Apple\'s GPU has no float64, in which sums'
            " over clients are kept."
        )
        return "cpu"
    return accelerator


_SPREADS_ONE_MODEL = (
    "it spreads one model over the devices, and a federation spreads the clients, each with a whole model. Set"
    ' `strategy="federated"`'
)


def check_trainer(trainer: Any, *, sync_batchnorm: bool = False) -> None:
    """Refuse trainer arguments that mean nothing here.

    Args:
        trainer: The trainer.
        sync_batchnorm: Whether it was told to synchronize batch norm.

    Raises:
        ValueError: Naming the argument, what came, what is allowed, and the remedy.
    """

    def refuse(argument: str, why: str) -> None:
        raise ValueError(f"`Trainer({argument})` is not supported in federated training: {why}.")

    check_accelerator(trainer.accelerator)
    strategy = type(trainer.strategy)
    if not issubclass(strategy, (SingleDeviceStrategy, DDPStrategy)):
        refuse(f"strategy={strategy.__name__}", _SPREADS_ONE_MODEL)
    if trainer.barebones:
        refuse("barebones=True", "it turns off the logging that a round reports through. Turn off parts one by one")
    if trainer.overfit_batches:
        refuse(
            f"overfit_batches={trainer.overfit_batches}",
            "it repeats batches of one central loader. Use `limit_train_batches`, which counts per client and pass",
        )
    if trainer.reload_dataloaders_every_n_epochs:
        refuse(
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs}",
            "the training data is dealt to the clients once. Remove it",
        )
    if sync_batchnorm:
        refuse("sync_batchnorm=True", "clients never see each other's batches. Choose a policy with `buffers=`")
    # Lightning leaves the attribute out where the interval is a time.
    interval, every = getattr(trainer, "val_check_interval", None), trainer.check_val_every_n_epoch
    if isinstance(interval, float) and interval != 1.0:
        refuse(
            f"val_check_interval={interval}",
            "validation sees global models, which exist between rounds only. Use `check_val_every_n_epoch`, in rounds",
        )
    if isinstance(interval, int) and not isinstance(interval, bool) and interval > 1 and every is not None:
        refuse(
            f"val_check_interval={interval}, check_val_every_n_epoch={every}",
            f"a round is one step. Use `check_val_every_n_epoch={interval}`",
        )
