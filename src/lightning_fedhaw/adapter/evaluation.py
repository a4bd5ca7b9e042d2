"""Validation and test on several processes, with the values of a single one.

Each process evaluates its share of the batches, without padding. What is logged is recorded, gathered and logged again
in the order of the batches on every process: so monitors, best paths and stop decisions are those of a single process,
whatever ``sync_dist`` says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics import Metric

from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.ranks import REQUESTS, Ranks
from lightning_fedhaw.report.history import find_history

Value = TypeVar("Value")


class SharedEvaluationLoop(_EvaluationLoop):
    """An evaluation loop whose batches are shared between processes; with one process it is the stock loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = Ranks()
        self._is_sharded = False
        self._earlier_batches: dict[int, int] = {}
        self._sync_settings: list[tuple[Metric, bool]] = []

    @classmethod
    def of(cls, loop: _EvaluationLoop) -> SharedEvaluationLoop:
        """Return a shared loop with the stage, the data source and the settings of a stock one."""
        shared = cls(loop.trainer, loop._trainer_fn, loop._stage, loop.verbose, loop.inference_mode)
        shared._data_source = loop._data_source
        return shared

    def teardown(self) -> None:
        """Finish; after a failed validation Lightning calls this loop only, and not the one of the rounds around it."""
        super().teardown()
        fit_loop = self.trainer.fit_loop
        if hasattr(fit_loop, "between_rounds"):
            fit_loop.between_rounds = None

    def setup_data(self) -> None:
        """Set up the loaders, and reduce them to the batches of this process."""
        previous_loader = self._combined_loader
        connector = self.trainer._accelerator_connector
        # Lightning's own share would be padded with samples that count twice.
        stock_setting = connector.use_distributed_sampler
        connector.use_distributed_sampler = False
        try:
            super().setup_data()
        finally:
            connector.use_distributed_sampler = stock_setting
        self._ranks = Ranks.of_group(self.trainer.strategy.root_device)
        loader = self._combined_loader
        # Lightning keeps the loaders of an earlier validation, which are reduced already.
        is_new = loader is not None and loader is not previous_loader
        if self._ranks.size > 1 and is_new:
            assert loader is not None
            self._shard(loader)

    def _shard(self, combined: CombinedLoader) -> None:
        """Reduce all loaders to the batches of this process, if each can be reduced."""
        size = self._ranks.size
        rank = self._ranks.rank
        self._is_sharded = self._is_sequential and self._can_shard(combined)
        if not self._is_sharded:
            return
        shares = []
        limits: list[int | float] = []
        for loader, limit in zip(combined.flattened, self._max_batches, strict=True):
            shares.append(_share_of(loader, rank, size, int(limit)))
            limits.append(_num_shared(int(limit), rank, size))
        # A copy, because the user may hold the original.
        self._combined_loader = copy.copy(combined)
        self._combined_loader.flattened = shares
        self._max_batches = limits

    def _can_shard(self, combined: CombinedLoader) -> bool:
        for loader, limit in zip(combined.flattened, self._max_batches, strict=True):
            # Every process needs a batch of every loader: it would not know what is logged otherwise.
            has_batch_for_all = self._ranks.size <= limit < float("inf")
            if not has_batch_for_all or not _is_shardable(loader):
                return False
        return True

    def run(self) -> Any:
        """Evaluate; if that fails, leave nothing of it to the next validation of the same trainer."""
        with ExitStack() as undo:
            # The next mean would include what was logged so far, and clients would train in evaluation mode.
            undo.callback(self._results.reset)
            for submodule in self.trainer.lightning_module.modules():
                undo.callback(setattr, submodule, "training", submodule.training)
            results = super().run()
            # Nothing is to be undone.
            undo.pop_all()
        return results

    def on_run_start(self) -> None:
        """Start to record what is logged."""
        if self._ranks.size > 1:
            self._results = _Recorder(self._ranks, self._is_sharded)
            self._earlier_batches = dict(self._seen_batches_per_dataloader)
            if not self._is_sharded:
                self._stop_metrics_from_syncing()
        super().on_run_start()

    def _stop_metrics_from_syncing(self) -> None:
        # All processes see all batches, so a metric that pools its state would count them several times.
        self._sync_settings = []
        for metric in self.trainer.lightning_module.modules():
            if isinstance(metric, Metric):
                self._sync_settings.append((metric, metric.sync_on_compute))
                metric.sync_on_compute = False

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, *args: Any) -> None:
        results = self._results
        if not isinstance(results, _Recorder):
            super()._evaluation_step(batch, batch_idx, dataloader_idx, *args)
            return
        if REQUESTS.must_end:
            # The loop leaves the other batches out and goes on to the exchange of what was logged, in which all end.
            raise StopIteration
        if self._is_sharded:
            # The number that the batch has in the whole loader, which hooks and steps of a single process see.
            batch_idx = batch_idx * self._ranks.size + self._ranks.rank
        with results.recording(batch_idx):
            super()._evaluation_step(batch, batch_idx, dataloader_idx, *args)
        results.count(batch)

    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            find_history(callbacks_of(trainer)).add_validation(trainer.callback_metrics)
        super()._on_evaluation_end(*args, **kwargs)

    def _store_dataloader_outputs(self) -> None:
        if isinstance(self._results, _Recorder):
            loader = self._results.dataloader_idx or 0
            earlier_batches = self._earlier_batches.get(loader, 0)
            batches = self._results.replay(self.trainer, earlier_batches)
            self._seen_batches_per_dataloader[loader] = earlier_batches + batches
        super()._store_dataloader_outputs()

    def on_run_end(self) -> list[Any]:
        """Finish the evaluation, and let metrics pool their states again."""
        outputs: list[Any] = super().on_run_end()
        for metric, syncs in self._sync_settings:
            metric.sync_on_compute = syncs
        self._sync_settings = []
        return outputs


class _Record(NamedTuple):
    """One call of ``self.log`` in an evaluation step.

    Attributes:
        batch_idx: The number of the batch.
        fx: The name of the step.
        name: The logged name.
        value: The logged value, in host memory.
        options: Further arguments.
    """

    batch_idx: int
    fx: str
    name: str
    value: Tensor
    options: dict[str, Any]


class _Recorder(_ResultCollection):
    """Results that record what a step logs, until the records of all processes are gathered."""

    def __init__(self, ranks: Ranks, is_sharded: bool) -> None:
        super().__init__(training=False)
        self._ranks = ranks
        self._is_sharded = is_sharded
        self._batch_idx: int | None = None
        self._records: list[_Record] = []
        self._examples = 0
        self._batches = 0

    def count(self, batch: Any) -> None:
        """Count a batch and its examples."""
        self._examples += _num_examples(batch)
        self._batches += 1

    def recording(self, batch_idx: int) -> _Recorder:
        """Record what is logged inside of the context as that of a batch."""
        self._batch_idx = batch_idx
        return self

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._batch_idx = None

    def log(self, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Record what a step logs; log at once, for all processes, what a hook at the end logs."""
        # All processes get the same values from here on: nothing is left to synchronize, and nothing to warn of.
        kwargs["sync_dist"] = True
        kwargs["sync_dist_fn"] = same_value
        kwargs["sync_dist_group"] = None
        # A metric pools its own state when it is computed; with `rank_zero_only` the others may not be here.
        if isinstance(value, Metric) or kwargs.get("rank_zero_only"):
            super().log(fx, name, value, *args, **kwargs)
        elif self._batch_idx is not None:
            if kwargs.get("batch_size") is None and kwargs.get("on_epoch", True):
                kwargs["batch_size"] = _num_examples(self.batch)
            # Functions are not sent to other processes; it is added again in `replay`.
            del kwargs["sync_dist_fn"]
            self._records.append(_Record(self._batch_idx, fx, name, value.detach().cpu(), kwargs))
        else:
            super().log(fx, name, self._mean(value), *args, **kwargs)

    def _mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over processes, weighted by the examples that each has evaluated."""
        weight = 1
        if self._is_sharded:
            weight = self._examples
        shares = self._ranks.gather((value.detach().cpu().double(), weight))
        # Before the first batch, where no process has evaluated an example, all processes count the same.
        if not any(weight for _, weight in shares):
            shares = [(share, 1) for share, _ in shares]
        total = torch.zeros((), dtype=torch.float64)
        total_weight = 0
        for share, weight in shares:
            total = total + share * weight
            total_weight += weight
        return total.div(total_weight).to(value)

    def replay(self, trainer: pl.Trainer, earlier_batches: int) -> int:
        """Log the records of all processes in the order of the batches.

        Args:
            trainer: The trainer.
            earlier_batches: Batches of this loader in earlier evaluations.

        Returns:
            Batches of this loader in this evaluation.
        """
        shares = self._ranks.gather((self._records, self._batches))
        self._records = []
        self._batches = 0
        if not self._is_sharded:
            # All processes have evaluated all batches.
            shares = shares[:1]
        records: list[_Record] = []
        num_batches = 0
        for share, batches in shares:
            records += share
            num_batches += batches
        # Stable, so that the records of one batch stay in the order in which its step logged them.
        records.sort(key=lambda record: record.batch_idx)
        device = trainer.strategy.root_device
        for batch_idx, records_of_batch in itertools.groupby(records, key=lambda record: record.batch_idx):
            for record in records_of_batch:
                value = record.value.to(device)
                super().log(record.fx, record.name, value, sync_dist_fn=same_value, **record.options)
            if not trainer.sanity_checking:
                trainer._logger_connector.update_eval_step_metrics(earlier_batches + batch_idx)
        return num_batches


def _num_examples(batch: Any) -> int:
    """Count the examples in a batch; 1 where they cannot be counted, which gives all batches the same weight."""
    try:
        return int(extract_batch_size(batch))
    except (MisconfigurationException, RecursionError):  # no tensor was found in it
        return 1


def same_value(value: Value, *_: Any, **__: Any) -> Value:
    """Return the value: a substitute for a synchronization where every process has the value already."""
    return value


def _is_shardable(loader: object) -> bool:
    """Return whether the batches of a loader have numbers, so that a process can load its share alone."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None and hasattr(loader.batch_sampler, "__len__")


def _share_of(loader: DataLoader[Any], rank: int, size: int, limit: int) -> DataLoader[Any]:
    """Return a copy of a loader over the batches ``rank``, ``rank + size``, ... of its first ``limit`` batches."""
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler and isinstance(batches.sampler, RandomSampler):
        # Every process draws an order of its own, so the batches would overlap; an evaluation needs no order.
        sampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
        batches = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    share = copy.copy(loader)
    # A loader refuses the assignment once it is initialized.
    object.__setattr__(share, "batch_sampler", _EveryNth(batches, rank, size, limit))
    return share


def _num_shared(limit: int, rank: int, size: int) -> int:
    """Count the batches ``rank``, ``rank + size``, ... below ``limit``."""
    return len(range(rank, limit, size))


class _EveryNth:
    """Batches ``rank``, ``rank + size``, ... of the first ``limit`` of a batch sampler."""

    def __init__(self, batches: Iterable[Any], rank: int, size: int, limit: int) -> None:
        self.batches = batches
        self.rank = rank
        self.size = size
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            if index >= self.limit:
                return
            if index % self.size == self.rank:
                yield batch

    def __len__(self) -> int:
        return _num_shared(self.limit, self.rank, self.size)


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the loaders of the validation that is part of ``fit``, and set them up if that has not been done.

    Args:
        trainer: The trainer, whose ``fit`` has begun.

    Returns:
        The loaders; empty if nothing is validated.
    """
    if not trainer.enable_validation:
        return []
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        # As Lightning does it, at the start of a run that validates after its first epoch.
        trainer.validating = True
        try:
            loop.setup_data()
        finally:
            trainer.training = True
    if loop._combined_loader is None:
        return []
    return list(loop._combined_loader.flattened)
