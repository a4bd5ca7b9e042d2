"""Arguments that are functions of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def called(name: str, function: Callable[..., Result], *values: object) -> Result:
    """Call a function that an argument gives, and name the argument if it fails.

    Args:
        name: The argument.
        function: Its value.
        values: The arguments of the call.

    Raises:
        ValueError: If the function raises an error, which is the cause of this one.
    """
    try:
        return function(*values)
    except Exception as error:
        # Whatever a function of somebody else raises.
        text = str(error).strip().partition("\n")[0]
        label = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(
            f"`{name}` is a function, and the call `{label}({', '.join(map(_short, values))})` raised"
            f" {type(error).__name__}: {text}"
        ) from error


def _short(value: object) -> str:
    """Describe an argument of a call."""
    if isinstance(value, (int, str)):
        return repr(value)
    return f"<{type(value).__name__}>"
