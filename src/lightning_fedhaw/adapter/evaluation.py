"""Validation and test on several processes, with the values of one.

Each process evaluates its share of the batches, without padding. What is logged is recorded, gathered and logged again
in the order of the batches on every process: so monitors, best paths and stop decisions are those of a single process,
whatever ``sync_dist`` says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics import Metric

from lightning_fedhaw.ranks import Ranks


class SharedEvaluationLoop(_EvaluationLoop):
    """An evaluation loop whose batches are shared out; one process is the stock loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = Ranks()
        self._is_sharded = False
        self._before: dict[int, int] = {}
        self._pooling: list[tuple[Metric, bool]] = []

    @classmethod
    def of(cls, loop: _EvaluationLoop) -> SharedEvaluationLoop:
        """The same loop, shared: with the stage, the data source and the settings of a stock one."""
        shared = cls(loop.trainer, loop._trainer_fn, loop._stage, loop.verbose, loop.inference_mode)
        shared._data_source = loop._data_source
        return shared

    def setup_data(self) -> None:
        """Take this process's share of the batches."""
        trainer: Any = self.trainer
        before, connector = self._combined_loader, trainer._accelerator_connector
        # Lightning's own share would be padded with samples that count twice.
        stock = connector.use_distributed_sampler
        connector.use_distributed_sampler = False
        try:
            super().setup_data()
        finally:
            connector.use_distributed_sampler = stock
        self._ranks = Ranks.of_group(trainer.strategy.root_device)
        if self._ranks.size > 1 and self._combined_loader is not None and self._combined_loader is not before:
            self._share(self._combined_loader)

    def _share(self, combined: CombinedLoader) -> None:
        loaders, size, rank = combined.flattened, self._ranks.size, self._ranks.rank
        # Every process needs a batch of every loader: it would not know what is logged otherwise.
        self._is_sharded = self._is_sequential and all(
            _is_shareable(loader) and size <= limit < float("inf")
            for loader, limit in zip(loaders, self._max_batches, strict=True)
        )
        if not self._is_sharded:
            return
        self._combined_loader = copy.copy(combined)
        self._combined_loader.flattened = [
            _share_of(loader, rank, size, int(limit)) for loader, limit in zip(loaders, self._max_batches, strict=True)
        ]
        self._max_batches = [-(-(int(limit) - rank) // size) for limit in self._max_batches]

    def on_run_start(self) -> None:
        """Start to record what is logged."""
        if self._ranks.size > 1:
            self._results = _Recorder(self._ranks, self._is_sharded)
            self._before = dict(self._seen_batches_per_dataloader)
            if not self._is_sharded:
                metrics = [m for m in self.trainer.lightning_module.modules() if isinstance(m, Metric)]
                # Everybody sees all batches, so a metric that pools its state would count them several times.
                self._pooling = [(metric, metric.sync_on_compute) for metric in metrics]
                for metric in metrics:
                    metric.sync_on_compute = False
        super().on_run_start()

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, *args: Any) -> None:
        results = self._results
        if not isinstance(results, _Recorder):
            return super()._evaluation_step(batch, batch_idx, dataloader_idx, *args)
        if self._is_sharded:
            batch_idx = batch_idx * self._ranks.size + self._ranks.rank
        with results.recording(batch_idx):
            super()._evaluation_step(batch, batch_idx, dataloader_idx, *args)
        results.saw(batch)
        return None

    def _store_dataloader_outputs(self) -> None:
        if isinstance(self._results, _Recorder):
            loader = self._results.dataloader_idx or 0
            before = self._before.get(loader, 0)
            self._seen_batches_per_dataloader[loader] = before + self._results.replay(self.trainer, before)
        super()._store_dataloader_outputs()

    def on_run_end(self) -> list[Any]:
        """The hooks at the end see what a single process would show them."""
        outputs: list[Any] = super().on_run_end()
        for metric, pools in self._pooling:
            metric.sync_on_compute = pools
        self._pooling = []
        return outputs


class _Recorder(_ResultCollection):
    """Keeps what a step logs until everybody's is there."""

    def __init__(self, ranks: Ranks, is_sharded: bool) -> None:
        super().__init__(training=False)
        self._ranks, self._is_sharded = ranks, is_sharded
        self._batch_idx: int | None = None
        self._records: list[tuple[int, str, str, Any, dict[str, Any]]] = []
        self._examples, self._batches = 0, 0

    def saw(self, batch: Any) -> None:
        """Count a batch and its examples."""
        self._examples += _examples(batch)
        self._batches += 1

    def recording(self, batch_idx: int) -> _Recorder:
        self._batch_idx = batch_idx
        return self

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._batch_idx = None

    def log(self, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Record what a step logs; log at once, for all processes, what a hook at the end does."""
        # Everybody gets the same values from here on: nothing is left to synchronize, and nothing to warn of.
        kwargs = {**kwargs, "sync_dist": True, "sync_dist_fn": same_value, "sync_dist_group": None}
        # A metric pools its own state when it is computed; with `rank_zero_only` the others may not be here.
        if isinstance(value, Metric) or kwargs.get("rank_zero_only"):
            super().log(fx, name, value, *args, **kwargs)
        elif self._batch_idx is not None:
            if kwargs.get("batch_size") is None and kwargs.get("on_epoch", True):
                kwargs["batch_size"] = _examples(self.batch)
            del kwargs["sync_dist_fn"]
            self._records.append((self._batch_idx, fx, name, value.detach().cpu(), kwargs))
        else:
            super().log(fx, name, self._mean(value), *args, **kwargs)

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over processes, weighted by the examples each has seen."""
        shares = self._ranks.gather((value.detach().cpu().double(), self._examples if self._is_sharded else 1))
        if not any(examples for _, examples in shares):  # before the first batch
            shares = [(v, 1) for v, _ in shares]
        total = sum(examples for _, examples in shares)
        return sum((v * n for v, n in shares), torch.zeros((), dtype=torch.float64)).div(total).to(value)

    def replay(self, trainer: Any, before: int) -> int:
        """Log everybody's records in the order of the batches.

        Args:
            trainer: The trainer.
            before: Batches of this loader in earlier evaluations.

        Returns:
            Batches in this one.
        """
        everybody = self._ranks.gather((self._records, self._batches))
        self._records, self._batches = [], 0
        if not self._is_sharded:
            everybody = everybody[:1]
        records = sorted((record for own, _ in everybody for record in own), key=lambda record: record[0])
        device, connector = trainer.strategy.root_device, trainer._logger_connector
        for batch_idx, batch in itertools.groupby(records, key=lambda record: record[0]):
            for _, fx, name, value, kwargs in batch:
                super().log(fx, name, value.to(device), sync_dist_fn=same_value, **kwargs)
            if not trainer.sanity_checking:
                connector.update_eval_step_metrics(before + batch_idx)
        return sum(batches for _, batches in everybody)


def _examples(batch: Any) -> int:
    """Examples in a batch, as far as they can be counted."""
    try:
        return int(extract_batch_size(batch))
    except Exception:
        return 1


def same_value(value: Any, *_: Any, **__: Any) -> Any:
    """In the place of a synchronization, where every process has the value already."""
    return value


def _is_shareable(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and hasattr(loader.batch_sampler, "__len__")
    )


def _share_of(loader: DataLoader[Any], rank: int, size: int, limit: int) -> DataLoader[Any]:
    """The same loader over every ``size``-th of its first ``limit`` batches."""
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler and isinstance(batches.sampler, RandomSampler):
        # Drawn anew by every process, batches would overlap; the order does not matter to an evaluation.
        batches = BatchSampler(SequentialSampler(loader.dataset), batches.batch_size, batches.drop_last)  # type: ignore[arg-type]
    share = copy.copy(loader)
    object.__setattr__(share, "batch_sampler", _EveryNth(batches, rank, size, limit))
    return share


class _EveryNth:
    """Batches ``rank``, ``rank + size``, ... of the first ``limit`` of a batch sampler."""

    def __init__(self, batches: Any, rank: int, size: int, limit: int) -> None:
        self.batches, self.rank, self.size, self.limit = batches, rank, size, limit

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            if index >= self.limit:
                return
            if index % self.size == self.rank:
                yield batch

    def __len__(self) -> int:
        return -(-(self.limit - self.rank) // self.size)
