"""The ends of a run: a result, a sentence, or a fault."""

from __future__ import annotations

import ast
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_fedhaw

PACKAGE = Path(lightning_fedhaw.__file__).parent

# What a sentence of the package is raised as. A KeyError or an AttributeError is nobody's sentence.
SENTENCES = (ValueError, TypeError, RuntimeError, ImportError, OSError, FloatingPointError, NotImplementedError)


@dataclass(frozen=True)
class Outcome:
    """What a trial has shown.

    Attributes:
        passed: Whether it is what is promised.
        label: Its kind in a few words; the table counts them.
        detail: What a person needs to see of a trial that did not pass.
    """

    passed: bool
    label: str
    detail: str = ""


def of_error(error: BaseException) -> Outcome:
    """Classify the end of a run by the innermost frame of its error: who said it, and was it meant?"""
    if isinstance(error, MisconfigurationException):
        return Outcome(True, "a sentence of Lightning", str(error))
    line = f"{type(error).__name__}: {str(error).strip()[:500]}"
    frame = innermost(error.__traceback__)
    place = f"{frame.filename}:{frame.lineno}"
    if not Path(frame.filename).is_relative_to(PACKAGE):
        return Outcome(False, f"an error from inside {owner(frame.filename)}", f"{line} ({place})")
    if not isinstance(error, SENTENCES) or not str(error).strip():
        return Outcome(False, f"{type(error).__name__} in the package", f"{line} ({place})")
    if not is_raised(frame.filename, frame.lineno or 0):
        # Such as `int(text)`: the frame is the package's, and the message is not.
        return Outcome(False, "an error that the package did not raise", f"{line} ({place})")
    return Outcome(True, "a sentence of the package", line)


def innermost(trace: TracebackType | None) -> traceback.FrameSummary:
    """Return the frame in which an error was raised."""
    return traceback.extract_tb(trace)[-1]


def owner(filename: str) -> str:
    """Return the name of the project that a file belongs to."""
    parts = Path(filename).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return Path(filename).name


def is_raised(filename: str, line: int) -> bool:
    """Return whether a line is part of a ``raise`` statement."""
    return any(first <= line <= last for first, last in raises(filename))


@cache
def raises(filename: str) -> list[tuple[int, int]]:
    """Return the first and last line of every ``raise`` of a file."""
    tree = ast.parse(Path(filename).read_text())
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]
