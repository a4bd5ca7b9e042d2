"""The federation's entry in a checkpoint: its format, the run that it is of, and what it must hold."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

FORMAT = 1
"""The version of the entry. A change by which older entries can no longer be read makes it the next number."""

REQUIRED = ("fingerprint", "scheme", "round_options", "optimizers", "buffers", "tally")
"""The parts that an entry of every version holds."""


def new_run() -> str:
    """Return an identity for a run that begins: the time, and a random part.

    It is no draw of the federation's, so two runs from the same seed differ in it.
    """
    return f"{datetime.now().isoformat(timespec='seconds')}-{uuid.uuid4().hex[:8]}"


def check_entry(entry: Mapping[str, Any], source: str) -> None:
    """Refuse an entry of another format, or without one of its parts.

    Args:
        entry: The federation's entry in a checkpoint.
        source: Where it comes from, for errors.

    Raises:
        ValueError: Naming the format or the parts.
    """
    # The first format did not say its number.
    number = entry.get("format", FORMAT)
    if number != FORMAT:
        raise ValueError(
            f"{source} has format {number} of this package's checkpoints, and the installed version reads format"
            f" {FORMAT}. Resume with the version that wrote it, or start a new run from its weights with"
            " `load_from_checkpoint`."
        )
    missing = [part for part in REQUIRED if part not in entry]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(f'`{part}`' for part in missing)}, which a run needs to be resumed: it was"
            " written by a development version of this package, or changed since. Start a new run from its weights"
            " with `load_from_checkpoint`."
        )


def describe_parts(before: Sequence[str], now: Sequence[str], source: str) -> str:
    """Say which channels and objectives a run has lost or gained since its checkpoint; an empty string if none.

    Args:
        before: The keys of those that the checkpoint was written with.
        now: Those of the run.
        source: Where the checkpoint comes from.
    """
    lost = sorted(set(before) - set(now))
    gained = sorted(set(now) - set(before))
    phrases = []
    if lost:
        phrases.append(f"without {', '.join(lost)}, whose state in the checkpoint (if any) is dropped")
    if gained:
        phrases.append(f"with {', '.join(gained)}, which the checkpoint was written without: it starts afresh")
    if not phrases:
        return ""
    return f"{source}: the run is resumed {', and '.join(phrases)}."
