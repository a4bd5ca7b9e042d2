"""The names of arguments: what a constructor accepts, and the message for a name that it does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

Instance = TypeVar("Instance", bound="NamedArguments")


def constructor_names(kind: type) -> list[str]:
    """List the named arguments of the constructors of a class and of its bases."""
    named = []
    for parameter in constructor_parameters(kind):
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            named.append(parameter.name)
    return list(dict.fromkeys(named))


def constructor_parameters(kind: type) -> Iterator[inspect.Parameter]:
    """Yield the parameters, without ``self``, of the constructors of a class and of its bases."""
    for base in kind.__mro__:
        if "__init__" in vars(base):
            yield from _parameters_after_self(vars(base)["__init__"])


@lru_cache(maxsize=1024)
def _parameters_after_self(constructor: Callable[..., None]) -> tuple[inspect.Parameter, ...]:
    # Kept, because every run asks for those of its rule, its callbacks and their bases dozens of times.
    return tuple(inspect.signature(constructor).parameters.values())[1:]


def check_names(
    owner: str, names: Iterable[str], known_names: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse unknown keyword arguments.

    Args:
        owner: The class or function that got them, for the message.
        names: Their names.
        known_names: The names of all arguments that exist.
        elsewhere: Arguments of other classes, each with the name of its class, for the message.

    Raises:
        TypeError: If a name is unknown. The message names the owner, the argument, and the class that has such an
            argument or the most similar argument.
    """
    known = sorted(set(known_names))
    for name in names:
        if name in known:
            continue
        if elsewhere and name in elsewhere:
            raise TypeError(f"`{name}` is an argument of `{elsewhere[name]}`, not of `{owner}`. Use that class.")
        similar = get_close_matches(name, known, 1)
        remedy = f"did you mean `{similar[0]}`?" if similar else f"it takes {', '.join(known)}."
        raise TypeError(f"`{owner}` got an unexpected keyword argument '{name}'; {remedy}")


class _ConstructorSignature:
    """A descriptor for the signature of a class: that of its ``__init__``, because its ``__new__`` accepts anything."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        constructor = owner.__init__  # type: ignore[misc]  # of any class, so mypy cannot know its type
        signature = inspect.signature(constructor)
        return signature.replace(parameters=_parameters_after_self(constructor))


class NamedArguments:
    """Base class of classes whose constructors refuse an unknown keyword argument and name the most similar one.

    A constructor with ``**kwargs`` is not checked, because only its author knows which names it accepts.

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

    def __new__(cls: type[Instance], *args: Any, **kwargs: Any) -> Instance:
        """Check the names of keyword arguments before Python does, whose message names no alternative."""
        if cls.__init__ is object.__init__:
            return super().__new__(cls, *args, **kwargs)  # which refuses all arguments
        if kwargs:
            parameters = _parameters_after_self(cls.__init__)
            accepts_any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            if not accepts_any_name:
                check_names(cls.__name__, kwargs, [parameter.name for parameter in parameters])
        return super().__new__(cls)
