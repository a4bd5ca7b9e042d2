"""The arguments of a federation as one frozen record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch

from lightning_fedhaw import arguments

OptimizerState = Literal["fresh", "kept"]
BufferPolicy = Literal["average", "keep", "local", "recalibrate"]
OnNonfinite = Literal["exclude", "raise"]
EmptyRound = Literal["skip", "follow"]
Storage = Literal["auto", "device", "host"]
EngineName = Literal["auto", "sequential", "vectorized"]
DataDevice = Literal["auto", "model", "cpu"]
Reduction = Literal["fast", "ordered"]

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FederationOptions:
    """Who the clients are, which of them come, and what they do in a round.

    The same names are arguments of :class:`~lightning_fedhaw.FederatedTrainer` and of every rule callback; where both
    say something they must agree.

    Attributes:
        num_clients: N, the number of clients the training data is split over. Default: what the data module says,
            else 10.
        alpha: Concentration of a label-skewed Dirichlet split; small is unequal. Short for
            ``partitioner=DirichletPartitioner(alpha)``. Default: 0.1 where labels are found, else an IID split.
        partitioner: How the training data is split; see ``lightning_fedhaw.data``.
        labels: Labels for a label-skewed split: an array ``[samples]``, or a callable that takes the dataset. Default:
            the dataset's ``targets`` or ``labels``, else a second integer item of its samples.
        clients_per_round: Clients drawn per round, a number or a fraction of N. Default: everyone.
        sampler: Who comes in a round; excludes ``clients_per_round``.
        local_epochs: Passes over its own data that a client makes in a round. Default: 1.
        local_steps: Optimizer steps that a client makes in a round, whatever its size; excludes ``local_epochs``.
        optimizer_state: ``"fresh"``: a client starts every round with a new optimizer state. ``"kept"``: each client
            finds the momentum and moments it left behind (held in host memory, checkpointed).
        buffers: What happens to buffers such as BatchNorm statistics, but for those of frozen modules in evaluation
            mode, which stay. ``"average"``: floating-point buffers by the rule's normalized weights, integer ones by
            their maximum. ``"keep"``: the server's never change. ``"local"``: each client keeps its own; the server's
            are their average. ``"recalibrate"``: recomputed with the new global model on the cohort's training data.
        on_nonfinite: ``"exclude"``: a client that returns NaN or infinity is named in a warning and left out.
            ``"raise"``: it ends the run.
        empty_round: A round in which no client update is received. ``"skip"``: nothing changes. ``"follow"``: the
            rule runs on what the channel filled in, as the FedHAW authors' code does.
        client_val_fraction: Share of each client's data held out of training for the run summary's per-client
            metrics. 0 evaluates on the training data, at most 1,000 samples a client.
        client_eval: Whether the final global model is evaluated on each client at the end.
        storage: Where the cohort's vectors are kept. ``"auto"``: nowhere if the rule only needs their weighted sum,
            else on the model's device. ``"device"``, ``"host"``: there.
        storage_dtype: Dtype of the stored displacements, such as ``torch.bfloat16``; the layout's by default.
        engine: How a cohort trains. ``"sequential"``: one client after another; takes any module. ``"vectorized"``: all
            at once in one batched computation; takes modules whose step is a function. ``"auto"``: by the rule in
            ``docs/speed.md``.
        compile_clients: Whether the vectorized engine compiles its step with ``torch.compile``, from the second round
            on; pays for small models and many rounds.
        chunk_memory: Bytes that the vectorized engine may use at a time, such as ``2**30``; more clients than fit are
            trained chunk by chunk. Default: a quarter of the memory that is free.
        channels_last: Whether 4-D parameters and inputs are laid out channels-last while clients train; faster for
            most convolutional models. Images in memory with several channels are copied once.
        data_device: Where training data that is tensors in memory is kept. ``"model"``: on the model's device, moved
            once. ``"cpu"``: where it is; batches are moved. ``"auto"``: on the model's device if it fits into half of
            the memory that is free there.
        reduction: How sums over clients are formed on several processes. ``"fast"``: each process sums its own
            clients. ``"ordered"``: in the order of the clients, which gives the bits of one process.
        seed: Seed of every draw the federation makes. Default: the one given to ``seed_everything``, else 0.
    """

    num_clients: int | None = None
    alpha: float | None = None
    partitioner: Any = None
    labels: Any | Callable[[Any], Any] = None
    clients_per_round: int | float | None = None
    sampler: Any = None
    local_epochs: int | None = None
    local_steps: int | None = None
    optimizer_state: OptimizerState = "fresh"
    buffers: BufferPolicy = "average"
    on_nonfinite: OnNonfinite = "exclude"
    empty_round: EmptyRound = "skip"
    client_val_fraction: float = 0.0
    client_eval: bool = True
    storage: Storage = "auto"
    storage_dtype: torch.dtype | None = None
    engine: EngineName = "auto"
    compile_clients: bool = False
    chunk_memory: int | None = None
    channels_last: bool = False
    data_device: DataDevice = "auto"
    reduction: Reduction = "fast"
    seed: int | None = None

    def __post_init__(self) -> None:
        # One after another, because later checks use values that earlier ones have converted.
        self._assign(self._checked_split())
        self._assign(self._checked_round())
        self._assign(self._checked_engine())

    def _assign(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            # The record is frozen, and its own `__setattr__` would refuse.
            object.__setattr__(self, name, value)

    def _checked_split(self) -> dict[str, Any]:
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
            "client_val_fraction": arguments.number(
                "client_val_fraction",
                self.client_val_fraction,
                minimum=0,
                below=1,
                hint="0.1 holds out a tenth of each client's data.",
            ),
            "seed": arguments.optional(arguments.integer, "seed", self.seed, minimum=0),
        }

    def _checked_round(self) -> dict[str, Any]:
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
            "local_epochs": arguments.optional(arguments.integer, "local_epochs", self.local_epochs, minimum=1),
            "local_steps": arguments.optional(arguments.integer, "local_steps", self.local_steps, minimum=1),
            "optimizer_state": arguments.choice("optimizer_state", self.optimizer_state, OptimizerState),
            "buffers": arguments.choice("buffers", self.buffers, BufferPolicy),
            "on_nonfinite": arguments.choice("on_nonfinite", self.on_nonfinite, OnNonfinite),
            "empty_round": arguments.choice("empty_round", self.empty_round, EmptyRound),
            "client_eval": arguments.flag("client_eval", self.client_eval),
        }

    def _checked_engine(self) -> dict[str, Any]:
        return {
            "storage": arguments.choice("storage", self.storage, Storage),
            "storage_dtype": arguments.optional(arguments.choice, "storage_dtype", self.storage_dtype, STORAGE_DTYPES),
            "engine": arguments.choice("engine", self.engine, EngineName),
            "compile_clients": arguments.flag("compile_clients", self.compile_clients),
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
    for name in arguments.constructor_names(type(owner)):
        value = vars(owner).get(name)
        if name in hidden or value is None:
            continue
        settings.append(f"{name}={replacements.get(name) or _short_repr(value)}")
    return ", ".join(settings)


def _short_repr(value: Any) -> str:
    """Return a setting in few characters: functions and classes by name, large values by their type."""
    if isinstance(value, partial):
        call_arguments = [_short_repr(argument) for argument in value.args]
        call_arguments += [f"{name}={_short_repr(argument)}" for name, argument in value.keywords.items()]
        return f"{_short_repr(value.func)}({', '.join(call_arguments)})"
    if isinstance(value, torch.Tensor) and value.numel() <= 4:
        return _short_repr(value.tolist())
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"({', '.join(map(_short_repr, value))})"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (int, str)):
        return str(value)
    return str(getattr(value, "__name__", type(value).__name__))
