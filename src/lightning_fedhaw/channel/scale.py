"""Scaling of very small and very large messages, so that computing on them neither overflows nor underflows.

If the numbers of a message are near the smallest or the largest number of its dtype, squares and small fractions of
them underflow or overflow. Multiplying by a power of two, which changes no digit, makes such a message ordinary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def ordinary(vector: Tensor) -> tuple[Tensor, float]:
    """Scale a vector by a power of two with which its norm, squares and small fractions are normal numbers.

    Args:
        vector: ``[d]``, floating.

    Returns:
        The scaled vector, and the factor: for nearly all messages the vector itself, and 1.

    Example:
        >>> scaled, factor = ordinary(torch.tensor([2.0**-140]))
        >>> scaled.item() == 2.0**-44 and factor == 2.0**96
        True
        >>> ordinary(torch.tensor([0.5]))
        (tensor([0.5000]), 1.0)
    """
    if not vector.numel():
        return vector, 1.0
    low, high = torch.aminmax(vector)
    largest = float(torch.maximum(high, -low))
    # For float32 the exponent is 128: if the largest number is in [2^-48, 2^48] the vector is not scaled, so that
    # ordinary messages keep the bits of the plain formulas. Otherwise it is scaled by 2^96 or 2^-96 towards that range.
    exponent = math.frexp(torch.finfo(vector.dtype).max)[1]
    if 0 < largest < 2.0 ** (-3 * exponent // 8):
        factor = 2.0 ** (3 * exponent // 4)
    elif 2.0 ** (3 * exponent // 8) < largest < math.inf:
        factor = 2.0 ** (-3 * exponent // 4)
    else:
        return vector, 1.0
    return vector * factor, factor


def rescaled(function: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """Apply a positively homogeneous function to a vector without overflow or underflow within the function.

    Args:
        function: ``[d] -> [d]``, with ``function(a vector) = a function(vector)`` for every ``a > 0``.
        vector: ``[d]``, floating. One of ordinary magnitude is given to the function as it is.
    """
    scaled, factor = ordinary(vector)
    if factor == 1:
        return function(scaled)
    return function(scaled) / factor
