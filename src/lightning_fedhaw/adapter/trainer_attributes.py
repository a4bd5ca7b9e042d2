"""Attributes of a trainer that no class declares: Lightning's connectors set some, and this package two more.

Each is read and written here and nowhere else, so that the rest of the adapter keeps honest types.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer import call

from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.options import FederationOptions


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return a trainer's own list of callbacks, which may be changed in place."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """Return the data module of the present ``fit``; None if it was given loaders."""
    datamodule: pl.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


def configure_model(trainer: pl.Trainer) -> None:
    """Let the module make what it makes in ``configure_model``, which Lightning does after all callbacks' ``setup``.

    Lightning will call the hook again: it has to allow for that in any case.
    """
    call._call_configure_model(trainer)


def profiler_of(trainer: pl.Trainer) -> Profiler:
    """Return a trainer's profiler, which does nothing unless one was given."""
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
    return profiler


def is_development_run(trainer: pl.Trainer) -> bool:
    """Return whether a trainer was given ``fast_dev_run``, which may be a flag or a number of batches."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def logs_settings(trainer: pl.Trainer) -> bool:
    """Return whether settings are given to the loggers: the argument ``enable_autolog_hparams``."""
    # Older versions of Lightning do not have the attribute.
    return bool(getattr(trainer, "enable_autolog_hparams", True))


def log_every_round(trainer: pl.Trainer) -> None:
    """Let callbacks that log by themselves do so after every batch, which is a round."""
    trainer.log_every_n_steps = 1  # type: ignore[attr-defined]


def is_validated_by_time(trainer: pl.Trainer) -> bool:
    """Return whether a trainer was given a ``val_check_interval`` in minutes or hours."""
    # Older versions of Lightning do not have the attribute.
    return getattr(trainer, "_val_check_time_interval", None) is not None


def start_validation_clock(trainer: pl.Trainer, now: float) -> None:
    """Set the times from which Lightning measures a ``val_check_interval`` in minutes or hours.

    Args:
        trainer: The trainer.
        now: The present time of ``time.monotonic``.
    """
    trainer._train_start_time = now  # type: ignore[attr-defined]
    trainer._last_val_time = now  # type: ignore[attr-defined]


def publish_options(trainer: pl.Trainer, options: FederationOptions) -> None:
    """Let users find the federation's arguments in force as ``trainer.federation_options``."""
    trainer.federation_options = options  # type: ignore[attr-defined]


def publish_summary(trainer: pl.Trainer, summary: dict[str, Any]) -> None:
    """Let users find the run summary as ``trainer.federation_summary``."""
    trainer.federation_summary = summary  # type: ignore[attr-defined]


def publish_client(trainer: pl.Trainer, client: object) -> None:
    """Let users find the client at work as ``trainer.federation_client``; None if there is none, or no single one."""
    trainer.federation_client = client  # type: ignore[attr-defined]


def client_of(trainer: pl.Trainer) -> object:
    """Return the client at work; None if there is none, and while many train at once an object that notices its use."""
    client: object = trainer.federation_client  # type: ignore[attr-defined]
    return client


def publish_clients(trainer: pl.Trainer, clients: FederationClients) -> None:
    """Let users find the clients' samples and their part of the model as ``trainer.federation_clients``."""
    trainer.federation_clients = clients  # type: ignore[attr-defined]
