"""Values that a module logs while many clients train at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.records import Logged, LoggedValues, LogRecorder, LogSettings
from lightning_fedhaw.clients.steps import as_scalar
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError


class PendingValue(NamedTuple):
    """The description of a logged value while it is still inside a batched call.

    Attributes:
        name: Its name.
        settings: The further arguments of ``self.log``.
        weight: The number of examples that it was computed from.
    """

    name: str
    settings: LogSettings
    weight: float


class _LoggedStack(NamedTuple):
    """One logged value of many clients.

    Attributes:
        rows: ``[clients]``, their rows.
        values: ``[clients]``.
        weights: The number of examples that they were computed from: ``[clients]``, or one number for all.
    """

    rows: Tensor
    values: Tensor
    weights: Tensor | float


class StackRecorder(LogRecorder):
    """A log recorder for clients that train at once: of each logged value it has a stack, with one value per client.

    A value that is logged inside a batched call cannot be read before it has left the call as an output. So
    :meth:`take` hands the values out of the call, and :meth:`put` receives them as stacks.
    """

    def __init__(self, module: nn.Module, callbacks: Iterable[pl.Callback] = ()) -> None:
        super().__init__(module, callbacks)
        self._pending: list[PendingValue] = []
        self._stacks: dict[str, list[_LoggedStack]] = {}

    def log(self, name: str, value: object, *args: Any, **kwargs: Any) -> None:
        """Record a value; the arguments are those of ``LightningModule.log``.

        Raises:
            NotVectorizableError: If the value is a torchmetrics object, whose state would be of all clients at once.
        """
        if isinstance(value, Metric):
            raise NotVectorizableError(f"logs the torchmetrics object `{name}`, which keeps what it has seen")
        super().log(name, value, *args, **kwargs)

    @staticmethod
    def _snapshot(value: Tensor) -> Tensor:
        """Copy a value; within a batched call no tensor can be read as a number."""
        # Each operation in a batched call has its price. This one is detached, as a stack, when it has left the call.
        return value.clone()

    def take(self, parameter: Tensor) -> list[Tensor]:
        """Take the values that were logged in a batched call, to be returned from the call.

        They come back by :meth:`put`, as stacks.

        Args:
            parameter: A tensor of the call, whose device plain numbers are moved to.
        """
        outputs = []
        for name, (settings, values, weights) in self._entries.items():
            for value, weight in zip(values, weights, strict=True):
                if not isinstance(value, Tensor):
                    value = torch.tensor(value, dtype=torch.float64)
                outputs.append(as_scalar(value).to(parameter.device))
                self._pending.append(PendingValue(name, settings, weight))
            values.clear()
            weights.clear()
        return outputs

    def drop_pending(self) -> list[PendingValue]:
        """Forget and return the values taken in the last call, which will not come back by :meth:`put`."""
        pending = self._pending
        self._pending = []
        return pending

    def pend(self, pending: Sequence[PendingValue]) -> None:
        """Expect these values at the next :meth:`put`, of a compiled call, which does not call :meth:`log`."""
        self._pending = list(pending)

    def put(self, rows: Tensor, stacks: Iterable[Tensor], lengths: Tensor | None = None) -> None:
        """Receive the values after a batched call.

        Args:
            rows: The rows of the call.
            stacks: The values that :meth:`take` returned inside the call, ``[len(rows)]`` each.
            lengths: ``[len(rows)]``, the number of samples in each row, where they differ.
        """
        for (name, settings, weight), stack in zip(self._pending, stacks, strict=True):
            weights: Tensor | float = weight
            if lengths is not None and weight == self.batch_size:
                weights = lengths
            self._entries.setdefault(name, LoggedValues(settings, [], []))
            self._stacks.setdefault(name, []).append(_LoggedStack(rows, stack, weights))
        self._pending.clear()

    def stacks(self) -> dict[str, list[Tensor]]:
        """Return the stacks that were received since the last :meth:`collect_rows`, by the name of the value."""
        received = {}
        for name, stacks in self._stacks.items():
            received[name] = [stack.values for stack in stacks]
        return received

    def stack_examples(self) -> dict[str, list[Tensor]]:
        """Return the numbers of examples behind :meth:`stacks`, in the same order."""
        received = {}
        for name, stacks in self._stacks.items():
            received[name] = [_weights_of(stack) for stack in stacks]
        return received

    def collect_rows(self, count: int) -> list[dict[str, Logged]]:
        """Merge the values recorded since the last call, for each of ``count`` clients.

        The device is waited for once for each name.
        """
        records: list[dict[str, Logged]] = [{} for _ in range(count)]
        for name, stacks in self._stacks.items():
            settings = self._entries[name].settings
            reduction = settings.reduction(name)
            options = settings.options()
            totals, weights = _merged(stacks, reduction, count)
            # Stacked, so that one transfer brings both to the host.
            for row, (total, weight) in enumerate(torch.stack([totals, weights], 1).tolist()):
                if weight:
                    records[row][name] = Logged(total, weight, reduction, options)
        self.forget()
        return records

    def forget(self) -> None:
        """Drop all recorded values, of clients that are trained again."""
        for _, values, weights in self._entries.values():
            values.clear()
            weights.clear()
        self._pending.clear()
        self._stacks.clear()


def _merged(stacks: Sequence[_LoggedStack], reduction: str, count: int) -> tuple[Tensor, Tensor]:
    """Merge one name's values of each client over its steps.

    Returns:
        ``[count]`` totals and ``[count]`` weights, in float64.
    """
    device = stacks[0].values.device
    rows = torch.cat([stack.rows for stack in stacks]).to(device)
    values = torch.cat([stack.values.double() for stack in stacks])
    weights = torch.cat([_weights_of(stack) for stack in stacks]).to(device)
    totals = torch.zeros(count, dtype=torch.float64, device=device)
    if reduction == "mean":
        totals.index_add_(0, rows, values * weights)
    elif reduction == "sum":
        totals.index_add_(0, rows, values)
    else:
        extremum = "amin" if reduction == "min" else "amax"
        totals.scatter_reduce_(0, rows, values, extremum, include_self=False)
    return totals, torch.zeros_like(totals).index_add_(0, rows, weights)


def _weights_of(stack: _LoggedStack) -> Tensor:
    """Return the weight of each value, ``[clients]`` in float64 and in host memory."""
    return torch.as_tensor(stack.weights, dtype=torch.float64).expand(len(stack.rows))
