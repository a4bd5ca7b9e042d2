"""What is said of a federation before its first round and after its last: the start-up line and the run summary."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.run_report import RunRecord, summary_metrics, summary_of
from lightning_fedhaw.report.summary import client_statistics


def start_up_line(federation: Federation, callbacks: Iterable[Any], assumed: Sequence[str], round_idx: int) -> str:
    """What will happen, and what was assumed because nobody said it.

    Args:
        federation: The federation.
        callbacks: The trainer's, of which channels and objectives are named.
        assumed: What was assumed of the data.
        round_idx: The first round to be played.
    """
    options, data, layout = federation.options, federation.data, federation.layout
    cohort = len(federation.cohort(round_idx))
    assumptions = list(assumed)
    if options.clients_per_round is None and options.sampler is None:
        assumptions.append("everyone takes part")
    if options.local_epochs is None and options.local_steps is None:
        assumptions.append("one local epoch")
    down, up = (cohort * federation.message_bytes(link) / 1e6 for link in ("downlink", "uplink"))
    traffic = f"{down:.3g} MB each way" if down == up else f"{down:.3g} MB down and {up:.3g} MB up"
    named = [federation.rule.describe()]
    named += [repr_settings(callback) for callback in callbacks if isinstance(callback, (Channel, ClientObjective))]
    line = (
        f"Federation: {', '.join(named)}, {data.num_clients} clients with {_range(data.num_examples)} samples,"
        f" {cohort} a round, batch size {data.settings.batch_size}, {layout.numel:,} parameters, {traffic} a round"
    )
    if layout.local:
        line += (
            f", local are {', '.join(layout.local[:5])}{' ...' if len(layout.local) > 5 else ''}: each client has its"
            " own, and the global model (validation, checkpoints) keeps their initial values"
        )
    if federation.rule.keeps_cohort:
        kept = cohort * layout.numel * layout.dtype.itemsize
        line += f", a checkpoint holds {kept / 1e6:.3g} MB of client vectors"
    if federation.ranks.size > 1:
        line += f", {federation.ranks.size} processes"
    if assumptions:
        line += f". Assumed: {'; '.join(assumptions)}"
    return f"{line}."


def evaluate_clients(federation: Federation, history: RunHistory) -> dict[str, dict[str, float]]:
    """Evaluate the final global model on each client's own data.

    Args:
        federation: The federation.
        history: Keeps each client's numbers.

    Returns:
        Each metric's statistics over clients; empty if the evaluation failed.
    """
    try:
        values, better = federation.evaluate_clients()
        statistics = client_statistics(values, better)
        history.clients = {name: each.tolist() for name, each in values.items()}
    except Exception as error:
        # The run is over and its model is good; a table without client metrics is better than none.
        rank_zero_warn(
            f"The clients could not be evaluated on their own data ({type(error).__name__}: {error}), so the"
            " run summary has no client metrics. `client_eval=False` skips this."
        )
        return {}
    return statistics


def run_summary(
    federation: Federation,
    rounds: int,
    metrics: Mapping[str, Tensor],
    rule_metrics: Collection[str],
    client_metrics: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The summary of a run as plain values.

    Args:
        federation: The federation.
        rounds: Rounds that were played.
        metrics: What callbacks can see at the end.
        rule_metrics: Names of the rule's and the round's own numbers among them.
        client_metrics: What :func:`evaluate_clients` found.
    """
    rule = federation.rule
    tally = federation.tally
    channels = (*federation.uplink, *federation.downlink)
    channel_numbers: dict[str, Any] = {}
    for channel in channels:
        channel_numbers.update(channel.summary())
    learned = {name: float(metrics[name]) for name in rule.summary_metrics if name in metrics}
    record = RunRecord(
        rule=type(rule).__name__,
        channels=[f"{type(channel).__name__} ({channel.link})" for channel in channels],
        objectives=[type(objective).__name__ for objective in federation.engine.objectives],
        rounds=rounds,
        num_clients=federation.data.num_clients,
        num_received=tally.received,
        num_parameters=federation.layout.numel,
        local_parameters=federation.layout.local,
        metrics=summary_metrics(metrics, rule_metrics),
        learned={**learned, **rule.summary()},
        channel_numbers=channel_numbers,
        client_metrics=client_metrics,
        has_held_out_data=bool(federation.options.client_val_fraction),
        bytes_down=tally.bytes_down,
        bytes_up=tally.bytes_up,
        lost_messages=tally.lost_messages,
        nonfinite_updates=tally.nonfinite_updates,
        skipped_rounds=tally.skipped_rounds,
        skipped_steps=tally.skipped_steps,
        seconds=tally.seconds,
    )
    return summary_of(record)


def _range(sizes: Tensor) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low}" if low == high else f"{low} to {high}"
