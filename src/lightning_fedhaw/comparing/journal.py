"""The records of finished runs: one line of JSON each, appended as soon as a run is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from lightning_fedhaw.comparing.plan import key_of
from lightning_fedhaw.comparing.running import Record

FILE = "runs.jsonl"


class Journal:
    """The records of a comparison.

    Args:
        folder: The folder of the comparison.

    Raises:
        ValueError: If a line, other than a last one that was cut off, is no record.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._records: dict[str, Record] = {}
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = cast("Record", json.loads(line))
                self._records[key_of(record["run"])] = record
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"Line {number} of {str(self.path)!r} is no record of a run. Remove the line, or use another"
                    " folder as `output`."
                ) from error
        if complete != text:
            # A line that was cut off would spoil the next one.
            self.path.write_text(complete, encoding="utf-8")

    def get(self, key: str) -> Record | None:
        """Return the record of a run; None if it is not finished."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Append a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._records[key_of(record["run"])] = record
