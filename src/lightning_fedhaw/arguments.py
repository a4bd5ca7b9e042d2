"""Checks of arguments, with the same form of message for every mistake.

A check takes the name and the value of an argument, refuses values that are not allowed, and returns the value. Scalars
of NumPy and torch are accepted wherever a number is, and are returned as ``int``, ``float`` or ``bool``, because
arguments become part of checkpoints, which are loaded without running code. A boolean is never a number, NaN is never
accepted, and infinity is accepted only if a check allows it.

A call reads ``arguments.number("lr", lr, minimum=0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf, isfinite
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value")
Checked = TypeVar("Checked")
Limits = ParamSpec("Limits")

LONGEST_REPR = 120
"""The number of characters of a refused value that a message shows: the value may be a whole data set."""


def invalid(name: str, allowed: str, value: object, hint: str = "") -> ValueError:
    """Return the error for a value that is not allowed; the caller raises it.

    Args:
        name: The argument.
        allowed: The values that are allowed, in words.
        value: The value.
        hint: A sentence to add, with a remedy or the effect of an allowed value.
    """
    return ValueError(_message(name, allowed, value, hint))


def _message(name: str, allowed: str, value: object, hint: str = "") -> str:
    description = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    if len(description) > LONGEST_REPR:
        description = f"{description[: LONGEST_REPR - 4]} ..."
    message = f"`{name}` must be {allowed}, got {description}."
    if hint:
        message = f"{message} {hint}"
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def plain_number(value: object) -> int | float | None:
    """Convert a value to Python's own ``int`` or ``float``; return ``None`` if it is not one real number.

    Example:
        >>> plain_number(np.int64(3)), plain_number(torch.tensor(0.5)), plain_number(True), plain_number("3")
        (3, 0.5, None, None)
    """
    value = _unwrapped(value)
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return None


def _unwrapped(value: object) -> object:
    """Return the scalar in an array or a tensor without dimensions, and any other value as it is."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        return value.item()
    return value


def _plain_float(value: object) -> float | None:
    plain = plain_number(value)
    try:
        return None if plain is None else float(plain)
    except OverflowError:  # a whole number beyond the largest float
        return None


def number(
    name: str,
    value: object,
    *,
    minimum: float = -inf,
    maximum: float = inf,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    hint: str = "",
) -> float:
    """Check a number.

    Args:
        name: The argument.
        value: Its value.
        minimum: The smallest number that is allowed.
        maximum: The largest number that is allowed.
        above: A lower limit that is itself not allowed, instead of ``minimum``.
        below: An upper limit that is itself not allowed, instead of ``maximum``.
        infinite: Whether infinity is allowed, if the limits allow it.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If the value is not a number, or is outside of the limits.

    Example:
        >>> number("momentum", np.float64(0.5), minimum=0, below=1)
        0.5
    """
    plain = _plain_float(value)
    if plain is not None and minimum <= plain <= maximum and (infinite or isfinite(plain)):
        is_above = above is None or plain > above
        is_below = below is None or plain < below
        if is_above and is_below:
            return plain
    raise invalid(name, _limits_in_words(minimum, maximum, above, below, infinite), value, hint)


def _limits_in_words(minimum: float, maximum: float, above: float | None, below: float | None, infinite: bool) -> str:
    """Return the numbers that are allowed, in words or as an interval."""
    low = minimum if above is None else above
    high = maximum if below is None else below
    if isfinite(low) and isfinite(high):
        opening = "[" if above is None else "("
        closing = "]" if below is None else ")"
        return f"a number in {opening}{low:g}, {high:g}{closing}"
    kind = "a number" if infinite else "a finite number"
    if isfinite(low):
        return f"{kind} of at least {low:g}" if above is None else f"{kind} above {low:g}"
    if isfinite(high):
        return f"{kind} of at most {high:g}" if below is None else f"{kind} below {high:g}"
    return kind


def probability(name: str, value: object, *, hint: str = "") -> float:
    """Check a number in [0, 1].

    Raises:
        ValueError: If the value is not such a number.
    """
    return number(name, value, minimum=0, maximum=1, hint=hint)


def integer(name: str, value: object, *, minimum: int, maximum: int | None = None, hint: str = "") -> int:
    """Check a whole number; a float is not accepted, even if its value is a whole number.

    Args:
        name: The argument.
        value: Its value.
        minimum: The smallest number that is allowed.
        maximum: The largest number that is allowed; no limit if None.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If the value is not a whole number, or is outside of the limits.
    """
    plain = plain_number(value)
    if isinstance(plain, int) and plain >= minimum and (maximum is None or plain <= maximum):
        return plain
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise invalid(name, f"a whole number {limits}", value, hint)


def count_or_share(name: str, value: object) -> int | float:
    """Check a whole number of clients or, as a float, a share of all clients.

    Raises:
        ValueError: If the value is neither.
    """
    # The type decides: 1 is one client, and 1.0 is all of them.
    plain = plain_number(value)
    if isinstance(plain, int) and plain >= 1:
        return plain
    if isinstance(plain, float) and 0 < plain <= 1:
        return plain
    raise invalid(name, "a whole number of at least 1, or as a float a share of all clients in (0, 1]", value)


def passes(name: str, value: object, *, hint: str = "") -> int | float:
    """Check a number of passes over data: a whole number, or as a float also a fraction.

    Args:
        name: The argument.
        value: Its value.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If the value is neither.
    """
    plain = plain_number(value)
    if isinstance(plain, int) and plain >= 1:
        return plain
    if isinstance(plain, float) and 0 < plain < inf:
        return plain
    allowed = "a whole number of at least 1, or as a float a number of passes above 0, such as 0.25"
    raise invalid(name, f"{allowed}; or one for each client", value, hint)


def integers(name: str, values: object, *, minimum: int | None = None, allowed: str, hint: str = "") -> list[int]:
    """Check a list of whole numbers.

    Args:
        name: The argument.
        values: Its value: a list or another iterable, an array or a tensor.
        minimum: The smallest number that is allowed; no limit if None.
        allowed: The values that are allowed, in words.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If the value is not a list, or one of its entries is not such a number.

    Example:
        >>> integers("clients", np.array([3, 1]), minimum=0, allowed="client numbers")
        [3, 1]
    """
    # Strings and bytes are iterable, and the entries of bytes are whole numbers.
    if isinstance(values, (str, bytes)):
        raise invalid(name, allowed, values, hint)
    try:
        entries = plain_list(values)
    except TypeError:  # not iterable
        raise invalid(name, allowed, values, hint) from None
    checked = []
    for value in entries:
        plain = plain_number(value)
        if not isinstance(plain, int) or (minimum is not None and plain < minimum):
            raise invalid(name, allowed, values, hint)
        checked.append(plain)
    return checked


def plain_list(values: Any) -> list[Any]:
    """Convert an array, a tensor, a data-frame column or another iterable to a list.

    Args:
        values: The values. Those of arrays and tensors become plain Python values.

    Raises:
        TypeError: If the values are not iterable.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values)


def name_patterns(name: str, value: object) -> str | list[str] | Callable[[str], bool]:
    """Check what selects names: one pattern of ``fnmatch``, a list of them, or a callable.

    Raises:
        ValueError: If the value is anything else, an empty text or an empty list.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, str) and entry for entry in value):
        return list(value)
    if callable(value) and not isinstance(value, (type, torch.nn.Module)):
        return value
    raise invalid(name, "a name or a pattern such as 'head.*', a list of them, or a callable that takes a name", value)


def bounds_around_one(name: str, value: object) -> tuple[float, float]:
    """Check the smallest and the largest value of a factor: two positive numbers with 1 between them.

    Raises:
        ValueError: If the value is not such a pair.
    """
    pair: list[float | None] = []
    if isinstance(value, (tuple, list)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1):
        pair = [_plain_float(bound) for bound in value]
    if len(pair) == 2:
        low, high = pair
        if low is not None and high is not None and 0 < low <= 1 <= high < inf:
            return low, high
    raise invalid(name, "two positive numbers around 1, such as (0.5, 2.0)", value)


def numbers(name: str, value: object, *, allowed: str, maximum: float = inf, or_one: bool = False) -> Tensor:
    """Check finite numbers of at least 0, one per client.

    Args:
        name: The argument.
        value: Its value: a list or another iterable of numbers, an array or a tensor.
        allowed: The values that are allowed, in words.
        maximum: The largest number that is allowed.
        or_one: Whether one number for all clients is allowed, too.

    Returns:
        Float64, ``[N]``, or without dimensions if one number was given.

    Raises:
        ValueError: If the value has another shape, or one of its entries is not such a number.
    """
    table = _float_tensor(value)
    if table is None or table.ndim > 1 or (table.ndim == 0 and not or_one):
        raise invalid(name, allowed, value)
    is_allowed = table.isfinite() & (table >= 0) & (table <= maximum)
    if not is_allowed.all():
        raise invalid(name, allowed, value)
    return table


def _float_tensor(value: object) -> Tensor | None:
    """Copy one or several real numbers to a new float64 tensor on the CPU; return ``None`` if there are others."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        if tensor.dtype == torch.bool or tensor.is_complex():
            return None
        # A copy, so that later changes of the array do not change the setting.
        return tensor.detach().to("cpu", torch.float64, copy=True)
    # A set has no order, so it does not say which number is whose.
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, set, frozenset)):
        entries = [_plain_float(entry) for entry in value]
        if None in entries:
            return None
        return torch.tensor(entries, dtype=torch.float64)
    plain = _plain_float(value)
    if plain is None:
        return None
    return torch.tensor(plain, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Words, flags and objects
# ---------------------------------------------------------------------------------------------------------------------


def choice(name: str, value: Value, allowed: object, *, hint: str = "") -> Value:
    """Check that a value is one of a few.

    Args:
        name: The argument.
        value: Its value.
        allowed: The values that are allowed: a ``Literal`` or a tuple.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> from typing import Literal
        >>> choice("storage", "host", Literal["device", "host"])
        'host'
    """
    candidates: Any = get_args(allowed) or allowed
    for candidate in candidates:
        if isinstance(value, type(candidate)) and value == candidate:
            return candidate  # type: ignore[no-any-return]  # instead of, for example, an equal `numpy.str_`
    raise invalid(name, f"one of {', '.join(map(repr, candidates))}", value, hint)


def flag(name: str, value: object) -> bool:
    """Check ``True`` or ``False``; numbers are not accepted.

    Raises:
        ValueError: If the value is neither.
    """
    plain = _unwrapped(value)
    if isinstance(plain, (bool, np.bool_)):
        return bool(plain)
    raise invalid(name, "True or False", value)


def text(name: str, value: object) -> str:
    """Check a string.

    Raises:
        ValueError: If the value is not a string.
    """
    if isinstance(value, str):
        return str(value)  # a plain string, also of a subclass
    raise invalid(name, "a string", value)


def function(name: str, value: Value, signature: str) -> Value:
    """Check a function or another callable.

    Args:
        name: The argument.
        value: Its value.
        signature: The call, for the message, such as ``logits(module, batch)``.

    Raises:
        TypeError: If the value is not callable.
    """
    if callable(value):
        return value
    raise TypeError(_message(name, f"a function that can be called as `{signature}`", value))


def instance(name: str, value: Value, kind: type, *, example: str) -> Value:
    """Check an instance of a class.

    Args:
        name: The argument.
        value: Its value.
        kind: The class.
        example: An expression with such an instance, for the message.

    Raises:
        TypeError: If the value is not an instance of the class.
    """
    if isinstance(value, kind):
        return value
    allowed = f"an instance of `{kind.__name__}`, such as `{example}`"
    raise TypeError(_message(name, allowed, value, _call_hint(value)))


def provider(name: str, value: Value, attribute: str, *, kind: str, example: str) -> Value:
    """Check an object by one of its attributes, if its class is in a higher layer and must not be imported.

    Args:
        name: The argument.
        value: Its value.
        attribute: An attribute that all allowed objects have.
        kind: The name of their class, for the message.
        example: An expression with such an object, for the message.

    Raises:
        TypeError: If the value does not have the attribute, or is a class instead of an instance.
    """
    if hasattr(value, attribute) and not isinstance(value, type):
        return value
    allowed = f"an instance of `{kind}`, such as `{example}`"
    raise TypeError(_message(name, allowed, value, _call_hint(value)))


def _call_hint(value: object) -> str:
    """Return the remedy if a class was given instead of an instance."""
    return f"Write `{value.__name__}(...)`." if isinstance(value, type) else ""


def optional(
    check: Callable[Concatenate[str, Any, Limits], Checked],
    name: str,
    value: Any,
    *args: Limits.args,
    **limits: Limits.kwargs,
) -> Checked | None:
    """Check an argument that may be ``None``: ``optional(number, "rate", rate, minimum=0)``.

    Args:
        check: The check for any other value.
        name: The argument.
        value: Its value.
        args: Further arguments of the check.
        limits: Keyword arguments of the check.
    """
    if value is None:
        return None
    return check(name, value, *args, **limits)
