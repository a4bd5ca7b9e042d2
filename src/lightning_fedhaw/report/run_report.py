"""The summary of a finished run, from what the federation counted and the callbacks logged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
        **record.learned,
        "learned": list(record.learned),
        **record.channel_numbers,
        "client_metrics": dict(record.client_metrics),
        "clients_measured_on": record.measured_on,
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "lost_messages": record.lost_messages,
        "nonfinite_updates": record.nonfinite_updates,
        "skipped_rounds": record.skipped_rounds,
        "skipped_steps": record.skipped_steps,
        **record.probe,
        "seconds": dict(record.seconds),
    }


def summary_metrics(metrics: Mapping[str, Tensor], internal: Collection[str]) -> dict[str, float]:
    """Select the metrics that belong in the run summary.

    Args:
        metrics: Everything that callbacks can see at the end of the run.
        internal: Names that the rule and the round log, whose last values alone say little.

    Returns:
        The other metrics, each once: where Lightning has a metric under its own name and under those with the suffixes
        ``_step`` and ``_epoch``, only its own name is used.
    """
    forks = set()
    for name in metrics:
        forks |= {f"{name}_step", f"{name}_epoch"}
    selected = {}
    for name, value in metrics.items():
        if name not in internal and name not in forks:
            selected[name] = float(value)
    return selected
