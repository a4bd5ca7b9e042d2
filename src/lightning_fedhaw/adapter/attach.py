"""Puts the round loop into a trainer: into one that is being created, or into a stock one whose rule asks for it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_fedhaw.adapter.any_moment import save_at_any_moment
from lightning_fedhaw.adapter.checkpoint import check_files
from lightning_fedhaw.adapter.evaluation import SharedEvaluationLoop
from lightning_fedhaw.adapter.loop import RoundLoop
from lightning_fedhaw.adapter.progress import replace_default_bar
from lightning_fedhaw.adapter.stopping import answer_together
from lightning_fedhaw.adapter.strategy import FederatedStrategy, explain_lost_contact, never_wrap
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, publish_client, publish_options, publish_summary
from lightning_fedhaw.adapter.unsupported import check_callbacks, check_trainer
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import add_history
from lightning_fedhaw.rule import find_rule
from lightning_fedhaw.vectors.kernels import all_finite


def attach(trainer: object, module: pl.LightningModule, options: FederationOptions) -> None:
    """Replace a trainer's fit loop by the round loop, or merge a rule's options into the round loop that it has.

    Args:
        trainer: A ``lightning.pytorch.Trainer``.
        module: The module that it will train.
        options: The federation's arguments as the rule was given them.

    Raises:
        TypeError: If it is not such a trainer.
        ValueError: If there is not exactly one rule, if trainer and rule disagree, or if the trainer was given
            something that is not supported in federated training.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"A rule callback needs a `lightning.pytorch.Trainer`, got {type(trainer).__module__}."
            f"{type(trainer).__qualname__}: `pytorch_lightning` and `lightning.pytorch` objects do not mix. Write"
            " `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl` or, where another package"
            " imports it, `import lightning_fedhaw.alias_pytorch_lightning` at the top of the program."
        )
    callbacks = callbacks_of(trainer)
    find_rule(callbacks)
    loop = trainer.fit_loop
    if not isinstance(loop, RoundLoop):
        loop = RoundLoop(trainer, FederationOptions())
        trainer.fit_loop = loop
    if isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, FederatedStrategy):
        never_wrap(trainer.strategy)
        explain_lost_contact(trainer.strategy)
    save_at_any_moment(trainer)
    answer_together(trainer)
    check_files(trainer.strategy, "fit")
    # Now, and not when the federation is built: the sanity check of validation may set them before.
    loop.nonfinite_buffers = _nonfinite_buffers(module)
    publish_summary(trainer, {})
    publish_client(trainer, None)
    # Merged with the trainer's own options and not with those in force: a second `fit` may have another rule.
    loop.options = loop.trainer_options.merged(options)
    publish_options(trainer, loop.options)
    check_callbacks(callbacks)
    check_trainer(trainer, sync_batchnorm=trainer._accelerator_connector._layer_sync is not None)
    replace_default_bar(trainer)
    add_history(callbacks)


def install_loops(trainer: pl.Trainer, options: FederationOptions) -> None:
    """Give a trainer that is being created its round loop, and evaluation loops that share batches over processes.

    Args:
        trainer: The trainer.
        options: The federation's arguments as the trainer was given them.
    """
    trainer.fit_loop = RoundLoop(trainer, options)
    trainer.validate_loop = SharedEvaluationLoop.of(trainer.validate_loop)
    trainer.test_loop = SharedEvaluationLoop.of(trainer.test_loop)
    publish_options(trainer, options)
    publish_client(trainer, None)


def _nonfinite_buffers(module: nn.Module) -> frozenset[str]:
    """Return the names of the buffers that hold NaN or infinity."""
    names = []
    for name, buffer in module.named_buffers():
        # Buffers of lazy layers and on the meta device have no values yet.
        has_values = not is_lazy(buffer) and not buffer.is_meta
        if has_values and not all_finite(buffer):
            names.append(name)
    return frozenset(names)
