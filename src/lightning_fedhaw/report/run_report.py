"""The summary of a finished run, from what the federation counted and the callbacks logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from lightning_fedhaw.federation.client_statistics import is_better_when_higher
from lightning_fedhaw.report.history import RunHistory


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The settings, the costs and the results of a run.

    Attributes:
        rule: Name of the aggregation rule.
        channels: Names of the channels, with their links.
        objectives: Names of the client objectives.
        rounds: Rounds that were run.
        num_clients: N, all clients of the federation.
        num_received: Client updates that the server received, over all rounds.
        num_parameters: Trainable parameters that are exchanged.
        local_parameters: Names of the parameters that stay with the clients.
        metrics: The last value of each metric that was logged.
        learned: The values that the rule learned, by name.
        channel_numbers: The numbers that channels report of the run, such as a privacy bound.
        client_metrics: For each metric of the final model on the clients' own data the statistics over clients. Empty
            if the clients were not evaluated.
        measured_on: The data that clients are evaluated on, and how it is read.
        bytes_down: Bytes that were sent to clients.
        bytes_up: Bytes that clients sent.
        lost_messages: Messages that were lost, on either link.
        nonfinite_updates: Updates that were left out because they held NaN or infinity.
        skipped_rounds: Rounds without any client update.
        skipped_steps: Local steps that did not step the optimizer.
        seconds: Seconds in each phase of a round.
        probe: What the rule's probe has counted, by name; empty for a rule without one.
        best: For each metric its best value and the number of its round, from 1.
        best_client: For each metric of the clients the number of the best client, and its value.
        worst_client: Likewise of the worst one.
        run: The settings of the run, its time and memory, and the paths of what it wrote.
    """

    rule: str
    channels: Sequence[str]
    objectives: Sequence[str]
    rounds: int
    num_clients: int
    num_received: int
    num_parameters: int
    local_parameters: Sequence[str] = ()
    metrics: Mapping[str, float]
    learned: Mapping[str, float]
    channel_numbers: Mapping[str, float]
    client_metrics: Mapping[str, Mapping[str, float]]
    measured_on: str
    bytes_down: int
    bytes_up: int
    lost_messages: int
    nonfinite_updates: int
    skipped_rounds: int
    skipped_steps: int
    seconds: Mapping[str, float]
    probe: Mapping[str, int] = field(default_factory=dict)
    best: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    best_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    run: Mapping[str, object] = field(default_factory=dict)


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Convert a record to the dictionary that ``trainer.federation_summary`` shows.

    Returns:
        Plain values and mappings. The numbers of the rule and of the channels are entries of their own, and the names
        of the rule's are listed under ``"learned"``.
    """
    return {
        "rule": record.rule,
        "channels": list(record.channels),
        "objectives": list(record.objectives),
        "rounds": record.rounds,
        "clients": record.num_clients,
        # Without a division by zero where no round was run.
        "clients_per_round": record.num_received / max(record.rounds, 1),
        "parameters": record.num_parameters,
        "local_parameters": list(record.local_parameters),
        "metrics": dict(record.metrics),
        "best": dict(record.best),
        **record.learned,
        "learned": list(record.learned),
        **record.channel_numbers,
        "client_metrics": dict(record.client_metrics),
        "best_client": dict(record.best_client),
        "worst_client": dict(record.worst_client),
        "clients_measured_on": record.measured_on,
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "lost_messages": record.lost_messages,
        "nonfinite_updates": record.nonfinite_updates,
        "skipped_rounds": record.skipped_rounds,
        "skipped_steps": record.skipped_steps,
        **record.probe,
        "seconds": dict(record.seconds),
        "run": dict(record.run),
    }


def best_values(history: RunHistory, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Find the best value of some metrics over the rounds of a run; whether higher is better says the name.

    Args:
        history: The history of the run.
        names: The metrics.

    Returns:
        By metric its ``value`` and the number of the ``round``, from 1, without metrics that no round has.
    """
    best: dict[str, dict[str, float]] = {}
    for name in names:
        is_higher_better = is_better_when_higher(name)
        for number, value in enumerate(history.curve(name), 1):
            if isnan(value):
                continue
            earlier = best.get(name, {"value": value, "round": number})
            is_better = value > earlier["value"] if is_higher_better else value < earlier["value"]
            best[name] = {"value": value, "round": number} if is_better else earlier
    return best
