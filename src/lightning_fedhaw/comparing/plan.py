"""What a comparison runs: one :class:`RunPlan` for each cell, method, combination of settings and seed."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import Callback

from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.channel.erasure import ErasureChannel
from lightning_fedhaw.comparing import expressions
from lightning_fedhaw.comparing.cells import OPTIONS, Cell
from lightning_fedhaw.comparing.federations import CELLS
from lightning_fedhaw.objectives.base import ClientObjective

FEDERATED = "federated"
CENTRALIZED = "centralized"
ALONE = "alone"
BASELINES = (CENTRALIZED, ALONE)

CALLBACKS = ("errors", "channel", "objective")
"""Settings that are callbacks of the trainer."""

SETTINGS = (*CALLBACKS, *OPTIONS)
"""All settings that may vary, besides ``model.NAME`` and ``data.NAME``."""

_LONGEST_NAME = 120
"""Characters of a file's name; file systems allow about 255, with a suffix."""


class Plan(Protocol):
    """A run that is planned; another process must be able to receive it."""

    @property
    def seed(self) -> int:
        """The seed of the federation and of the initial model."""

    @property
    def rounds(self) -> int:
        """The number of rounds."""

    @property
    def metric(self) -> str | None:
        """The metric that is compared; None if the plan does not say which."""

    @property
    def key(self) -> str:
        """The identity of the run, for its record."""

    @property
    def title(self) -> str:
        """The run in words."""

    @property
    def folder(self) -> str:
        """The folder of the method's runs below that of all results; each seed has its own in it."""

    def describe(self) -> dict[str, object]:
        """Return what identifies the run, as plain values."""


@dataclass(frozen=True)
class Recipe:
    """How something is created for every run.

    Attributes:
        label: Its name in tables.
        source: An expression, or a function without arguments, or a finished cell.
    """

    label: str
    source: str | Callable[[], object] | Cell

    @property
    def identity(self) -> str:
        """What tells it from others in the records of finished runs."""
        if isinstance(self.source, str):
            return self.source
        if isinstance(self.source, Cell):
            cell = self.source
            options = {name: _plain(value) for name, value in cell.options.items()}
            return f"{expressions.name_of(cell.model)} on {expressions.name_of(cell.data)}, {json.dumps(options)}"
        return expressions.name_of(self.source)


@dataclass(frozen=True)
class RunPlan:
    """One run, in a form that another process can carry out.

    Attributes:
        cell: The federation.
        method: The rule, with its further callbacks.
        settings: Name and value of each setting.
        seed: The seed of the federation and of the initial model.
        rounds: Number of rounds.
        kind: ``"federated"``, or one of the baselines.
        accelerator: The trainer's argument.
        metric: The metric that is compared; None for the cell's, or the first accuracy or loss.
    """

    cell: Recipe
    method: Recipe
    settings: tuple[tuple[str, object], ...]
    seed: int
    rounds: int
    kind: str = FEDERATED
    accelerator: str = "cpu"
    metric: str | None = None

    def describe(self) -> dict[str, object]:
        """Return what identifies the run, as plain values."""
        return {
            "cell": self.cell.label,
            "method": self.method.label,
            "settings": {name: _plain(value) for name, value in self.settings},
            "seed": self.seed,
            "rounds": self.rounds,
            "kind": self.kind,
            "cell_is": self.cell.identity,
            "method_is": self.method.identity,
        }

    @property
    def key(self) -> str:
        """The identity of the run, for its record."""
        return key_of(self.describe())

    @property
    def title(self) -> str:
        """The run in words."""
        words = [self.cell.label, *self._setting_words(), self.method.label]
        return f"{', '.join(words)}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The folder of the method's runs below that of the comparison; each seed has its own in it."""
        names = [file_name(self.cell.label)]
        if self.settings:
            names.append(file_name("_".join(self._setting_words())))
        names.append(file_name(self.method.label))
        return "/".join(names)

    def _setting_words(self) -> list[str]:
        return [f"{name}={_plain(value)}" for name, value in self.settings]


def file_name(text: str) -> str:
    """Return a text as a file system takes it; of a long one, a beginning and a checksum."""
    name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_")
    if len(name) > _LONGEST_NAME:
        # Eight digits of the checksum, and the underscore.
        return f"{name[: _LONGEST_NAME - 9]}_{zlib.crc32(text.encode()):08x}"
    return name


def key_of(description: Mapping[str, object]) -> str:
    """Return the identity of a run by its description."""
    # Sorted, so that a record is found again if a later version names the fields in another order.
    return json.dumps(description, sort_keys=True)


def _plain(value: object) -> object:
    """Return a value as JSON has it; what JSON has not is described."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return expressions.described(value)


# ---------------------------------------------------------------------- from recipes to objects


def build_cell(recipe: Recipe) -> Cell:
    """Return the cell of a recipe.

    Raises:
        ValueError: If there is none.
    """
    source = recipe.source
    if isinstance(source, Cell):
        return source
    value: object = source
    if isinstance(source, str):
        text = source
        if text.endswith(".npz") and "(" not in text:
            text = f"npz({text!r})"
        if text.isidentifier() and text not in CELLS:
            hint = expressions.nearest(text, CELLS)
            raise ValueError(f"There is no cell `{text}`. {hint} Or give an npz file, or a function by import path.")
        value = expressions.build(text, CELLS)
    if callable(value):
        value = value()
    if not isinstance(value, Cell):
        raise ValueError(f"`{source}` must be a cell, or a function that returns a `Cell`; it is {value!r}.")
    return value


def build_method(recipe: Recipe) -> list[Callback]:
    """Return a rule, and what else is among its callbacks.

    Raises:
        ValueError: If there is not exactly one rule.
    """
    value: object = recipe.source
    if isinstance(value, str):
        value = expressions.build(value)
    if callable(value):
        value = value()
    members: Sequence[object] = value if isinstance(value, (list, tuple)) else [value]
    callbacks: list[Callback] = []
    num_rules = 0
    for member in members:
        if isinstance(member, Callback):
            callbacks.append(member)
        if isinstance(member, AggregationRule):
            num_rules += 1
    if num_rules != 1 or len(callbacks) != len(members):
        raise ValueError(
            f"`{recipe.label}` must be one aggregation rule, with other callbacks if need be"
            f" (`FedAvg + FedProx(mu=0.01)`), got {value!r}."
        )
    return callbacks


def build_setting(name: str, value: object) -> Any:
    """Return the value of a setting as the federation takes it: text is read as an expression."""
    if isinstance(value, str) and name != "metric":
        return expressions.build_or_text(value)
    if name in CALLBACKS and callable(value):
        return value()
    return value


def build_callbacks(settings: Mapping[str, Any]) -> list[Callback]:
    """Return the channels and objectives among some settings."""
    callbacks: list[Callback] = []
    errors = settings.get("errors")
    if errors:
        callbacks.append(ErasureChannel(max_probability=errors))
    for name, kind in (("channel", Channel), ("objective", ClientObjective)):
        value = settings.get(name)
        if value is None:
            continue
        members = value if isinstance(value, list) else [value]
        for member in members:
            # The name of a class without brackets is the class itself.
            callback = member() if isinstance(member, type) else member
            if not isinstance(callback, kind):
                raise ValueError(
                    f"`{name}` must be a {name}, such as `{_EXAMPLES[name]}`, or None, got {member!r}. Write"
                    " it as an expression."
                )
            callbacks.append(callback)
    return callbacks


_EXAMPLES = {"channel": "ErasureChannel(probability=0.2)", "objective": "FedProx(mu=0.01)"}


# ---------------------------------------------------------------------- the product


def recipes(name: str, sources: Any) -> list[Recipe]:
    """Return the recipes of an argument: expressions with or without labels, or a mapping from labels.

    Raises:
        ValueError: If there is none, or two have the same label.
    """
    if isinstance(sources, (str, Cell)):
        sources = [sources]
    ordered: list[Recipe] = []
    if isinstance(sources, Mapping):
        for label, source in sources.items():
            ordered.append(Recipe(label, source))
    else:
        for source in sources:
            ordered.append(_recipe(name, source))
    labels = [recipe.label for recipe in ordered]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"`{name}` has `{label}` twice. Give one of them another label: `label={label}`.")
    if not ordered:
        raise ValueError(f"`{name}` must hold at least one, got none.")
    return ordered


def _recipe(name: str, source: object) -> Recipe:
    if isinstance(source, Cell):
        return Recipe(source.name, source)
    if isinstance(source, str):
        label, expression = expressions.split_label(source)
        if label == expression and expression.endswith(".npz"):
            label = re.split(r"[/\\]", expression)[-1].removesuffix(".npz")
        return Recipe(label, expression)
    if callable(source):
        return Recipe(getattr(source, "__name__", repr(source)), source)
    raise ValueError(
        f"`{name}` must hold expressions such as `'FedAvgM(lr=0.5)'`, or functions that create a new one for every run,"
        f" got {source!r}."
    )


def check_settings(settings: Mapping[str, Sequence[object]]) -> None:
    """Refuse settings that do not exist, and objects that would be shared by several runs.

    Raises:
        ValueError: If there is such a setting.
    """
    for name, values in settings.items():
        group, dot, _ = name.partition(".")
        if not (dot and group in ("model", "data")) and name not in SETTINGS:
            known = dict.fromkeys(SETTINGS)
            raise ValueError(
                f"There is no setting `{name}`. {expressions.nearest(name, known)} Arguments of the model and of the"
                " data are `model.NAME` and `data.NAME`."
            )
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"`{name}` must be a list of values, got {values!r}.")
        for value in values:
            if isinstance(value, Callback):
                raise ValueError(
                    f"`{name}` must be created for every run, got {value!r}. Give an expression such as"
                    f" `'{type(value).__name__}(...)'`, or a function."
                )


def plan_runs(
    cells: Iterable[Recipe],
    methods: Iterable[Recipe],
    settings: Mapping[str, Sequence[object]],
    seeds: Iterable[int],
    *,
    rounds: int,
    baselines: Iterable[str] = (),
    accelerator: str = "cpu",
    metric: str | None = None,
) -> list[RunPlan]:
    """Return all runs: one seed after another, so that there are early results of everything."""
    kinds = [(method, FEDERATED) for method in methods]
    for kind in baselines:
        kinds.append((Recipe(kind, "FedAvg"), kind))
    names = list(settings)
    plans = []
    for seed, cell, values in itertools.product(seeds, cells, itertools.product(*settings.values())):
        for method, kind in kinds:
            chosen = tuple(zip(names, values, strict=True))
            plans.append(RunPlan(cell, method, chosen, seed, rounds, kind, accelerator, metric))
    return plans
