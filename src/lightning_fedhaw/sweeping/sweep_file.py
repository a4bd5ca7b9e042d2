"""Reads the file of a sweep: what varies, how, and the command that every run is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_fedhaw import arguments
from lightning_fedhaw.sweeping.parameters import Parameters, check_parameter

_VALUES = "${args}"
"""The place of the values in a command."""

_METHODS = ("grid", "random", "bayes")
_FIT = "fit"


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file describes it.

    Attributes:
        path: The file.
        name: The name of the sweep.
        method: ``"grid"``, ``"random"`` or ``"bayes"``.
        parameters: What varies, by dotted name.
        before: The arguments of ``fedhaw fit`` before the values.
        after: Those after them.
        metric: The metric that is optimized; None if the file names none.
        goal: ``"maximize"`` or ``"minimize"``.
        run_cap: The number of runs at which the file ends the sweep; None if it says nothing.
        unused: Entries that have no effect on this machine.
    """

    path: Path
    name: str
    method: str
    parameters: Parameters
    before: tuple[str, ...]
    after: tuple[str, ...]
    metric: str | None
    goal: str | None
    run_cap: int | None
    unused: tuple[str, ...]


def read_sweep(path: str | Path) -> SweepFile:
    """Read a file.

    Raises:
        ValueError: If there is none, if it is no sweep, or if its runs are not runs of ``fedhaw fit``.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"There is no file {str(path)!r}. Give the YAML file of a sweep.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no YAML file: {' '.join(str(error).split())}.") from error
    parameters = content.get("parameters") if isinstance(content, dict) else None
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(
            f"{str(path)!r} is no sweep: a sweep has `method`, `command` and `parameters`, which say what varies."
        )
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            raise arguments.invalid(name, "a mapping, such as `{value: 0.1}` or `{values: [1, 2]}`", parameter)
        check_parameter(name, parameter)
    method: str = arguments.choice("method", content.get("method"), _METHODS)
    before, after = _command(content)
    metric: Mapping[str, Any] = content.get("metric") or {}
    goal = metric.get("goal", "minimize" if metric else None)
    unused = [name for name in ("early_terminate",) if name in content]
    return SweepFile(
        path=file,
        name=str(content.get("name", file.stem)),
        method=method,
        parameters=parameters,
        before=before,
        after=after,
        metric=metric.get("name"),
        goal=arguments.optional(arguments.choice, "metric: goal", goal, ("maximize", "minimize")),
        run_cap=arguments.optional(arguments.integer, "run_cap", content.get("run_cap"), minimum=1),
        unused=tuple(unused),
    )


def _command(content: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments of ``fedhaw fit`` before the values of a run and after them.

    Raises:
        ValueError: If the command is another one.
    """
    command = content.get("command")
    if not isinstance(command, Sequence) or isinstance(command, str) or _FIT not in command or _VALUES not in command:
        raise ValueError(
            "`command` must run `fedhaw fit` with the values of the sweep, such as"
            f" `[fedhaw, fit, --config, base.yaml, '{_VALUES}']`, got {command!r}."
        )
    words = [str(word) for word in command]
    program = words[: words.index(_FIT)]
    if "fedhaw" not in [word.replace("${program}", str(content.get("program"))) for word in program]:
        raise ValueError(f"`command` must run `fedhaw fit`, got {' '.join(words)!r}.")
    arguments_of_fit = words[words.index(_FIT) + 1 :]
    place = arguments_of_fit.index(_VALUES)
    return tuple(arguments_of_fit[:place]), tuple(arguments_of_fit[place + 1 :])
