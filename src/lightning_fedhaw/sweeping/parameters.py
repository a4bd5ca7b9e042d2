"""The parameters of a sweep: all combinations of their values, or random draws from their distributions.

The names and the meaning of the distributions are those of a W&B sweep file. ``log_uniform_values`` and its relatives
take the bounds themselves, ``log_uniform`` and its relatives their natural logarithms.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_fedhaw import arguments

Parameters = Mapping[str, Mapping[str, object]]
"""What a sweep file says of each parameter, by its dotted name."""

Values = dict[str, object]
"""A value for each parameter."""

_BOUNDED = ("uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values")
_WITH_DEVIATION = ("normal", "log_normal")
_FURTHER = ("constant", "categorical", "int_uniform")
_ROUNDED = "q_"
"""The beginning of the name of a distribution whose draws are rounded to multiples of ``q``."""

_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q")


def check_parameter(name: str, parameter: Mapping[str, object]) -> None:
    """Refuse a parameter that cannot be drawn.

    Raises:
        ValueError: Naming the parameter and what it lacks.
    """
    if "parameters" in parameter:
        raise ValueError(
            f"`{name}` holds parameters of its own. Write each with its whole name: `{name}.lr: {{value: 0.1}}`."
        )
    for key in parameter:
        if key not in _KEYS:
            raise arguments.invalid(f"{name}: {key}", f"one of {', '.join(_KEYS)}", parameter[key])
    kind = distribution_of(name, parameter)
    if kind == "constant":
        _entry(name, parameter, "value")
    elif kind == "categorical":
        _categories(name, parameter)
    else:
        _draw_number(name, parameter, kind, np.random.default_rng(0))


def distribution_of(name: str, parameter: Mapping[str, object]) -> str:
    """Return the name of a parameter's distribution, which the file may leave out where the other entries say it."""
    if "distribution" in parameter:
        return _known_distribution(name, parameter["distribution"])
    if "value" in parameter:
        return "constant"
    if "values" in parameter:
        return "categorical"
    bounds = (parameter.get("min"), parameter.get("max"))
    if all(isinstance(bound, int) for bound in bounds):
        return "int_uniform"
    if all(isinstance(bound, (int, float)) for bound in bounds):
        return "uniform"
    raise ValueError(f"`{name}` must have a `value`, `values`, or `min` and `max`, got {dict(parameter)!r}.")


def _known_distribution(name: str, distribution: object) -> str:
    known = [*_FURTHER]
    for kind in (*_BOUNDED, *_WITH_DEVIATION):
        known += [kind, f"{_ROUNDED}{kind}"]
    if distribution not in known:
        raise arguments.invalid(f"{name}: distribution", f"one of {', '.join(known)}", distribution)
    return str(distribution)


def all_combinations(parameters: Parameters) -> list[Values]:
    """Return every combination of the values of a grid, the last parameter varying first.

    Raises:
        ValueError: If a parameter has a range instead of values.
    """
    options: dict[str, list[object]] = {}
    for name, parameter in parameters.items():
        kind = distribution_of(name, parameter)
        if kind == "constant":
            options[name] = [parameter["value"]]
        elif kind == "categorical":
            options[name] = _categories(name, parameter)
        else:
            raise ValueError(
                f"`{name}` has a range, and `method: grid` needs `values`. List them, or use `method: random`."
            )
    combinations = []
    for values in itertools.product(*options.values()):
        combinations.append(dict(zip(options, values, strict=True)))
    return combinations


def draws(parameters: Parameters, count: int, seed: int) -> list[Values]:
    """Draw a value for each parameter, so many times.

    The first draws stay the same if more are asked for.

    Args:
        parameters: The parameters.
        count: The number of draws.
        seed: The seed of the draws.
    """
    drawn = []
    for number in range(count):
        values: Values = {}
        for name, parameter in parameters.items():
            # A generator for each name, so that the others keep their draws when a parameter is added.
            generator = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
            values[name] = _draw(name, parameter, generator)
        drawn.append(values)
    return drawn


def _draw(name: str, parameter: Mapping[str, object], generator: np.random.Generator) -> object:
    kind = distribution_of(name, parameter)
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        categories = _categories(name, parameter)
        probabilities: Any = parameter.get("probabilities")
        return categories[int(generator.choice(len(categories), p=probabilities))]
    return _draw_number(name, parameter, kind, generator)


def _draw_number(name: str, parameter: Mapping[str, object], kind: str, generator: np.random.Generator) -> int | float:
    if kind == "int_uniform":
        low = arguments.integer(f"{name}: min", _entry(name, parameter, "min"), minimum=-(2**62))
        high = arguments.integer(f"{name}: max", _entry(name, parameter, "max"), minimum=low)
        return int(generator.integers(low, high, endpoint=True))
    plain_kind = kind.removeprefix(_ROUNDED)
    if plain_kind in _WITH_DEVIATION:
        mean = arguments.number(f"{name}: mu", parameter.get("mu", 0.0))
        deviation = arguments.number(f"{name}: sigma", parameter.get("sigma", 1.0), minimum=0)
        number = float(generator.normal(mean, deviation))
        if plain_kind == "log_normal":
            number = math.exp(number)
    else:
        number = _draw_between(name, parameter, plain_kind, generator)
    if kind.startswith(_ROUNDED):
        step = arguments.number(f"{name}: q", parameter.get("q", 1.0), above=0)
        number = round(number / step) * step
    # Enough digits for any study, and a command line that a person can read.
    return float(f"{number:.6g}")


def _draw_between(name: str, parameter: Mapping[str, object], kind: str, generator: np.random.Generator) -> float:
    """Draw a number between bounds: uniform itself, in its logarithm, or its reciprocal uniform in its logarithm."""
    low = arguments.number(
        f"{name}: min", _entry(name, parameter, "min"), hint="Write `1.0e-3`: `1e-3` is text in YAML."
    )
    high = arguments.number(f"{name}: max", _entry(name, parameter, "max"), minimum=low)
    if kind == "uniform":
        return float(generator.uniform(low, high))
    if kind.endswith("_values"):
        arguments.number(f"{name}: min", low, above=0)
        low = math.log(low)
        high = math.log(high)
    exponent = float(generator.uniform(low, high))
    if kind == "inv_log_uniform":
        # Its bounds are the logarithms of the reciprocal.
        return math.exp(-exponent)
    if kind == "inv_log_uniform_values":
        return math.exp(low + high - exponent)
    return math.exp(exponent)


def _categories(name: str, parameter: Mapping[str, object]) -> list[object]:
    values = _entry(name, parameter, "values")
    if not isinstance(values, list) or not values:
        raise arguments.invalid(f"{name}: values", "a list of one or more", values)
    probabilities = parameter.get("probabilities")
    if probabilities is not None and (not isinstance(probabilities, list) or len(probabilities) != len(values)):
        raise arguments.invalid(f"{name}: probabilities", f"a list of {len(values)} numbers", probabilities)
    return values


def _entry(name: str, parameter: Mapping[str, object], key: str) -> object:
    if key not in parameter:
        raise ValueError(f"`{name}` must have an entry `{key}`, got {dict(parameter)!r}.")
    return parameter[key]
