"""The journal of a study: a line of JSON for each finished run, so that a study can be stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """The finished runs of a study.

    Args:
        study: The name of the study, which is that of the file in ``benchmarks/results``.
        cell: The entries that tell one run from another.
    """

    def __init__(self, study: str, *cell: str) -> None:
        self.path = Path(__file__).parent / "results" / f"{study}.jsonl"
        self.cell = cell

    def runs(self) -> list[dict[str, Any]]:
        """Read the runs that are finished."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def has(self, *cell: object) -> bool:
        """Return whether a run is finished. The file is read again: several processes may share a study."""
        return cell in {tuple(run[name] for name in self.cell) for run in self.runs()}

    def add(self, run: dict[str, Any]) -> None:
        """Write a run that is finished, and print it."""
        line = json.dumps(run)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
