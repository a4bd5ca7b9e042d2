"""The names that the command line knows, and its errors as sentences."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lightning_fedhaw
from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.trainer import FederatedTrainer

FEDERATION = frozenset(field.name for field in fields(FederationOptions))
"""The arguments of the group ``federation``."""

TRAINER = frozenset({*inspect.signature(Trainer).parameters, *inspect.signature(FederatedTrainer).parameters})
TRAINER -= FEDERATION
"""The arguments of the group ``trainer``."""

GROUPS = {
    "rule": AggregationRule | None,
    "channel": Channel | list[Channel] | None,
    "objective": ClientObjective | list[ClientObjective] | None,
}
"""The groups for callbacks, and what each takes."""

BASES: dict[str, type] = {
    "rule": AggregationRule,
    "channel": Channel,
    "objective": ClientObjective,
    "model": LightningModule,
    "data": LightningDataModule,
    "federation.partitioner": Partitioner,
    "federation.sampler": CohortSampler,
    "federation.client_val": HoldOut,
    "trainer.callbacks": Callback,
}
"""The class whose subclasses an argument takes by name."""

# Beginnings of jsonargparse's lines that say which of several types it tried, and not what is wrong.
_NOISE: tuple[str, ...] = (
    "Errors:",
    "Subtypes:",
    "Does not validate",
    "Expected a path but",
    "Expected a <class 'list'>",
    "Expected a <class 'NoneType'>",
    "Given",
)

_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)$")
_UNKNOWN_ARGUMENT = re.compile(r"class_path '[\w.]*?(\w+)'.* Option '(\w+)' is not accepted")
_UNKNOWN_SETTING = re.compile(r"(?:arguments: --|accept option ')(federation|trainer)\.(\w+)")
_GIVEN_VALUE = re.compile(r"Given value: (?!NestedArg|Namespace|[{\[])(.+)")


def sentence(message: str) -> str:
    """Rewrite an error of jsonargparse as one sentence, with the nearest name if a name is unknown.

    Args:
        message: Its message, of many lines: one for each type that it tried.
    """
    text = _one_line(message)
    unknown_class = _UNKNOWN_CLASS.search(text)
    if unknown_class:
        return _unknown_class_sentence(text, unknown_class)
    unknown_argument = _UNKNOWN_ARGUMENT.search(text)
    if unknown_argument:
        return f"{text}. {_class_argument_hint(unknown_argument[1], unknown_argument[2])}".strip()
    unknown_setting = _UNKNOWN_SETTING.search(text)
    if unknown_setting:
        settings = TRAINER
        if unknown_setting[1] == "federation":
            settings = FEDERATION
        return f"{text}. {_argument_hint(unknown_setting[2], settings)}".strip()
    value = _GIVEN_VALUE.search(message)
    if value and "but is abstract" in text:
        return _abstract_class_sentence(text, value[1])
    if value and value[1] not in text:
        return f"{text}, got {value[1]}"
    return text


def _unknown_class_sentence(text: str, unknown_class: re.Match[str]) -> str:
    """Rewrite an error about the name of a class, with the nearest name.

    Args:
        text: The error in one line.
        unknown_class: The part of it that holds the name.
    """
    # The text begins with a backtick, "--", and the name of the argument.
    argument = text[3:].split("`")[0]
    hint = _class_hint(unknown_class[1], argument)
    beginning = text[: unknown_class.start()]
    return f"{beginning}there is no class `{unknown_class[1]}`; give a name or an import path. {hint}".strip()


def _abstract_class_sentence(text: str, path: str) -> str:
    """Rewrite an error about a base class that was named instead of one of its subclasses.

    Args:
        text: The error in one line.
        path: The name or import path of the class.
    """
    argument = text[3:].split("`")[0]
    names = _subclasses_of(BASES.get(argument, object))
    name = path.rpartition(".")[2]
    return f"`--{argument}`: `{name}` is a base class. Give a class that derives from it: {', '.join(names)}."


def _class_argument_hint(class_name: str, name: str) -> str:
    """Say where an argument that a class does not have belongs, or name the nearest argument of the class."""
    kind = _public_classes().get(class_name)
    if kind is None:
        return _argument_hint(name, ())
    elsewhere = getattr(kind, "arguments_elsewhere", {})
    if name in elsewhere:
        return f"It is an argument of `{elsewhere[name]}`."
    return _argument_hint(name, arguments.constructor_names(kind))


def _one_line(message: str) -> str:
    """Join the lines of a message that carry information, each once."""
    noise = _NOISE
    if "Expected a dot import path" in message:
        # A class was named that does not exist: which other types would be allowed does not help.
        noise += ("Expected a <class", "Expected a typing.")
    lines: list[str] = []
    for raw in message.splitlines():
        line = raw.strip(" -")
        if line and not line.startswith(noise) and line not in lines:
            lines.append(line)
    return re.sub(r'Parser key "([\w.]+)":', r"`--\1`:", " ".join(lines))


def _class_hint(name: str, argument: str) -> str:
    """Name the nearest class that an argument takes; if none is near, list all classes of a group for callbacks."""
    names = _subclasses_of(BASES.get(argument, ()))
    hint = _nearest(name, names)
    if not hint and argument in GROUPS:
        return "There are " + ", ".join(names) + "."
    return hint


def _argument_hint(name: str, known: Iterable[str]) -> str:
    """Say where a setting of the federation belongs, or name the nearest argument."""
    if name in FEDERATION:
        return f"It is `--federation.{name}`."
    return _nearest(name, known)


def _subclasses_of(base: type | tuple[type, ...]) -> list[str]:
    """List the classes of this package that derive from a class; none for an empty tuple."""
    names = []
    for name, kind in _public_classes().items():
        if issubclass(kind, base):
            names.append(name)
    return names


def _public_classes() -> dict[str, type]:
    """Return the classes of this package that may be given by name."""
    classes = {}
    for name in lightning_fedhaw.__all__:
        value = getattr(lightning_fedhaw, name)
        if isinstance(value, type) and value not in BASES.values():
            classes[name] = value
    return classes


def _nearest(name: str, known: Iterable[str]) -> str:
    """Ask for the known name that is nearest to an unknown one; return an empty string if none is near."""
    full_names = {_short(full_name): full_name for full_name in known}
    matches = get_close_matches(_short(name), full_names, 1)
    if not matches:
        return ""
    return f"Did you mean `{full_names[matches[0]]}`?"


def _short(name: str) -> str:
    """Drop the ending that the names of callbacks have in common, because it would make all of them similar."""
    return re.sub("(callback|channel)$", "", name.lower())
