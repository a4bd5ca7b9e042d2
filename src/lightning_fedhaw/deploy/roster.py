"""The sites of a federation and their numbers, which are the same for ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT = 1
"""The format of a roster in a checkpoint."""


@dataclass
class SiteEntry:
    """A site of the roster.

    Attributes:
        identity: Its identity: a name, or the engine's address of it.
        num_examples: Its training examples.
        received: The last two rounds whose update was received, so that one remains if the last is undone.
        remembers: Whether the site keeps anything from round to round.
    """

    identity: str
    num_examples: int
    received: list[int]
    remembers: bool = False


class Standing(NamedTuple):
    """What the server counts on at a site.

    Attributes:
        received: The last earlier round whose update was received; -1 if there is none.
        remembers: Whether the site kept something in that round.
    """

    received: int
    remembers: bool


class Roster:
    """The sites in the order of their numbers; part of a checkpoint."""

    def __init__(self) -> None:
        self.entries: list[SiteEntry] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def identities(self) -> list[str]:
        """The identity of each site."""
        return [entry.identity for entry in self.entries]

    @property
    def sizes(self) -> list[int]:
        """The training examples of each site."""
        return [entry.num_examples for entry in self.entries]

    def number(self, identity: str) -> int | None:
        """Return the number of a site; ``None`` if it is not in the roster."""
        for number, entry in enumerate(self.entries):
            if entry.identity == identity:
                return number
        return None

    def add(self, identity: str, num_examples: int) -> int:
        """Give a new site the next number, and return it."""
        self.entries.append(SiteEntry(identity, num_examples, []))
        return len(self.entries) - 1

    def note_received(self, client: int, round_idx: int, *, remembers: bool) -> None:
        """Note that the update of a round was received and is used."""
        entry = self.entries[client]
        earlier = [number for number in entry.received if number < round_idx]
        entry.received = [*earlier[-1:], round_idx]
        entry.remembers = remembers

    def standing(self, client: int, round_idx: int) -> Standing:
        """Return what the server counts on at a site before a round."""
        entry = self.entries[client]
        earlier = [number for number in entry.received if number < round_idx]
        return Standing(max(earlier, default=-1), entry.remembers)

    def forget_rounds(self) -> None:
        """Forget which updates were received, for a new run with the same sites."""
        for entry in self.entries:
            entry.received = []
            entry.remembers = False

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        sites = []
        for entry in self.entries:
            sites.append({**vars(entry), "received": list(entry.received)})
        return {"format": FORMAT, "sites": sites}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the roster of a checkpoint."""
        self.entries = [SiteEntry(**{**site, "received": list(site["received"])}) for site in state["sites"]]
