"""The round loop: a fit loop whose epochs are communication rounds.

It keeps the stock loop's book-keeping, in which an epoch has exactly one batch: the round. So checkpoints, loggers,
early stopping, validation and resuming keep their meaning, and ``global_step`` counts rounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw.adapter.assembly import (
    AssignedData,
    assign_data,
    build_federation,
    observers,
    options_with_datamodule,
    reset,
)
from lightning_fedhaw.adapter.evaluation import SharedEvaluationLoop, same_value
from lightning_fedhaw.adapter.host import hook_owner
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import history_of
from lightning_fedhaw.report.loggers import report
from lightning_fedhaw.report.run_summary import evaluate_clients, run_summary, start_up_line
from lightning_fedhaw.report.summary import flat_numbers, format_summary
from lightning_fedhaw.vectors.layout import trainable
from lightning_fedhaw.vectors.memory import release

DEVELOPMENT_ROUNDS = 2
"""Rounds with ``fast_dev_run``."""


class RoundLoop(_FitLoop):
    """A fit loop that plays communication rounds.

    Args:
        trainer: The trainer it belongs to; the limits and data sources of its present fit loop are taken over.
        options: The federation's arguments as the trainer was given them.
    """

    def __init__(self, trainer: pl.Trainer, options: FederationOptions) -> None:
        old = trainer.fit_loop
        super().__init__(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
        self.epoch_loop = _RoundEpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
        self.epoch_loop.val_loop = SharedEvaluationLoop.of(old.epoch_loop.val_loop)
        self._data_source = old._data_source
        self.trainer_options = options
        self.options = options
        # Callbacks that log by themselves ask for it, and a round is always logged.
        cast(Any, trainer).log_every_n_steps = 1
        self.federation: Federation | None = None
        self._federation_state: dict[str, Any] | None = None
        self._assigned: AssignedData | None = None

    # ------------------------------------------------------------------ data

    def setup_data(self) -> None:
        """Deal the training data to the clients."""
        if self._combined_loader is not None:
            return
        trainer: Any = self.trainer
        module = trainer.lightning_module
        if trainer.limit_train_batches == 0 or not is_overridden("training_step", module):
            return
        if trainer.fast_dev_run:
            self.max_epochs, self.epoch_loop.max_steps = DEVELOPMENT_ROUNDS, -1
        loader = _request_dataloader(self._data_source)
        self._assigned = assign_data(trainer, loader, options_with_datamodule(trainer, self.options))
        self._combined_loader = CombinedLoader(loader, "max_size_cycle")
        self._combined_loader.limits = [1]
        self.max_batches = 1
        self._setup_validation_interval()

    def _setup_validation_interval(self) -> None:
        """In rounds: every ``check_val_every_n_epoch``; with None, every ``val_check_interval`` rounds."""
        trainer: Any = self.trainer
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            trainer.val_check_batch = None
            trainer._train_start_time = trainer._last_val_time = time.monotonic()
        else:
            interval = trainer.val_check_interval
            trainer.val_check_batch = interval if isinstance(interval, int) else 1

    # ------------------------------------------------------------------ a run

    def run(self) -> None:
        """Play the rounds, and leave nothing on the device, however they end."""
        try:
            super().run()
        except BaseException:
            # A device that has failed may give nothing back, and the first error is the one to tell.
            with suppress(RuntimeError):
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        if self._assigned is not None:
            self._assigned.clients.release()
        if self.federation is not None:
            self.federation.close()
        release()

    def on_run_start(self) -> None:
        """Build the federation, or resume it from the checkpoint."""
        self._build()
        super().on_run_start()
        assert self.federation is not None
        rank_zero_info(self.federation.choose_engine())

    def _build(self) -> None:
        trainer: Any = self.trainer
        assert self._assigned is not None
        previous = self.federation
        options = options_with_datamodule(trainer, self.options)
        federation = build_federation(trainer, self._assigned.clients, options)
        self.federation = federation
        federation.check_agreement()
        self._reset_or_resume(federation, previous)
        federation.on_round_start = observers(trainer, "on_round_start")
        federation.on_client_end = observers(trainer, "on_client_end")
        federation.on_round_end = observers(trainer, "on_round_end")
        first = self.epoch_loop.global_step
        if options.sampler is not None and self.max_epochs is not None:
            for round_idx in range(first, self.max_epochs):
                federation.cohort(round_idx)  # a mistake in a late cohort is found before the first
        trainer.federation_clients = FederationClients(federation)
        observers(trainer, "on_federation_start")(federation)
        rank_zero_info(start_up_line(federation, trainer.callbacks, self._assigned.assumed, first))

    def _reset_or_resume(self, federation: Federation, previous: Federation | None) -> None:
        """Begin anew, or go on from a checkpoint or from where the ``fit`` before has ended."""
        trainer: Any = self.trainer
        if self.epoch_loop.global_step == 0:
            reset(federation, trainer)
        elif self._federation_state is not None:
            federation.load_state_dict(self._federation_state)
        elif previous is not None:
            # A second `fit` goes on, from the weights that are in the module.
            state = previous.state_dict()
            now = federation.server.parameters()
            before = federation.layout.rounded(previous.server.parameters())
            if not torch.equal(before.to(now.device), now):
                state.pop("parameters", None)
            federation.load_state_dict(state)
        else:
            raise ValueError(
                f"`ckpt_path`={str(trainer.ckpt_path)!r} was not written by a federation, so there are no rounds to go"
                " on from. Load its weights (`load_from_checkpoint`) and start a new federation with them."
            )
        self._federation_state = None

    def _warn_if_modules_in_eval_mode(self) -> None:
        """Lightning's warning, unless all that is in evaluation mode is frozen, which belongs there."""
        if any(not module.training and trainable(module) for module in self.trainer.lightning_module.modules()):
            super()._warn_if_modules_in_eval_mode()

    def _iteration_based_training(self) -> bool:
        """Never: with ``max_steps`` too, a step is a whole epoch, and a resumed run counts on from it."""
        return False

    def advance(self) -> None:
        """One round, and its validation."""
        trainer: Any = self.trainer
        with trainer.profiler.profile("run_training_epoch"):
            self.epoch_loop.run(None)  # type: ignore[arg-type]

    def play_round(self) -> Report:
        """One communication round."""
        assert self.federation is not None
        return self.federation.play(self.epoch_loop.global_step)

    def on_run_end(self) -> None:
        """Close the run with its summary."""
        super().on_run_end()
        trainer: Any = self.trainer
        federation = self.federation
        assert federation is not None
        history = history_of(trainer)
        federation.run_state.share_own_tensors(federation.engine)
        client_metrics = {}
        if federation.options.client_eval and federation.host.can_evaluate and not trainer.fast_dev_run:
            client_metrics = evaluate_clients(federation, history)
        rounds = self.epoch_loop.global_step
        metrics = trainer.callback_metrics
        summary = run_summary(federation, rounds, metrics, self.epoch_loop.rule_metrics, client_metrics)
        trainer.federation_summary = summary
        if trainer.is_global_zero:
            last = max(rounds - 1, 0)
            report(trainer.loggers, history, flat_numbers(summary), last)
            print(format_summary(summary))

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self) -> dict[str, Any]:
        """The stock loop's state, and the federation's."""
        state = super().on_save_checkpoint()
        if self.federation is not None:
            if self.federation.in_round:
                raise RuntimeError(
                    "A checkpoint was asked for while a client trains, when the module holds that client's model. Save"
                    " between rounds: in `on_train_epoch_end`, or with `ModelCheckpoint`."
                )
            state["federation"] = self.federation.state_dict()
        # The file is put together in memory; it may have the room that no round needs at the moment.
        release()
        return state

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Keep the federation's state until it is built."""
        self._federation_state = state_dict.get("federation")
        super().on_load_checkpoint(state_dict)


class _RoundEpochLoop(_TrainingEpochLoop):
    """An epoch with one batch, which is a round."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule_metrics: set[str] = set()

    @property
    def batch_idx(self) -> int:
        """Rounds before this one: schedules with ``interval="step"`` count their ``frequency`` in it."""
        return self.total_batch_idx

    def on_run_start(self, data_fetcher: Any) -> None:
        """There is nothing to fetch."""

    def advance(self, data_fetcher: Any) -> None:
        """Play the round and log it."""
        trainer: Any = self.trainer
        if self.restarting and self._should_check_val_fx(data_fetcher):
            if self.val_loop.restarted_mid_evaluation:
                return
            if self.restarted_on_last:
                self._skip_next_val = True
                return
            self.val_loop.increment_progress_to_evaluation_end()
        self.val_loop.restarting = False

        connector = trainer._logger_connector
        self.batch_progress.is_last_batch = True
        self.batch_progress.increment_ready()
        connector.on_batch_start(None)
        self._call_stock("on_train_batch_start", None, 0)
        self.batch_progress.increment_started()
        # The second name is the one that the PyTorch profiler takes for a step.
        step = f"[Strategy]{type(trainer.strategy).__name__}.training_step"
        with trainer.profiler.profile("run_training_batch"), trainer.profiler.profile(step):
            report = trainer.fit_loop.play_round()
        self.batch_progress.increment_processed()
        # A round is one optimizer step of the global model.
        self.automatic_optimization.optim_progress.optimizer.step.increment_ready()
        self.automatic_optimization.optim_progress.optimizer.step.increment_completed()
        self.manual_optimization.optim_step_progress.increment_ready()
        self.manual_optimization.optim_step_progress.increment_completed()

        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._log(report)
        self._call_stock("on_train_batch_end", None, None, 0)
        connector.on_batch_end()
        self.batch_progress.increment_completed()
        # Once a round is as seldom as it gets, so `log_every_n_steps` does not thin it out.
        connector.log_metrics(connector.metrics["log"])

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate."""
        trainer: Any = self.trainer
        federation = trainer.fit_loop.federation
        with federation.tally.phase("validation"):
            super().on_advance_end(data_fetcher)

    def _call_stock(self, name: str, *args: Any) -> None:
        """Call Lightning's own callbacks, for which a batch is a round."""
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if hook_owner(callback, name) == "lightning":
                getattr(callback, name)(trainer, trainer.lightning_module, *args)

    def _log(self, report: Report) -> None:
        trainer: Any = self.trainer
        results = self._results

        def write(name: str, value: float, options: Mapping[str, Any]) -> None:
            results.log(
                "training_step",
                name,
                torch.tensor(
                    value, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
                ),
                batch_size=1,
                # Every process has the same value: there is nothing to synchronize.
                sync_dist=True,
                sync_dist_fn=same_value,
                **options,
            )

        for name, logged in report.logged.items():
            keep = ("prog_bar", "logger", "on_step", "on_epoch")
            write(
                name, _merged_value(logged, self.trainer.lightning_module), {key: logged.options[key] for key in keep}
            )
        in_bar = trainer.fit_loop.federation.rule.prog_bar
        self.rule_metrics |= report.metrics.keys()
        for name, value in report.metrics.items():
            write(name, value, {"on_step": True, "on_epoch": False, "prog_bar": name in in_bar})


def _merged_value(logged: Logged, module: Any) -> float:
    if logged.metric is None:
        return logged.value
    metric = module.get_submodule(logged.metric) if isinstance(logged.metric, str) else logged.metric
    value = float(metric.compute())
    metric.reset()
    return value
