"""Checks of arguments: one sentence for every mistake, and plain Python values for what passes.

A check takes the name and the value of an argument, refuses what is not allowed, and returns the value. Scalars of
NumPy and torch are accepted wherever a number is, and come back as ``int``, ``float`` or ``bool``: arguments become
parts of checkpoints, which are read back without running code, and of the identity of a run. A boolean is never a
number, NaN is never accepted, and infinity only where a check says so.

The calls read as ``arguments.number("lr", lr, minimum=0)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value")
Checked = TypeVar("Checked")
Limits = ParamSpec("Limits")
Made = TypeVar("Made", bound="NamedArguments")

LONGEST_REPR = 120
"""Characters of a refused value that are shown: it may be a whole data set."""


def invalid(name: str, allowed: str, value: object, hint: str = "") -> ValueError:
    """Make the error for an argument that is not allowed; the caller raises it.

    Args:
        name: The argument.
        allowed: What it must be.
        value: What it is.
        hint: A sentence with the remedy, or with what an allowed value does.
    """
    return ValueError(_sentence(name, allowed, value, hint))


def _sentence(name: str, allowed: str, value: object, hint: str = "") -> str:
    got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    if len(got) > LONGEST_REPR:
        got = f"{got[: LONGEST_REPR - 4]} ..."
    sentence = f"`{name}` must be {allowed}, got {got}."
    return f"{sentence} {hint}" if hint else sentence


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def plain_number(value: object) -> int | float | None:
    """Convert to Python's own ``int`` or ``float``; ``None`` if the value is not one real number.

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
    """Take the scalar out of an array or a tensor without axes."""
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
        minimum: The least that is allowed.
        maximum: The largest that is allowed.
        above: A limit that is itself not allowed, instead of ``minimum``.
        below: The same, instead of ``maximum``.
        infinite: Whether infinity is allowed, as far as the limits allow it.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If it is no number, or one outside of its limits.

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
    raise invalid(name, _described(minimum, maximum, above, below, infinite), value, hint)


def _described(minimum: float, maximum: float, above: float | None, below: float | None, infinite: bool) -> str:
    """Say in words or as an interval which numbers are allowed."""
    low = minimum if above is None else above
    high = maximum if below is None else below
    if isfinite(low) and isfinite(high):
        left = "[" if above is None else "("
        right = "]" if below is None else ")"
        return f"a number in {left}{low:g}, {high:g}{right}"
    kind = "a number" if infinite else "a finite number"
    if isfinite(low):
        return f"{kind} of at least {low:g}" if above is None else f"{kind} above {low:g}"
    if isfinite(high):
        return f"{kind} of at most {high:g}" if below is None else f"{kind} below {high:g}"
    return kind


def probability(name: str, value: object, *, hint: str = "") -> float:
    """Check a number in [0, 1].

    Raises:
        ValueError: If it is none.
    """
    return number(name, value, minimum=0, maximum=1, hint=hint)


def integer(name: str, value: object, *, minimum: int, maximum: int | None = None, hint: str = "") -> int:
    """Check a whole number. A float is none, even if nothing follows its point.

    Raises:
        ValueError: If it is no whole number, or one outside of its limits.
    """
    plain = plain_number(value)
    if isinstance(plain, int) and plain >= minimum and (maximum is None or plain <= maximum):
        return plain
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise invalid(name, f"a whole number {limits}", value, hint)


def count_or_share(name: str, value: object) -> int | float:
    """Check a whole number of clients or, as a float, a share of all of them.

    Raises:
        ValueError: If it is neither.
    """
    plain = plain_number(value)
    if isinstance(plain, int) and plain >= 1:
        return plain
    if isinstance(plain, float) and 0 < plain <= 1:
        return plain
    raise invalid(name, "a whole number of at least 1, or as a float a share of all clients in (0, 1]", value)


def integers(name: str, values: object, *, minimum: int | None = None, allowed: str, hint: str = "") -> list[int]:
    """Check a list of whole numbers.

    Args:
        name: The argument.
        values: Its value: a list or another iterable, an array or a tensor.
        minimum: The least that is allowed; anything if None.
        allowed: What it must be, in words.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If it is no list, or one of its entries is no such number.

    Example:
        >>> integers("clients", np.array([3, 1]), minimum=0, allowed="client numbers")
        [3, 1]
    """
    if isinstance(values, (str, bytes)):
        raise invalid(name, allowed, values, hint)
    try:
        listed = plain_list(values)
    except TypeError:  # not iterable
        raise invalid(name, allowed, values, hint) from None
    checked = []
    for value in listed:
        plain = plain_number(value)
        if not isinstance(plain, int) or (minimum is not None and plain < minimum):
            raise invalid(name, allowed, values, hint)
        checked.append(plain)
    return checked


def plain_list(values: Any) -> list[Any]:
    """Convert an array, a tensor, a column or another iterable to a list; of arrays and tensors, of plain values.

    Raises:
        TypeError: If it is nothing of the kind.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values)


def bounds_around_one(name: str, value: object) -> tuple[float, float]:
    """Check the smallest and the largest value of a factor: two positive numbers with 1 between them.

    Raises:
        ValueError: If it is no such pair.
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
        allowed: What it must be, in words.
        maximum: The largest number that is allowed.
        or_one: Whether one number for all clients is allowed, too.

    Returns:
        Float64, ``[N]``, or without axes if one number was given.

    Raises:
        ValueError: If one of them is no such number.
    """
    table: Tensor | None = None
    if isinstance(value, (Tensor, np.ndarray)) or hasattr(value, "__array__"):
        raw = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        if raw.dtype != torch.bool and not raw.is_complex():
            table = raw.detach().to("cpu", torch.float64, copy=True)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        plain = [_plain_float(each) for each in value]
        table = None if None in plain else torch.tensor(plain, dtype=torch.float64)
    elif (single := _plain_float(value)) is not None:
        table = torch.tensor(single, dtype=torch.float64)
    if table is None or table.ndim > 1 or (table.ndim == 0 and not or_one):
        raise invalid(name, allowed, value)
    if not (table.isfinite() & (table >= 0) & (table <= maximum)).all():
        raise invalid(name, allowed, value)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Words, flags and objects
# ---------------------------------------------------------------------------------------------------------------------


def choice(name: str, value: Value, allowed: object, *, hint: str = "") -> Value:
    """Check one of a few values.

    Args:
        name: The argument.
        value: Its value.
        allowed: A ``Literal`` or a tuple.
        hint: A sentence to add to the message.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> from typing import Literal
        >>> choice("storage", "host", Literal["device", "host"])
        'host'
    """
    candidates: Any = get_args(allowed) or allowed
    for candidate in candidates:
        if isinstance(value, type(candidate)) and value == candidate:
            return candidate  # type: ignore[no-any-return]  # rather than an equal text of NumPy's
    raise invalid(name, f"one of {', '.join(map(repr, candidates))}", value, hint)


def flag(name: str, value: object) -> bool:
    """Check ``True`` or ``False``; no number stands for them.

    Raises:
        ValueError: If it is neither.
    """
    plain = _unwrapped(value)
    if isinstance(plain, (bool, np.bool_)):
        return bool(plain)
    raise invalid(name, "True or False", value)


def text(name: str, value: object) -> str:
    """Check a string.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str):
        return str(value)
    raise invalid(name, "a string", value)


def function(name: str, value: Value, signature: str) -> Value:
    """Check something that can be called.

    Args:
        name: The argument.
        value: Its value.
        signature: How it is going to be called, such as ``logits(module, batch)``.

    Raises:
        TypeError: If it cannot be called.
    """
    if callable(value):
        return value
    raise TypeError(_sentence(name, f"a function that can be called as `{signature}`", value))


def instance(name: str, value: Value, kind: type, *, example: str) -> Value:
    """Check an object of a class, and no such class itself.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(value, kind):
        return value
    allowed = f"an instance of `{kind.__name__}`, such as `{example}`"
    raise TypeError(_sentence(name, allowed, value, _call_hint(value)))


def provider(name: str, value: Value, attribute: str, *, kind: str, example: str) -> Value:
    """Check an object by what it has, where its class belongs to a higher layer; no class itself.

    Raises:
        TypeError: If it does not have the attribute.
    """
    if hasattr(value, attribute) and not isinstance(value, type):
        return value
    raise TypeError(_sentence(name, f"an instance of `{kind}`, such as `{example}`", value, _call_hint(value)))


def _call_hint(value: object) -> str:
    """Say what is missing where a class was given instead of an object."""
    return f"Write `{value.__name__}(...)`." if isinstance(value, type) else ""


def optional(
    check: Callable[Concatenate[str, Any, Limits], Checked],
    name: str,
    value: Any,
    *args: Limits.args,
    **limits: Limits.kwargs,
) -> Checked | None:
    """Check an argument that may be left open: ``optional(number, "rate", rate, minimum=0)``."""
    return None if value is None else check(name, value, *args, **limits)


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def constructor_names(kind: type) -> list[str]:
    """List the arguments that the constructors of a class and of its bases take by name."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]  # all but `self`
            names.update((p.name, None) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return list(names)


def check_names(
    taker: str, given: Iterable[str], known: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse keyword arguments that nobody knows.

    Args:
        taker: Who is given them.
        given: Their names.
        known: The names that are taken.
        elsewhere: Names that are not, each with the class that takes it.

    Raises:
        TypeError: Naming who got it, the argument, and the class that takes it or the nearest that exists.
    """
    names = sorted(set(known))
    for name in given:
        if name in names:
            continue
        if elsewhere and name in elsewhere:
            raise TypeError(f"`{name}` is an argument of `{elsewhere[name]}`, not of `{taker}`. Use that class.")
        nearest = get_close_matches(name, names, 1)
        remedy = f"did you mean `{nearest[0]}`?" if nearest else f"it takes {', '.join(names)}."
        raise TypeError(f"`{taker}` got an unexpected keyword argument '{name}'; {remedy}")


class _ConstructorSignature:
    """The signature of a class whose ``__new__`` takes anything: that of its ``__init__``."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        full = inspect.signature(owner.__init__)  # type: ignore[misc]  # of whatever class it is
        return full.replace(parameters=list(full.parameters.values())[1:])  # all but `self`


class NamedArguments:
    """A class whose constructor tells an unknown keyword argument with the nearest of its own.

    A constructor with ``**kwargs`` of its own is left alone: only its author knows what they may be.

    Example:
        >>> class Meter(NamedArguments):
        ...     def __init__(self, unit: str) -> None: ...
        >>> Meter(unt="m")
        Traceback (most recent call last):
        TypeError: `Meter` got an unexpected keyword argument 'unt'; did you mean `unit`?
        >>> str(inspect.signature(Meter))
        "(unit: 'str') -> 'None'"
    """

    __signature__ = _ConstructorSignature()

    def __new__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        """Check the names before Python does."""
        if cls.__init__ is object.__init__:
            return super().__new__(cls, *args, **kwargs)  # which refuses all arguments
        parameters = inspect.signature(cls.__init__).parameters.values() if kwargs else ()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            check_names(cls.__name__, kwargs, [p.name for p in list(parameters)[1:]])
        return super().__new__(cls)
