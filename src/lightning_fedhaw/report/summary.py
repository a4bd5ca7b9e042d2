"""The table that a run ends with, and its numbers under flat names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_INCIDENTS = ("lost_messages", "nonfinite_updates", "skipped_rounds", "skipped_steps")
_STATISTICS = ("mean", "std", "worst_decile")

_WORSE_WHEN_HIGHER = re.compile(
    r"loss|err|mse|mae|perplexity|ppl|nll|fid|entropy|distance|divergence"
    r"|(?:^|[_/])(?:ce|bce|wer|cer|kl|brier)(?:$|[_/])",
    re.IGNORECASE,
)


def client_statistics(
    values: Mapping[str, Tensor], higher_is_better: Mapping[str, bool]
) -> dict[str, dict[str, float]]:
    """Compute mean, standard deviation and worst decile over clients.

    The worst decile is the value that a tenth of the clients does not reach: the 10th percentile where higher is
    better, the 90th where lower is. Where a metric does not say which, its name decides: losses and errors are better
    when lower.

    Args:
        values: ``[N]`` per metric.
        higher_is_better: What torchmetrics objects say of themselves.
    """
    statistics = {}
    for name, value in values.items():
        is_better_when_higher = higher_is_better.get(name, _WORSE_WHEN_HIGHER.search(name) is None)
        statistics[name] = {
            "mean": value.mean().item(),
            "std": value.std(unbiased=False).item(),
            "worst_decile": value.quantile(0.1 if is_better_when_higher else 0.9).item(),
        }
    return statistics


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary of a run as text."""
    tables = [_table(("federation", ""), _federation_rows(summary))]
    if summary["client_metrics"]:
        head = f"over {summary['clients']} clients, their {summary['clients_measured_on']}"
        if summary["local_parameters"]:
            head += " and local parameters"
        rows = []
        for name, statistics in summary["client_metrics"].items():
            rows.append((name, *(f"{statistics[key]:.4g}" for key in _STATISTICS)))
        tables.append(_table((head, "mean", "std", "worst decile"), rows))
    tables.append(_table(("phase", "seconds", "share"), _phase_rows(summary["seconds"])))
    return "\n".join(tables)


def _federation_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what the run was, what it cost, and what came out."""
    rows = [("rule", str(summary["rule"]))]
    for name in ("channels", "objectives"):
        if summary[name]:
            rows.append((name, ", ".join(summary[name])))
    rows += [
        ("rounds", str(summary["rounds"])),
        ("clients", f"{summary['clients']}, {summary['clients_per_round']:.4g} received a round"),
        ("parameters", f"{summary['parameters']:,}"),
        *_local_row(summary["local_parameters"]),
        ("sent down / up", f"{_bytes(summary['bytes_down'])} / {_bytes(summary['bytes_up'])}"),
    ]
    incidents = [f"{summary[name]} {name.replace('_', ' ')}" for name in _INCIDENTS if summary[name]]
    if incidents:
        rows.append(("incidents", ", ".join(incidents)))
    if "epsilon" in summary:
        rows.append(("privacy of a client", f"epsilon {summary['epsilon']:.3g} at delta {summary['delta']:.3g}"))
    for name in summary["learned"]:
        rows.append((name.replace("_", " "), f"{summary[name]:.4g}"))
    for name, value in summary["metrics"].items():
        rows.append((name, f"{value:.4g}"))
    return rows


def _local_row(names: Sequence[str]) -> list[tuple[str, str]]:
    """Say what the global model has in the place of the parameters that stay with the clients."""
    if not names:
        return []
    shown = ", ".join(names[:2])
    if len(names) > 2:
        shown += ", ..."
    return [("local parameters", f"{shown} (initial in the global model)")]


def _phase_rows(seconds: Mapping[str, float]) -> list[tuple[str, str, str]]:
    # Phases that took no time at all have no share of it either.
    total = sum(seconds.values()) or 1.0
    return [(name, f"{value:.2f}", f"{value / total:.0%}") for name, value in seconds.items()]


def flat_numbers(summary: Mapping[str, Any], prefix: str = "summary") -> dict[str, float]:
    """Give a summary's numbers flat names, for loggers."""
    flat: dict[str, float] = {}
    for name, value in summary.items():
        key = f"{prefix}/{name.replace(' ', '_')}"
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[key] = float(value)
    return flat


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = []
    for column in zip(head, *rows, strict=True):
        widths.append(max(map(len, column)))
    rule = "─" * (sum(widths) + 2 * len(widths))
    lines = [rule, _line(head, widths), rule]
    for row in rows:
        lines.append(_line(row, widths))
    lines.append(rule)
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align the first cell left and the others, which are numbers, right."""
    line = f" {cells[0]:<{widths[0]}}"
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        line += f"  {cell:>{width}}"
    return line.rstrip()
