"""The run summary of a federation, from the objects that hold its numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.evaluation import measured_on
from lightning_fedhaw.federation.client_statistics import client_statistics, extreme_clients
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import INQUIRY_COUNTS, PROBE_COUNTS, Tally
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.metric_names import names_of_results
from lightning_fedhaw.report.run_report import RunRecord, best_values, summary_of
from lightning_fedhaw.report.settings_in_words import local_work_in_words, optimizers_in_words
from lightning_fedhaw.rule import Rule

OfClients = Mapping[str, Mapping[str, float]]
"""Numbers of a metric over the clients, by metric and by name."""


@dataclass(frozen=True)
class EvaluatedClients:
    """What the evaluation of the final model on each client's own data gave; empty if there was none.

    Attributes:
        statistics: Each metric's statistics over clients.
        best: For each metric the number of the best client, and its value.
        worst: Likewise of the worst one.
    """

    statistics: OfClients = field(default_factory=dict)
    best: OfClients = field(default_factory=dict)
    worst: OfClients = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """What only the trainer knows of a run.

    Attributes:
        rounds: Rounds that are over, with those before a checkpoint.
        rounds_of_fit: Rounds that this ``fit`` ran.
        wall_seconds: Seconds that it took, with validation and everything else.
        peak_memory_bytes: Most bytes in use: on a GPU those of its tensors, on the CPU those of the process; 0 where
            that is not known.
        split: How the training data is split, with the settings of the scheme.
        log: The folder of the log; empty if there is none.
        checkpoint: The best checkpoint, else the last one; empty if there is none.
        pictures: The command that draws the run; empty if nothing was written.
    """

    rounds: int
    rounds_of_fit: int
    wall_seconds: float
    peak_memory_bytes: int
    split: str
    log: str
    checkpoint: str
    pictures: str


def evaluate_clients(federation: Federation, history: RunHistory, validated: Mapping[str, Tensor]) -> EvaluatedClients:
    """Evaluate the final global model on each client's own data.

    Args:
        federation: The federation.
        history: Receives each client's numbers.
        validated: What the last validation of the global model logged; empty if there was none.

    Returns:
        The numbers; empty if the evaluation failed, of which a warning says why.
    """
    try:
        metrics = federation.evaluate_clients()
        statistics = client_statistics(metrics, validated)
        history.clients = {}
        for name, values in metrics.values.items():
            if not values.isnan().all():
                history.clients[name] = values.tolist()
    except Exception as error:
        # The run is over and its model is good, and the module's steps, which are the user's, may fail in any way on
        # a client's data: a summary without client metrics is better than none.
        rank_zero_warn(
            f"The clients could not be evaluated on their own data ({type(error).__name__}: {error}), so the"
            " run summary has no client metrics. `client_eval=False` skips this."
        )
        return EvaluatedClients()
    return EvaluatedClients(statistics, *extreme_clients(metrics))


def run_summary(
    federation: Federation,
    facts: RunFacts,
    metrics: Mapping[str, Tensor],
    rule_metrics: Collection[str],
    callbacks: Iterable[Callback],
    history: RunHistory,
    clients: EvaluatedClients,
) -> dict[str, Any]:
    """Return the summary of a run as plain values.

    Args:
        federation: The federation.
        facts: What the trainer knows of the run.
        metrics: Everything that callbacks can see at the end of the run.
        rule_metrics: Names of the rule's and the round's own numbers among them.
        callbacks: The trainer's callbacks.
        history: The history of the run.
        clients: What the evaluation of the clients gave.
    """
    rule = federation.rule
    tally = federation.tally
    channels = (*federation.uplink, *federation.downlink)
    results = {name: float(metrics[name]) for name in names_of_results(metrics, rule_metrics, callbacks)}
    record = RunRecord(
        rule=type(rule).__name__,
        channels=[f"{type(channel).__name__} ({channel.link})" for channel in channels],
        objectives=[type(objective).__name__ for objective in federation.engine.objectives],
        rounds=facts.rounds,
        num_clients=federation.data.num_clients,
        num_received=tally.received,
        num_parameters=federation.layout.numel,
        local_parameters=federation.layout.local,
        metrics=results,
        learned=_learned_numbers(rule, metrics),
        channel_numbers=_channel_numbers(channels),
        client_metrics=clients.statistics,
        measured_on=measured_on(federation.data, federation.host.validation.collate_fn),
        bytes_down=tally.bytes_down,
        bytes_up=tally.bytes_up,
        lost_messages=tally.lost_messages,
        nonfinite_updates=tally.nonfinite_updates,
        skipped_rounds=tally.skipped_rounds,
        skipped_steps=tally.skipped_steps,
        seconds=tally.seconds,
        probe=_counts_of_questions(rule, tally),
        best=best_values(history, results),
        best_client=clients.best,
        worst_client=clients.worst,
        run=_run_entries(federation, facts),
    )
    return summary_of(record)


def _learned_numbers(rule: Rule, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the numbers in which a rule says what it has learned."""
    learned: dict[str, float] = {}
    for name in rule.summary_metrics:
        # Missing if no round was aggregated.
        if name in metrics:
            learned[name] = float(metrics[name])
    learned.update(rule.summary())
    return learned


def _channel_numbers(channels: Iterable[Channel]) -> dict[str, float]:
    """Return the numbers of all channels."""
    numbers: dict[str, float] = {}
    for channel in channels:
        numbers.update(channel.summary())
    return numbers


def _counts_of_questions(rule: Rule, tally: Tally) -> dict[str, int]:
    """Return how often clients were asked for more than updates, by probes and inquiries; empty if they were not."""
    counts: dict[str, int] = {}
    if rule.probe is not None:
        counts.update({name: getattr(tally, name) for name in PROBE_COUNTS})
    if tally.answers:
        counts.update({name: getattr(tally, name) for name in INQUIRY_COUNTS})
    return counts


def _run_entries(federation: Federation, facts: RunFacts) -> dict[str, object]:
    """Return the settings of the run, its time and memory, and its paths."""
    rounds_per_second = 0.0
    if facts.wall_seconds > 0:
        rounds_per_second = facts.rounds_of_fit / facts.wall_seconds
    return {
        "seed": federation.options.resolved_seed,
        "split": facts.split,
        "local_work": local_work_in_words(federation.options),
        "optimizer": optimizers_in_words(federation.host.optimizers),
        "wall_seconds": facts.wall_seconds,
        "rounds_per_second": rounds_per_second,
        "peak_memory_bytes": facts.peak_memory_bytes,
        "log": facts.log,
        "checkpoint": facts.checkpoint,
        "pictures": facts.pictures,
    }
