"""How the round loop gets into a trainer: one that is being made, or a stock one whose rule asks for it."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from lightning_fedhaw.adapter.checkpoint import write_atomically
from lightning_fedhaw.adapter.evaluation import SharedEvaluationLoop
from lightning_fedhaw.adapter.loop import RoundLoop
from lightning_fedhaw.adapter.progress import replace_default_bar
from lightning_fedhaw.adapter.strategy import FederatedStrategy, never_wrap
from lightning_fedhaw.adapter.unsupported import check_callbacks, check_trainer
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import keep_history
from lightning_fedhaw.rule import find_rule


def attach(trainer: Any, options: FederationOptions) -> None:
    """Put the round loop instead of a trainer's fit loop, or merge a rule's options into the one that is there.

    Args:
        trainer: A ``lightning.pytorch.Trainer``.
        options: The federation's arguments.

    Raises:
        TypeError: If it is not such a trainer.
        ValueError: If there is not exactly one rule, if trainer and rule disagree, or if the trainer was given
            something that is not supported in federated training.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"A rule callback needs a `lightning.pytorch.Trainer`, got {type(trainer).__module__}."
            f"{type(trainer).__qualname__}: `pytorch_lightning` and `lightning.pytorch` objects do not mix. Write"
            " `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`."
        )
    find_rule(cast(Any, trainer).callbacks)
    if not isinstance(trainer.fit_loop, RoundLoop):
        trainer.fit_loop = RoundLoop(trainer, FederationOptions())
    if isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, FederatedStrategy):
        never_wrap(trainer.strategy)
    write_atomically(trainer.strategy)
    trainer.federation_summary = {}  # type: ignore[attr-defined]
    trainer.federation_client = None  # type: ignore[attr-defined]
    trainer.fit_loop.options = trainer.fit_loop.trainer_options.merged(options)
    trainer.federation_options = trainer.fit_loop.options  # type: ignore[attr-defined]
    check_callbacks(cast(Any, trainer).callbacks)
    check_trainer(trainer, sync_batchnorm=trainer._accelerator_connector._layer_sync is not None)
    replace_default_bar(trainer)
    keep_history(trainer)


def install_loops(trainer: pl.Trainer, options: FederationOptions) -> None:
    """Give a trainer that is being made its round loop, and evaluation loops that share batches over processes.

    Args:
        trainer: The trainer.
        options: The federation's arguments as it was given them.
    """
    trainer.fit_loop = RoundLoop(trainer, options)
    trainer.validate_loop = SharedEvaluationLoop.of(trainer.validate_loop)
    trainer.test_loop = SharedEvaluationLoop.of(trainer.test_loop)
    trainer.federation_options = options  # type: ignore[attr-defined]
    trainer.federation_client = None  # type: ignore[attr-defined]
