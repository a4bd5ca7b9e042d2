"""The arguments of a federation as one frozen record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, cast

import torch

from lightning_fedhaw import argument_names, arguments, per_client

OptimizerState = Literal["fresh", "kept"]
BufferPolicy = Literal["average", "keep", "local", "recalibrate"]
BufferPolicies = BufferPolicy | Mapping[str, BufferPolicy]
OnNonfinite = Literal["exclude", "raise"]
EmptyRound = Literal["skip", "follow"]
Storage = Literal["auto", "device", "host"]
EngineName = Literal["auto", "sequential", "vectorized"]
DataDevice = Literal["auto", "model", "cpu"]
Reduction = Literal["fast", "ordered"]

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FederationOptions(argument_names.NamedArguments):
    """The arguments of a federation: its clients, their sampling and their local training.

    The same names are arguments of :class:`~lightning_fedhaw.FederatedTrainer` and of every rule callback. If an
    argument is given to both, the values must agree.

    Attributes:
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
    """

    num_clients: int | None = None
    alpha: float | None = None
    partitioner: Any = None
    labels: Any | Callable[[Any], Any] = None
    min_client_samples: int | None = None
    clients_per_round: int | float | None = None
    sampler: Any = None
    local_epochs: int | float | Sequence[int | float] | Mapping[int, int | float] | None = None
    local_steps: int | Sequence[int] | Mapping[int, int] | None = None
    client_lr_scale: float | Sequence[float] | Mapping[int, float] | Callable[[int], float] | None = None
    optimizer_state: OptimizerState = "fresh"
    buffers: BufferPolicies = "average"
    local_parameters: str | list[str] | Callable[[str], bool] | None = None
    on_nonfinite: OnNonfinite = "exclude"
    max_nonfinite_rounds: int = 20
    empty_round: EmptyRound = "skip"
    client_val_fraction: float = 0.0
    client_val: Any = None
    client_eval: bool = True
    client_eval_every_n_rounds: int | None = None
    run_summary: bool = True
    storage: Storage = "auto"
    storage_dtype: torch.dtype | None = None
    engine: EngineName = "auto"
    compile_clients: bool = False
    share_calls: bool = False
    chunk_memory: int | None = None
    channels_last: bool = False
    data_device: DataDevice = "auto"
    reduction: Reduction = "fast"
    seed: int | None = None

    def __post_init__(self) -> None:
        # One after another, because later checks use values that earlier ones have converted.
        self._assign(self._checked_split())
        self._assign(self._checked_hold_out())
        self._assign(self._checked_round())
        self._assign(self._checked_engine())

    def _assign(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            # The record is frozen, and its own `__setattr__` would refuse.
            object.__setattr__(self, name, value)

    def _checked_split(self) -> dict[str, object]:
        if self.alpha is not None and self.partitioner is not None:
            raise ValueError(
                "Give `alpha` or `partitioner`, not both: `alpha` is short for `DirichletPartitioner(alpha)`."
            )
        return {
            "num_clients": arguments.optional(arguments.integer, "num_clients", self.num_clients, minimum=1),
            "alpha": arguments.optional(
                arguments.number, "alpha", self.alpha, above=0, hint="0.1 is strong label skew, 100 nearly IID."
            ),
            "partitioner": arguments.optional(
                arguments.provider,
                "partitioner",
                self.partitioner,
                "needs_labels",
                kind="lightning_fedhaw.data.Partitioner",
                example="IIDPartitioner()",
            ),
            "min_client_samples": arguments.optional(
                arguments.integer, "min_client_samples", self.min_client_samples, minimum=1
            ),
            "seed": arguments.optional(arguments.integer, "seed", self.seed, minimum=0),
        }

    def _checked_hold_out(self) -> dict[str, object]:
        if self.client_val is not None and self.client_val_fraction:
            raise ValueError(
                "Give `client_val` or `client_val_fraction`, not both: the fraction is short for `HoldOut(fraction)`."
            )
        return {
            "client_val": arguments.optional(
                arguments.provider,
                "client_val",
                self.client_val,
                "hold_out",
                kind="lightning_fedhaw.data.HoldOut",
                example="HoldOut(samples=20)",
            ),
            "client_val_fraction": arguments.number(
                "client_val_fraction",
                self.client_val_fraction,
                minimum=0,
                below=1,
                hint="0.1 holds out a tenth of each client's data.",
            ),
        }

    def _checked_round(self) -> dict[str, object]:
        per_round = arguments.optional(arguments.count_or_share, "clients_per_round", self.clients_per_round)
        if isinstance(per_round, int) and self.num_clients is not None and per_round > self.num_clients:
            raise ValueError(f"`clients_per_round` must be at most `num_clients`={self.num_clients}, got {per_round}.")
        if per_round is not None and self.sampler is not None:
            raise ValueError(
                "Give `clients_per_round` or `sampler`, not both: a sampler determines the number of clients."
            )
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError(
                f"Give `local_epochs` or `local_steps`, not both, got {self.local_epochs!r} and {self.local_steps!r}."
            )
        return {
            "clients_per_round": per_round,
            "sampler": arguments.optional(
                arguments.provider,
                "sampler",
                self.sampler,
                "sample",
                kind="lightning_fedhaw.data.CohortSampler",
                example="UniformSampler(10)",
            ),
            **self._checked_work(),
            "optimizer_state": arguments.choice("optimizer_state", self.optimizer_state, OptimizerState),
            "buffers": _checked_policies(self.buffers),
            "local_parameters": arguments.optional(arguments.name_patterns, "local_parameters", self.local_parameters),
            "on_nonfinite": arguments.choice("on_nonfinite", self.on_nonfinite, OnNonfinite),
            "max_nonfinite_rounds": arguments.integer("max_nonfinite_rounds", self.max_nonfinite_rounds, minimum=1),
            "empty_round": arguments.choice("empty_round", self.empty_round, EmptyRound),
            "client_eval": arguments.flag("client_eval", self.client_eval),
            "client_eval_every_n_rounds": arguments.optional(
                arguments.integer, "client_eval_every_n_rounds", self.client_eval_every_n_rounds, minimum=1
            ),
            "run_summary": arguments.flag("run_summary", self.run_summary),
        }

    def _checked_work(self) -> dict[str, object]:
        """Check what may differ between clients."""
        values: dict[str, object] = {"local_epochs": None, "local_steps": None, "client_lr_scale": self.client_lr_scale}
        if self.local_epochs is not None:
            values["local_epochs"] = per_client.one_or_per_client(arguments.passes, "local_epochs", self.local_epochs)
        if self.local_steps is not None:
            values["local_steps"] = per_client.one_or_per_client(
                arguments.integer, "local_steps", self.local_steps, minimum=1
            )
        if self.client_lr_scale is not None and not callable(self.client_lr_scale):
            values["client_lr_scale"] = per_client.one_or_per_client(
                arguments.number, "client_lr_scale", self.client_lr_scale, above=0
            )
        if self.num_clients is not None and self.min_client_samples is None:
            for name, value in values.items():
                per_client.check_clients(name, value, self.num_clients)
        return values

    def _checked_engine(self) -> dict[str, object]:
        return {
            "storage": arguments.choice("storage", self.storage, Storage),
            "storage_dtype": arguments.optional(arguments.choice, "storage_dtype", self.storage_dtype, STORAGE_DTYPES),
            "engine": arguments.choice("engine", self.engine, EngineName),
            "compile_clients": arguments.flag("compile_clients", self.compile_clients),
            "share_calls": arguments.flag("share_calls", self.share_calls),
            "chunk_memory": arguments.optional(arguments.integer, "chunk_memory", self.chunk_memory, minimum=1),
            "channels_last": arguments.flag("channels_last", self.channels_last),
            "data_device": arguments.choice("data_device", self.data_device, DataDevice),
            "reduction": arguments.choice("reduction", self.reduction, Reduction),
        }

    def merged(
        self, other: FederationOptions, owner: str = "the trainer", other_owner: str = "the rule callback"
    ) -> FederationOptions:
        """Return these options, with those of another record where only the other one sets them.

        Args:
            other: The other record.
            owner: Where these options were given, for the message.
            other_owner: Where the other options were given, for the message.

        Raises:
            ValueError: If both records set an option to different values.
        """
        values: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            other_value = getattr(other, option.name)
            is_set = not _is_same(value, option.default)
            is_set_by_other = not _is_same(other_value, option.default)
            if is_set and is_set_by_other and not _is_same(value, other_value):
                raise ValueError(
                    f"`{option.name}` is given to both {owner} ({value!r}) and {other_owner} ({other_value!r}) and they"
                    " differ. Give it once."
                )
            values[option.name] = value if is_set else other_value
        return FederationOptions(**values)

    @property
    def resolved_seed(self) -> int:
        """The seed in use: the one given, else the one of ``seed_everything``, else 0."""
        if self.seed is not None:
            return self.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0))


def patterns_of(buffers: BufferPolicies) -> list[str]:
    """Return the name patterns of the argument ``buffers``; none if it is one policy for all."""
    return [] if isinstance(buffers, str) else list(buffers)


def _checked_policies(buffers: object) -> BufferPolicies:
    """Check the argument ``buffers``: a policy, or a mapping from name patterns to policies."""
    if not isinstance(buffers, Mapping):
        hint = 'Or give a mapping from name patterns to these, such as `{"encoder.*": "local"}`.'
        return cast("BufferPolicy", arguments.choice("buffers", buffers, BufferPolicy, hint=hint))
    if not buffers or not all(isinstance(pattern, str) for pattern in buffers):
        raise arguments.invalid("buffers", "a policy, or a mapping from one or more name patterns to policies", buffers)
    policies: dict[str, BufferPolicy] = {}
    for pattern, policy in buffers.items():
        policies[str(pattern)] = arguments.choice(f'buffers["{pattern}"]', policy, BufferPolicy)
    return policies


def _is_same(first: object, second: object) -> bool:
    """Return whether two values are the same object, or equal and of the same type; arrays are never equal."""
    if first is second:
        return True
    # Comparing arrays gives an array, and 1 == 1.0 == True although `clients_per_round` tells them apart.
    if type(first) is not type(second) or hasattr(first, "__array__"):
        return False
    return bool(first == second)


def repr_settings(owner: object, /, *hidden: str, **replacements: str | None) -> str:
    """Return the class name and the settings of an object in one line; see :func:`settings_of`."""
    return f"{type(owner).__name__}({settings_of(owner, *hidden, **replacements)})"


def settings_of(owner: object, /, *hidden: str, **replacements: str | None) -> str:
    """Return the settings of an object in one line.

    Its settings are the arguments of its constructors that it keeps under their own names and that are not ``None``.

    Args:
        owner: A rule, channel, objective or partitioner.
        hidden: Names of settings to leave out.
        replacements: Texts to use instead of a setting's value, by name.
    """
    settings = []
    for name in argument_names.constructor_names(type(owner)):
        value = vars(owner).get(name)
        if name in hidden or value is None:
            continue
        settings.append(f"{name}={replacements.get(name) or _short_repr(value)}")
    return ", ".join(settings)


def _short_repr(value: object) -> str:
    """Return a setting in few characters: functions and classes by name, large values by their type."""
    if isinstance(value, partial):
        called = value.func
        positional = value.args
        if positional and called.__module__.partition(".")[0] == "jsonargparse":
            # The command line makes a class through a function of its own, whose last argument is the class.
            called = positional[-1]
            positional = ()
        call_arguments = [_short_repr(argument) for argument in positional]
        for name, argument in value.keywords.items():
            call_arguments.append(f"{name}={_short_repr(argument)}")
        return f"{_short_repr(called)}({', '.join(call_arguments)})"
    if isinstance(value, torch.Tensor) and value.numel() <= 4:
        return _short_repr(value.tolist())
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"({', '.join(map(_short_repr, value))})"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (int, str)):
        return str(value)
    return str(getattr(value, "__name__", type(value).__name__))
