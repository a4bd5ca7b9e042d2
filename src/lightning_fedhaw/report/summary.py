"""The table that closes every run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_WORSE_WHEN_HIGHER = re.compile(
    r"loss|err|mse|mae|perplexity|ppl|nll|fid|entropy|distance|divergence"
    r"|(?:^|[_/])(?:ce|bce|wer|cer|kl|brier)(?:$|[_/])",
    re.IGNORECASE,
)


def client_statistics(
    values: Mapping[str, Tensor], higher_is_better: Mapping[str, bool]
) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst decile over clients.

    The worst decile is the value that a tenth of the clients does not reach: the 10th percentile where higher is
    better, the 90th where lower is. Where a metric does not say which, its name decides: losses and errors are better
    when lower.

    Args:
        values: ``[N]`` per metric.
        higher_is_better: What torchmetrics objects say of themselves.
    """
    statistics = {}
    for name, each in values.items():
        better = higher_is_better.get(name, _WORSE_WHEN_HIGHER.search(name) is None)
        statistics[name] = {
            "mean": each.mean().item(),
            "std": each.std(unbiased=False).item(),
            "worst_decile": each.quantile(0.1 if better else 0.9).item(),
        }
    return statistics


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary of a run as text."""
    rows: list[tuple[str, str]] = [
        ("rule", str(summary["rule"])),
        *((name, ", ".join(summary[name])) for name in ("channels", "objectives") if summary[name]),
        ("rounds", str(summary["rounds"])),
        ("clients", f"{summary['clients']}, {summary['clients_per_round']:.4g} heard a round"),
        ("parameters", f"{summary['parameters']:,}"),
        ("sent down / up", f"{_bytes(summary['bytes_down'])} / {_bytes(summary['bytes_up'])}"),
    ]
    troubles = ("lost_messages", "nonfinite_updates", "skipped_rounds", "skipped_steps")
    if told := ", ".join(f"{summary[t]} {t.replace('_', ' ')}" for t in troubles if summary[t]):
        rows.append(("troubles", told))
    if "epsilon" in summary:
        rows.append(("privacy of a client", f"epsilon {summary['epsilon']:.3g} at delta {summary['delta']:.3g}"))
    rows += [(name.replace("_", " "), f"{summary[name]:.4g}") for name in summary["learned"]]
    rows += [(name, f"{value:.4g}") for name, value in summary["metrics"].items()]
    blocks = [_table(("federation", ""), rows)]
    if summary["client_metrics"]:
        blocks.append(
            _table(
                (
                    f"over {summary['clients']} clients, their {summary['clients_measured_on']}",
                    "mean",
                    "std",
                    "worst decile",
                ),
                [
                    (name, *(f"{s[key]:.4g}" for key in ("mean", "std", "worst_decile")))
                    for name, s in summary["client_metrics"].items()
                ],
            )
        )
    total = sum(summary["seconds"].values()) or 1.0
    blocks.append(
        _table(
            ("phase", "seconds", "share"),
            [(name, f"{seconds:.2f}", f"{seconds / total:.0%}") for name, seconds in summary["seconds"].items()],
        )
    )
    return "\n".join(blocks)


def flat_numbers(summary: Mapping[str, Any], prefix: str = "summary") -> dict[str, float]:
    """A summary's numbers under flat names, for loggers."""
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
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = "─" * (sum(widths) + 2 * len(widths))

    def line(cells: Sequence[str]) -> str:
        rest = "".join(f"  {cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f" {cells[0]:<{widths[0]}}{rest}".rstrip()

    return "\n".join([rule, line(head), rule, *map(line, rows), rule])
