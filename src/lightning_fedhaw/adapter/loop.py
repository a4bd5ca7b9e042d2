"""The Lightning adapter: a fit loop whose epochs are communication rounds.

This is the only file that touches Lightning's protected names. The loop keeps the stock loop's book-keeping, in which
an epoch has exactly one batch: the round. So checkpoints, loggers, early stopping, validation and resuming keep their
meaning, and ``global_step`` counts rounds.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_fedhaw.adapter.checkpoint import write_atomically
from lightning_fedhaw.adapter.evaluation import SharedEvaluationLoop, same_value
from lightning_fedhaw.adapter.progress import replace_default_bar
from lightning_fedhaw.adapter.strategy import FederatedStrategy, never_wrap
from lightning_fedhaw.adapter.unsupported import check_callbacks, check_trainer
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.clients.steps import is_plain_sgd
from lightning_fedhaw.data.client_data import ClientData, LoaderSettings
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.samplers import CohortSampler, EveryoneSampler, UniformSampler
from lightning_fedhaw.data.split import split
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import Report
from lightning_fedhaw.objectives.base import ClientObjective, find_objectives
from lightning_fedhaw.options import FederationOptions, described
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.report.history import history_of, keep_history
from lightning_fedhaw.report.loggers import report
from lightning_fedhaw.report.summary import client_statistics, flat_numbers, format_summary
from lightning_fedhaw.server import Server, step_arguments
from lightning_fedhaw.vectors.layout import ParameterLayout, trainable
from lightning_fedhaw.vectors.memory import release

DEVELOPMENT_ROUNDS = 2
DEVELOPMENT_CLIENTS = 2

_BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")
_STEP_HOOKS = (
    *_BATCH_HOOKS,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
)
_PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def attach(trainer: Any, options: FederationOptions) -> None:
    """Put the round loop in the place of a trainer's fit loop, or merge a rule's options into the one that is there.

    Args:
        trainer: A ``lightning.pytorch.Trainer``.
        options: The federation's arguments.

    Raises:
        TypeError: If it is not such a trainer.
        ValueError: If there is not exactly one rule, if trainer and rule disagree, or if the trainer was given
            something that has no meaning in a federation.
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
    trainer.fit_loop.options = trainer.fit_loop.trainer_options.merged(options)
    check_callbacks(cast(Any, trainer).callbacks)
    check_trainer(trainer, sync_batchnorm=trainer._accelerator_connector._layer_sync is not None)
    replace_default_bar(trainer)
    keep_history(trainer)


def find_rule(callbacks: Iterable[Any]) -> AggregationRule:
    """The one aggregation rule among callbacks.

    Raises:
        ValueError: If there is none, or more than one.
    """
    given = list(callbacks)
    rules = [c for c in given if isinstance(c, AggregationRule)]
    for each in given:
        if isinstance(each, type) and issubclass(each, pl.Callback):
            raise TypeError(f"`callbacks` must hold objects, got the class {each.__name__}. Write `{each.__name__}()`.")
    if len(rules) != 1:
        names = ", ".join(type(rule).__name__ for rule in rules)
        raise ValueError(
            "A federation needs exactly one aggregation rule among `callbacks`, got "
            + (
                f"{len(rules)} ({names}). Remove all but one."
                if rules
                else "none. Add one, such as `FedHAWCallback()`."
            )
        )
    return rules[0]


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
        self._clients: tuple[ClientData, list[str]] | None = None

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
        settings = LoaderSettings.of(loader)
        options = self._data_options()
        partition, labels, assumed = split(
            loader.dataset,
            num_clients=options.num_clients,
            alpha=options.alpha,
            partitioner=options.partitioner,
            labels=options.labels,
            seed=options.resolved_seed,
        )
        data = ClientData(
            loader.dataset,
            partition,
            settings,
            seed=options.resolved_seed,
            held_out=options.client_val_fraction,
            labels=labels,
        )
        if partition.dropped:
            rank_zero_info(
                f"The split leaves out {partition.dropped} of {len(loader.dataset)} samples, as it is defined."
            )
        self._clients = data, assumed
        if isinstance(trainer.datamodule, FederatedDataModule):
            trainer.datamodule.dealt = partition
        self._combined_loader = CombinedLoader(loader, "max_size_cycle")
        self._combined_loader.limits = [1]
        self.max_batches = 1
        self._setup_validation_interval()

    def _data_options(self) -> FederationOptions:
        """The options together with what the data module says of the split."""
        trainer: Any = self.trainer
        datamodule = trainer.datamodule
        if not isinstance(datamodule, FederatedDataModule):
            return self.options
        if self.options.alpha is not None and datamodule.partitioner is not None:
            raise ValueError(
                f"`alpha`={self.options.alpha} is given beside the data module's `partitioner`"
                f" {datamodule.partitioner!r}. Give one of them."
            )
        said = FederationOptions(
            num_clients=datamodule.num_clients, partitioner=datamodule.partitioner, labels=datamodule.labels
        )
        return self.options.merged(said, "the trainer or the rule", "the data module")

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
        if self._clients is not None:
            self._clients[0].release()
        if self.federation is not None:
            self.federation.close()
        release()

    def on_run_start(self) -> None:
        """Found the federation, or go on with the checkpoint's."""
        self._found()
        super().on_run_start()
        assert self.federation is not None
        rank_zero_info(self.federation.choose_engine())

    def _found(self) -> None:
        trainer: Any = self.trainer
        rule = find_rule(trainer.callbacks)
        assert self._clients is not None
        data, assumed = self._clients
        options = self._data_options()
        check_callbacks(trainer.callbacks)
        layout = ParameterLayout.of(trainer.lightning_module)
        device: torch.device = trainer.strategy.root_device
        data.place(_device_of_data(options.data_device, device, data), channels_last=options.channels_last)
        host = _Host(trainer, data.device)
        objectives = find_objectives(trainer.callbacks)
        if rule.needs_learning_rates or any(objective.needs_learning_rates for objective in objectives):
            host.learning_rates(layout)
        previous = self.federation
        datamodule = trainer.datamodule
        proxy = datamodule.proxy_dataset if isinstance(datamodule, FederatedDataModule) else None
        server = Server(
            trainer.lightning_module,
            layout,
            proxy,
            seed=options.resolved_seed,
            collate_fn=data.settings.collate_fn,
            prepare=host.prepare,
            context=host.precision.train_step_context,
        )
        rule.check(server)
        limit = trainer.limit_train_batches  # 1.0 is all batches, 1 is one.
        self.federation = Federation(
            host,
            server,
            data,
            self._sampler(options),
            rule,
            trainer.callbacks,
            options,
            limit=None if type(limit) is float and limit == 1.0 else limit,
            cohort_cap=DEVELOPMENT_CLIENTS if trainer.fast_dev_run else None,
            ranks=Ranks.of_group(trainer.strategy.root_device),
        )
        self.federation.check_agreement()
        if self.epoch_loop.global_step == 0:
            # Callbacks may have served another run before.
            rule.state = rule.init(server.parameters(), data.num_examples)
            for channel in (callback for callback in trainer.callbacks if isinstance(callback, Channel)):
                channel.reset()
            for objective in objectives:
                objective.reset()
        elif self._federation_state is not None:
            self.federation.load_state_dict(self._federation_state)
        elif previous is not None:
            # A second `fit` goes on, from the weights that are in the module.
            state = previous.state_dict()
            before = layout.rounded(previous.server.parameters())
            if not torch.equal(before.to(server.parameters().device), server.parameters()):
                state.pop("parameters", None)
            self.federation.load_state_dict(state)
        else:
            raise ValueError(
                f"`ckpt_path`={str(trainer.ckpt_path)!r} was not written by a federation, so there are no rounds to go"
                " on from. Load its weights (`load_from_checkpoint`) and start a new federation with them."
            )
        self._federation_state = None
        self.federation.on_round_start = self._observers("on_round_start")
        self.federation.on_client_end = self._observers("on_client_end")
        self.federation.on_round_end = self._observers("on_round_end")
        if options.sampler is not None and self.max_epochs is not None:
            for round_ in range(self.epoch_loop.global_step, self.max_epochs):
                self.federation.cohort(round_)  # a mistake in a late cohort is found before the first
        self._announce(self.federation, assumed, options)

    def _observers(self, name: str) -> Callable[..., None]:
        """Call an observing hook of all callbacks that have it."""
        trainer: Any = self.trainer
        hooks = [getattr(callback, name) for callback in trainer.callbacks if hasattr(callback, name)]

        def observe(*args: Any) -> None:
            for hook in hooks:
                hook(trainer, trainer.lightning_module, *args)

        return observe

    def _sampler(self, options: FederationOptions) -> CohortSampler:
        if options.sampler is not None:
            return options.sampler  # type: ignore[no-any-return]
        return EveryoneSampler() if options.clients_per_round is None else UniformSampler(options.clients_per_round)

    def _announce(self, federation: Federation, assumed: list[str], options: FederationOptions) -> None:
        """One line with what will happen, and what was assumed because nobody said it."""
        data, cohort = federation.data, len(federation.cohort(self.epoch_loop.global_step))
        sizes = data.num_examples
        if options.clients_per_round is None and options.sampler is None:
            assumed = [*assumed, "everyone takes part"]
        if options.local_epochs is None and options.local_steps is None:
            assumed = [*assumed, "one local epoch"]
        down, up = (cohort * federation.message_bytes(link) / 1e6 for link in ("downlink", "uplink"))
        traffic = f"{down:.3g} MB each way" if down == up else f"{down:.3g} MB down and {up:.3g} MB up"
        kept = (
            cohort * federation.layout.numel * federation.layout.dtype.itemsize if federation.rule.keeps_cohort else 0
        )
        callbacks = cast(Any, self.trainer).callbacks
        beside = [described(c) for c in callbacks if isinstance(c, (Channel, ClientObjective))]
        rank_zero_info(
            f"Federation: {', '.join([federation.rule.describe(), *beside])}, {data.num_clients} clients with"
            f" {_range(sizes)} samples, {cohort} a round, batch size"
            f" {data.settings.batch_size}, {federation.layout.numel:,} parameters, {traffic} a round"
            + (f", a checkpoint holds {kept / 1e6:.3g} MB of client vectors" if kept else "")
            + (f", {federation.ranks.size} processes" if federation.ranks.size > 1 else "")
            + (f". Assumed: {'; '.join(assumed)}." if assumed else ".")
        )

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
        """Close the run with one table."""
        super().on_run_end()
        self._summarise()

    def _summarise(self) -> None:
        trainer: Any = self.trainer
        federation = self.federation
        assert federation is not None
        tally, rule = federation.tally, federation.rule
        rounds = self.epoch_loop.global_step
        client_metrics: dict[str, dict[str, float]] = {}
        history = history_of(trainer)
        if federation.options.client_eval and federation.host.can_evaluate and not trainer.fast_dev_run:
            try:
                values, better = federation.evaluate_clients()
                client_metrics = client_statistics(values, better)
                history.clients = {name: each.tolist() for name, each in values.items()}
            except Exception as error:
                # The run is over and its model is good; a table without client metrics is better than none.
                rank_zero_warn(
                    f"The clients could not be evaluated on their own data ({type(error).__name__}: {error}), so the"
                    " closing table has no client metrics. `client_eval=False` skips this."
                )
        metrics = trainer.callback_metrics
        learned = {name: float(metrics[name]) for name in rule.headlines if name in metrics} | rule.summary()
        summary: dict[str, Any] = {
            "rule": type(rule).__name__,
            "channels": [f"{type(c).__name__} ({c.link})" for c in (*federation.uplink, *federation.downlink)],
            "objectives": [type(objective).__name__ for objective in federation.engine.objectives],
            "rounds": rounds,
            "clients": federation.data.num_clients,
            "clients_per_round": tally.heard / max(rounds, 1),
            "parameters": federation.layout.numel,
            "metrics": _headlines(metrics, self.epoch_loop.rule_metrics),
            **learned,
            "learned": list(learned),
            **{k: v for channel in (*federation.uplink, *federation.downlink) for k, v in channel.summary().items()},
            "client_metrics": client_metrics,
            "clients_measured_on": "held-out data" if federation.options.client_val_fraction else "training data",
            "bytes_down": tally.bytes_down,
            "bytes_up": tally.bytes_up,
            "lost_messages": tally.lost_messages,
            "nonfinite_updates": tally.nonfinite_updates,
            "skipped_rounds": tally.skipped_rounds,
            "skipped_steps": tally.skipped_steps,
            "seconds": dict(tally.seconds),
        }
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
        """Keep the federation's state until it is founded."""
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
        # A round is one optimiser step of the global model.
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
            if _hook_owner(callback, name) == "lightning":
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
                # Every process has the same value: there is nothing to synchronise.
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


class _Host:
    """What the engine needs of the trainer, resolved once per run."""

    def __init__(self, trainer: Any, data_device: torch.device | None = None) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.strategy = trainer.strategy
        self.device: torch.device = trainer.strategy.root_device
        self.optimizers: Sequence[torch.optim.Optimizer] = trainer.strategy.optimizers
        self.callbacks = [c for c in trainer.callbacks if not isinstance(c, AggregationRule)]
        self.precision = trainer.strategy.precision_plugin
        self.scaler = getattr(self.precision, "scaler", None)
        self._is_plain = type(self.precision) is Precision
        self._hooks = {name: self._users(name) for name in (*_BATCH_HOOKS, "on_before_zero_grad")}
        self._module_hooks = {name for name in _STEP_HOOKS if is_overridden(name, self.module)}
        converts = type(self.precision).convert_input is not Precision.convert_input
        is_there = self.device.type == "cpu" or data_device == self.device
        self._moves_nothing = is_there and not converts and not self._transfers
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "`training_step(self, dataloader_iter)` has no meaning in a federation: clients are given batches."
                " Write `training_step(self, batch, batch_idx)`."
            )
        own = {id(p) for p in self.module.parameters()}
        if any(id(p) not in own for o in self.optimizers for group in o.param_groups for p in group["params"]):
            raise ValueError(
                "`configure_optimizers` returned an optimiser over parameters that are not the module's own, so they"
                " would be trained by all clients together. Register them in the module."
            )
        self._takes_index = len(step_arguments(self.module.training_step, None, 0)) > 1
        self.has_validation = is_overridden("validation_step", self.module)

    def _users(self, name: str) -> list[Callable[..., Any]]:
        return [getattr(c, name) for c in self.callbacks if _hook_owner(c, name) == "user"]

    @property
    def _transfers(self) -> bool:
        sources = [self.module, self.trainer.datamodule]
        return any(is_overridden(name, s) for name in _TRANSFER_HOOKS for s in sources if s is not None)

    @property
    def accumulate(self) -> int:
        """Batches behind one optimiser step."""
        return int(self.trainer.accumulate_grad_batches)

    @property
    def round(self) -> int:
        """The round that is being played."""
        return int(self.trainer.global_step)

    @property
    def can_evaluate(self) -> bool:
        """Whether a client's data can be run through the module without training on it."""
        return self.has_validation or bool(self.module.automatic_optimization)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step needs no optimiser object, precision plugin or hook."""
        return (
            self._is_plain
            and len(self.optimizers) == 1
            and self.accumulate == 1
            and not self.trainer.gradient_clip_val
            and not self._module_hooks
            and not any(self._users(name) for name in _STEP_HOOKS if hasattr(pl.Callback, name))
            and (type(self.strategy) is SingleDeviceStrategy or isinstance(self.strategy, DDPStrategy))
            and is_plain_sgd(self.optimizers[0], [p for p in self.module.parameters() if p.requires_grad])
        )

    @property
    def clipping(self) -> tuple[float, str] | None:
        """The bound of gradient clipping, and ``"norm"`` or ``"value"``; ``None`` without."""
        bound, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        return (float(bound), str(getattr(algorithm, "value", algorithm or "norm"))) if bound and bound > 0 else None

    @property
    def obstacle(self) -> str | None:
        """What in trainer or module keeps a step from being a function of its tensors; ``None`` if nothing."""
        module = self.module
        if not module.automatic_optimization:
            return f"optimises manually{_place(module.training_step)}"
        for name in sorted(self._module_hooks):
            return f"is surrounded by the hook `{name}`{_place(getattr(module, name))}"
        for name in (*_BATCH_HOOKS, *_STEP_HOOKS):
            for hook in self._users(name) if hasattr(pl.Callback, name) else ():
                return f"is surrounded by the callback hook `{name}`{_place(hook)}"
        for name in _TRANSFER_HOOKS:
            for source in (module, self.trainer.datamodule):
                if source is not None and is_overridden(name, source):
                    return f"is surrounded by the hook `{name}`{_place(getattr(source, name))}"
        if len(self.optimizers) != 1:
            return f"has {len(self.optimizers)} optimisers"
        optimizer = self.optimizers[0]
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"has hooks on the optimiser {type(optimizer).__name__}"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
            return "has hooks on its parameters' gradients"
        if any(m._backward_hooks or m._backward_pre_hooks for m in module.modules()):
            return "has backward hooks on its layers"
        if self.accumulate != 1:
            return f"accumulates gradients (`accumulate_grad_batches={self.accumulate}`)"
        if self.scaler is not None or type(self.precision) not in _PRECISIONS:
            return f"trains in the precision {self.trainer.precision} ({type(self.precision).__name__})"
        return None

    def prepare(self, data: Any) -> Any:
        """Convert a batch to the precision and move it to the device, through the module's transfer hooks."""
        if self._moves_nothing:
            return data
        data = self.precision.convert_input(data)
        data = self.module._on_before_batch_transfer(data, dataloader_idx=0)
        return self.strategy.batch_to_device(data, dataloader_idx=0)

    def arguments(self, data: Any, batch_idx: int) -> tuple[Any, ...]:
        """The arguments of ``training_step``, whose ``batch_idx`` is optional."""
        return (data, batch_idx) if self._takes_index else (data,)

    def on_batch_start(self, data: Any, batch_idx: int) -> bool:
        """Call the hooks before a local step; true if the module asks to skip the rest of the pass."""
        for hook in self._hooks["on_train_batch_start"]:
            hook(self.trainer, self.module, data, batch_idx)
        return "on_train_batch_start" in self._module_hooks and self.module.on_train_batch_start(data, batch_idx) == -1

    def on_batch_end(self, outputs: Any, data: Any, batch_idx: int) -> None:
        """Call the hooks after a local step."""
        for hook in self._hooks["on_train_batch_end"]:
            hook(self.trainer, self.module, outputs, data, batch_idx)
        if "on_train_batch_end" in self._module_hooks:
            self.module.on_train_batch_end(outputs, data, batch_idx)

    def before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Call the hooks before gradients are cleared."""
        for hook in self._hooks["on_before_zero_grad"]:
            hook(self.trainer, self.module, optimizer)
        if "on_before_zero_grad" in self._module_hooks:
            self.module.on_before_zero_grad(optimizer)

    def learning_rates(self, layout: ParameterLayout) -> tuple[float, ...]:
        """The learning rate of each parameter tensor in the layout's order, as scheduled for this round.

        Raises:
            ValueError: If a trainable parameter has no optimiser, or more than one.
        """
        rates: dict[Tensor, list[float]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates.setdefault(parameter, []).append(float(group["lr"]))
        found = []
        for name, parameter in zip(layout.names, layout.tensors(self.module), strict=True):
            own = rates.get(parameter, [])
            if len(own) != 1:
                raise ValueError(
                    f"The rule divides by the local learning rate, and the trainable parameter `{name}` is in"
                    f" {len(own)} optimisers instead of exactly one. Give it one in `configure_optimizers`, freeze it,"
                    " or give the rate as `learning_rate=`."
                )
            found.append(own[0])
        return tuple(found)

    def forward(self, data: Any, batch_idx: int) -> Any:
        """Call ``training_step`` in the trainer's precision, without hooks or optimisers."""
        # The module itself and not `strategy.training_step`, which may go through a wrapper around it.
        step, arguments = self.module.training_step, self.arguments(data, batch_idx)
        if self._is_plain:  # whose context does nothing
            return step(*arguments)
        with self.precision.train_step_context():
            return step(*arguments)

    def evaluate(self, data: Any, batch_idx: int) -> Any:
        """Call ``validation_step``; ``training_step`` where there is none."""
        if not self.has_validation:
            return self.forward(data, batch_idx)
        with self.precision.val_step_context():
            return self.module.validation_step(*step_arguments(self.module.validation_step, data, batch_idx))

    def schedules(self) -> list[dict[str, Any]]:
        """The states of learning-rate schedules that the module steps itself."""
        if self.module.automatic_optimization:
            return []
        return [dict(config.scheduler.state_dict()) for config in self.trainer.lr_scheduler_configs]

    def load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Put such states back."""
        if states:
            for config, state in zip(self.trainer.lr_scheduler_configs, states, strict=True):
                config.scheduler.load_state_dict(dict(state))


def _device_of_data(choice: str, device: torch.device, data: ClientData) -> torch.device | None:
    """Where training data in memory belongs; ``None`` leaves it where it is."""
    if device.type == "cpu" or choice == "cpu":
        return None
    if choice == "auto":
        return device if device.type == "cuda" and data.nbytes <= torch.cuda.mem_get_info(device)[0] // 2 else None
    return device


def _place(function: Callable[..., Any]) -> str:
    """Where a function of the user's is written, in brackets."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def _hook_owner(callback: Any, name: str) -> str | None:
    """Who overrides a callback's hook: ``"lightning"``, the ``"user"``, or nobody."""
    if name in vars(callback):
        return "user"
    defined = getattr(type(callback), name)
    if defined is getattr(pl.Callback, name):
        return None
    return "lightning" if defined.__module__.startswith(("lightning.", "lightning_fedhaw.")) else "user"


def _merged_value(logged: Logged, module: Any) -> float:
    if logged.metric is None:
        return logged.value
    metric = module.get_submodule(logged.metric) if isinstance(logged.metric, str) else logged.metric
    value = float(metric.compute())
    metric.reset()
    return value


def _range(sizes: Tensor) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _headlines(metrics: Mapping[str, Tensor], inner: Collection[str]) -> dict[str, float]:
    """What belongs in the closing table: not the rule's inner numbers, and nothing twice."""
    again = {f"{name}{suffix}" for name in metrics for suffix in ("_step", "_epoch")}
    return {name: float(value) for name, value in metrics.items() if name not in inner and name not in again}
