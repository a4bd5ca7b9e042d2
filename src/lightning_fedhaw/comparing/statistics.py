"""The numbers of a comparison: of each run, over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isnan, nan, sqrt

from lightning_fedhaw.comparing.running import Record
from lightning_fedhaw.federation.client_statistics import is_better_when_higher
from lightning_fedhaw.report.metric_names import is_share

LAST_ROUNDS = 10

SCORES = {
    "final": "final",
    "last_ten": "last 10",
    "best": "best",
    "area": "area",
}
"""Scores in the unit of the metric, with the heads of their columns; methods are compared by their differences."""

COSTS = {
    "dip": "worst dip",
    "rounds_to_target": "rounds to target",
    "server_ms": "server ms",
    "mb_up": "MB up",
    "mb_down": "MB down",
    "state_mb": "state MB",
}
"""Further numbers, where less is better."""


def numbers_of(record: Record, target: float | None = None) -> dict[str, float]:
    """Compute the numbers of one run.

    Args:
        record: The run.
        target: The value of the metric whose first round is looked for.

    Returns:
        ``final``, ``last_ten`` (the mean of the last ten rounds), ``best``, ``area`` (under the curve, divided by the
        number of rounds: the mean of all), ``dip`` (the largest loss against the best so far), ``rounds_to_target``,
        ``server_ms`` (of aggregation, a round), ``mb_up`` and ``mb_down`` (over all rounds), and ``state_mb``; NaN
        where there is none.
    """
    curve = record["curve"]
    sign = 1 if is_better_when_higher(record["metric"]) else -1
    last_values = curve[-LAST_ROUNDS:]
    best = -float("inf")
    dip = 0.0
    rounds_to_target = nan
    for number, value in enumerate(curve, 1):
        best = max(best, sign * value)
        dip = max(dip, best - sign * value)
        is_reached = target is not None and sign * value >= sign * target
        if is_reached and isnan(rounds_to_target):
            rounds_to_target = float(number)
    return {
        "final": curve[-1],
        "last_ten": sum(last_values) / len(last_values),
        "best": sign * best,
        "area": sum(curve) / len(curve),
        "dip": dip,
        "rounds_to_target": rounds_to_target,
        "server_ms": _scaled(record["server_seconds"], 1e3),
        "mb_up": _scaled(record["bytes_up"], 1e-6),
        "mb_down": _scaled(record["bytes_down"], 1e-6),
        "state_mb": _scaled(record["state_bytes"], 1e-6),
    }


def _scaled(value: float | None, factor: float) -> float:
    if value is None:
        return nan
    return value * factor


@dataclass(frozen=True)
class Summary:
    """A number over seeds.

    Attributes:
        mean: The mean over the runs that have it.
        deviation: The standard deviation of a sample, with n - 1; NaN for one run.
        count: The number of runs that have it.
        runs: The number of all runs.
    """

    mean: float
    deviation: float
    count: int
    runs: int

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / sqrt(self.count) if self.count else nan


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and spread of some values, without those that are NaN."""
    known = [value for value in values if not isnan(value)]
    mean = nan
    deviation = nan
    if known:
        mean = sum(known) / len(known)
    if len(known) > 1:
        deviation = sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return Summary(mean, deviation, len(known), len(values))


@dataclass(frozen=True)
class Group:
    """The runs of one cell with one combination of settings.

    Attributes:
        cell: The name of the cell.
        settings: The settings.
        metric: The metric that is compared.
        records: The runs of each method, by seed.
    """

    cell: str
    settings: Mapping[str, object]
    metric: str
    records: Mapping[str, Mapping[int, Record]]

    @property
    def title(self) -> str:
        """The group in words."""
        words = [self.cell]
        for name, value in self.settings.items():
            words.append(f"{name}={value}")
        return ", ".join(words)

    @property
    def is_share(self) -> bool:
        """Whether the metric is shown in percent: an accuracy between 0 and 1."""
        curves = [record["curve"] for runs in self.records.values() for record in runs.values()]
        return is_share(self.metric, chain.from_iterable(curves))

    @property
    def factor(self) -> float:
        """What scores are multiplied by where they are shown."""
        return 100.0 if self.is_share else 1.0

    def numbers(self, method: str, target: float | None = None) -> dict[str, list[float]]:
        """Return the numbers of a method's runs, as lists over seeds."""
        lists: dict[str, list[float]] = {}
        for record in self.records[method].values():
            for name, value in numbers_of(record, target).items():
                lists.setdefault(name, []).append(value)
        return lists

    def diverged(self, method: str) -> int:
        """Count the runs of a method that diverged."""
        return sum(record["diverged"] for record in self.records[method].values())


def groups_of(records: Sequence[Record]) -> list[Group]:
    """Group runs by cell, settings and metric, in the order in which they come."""
    groups: dict[str, Group] = {}
    for record in records:
        run = record["run"]
        # Settings are a dictionary, which cannot be part of a key as it is.
        key = repr((run["cell"], run["settings"], record["metric"]))
        group = groups.setdefault(key, Group(run["cell"], run["settings"], record["metric"], {}))
        runs: dict[str, dict[int, Record]] = group.records  # type: ignore[assignment]  # a mapping to its readers
        runs.setdefault(run["method"], {})[run["seed"]] = record
    return list(groups.values())


@dataclass(frozen=True)
class Difference:
    """How far a method is ahead of another one, paired by seed: positive is better, whatever the metric.

    Attributes:
        method: The method.
        scores: For each score the mean of the differences with its standard error.
    """

    method: str
    scores: Mapping[str, Summary]


def differences(group: Group, reference: str) -> list[Difference]:
    """Compare every method of a group with one of them, seed by seed; methods that share no seed are left out."""
    if reference not in group.records:
        return []
    sign = 1 if is_better_when_higher(group.metric) else -1
    reference_runs = group.records[reference]
    compared: list[Difference] = []
    for method, runs in group.records.items():
        if method == reference:
            continue
        # With one seed, all methods have the same clients and initial model, so that pairs vary less than runs do.
        gains: dict[str, list[float]] = {score: [] for score in SCORES}
        for seed in runs:
            if seed in reference_runs:
                numbers = numbers_of(runs[seed])
                reference_numbers = numbers_of(reference_runs[seed])
                for score, values in gains.items():
                    values.append(sign * (numbers[score] - reference_numbers[score]))
        if any(gains.values()):
            compared.append(Difference(method, _summaries(gains)))
    return compared


def _summaries(values_of_scores: Mapping[str, Sequence[float]]) -> dict[str, Summary]:
    return {score: summarize(values) for score, values in values_of_scores.items()}


def differences_over_groups(groups: Sequence[Group], reference: str) -> dict[str, list[Difference]]:
    """Compare methods over several groups: the mean of the groups' mean differences, with its standard error.

    Args:
        groups: The groups.
        reference: The method that the others are compared with.

    Returns:
        For each metric that several groups have, the methods that are in all of them.
    """
    by_metric: dict[str, list[Group]] = {}
    for group in groups:
        by_metric.setdefault(group.metric, []).append(group)
    over_groups: dict[str, list[Difference]] = {}
    for metric, members in by_metric.items():
        if len(members) < 2:
            continue
        means_of_methods: dict[str, dict[str, list[float]]] = {}
        for group in members:
            for difference in differences(group, reference):
                means = means_of_methods.setdefault(difference.method, {score: [] for score in SCORES})
                for score, values in means.items():
                    values.append(difference.scores[score].mean)
        for method, means in means_of_methods.items():
            if len(means["final"]) == len(members):
                over_groups.setdefault(metric, []).append(Difference(method, _summaries(means)))
    return over_groups
