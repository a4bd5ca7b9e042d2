"""The first entry point: a Lightning trainer whose epochs are communication rounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.attach import install_loops
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint, write_atomically
from lightning_fedhaw.adapter.progress import replace_default_bar
from lightning_fedhaw.adapter.strategy import check_world_size, default_strategy
from lightning_fedhaw.adapter.unsupported import (
    check_accelerator,
    check_callbacks,
    check_strategy,
    check_trainer,
    default_accelerator,
)
from lightning_fedhaw.channel.base import check_keys
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import keep_history
from lightning_fedhaw.rule import Rule, find_rule


class FederatedTrainer(pl.Trainer):
    """A ``lightning.pytorch.Trainer`` that trains an ordinary LightningModule by communication rounds.

    A round is an epoch: ``current_epoch`` and ``global_step`` count rounds, and callbacks, loggers, checkpoints,
    validation and ``fit(ckpt_path=...)`` keep their meaning. ``docs/trainer_arguments.md`` describes the effect of
    every argument of the stock trainer. The arguments from ``num_clients`` to ``seed`` are those of
    :class:`~lightning_fedhaw.FederationOptions`.

    Args:
        rounds: Number of communication rounds, instead of ``max_epochs``; -1: until the run is stopped.
        num_clients: Number of clients N that the training data is split over. Default: the number set in the data
            module, else 10.
        alpha: Concentration of a Dirichlet split by labels; a small value makes clients unequal. Short for
            ``partitioner=DirichletPartitioner(alpha)``. Default: 0.1 if labels are found, else an IID split.
        partitioner: How the training data is split over the clients; see ``lightning_fedhaw.data``.
        labels: Labels for a split by labels: an array ``[samples]``, or a callable that takes the dataset. Default: the
            dataset's ``targets`` or ``labels``, else the second item of its samples if that is an integer.
        clients_per_round: Number of clients sampled in each round, or a fraction of N. Default: all clients.
        sampler: Client sampling: selects the clients of each round. Cannot be combined with ``clients_per_round``.
        local_epochs: Passes that a client makes over its own data in a round. Default: 1.
        local_steps: Optimizer steps that each client makes in a round, whatever the size of its data. Cannot be
            combined with ``local_epochs``.
        optimizer_state: ``"fresh"``: a client starts every round with a new optimizer state. ``"kept"``: a client
            resumes the optimizer state (momentum, moments) of its last round, which is held in host memory and in
            checkpoints.
        buffers: How the server updates buffers such as BatchNorm statistics. ``"average"``: floating-point buffers are
            averaged with the rule's normalized weights, of integer buffers the maximum is taken. ``"keep"``: the
            server's buffers never change. ``"local"``: each client keeps its own; the server's are their average.
            ``"recalibrate"``: they are recomputed with the new global model on the cohort's training data. Buffers of
            frozen modules in evaluation mode never change.
        local_parameters: Trainable parameters that stay with the clients: a name or a pattern such as ``"head.*"``, a
            list of them, or a callable that takes a name and returns whether it is local. Each client trains and keeps
            its own, and neither sends nor receives them. The global model keeps their initial values.
        on_nonfinite: What happens if a client returns NaN or infinity. ``"exclude"``: its update is left out of the
            round, and a warning names the client. ``"raise"``: the run ends with an error.
        empty_round: What happens in a round in which no client update is received. ``"skip"``: nothing changes.
            ``"follow"``: the rule runs on the substitutes of the channel, as in the FedHAW authors' code.
        client_val_fraction: Fraction of each client's data that is held out of training, for the per-client metrics of
            the run summary. With 0 they are computed on the training data, on at most 1,000 samples per client.
        client_eval: Whether the final global model is evaluated on each client's data at the end of ``fit``.
        storage: Where the vectors of the cohort are stored. ``"auto"``: not at all if the rule only needs their
            weighted sum, else on the model's device. ``"device"``: on the model's device. ``"host"``: in host memory.
        storage_dtype: Dtype of the stored displacements, such as ``torch.bfloat16``. Default: that of the server's
            parameter vector.
        engine: How the clients of a round are trained. ``"sequential"``: one after another; takes any module.
            ``"vectorized"``: many at once in one batched computation; needs a ``training_step`` without side effects.
            ``"auto"``: chosen by the rule in ``docs/speed.md``.
        compile_clients: Whether the vectorized engine compiles its step with ``torch.compile``, from the second round
            on. This pays off for small models and many rounds.
        chunk_memory: Bytes that the vectorized engine may use at a time, such as ``2**30``. If not all clients fit,
            they are trained in chunks. Default: a quarter of the free memory.
        channels_last: Whether 4-D parameters and inputs are laid out channels-last while clients train, which is faster
            for most convolutional models. Images in memory with several channels are copied once.
        data_device: Where training data that consists of tensors in memory is stored. ``"model"``: on the model's
            device, moved there once. ``"cpu"``: where it is; batches are moved. ``"auto"``: on the model's device if it
            fits into half of the free memory there.
        reduction: How sums over clients are computed on several processes. ``"fast"``: each process sums its own
            clients first. ``"ordered"``: in the order of the clients, which is bit-identical to one process.
        seed: Seed of all random draws of the federation. Default: the seed given to ``seed_everything``, else 0.
        checkpoint_every_n_rounds: Write a checkpoint every this many rounds and after the last one, and keep only the
            latest (and ``last.ckpt``), for runs that may be interrupted. Short for a ``ModelCheckpoint`` in
            ``callbacks``.
        kwargs: The arguments of ``lightning.pytorch.Trainer``.

    Attributes:
        federation_summary: The run summary as a plain dict, after ``fit``; empty before.
        federation_options: The federation's arguments; from the beginning of ``fit``, including those of the rule.
        federation_clients: Each client's samples and its own part of the model, from the beginning of ``fit``.

    Raises:
        ValueError: If an argument is not supported in federated training.

    Example:
        >>> from lightning_fedhaw import FederatedTrainer, FedHAWCallback
        >>> trainer = FederatedTrainer(rounds=2, clients_per_round=5, callbacks=[FedHAWCallback()], logger=False)
        >>> trainer.max_epochs
        2
    """

    federation_summary: dict[str, Any]
    federation_options: FederationOptions
    federation_clients: FederationClients

    def __init__(
        self,
        *,
        rounds: int | None = None,
        num_clients: int | None = None,
        alpha: float | None = None,
        partitioner: Partitioner | None = None,
        labels: Any = None,
        clients_per_round: int | float | None = None,
        sampler: CohortSampler | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        optimizer_state: Literal["fresh", "kept"] = "fresh",
        buffers: Literal["average", "keep", "local", "recalibrate"] = "average",
        local_parameters: str | list[str] | Callable[[str], bool] | None = None,
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        empty_round: Literal["skip", "follow"] = "skip",
        client_val_fraction: float = 0.0,
        client_eval: bool = True,
        storage: Literal["auto", "device", "host"] = "auto",
        storage_dtype: torch.dtype | None = None,
        engine: Literal["auto", "sequential", "vectorized"] = "auto",
        compile_clients: bool = False,
        chunk_memory: int | None = None,
        channels_last: bool = False,
        data_device: Literal["auto", "model", "cpu"] = "auto",
        reduction: Literal["fast", "ordered"] = "fast",
        seed: int | None = None,
        checkpoint_every_n_rounds: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = FederationOptions(
            num_clients=num_clients,
            alpha=alpha,
            partitioner=partitioner,
            labels=labels,
            clients_per_round=clients_per_round,
            sampler=sampler,
            local_epochs=local_epochs,
            local_steps=local_steps,
            optimizer_state=optimizer_state,
            buffers=buffers,
            local_parameters=local_parameters,
            on_nonfinite=on_nonfinite,
            empty_round=empty_round,
            client_val_fraction=client_val_fraction,
            client_eval=client_eval,
            storage=storage,
            storage_dtype=storage_dtype,
            engine=engine,
            compile_clients=compile_clients,
            chunk_memory=chunk_memory,
            channels_last=channels_last,
            data_device=data_device,
            reduction=reduction,
            seed=seed,
        )
        given = kwargs.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if len([c for c in given if isinstance(c, Rule)]) > 1 or any(isinstance(c, type) for c in given):
            find_rule(given)
        check_keys(given)
        find_objectives(given)
        arguments.check_names(
            "FederatedTrainer",
            kwargs,
            {*inspect.signature(pl.Trainer).parameters, *inspect.signature(FederatedTrainer).parameters} - {"kwargs"},
        )
        if checkpoint_every_n_rounds is not None:
            every = arguments.integer("checkpoint_every_n_rounds", checkpoint_every_n_rounds, minimum=1)
            if kwargs.get("enable_checkpointing") is False:
                raise ValueError(
                    f"`checkpoint_every_n_rounds`={checkpoint_every_n_rounds} contradicts `enable_checkpointing=False`."
                    " Leave one of them out."
                )
            kwargs["callbacks"] = [*given, RoundCheckpoint(every)]
        asked_precision = kwargs.get("precision")
        max_epochs = _rounds(rounds, kwargs)
        kwargs.pop("max_epochs", None)
        check_strategy(kwargs.get("strategy", "auto"))
        check_accelerator(kwargs.get("accelerator"))
        kwargs["accelerator"] = default_accelerator(kwargs.get("accelerator", "auto"), kwargs.get("strategy", "auto"))
        if kwargs.get("strategy", "auto") == "auto":
            kwargs["strategy"] = default_strategy(
                kwargs.get("accelerator", "auto"), kwargs.get("devices", "auto"), kwargs.get("num_nodes", 1)
            )
        super().__init__(max_epochs=max_epochs, **kwargs)
        _refuse_silent_bf16(asked_precision, self.precision)
        install_loops(self, options)
        write_atomically(self.strategy)
        self.federation_summary = {}
        check_world_size(self.num_devices * self.num_nodes)
        check_trainer(self, sync_batchnorm=bool(kwargs.get("sync_batchnorm")))
        check_callbacks(cast(Any, self).callbacks)
        replace_default_bar(self)
        keep_history(self)

    def fit(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Train by communication rounds; the arguments are those of ``lightning.pytorch.Trainer.fit``.

        Raises:
            ValueError: If there is not exactly one aggregation rule among the callbacks.
            TypeError: If the model is not a ``lightning.pytorch.LightningModule``.
        """
        for thing in (model, *args, *kwargs.values()):
            _refuse_other_lightning(thing)
        if isinstance(model, pl.LightningModule) and not is_overridden("configure_callbacks", model):
            find_rule(cast(Any, self).callbacks)
        super().fit(model, *args, **kwargs)


def _rounds(rounds: int | None, kwargs: dict[str, Any]) -> int:
    if "max_epochs" in kwargs and kwargs["max_epochs"] is not None:
        if rounds is not None and rounds != kwargs["max_epochs"]:
            raise ValueError(
                f"`rounds`={rounds} and `max_epochs`={kwargs['max_epochs']} mean the same and differ. Give `rounds`."
            )
        rounds = kwargs["max_epochs"]
    if rounds is None:
        if any(kwargs.get(name) not in (None, -1, False) for name in ("max_steps", "max_time", "fast_dev_run")):
            return -1
        raise ValueError(
            "`rounds` must say how many communication rounds to play (-1: until something stops it), got none."
        )
    return arguments.integer("rounds", rounds, minimum=-1, hint="-1 plays until something stops it.")


def _refuse_silent_bf16(asked: Any, got: str) -> None:
    if str(asked) in ("16", "16-mixed") and got == "bf16-mixed":
        raise ValueError(
            "`precision='16-mixed'` is for GPUs: on this CPU Lightning would train in bf16-mixed instead. Set"
            " `precision='bf16-mixed'` or `precision='32-true'`, or choose an accelerator."
        )


def _refuse_other_lightning(thing: Any) -> None:
    for base in type(thing).__mro__:
        if base.__module__.split(".")[0] == "pytorch_lightning":
            raise TypeError(
                f"`fit` needs `lightning.pytorch` objects, got {type(thing).__name__}, which is a"
                f" `pytorch_lightning.{base.__name__}`; the two packages do not mix. Import `lightning.pytorch as pl`"
                " instead of `pytorch_lightning as pl`."
            )
