"""The start-up line of a federation and its run summary, from the objects that hold their numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.federation.client_evaluation import measured_on
from lightning_fedhaw.federation.client_statistics import client_statistics
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.records import INQUIRY_COUNTS, PROBE_COUNTS
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions, repr_settings
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.run_report import RunRecord, summary_metrics, summary_of


def start_up_line(federation: Federation, callbacks: Iterable[Callback], assumed: Sequence[str], round_idx: int) -> str:
    """Describe in one line what will run, and what is assumed because no argument says it.

    Args:
        federation: The federation.
        callbacks: The trainer's callbacks, of which channels and objectives are described.
        assumed: The assumptions about the split of the data.
        round_idx: The number of the first round that will run.
    """
    data = federation.data
    layout = federation.layout
    cohort_size = len(federation.cohort(round_idx))
    settings = [federation.rule.describe()]
    for callback in callbacks:
        if isinstance(callback, (Channel, ClientObjective)):
            settings.append(repr_settings(callback))
    line = (
        f"Federation: {', '.join(settings)}, {data.num_clients} clients with {_range(data.num_examples)} samples,"
        f" {cohort_size} a round, batch size {data.settings.batch_size}, {layout.numel:,} parameters,"
        f" {_traffic(federation, cohort_size)} a round"
    )
    if layout.local:
        # Said at the start, because whoever validates the global model would not expect it.
        line += (
            f", local are {', '.join(layout.local[:5])}{' ...' if len(layout.local) > 5 else ''}: each client has its"
            " own, and the global model (validation, checkpoints) keeps their initial values"
        )
    if federation.rule.keeps_cohort:
        megabytes = cohort_size * layout.numel * layout.dtype.itemsize / 1e6
        line += f", a checkpoint holds {megabytes:.3g} MB of client vectors"
    if federation.ranks.size > 1:
        line += f", {federation.ranks.size} processes"
    assumptions = [*assumed, *_assumptions(federation.options)]
    if assumptions:
        line += f". Assumed: {'; '.join(assumptions)}"
    return f"{line}."


def _traffic(federation: Federation, cohort_size: int) -> str:
    """Describe how much is sent in a round: one message down and one up for each client that takes part."""
    down = cohort_size * federation.transport.message_bytes("downlink") / 1e6
    up = cohort_size * federation.transport.message_bytes("uplink") / 1e6
    if down == up:
        return f"{down:.3g} MB each way"
    return f"{down:.3g} MB down and {up:.3g} MB up"


def _assumptions(options: FederationOptions) -> list[str]:
    """List what is assumed of a round because no argument says it."""
    assumptions = []
    if options.clients_per_round is None and options.sampler is None:
        assumptions.append("all clients participate")
    if options.local_epochs is None and options.local_steps is None:
        assumptions.append("one local epoch")
    return assumptions


def evaluate_clients(
    federation: Federation, history: RunHistory, validated: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Evaluate the final global model on each client's own data.

    Args:
        federation: The federation.
        history: Receives each client's numbers.
        validated: What the last validation of the global model logged; empty if there was none.

    Returns:
        Each metric's statistics over clients; empty if the evaluation failed, of which a warning says why.
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
        return {}
    return statistics


def run_summary(
    federation: Federation,
    rounds: int,
    metrics: Mapping[str, Tensor],
    rule_metrics: Collection[str],
    client_metrics: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return the summary of a run as plain values.

    Args:
        federation: The federation.
        rounds: Rounds that were run.
        metrics: Everything that callbacks can see at the end of the run.
        rule_metrics: Names of the rule's and the round's own numbers among them.
        client_metrics: The statistics over clients that :func:`evaluate_clients` returned.
    """
    rule = federation.rule
    tally = federation.tally
    channels = (*federation.uplink, *federation.downlink)
    channel_numbers: dict[str, float] = {}
    for channel in channels:
        channel_numbers.update(channel.summary())
    learned = {}
    for name in rule.summary_metrics:
        # Missing if no round was aggregated.
        if name in metrics:
            learned[name] = float(metrics[name])
    learned.update(rule.summary())
    probe = {}
    if rule.probe is not None:
        probe = {name: getattr(tally, name) for name in PROBE_COUNTS}
    if tally.answers:
        probe.update({name: getattr(tally, name) for name in INQUIRY_COUNTS})
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
        learned=learned,
        channel_numbers=channel_numbers,
        client_metrics=client_metrics,
        measured_on=measured_on(federation.data, federation.host.validation.collate_fn),
        bytes_down=tally.bytes_down,
        bytes_up=tally.bytes_up,
        lost_messages=tally.lost_messages,
        nonfinite_updates=tally.nonfinite_updates,
        skipped_rounds=tally.skipped_rounds,
        skipped_steps=tally.skipped_steps,
        seconds=tally.seconds,
        probe=probe,
    )
    return summary_of(record)


def _range(sizes: Tensor) -> str:
    """Format the smallest and the largest of some sizes ``[N]``."""
    smallest = int(sizes.min())
    largest = int(sizes.max())
    if smallest == largest:
        return f"{smallest}"
    return f"{smallest} to {largest}"
