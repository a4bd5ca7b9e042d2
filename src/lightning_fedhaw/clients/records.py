"""What a module logs while its clients train: collected per client, merged once a round."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Reduction = Literal["mean", "sum", "min", "max"]

_REDUCTIONS: dict[Any, Reduction] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean",
    "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min",
    "max": "max", torch.max: "max", max: "max",
}  # fmt: skip


@dataclass(frozen=True)
class Logged:
    """One logged name, merged over the steps of a client or over the clients of a round.

    Attributes:
        total: The weighted sum (``mean``), sum, smallest or largest value.
        weight: The examples behind it.
        reduction: How values are merged.
        options: Further arguments of ``self.log``: ``prog_bar``, ``logger``, ``on_step``, ``on_epoch``,
            ``metric_attribute``.
        metric: A ``torchmetrics`` object, merged by its own reduction instead; or its place in the module.
    """

    total: float
    weight: float
    reduction: Reduction
    options: Mapping[str, Any]
    metric: Metric | str | None = None

    @property
    def value(self) -> float:
        """The merged value."""
        return self.total / self.weight if self.reduction == "mean" else self.total

    def located(self, module: nn.Module) -> Logged:
        """Replace a metric by its place in the module, so that the record can be sent to another process.

        Raises:
            ValueError: If the metric has no place there.
        """
        if not isinstance(self.metric, Metric):
            return self
        for name, each in module.named_modules():
            if each is self.metric:
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
            merged[name] = merged[name].merged(logged) if name in merged else logged
    return merged


class LogSettings(NamedTuple):
    """The arguments of ``self.log`` beside name, value and weight, which every call with one name must repeat."""

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: str | Callable[..., Any]
    metric_attribute: str | None

    def reduction(self, name: str) -> Reduction:
        """Return how values are merged.

        Args:
            name: The logged name, for the error.

        Raises:
            ValueError: If values cannot be merged that way.
        """
        key = self.reduce_fx.lower() if isinstance(self.reduce_fx, str) else self.reduce_fx
        if key not in _REDUCTIONS:
            raise ValueError(
                f"`self.log({name!r}, reduce_fx=...)` takes 'mean', 'sum', 'min' or 'max', got {self.reduce_fx!r}. For"
                " another reduction log a torchmetrics Metric."
            )
        return _REDUCTIONS[key]

    def options(self) -> dict[str, Any]:
        """Return what the round needs to log the merged value."""
        return {
            "prog_bar": self.prog_bar,
            "logger": True if self.logger is None else self.logger,
            # The defaults of `training_step`: on the step, not on the epoch. Here the two coincide: a step is a round.
            "on_step": True if self.on_step is None else self.on_step,
            "on_epoch": False if self.on_epoch is None else self.on_epoch,
            "metric_attribute": self.metric_attribute,
        }


class LoggedValues(NamedTuple):
    """What was logged under one name: the settings, the values, and the examples behind each."""

    settings: LogSettings
    values: list[Any]
    weights: list[float]


Recorder = TypeVar("Recorder", bound="LogRecorder")


class LogRecorder:
    """Replace ``LightningModule.log`` while clients train.

    A call costs a copy and an append; nothing is reduced, synchronized or sent to a logger before the client is done.

    Args:
        module: The user's module.
        callbacks: Callbacks whose own ``log`` is to be recorded too.

    Attributes:
        batch_size: Samples in the current batch: the weight of what is logged, unless ``self.log`` is given another.
    """

    def __init__(self, module: Any, callbacks: Iterable[Any] = ()) -> None:
        self._redirected = [module, *callbacks]
        self._own: list[Any] = []
        self.batch_size = 1
        self._entries: dict[str, LoggedValues] = {}
        self._metrics: dict[str, tuple[LogSettings, Metric]] = {}

    def __enter__(self: Recorder) -> Recorder:
        self._own = [each.__dict__.get("log") for each in self._redirected]
        for each in self._redirected:
            each.log = self.log
        return self

    def __exit__(self, *_: object) -> None:
        for each, own in zip(self._redirected, self._own, strict=True):
            del each.log
            if own is not None:
                each.log = own

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a value; the arguments are those of ``LightningModule.log``."""
        settings = LogSettings(prog_bar, logger, on_step, on_epoch, reduce_fx, metric_attribute)
        # Tensors first: asking whether something is a Metric, an abstract class, is slow.
        if not isinstance(value, Tensor) and isinstance(value, Metric):
            self._metrics[name] = (settings, value)
            return
        entry = self._entries.get(name)
        if entry is None:
            _check(name, on_step, on_epoch, enable_graph)
            entry = self._entries[name] = LoggedValues(settings, [], [])
        elif entry.settings != settings:
            raise ValueError(
                f"`self.log({name!r}, ...)` was called twice with different arguments, which cannot be merged."
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"`self.log({name!r}, ...)` takes a single number, got a tensor of the shape {list(value.shape)}."
                    f" Log `{name}.mean()`."
                )
            value = self._snapshot(value)
        elif not isinstance(value, numbers.Number):
            raise ValueError(
                f"`self.log({name!r}, ...)` takes a number, a tensor or a torchmetrics Metric, got"
                f" {type(value).__name__}. Log each entry under its own name."
            )
        entry.values.append(value)
        entry.weights.append(float(self.batch_size if batch_size is None else batch_size))

    @staticmethod
    def _snapshot(value: Tensor) -> Any:
        """Copy a tensor, since it may be changed in place after it was logged; a number where reading it is free."""
        return value.item() if value.is_cpu else value.detach().clone().reshape(())

    def recorded(self) -> dict[str, list[Any]]:
        """Return the numbers that were recorded since the last :meth:`collect`, by name."""
        return {name: entry.values for name, entry in self._entries.items()}

    def collect(self) -> dict[str, Logged]:
        """Merge what was recorded since the last call over the steps; the device is waited for once."""
        totals: dict[str, Tensor] = {}
        for name, (settings, values, weights) in self._entries.items():
            total_of = _TOTALS[settings.reduction(name)]
            totals[name] = total_of(_stack(values), weights)
        # Only now, when all totals have been launched, are they read.
        collected: dict[str, Logged] = {}
        for name, (settings, _, weights) in self._entries.items():
            total = float(totals[name])
            collected[name] = Logged(total, sum(weights), settings.reduction(name), settings.options())
        for name, (settings, metric) in self._metrics.items():
            collected[name] = Logged(0.0, 0.0, "mean", settings.options(), metric)
        self._entries.clear()
        self._metrics.clear()
        return collected


_TOTALS: dict[Reduction, Callable[[Tensor, list[float]], Tensor]] = {
    "mean": lambda values, weights: values @ values.new_tensor(weights),
    "sum": lambda values, weights: values.sum(),
    "min": lambda values, weights: values.min(),
    "max": lambda values, weights: values.max(),
}


def _stack(values: list[Any]) -> Tensor:
    """Stack numbers and scalar tensors as one float64 vector, on the device of the tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    if len(tensors) == len(values) and len({(t.dtype, t.device) for t in tensors}) == 1:
        return torch.stack(tensors).double()
    return torch.stack([torch.as_tensor(value, device=tensors[0].device).double() for value in values])


def _check(name: str, on_step: bool | None, on_epoch: bool | None, enable_graph: bool) -> None:
    if on_step is False and not on_epoch:
        raise ValueError(f"`self.log({name!r}, on_step=False, on_epoch=False)` logs nothing; set one of them.")
    if enable_graph:
        raise ValueError(
            f"`self.log({name!r}, enable_graph=True)` is not supported: what clients log is merged once a round, when"
            " their graphs are gone. Remove it."
        )
