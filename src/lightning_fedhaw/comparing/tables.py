"""Tables of a comparison as text, Markdown and LaTeX, and the numbers of all runs for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from math import isnan

from lightning_fedhaw.comparing.running import Record
from lightning_fedhaw.comparing.statistics import (
    COSTS,
    SCORES,
    Difference,
    Group,
    Summary,
    differences,
    differences_over_groups,
    numbers_of,
    summarize,
)

Entries = dict[str, object]
"""An object of JSON."""

FORMATS = ("text", "markdown", "latex")
_PLUS_MINUS = {"text": "±", "markdown": "±", "latex": r"$\pm$"}
_LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"}
_LATEX |= {"$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}


def results_table(groups: Sequence[Group], style: str, target: float | None = None) -> str:
    """Lay out the numbers of every method: mean ± sample standard deviation over seeds.

    Args:
        groups: The runs.
        style: ``"text"``, ``"markdown"`` or ``"latex"``.
        target: The value of the metric for the column of rounds.
    """
    columns = [*SCORES, *COSTS]
    if target is None:
        columns.remove("rounds_to_target")
    tables = []
    for group in groups:
        head = ["method", *(_head(name, target) for name in columns)]
        rows = []
        for method in group.records:
            rows.append([_method(group, method), *_cells(group, method, columns, style, target)])
        tables.append(_laid_out(_caption(group), head, rows, style))
    return "\n".join(tables)


def _head(name: str, target: float | None) -> str:
    if name == "rounds_to_target":
        return f"rounds to {target:g}"
    return {**SCORES, **COSTS}[name]


def _caption(group: Group) -> str:
    unit = f"{group.metric} in %" if group.is_share else group.metric
    seeds = max(len(runs) for runs in group.records.values())
    spread = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    return f"{group.title}: {unit}{spread}"


def _method(group: Group, method: str) -> str:
    diverged = group.diverged(method)
    if diverged:
        return f"{method} ({diverged} diverged)"
    return method


def _cells(group: Group, method: str, columns: Sequence[str], style: str, target: float | None) -> list[str]:
    numbers = group.numbers(method, target)
    cells = []
    for name in columns:
        summary = summarize(numbers[name])
        if name in SCORES or name == "dip":
            cells.append(_spread(summary, group.factor, _decimals(group), style))
        elif name == "rounds_to_target":
            cells.append(_rounds(summary, style))
        else:
            # Costs hardly vary between seeds, and times with the machine: their spread would say little.
            cells.append("-" if isnan(summary.mean) else f"{summary.mean:.3g}")
    return cells


def _decimals(group: Group) -> int:
    return 1 if group.is_share else 3


def _spread(summary: Summary, factor: float, decimals: int, style: str) -> str:
    if isnan(summary.mean):
        return "-"
    text = f"{factor * summary.mean:.{decimals}f}"
    if not isnan(summary.deviation):
        text += f" {_PLUS_MINUS[style]} {factor * summary.deviation:.{decimals}f}"
    return text


def _rounds(summary: Summary, style: str) -> str:
    """Format the rounds to a target, with the number of the runs that reached it unless all did."""
    if summary.count == 0:
        return "-"
    text = _spread(summary, 1.0, 1, style)
    if summary.count < summary.runs:
        text += f" ({summary.count} of {summary.runs})"
    return text


def differences_table(groups: Sequence[Group], reference: str, style: str) -> str:
    """Lay out how far methods are ahead of one of them, paired by seed: mean ± standard error.

    Args:
        groups: The runs.
        reference: The method that the others are compared with.
        style: ``"text"``, ``"markdown"`` or ``"latex"``.
    """
    tables = []
    for group in groups:
        compared = differences(group, reference)
        if compared:
            unit = "points" if group.is_share else group.metric
            caption = f"{group.title}: ahead of {reference} in {unit}, mean and standard error over seeds"
            tables.append(_difference_rows(caption, compared, group, style))
    for metric, compared in differences_over_groups(groups, reference).items():
        members = [group for group in groups if group.metric == metric]
        caption = f"{len(members)} federations: ahead of {reference} in {metric}, mean and standard error over them"
        tables.append(_difference_rows(caption, compared, members[0], style))
    return "\n".join(tables)


def _difference_rows(caption: str, compared: Sequence[Difference], group: Group, style: str) -> str:
    rows = []
    for difference in compared:
        cells = [difference.method]
        for score in SCORES:
            summary = difference.scores[score]
            text = f"{group.factor * summary.mean:+.{_decimals(group)}f}"
            if not isnan(summary.error):
                text += f" {_PLUS_MINUS[style]} {group.factor * summary.error:.{_decimals(group)}f}"
            cells.append(text)
        rows.append(cells)
    return _laid_out(caption, ["method", *SCORES.values()], rows, style)


def _laid_out(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    return _LAYOUTS[style](caption, head, rows)


def _text(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = []
    for column in zip(head, *rows, strict=True):
        widths.append(max(map(len, column)))
    lines = [caption, ""]
    for row in (head, *rows):
        line = f"{row[0]:<{widths[0]}}"
        for cell, width in zip(row[1:], widths[1:], strict=True):
            line += f"  {cell:>{width}}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _markdown(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{caption}**", "", _markdown_line(head), "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        lines.append(_markdown_line(row))
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _latex(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table with the rules of the package booktabs."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        _latex_line([_escaped(cell) for cell in head]),
        r"\midrule",
    ]
    for row in rows:
        # Numbers hold the sign of the spread as LaTeX has it already.
        lines.append(_latex_line([_escaped(row[0]), *row[1:]]))
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_LAYOUTS: dict[str, Callable[[str, Sequence[str], Sequence[Sequence[str]]], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
}


# ---------------------------------------------------------------------- for other programs


def runs_csv(records: Sequence[Record], target: float | None = None) -> str:
    """Return one line for each run: what it was, and its numbers, unscaled."""
    rows = [_run_row(record, target) for record in records]
    # Runs of several cells may have different settings: a column for each that occurs, in the order of the first.
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for name, value in row.items():
            if _is_nan(value):
                row[name] = ""
        writer.writerow(row)
    return text.getvalue()


def _run_row(record: Record, target: float | None) -> dict[str, object]:
    run = record["run"]
    row = {"cell": run["cell"], "method": run["method"]}
    row |= run["settings"]
    row |= {"seed": run["seed"], "rounds": run["rounds"], "metric": record["metric"], "diverged": record["diverged"]}
    row |= numbers_of(record, target)
    row |= {"seconds": record["seconds"], "log": record["log"]}
    return row


def results_json(groups: Sequence[Group], reference: str, target: float | None = None) -> str:
    """Return every table's numbers, unscaled: null where there is none."""
    content = []
    for group in groups:
        methods: dict[str, Entries] = {}
        for method, records in group.records.items():
            entries: Entries = {"seeds": list(records), "diverged": group.diverged(method)}
            for name, values in group.numbers(method, target).items():
                entries[name] = _summary_entries(summarize(values))
            methods[method] = entries
        ahead = _difference_entries(differences(group, reference))
        entry = {"cell": group.cell, "settings": group.settings, "metric": group.metric, "methods": methods}
        content.append({**entry, "ahead_of": {reference: ahead}})
    over_all: Entries = {}
    for metric, compared in differences_over_groups(groups, reference).items():
        over_all[metric] = _difference_entries(compared)
    document = {"target": target, "federations": content, "over_all": {"ahead_of": {reference: over_all}}}
    return json.dumps(document, indent=1) + "\n"


def _difference_entries(compared: Sequence[Difference]) -> Entries:
    entries: Entries = {}
    for difference in compared:
        scores: Entries = {}
        for score, summary in difference.scores.items():
            scores[score] = _summary_entries(summary)
        entries[difference.method] = scores
    return entries


def _summary_entries(summary: Summary) -> Entries:
    """Return a summary for JSON, which has no NaN."""
    entries: Entries = {
        "mean": summary.mean,
        "deviation": summary.deviation,
        "error": summary.error,
        "count": summary.count,
    }
    for name, value in entries.items():
        if _is_nan(value):
            entries[name] = None
    return entries


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and isnan(value)
