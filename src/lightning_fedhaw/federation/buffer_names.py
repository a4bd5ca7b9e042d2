"""The names of buffers, and the policies that the argument ``buffers`` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_fedhaw.options import BufferPolicies, BufferPolicy, patterns_of
from lightning_fedhaw.vectors.layout import ParameterLayout

SHOWN_NAMES = 10
"""The number of names that a message shows."""


def policies_by_name(policies: BufferPolicies, module: nn.Module, layout: ParameterLayout) -> dict[str, BufferPolicy]:
    """Return the policy of each buffer.

    Args:
        policies: The argument ``buffers``.
        module: The user's module.
        layout: Its buffers that training may change, and its frozen tensors that a pattern matches.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    for pattern in patterns_of(policies):
        if not any(fnmatchcase(name, pattern) for name in layout.buffers):
            raise ValueError(_unmatched(pattern, module, layout))
    return {name: _policy(name, policies) for name in layout.buffers}


def is_named(name: str, policies: BufferPolicies) -> bool:
    """Return whether a pattern of the argument ``buffers`` matches a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns_of(policies))


def listed(names: Sequence[str]) -> str:
    """Return names for a message, of many only the first ones."""
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN_NAMES])
    if len(names) > SHOWN_NAMES:
        return f"{shown} and {len(names) - SHOWN_NAMES} more"
    return shown or "none"


def _policy(name: str, policies: BufferPolicies) -> BufferPolicy:
    """Return the policy of the first pattern that matches a name; without one the buffer is averaged."""
    if isinstance(policies, str):
        return policies
    for pattern, policy in policies.items():
        if fnmatchcase(name, pattern):
            return policy
    return "average"


def _unmatched(pattern: str, module: nn.Module, layout: ParameterLayout) -> str:
    """Say that a pattern matches nothing, and what it could match."""
    message = f'The pattern "{pattern}" of `buffers` matches no buffer and no frozen parameter of the model.'
    if any(fnmatchcase(name, pattern) for name in layout.names):
        message += " It matches trainable parameters, which are always aggregated."
    frozen = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            frozen.append(name)
    message += f" Its buffers are {listed([name for name, _ in module.named_buffers()])}"
    return f"{message}; its frozen parameters are {listed(frozen)}."
