"""Values that a module logs while its clients train: collected per client, merged once a round."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

Reduction = Literal["mean", "sum", "min", "max"]

Number = Tensor | float
"""A logged number; a scalar tensor as long as reading it would wait for a device."""

_REDUCTIONS: dict[object, Reduction] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean",
    "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min",
    "max": "max", torch.max: "max", max: "max",
}  # fmt: skip


@dataclass(frozen=True)
class Logged:
    """One logged name, merged over the steps of a client or over the clients of a round.

    Attributes:
        total: The weighted sum (for ``mean``), the sum, the smallest or the largest value.
        weight: The number of examples that it was computed from.
        reduction: How values are merged.
        options: Further arguments of ``self.log``: ``prog_bar``, ``logger``, ``on_step``, ``on_epoch``,
            ``metric_attribute``.
        metric: A ``torchmetrics`` object, merged by its own reduction instead; or its name in the module.
    """

    total: float
    weight: float
    reduction: Reduction
    options: Mapping[str, Any]
    metric: Metric | str | None = None

    @property
    def value(self) -> float:
        """The merged value."""
        if self.reduction == "mean":
            return self.total / self.weight
        return self.total

    def located(self, module: nn.Module) -> Logged:
        """Replace a metric by its name in the module, so that the record can be sent to another process.

        Raises:
            ValueError: If the metric is not an attribute of the module.
        """
        if not isinstance(self.metric, Metric):
            return self
        for name, submodule in module.named_modules():
            if submodule is self.metric:
                return replace(self, metric=name)
        raise ValueError(
            f"A {type(self.metric).__name__} that is logged on several processes must be an attribute of the module,"
            " so that all of them can pool it. Make it one in the module's `__init__`."
        )

    def merged(self, other: Logged) -> Logged:
        """Merge this record with another of the same name."""
        join: dict[Reduction, Callable[[float, float], float]] = {"mean": add, "sum": add, "min": min, "max": max}
        total = join[self.reduction](self.total, other.total)
        return replace(self, total=total, weight=self.weight + other.weight)


def merge(records: Iterable[Mapping[str, Logged]]) -> dict[str, Logged]:
    """Merge several clients' records: means are weighted by examples."""
    merged: dict[str, Logged] = {}
    for record in records:
        for name, logged in record.items():
            if name in merged:
                logged = merged[name].merged(logged)
            merged[name] = logged
    return merged


def values_of(record: Mapping[str, Logged]) -> dict[str, float]:
    """Return the numbers of a client's record by name, without torchmetrics objects, which all clients share."""
    values: dict[str, float] = {}
    for name, logged in record.items():
        # A mean over no examples (`batch_size=0`) is undefined.
        is_mean_of_nothing = logged.reduction == "mean" and not logged.weight
        if logged.metric is None:
            values[name] = math.nan if is_mean_of_nothing else logged.value
    return values


class LogSettings(NamedTuple):
    """The further arguments of ``self.log``, in which all calls with one name must agree."""

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: str | Callable[..., object]
    metric_attribute: str | None

    def reduction(self, name: str) -> Reduction:
        """Return the reduction by which values are merged.

        Args:
            name: The logged name, for the error message.

        Raises:
            ValueError: If values cannot be merged that way.
        """
        key = self.reduce_fx
        if isinstance(key, str):
            key = key.lower()
        if key not in _REDUCTIONS:
            raise ValueError(
                f"`self.log({name!r}, reduce_fx=...)` takes 'mean', 'sum', 'min' or 'max', got {self.reduce_fx!r}. For"
                " another reduction log a torchmetrics Metric."
            )
        return _REDUCTIONS[key]

    def options(self) -> dict[str, Any]:
        """Return the arguments with which the round logs the merged value."""
        # The defaults of `training_step`: on the step, not on the epoch. Here the two coincide: a step is a round.
        return {
            "prog_bar": self.prog_bar,
            "logger": _or_default(self.logger, True),
            "on_step": _or_default(self.on_step, True),
            "on_epoch": _or_default(self.on_epoch, False),
            "metric_attribute": self.metric_attribute,
        }


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


class LoggedValues(NamedTuple):
    """The values that were logged under one name, and the number of examples that each was computed from."""

    settings: LogSettings
    values: list[Number]
    weights: list[float]


class _RecordedLog(partial[None]):
    """The ``log`` of a module and of callbacks while clients train.

    The module may be copied or pickled meanwhile, as it may in a stock trainer. The copy has the ``log`` of its class.

    Attributes:
        module: The module.
    """

    module: nn.Module

    def __reduce__(self) -> tuple[Any, ...]:
        # Evaluated when the copy has no attributes yet. Only a builtin, so that a file needs nothing of this package.
        return getattr, (self.module, "log")


Recorder = TypeVar("Recorder", bound="LogRecorder")


class LogRecorder:
    """A replacement of ``LightningModule.log`` while clients train.

    A call costs a copy and an append; nothing is reduced, synchronized or sent to a logger before the client is done.

    Args:
        module: The user's module.
        callbacks: Callbacks whose own ``log`` is to be recorded too.

    Attributes:
        batch_size: Samples in the current batch: the weight of a logged value, unless ``self.log`` is given another.
    """

    def __init__(self, module: nn.Module, callbacks: Iterable[pl.Callback] = ()) -> None:
        self._redirected: list[Any] = [module, *callbacks]
        self._replaced_logs: list[Callable[..., object] | None] = []
        self.batch_size = 1
        self._entries: dict[str, LoggedValues] = {}
        self._metrics: dict[str, tuple[LogSettings, Metric]] = {}

    def __enter__(self: Recorder) -> Recorder:
        # A `log` in the object's own dict is the user's replacement; the method of the class needs no copy.
        self._replaced_logs = [owner.__dict__.get("log") for owner in self._redirected]
        log = _RecordedLog(self.log)
        log.module = self._redirected[0]
        for owner in self._redirected:
            owner.log = log
        return self

    def __exit__(self, *_: object) -> None:
        for owner, replaced in zip(self._redirected, self._replaced_logs, strict=True):
            del owner.log
            if replaced is not None:
                owner.log = replaced

    def log(
        self,
        name: str,
        value: object,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., object] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: object = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a value; the arguments are those of ``LightningModule.log``.

        Raises:
            ValueError: If the value is not a single number, or the arguments cannot be followed.
        """
        settings = LogSettings(prog_bar, logger, on_step, on_epoch, reduce_fx, metric_attribute)
        # Tensors first: asking whether something is a Metric, an abstract class, is slow.
        if not isinstance(value, Tensor) and isinstance(value, Metric):
            self._metrics[name] = (settings, value)
            return
        entry = self._entries.get(name)
        if entry is None:
            self._check(name, on_step, on_epoch, enable_graph)
            entry = self._entries[name] = LoggedValues(settings, [], [])
        elif entry.settings != settings:
            raise ValueError(
                f"`self.log({name!r}, ...)` was called twice with different arguments, which cannot be merged."
            )
        if batch_size is None:
            batch_size = self.batch_size
        entry.values.append(self._number(name, value))
        entry.weights.append(float(batch_size))

    @staticmethod
    def _check(name: str, on_step: bool | None, on_epoch: bool | None, enable_graph: bool) -> None:
        """Refuse arguments of ``self.log`` that make no sense, or none while clients train."""
        if on_step is False and not on_epoch:
            raise ValueError(f"`self.log({name!r}, on_step=False, on_epoch=False)` logs nothing; set one of them.")
        if enable_graph:
            raise ValueError(
                f"`self.log({name!r}, enable_graph=True)` is not supported: what clients log is merged once a round,"
                " when their graphs are gone. Remove it."
            )

    def _number(self, name: str, value: object) -> Number:
        """Return a logged value as a number that no later change reaches.

        Raises:
            ValueError: If it is not a single number.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"`self.log({name!r}, ...)` takes a single number, got a tensor of the shape {list(value.shape)}."
                    f" Log `{name}.mean()`."
                )
            return self._snapshot(value)
        if not isinstance(value, numbers.Number):
            raise ValueError(
                f"`self.log({name!r}, ...)` takes a number, a tensor or a torchmetrics Metric, got"
                f" {type(value).__name__}. Log each entry under its own name."
            )
        return cast(float, value)

    @staticmethod
    def _snapshot(value: Tensor) -> Number:
        """Copy a tensor, since it may be changed in place after it was logged."""
        if value.is_cpu:
            return value.item()
        # Reading it would make the host wait for the device in every step.
        return value.detach().clone().reshape(())

    def recorded(self) -> dict[str, list[Number]]:
        """Return the numbers that were recorded since the last :meth:`collect`, by name."""
        return {name: entry.values for name, entry in self._entries.items()}

    def examples(self) -> dict[str, list[float]]:
        """Return the number of examples that each of these numbers was computed from."""
        return {name: entry.weights for name, entry in self._entries.items()}

    def collect(self) -> dict[str, Logged]:
        """Merge the values recorded since the last call over the steps, and wait for the device once."""
        totals: dict[str, Tensor] = {}
        for name, (settings, values, weights) in self._entries.items():
            total_of = _TOTALS[settings.reduction(name)]
            totals[name] = total_of(_stack(values), weights)
        # Read after all of them were launched: the first read waits for the device, the others find it done.
        collected: dict[str, Logged] = {}
        for name, (settings, _, weights) in self._entries.items():
            total = float(totals[name])
            collected[name] = Logged(total, sum(weights), settings.reduction(name), settings.options())
        for name, (settings, metric) in self._metrics.items():
            collected[name] = Logged(0.0, 0.0, "mean", settings.options(), metric)
        self._entries.clear()
        self._metrics.clear()
        return collected


class EvaluationRecorder(LogRecorder):
    """A replacement of ``LightningModule.log`` while clients are evaluated."""

    @staticmethod
    def _check(name: str, on_step: bool | None, on_epoch: bool | None, enable_graph: bool) -> None:
        """Take all arguments: in a validation values are logged for the epoch by default, and there is no graph."""


_TOTALS: dict[Reduction, Callable[[Tensor, list[float]], Tensor]] = {
    "mean": lambda values, weights: values @ values.new_tensor(weights),
    "sum": lambda values, weights: values.sum(),
    "min": lambda values, weights: values.min(),
    "max": lambda values, weights: values.max(),
}


def _stack(values: list[Number]) -> Tensor:
    """Stack numbers and scalar tensors as one float64 vector, on the device of the tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    first = tensors[0]
    are_alike = all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    if are_alike and len(tensors) == len(values):
        return torch.stack(tensors).double()
    return torch.stack([torch.as_tensor(value, device=first.device).double() for value in values])


def metrics_of(module: nn.Module) -> list[Metric]:
    """List the ``torchmetrics`` objects in a module."""
    return [submodule for submodule in module.modules() if isinstance(submodule, Metric)]
