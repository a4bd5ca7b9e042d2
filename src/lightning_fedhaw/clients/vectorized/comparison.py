"""Whether two clients at once are given what each is given alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""How far a value may be from the one that a client alone gives, as a share of the largest in its tensor."""

NEGLIGIBLE = 1e-3
"""A gradient below this share of the tolerance of the largest one is zero but for rounding."""

NOISE_MARGIN = 8.0
"""How many times the rounding noise that was measured a value may be off."""

MOST_NOISE = 5e-3
"""With more rounding noise than this share of the largest value, a wrong value cannot be told from a right one."""

LOSS = "the loss"
"""The name of the loss."""

GRADIENT = "the gradient of"
"""How the names of gradients begin."""

Values = dict[str, Tensor | None]
"""What one client's step gives, by name: loss, gradients, buffers, logged values."""


def first_difference(
    together: Values, alone: Values, dtype: torch.dtype, noise: Mapping[str, float] | None = None
) -> str | None:
    """Name the first value that one of two clients is given and that is not the one it is given alone.

    Args:
        together: What the client is given beside another one.
        alone: What it is given alone.
        dtype: The precision that both were computed in.
        noise: How far each value moves by rounding, where that was measured.

    Returns:
        ``None`` if all values agree.

    Raises:
        NotVectorizableError: If the noise hides what there is to compare.
    """
    gradients = [name for name in alone if name.startswith(GRADIENT)]
    largest_gradient = max(largest(alone[name]) for name in gradients)
    tolerance = TOLERANCE[dtype]
    for name in {**together, **alone}:
        scale = largest(alone.get(name))
        # A bias before a normalization has a gradient of rounding errors alone; a loss may be such a sum, too.
        whole = largest_gradient if name in gradients else 1.0
        rounding = NOISE_MARGIN * (noise or {}).get(name, 0.0)
        if rounding > MOST_NOISE * max(scale, largest_gradient if name in gradients else 0.0) + NEGLIGIBLE:
            raise NotVectorizableError(f"has too much rounding noise in {name} to compare two clients at once")
        allowed = tolerance * scale + tolerance * NEGLIGIBLE * whole + rounding
        if not _agree(together.get(name), alone.get(name), allowed):
            return name
    return None


def is_finite(values: Values) -> bool:
    """Whether the loss and all gradients are finite: others agree with anything that is not."""
    tensors = [value for name, value in values.items() if name == LOSS or name.startswith(GRADIENT)]
    return all(value is None or bool(torch.isfinite(value).all()) for value in tensors)


def distance(one: Tensor | None, other: Tensor | None) -> float:
    """Return the largest finite difference of two values; 0 where they cannot be compared."""
    if one is None or other is None or one.shape != other.shape or not one.numel():
        return 0.0
    return float((one.double() - other.double()).nan_to_num().abs().max())


def largest(value: Tensor | None) -> float:
    """Return the largest finite element's size; 0 where there is none."""
    if value is None or not value.numel():
        return 0.0
    return float(value.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _agree(one: Tensor | None, other: Tensor | None, allowed: float) -> bool:
    """Whether no element of two values differs by more than is allowed."""
    if one is None or other is None:
        # A batched call may give zeros for what a client alone does not use.
        return all(value is None or not value.any() for value in (one, other))
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one.double().cpu(), other.double().cpu(), rtol=0.0, atol=allowed, equal_nan=True)
