"""The ends of a run: a result, a sentence, or a fault."""

from __future__ import annotations

import ast
import re
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessRaisedException

import lightning_fedhaw

PACKAGE = Path(lightning_fedhaw.__file__).parent

# What a sentence of the package is raised as. A KeyError or an AttributeError is nobody's sentence.
SENTENCES = {"ValueError", "TypeError", "RuntimeError", "ImportError", "OSError", "FloatingPointError"}


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
    if isinstance(error, ProcessRaisedException):
        return of_text(str(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    bases = {base.__name__ for base in type(error).__mro__}
    return classified(type(error).__name__, bases, str(error), frame.filename, frame.lineno or 0)


def of_text(text: str) -> Outcome:
    """Classify the traceback that a process has sent to the one that started it."""
    frames = re.findall(r'^  File "(.+)", line (\d+), in ', text, flags=re.MULTILINE)
    # After the last frame and its source: the line that names the error.
    name, message = re.findall(r"^([\w.]+): (.*)", text, flags=re.MULTILINE)[-1]
    filename, line = frames[-1]
    short = name.rpartition(".")[2]
    return classified(short, {short}, message, filename, int(line))


def classified(name: str, bases: set[str], message: str, filename: str, line: int) -> Outcome:
    """Classify an error by the names of its classes, its message, and the place where it was raised."""
    if MisconfigurationException.__name__ in bases:
        return Outcome(True, "a sentence of Lightning", message)
    text = f"{name}: {message.strip()[:500]}"
    detail = f"{text} ({filename}:{line})"
    if not Path(filename).is_relative_to(PACKAGE):
        return Outcome(False, f"an error from inside {owner(filename)}", detail)
    if not bases & SENTENCES or not message.strip():
        return Outcome(False, f"{name} in the package", detail)
    if not is_raised(filename, line):
        # Such as `int(text)`: the frame is the package's, and the message is not.
        return Outcome(False, "an error that the package did not raise", detail)
    return Outcome(True, "a sentence of the package", text)


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
