"""Calls of the user's module: of its steps, with the arguments that they take, and without effects that last."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.rule import Batch


def training_step(module: Any, batch: Batch, batch_idx: int) -> Any:
    """Call a module's ``training_step``, and return what it returns.

    Raises:
        ValueError: With manual optimization, where the step trains.
    """
    if not getattr(module, "automatic_optimization", True):
        raise ValueError("with `automatic_optimization=False`, `training_step` has no loss but steps by itself")
    # Without the `dataloader_idx`: a training step has no such argument.
    return module.training_step(*step_arguments(module.training_step, batch, batch_idx)[:2])


def forward(module: Any, batch: Batch) -> Any:
    """Call a module on a batch, or on the first element of one that has several."""
    if isinstance(batch, (tuple, list)):
        return module(batch[0])
    return module(batch)


def step_arguments(step: Callable[..., Any], batch: Batch, batch_idx: int) -> tuple[Any, ...]:
    """Return the arguments of a ``*_step`` method, whose ``batch_idx`` and ``dataloader_idx`` are optional."""
    return (batch, batch_idx, 0)[: num_step_arguments(step)]


def num_step_arguments(step: Callable[..., Any]) -> int:
    """Count the arguments that a ``*_step`` method takes of batch, ``batch_idx`` and ``dataloader_idx``."""
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    count = kinds.count(Parameter.POSITIONAL_ONLY) + kinds.count(Parameter.POSITIONAL_OR_KEYWORD)
    if Parameter.VAR_POSITIONAL in kinds:
        # `*args` takes what Lightning always passes: the batch and its number.
        count = max(count, 2)
    return max(count, 1)


@contextmanager
def without_side_effects(module: nn.Module, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Replace a module's ``log`` inside the context, and restore its metrics at the end.

    Args:
        module: The user's module.
        log: Called instead of ``log``; by default nothing is.
    """
    replaced_log = vars(module).get("log")
    snapshots = [_MetricSnapshot.of(metric) for metric in module.modules() if isinstance(metric, Metric)]
    # In the instance's own dictionary, where it hides the method of the class and can be removed again.
    vars(module)["log"] = log or _ignore
    try:
        yield
    finally:
        if replaced_log is None:
            del vars(module)["log"]
        else:
            vars(module)["log"] = replaced_log
        for snapshot in snapshots:
            snapshot.restore()


@dataclass(frozen=True)
class _MetricSnapshot:
    """A metric as it was before a call.

    Attributes:
        metric: The metric itself.
        attributes: Its attributes.
        states: Copies of its states, which an update changes in place.
    """

    metric: Metric
    attributes: dict[str, Any]
    states: dict[str, Tensor | list[Any]]

    @classmethod
    def of(cls, metric: Metric) -> _MetricSnapshot:
        states: dict[str, Tensor | list[Any]] = {}
        for name in metric._defaults:
            state = getattr(metric, name)
            states[name] = state.clone() if isinstance(state, Tensor) else list(state)
        return cls(metric, dict(vars(metric)), states)

    def restore(self) -> None:
        """Restore the metric, if it was updated in the meantime."""
        if self.metric._update_count == self.attributes["_update_count"]:
            return
        vars(self.metric).clear()
        vars(self.metric).update({**self.attributes, **self.states})


def _ignore(*_: object, **__: object) -> None:
    return None
