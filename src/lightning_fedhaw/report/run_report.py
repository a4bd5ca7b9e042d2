"""The summary of a finished run, from what the federation counted and the callbacks logged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run was, what it cost and what came out.

    Attributes:
        rule: Name of the aggregation rule.
        channels: Names of the channels, with their links.
        objectives: Names of the client objectives.
        rounds: Rounds that were run.
        num_clients: Clients that exist.
        num_received: Client updates that the server received, over all rounds.
        num_parameters: Trainable parameters that are exchanged.
        local_parameters: Names of the parameters that stay with the clients.
        metrics: The last value of each metric that was logged.
        learned: What the rule learned, by name.
        channel_numbers: What the channels have to say about the run, such as a privacy bound.
        client_metrics: For each metric of the final model on the clients' own data: mean, standard deviation and worst
            decile over clients. Empty if the clients were not evaluated.
        has_held_out_data: Whether the clients were evaluated on data held out of training.
        bytes_down: Bytes that were sent to clients.
        bytes_up: Bytes that clients sent.
        lost_messages: Messages that did not arrive.
        nonfinite_updates: Updates that were left out because they held NaN or infinity.
        skipped_rounds: Rounds without any client update.
        skipped_steps: Local steps that did not step the optimizer.
        seconds: Seconds in each phase of a round.
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
    learned: Mapping[str, Any]
    channel_numbers: Mapping[str, Any]
    client_metrics: Mapping[str, Mapping[str, float]]
    has_held_out_data: bool
    bytes_down: int
    bytes_up: int
    lost_messages: int
    nonfinite_updates: int
    skipped_rounds: int
    skipped_steps: int
    seconds: Mapping[str, float]


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Put a record into the form that ``trainer.federation_summary`` shows.

    Returns:
        Plain values and mappings. What the rule learned and what the channels say stands among the other entries, and
        the names of the former are listed under ``"learned"``.
    """
    return {
        "rule": record.rule,
        "channels": list(record.channels),
        "objectives": list(record.objectives),
        "rounds": record.rounds,
        "clients": record.num_clients,
        # A run of no rounds has no average.
        "clients_per_round": record.num_received / max(record.rounds, 1),
        "parameters": record.num_parameters,
        "local_parameters": list(record.local_parameters),
        "metrics": dict(record.metrics),
        **record.learned,
        "learned": list(record.learned),
        **record.channel_numbers,
        "client_metrics": dict(record.client_metrics),
        "clients_measured_on": "held-out data" if record.has_held_out_data else "training data",
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "lost_messages": record.lost_messages,
        "nonfinite_updates": record.nonfinite_updates,
        "skipped_rounds": record.skipped_rounds,
        "skipped_steps": record.skipped_steps,
        "seconds": dict(record.seconds),
    }


def summary_metrics(metrics: Mapping[str, Tensor], internal: Collection[str]) -> dict[str, float]:
    """Choose the metrics that belong in the run summary.

    Args:
        metrics: Everything that callbacks can see at the end of the run.
        internal: Names that the rule logs every round, which are of no use without their course.

    Returns:
        The others, each once: where Lightning has a metric under its name and under those of its forks for steps and
        epochs, the name alone is kept.
    """
    forks = {f"{name}{suffix}" for name in metrics for suffix in ("_step", "_epoch")}
    chosen = {}
    for name, value in metrics.items():
        if name not in internal and name not in forks:
            chosen[name] = float(value)
    return chosen
