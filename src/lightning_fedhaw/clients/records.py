"""What a module logs while its clients train: collected per client, merged once a round."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Reduction = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True)
class Logged:
    """One logged name, merged over the steps of a client or over the clients of a round.

    Attributes:
        total: The weighted sum (``mean``), sum, smallest or largest value.
        weight: The examples behind it.
        reduction: How values are merged.
        options: What ``self.log`` was told: ``prog_bar``, ``logger``, ``on_step``, ``on_epoch``, ``metric_attribute``.
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
        """The same record with a metric's place in the module for the metric, so that it can be sent.

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
        """This and another record of the same name as one."""
        join: dict[Reduction, Callable[[float, float], float]] = {"mean": add, "sum": add, "min": min, "max": max}
        total = join[self.reduction](self.total, other.total)
        return replace(self, total=total, weight=self.weight + other.weight)


def merge(records: Iterable[Mapping[str, Logged]]) -> dict[str, Logged]:
    """Several clients' records as one: means are weighted by examples."""
    merged: dict[str, Logged] = {}
    for record in records:
        for name, logged in record.items():
            merged[name] = merged[name].merged(logged) if name in merged else logged
    return merged


Recorder = TypeVar("Recorder", bound="LogRecorder")


class LogRecorder:
    """Stands in for ``LightningModule.log`` while clients train.

    A call costs a copy and an append; nothing is reduced, synchronised or sent to a logger before the client is done.

    Args:
        module: The user's module.
        callbacks: Callbacks whose own ``log`` is to be recorded too.

    Attributes:
        batch_size: Samples in the batch at hand: the weight of what is logged, unless ``self.log`` is told otherwise.
    """

    def __init__(self, module: Any, callbacks: Iterable[Any] = ()) -> None:
        self._redirected = [module, *callbacks]
        self._own: list[Any] = []
        self.batch_size = 1
        self._entries: dict[str, tuple[tuple[Any, ...], list[Any], list[float]]] = {}
        self._metrics: dict[str, tuple[tuple[Any, ...], Metric]] = {}

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
        settings = (prog_bar, logger, on_step, on_epoch, reduce_fx, metric_attribute)
        # Tensors first: asking whether something is a Metric, an abstract class, is slow.
        if not isinstance(value, Tensor) and isinstance(value, Metric):
            self._metrics[name] = (settings, value)
            return
        entry = self._entries.get(name)
        if entry is None:
            _check(name, on_step, on_epoch, enable_graph)
            entry = self._entries[name] = (settings, [], [])
        elif entry[0] != settings:
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
        entry[1].append(value)
        entry[2].append(float(self.batch_size if batch_size is None else batch_size))

    @staticmethod
    def _snapshot(value: Tensor) -> Any:
        """A copy, since the tensor may be changed in place after it was logged; a number where nobody waits for it."""
        return value.item() if value.is_cpu else value.detach().clone().reshape(())

    def collect(self) -> dict[str, Logged]:
        """What was recorded since the last call, merged over the steps; the device is waited for once."""
        totals = {
            name: _TOTALS[_reduction(name, settings[4])](_stack(values), weights)
            for name, (settings, values, weights) in self._entries.items()
        }
        collected: dict[str, Logged] = {}
        for name, (settings, _, weights) in self._entries.items():
            total = float(totals[name])
            collected[name] = Logged(total, sum(weights), _reduction(name, settings[4]), _options(settings))
        for name, (settings, metric) in self._metrics.items():
            collected[name] = Logged(0.0, 0.0, "mean", _options(settings), metric)
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
    """Numbers and scalar tensors as one float64 vector, on the device of the tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    if len(tensors) == len(values) and len({(t.dtype, t.device) for t in tensors}) == 1:
        return torch.stack(tensors).double()
    return torch.stack([torch.as_tensor(value, device=tensors[0].device).double() for value in values])


Pending = tuple[str, tuple[Any, ...], float]
"""Name, arguments and weight of a logged value that is still inside a batched call."""


class StackRecorder(LogRecorder):
    """The recorder of many clients that train at once: what is logged is a stack, one value per client."""

    def __init__(self, module: Any, callbacks: Iterable[Any] = ()) -> None:
        super().__init__(module, callbacks)
        self._pending: list[Pending] = []
        self._calls: dict[str, list[tuple[Tensor, Tensor, float]]] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Record a value; the arguments are those of ``LightningModule.log``.

        Raises:
            NotAFunctionError: If it is a torchmetrics object.
        """
        if isinstance(value, Metric):
            raise NotAFunctionError(f"logs the torchmetrics object `{name}`, which keeps what it has seen")
        super().log(name, value, *args, **kwargs)

    @staticmethod
    def _snapshot(value: Tensor) -> Tensor:
        """A copy; within a batched call no tensor is a number."""
        return value.detach().clone().reshape(())

    def take(self, like: Tensor) -> list[Tensor]:
        """Inside a batched call: the values logged in it so far, to be handed out of it; numbers on ``like``'s device.

        What it gives comes back by :meth:`put`, as stacks.
        """
        taken = []
        for name, (settings, values, weights) in self._entries.items():
            for value, weight in zip(values, weights, strict=True):
                number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                taken.append(number.reshape(()).to(like.device))
                self._pending.append((name, settings, weight))
            values.clear()
            weights.clear()
        return taken

    def drop_pending(self) -> list[Pending]:
        """What is known of what was taken in the last call, which will not come back by :meth:`put`."""
        pending, self._pending = self._pending, []
        return pending

    def pend(self, pending: Sequence[Pending]) -> None:
        """Expect these values at the next :meth:`put`, of a call that was not made through :meth:`log`."""
        self._pending = list(pending)

    def put(self, rows: Tensor, stacks: Iterable[Tensor]) -> None:
        """After a batched call: what :meth:`take` gave, ``[len(rows)]`` each."""
        for (name, settings, weight), stack in zip(self._pending, stacks, strict=True):
            self._entries.setdefault(name, (settings, [], []))
            self._calls.setdefault(name, []).append((rows, stack, weight))
        self._pending.clear()

    def collect_rows(self, count: int) -> list[dict[str, Logged]]:
        """What was recorded for each of ``count`` clients since the last call; one synchronisation a name."""
        records: list[dict[str, Logged]] = [{} for _ in range(count)]
        for name, calls in self._calls.items():
            settings = self._entries[name][0]
            reduction = _reduction(name, settings[4])
            rows = torch.cat([r for r, _, _ in calls]).to(calls[0][1].device)
            values = torch.cat([s.double() for _, s, _ in calls])
            weights = torch.tensor([w for _, _, w in calls], dtype=torch.float64)
            weights = weights.repeat_interleave(torch.tensor([len(r) for r, _, _ in calls])).to(values.device)
            total = torch.zeros(count, dtype=torch.float64, device=values.device)
            if reduction in ("mean", "sum"):
                total.index_add_(0, rows, values * weights if reduction == "mean" else values)
            else:
                how = "amin" if reduction == "min" else "amax"
                total.scatter_reduce_(0, rows, values, how, include_self=False)
            weight = torch.zeros_like(total).index_add_(0, rows, weights)
            options = _options(settings)
            for row, (t, w) in enumerate(torch.stack([total, weight], 1).tolist()):
                if w:
                    records[row][name] = Logged(t, w, reduction, options)
        self.forget()
        return records

    def forget(self) -> None:
        """Drop what was recorded, of clients that are trained again."""
        for _, values, weights in self._entries.values():
            values.clear()
            weights.clear()
        self._pending.clear()
        self._calls.clear()


class NotAFunctionError(RuntimeError):
    """What a step does that only a module of its own can hold."""


def _options(settings: tuple[Any, ...]) -> dict[str, Any]:
    prog_bar, logger, on_step, on_epoch, _, metric_attribute = settings
    return {
        "prog_bar": prog_bar,
        "logger": True if logger is None else logger,
        # The defaults of `training_step`: on the step, not on the epoch. Here the two coincide: a step is a round.
        "on_step": True if on_step is None else on_step,
        "on_epoch": False if on_epoch is None else on_epoch,
        "metric_attribute": metric_attribute,
    }


def _check(name: str, on_step: bool | None, on_epoch: bool | None, enable_graph: bool) -> None:
    if on_step is False and not on_epoch:
        raise ValueError(f"`self.log({name!r}, on_step=False, on_epoch=False)` logs nothing; set one of them.")
    if enable_graph:
        raise ValueError(
            f"`self.log({name!r}, enable_graph=True)` is not supported: what clients log is merged once a round, when"
            " their graphs are gone. Remove it."
        )


def _reduction(name: str, reduce_fx: str | Callable[..., Any]) -> Reduction:
    known: dict[Any, Reduction] = {
        "mean": "mean", "avg": "mean", torch.mean: "mean",
        "sum": "sum", torch.sum: "sum", sum: "sum",
        "min": "min", torch.min: "min", min: "min",
        "max": "max", torch.max: "max", max: "max",
    }  # fmt: skip
    key = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
    if key not in known:
        raise ValueError(
            f"`self.log({name!r}, reduce_fx=...)` takes 'mean', 'sum', 'min' or 'max', got {reduce_fx!r}. For another"
            " reduction log a torchmetrics Metric."
        )
    return known[key]
