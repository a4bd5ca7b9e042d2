"""Dual numbers, on which forward mode computes: a value with its derivative in one direction."""

from __future__ import annotations

import importlib
import warnings
from functools import cache

from torch import Tensor
from torch.autograd import forward_ad


@cache
def load_rules() -> None:
    """Import what torch imports when forward mode is first used, without its warning of the way in which it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def dual_of(value: Tensor, tangent: Tensor) -> Tensor:
    """Return the dual number of a value and its derivative; inside of a ``forward_ad.dual_level``."""
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def parts_of(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value of a dual number and its derivative, which is ``None`` where there is none."""
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return primal, tangent
