"""Whether two clients at once are given what each is given alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError

TOLERANCE = 1e-4
"""How far a value may be from the one that a client alone gives, as a share of the largest in its tensor."""

NEGLIGIBLE = 1e-6
"""A gradient below this share of the largest one is zero but for rounding, as of a bias before a normalization."""

NOTHING = 1e-9
"""A loss, a buffer or a logged value below this is zero but for rounding."""

NOISE_MARGIN = 8.0
"""How many times the rounding noise that was measured a float32 value may be off."""

MOST_NOISE = 5e-3
"""With more rounding noise than this share of the largest value, float32 cannot tell a wrong value from a right one."""

GRADIENT = "the gradient of"
"""How the names of gradients begin."""

Values = dict[str, Tensor | None]
"""What one client's step gives, by name: loss, gradients, buffers, logged values."""


def check_equal(together: Values, alone: Values, noise: Mapping[str, float], line: str) -> None:
    """Refuse a step that gives one of two clients something else than alone.

    Args:
        together: What the client is given beside another one.
        alone: What it is given alone.
        noise: How far each value moves by rounding; 0 where it does not say.
        line: Where the step is written, in brackets.

    Raises:
        NotVectorizableError: Naming the first value that differs.
    """
    gradients = [name for name in alone if name.startswith(GRADIENT)]
    largest_gradient = max(largest(alone[name]) for name in gradients)
    for name in {**together, **alone}:
        own_largest = largest(alone.get(name))
        floor = NOTHING
        scale = own_largest
        if name in gradients:
            floor = NEGLIGIBLE * largest_gradient
            scale = max(own_largest, largest_gradient)
        rounding = NOISE_MARGIN * noise.get(name, 0.0)
        if rounding > MOST_NOISE * scale + floor:
            raise NotVectorizableError(
                f"cannot be run in float64, and in float32 the rounding noise of {name} is too large to compare"
                f" two clients at once with each alone{line}"
            )
        if not _agree(together.get(name), alone.get(name), TOLERANCE * own_largest + floor + rounding):
            raise NotVectorizableError(f"gives another value of {name} for two clients at once than alone{line}")


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
