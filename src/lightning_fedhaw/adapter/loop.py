"""The round loop: a fit loop whose epochs are communication rounds.

It keeps the stock loop's bookkeeping, in which an epoch has exactly one batch: the round. So checkpoints, loggers,
early stopping, validation and resuming keep their meaning, and ``global_step`` counts rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw.adapter.any_moment import GATE, BetweenRounds, Counters, counters_of, in_use
from lightning_fedhaw.adapter.assembly import (
    AssignedData,
    aggregation_observer,
    assign_data,
    build_federation,
    client_observer,
    observers,
    options_with_datamodule,
    reset,
)
from lightning_fedhaw.adapter.checkpoint_folder import warn_of_other_runs
from lightning_fedhaw.adapter.evaluation import SharedEvaluationLoop
from lightning_fedhaw.adapter.exact_restore import restore_exactly
from lightning_fedhaw.adapter.host import hook_owner
from lightning_fedhaw.adapter.restart import is_validated, settle
from lightning_fedhaw.adapter.round_log import RoundLog, show_earlier_rounds
from lightning_fedhaw.adapter.run_reports import RunClock, close_run, open_run
from lightning_fedhaw.adapter.stopping import ending_together, save_and_requeue
from lightning_fedhaw.adapter.trainer_attributes import (
    callbacks_of,
    is_development_run,
    is_validated_by_time,
    log_every_round,
    profiler_of,
    publish_clients,
    start_validation_clock,
)
from lightning_fedhaw.adapter.units import warn_of_units
from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.federation.run_state import RoundSnapshot
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import CheckpointRequested
from lightning_fedhaw.report.history import find_history
from lightning_fedhaw.vectors.layout import trainable
from lightning_fedhaw.vectors.memory import release

DEVELOPMENT_ROUNDS = 2
"""Rounds with ``fast_dev_run``."""


class RoundLoop(_FitLoop):
    """A fit loop that runs communication rounds.

    Args:
        trainer: The trainer it belongs to; the limits and data sources of its present fit loop are taken over.
        options: The federation's arguments as the trainer was given them.

    Attributes:
        options: The federation's arguments in force: those of the trainer, merged with those of the rule.
        federation: The federation of the present or the last ``fit``.
        between_rounds: Until a round, its validation and its hooks are over, the state after the round before it.
        is_counted: Whether the round is over, so that hooks may save the present state.
    """

    def __init__(self, trainer: pl.Trainer, options: FederationOptions) -> None:
        stock = trainer.fit_loop
        super().__init__(trainer, min_epochs=stock.min_epochs, max_epochs=stock.max_epochs)
        self.epoch_loop: _RoundEpochLoop = _RoundEpochLoop(
            trainer, min_steps=stock.min_steps, max_steps=stock.max_steps
        )
        self.epoch_loop.val_loop = SharedEvaluationLoop.of(stock.epoch_loop.val_loop)
        self._data_source = stock._data_source
        self.trainer_options = options
        # Names of buffers that were NaN or infinite when `fit` was called, such as thresholds that validation computes.
        self.nonfinite_buffers: frozenset[str] = frozenset()
        self.options = options
        log_every_round(trainer)
        self.federation: Federation | None = None
        self.between_rounds: BetweenRounds | None = None
        self.is_counted = False
        # While a round is about to begin, the counters of before: Lightning sets them to zero one by one.
        self._counters: Counters = {}
        self._federation_state: dict[str, Any] | None = None
        self._assigned: AssignedData | None = None
        self._clock = RunClock.start(0)

    @property
    def current_federation(self) -> Federation:
        """The federation of the run that is in progress."""
        assert self.federation is not None
        return self.federation

    # ------------------------------------------------------------------ data

    def setup_data(self) -> None:
        """Assign the training data to the clients."""
        if self._combined_loader is not None:
            return
        trainer = self.trainer
        if trainer.limit_train_batches == 0 or not is_overridden("training_step", trainer.lightning_module):
            return
        if is_development_run(trainer):
            self.max_epochs = DEVELOPMENT_ROUNDS
            # Lightning has limited the steps to as many as batches were asked for.
            self.epoch_loop.max_steps = -1
        loader = _request_dataloader(self._data_source)
        self._assigned = assign_data(trainer, loader, options_with_datamodule(trainer, self.options))
        # The loader is not iterated over: Lightning reads from it how many batches an epoch has, and that is one.
        self._combined_loader = CombinedLoader(loader, "max_size_cycle")
        self._combined_loader.limits = [1]
        self.max_batches = 1
        self._setup_validation_interval()

    def _setup_validation_interval(self) -> None:
        """Count in rounds: ``check_val_every_n_epoch``, and where it is None ``val_check_interval``."""
        trainer = self.trainer
        if is_validated_by_time(trainer):
            trainer.val_check_batch = None
            start_validation_clock(trainer, time.monotonic())
            return
        trainer.val_check_batch = 1
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_batch = trainer.val_check_interval

    # ------------------------------------------------------------------ the beginning of a run

    def run(self) -> None:
        """Run the rounds, and leave nothing on the device, however they end."""
        try:
            with ending_together(self.trainer):
                super().run()
        except BaseException:
            # A device that has failed may fail here again, and the first error is the one that says why.
            with suppress(RuntimeError):
                self._close()
            raise
        self._close()

    def reset(self) -> None:
        """Begin where the last full round ended."""
        settle(self)
        super().reset()

    def on_run_start(self) -> None:
        """Build the federation, or resume it from the checkpoint."""
        self._build()
        super().on_run_start()
        # After the hooks that start a run, because the vectorized engine tries the module's step.
        with self._holding_present_state():
            rank_zero_info(self.current_federation.choose_engine())
        warn_of_units(self.trainer, -1 if self.max_epochs is None else self.max_epochs)

    def _build(self) -> None:
        """Build the federation, put it into the state in which it begins, and say what will run."""
        trainer = self.trainer
        assert self._assigned is not None
        previous = self.federation
        options = options_with_datamodule(trainer, self.options)
        federation = build_federation(trainer, self._assigned.clients, options, self.nonfinite_buffers)
        self.federation = federation
        federation.check_agreement()
        self._reset_or_resume(federation, previous)
        # After the state is there, so that no hook sees another one.
        self._connect_hooks(federation)
        first_round = self.epoch_loop.global_step
        self._clock = RunClock.start(first_round)
        if options.sampler is not None and self.max_epochs is not None:
            # A sampler of the user's may fail in a late round: this is found before the first one.
            for round_idx in range(first_round, self.max_epochs):
                federation.cohort(round_idx)
        publish_clients(self.trainer, FederationClients(federation))
        observers(trainer, "on_federation_start")(federation)
        show_earlier_rounds(trainer, find_history(callbacks_of(trainer)).latest())
        open_run(trainer, federation, self._assigned.partitioner, self._assigned.assumed, first_round)

    def _connect_hooks(self, federation: Federation) -> None:
        """Let the federation call the hooks of callbacks, and this loop before anything changes in a round."""
        federation.on_snapshot = self._hold_state_between_rounds
        federation.on_round_start = observers(self.trainer, "on_round_start")
        federation.training.on_client_start = client_observer(self.trainer, federation)
        federation.training.on_client_end = observers(self.trainer, "on_client_end")
        federation.on_round_end = observers(self.trainer, "on_round_end")
        federation.observation.observe = aggregation_observer(self.trainer)

    def _reset_or_resume(self, federation: Federation, previous: Federation | None) -> None:
        """Start a federation from round 0, from a checkpoint, or from the end of the previous ``fit``.

        Args:
            federation: The new federation.
            previous: That of the previous ``fit`` of this trainer.

        Raises:
            ValueError: If the checkpoint was not written by a federation.
        """
        if self.epoch_loop.global_step == 0:
            reset(federation, self.trainer)
        elif self._federation_state is not None:
            path = self.trainer.ckpt_path
            federation.load_state_dict(self._federation_state, f"The checkpoint {str(path)!r}")
            warn_of_other_runs(path, federation.run_state.identity.run)
        elif previous is not None:
            federation.load_state_dict(_state_for_second_fit(federation, previous), "The earlier `fit`")
        else:
            raise ValueError(
                f"`ckpt_path`={str(self.trainer.ckpt_path)!r} was not written by a federation, so there are no rounds"
                " to resume from. Load its weights (`load_from_checkpoint`) and start a new federation with them."
            )
        self._federation_state = None

    # ------------------------------------------------------------------ rounds

    def on_advance_start(self) -> None:
        """Begin an epoch."""
        self._counters = counters_of(self)
        super().on_advance_start()

    def advance(self) -> None:
        """Run one round, and its validation."""
        with profiler_of(self.trainer).profile("run_training_epoch"):
            # The epoch loop fetches no batches.
            self.epoch_loop.run(None)  # type: ignore[arg-type]

    def run_round(self) -> Report:
        """Run one communication round, without validation, and again if several processes save within it."""
        while True:
            try:
                return self.current_federation.run_round(self.epoch_loop.global_step)
            except CheckpointRequested:
                save_and_requeue(self.trainer)

    def on_advance_end(self) -> None:
        """End an epoch: from here on a checkpoint holds the state after its round, whoever asks for it."""
        try:
            super().on_advance_end()
        finally:
            # It may end in Lightning's exception for SIGTERM, when the epoch is complete.
            if self.epoch_progress.current.completed == self.epoch_progress.current.ready:
                self.between_rounds = None

    # ------------------------------------------------------------------ the end of a run

    def on_run_end(self) -> None:
        """Evaluate the clients, and report the run summary."""
        super().on_run_end()
        assert self._assigned is not None
        close_run(
            self.trainer,
            self.current_federation,
            rounds=self.epoch_loop.global_step,
            clock=self._clock,
            partitioner=self._assigned.partitioner,
            rule_metrics=self.epoch_loop.round_log.rule_metrics,
            is_validated=self.epoch_loop.val_loop._combined_loader is not None,
            holding_present_state=self._holding_present_state,
        )

    def teardown(self) -> None:
        """Finish, after callbacks have saved what was left of an interrupted run."""
        self.between_rounds = None
        super().teardown()

    def _close(self) -> None:
        """Release the device: the clients' data, and the state that the federation keeps there."""
        if self._assigned is not None:
            self._assigned.clients.release()
        if self.federation is not None:
            self.federation.close()
        release()

    # ------------------------------------------------------------------ what the stock loop asks

    @property
    def skip(self) -> bool:
        """Whether a fit ends without a run; one whose rounds are all over still evaluates the clients and reports."""
        has_rounds = self.epoch_loop.global_step > 0 and self._assigned is not None
        return bool(super().skip) and not has_rounds

    def _iteration_based_training(self) -> bool:
        """Return False: with ``max_steps`` too, a step is a whole epoch, and a resumed run continues its count."""
        return False

    def _warn_if_modules_in_eval_mode(self) -> None:
        """Warn as Lightning does, unless only frozen modules are in evaluation mode, where they belong."""
        if any(not module.training and trainable(module) for module in self.trainer.lightning_module.modules()):
            super()._warn_if_modules_in_eval_mode()

    # ------------------------------------------------------------------ checkpoints

    def _hold_state_between_rounds(self, snapshot: RoundSnapshot) -> None:
        """Let checkpoints hold the present state from here on, until the round and its validation are over.

        Args:
            snapshot: What the undo of the round restores.
        """
        if self.current_federation.ranks.size > 1:
            # What clients keep is on all processes, which do not write a checkpoint together in the middle of a round.
            self._counters = {}
            return
        between_rounds = BetweenRounds.now(self.trainer, self.current_federation, snapshot)
        with GATE:
            self.is_counted = False
            self.between_rounds = between_rounds
            self._counters = {}

    @contextmanager
    def _holding_present_state(self) -> Iterator[None]:
        """Let checkpoints hold the present state, because inside of the context the module will hold other values."""
        self.current_federation.remember()
        yield
        # After an error they still do: `teardown` ends it.
        self.between_rounds = None

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Return the stock loop's state with that of the federation.

        In the middle of a round it is the state before the round, from which the round can begin again.

        Raises:
            RuntimeError: If a client is training.
        """
        state = super().on_save_checkpoint()
        state["rule_metrics"] = sorted(self.epoch_loop.round_log.rule_metrics)
        between_rounds = in_use()
        if between_rounds is not None:
            state["federation"] = between_rounds.federation_state()
            return state
        if self._federation_state is not None:
            # The federation is not yet what the checkpoint, from which the run is resumed, makes of it.
            state["federation"] = self._federation_state
        elif self.federation is not None:
            if self.federation.in_round:
                raise RuntimeError(
                    "A checkpoint was asked for while clients train on several processes, which hold their states. Save"
                    " between rounds: in `on_train_epoch_end`, or with `ModelCheckpoint`."
                )
            state["federation"] = self.federation.state_dict()
        # The file is put together in memory; it may have the blocks that no round needs at present.
        release()
        return state

    def state_dict(self, destination: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
        """Return the state of this loop and its children."""
        state: dict[str, Any] = super().state_dict(destination, prefix)
        between_rounds = in_use()
        counters = self._counters
        if between_rounds is not None:
            counters = between_rounds.counters
        state.update((f"{prefix}{name}", counts) for name, counts in counters.items())
        return state

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Keep the federation's state until the federation is built."""
        restore_exactly(self.trainer)
        self._federation_state = state_dict.get("federation")
        self.epoch_loop.round_log.rule_metrics.update(state_dict.get("rule_metrics", ()))
        super().on_load_checkpoint(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Load the progress of a checkpoint, and refuse one that has run more rounds than the run is to have.

        Raises:
            ValueError: If it has.
        """
        super().load_state_dict(state_dict, prefix)
        rounds = self.epoch_loop.global_step
        # A checkpoint of another trainer counts other steps, and is refused when the federation is built.
        is_over = self.max_epochs is not None and -1 < self.max_epochs < rounds
        if self._federation_state is not None and is_over:
            raise ValueError(
                f"The checkpoint {str(self.trainer.ckpt_path)!r} has run {rounds} rounds, and `rounds` is"
                f" {self.max_epochs}. It counts those before the checkpoint too: set it to more than {rounds} to"
                " resume."
            )


class _RoundEpochLoop(_TrainingEpochLoop):
    """An epoch with one batch, which is a round.

    Attributes:
        round_log: What its rounds log.
    """

    def __init__(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().__init__(trainer, *args, **kwargs)
        self.round_log = RoundLog(trainer)

    @property
    def _round_loop(self) -> RoundLoop:
        # Not an attribute: a loop saves the loops among its attributes, so the two would save each other without end.
        loop = self.trainer.fit_loop
        assert isinstance(loop, RoundLoop)
        return loop

    @property
    def batch_idx(self) -> int:
        """The number of earlier rounds: schedules with ``interval="step"`` count their ``frequency`` in it."""
        return self.total_batch_idx

    def on_run_start(self, data_fetcher: _DataFetcher | None) -> None:
        """Do nothing: there is no data to fetch."""

    def advance(self, data_fetcher: _DataFetcher | None) -> None:
        """Run a round and log it."""
        # A validation that was cut off begins again.
        self.val_loop.restarting = False
        if self.restarting:
            # The round is over, and at most its validation is left.
            self._skip_next_val = is_validated(self.val_loop)
            return

        trainer = self.trainer
        connector = trainer._logger_connector
        self.batch_progress.is_last_batch = True
        self.batch_progress.increment_ready()
        connector.on_batch_start(None)
        self._call_lightning_callbacks("on_train_batch_start", None, 0)
        self.batch_progress.increment_started()
        profiler = profiler_of(trainer)
        # The second name is the one that the PyTorch profiler takes for a step.
        step = f"[Strategy]{type(trainer.strategy).__name__}.training_step"
        with profiler.profile("run_training_batch"), profiler.profile(step):
            report = self._round_loop.run_round()
        self.batch_progress.increment_processed()
        self._count_optimizer_step()
        # At once, so that the history has every round that counts, whatever fails from here on.
        self.round_log.add(report, self._results, self._round_loop.current_federation.rule.prog_bar)
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._round_loop.is_counted = True
        self._call_lightning_callbacks("on_train_batch_end", None, None, 0)
        connector.on_batch_end()
        self.batch_progress.increment_completed()
        # Here and not by `log_every_n_steps`, which would leave rounds out.
        connector.log_metrics(connector.metrics["log"])

    def _count_optimizer_step(self) -> None:
        # A round is one step of the global model. Lightning reads one of these counters as `global_step`, the second
        # with manual optimization.
        automatic = self.automatic_optimization.optim_progress.optimizer.step
        automatic.increment_ready()
        automatic.increment_completed()
        manual = self.manual_optimization.optim_step_progress
        manual.increment_ready()
        manual.increment_completed()

    def on_advance_end(self, data_fetcher: _DataFetcher | None) -> None:
        """Validate the global model, if it is time to."""
        with self._round_loop.current_federation.tally.phase("validation"):
            super().on_advance_end(data_fetcher)  # type: ignore[arg-type]

    def _call_lightning_callbacks(self, name: str, *args: Any) -> None:
        """Call a hook of Lightning's callbacks, for which a batch is a round; for those of users it is a local step."""
        for callback in callbacks_of(self.trainer):
            if hook_owner(callback, name) == "lightning":
                getattr(callback, name)(self.trainer, self.trainer.lightning_module, *args)


def _state_for_second_fit(federation: Federation, previous: Federation) -> dict[str, Any]:
    """Return the state of a federation for a further ``fit``, which starts from the weights that are in the module.

    Args:
        federation: The new federation, whose server has read the module.
        previous: The federation of the previous ``fit``.
    """
    state = previous.state_dict()
    present = federation.server.parameters()
    # Rounded as the module rounds them: a module in bfloat16 cannot hold the server's float32 vector.
    at_end = federation.layout.rounded(previous.server.parameters())
    if not torch.equal(at_end.to(present.device), present):
        state.pop("parameters", None)  # the user has changed the weights since
    return state
