"""Checkpoints at any moment: while a round runs, they hold the state after the last full round.

A signal handler, a timer's thread or a hook of a batch may ask for one while the module holds a client's model. Nothing
that is at work is read for it, or changed: a round leaves what it began from as it was, and that is written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, datamodule_of
from lightning_fedhaw.clients.optimizer_states import settings_of
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.run_state import RoundSnapshot
from lightning_fedhaw.report.history import RunHistory, first_rounds

GATE = threading.RLock()
"""Held while a round begins, and while another thread reads the state between two rounds."""


Counters = dict[str, dict[str, Any]]
"""The numbers that loops count in, by their keys in the state of the fit loop."""


@dataclass(frozen=True)
class BetweenRounds:
    """The state of a run before the round that is running. A round replaces what is in here, and changes none of it.

    Attributes:
        trainer: The trainer.
        federation: The federation of the run.
        snapshot: What the undo of the round restores.
        epoch: The number of full epochs.
        global_step: The number of full rounds.
        settings: For each optimizer, the options of its parameter groups.
        schedules: The states of the trainer's learning-rate schedules.
        precision: The state of the precision plugin.
        counters: The counters of the fit loop, as :func:`counters_of` returns them.
        thread: The thread in which the run is, which need not be the main one: an engine of a deployment may start it.
    """

    trainer: pl.Trainer
    federation: Federation
    snapshot: RoundSnapshot
    epoch: int
    global_step: int
    settings: Sequence[Sequence[Mapping[str, Any]]]
    schedules: list[dict[str, Any]]
    precision: dict[str, Any]
    counters: Counters
    thread: threading.Thread = field(default_factory=threading.current_thread)

    @classmethod
    def now(cls, trainer: pl.Trainer, federation: Federation, snapshot: RoundSnapshot) -> BetweenRounds:
        """Remember the state as it is.

        Args:
            trainer: The trainer.
            federation: The federation.
            snapshot: What the undo of the round that begins restores.
        """
        return cls(
            trainer=trainer,
            federation=federation,
            snapshot=snapshot,
            epoch=trainer.current_epoch,
            global_step=trainer.global_step,
            settings=settings_of(trainer.strategy.optimizers),
            schedules=[dict(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            precision=trainer.precision_plugin.state_dict(),
            counters=counters_of(trainer.fit_loop),
        )

    # ------------------------------------------------------------------ the parts of a checkpoint

    def model(self) -> dict[str, Tensor]:
        """Return the ``state_dict`` of the module, with the global model in it."""
        module = self.trainer.lightning_module
        # By the tensors themselves, because a module may give its entries other names, or leave some out.
        names = {id(tensor): name for name, tensor in module.named_buffers()}
        names.update((id(tensor), name) for name, tensor in module.named_parameters())
        values = self.federation.run_state.model_before(self.snapshot)
        entries: dict[str, Any] = {}
        # With the tensors as they are: a batched step has put stacks in their places, which have no values outside.
        for key, entry in module.state_dict(keep_vars=True).items():
            name = names.get(id(entry), key)
            if name in values:
                entries[key] = values[name]
            elif isinstance(entry, Tensor):
                entries[key] = entry.detach().clone()
            else:
                entries[key] = entry
        return entries

    def optimizers(self) -> list[dict[str, Any]]:
        """Return the states of the optimizers: those from which clients start, with the rates of the round."""
        states: list[dict[str, Any]] = []
        initial_states = self.federation.engine.initial_states
        for optimizer, settings, state in zip(
            self.trainer.strategy.optimizers, self.settings, initial_states, strict=True
        ):
            groups = []
            first = 0
            for group, options in zip(optimizer.param_groups, settings, strict=True):
                numbers = list(range(first, first + len(group["params"])))
                groups.append({**options, "params": numbers})
                first += len(numbers)
            states.append({"state": dict(state), "param_groups": groups})
        return states

    def callbacks(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks. Those that take no part in rounds are asked now."""
        states = {}
        for callback in callbacks_of(self.trainer):
            state = self._state_of(callback)
            if state:
                states[callback.state_key] = state
        return states

    def _state_of(self, callback: pl.Callback) -> dict[str, Any]:
        saved = self.snapshot.state_of(callback)
        if saved is not None:
            return saved
        state = callback.state_dict()
        if state and isinstance(callback, RunHistory):
            # The weights and tables of the round in progress may be there already.
            state["weights"] = state["weights"][: self.global_step]
            if "tables" in state:
                state["tables"] = first_rounds(state["tables"], self.global_step)
        return state

    def federation_state(self) -> dict[str, Any]:
        """Return the federation's entry."""
        return self.federation.run_state.state_before(self.snapshot)


_IN_USE: ContextVar[BetweenRounds | None] = ContextVar("between_rounds", default=None)


def in_use() -> BetweenRounds | None:
    """Return the state that the checkpoint that is being put together holds; None if it is the present one."""
    return _IN_USE.get()


def _state_to_save(trainer: pl.Trainer) -> BetweenRounds | None:
    """Return the state that a checkpoint has to hold now; None for the present one.

    Between the end of a round and the end of its validation, hooks save the present state, from which Lightning knows
    how to resume. Requests at any other moment are answered as if the round were not over.
    """
    between_rounds: BetweenRounds | None = getattr(trainer.fit_loop, "between_rounds", None)
    if not getattr(trainer.fit_loop, "is_counted", False):
        return between_rounds
    hook = trainer.lightning_module._current_fx_name or ""
    is_in_hook = hook.startswith("on_") and "_batch_" not in hook
    is_in_thread_of_run = between_rounds is None or threading.current_thread() is between_rounds.thread
    if is_in_hook and is_in_thread_of_run:
        return None
    return between_rounds


class AnyMomentConnector(_CheckpointConnector):
    """Puts checkpoints together, at any moment and in any thread."""

    def restore_optimizers(self) -> None:
        """Restore the optimizers, which have to be of the classes that the checkpoint was written with.

        Raises:
            ValueError: If one of them lacks a setting afterwards.
        """
        super().restore_optimizers()
        for optimizer in self.trainer.strategy.optimizers:
            for group in optimizer.param_groups:
                missing = [name for name in optimizer.defaults if name not in group]
                if missing:
                    raise ValueError(
                        f"The checkpoint {str(self.trainer.ckpt_path)!r} was written with another optimizer: it lacks"
                        f" {', '.join(f'`{name}`' for name in missing)} of {type(optimizer).__name__}. Resume with the"
                        " optimizer of that run, or start a new run from its weights with `load_from_checkpoint`."
                    )

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        with GATE:
            between_rounds = _state_to_save(self.trainer)
            if between_rounds is None:
                checkpoint = super().dump_checkpoint(weights_only)
                if threading.current_thread() is not threading.main_thread():
                    # The next round may begin before the file is written.
                    checkpoint = apply_to_collection(checkpoint, Tensor, Tensor.clone)
                return checkpoint
        token = _IN_USE.set(between_rounds)
        try:
            with _plain_torch():
                return self._dump(between_rounds, bool(weights_only))
        finally:
            _IN_USE.reset(token)

    def _dump(self, between_rounds: BetweenRounds, weights_only: bool) -> dict[str, Any]:
        """Return what Lightning's own method returns, of the state between two rounds."""
        trainer = self.trainer
        checkpoint: dict[str, Any] = {
            "epoch": between_rounds.epoch,
            "global_step": between_rounds.global_step,
            "pytorch-lightning_version": pl.__version__,  # type: ignore[attr-defined]
            "state_dict": between_rounds.model(),
            "loops": self._get_loops_state_dict(),
        }
        if not weights_only:
            checkpoint["callbacks"] = between_rounds.callbacks()
            checkpoint["optimizer_states"] = between_rounds.optimizers()
            checkpoint["lr_schedulers"] = between_rounds.schedules
            plugin = trainer.precision_plugin
            if between_rounds.precision:
                checkpoint[type(plugin).__qualname__] = between_rounds.precision
            plugin.on_save_checkpoint(checkpoint)
        datamodule = datamodule_of(trainer)
        for source in (trainer.lightning_module, datamodule):
            if source is not None and source.hparams:
                checkpoint.update(_hyperparameters(source))
        if datamodule is not None:
            state = call._call_lightning_datamodule_hook(trainer, "state_dict")
            if state:
                checkpoint[type(datamodule).__qualname__] = state
        if not weights_only:
            call._call_callbacks_on_save_checkpoint(trainer, checkpoint)
        call._call_lightning_module_hook(trainer, "on_save_checkpoint", checkpoint)
        return checkpoint


def _hyperparameters(source: pl.LightningModule | pl.LightningDataModule) -> dict[str, Any]:
    """Return the entries of a checkpoint with the hyperparameters of a module or a data module."""
    entries: dict[str, Any] = {}
    if hasattr(source, "_hparams_name"):
        entries[source.CHECKPOINT_HYPER_PARAMS_NAME] = source._hparams_name
    hyperparameters = source.hparams
    if isinstance(hyperparameters, dict):
        entries[source.CHECKPOINT_HYPER_PARAMS_KEY] = dict(hyperparameters)
    else:
        # A container of OmegaConf.
        entries[source.CHECKPOINT_HYPER_PARAMS_KEY] = hyperparameters
        entries[source.CHECKPOINT_HYPER_PARAMS_TYPE] = type(hyperparameters)
    return entries


def save_at_any_moment(trainer: pl.Trainer) -> None:
    """Let a trainer's checkpoints be put together at any moment."""
    stock = trainer._checkpoint_connector
    if type(stock) is _CheckpointConnector:
        connector = AnyMomentConnector(trainer)
        # It may hold the checkpoint that the run is resumed from.
        vars(connector).update(vars(stock))
        trainer._checkpoint_connector = connector


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Compute with plain tensors inside the context, although a batched step may be at work around it.

    A signal arrives in the middle of anything, for example of a function that ``torch.func`` transforms.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(temporarily_clear_interpreter_stack())
        yield


def counters_of(loop: _FitLoop) -> Counters:
    """Return the entries of a fit loop's state that count epochs, batches and steps."""
    rounds = loop.epoch_loop
    counted = {
        "epoch_progress": loop.epoch_progress,
        "epoch_loop.batch_progress": rounds.batch_progress,
        "epoch_loop.scheduler_progress": rounds.scheduler_progress,
        "epoch_loop.automatic_optimization.optim_progress": rounds.automatic_optimization.optim_progress,
        "epoch_loop.manual_optimization.optim_step_progress": rounds.manual_optimization.optim_step_progress,
        "epoch_loop.val_loop.batch_progress": rounds.val_loop.batch_progress,
    }
    return {name: _counts(progress) for name, progress in counted.items()}


def _counts(progress: _BaseProgress) -> dict[str, Any]:
    """Return what ``progress.state_dict()`` returns, a few microseconds faster."""
    counts = {}
    for name, value in vars(progress).items():
        if isinstance(value, _BaseProgress):
            value = _counts(value)
        counts[name] = value
    return counts
