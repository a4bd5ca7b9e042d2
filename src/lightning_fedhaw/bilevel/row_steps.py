"""Steps of an optimizer on upper variables: on rows that belong to clients, each of which counts its own steps.

Shapes: S numbers in the rows of all clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer, optimizer_step


def optimizer_of_vectors(factory: OptimizerFactory, lr: float) -> str:
    """Return the name of the optimizer that a factory makes, which has to step vectors.

    Raises:
        TypeError: If the factory makes no optimizer.
        ValueError: If it is one of matrices.
    """
    name = type(check_optimizer("upper_optimizer", factory, lr)).__name__
    vector = torch.zeros(2)
    try:
        optimizer_step(factory, lr, [vector], [vector], {})
    except ValueError as error:
        raise ValueError(
            f"`upper_optimizer` steps one vector of all upper variables, and {name} refuses it: {error}. Use one that"
            " is element-wise, such as `torch.optim.Adam`."
        ) from error
    return name


def step_of_rows(
    factory: OptimizerFactory,
    lr: float,
    values: Tensor,
    gradients: Tensor,
    rows: Tensor,
    memory: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Take one step of an element-wise optimizer in some rows; the other values and their memory stay.

    A client that takes part for the first time makes the first step of an optimizer, whatever others have made.

    Args:
        factory: Makes the optimizer from ``(parameters, lr=...)``.
        lr: The learning rate.
        values: ``[S]``. Not changed.
        gradients: ``[S]``.
        rows: Bool ``[S]``, where a step is made.
        memory: ``steps``: int64 ``[S]``; ``tensors``: what the optimizer remembers of each row, each ``[S]``, by name;
            ``numbers``: what else it remembers, by the number of steps and by name. Empty before the first step.

    Returns:
        The new values, and the new memory.
    """
    # A checkpoint has them in host memory.
    device = values.device
    rows = rows.to(device)
    steps: Tensor = memory.get("steps", torch.zeros(len(values), dtype=torch.int64)).to(device)
    tensors = {name: tensor.to(device, copy=True) for name, tensor in memory.get("tensors", {}).items()}
    numbers = dict(memory.get("numbers", {}))
    stepped = values.clone()
    for count in torch.unique(steps[rows]).tolist():
        group = rows & (steps == count)
        own: dict[int, Any] = {}
        if count:
            own[0] = {**numbers.get(count, {}), **{name: tensor[group] for name, tensor in tensors.items()}}
        (stepped[group],), own = optimizer_step(factory, lr, [values[group]], [gradients[group]], own)
        numbers[count + 1] = {}
        for name, value in own.get(0, {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                numbers[count + 1][name] = value
                continue
            if name not in tensors:
                tensors[name] = torch.zeros(len(values), dtype=value.dtype, device=device)
            tensors[name][group] = value
    steps = steps + rows
    numbers = {count: own for count, own in numbers.items() if (steps == count).any()}
    return stepped, {"steps": steps, "tensors": tensors, "numbers": numbers}
