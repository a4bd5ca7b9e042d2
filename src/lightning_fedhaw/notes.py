"""Notes that are added to errors."""

from __future__ import annotations


def add_note(error: BaseException, note: str) -> None:
    """Add a line to the message of an error that is going to be raised again.

    Before Python 3.11 errors have no notes. There the line is appended to the error's first argument, if this is the
    message, as it is for most errors; an error without arguments gets the line as its message.

    Args:
        error: The error; it is changed in place.
        note: The line.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif not error.args:
        error.args = (note,)
    elif isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
