"""Objects from text: ``FedAvgM(lr=0.5)`` on a command line is what it would be in Python.

An expression is a value (``0.1``, ``"zero_update"``, ``[0, 1]``), a name (``FedAvg``), an import path
(``mine.MyRule``), a call of one of them with expressions as arguments, or a sum of callbacks
(``FedAvg + FedProx(mu=0.01)``). No other code is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import lightning_fedhaw

_ENDINGS = ("Callback", "Channel", "Partitioner", "Sampler")
"""What a name of this package may be written without."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_LABELED = re.compile(r"\s*([^=(\[{'\"]+?)\s*=\s*(?!=)(.+)", re.DOTALL)


def split_label(text: str) -> tuple[str, str]:
    """Split ``label=expression``; the label of an expression without one is its text, without empty brackets."""
    labeled = _LABELED.fullmatch(text)
    if labeled:
        return labeled[1], labeled[2].strip()
    expression = text.strip()
    return expression.removesuffix("()"), expression


def build(text: str, names: Mapping[str, object] | None = None, **overrides: object) -> Any:
    """Return the value of an expression.

    Args:
        text: The expression.
        names: Names that it may use in addition to those of this package.
        overrides: Keyword arguments of its outermost call, or of the function that it names, instead of its own.

    Raises:
        ValueError: If it is none, or it names what is not there.
        TypeError: If a function is called with arguments that it does not take.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"`{text}` is no value, name, import path or call, such as `FedAvgM(lr=0.5)` or `mine.MyRule(step=2)`:"
            f" {error.msg}. Words within a call are written in quotes."
        ) from error
    value = _Reader(text, names or {}, overrides).read(node, is_outermost=True)
    if overrides and not isinstance(node, ast.Call):
        return value(**overrides)
    return value


def build_or_text(text: str) -> Any:
    """Return the value of an expression, or the text itself if it is a word that names nothing, such as ``host``."""
    if text.isidentifier() and text not in ("None", "True", "False") and find_public(text) is None:
        return text
    return build(text)


def find_public(name: str) -> Any:
    """Return what this package has under a name, which may lack an ending such as ``Callback``; else None."""
    return _public_names().get(name)


@lru_cache
def _public_names() -> dict[str, object]:
    """Return the public objects of the package by name, and by the names without the common endings."""
    full: dict[str, object] = {}
    shortened: dict[str, object] = {}
    for name in lightning_fedhaw.__all__:
        full[name] = getattr(lightning_fedhaw, name)
        for ending in _ENDINGS:
            if name.endswith(ending):
                shortened[name.removesuffix(ending)] = full[name]
    # A full name comes first: `FedProx` is an objective, whatever else might be called so for short.
    return {**shortened, **full}


def nearest(name: str, known: Collection[str]) -> str:
    """Ask for the known name that is nearest to an unknown one, or list all."""
    matches = get_close_matches(name, known, 1)
    if not matches:
        # To the comparison above, a capital is another letter.
        original_of = {key.lower(): key for key in known}
        for match in get_close_matches(name.lower(), original_of, 1):
            matches.append(original_of[match])
    if matches:
        return f"Did you mean `{matches[0]}`?"
    return f"There are {', '.join(known)}."


class _Reader:
    """Evaluates the nodes of one expression."""

    def __init__(self, text: str, names: Mapping[str, object], overrides: Mapping[str, object]) -> None:
        self._text = text
        self._names = names
        self._overrides = overrides

    def read(self, node: ast.expr, *, is_outermost: bool = False) -> Any:
        """Return the value of a node."""
        if isinstance(node, ast.Call):
            overrides: Mapping[str, object] = {}
            if is_outermost:
                overrides = self._overrides
            return self._call(node, overrides)
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return self._import(ast.unparse(node))
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.read(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return self._dict(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [*_as_list(self.read(node.left)), *_as_list(self.read(node.right))]
        return self._literal(node)

    def _dict(self, node: ast.Dict) -> dict[object, object]:
        entries: dict[object, object] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            entries[self._literal(key)] = self.read(value)
        return entries

    def _literal(self, node: ast.expr | None) -> object:
        try:
            # `None` is the key of `**mapping`; the empty text is as little a literal.
            return ast.literal_eval(node or "")
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"`{self._text}` may hold values, names, import paths, calls and sums of callbacks; anything else"
                " belongs into a function of your own, named by its import path."
            ) from error

    def _call(self, node: ast.Call, overrides: Mapping[str, object]) -> object:
        function = self.read(node.func)
        positional = [self.read(argument) for argument in node.args]
        named: dict[str, object] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(f"`{self._text}`: write each argument out, `**` is not known here.")
            named[keyword.arg] = self.read(keyword.value)
        named.update(overrides)
        if not callable(function):
            raise ValueError(f"`{ast.unparse(node.func)}` in `{self._text}` is {function!r}, which cannot be called.")
        return function(*positional, **named)

    def _name(self, name: str) -> object:
        if name in self._names:
            return self._names[name]
        value: object = find_public(name)
        if value is None:
            known = {**self._names, **_public_names()}
            remedy = "Give a name of this package, or the import path of your own, such as `mine.MyRule`."
            if get_close_matches(name, known, 1):
                remedy = nearest(name, known)
            raise ValueError(f"There is no `{name}`, in `{self._text}`. {remedy}")
        return value

    def _import(self, path: str) -> object:
        """Import the longest part of a dotted path that is a module, and take the rest from there."""
        names = path.split(".")
        if not all(name.isidentifier() for name in names):
            raise ValueError(f"`{path}` in `{self._text}` is no import path.")
        for end in range(len(names) - 1, 0, -1):
            module = _module(".".join(names[:end]))
            if module is not None:
                return self._attribute(module, names[end:], path)
        raise ValueError(
            f"There is no module `{names[0]}`, in `{self._text}`. It is looked for in the working directory and among"
            " installed packages."
        )

    def _attribute(self, value: object, names: list[str], path: str) -> object:
        for name in names:
            if not hasattr(value, name):
                public = [attribute for attribute in dir(value) if not attribute.startswith("_")]
                raise ValueError(f"There is no `{path}`: `{_title(value)}` has no `{name}`. {nearest(name, public)}")
            value = getattr(value, name)
        return value


def _module(name: str) -> ModuleType | None:
    """Import a module; return None if there is none, but let errors of its own code pass."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            return None
        raise


def _title(value: object) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _as_list(value: object) -> list[object]:
    """Return the callbacks of one side of a sum, where a class stands for an object without arguments."""
    if isinstance(value, list):
        return value
    if isinstance(value, type):
        return [value()]
    return [value]


def name_of(value: object) -> str:
    """Return the import path of a function or class, for records of what was run."""
    function: Any = getattr(value, "func", value)
    path = f"{function.__module__}.{function.__qualname__}"
    named = getattr(value, "keywords", {})
    arguments = [described(argument) for argument in getattr(value, "args", ())]
    for name, argument in named.items():
        arguments.append(f"{name}={described(argument)}")
    if arguments:
        return f"{path}({', '.join(arguments)})"
    return path


def described(value: object) -> str:
    """Describe a value in the same words in every process: without the addresses of objects."""
    if isinstance(value, partial) or hasattr(value, "__qualname__"):
        return name_of(value)
    return _ADDRESS.sub("", repr(value))
