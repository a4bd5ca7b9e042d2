"""Messages of any size: arithmetic whose scale would be no ordinary number of the message's precision.

A norm, a range or a power of numbers near the smallest or the largest of a dtype has fractions and squares that are
rounded away or overflow. Times a power of two, which changes no bit of their digits, such a message is an ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def ordinary(vector: Tensor) -> tuple[Tensor, float]:
    """A vector times a power of two with which norms, squares and small fractions of it are normal numbers.

    Args:
        vector: ``[d]``, floating.

    Returns:
        The scaled vector, and the power: nearly always the vector itself, and 1.

    Example:
        >>> scaled, power = ordinary(torch.tensor([2.0**-140]))
        >>> scaled.item() == 2.0**-44 and power == 2.0**96
        True
        >>> ordinary(torch.tensor([0.5]))
        (tensor([0.5000]), 1.0)
    """
    if not vector.numel():
        return vector, 1.0
    low, high = torch.aminmax(vector)
    largest = float(torch.maximum(high, -low))
    # 128 for float32: numbers of 2^-48 to 2^48 are left alone, and the others come near to these.
    exponent = math.frexp(torch.finfo(vector.dtype).max)[1]
    if 0 < largest < 2.0 ** (-3 * exponent // 8):
        power = 2.0 ** (3 * exponent // 4)
    elif 2.0 ** (3 * exponent // 8) < largest < math.inf:
        power = 2.0 ** (-3 * exponent // 4)
    else:
        return vector, 1.0
    return vector * power, power


def rescaled(function: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """``function(vector)`` for a function that commutes with factors, as if its arithmetic had no smallest number.

    Where the vector is of ordinary size, this is the function and nothing else.

    Args:
        function: ``[d] -> [d]``, with ``function(a vector) = a function(vector)`` for every ``a > 0``.
        vector: ``[d]``, floating.
    """
    scaled, power = ordinary(vector)
    return function(scaled) if power == 1 else function(scaled) / power
