"""The names that the command line knows, and its errors as sentences."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lightning_fedhaw
from lightning_fedhaw import argument_names
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.partitioners import Partitioner
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import STORAGE_DTYPES, FederationOptions
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
_UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)'.* Option '(\w+)' is not accepted")
_UNKNOWN_SETTING = re.compile(r"(?:arguments: --|accept option ')(federation|trainer)\.(\w+)")
_CLASSLESS = re.compile(r"`--(\w+)`: .*class_path '[\w.]*\.(LightningModule|LightningDataModule)': Option '\w+' is not")
_NO_MODULE = re.compile(r"No module named '([\w.]+)'$")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'$")
_REQUIRED_MODEL = re.compile(r"arguments are required: (?:\w+\.)?model$")
_LITERAL = re.compile(r"Expected a typing\.Literal\[([^\]]*)\]\.?")
_NOT_OFFERED = re.compile(
    r"lightning_fedhaw\.(?:channel\.\w*Channel|objectives\.ClientObjective|adapter\.[\w.]+)(?:, ?|(?=\)))"
)
_GIVEN_VALUE = re.compile(r"Given value: (?!NestedArg|Namespace|[{\[])(.+)")


def sentence(message: str) -> str:
    """Rewrite an error of jsonargparse as one sentence, with the nearest name if a name is unknown.

    Args:
        message: Its message, of many lines: one for each type that it tried.
    """
    text = _one_line(message)
    rewritten = _about_classes(text)
    if rewritten is not None:
        return rewritten
    unknown_class = _UNKNOWN_CLASS.search(text)
    if unknown_class:
        return _unknown_class_sentence(text, unknown_class)
    unknown_argument = _UNKNOWN_ARGUMENT.search(text)
    if unknown_argument:
        hint = _class_argument_hint(unknown_argument[1], unknown_argument[2])
        return f"{text.removesuffix('.')}. {hint}".strip()
    unknown_setting = _UNKNOWN_SETTING.search(text)
    if unknown_setting:
        settings = TRAINER
        if unknown_setting[1] == "federation":
            settings = FEDERATION
        return f"{text}. {_argument_hint(unknown_setting[2], settings)}".strip()
    text = _with_choices(text)
    if re.search(r"arguments: --lr\b", text):
        return f"{text}. The learning rate of the clients is an argument of the model: `--model.lr`."
    value = _GIVEN_VALUE.search(message)
    if value and "but is abstract" in text:
        return _abstract_class_sentence(text, value[1])
    if value and value[1] not in text:
        return f"{text}, got {value[1]}"
    return text


def _about_classes(text: str) -> str | None:
    """Rewrite an error about the class of a model or of data; return None for another error.

    Args:
        text: The error in one line.
    """
    if _REQUIRED_MODEL.search(text):
        return "`fit` needs a model, got none. Add `--model=mine.MyModel`, the import path of a LightningModule."
    classless = _CLASSLESS.search(text)
    if classless:
        group = classless[1]
        return (
            f"The configuration has arguments of `{group}` without its class, as that of a program with a fixed class"
            f" (`LightningCLI(MyModel, ...)`). Name the class before it: `--{group}=mine.MyClass --config=...`."
        )
    module = _NO_MODULE.search(text)
    if module:
        return f"{text}. Modules are looked for in the working directory and among installed packages."
    attribute = _NO_ATTRIBUTE.search(text)
    if attribute and attribute[1] in sys.modules:
        names = [name for name in dir(sys.modules[attribute[1]]) if not name.startswith("_")]
        return f"{text}. {_nearest(attribute[2], names)}".strip()
    return None


def _with_choices(text: str) -> str:
    """Rewrite what is said of the values that an argument takes."""
    choices: list[str] = []
    for values in _LITERAL.findall(text):
        choices += values.split(", ")
    if not choices:
        return text
    beginning = text[: text.index("Expected")]
    got = text.rpartition("Got value: ")
    rewritten = f"{beginning}must be one of {', '.join(choices)}"
    if got[1]:
        rewritten += f", got {got[2]}"
    return rewritten


def rules_in(words: Iterable[str]) -> list[str]:
    """Return the rules that some arguments of a command line name.

    Args:
        words: The arguments.
    """
    rules = []
    is_next = False
    for word in words:
        if is_next:
            rules.append(word)
        option, equals, value = word.partition("=")
        if option == "--rule" and equals:
            rules.append(value)
        is_next = word == "--rule"
    return rules


def dtype_of(name: str) -> torch.dtype:
    """Return a dtype of torch by its name.

    Raises:
        ValueError: If there is none.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        names = [str(known).removeprefix("torch.") for known in STORAGE_DTYPES]
        raise ValueError(f"`{name}` is no dtype of torch, such as {', '.join(names)}")
    return dtype


def offered_classes(help_text: str) -> str:
    """Remove base classes and internal ones from the lists of classes in a help text."""
    shorter = _NOT_OFFERED.sub("", help_text)
    # A line of a list that held nothing else.
    return re.sub(r"\n +(?=\n)", "", shorter)


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


def _class_argument_hint(path: str, name: str) -> str:
    """Say where an argument that a class does not have belongs, or name the nearest argument of the class."""
    module, _, class_name = path.rpartition(".")
    kind = _public_classes().get(class_name) or getattr(sys.modules.get(module), class_name, None)
    if kind is None:
        return _argument_hint(name, ())
    elsewhere = getattr(kind, "arguments_elsewhere", {})
    if name in elsewhere:
        return f"It is an argument of `{elsewhere[name]}`."
    return _argument_hint(name, argument_names.constructor_names(kind))


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
