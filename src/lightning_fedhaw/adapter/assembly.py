"""Builds a federation from what a trainer was given: data, options, rule, channels, objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_fedhaw.adapter.host import TrainerHost
from lightning_fedhaw.adapter.unsupported import check_callbacks
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.loader_settings import LoaderSettings
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.samplers import CohortSampler, FullParticipationSampler, UniformSampler
from lightning_fedhaw.data.split import split
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import find_rule
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.local_names import local_names

DEVELOPMENT_CLIENTS = 2
"""Clients a round with ``fast_dev_run``."""


@dataclass(frozen=True)
class AssignedData:
    """The training data, split over the clients.

    Attributes:
        clients: Each client's share.
        assumed: What was assumed of the split because nobody said it.
    """

    clients: ClientData
    assumed: list[str]


def options_with_datamodule(trainer: Any, options: FederationOptions) -> FederationOptions:
    """The options together with what the data module says of the split.

    Raises:
        ValueError: If the two disagree.
    """
    datamodule = trainer.datamodule
    if not isinstance(datamodule, FederatedDataModule):
        return options
    if options.alpha is not None and datamodule.partitioner is not None:
        raise ValueError(
            f"`alpha`={options.alpha} is given beside the data module's `partitioner`"
            f" {datamodule.partitioner!r}. Give one of them."
        )
    said = FederationOptions(
        num_clients=datamodule.num_clients, partitioner=datamodule.partitioner, labels=datamodule.labels
    )
    return options.merged(said, "the trainer or the rule", "the data module")


def assign_data(trainer: Any, loader: DataLoader[Any], options: FederationOptions) -> AssignedData:
    """Split the training data over the clients.

    Args:
        trainer: The trainer; a :class:`~lightning_fedhaw.FederatedDataModule` of its own is told the partition.
        loader: The user's training loader, whose data set and settings are taken.
        options: The federation's arguments, with what the data module says.
    """
    settings = LoaderSettings.of(loader)
    partition, labels, assumed = split(
        loader.dataset,
        num_clients=options.num_clients,
        alpha=options.alpha,
        partitioner=options.partitioner,
        labels=options.labels,
        seed=options.resolved_seed,
    )
    clients = ClientData(
        loader.dataset,
        partition,
        settings,
        seed=options.resolved_seed,
        held_out=options.client_val_fraction,
        labels=labels,
    )
    if partition.dropped:
        samples = len(loader.dataset)  # type: ignore[arg-type]
        rank_zero_info(f"The split leaves out {partition.dropped} of {samples} samples, as it is defined.")
    if isinstance(trainer.datamodule, FederatedDataModule):
        trainer.datamodule.partition_in_use = partition
    return AssignedData(clients, assumed)


def build_federation(trainer: Any, data: ClientData, options: FederationOptions) -> Federation:
    """Build the federation of a run, on the trainer's device.

    Args:
        trainer: The trainer; its callbacks hold the rule, channels and objectives.
        data: The clients' data; placed where the options say.
        options: The federation's arguments, with what the data module says.

    Raises:
        ValueError: If rule, module, data and options do not go together.
    """
    rule = find_rule(trainer.callbacks)
    check_callbacks(trainer.callbacks)
    local = local_names(options.local_parameters, trainer.lightning_module)
    layout = ParameterLayout.of(trainer.lightning_module, local)
    device: torch.device = trainer.strategy.root_device
    data.place(_device_of_data(options.data_device, device, data), channels_last=options.channels_last)
    host = TrainerHost(trainer, data.device)
    objectives = find_objectives(trainer.callbacks)
    if rule.needs_learning_rates or any(objective.needs_learning_rates for objective in objectives):
        host.learning_rates(layout)
    datamodule = trainer.datamodule
    server = Server(
        trainer.lightning_module,
        layout,
        datamodule.proxy_dataset if isinstance(datamodule, FederatedDataModule) else None,
        seed=options.resolved_seed,
        collate_fn=data.settings.collate_fn,
        prepare=host.prepare,
        context=host.precision.train_step_context,
    )
    rule.check(server)
    limit = trainer.limit_train_batches  # 1.0 is all batches, 1 is one.
    return Federation(
        host,
        server,
        data,
        _sampler(options),
        rule,
        trainer.callbacks,
        options,
        limit=None if type(limit) is float and limit == 1.0 else limit,
        cohort_cap=DEVELOPMENT_CLIENTS if trainer.fast_dev_run else None,
        ranks=Ranks.of_group(device),
    )


def reset(federation: Federation, trainer: Any) -> None:
    """Begin with round 0: callbacks may have served another run before."""
    rule = federation.rule
    rule.state = rule.init(federation.server.parameters(), federation.data.num_examples)
    for callback in trainer.callbacks:
        if isinstance(callback, Channel):
            callback.reset()
    for objective in find_objectives(trainer.callbacks):
        objective.reset()


def observers(trainer: Any, name: str) -> Callable[..., None]:
    """Call an observing hook of all callbacks that have it."""
    hooks = [getattr(callback, name) for callback in trainer.callbacks if hasattr(callback, name)]

    def observe(*args: Any) -> None:
        for hook in hooks:
            hook(trainer, trainer.lightning_module, *args)

    return observe


def _sampler(options: FederationOptions) -> CohortSampler:
    if options.sampler is not None:
        return options.sampler  # type: ignore[no-any-return]
    if options.clients_per_round is None:
        return FullParticipationSampler()
    return UniformSampler(options.clients_per_round)


def _device_of_data(choice: str, device: torch.device, data: ClientData) -> torch.device | None:
    """Where training data in memory belongs; ``None`` leaves it where it is."""
    if device.type == "cpu" or choice == "cpu":
        return None
    if choice == "auto":
        return device if device.type == "cuda" and data.nbytes <= torch.cuda.mem_get_info(device)[0] // 2 else None
    return device
