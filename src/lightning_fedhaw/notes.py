"""What is said in an error beside its own message."""

from __future__ import annotations


def add_note(error: BaseException, note: str) -> None:
    """Add a line to what an error says.

    Before Python 3.11 errors have no notes: there the line follows the message, where the error's first argument is
    one, as it is with most errors.

    Args:
        error: The error, which goes on its way.
        note: The line.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif not error.args:
        error.args = (note,)
    elif isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
