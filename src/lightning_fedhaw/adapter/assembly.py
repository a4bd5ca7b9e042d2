"""Builds a federation from what a trainer was given: data, options, rule, channels, objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_fedhaw.adapter.evaluation import validation_loaders
from lightning_fedhaw.adapter.host import TrainerHost
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, datamodule_of, is_development_run
from lightning_fedhaw.adapter.unsupported import check_callbacks
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.engine import ClientTask
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.loader_settings import LoaderSettings, training_samples
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler, FullParticipationSampler, UniformSampler
from lightning_fedhaw.data.small_clients import large_clients, only
from lightning_fedhaw.data.split import split
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.objectives.base import ClientObjective, find_objectives
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.observer import FederatedCallback
from lightning_fedhaw.options import FederationOptions, patterns_of
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import Rule, find_rule
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.local_names import local_names

DEVELOPMENT_CLIENTS = 2
"""Clients a round with ``fast_dev_run``."""


@dataclass(frozen=True)
class AssignedData:
    """The training data, split over the clients.

    Attributes:
        clients: The data of all clients.
        partitioner: How it was split.
        assumed: What is assumed of the split because no argument says it.
    """

    clients: ClientData
    partitioner: Partitioner
    assumed: list[str]


def options_with_datamodule(trainer: pl.Trainer, options: FederationOptions) -> FederationOptions:
    """Merge the options with the settings of the data module that describe the split.

    Raises:
        ValueError: If the two disagree.
    """
    datamodule = datamodule_of(trainer)
    if not isinstance(datamodule, FederatedDataModule):
        return options
    if options.alpha is not None and datamodule.partitioner is not None:
        raise ValueError(
            f"`alpha`={options.alpha} is given in addition to the data module's `partitioner`"
            f" {datamodule.partitioner!r}. Give one of them."
        )
    datamodule_options = FederationOptions(
        num_clients=datamodule.num_clients, partitioner=datamodule.partitioner, labels=datamodule.labels
    )
    return options.merged(datamodule_options, "the trainer or the rule", "the data module")


def assign_data(trainer: pl.Trainer, loader: DataLoader[Any], options: FederationOptions) -> AssignedData:
    """Split the training data over the clients.

    Args:
        trainer: The trainer; the partition is recorded in its :class:`~lightning_fedhaw.FederatedDataModule`, if it has
            one.
        loader: The user's training loader, whose data set and settings are used.
        options: The federation's arguments, merged with those of the data module.
    """
    settings = LoaderSettings.of(loader)
    dataset, labels = training_samples(loader, options.labels, options.partitioner)
    partition, classes, assumed, partitioner = split(
        dataset,
        num_clients=options.num_clients,
        alpha=options.alpha,
        partitioner=options.partitioner,
        labels=labels,
        seed=options.resolved_seed,
        bulk=settings.bulk,
    )
    if partition.dropped:
        samples = len(dataset)  # type: ignore[arg-type]
        rank_zero_info(f"The split leaves out {partition.dropped} of {samples} samples, as it is defined.")
    num_clients = len(partition.indices)
    kept: Sequence[int] = range(num_clients)
    if options.min_client_samples is not None:
        kept = large_clients(partition, options.min_client_samples)
        partition = only(partition, kept)
    datamodule = datamodule_of(trainer)
    clients = ClientData(
        dataset,
        partition,
        settings,
        seed=options.resolved_seed,
        held_out=hold_out(options),
        labels=_labels(dataset, None if classes is None else classes.labels, options),
        class_names=None if classes is None else classes.names,
        evaluation=_evaluation_data(trainer, settings, options.resolved_seed, num_clients, kept),
        evaluation_dataset=evaluation_dataset(trainer),
    )
    if isinstance(datamodule, FederatedDataModule):
        datamodule.partition_in_use = partition
    return AssignedData(clients, partitioner, assumed)


def hold_out(options: FederationOptions) -> HoldOut | None:
    """Return what is held out of each client's data; None for nothing."""
    if options.client_val_fraction:
        return HoldOut(options.client_val_fraction)
    held_out: HoldOut | None = options.client_val
    return held_out


def _labels(dataset: Any, labels: Tensor | None, options: FederationOptions) -> Tensor | None:
    """Return the labels that the split has found, or find them if the held-out part needs them."""
    if labels is None and options.client_val is not None and options.client_val.stratify:
        return find_labels(dataset, options.labels)
    return labels


def _evaluation_data(
    trainer: pl.Trainer, settings: LoaderSettings, seed: int, num_clients: int, kept: Sequence[int]
) -> ClientData | None:
    """Return the data sets on which clients are evaluated, where the data module has one for each.

    Args:
        trainer: The trainer, which has the data module.
        settings: How batches are made.
        seed: The federation's seed.
        num_clients: The number of clients of the split.
        kept: Those that take part.
    """
    datasets = evaluation_sets(trainer, num_clients)
    if datasets is None:
        return None
    return ClientData.of_sets([datasets[client] for client in kept], settings, seed=seed)


def evaluation_sets(trainer: pl.Trainer, num_clients: int) -> Sequence[Dataset[object]] | None:
    """Return the data sets on which clients are evaluated, if the data module has one for each of so many clients."""
    datamodule = datamodule_of(trainer)
    if not isinstance(datamodule, FederatedDataModule):
        return None
    return datamodule.evaluation_sets(num_clients)


def evaluation_dataset(trainer: pl.Trainer) -> Dataset[object] | None:
    """Return the training data as it is read for evaluation, if the data module has it in another way."""
    datamodule = datamodule_of(trainer)
    if not isinstance(datamodule, FederatedDataModule):
        return None
    return datamodule.train_eval_dataset


def build_federation(
    trainer: pl.Trainer,
    data: ClientData,
    options: FederationOptions,
    nonfinite_buffers: frozenset[str] = frozenset(),
    *,
    aggregates: bool = True,
) -> Federation:
    """Build the federation of a run, on the trainer's device.

    Args:
        trainer: The trainer; its callbacks hold the rule, channels and objectives.
        data: The clients' data; moved to the device that the options name.
        options: The federation's arguments, merged with those of the data module.
        nonfinite_buffers: Names of buffers that were NaN or infinite when ``fit`` was called.
        aggregates: Whether the rule aggregates in this process, whose server it then checks.

    Raises:
        ValueError: If rule, module, data and options do not fit together.
    """
    callbacks = callbacks_of(trainer)
    rule = find_rule(callbacks)
    check_callbacks(callbacks)
    local = local_names(options.local_parameters, trainer.lightning_module)
    layout = ParameterLayout.of(trainer.lightning_module, patterns_of(options.buffers), local)
    device = trainer.strategy.root_device
    data.place(_data_device(options.data_device, device, data), channels_last=options.channels_last)
    host = TrainerHost(trainer, data.device_of_batches, nonfinite_buffers)
    local_training = _local_training(host, layout, rule, find_objectives(callbacks), options)
    seed = options.resolved_seed
    server = _server(trainer, host, layout, data, seed)
    if aggregates:
        rule.check(server)
    cohort_cap = None
    if is_development_run(trainer):
        cohort_cap = DEVELOPMENT_CLIENTS
        # As at the end of such a run: there may be many clients.
        options = replace(options, client_eval_every_n_rounds=None)
    if options.client_eval_every_n_rounds is not None:
        _prepare_evaluation(trainer, host)
    return Federation(
        RunContext(host, server, data, rule, options, Ranks.of_group(device), seed),
        _sampler(options),
        callbacks,
        local_training=local_training,
        limit=_batch_limit(trainer),
        cohort_cap=cohort_cap,
    )


def _local_training(
    host: TrainerHost,
    layout: ParameterLayout,
    rule: Rule,
    objectives: Sequence[ClientObjective],
    options: FederationOptions,
) -> LocalTraining:
    """Describe how clients train, and show it to the rule and the client objectives.

    Raises:
        ValueError: If clients have no learning rates, or several, where the rule or an objective reads one for each
            parameter.
    """
    proximal = sum((objective.proximal for objective in objectives), 0.0)
    local_training = LocalTraining(host.module, host.optimizers, proximal, options.optimizer_state)
    # Before the rule is asked what it needs, which may depend on it.
    local_training.show(rule, *objectives)
    if rule.needs_learning_rates and options.client_lr_scale is not None:
        raise ValueError(
            f"`client_lr_scale` gives clients learning rates of their own, and `{type(rule).__name__}` as it"
            " is set here computes with one rate for all of them (FedNova does so for a proximal term). Leave"
            " `client_lr_scale` out, or use a rule that does not read learning rates, such as `FedAvgCallback`."
        )
    if rule.needs_learning_rates or any(objective.needs_learning_rates for objective in objectives):
        # An optimizer without a rate for every parameter is refused now, and not in the middle of a round.
        host.learning_rates(layout)
    return local_training


def _server(trainer: pl.Trainer, host: TrainerHost, layout: ParameterLayout, data: ClientData, seed: int) -> Server:
    """Make the server, which holds the global model and computes its loss as the trainer would."""
    return Server(
        trainer.lightning_module,
        layout,
        _proxy_dataset(trainer),
        seed=seed,
        collate_fn=data.settings.collate_samples,
        prepare=host.prepare,
        context=host.precision.train_step_context,
    )


def _prepare_evaluation(trainer: pl.Trainer, host: TrainerHost) -> None:
    """Prepare the evaluation of clients after rounds.

    Raises:
        ValueError: If their data cannot be run through the module without training on it.
    """
    if not host.can_evaluate:
        raise ValueError(
            "`client_eval_every_n_rounds` evaluates clients by `validation_step`, and the module has none; with manual"
            " optimization its `training_step` would train. Define `validation_step`, or leave the argument out."
        )
    # Its loader makes the batches of clients from the first round on, whenever the first validation is.
    validation_loaders(trainer)


def reset(federation: Federation, trainer: pl.Trainer) -> None:
    """Start from round 0: callbacks may have served in another run before."""
    callbacks = callbacks_of(trainer)
    rule = federation.rule
    rule.state = rule.init(federation.server.parameters(), federation.data.num_examples)
    for callback in callbacks:
        if isinstance(callback, Channel):
            callback.reset()
    for objective in find_objectives(callbacks):
        objective.reset()


def observers(trainer: pl.Trainer, name: str) -> Callable[..., None]:
    """Return a function that calls a hook of :class:`~lightning_fedhaw.observer.FederatedCallback` of all callbacks.

    Args:
        trainer: The trainer.
        name: The name of the hook. Any callback may have it, whatever its class.
    """
    hooks = []
    for callback in callbacks_of(trainer):
        if hasattr(callback, name):
            hooks.append(getattr(callback, name))

    def observe(*arguments: object) -> None:
        for hook in hooks:
            hook(trainer, trainer.lightning_module, *arguments)

    return observe


def _proxy_dataset(trainer: pl.Trainer) -> Dataset[Any] | None:
    """Return the server's own data, which only a :class:`~lightning_fedhaw.FederatedDataModule` can have."""
    datamodule = datamodule_of(trainer)
    if isinstance(datamodule, FederatedDataModule):
        return datamodule.proxy_dataset
    return None


def _batch_limit(trainer: pl.Trainer) -> int | float | None:
    """Return the number or fraction of batches of a local pass; None for all."""
    limit = trainer.limit_train_batches
    # The type decides, as in Lightning: 1.0 is all batches, and 1 is a single one.
    if type(limit) is float and limit == 1.0:
        return None
    return limit


def client_observer(trainer: pl.Trainer, federation: Federation) -> Callable[[ClientTask], None]:
    """Call ``on_client_start`` of all callbacks that have it, with the client's model in the module."""
    hooks = _implemented(trainer, "on_client_start")

    def observe(task: ClientTask) -> None:
        if not hooks:
            return
        federation.server.write(task.start, task.buffers)
        federation.host.client = task.client
        try:
            for hook in hooks:
                hook(trainer, trainer.lightning_module, task.client)
        finally:
            federation.host.client = None

    return observe


def aggregation_observer(trainer: pl.Trainer) -> Callable[[Aggregated], None] | None:
    """Call ``on_aggregation`` of all callbacks that have it; ``None`` if no callback does."""
    hooks = _implemented(trainer, "on_aggregation")
    if not hooks:
        return None

    def observe(aggregated: Aggregated) -> None:
        for hook in hooks:
            hook(trainer, trainer.lightning_module, aggregated)

    return observe


def _implemented(trainer: pl.Trainer, name: str) -> list[Callable[..., None]]:
    """Return a hook of all callbacks that do something in it, so that the others cost nothing."""
    hooks = []
    for callback in callbacks_of(trainer):
        is_inherited = getattr(type(callback), name, None) is getattr(FederatedCallback, name)
        if hasattr(callback, name) and not is_inherited:
            hooks.append(getattr(callback, name))
    return hooks


def _sampler(options: FederationOptions) -> CohortSampler:
    if options.sampler is not None:
        return options.sampler  # type: ignore[no-any-return]
    if options.clients_per_round is None:
        return FullParticipationSampler()
    return UniformSampler(options.clients_per_round)


def _data_device(choice: str, device: torch.device, data: ClientData) -> torch.device | None:
    """Choose where training data in memory is kept.

    Args:
        choice: The argument ``data_device``.
        device: The model's device.
        data: The clients' data.

    Returns:
        The device; None to leave the data where it is.
    """
    if device.type == "cpu" or choice == "cpu":
        return None
    if choice == "model":
        return device
    if device.type != "cuda":
        return None
    # The other half is for the model, activations and the clients' vectors.
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if data.nbytes > free_bytes // 2:
        return None
    return device
