"""The first entry point: a Lightning trainer whose epochs are communication rounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.adapter.attach import install_loops
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint, check_files
from lightning_fedhaw.adapter.progress import replace_default_bar
from lightning_fedhaw.adapter.strategy import check_world_size, default_strategy
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.adapter.unsupported import (
    check_accelerator,
    check_callbacks,
    check_strategy,
    check_trainer,
    default_accelerator,
)
from lightning_fedhaw.channel.base import check_keys
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.federation.clients import FederationClients
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import add_history
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
        min_client_samples: Clients with fewer samples, held-out ones included, are left out, with a warning; the
            others are renumbered in their order. Default: 1.
        clients_per_round: Number of clients sampled in each round, or a fraction of N. Default: all clients.
        sampler: Client sampling: selects the clients of each round. Cannot be combined with ``clients_per_round``.
        local_epochs: Passes that a client makes over its own data in a round; a fraction such as 0.25 is that share of
            its batches, rounded up. One number, or one for each client: a list, or a mapping from clients. Default: 1.
        local_steps: Optimizer steps that each client makes in a round, whatever the size of its data. One number, or
            one for each client. Cannot be combined with ``local_epochs``.
        client_lr_scale: Factor on a client's learning rates, in all parameter groups, while it trains. One number for
            each client, or a function of the client's number. Default: 1.
        optimizer_state: ``"fresh"``: a client starts every round with a new optimizer state. ``"kept"``: a client
            resumes the optimizer state (momentum, moments) of its last round, which is held in host memory and in
            checkpoints.
        buffers: How the server updates buffers such as BatchNorm statistics. ``"average"``: floating-point buffers are
            averaged with the rule's normalized weights, of integer buffers the maximum is taken. ``"keep"``: the
            server's buffers never change. ``"local"``: each client keeps its own; the server's running statistics are
            their average, to evaluate the global model. ``"recalibrate"``: they are recomputed with the new global
            model on the cohort's training data. Or a mapping from name patterns to policies, such as
            ``{"encoder.*": "local"}``: the first match counts, and what none matches is averaged. Frozen tensors may
            change only if a pattern matches them.
        local_parameters: Trainable parameters that stay with the clients: a name or a pattern such as ``"head.*"``, a
            list of them, or a callable that takes a name and returns whether it is local. Each client trains and keeps
            its own, and neither sends nor receives them. The global model keeps their initial values.
        on_nonfinite: What happens if a client returns NaN or infinity. ``"exclude"``: its update is left out of the
            round, and a warning names the client. ``"raise"``: the run ends with an error.
        max_nonfinite_rounds: End the run after this many rounds in a row in which something was received, and every
            received update held NaN or infinity. Rounds whose messages were all lost do not count. A round in which
            more than half of the clients trained, and all of them failed, ends it at once.
        empty_round: What happens in a round in which no client update is received. ``"skip"``: nothing changes.
            ``"follow"``: a rule that takes the substitutes of the channel runs on them, as in the FedHAW authors' code.
        client_val_fraction: Fraction of each client's data that is held out of training, for the per-client metrics of
            the run summary. With 0 they are computed on the training data, on at most 1,000 samples per client.
        client_val: What is held out of each client's data, if it is not a random fraction: a ``HoldOut``. Cannot be
            combined with ``client_val_fraction``.
        client_eval: Whether the final global model is evaluated on each client's data at the end of ``fit``.
        client_eval_every_n_rounds: Evaluate the global model on each client's data after every n-th round too, and log
            how each metric of the validation is spread over the clients, as ``METRIC/clients_worst_decile`` and so on.
            Default: at the end only.
        run_summary: Whether the run summary is printed at the end of ``fit``. ``federation_summary`` and the loggers
            have it in any case.
        storage: Where the vectors of the cohort are stored. ``"auto"``: not at all if the rule only needs their
            weighted sum, else on the model's device. ``"device"``: on the model's device. ``"host"``: in host memory.
        storage_dtype: Dtype of the stored displacements, such as ``torch.bfloat16``. Default: that of the server's
            parameter vector.
        engine: How the clients of a round are trained. ``"sequential"``: one after another; takes any module.
            ``"vectorized"``: many at once in one batched computation; needs a ``training_step`` without side effects.
            ``"auto"``: chosen by the rule in ``docs/speed.md``.
        compile_clients: Whether the vectorized engine compiles its step with ``torch.compile``, from the second round
            on. This may pay off for small models and many rounds; on a CPU it is given up where it is slower.
        share_calls: Whether shorter last batches ride with full ones in one call of the vectorized engine, where its
            trial finds the step a mean over samples. This saves up to a third of the time of small models, and changes
            the last digits: results then depend on the number of processes and on where a run was resumed.
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
        federation_client: The client at work, during local training and the evaluation of clients; else ``None``.
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
    federation_client: int | None
    federation_clients: FederationClients

    def __init__(
        self,
        *,
        rounds: int | None = None,
        num_clients: int | None = None,
        alpha: float | None = None,
        partitioner: Partitioner | None = None,
        labels: Any = None,
        min_client_samples: int | None = None,
        clients_per_round: int | float | None = None,
        sampler: CohortSampler | None = None,
        local_epochs: int | float | Sequence[int | float] | Mapping[int, int | float] | None = None,
        local_steps: int | Sequence[int] | Mapping[int, int] | None = None,
        client_lr_scale: float | Sequence[float] | Mapping[int, float] | Callable[[int], float] | None = None,
        optimizer_state: Literal["fresh", "kept"] = "fresh",
        buffers: Literal["average", "keep", "local", "recalibrate"]
        | Mapping[str, Literal["average", "keep", "local", "recalibrate"]] = "average",
        local_parameters: str | list[str] | Callable[[str], bool] | None = None,
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        max_nonfinite_rounds: int = 20,
        empty_round: Literal["skip", "follow"] = "skip",
        client_val_fraction: float = 0.0,
        client_val: HoldOut | None = None,
        client_eval: bool = True,
        client_eval_every_n_rounds: int | None = None,
        run_summary: bool = True,
        storage: Literal["auto", "device", "host"] = "auto",
        storage_dtype: torch.dtype | None = None,
        engine: Literal["auto", "sequential", "vectorized"] = "auto",
        compile_clients: bool = False,
        share_calls: bool = False,
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
            min_client_samples=min_client_samples,
            clients_per_round=clients_per_round,
            sampler=sampler,
            local_epochs=local_epochs,
            local_steps=local_steps,
            client_lr_scale=client_lr_scale,
            optimizer_state=optimizer_state,
            buffers=buffers,
            local_parameters=local_parameters,
            on_nonfinite=on_nonfinite,
            max_nonfinite_rounds=max_nonfinite_rounds,
            empty_round=empty_round,
            client_val_fraction=client_val_fraction,
            client_val=client_val,
            client_eval=client_eval,
            client_eval_every_n_rounds=client_eval_every_n_rounds,
            run_summary=run_summary,
            storage=storage,
            storage_dtype=storage_dtype,
            engine=engine,
            compile_clients=compile_clients,
            share_calls=share_calls,
            chunk_memory=chunk_memory,
            channels_last=channels_last,
            data_device=data_device,
            reduction=reduction,
            seed=seed,
        )
        # A copy: Lightning adds its own callbacks to the list that it is given.
        callbacks = list(_as_list(kwargs.get("callbacks")))
        _check_callback_list(callbacks)
        _check_names(kwargs)
        if checkpoint_every_n_rounds is not None:
            checkpoint = _round_checkpoint(checkpoint_every_n_rounds, kwargs.get("enable_checkpointing"))
            kwargs["callbacks"] = [*callbacks, checkpoint]
        kwargs["max_epochs"] = _checked_rounds(rounds, kwargs)
        _choose_devices(kwargs)
        super().__init__(**kwargs)
        _refuse_silent_bf16(kwargs.get("precision"), self.precision)
        install_loops(self, options)
        check_files(self.strategy, "validate")
        self.federation_summary = {}
        check_world_size(self.num_devices * self.num_nodes)
        check_trainer(self, sync_batchnorm=bool(kwargs.get("sync_batchnorm")))
        check_callbacks(callbacks_of(self))
        replace_default_bar(self, callbacks)
        add_history(callbacks_of(self))

    def fit(self, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Train by communication rounds; the arguments are those of ``lightning.pytorch.Trainer.fit``.

        Raises:
            ValueError: If there is not exactly one aggregation rule among the callbacks.
            TypeError: If the model is not a ``lightning.pytorch.LightningModule``.
        """
        for argument in (model, *args, *kwargs.values()):
            _refuse_other_lightning(argument)
        # A module that adds callbacks may bring the rule, and what is no module is refused by Lightning.
        if isinstance(model, pl.LightningModule) and not is_overridden("configure_callbacks", model):
            find_rule(callbacks_of(self))
        super().fit(model, *args, **kwargs)


def _as_list(callbacks: Sequence[pl.Callback] | pl.Callback | None) -> list[Any]:
    """Return the argument ``callbacks``, which may be a list, a single callback or nothing, as a list."""
    if not callbacks:
        return []
    if isinstance(callbacks, list):
        return callbacks
    return [callbacks]


def _check_callback_list(callbacks: Sequence[object]) -> None:
    """Refuse several rules, classes instead of objects, and callbacks or objectives with the same key.

    That there is a rule is checked at the beginning of ``fit``: a module may add callbacks of its own.
    """
    num_rules = 0
    has_class = False
    for callback in callbacks:
        num_rules += isinstance(callback, Rule)
        has_class = has_class or isinstance(callback, type)
    if num_rules > 1 or has_class:
        # It says what is wrong. Not called otherwise, because it refuses a list without a rule as well.
        find_rule(callbacks)
    check_keys(callbacks)
    find_objectives(callbacks)


def _check_names(kwargs: Mapping[str, object]) -> None:
    """Refuse arguments that neither this trainer nor the stock one has, naming the nearest."""
    # Read from the stock trainer, so that an argument of a later version is known.
    names = {*inspect.signature(pl.Trainer).parameters, *inspect.signature(FederatedTrainer).parameters}
    argument_names.check_names("FederatedTrainer", kwargs, names - {"kwargs"})


def _round_checkpoint(rounds: int, enable_checkpointing: object) -> RoundCheckpoint:
    """Create the callback of the argument ``checkpoint_every_n_rounds``.

    Args:
        rounds: Its value.
        enable_checkpointing: The stock trainer's argument, None if it was not given.

    Raises:
        ValueError: If the two contradict each other.
    """
    interval = arguments.integer("checkpoint_every_n_rounds", rounds, minimum=1)
    if enable_checkpointing is False:
        raise ValueError(
            f"`checkpoint_every_n_rounds`={rounds} contradicts `enable_checkpointing=False`. Leave one of them out."
        )
    return RoundCheckpoint(interval)


def _checked_rounds(rounds: int | None, kwargs: Mapping[str, Any]) -> int:
    """Return the number of rounds, which may have been given as ``max_epochs``.

    Args:
        rounds: The argument ``rounds``.
        kwargs: The arguments of the stock trainer.

    Raises:
        ValueError: If there is neither, if both differ, or if the number is below -1.
    """
    max_epochs = kwargs.get("max_epochs")
    if max_epochs is not None:
        if rounds is not None and rounds != max_epochs:
            raise ValueError(
                f"`rounds`={rounds} and `max_epochs`={max_epochs} mean the same and differ. Give `rounds`."
            )
        rounds = max_epochs
    if rounds is None:
        for name in ("max_steps", "max_time", "fast_dev_run"):
            if kwargs.get(name) not in (None, -1, False):
                # The other limit ends the run, as it does in the stock trainer without `max_epochs`.
                return -1
        raise ValueError(
            "`rounds` must say how many communication rounds to run (-1: until something stops it), got none."
        )
    return arguments.integer("rounds", rounds, minimum=-1, hint="-1 runs until something stops it.")


def _choose_devices(kwargs: dict[str, Any]) -> None:
    """Check accelerator and strategy, and choose them where they are left open.

    Args:
        kwargs: The arguments of the stock trainer; changed in place.

    Raises:
        ValueError: If the accelerator or the strategy is not supported in federated training.
    """
    strategy = kwargs.get("strategy", "auto")
    check_strategy(strategy)
    check_accelerator(kwargs.get("accelerator"))
    accelerator = default_accelerator(kwargs.get("accelerator", "auto"), strategy)
    kwargs["accelerator"] = accelerator
    if strategy == "auto":
        kwargs["strategy"] = default_strategy(accelerator, kwargs.get("devices", "auto"), kwargs.get("num_nodes", 1))


def _refuse_silent_bf16(requested: object, precision: str) -> None:
    """Refuse a precision that Lightning has replaced by another one.

    Args:
        requested: The trainer's argument.
        precision: The precision that the trainer has.
    """
    if str(requested) in ("16", "16-mixed") and precision == "bf16-mixed":
        raise ValueError(
            "`precision='16-mixed'` is for GPUs: on this CPU Lightning would train in bf16-mixed instead. Set"
            " `precision='bf16-mixed'` or `precision='32-true'`, or choose an accelerator."
        )


def _refuse_other_lightning(argument: object) -> None:
    """Refuse an object of the package ``pytorch_lightning``, whose classes only have the same names."""
    for base in type(argument).__mro__:
        if base.__module__.split(".")[0] == "pytorch_lightning":
            raise TypeError(
                f"`fit` needs `lightning.pytorch` objects, got {type(argument).__name__}, which is a"
                f" `pytorch_lightning.{base.__name__}`; the two packages do not mix. Import `lightning.pytorch as pl`"
                " instead of `pytorch_lightning as pl` or, where another package imports it,"
                " `lightning_fedhaw.alias_pytorch_lightning` at the top of the program."
            )
