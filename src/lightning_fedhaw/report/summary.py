"""The run summary as a table of text, and its numbers under flat names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_INCIDENTS = ("lost_messages", "nonfinite_updates", "skipped_rounds", "skipped_steps")
_STATISTICS = ("mean", "std", "worst_decile")

# The shortest abbreviations count as whole words only: "ce" is a part of "performance" too.
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
        higher_is_better: Whether higher is better, for the metrics whose torchmetrics object declares it.

    Returns:
        For each metric the entries ``mean``, ``std`` and ``worst_decile``.
    """
    statistics = {}
    for name, value in values.items():
        worst_quantile = 0.9
        if higher_is_better.get(name, _WORSE_WHEN_HIGHER.search(name) is None):
            worst_quantile = 0.1
        statistics[name] = {
            "mean": value.mean().item(),
            # All clients are measured, and not a sample of them.
            "std": value.std(unbiased=False).item(),
            "worst_decile": value.quantile(worst_quantile).item(),
        }
    return statistics


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary of a run as tables of text, for the terminal."""
    tables = [_table(("federation", ""), _federation_rows(summary))]
    if summary["client_metrics"]:
        head = f"over {summary['clients']} clients, their {summary['clients_measured_on']}"
        if summary["local_parameters"]:
            head += " and local parameters"
        rows = []
        for name, statistics in summary["client_metrics"].items():
            cells = [f"{statistics[key]:.4g}" for key in _STATISTICS]
            rows.append((name, *cells))
        tables.append(_table((head, "mean", "std", "worst decile"), rows))
    tables.append(_table(("phase", "seconds", "share"), _phase_rows(summary["seconds"])))
    return "\n".join(tables)


def _federation_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the settings, the costs and the results of the run."""
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
    # Where nothing was measured all shares are 0, without a division by zero.
    total = sum(seconds.values()) or 1.0
    rows = []
    for name, value in seconds.items():
        rows.append((name, f"{value:.2f}", f"{value / total:.0%}"))
    return rows


def flat_numbers(summary: Mapping[str, Any], prefix: str = "summary") -> dict[str, float]:
    """Return the numbers of a summary under flat names, for loggers; entries that are no numbers are left out.

    Args:
        summary: A summary, or a part of one.
        prefix: The beginning of the names, before a slash.
    """
    flat: dict[str, float] = {}
    for name, value in summary.items():
        key = f"{prefix}/{name.replace(' ', '_')}"
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, key)
        # A boolean is an integer in Python, but no number to plot.
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[key] = float(value)
    return flat


def _bytes(count: float) -> str:
    """Format a number of bytes in decimal units, as networks are measured."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a head and rows of cells in columns, between horizontal rules."""
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
