"""A fit that does one piece of work of a site: local training or an evaluation, with the hooks of a round around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelSummary, ProgressBar
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_fedhaw.adapter.assembly import (
    AssignedData,
    build_federation,
    evaluation_dataset,
    evaluation_sets,
    hold_out,
)
from lightning_fedhaw.adapter.loop import RoundLoop
from lightning_fedhaw.adapter.restart import trackers
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, publish_client, publish_options
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.loader_settings import LoaderSettings, training_samples
from lightning_fedhaw.data.partitioners import IndexPartitioner
from lightning_fedhaw.data.partitioners.partition import Partition
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.rule import find_rule

_QUIET = (Checkpoint, EarlyStopping, ModelSummary, ProgressBar)
"""Callbacks that serve the run and not the site: the server has them."""


class SiteWork(Protocol):
    """A piece of work of a site.

    Attributes:
        round: The number of the round.
        num_clients: N.
        seed: The federation's seed.
    """

    round: int
    num_clients: int
    seed: int

    def prepare(self, federation: Federation) -> None:
        """Install what the server has sent, before any hook is called."""

    def do(self, federation: Federation) -> None:
        """Do the work, with the global model in the module."""


class _SharedSamples(Partition):
    """The split that a site knows: every number has the site's samples, of which one tensor is held."""

    def __post_init__(self) -> None:
        """Keep the tensors as they are, without copies."""


class SiteLoop(RoundLoop):
    """A fit loop that does one piece of work with the samples of one site, and aggregates nothing.

    Args:
        trainer: The site's trainer.
        options: Its arguments of the federation.
        work: The work.
    """

    def __init__(self, trainer: pl.Trainer, options: FederationOptions, work: SiteWork) -> None:
        super().__init__(trainer, options)
        self.work = work

    def setup_data(self) -> None:
        """Take the training data of the site."""
        if self._combined_loader is not None:
            return
        # One client trains, so there is no batched step to try; splits and samplers are the server's.
        self.options = replace(
            self.options,
            engine="sequential",
            seed=self.work.seed,
            num_clients=None,
            sampler=None,
            clients_per_round=None,
        )
        publish_options(self.trainer, self.options)
        loader = _request_dataloader(self._data_source)
        data = _site_data(self.trainer, loader, self.options, self.work.num_clients)
        all_samples = IndexPartitioner([range(len(data.dataset))])  # type: ignore[arg-type]
        self._assigned = AssignedData(data, all_samples, [])
        self._combined_loader = CombinedLoader(loader, "max_size_cycle")
        self._combined_loader.limits = [1]
        self.max_batches = 1

    def run(self) -> None:
        """Do the work, between the hooks at the start of a run and of an epoch."""
        self.setup_data()
        _count(self, self.work.round)
        self.reset()
        try:
            self.on_run_start()
            self.on_advance_start()
            self.work.do(self.current_federation)
        finally:
            self._close()

    def on_run_start(self) -> None:
        """Build the federation, and install what the server has sent."""
        assert self._assigned is not None
        federation = build_federation(
            self.trainer, self._assigned.clients, self.options, self.nonfinite_buffers, aggregates=False
        )
        self.federation = federation
        for objective in federation.engine.objectives:
            objective.reset()
        self.work.prepare(federation)
        _FitLoop.on_run_start(self)


def run_at_site(trainer: pl.Trainer, module: pl.LightningModule, data: Any, work: SiteWork) -> None:
    """Run one piece of work of a site.

    Args:
        trainer: The site's trainer, which is used for this work only.
        module: The module.
        data: The site's data: what ``fit`` takes as its second argument.
        work: The work.

    Raises:
        ValueError: If the trainer has several processes.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"A site trains in one process, and its trainer has {trainer.world_size}. Set `devices=1, num_nodes=1`."
        )
    loop = trainer.fit_loop
    options = FederationOptions()
    if isinstance(loop, RoundLoop):
        options = loop.trainer_options
    trainer.fit_loop = SiteLoop(trainer, options, work)
    publish_client(trainer, None)
    trainer.loggers = []
    trainer.num_sanity_val_steps = 0
    own = callbacks_of(trainer)
    own[:] = [callback for callback in own if not isinstance(callback, _QUIET)]
    trainer.fit(module, data)


def prepare_server(trainer: pl.Trainer) -> FederationOptions:
    """Let a trainer serve sites: it splits no data and holds none out, because its clients are elsewhere.

    Args:
        trainer: A trainer with a rule.

    Returns:
        The arguments of the federation, of the trainer and the rule together.
    """
    options = options_of(trainer)
    loop = RoundLoop(trainer, _without_split(options))
    trainer.fit_loop = loop
    # They are merged with the trainer's when `fit` begins.
    find_rule(callbacks_of(trainer)).options = FederationOptions()  # type: ignore[attr-defined]
    publish_options(trainer, loop.trainer_options)
    return options


def options_of(trainer: pl.Trainer) -> FederationOptions:
    """Return the arguments of the federation that trainer and rule were given."""
    loop = trainer.fit_loop
    options = FederationOptions()
    if isinstance(loop, RoundLoop):
        options = loop.trainer_options
    rule_options: FederationOptions = getattr(find_rule(callbacks_of(trainer)), "options", FederationOptions())
    return options.merged(rule_options)


def _without_split(options: FederationOptions) -> FederationOptions:
    """Leave out the options that say how training data is split and held out."""
    return replace(
        options,
        num_clients=None,
        alpha=None,
        partitioner=None,
        labels=None,
        min_client_samples=None,
        client_val_fraction=0.0,
        client_val=None,
    )


def _count(loop: RoundLoop, round_idx: int) -> None:
    """Let a loop's counters be those at the beginning of a round, as in a run that has come that far."""
    for counters in trackers(loop.epoch_progress):
        counters.ready = round_idx
        counters.completed = round_idx
        counters.started = round_idx
        counters.processed = round_idx
    # One of these is `global_step`.
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = round_idx
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = round_idx


def _site_data(trainer: pl.Trainer, loader: Any, options: FederationOptions, num_clients: int) -> ClientData:
    """Make the data of a site.

    Args:
        trainer: The site's trainer.
        loader: The site's training loader.
        options: The arguments of the federation.
        num_clients: N. The site's samples are those of any client, so its streams are those of its number.
    """
    settings = LoaderSettings.of(loader)
    dataset, labels = training_samples(loader, options.labels, None)
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("The site has no training samples, and a client needs at least one.")
    known_labels: Tensor | None = None
    if options.client_val is not None and options.client_val.stratify:
        known_labels = find_labels(dataset, labels)
    datasets = evaluation_sets(trainer, 1)
    evaluation = None
    if datasets is not None:
        own_settings = replace(settings, drop_last=False)
        split = _split(len(datasets[0]), num_clients)  # type: ignore[arg-type]
        evaluation = ClientData(datasets[0], split, own_settings, seed=options.resolved_seed)
    return ClientData(
        dataset,
        _split(len(dataset), num_clients),  # type: ignore[arg-type]
        settings,
        seed=options.resolved_seed,
        held_out=hold_out(options),
        labels=known_labels,
        evaluation=evaluation,
        evaluation_dataset=evaluation_dataset(trainer),
    )


def _split(samples: int, num_clients: int) -> Partition:
    return _SharedSamples((torch.arange(samples),) * num_clients)
