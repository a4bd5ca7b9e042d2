"""Warnings that a long run would repeat in every round."""

from __future__ import annotations

from collections import Counter

from lightning.pytorch.utilities import rank_zero_warn


class RepeatedWarnings:
    """Warnings that are given the first time, and then each time their number reaches a power of ten.

    The numbers are not part of a checkpoint, because a resumed run has its own log. The run summary has the totals.

    Attributes:
        counts: How often there was a reason for each kind of warning.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def warn(self, kind: str, sentence: str) -> None:
        """Count a warning, and give it if its turn has come.

        Args:
            kind: What is counted together.
            sentence: The warning.
        """
        self.counts[kind] += 1
        count = self.counts[kind]
        if count == 1:
            rank_zero_warn(sentence)
        elif _is_power_of_ten(count):
            rank_zero_warn(
                f"{sentence} That was the case {count:,} times so far; the next warning comes at {10 * count:,}."
            )


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"
