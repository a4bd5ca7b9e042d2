"""Gradient clipping of many clients at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clipped(gradients: Sequence[Tensor | None], clipping: tuple[float, str] | None) -> Sequence[Tensor | None]:
    """Clip each client's gradient as ``torch.nn.utils.clip_grad_norm_`` or ``clip_grad_value_`` clips one.

    Args:
        gradients: ``[rows, *shape]`` each; ``None`` for a parameter that was not used.
        clipping: The bound, and ``"norm"`` or ``"value"``; ``None`` without clipping.
    """
    if clipping is None:
        return gradients
    bound, algorithm = clipping
    if algorithm == "value":
        return [None if gradient is None else gradient.clamp(-bound, bound) for gradient in gradients]
    # By parameter first, then over the parameters: the order of `clip_grad_norm_`, which decides about rounding.
    norms = []
    for gradient in gradients:
        if gradient is not None:
            norms.append(torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1))
    if not norms:
        return gradients
    # The constant is the one of `clip_grad_norm_`.
    scale = (bound / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1.0)
    scaled: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            # Not in place: an expanded gradient shares its elements.
            gradient = gradient * scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
        scaled.append(gradient)
    return scaled
