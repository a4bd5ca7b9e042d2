"""Phrases that the errors of these modules share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

MOST_NAMES = 5


def listed(names: Iterable[str], conjunction: Literal["and", "or"]) -> str:
    """List the first few names in a sentence.

    Args:
        names: The names, at least one.
        conjunction: The word before the last name.
    """
    names = list(names)
    shown = [repr(name) for name in names[:MOST_NAMES]]
    if len(names) > MOST_NAMES:
        return f"{', '.join(shown)} {conjunction} {len(names) - MOST_NAMES} more"
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} {conjunction} {shown[-1]}"
