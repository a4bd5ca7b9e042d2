"""Descent on the server's own data, as several rules do it; no rule itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.rule import ServerView
from lightning_fedhaw.streams import PathPart, stream

OptimizerFactory = Callable[..., torch.optim.Optimizer]


def published_adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """What the FedLAW paper trains everything on the server with."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999))


ADAM: OptimizerFactory = published_adam  # a function has a name that a configuration file can hold


def batches(server: ServerView, size: int, *path: PathPart) -> Iterator[tuple[Tensor, Any]]:
    """One pass over the proxy data, in batches that are as equal as can be: none of a single sample is left over.

    Args:
        server: Whose data.
        size: Samples of a batch at most.
        path: The name of the stream that the order is drawn from; without a name, the data set's own order.

    Yields:
        The numbers of the samples, ``[batch]``, and the batch.
    """
    count = len(server.proxy_dataset)
    order = torch.randperm(count, generator=stream(server.seed, "server", *path)) if path else torch.arange(count)
    for index in order.tensor_split(-(-count // size)):
        yield index, server.proxy_batch(index)


def descend(
    variables: Sequence[Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    server: ServerView,
    *path: PathPart,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
) -> bool:
    """Descend on the proxy data.

    Args:
        variables: The leaves that the optimizer steps on; changed in place.
        loss: ``loss(index, batch)``, of the present variables.
        server: Whose data.
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

            def closure(index: Tensor = index, batch: Any = batch) -> Any:
                with torch.enable_grad():
                    value = loss(index, batch)
                for variable, gradient in zip(variables, torch.autograd.grad(value, variables), strict=True):
                    variable.grad = gradient
                return value.detach()

            optimizer.step(closure)
        if not all(bool(torch.isfinite(variable).all()) for variable in variables):
            return False
        if scheduler is not None:
            scheduler.step()
    return True


@torch.no_grad()
def mean_loss(loss: Callable[[Tensor, Any], Tensor], server: ServerView, batch_size: int) -> float:
    """The mean of a loss over the proxy data."""
    sizes: list[int] = []
    losses: list[Tensor] = []
    for index, batch in batches(server, batch_size):
        sizes.append(len(index))
        losses.append(loss(index, batch).reshape(()))
    # One wait for the device a pass, rather than one a batch.
    total = sum(size * value for size, value in zip(sizes, torch.stack(losses).tolist(), strict=True))
    return float(total / len(server.proxy_dataset))
