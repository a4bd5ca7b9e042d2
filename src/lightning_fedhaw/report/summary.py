"""The run summary as a table of text, and its numbers under flat names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fedhaw.report.metric_names import in_unit, is_share, written

_INCIDENTS = (
    "lost_messages",
    "nonfinite_updates",
    "nonfinite_answers",
    "skipped_rounds",
    "skipped_steps",
    "skipped_probes",
)
STATISTICS = {
    "validation": "validation",
    "mean": "mean",
    "weighted_mean": "weighted",
    "std": "std",
    "worst_decile": "worst decile",
    "gap": "gap",
}
"""The statistics of a metric over clients in the table, with the heads of their columns. ``validation`` is none of
clients: it is the metric of the global model on the validation data, over all its samples at once."""


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary of a run as tables of text, for the terminal."""
    tables = [_table(("federation", ""), _federation_rows(summary))]
    if summary["client_metrics"]:
        tables.append(_client_table(summary))
        tables += _client_notes(summary)
    tables.append(_table(("phase", "seconds", "share"), _phase_rows(summary["seconds"])))
    return "\n".join(tables)


def _client_table(summary: Mapping[str, Any]) -> str:
    """Lay out the statistics over clients, without columns that are empty."""
    statistics = summary["client_metrics"]
    keys = []
    for key in STATISTICS:
        if any(key in entries for entries in statistics.values()):
            keys.append(key)
    rows = []
    for name, entries in statistics.items():
        # Deviations and gaps are in the unit of the values, of which these decide.
        is_percentage = is_share(name, [entries[key] for key in ("mean", "worst_decile") if key in entries])
        cells = []
        for key in keys:
            cells.append(in_unit(entries[key], is_percentage) if key in entries else "-")
        rows.append((name, *cells))
    samples, _, _ = summary["clients_measured_on"].partition(", ")
    head = f"over {summary['clients']} clients, their {samples}"
    if summary["local_parameters"]:
        head += " and local parameters"
    return _table((head, *(STATISTICS[key] for key in keys)), rows)


def _client_notes(summary: Mapping[str, Any]) -> list[str]:
    """Say which clients are best and worst, how their samples were read, and where a metric is undefined."""
    notes = []
    for name, best in summary["best_client"].items():
        worst = summary["worst_client"][name]
        if best["client"] != worst["client"]:
            notes.append(
                f" {name}: best client {best['client']} ({written(name, best['value'])}), worst client"
                f" {worst['client']} ({written(name, worst['value'])})"
            )
    _, _, reading = summary["clients_measured_on"].partition(", ")
    if reading:
        notes.append(f" measured {reading}")
    for name, entries in summary["client_metrics"].items():
        if entries["undefined"]:
            notes.append(f" {name}: {entries['undefined']} of {summary['clients']} clients undefined")
    return notes


def _federation_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the settings, the costs and the results of the run."""
    rows = [("rule", str(summary["rule"]))]
    for name in ("channels", "objectives"):
        if summary[name]:
            rows.append((name, ", ".join(summary[name])))
    rows += [
        ("rounds", str(summary["rounds"])),
        ("clients", f"{summary['clients']}, {summary['clients_per_round']:.4g} received a round"),
        *_setting_rows(summary["run"]),
        ("parameters", f"{summary['parameters']:,}"),
        *_local_row(summary["local_parameters"]),
        ("sent down / up", f"{_bytes(summary['bytes_down'])} / {_bytes(summary['bytes_up'])}"),
    ]
    if "probe_answers" in summary:
        rows.append(("probe", _probe_words(summary)))
    if "answers" in summary:
        count = summary["second_derivatives"]
        rows.append(("inquiries", f"{summary['answers']} answers, {count} products with second derivatives"))
    incidents = []
    for name in _INCIDENTS:
        if summary.get(name):
            incidents.append(f"{summary[name]} {name.replace('_', ' ')}")
    if incidents:
        rows.append(("incidents", ", ".join(incidents)))
    if "epsilon" in summary:
        rows.append(("privacy of a client", f"epsilon {summary['epsilon']:.3g} at delta {summary['delta']:.3g}"))
    for name in summary["learned"]:
        rows.append((name.replace("_", " "), f"{summary[name]:.4g}"))
    for name, value in summary["metrics"].items():
        text = written(name, value)
        best = summary["best"].get(name)
        if best is not None:
            text += f" (best {written(name, best['value'])}, round {best['round']})"
        rows.append((name, text))
    rows += _file_rows(summary["run"])
    return rows


def _setting_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List how the data was split and how clients trained."""
    if not run:
        return []
    return [
        ("split", f"{run['split']}, seed {run['seed']}"),
        ("local training", run["training"]),
    ]


def _file_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what the run took, and where its files are."""
    if not run:
        return []
    rows = [("wall time", f"{run['wall_seconds']:.3g} s, {run['rounds_per_second']:.3g} rounds a second")]
    if run["peak_memory_bytes"]:
        rows.append(("peak memory", _bytes(run["peak_memory_bytes"])))
    for name in ("log", "checkpoint", "pictures"):
        if run[name]:
            rows.append((name, run[name]))
    return rows


def _probe_words(summary: Mapping[str, Any]) -> str:
    """Say how many clients have answered a rule's probe, and whether it took communication rounds of its own."""
    words = f"{summary['probe_answers']} answers"
    if summary["probe_rounds"]:
        words += f", in {summary['probe_rounds']} further communication rounds"
    return words


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
