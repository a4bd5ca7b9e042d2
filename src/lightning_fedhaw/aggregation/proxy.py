"""Gradient descent on the server's own data, as several rules do it; no rule itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.aggregation.factories import OptimizerFactory
from lightning_fedhaw.rule import Batch, ServerView
from lightning_fedhaw.streams import PathPart, stream

BatchLoss = Callable[[Tensor, Batch], Tensor]
"""``loss(indices of the proxy samples [batch], batch)`` returns a scalar."""


def published_adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Make the optimizer with which the FedLAW paper trains everything on the server."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999))


ADAM: OptimizerFactory = published_adam  # a function has a name that a configuration file can hold


def batches(server: ServerView, size: int, *path: PathPart) -> Iterator[tuple[Tensor, Batch]]:
    """Pass once over the proxy data, in batches of nearly equal size, so that no single sample is left over.

    Args:
        server: The server that has the data.
        size: Samples of a batch at most.
        path: The name of the stream that the order is drawn from; without a name, the data set's own order.

    Yields:
        The indices of the samples, ``[batch]``, and the batch.
    """
    count = len(server.proxy_dataset)
    order = torch.arange(count)
    if path:
        order = torch.randperm(count, generator=stream(server.seed, "server", *path))
    num_batches = -(-count // size)  # rounded up
    for index in order.tensor_split(num_batches):
        yield index, server.proxy_batch(index)


def descend(
    variables: Sequence[Tensor],
    loss: BatchLoss,
    server: ServerView,
    *path: PathPart,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
) -> bool:
    """Minimize a loss over the proxy data.

    Args:
        variables: The leaves that the optimizer steps on; changed in place.
        loss: The loss of a batch at the present variables.
        server: The server that has the data.
        path: The name of the streams that the order of each pass is drawn from.
        epochs: Passes over the data.
        batch_size: Samples of a batch at most.
        optimizer: Steps once a batch.
        scheduler: Steps once a pass.

    Returns:
        Whether the variables stayed finite; if not, the descent ended with the pass in which they did not.
    """
    for epoch in range(epochs):
        for index, batch in batches(server, batch_size, *path, "epoch", epoch):
            optimizer.step(_closure(variables, loss, index, batch))
        # Once a pass instead of once a step, because the answer has to wait for the device.
        if not all(bool(torch.isfinite(variable).all()) for variable in variables):
            return False
        if scheduler is not None:
            scheduler.step()
    return True


def _closure(variables: Sequence[Tensor], loss: BatchLoss, index: Tensor, batch: Batch) -> Callable[[], Any]:
    """Return the function that computes loss and gradients of one batch, as ``Optimizer.step`` takes it."""

    def closure() -> Any:
        # Not every optimizer enables gradients before it calls its closure.
        with torch.enable_grad():
            value = loss(index, batch)
        # Not `backward`, which would also leave gradients in the module's parameters.
        gradients = torch.autograd.grad(value, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        return value.detach()

    return closure


@torch.no_grad()
def mean_loss(loss: BatchLoss, server: ServerView, batch_size: int) -> float:
    """Return the mean of a loss over the proxy data."""
    sizes: list[int] = []
    losses: list[Tensor] = []
    for index, batch in batches(server, batch_size):
        sizes.append(len(index))
        losses.append(loss(index, batch).reshape(()))
    # One wait for the device a pass, instead of one a batch.
    # Python's floats, so that the sum is in double precision.
    values = torch.stack(losses).tolist()
    total = sum(size * value for size, value in zip(sizes, values, strict=True))
    return float(total / len(server.proxy_dataset))
