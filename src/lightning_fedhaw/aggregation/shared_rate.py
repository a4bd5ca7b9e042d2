"""One factor on the learning rates of all clients, which a rule sets for a round; no rule itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_fedhaw.rule import LocalLRScale


class SharedRate(LocalLRScale):
    """One factor for all clients and steps.

    Args:
        multiple: The factor.
    """

    numbers_sent = 1

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple
        self.constant = multiple

    def begin(self, start: Mapping[str, Tensor], num_steps: int, rates: Sequence[float]) -> dict[str, Tensor]:
        """Return the factor, as ``multiple`` []."""
        parameter = next(iter(start.values()))
        return {"multiple": parameter.new_tensor(self.multiple)}

    def factor(self, gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the factor."""
        return state["multiple"], dict(state)
