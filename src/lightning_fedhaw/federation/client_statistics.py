"""The statistics of metrics over clients: how well the global model serves all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from lightning_fedhaw.clients.evaluation import ClientMetrics
from lightning_fedhaw.federation.records import Tally
from lightning_fedhaw.notes import add_note
from lightning_fedhaw.options import FederationOptions

SPREAD = "/clients_"
"""What stands between a metric and a statistic over clients in the name of a number that a round logs."""

OF_CLIENTS = "/of_clients"
"""What follows a metric in the name of the table with each client's value."""

MOST_CLIENTS = 1000
"""Clients up to which values of each client are collected: a checkpoint grows with rounds times clients."""

# The shortest abbreviations count as whole words only: "ce" is a part of "performance" too.
_WORSE_WHEN_HIGHER = re.compile(
    r"loss|err|mse|mae|perplexity|ppl|nll|fid|entropy|distance|divergence"
    r"|(?:^|[_/])(?:ce|bce|wer|cer|kl|brier)(?:$|[_/])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Spread:
    """How metrics are spread over the clients after a round.

    Attributes:
        numbers: The statistics that the round logs, by their names.
        tables: The value of each client ``[N]`` by the name of the table; none with more than 1,000 clients.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)


def is_better_when_higher(metric: str) -> bool:
    """Return whether a higher value of a metric is better, by its name."""
    return _WORSE_WHEN_HIGHER.search(metric) is None


def client_statistics(metrics: ClientMetrics, validated: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compute the statistics of each metric over the clients where it is defined, and count the others.

    The worst decile is the value that a tenth of the clients does not reach: the 10th percentile where higher is
    better, the 90th where lower is. Where a metric does not say which, its name decides: losses and errors are better
    when lower. The best decile is the value that a tenth of the clients surpasses, and the gap is the distance
    from the worst client to the best.

    Args:
        metrics: The metrics of all clients, NaN where one is undefined.
        validated: What the last validation of the global model logged.

    Returns:
        For each metric ``validation`` (the metric of the global model on the validation data), ``mean``,
        ``weighted_mean``, ``std``, ``worst_decile``, ``best_decile`` and ``gap``, without those that have no value, and
        ``undefined``, the number of clients that are left out.
    """
    statistics = {}
    for name, values in metrics.values.items():
        is_defined = ~values.isnan()
        entries = {}
        if name in validated and not validated[name].isnan():
            entries["validation"] = float(validated[name])
        if is_defined.any():
            worst_quantile = 0.9
            if metrics.higher_is_better.get(name, is_better_when_higher(name)):
                worst_quantile = 0.1
            entries |= _statistics_of(values[is_defined], metrics.num_examples[is_defined], worst_quantile)
        entries["undefined"] = int((~is_defined).sum())
        statistics[name] = entries
    return statistics


def _statistics_of(values: Tensor, num_examples: Tensor, worst_quantile: float) -> dict[str, float]:
    """Compute the statistics of values ``[K]`` over clients with so many examples ``[K]``."""
    weights = num_examples.double() / num_examples.sum()
    statistics = {"mean": values.mean().item(), "weighted_mean": weights.dot(values.double()).item()}
    # The sample standard deviation, with n - 1, has no value for a single client.
    if len(values) > 1:
        statistics["std"] = values.std().item()
    statistics["worst_decile"] = values.quantile(worst_quantile).item()
    statistics["best_decile"] = values.quantile(1 - worst_quantile).item()
    statistics["gap"] = (values.max() - values.min()).item()
    return statistics


def extreme_clients(metrics: ClientMetrics) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Find the best client and the worst one by each metric.

    Args:
        metrics: The metrics of all clients, NaN where one is undefined.

    Returns:
        The best ones and the worst ones: by metric the number of the ``client`` and its ``value``, without metrics
        that no client has.
    """
    best: dict[str, dict[str, float]] = {}
    worst: dict[str, dict[str, float]] = {}
    for name, values in metrics.values.items():
        if values.isnan().all():
            continue
        lowest = int(values.nan_to_num(nan=inf).argmin())
        highest = int(values.nan_to_num(nan=-inf).argmax())
        ends = [worst, best]
        if not metrics.higher_is_better.get(name, is_better_when_higher(name)):
            ends = [best, worst]
        for end, client in zip(ends, (lowest, highest), strict=True):
            end[name] = {"client": client, "value": float(values[client])}
    return best, worst


def spread_of(metrics: ClientMetrics) -> dict[str, float]:
    """Return the statistics of each metric over clients as numbers that a round logs.

    Args:
        metrics: The metrics of all clients, NaN where one is undefined.

    Returns:
        Numbers with names such as ``val_acc/clients_worst_decile``. The count of clients where a metric is undefined is
        among them if it is not 0.

    Raises:
        ValueError: If there is no metric.
    """
    if not metrics.values:
        raise ValueError(
            "`client_eval_every_n_rounds` logs how metrics are spread over the clients, and the module has logged none"
            " on their data. Call `self.log` in `validation_step`, or leave the argument out."
        )
    numbers = {}
    for metric, statistics in client_statistics(metrics, {}).items():
        for name, value in statistics.items():
            if name != "undefined" or value > 0:
                numbers[f"{metric}{SPREAD}{name}"] = float(value)
    return numbers


def metrics_with_spread(names: Iterable[str]) -> list[str]:
    """List the metrics whose spread over the clients is among the names of what rounds have logged."""
    suffix = f"{SPREAD}mean"
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]


def values_of_clients(metrics: ClientMetrics) -> dict[str, Tensor]:
    """Return the tables with each client's value ``[N]`` that the history keeps; none with more than 1,000 clients."""
    tables: dict[str, Tensor] = {}
    if len(metrics.num_examples) <= MOST_CLIENTS:
        for metric, values in metrics.values.items():
            tables[f"{metric}{OF_CLIENTS}"] = values.float()
    return tables


def spread_in_round(
    options: FederationOptions, round_idx: int, tally: Tally, evaluate: Callable[[], ClientMetrics]
) -> Spread:
    """Evaluate the clients, if it is the turn of the round, and return how their metrics are spread.

    Args:
        options: The federation's arguments, which say how often.
        round_idx: The round's number.
        tally: Counts the time.
        evaluate: Evaluates all clients.

    Raises:
        ValueError: If the module has logged nothing.
    """
    interval = options.client_eval_every_n_rounds
    if interval is None or (round_idx + 1) % interval != 0:
        return Spread()
    try:
        with tally.phase("validation"):
            metrics = evaluate()
            return Spread(spread_of(metrics), values_of_clients(metrics))
    except Exception as error:  # the user's module runs, which may raise anything
        add_note(error, "The clients were being evaluated on their own data (`client_eval_every_n_rounds`).")
        raise
