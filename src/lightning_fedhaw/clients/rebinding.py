"""A user's optimizer for other parameters than its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_fedhaw.clients.optimizer_states import ParameterState


def rebind_optimizer(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    state: defaultdict[Tensor, ParameterState],
    group_size: int | None = None,
) -> Optimizer:
    """Make an optimizer of the same class and options for other parameters.

    Its constructor is not called, because its arguments are not known.

    Args:
        optimizer: The user's optimizer.
        parameters: The parameters, group after group.
        state: The state of each parameter.
        group_size: The number of parameters in each group; as many as in the user's groups by default.
    """
    copy: Optimizer = object.__new__(type(optimizer))
    # Without the `step` that a scheduler puts on the object, which would step the user's optimizer.
    copy.__dict__ = dict(vars(optimizer))
    copy.__dict__.pop("step", None)
    groups = []
    begin = 0
    for group in optimizer.param_groups:
        end = begin + (group_size or len(group["params"]))
        groups.append({**group, "params": list(parameters[begin:end])})
        begin = end
    copy.param_groups = groups
    copy.state = state
    return copy
