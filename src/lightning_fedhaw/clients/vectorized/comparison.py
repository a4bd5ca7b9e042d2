"""The comparison of two clients that are computed at once with each client alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""The difference that is allowed between the two, as a share of the largest value in the tensor."""

NEGLIGIBLE = 1e-3
"""A gradient below this share of the tolerance of the largest gradient is zero except for rounding."""

NOISE_MARGIN = 8.0
"""The difference that is allowed in addition, as a multiple of the rounding noise that was measured."""

MAX_NOISE = 5e-3
"""The rounding noise, as a share of the largest value, up to which wrong and right values can be distinguished."""

LOSS = "the loss"
"""The name of the loss."""

GRADIENT = "the gradient of"
"""How the names of gradients begin."""

Values = dict[str, Tensor | None]
"""The results of one client's step by name: loss, gradients, buffers, logged values."""


def first_difference(
    together: Values, alone: Values, dtype: torch.dtype, noise: Mapping[str, float] | None = None
) -> str | None:
    """Name the first value that differs between a client computed together with another one, and alone.

    Args:
        together: The client's values, computed together with another client.
        alone: Its values, computed alone.
        dtype: The precision of both computations.
        noise: The rounding noise of each value, where it was measured.

    Returns:
        ``None`` if all values agree.

    Raises:
        NotVectorizableError: If the noise is too large for a comparison.
    """
    largest_gradient = max(largest(value) for name, value in alone.items() if name.startswith(GRADIENT))
    tolerance = TOLERANCE[dtype]
    for name in {**together, **alone}:
        is_gradient = name in alone and name.startswith(GRADIENT)
        scale = largest(alone.get(name))
        # A bias before a normalization has a gradient of rounding errors alone, so gradients are also measured by the
        # largest of all; a loss may be such a sum, too, and is measured by 1.
        absolute_scale = 1.0
        noise_scale = scale
        if is_gradient:
            absolute_scale = largest_gradient
            noise_scale = max(scale, largest_gradient)
        rounding = NOISE_MARGIN * (noise or {}).get(name, 0.0)
        if rounding > MAX_NOISE * noise_scale + NEGLIGIBLE:
            raise NotVectorizableError(f"has too much rounding noise in {name} to compare two clients at once")
        allowed = tolerance * scale + tolerance * NEGLIGIBLE * absolute_scale + rounding
        if not _agree(together.get(name), alone.get(name), allowed):
            return name
    return None


def is_finite(values: Values) -> bool:
    """Return whether the loss and all gradients are finite; only then does agreement prove anything."""
    for name, value in values.items():
        if value is None or not (name == LOSS or name.startswith(GRADIENT)):
            continue
        if not torch.isfinite(value).all():
            return False
    return True


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return the largest finite difference of two values; 0 where they cannot be compared."""
    if a is None or b is None or a.shape != b.shape or not a.numel():
        return 0.0
    return float((a.double() - b.double()).nan_to_num().abs().max())


def largest(value: Tensor | None) -> float:
    """Return the largest absolute value of the finite elements; 0 where there are none."""
    if value is None or not value.numel():
        return 0.0
    return float(value.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _agree(a: Tensor | None, b: Tensor | None, allowed: float) -> bool:
    """Return whether no element of two values differs by more than is allowed."""
    if a is None or b is None:
        # A batched call may give a gradient of zeros for a parameter that a client alone does not use.
        return all(value is None or not value.any() for value in (a, b))
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.double().cpu(), b.double().cpu(), rtol=0.0, atol=allowed, equal_nan=True)


def number_of_bytes(tensor: Tensor) -> int:
    """Return the memory that a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; any other stays as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast_all(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the floating-point tensors among some."""
    return {name: cast_tensor(tensor, dtype) for name, tensor in tensors.items()}
