"""The names that the command line knows, and its errors as sentences."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lightning_fedhaw
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

# Lines of jsonargparse that say which of several types it tried, and not what is wrong.
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
    """Say what jsonargparse found wrong in one sentence, with the nearest name, where it is about names.

    Args:
        message: Its message, of many lines: one for each type that it tried.
    """
    text = _one_line(message)
    unknown_class = _UNKNOWN_CLASS.search(text)
    if unknown_class:
        # The text begins with "--", and the name of the argument, in backticks.
        argument = text[3:].split("`")[0]
        hint = _class_hint(unknown_class[1], argument)
        beginning = text[: unknown_class.start()]
        return f"{beginning}there is no class `{unknown_class[1]}`; give a name or an import path. {hint}".strip()
    unknown_argument = _UNKNOWN_ARGUMENT.search(text)
    if unknown_argument:
        owner = _public_classes().get(unknown_argument[1])
        known = inspect.signature(owner).parameters if owner else ()
        elsewhere = getattr(owner, "arguments_elsewhere", {})
        if unknown_argument[2] in elsewhere:
            return f"{text}. It is an argument of `{elsewhere[unknown_argument[2]]}`."
        return f"{text}. {_argument_hint(unknown_argument[2], known)}".strip()
    unknown_setting = _UNKNOWN_SETTING.search(text)
    if unknown_setting:
        known_settings = FEDERATION if unknown_setting[1] == "federation" else TRAINER
        return f"{text}. {_argument_hint(unknown_setting[2], known_settings)}".strip()
    value = _GIVEN_VALUE.search(message)
    if value and value[1] not in text:
        return f"{text}, got {value[1]}"
    return text


def _one_line(message: str) -> str:
    """Join the lines of a message that say something, each once."""
    noise = _NOISE
    if "Expected a dot import path" in message:
        # The name of a class that is not there, whatever else may be given.
        noise += ("Expected a <class", "Expected a typing.")
    lines: list[str] = []
    for raw in message.splitlines():
        line = raw.strip(" -")
        if line and not line.startswith(noise) and line not in lines:
            lines.append(line)
    return re.sub(r'Parser key "([\w.]+)":', r"`--\1`:", " ".join(lines))


def _class_hint(name: str, argument: str) -> str:
    """Name the nearest class that an argument takes; of a group for callbacks else all of them."""
    base = BASES.get(argument, ())
    known = [known_name for known_name, kind in _public_classes().items() if issubclass(kind, base)]
    hint = _nearest(name, known)
    if not hint and argument in GROUPS:
        return "There are " + ", ".join(known) + "."
    return hint


def _argument_hint(name: str, known: Iterable[str]) -> str:
    """Say where a setting of the federation belongs, or name the nearest argument."""
    if name in FEDERATION:
        return f"It is `--federation.{name}`."
    return _nearest(name, known)


def _public_classes() -> dict[str, type]:
    """Return the classes of this package that may be given by name."""
    classes = {}
    for name in lightning_fedhaw.__all__:
        value = getattr(lightning_fedhaw, name)
        if isinstance(value, type) and value not in BASES.values():
            classes[name] = value
    return classes


def _nearest(name: str, known: Iterable[str]) -> str:
    full_of = {_short(full): full for full in known}
    near = get_close_matches(_short(name), full_of, 1)
    return f"Did you mean `{full_of[near[0]]}`?" if near else ""


def _short(name: str) -> str:
    """Drop what the names of callbacks have in common, so that it makes no two of them similar."""
    return re.sub("(callback|channel)$", "", name.lower())
