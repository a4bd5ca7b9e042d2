"""Scores of clients over the rounds of a run, and what they go along with.

Shapes: N clients exist, R rounds were run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.federation.observation import PREFIX
from lightning_fedhaw.report.history import RunHistory

Score = Literal["weight", "leave_one_out", "shapley"]


def client_scores(run: RunHistory, score: Score = "weight") -> Tensor:
    """Return the mean of a score over the rounds in which it was measured, for each client.

    Args:
        run: The history of the run.
        score: ``"weight"``, the weight that the rule gave the client (FedHAW, FedLAW, FedAdp); or, of a run with
            :class:`~lightning_fedhaw.diagnostics.Contributions`, ``"leave_one_out"`` or ``"shapley"``.

    Returns:
        ``[N]`` float64; NaN for a client that was never measured.

    Raises:
        ValueError: If the run has no such score.
    """
    score = arguments.choice("score", score, Score)
    measured = run.weights.double()
    if score != "weight":
        measured = _measured(run, score)
    if not len(measured):
        raise arguments.invalid(
            "score",
            f"one that the run has kept ({', '.join(map(repr, scores_of(run))) or 'none'})",
            score,
            "A log has no contributions: take the run itself or a checkpoint.",
        )
    return measured.nanmean(0)


def scores_of(run: RunHistory) -> list[Score]:
    """List the scores that a run has."""
    scores: list[Score] = []
    if len(run.weights):
        scores.append("weight")
    contributions: tuple[Score, ...] = ("leave_one_out", "shapley")
    for score in contributions:
        if f"{PREFIX}contributions/{score}" in run.tables:
            scores.append(score)
    return scores


def shapley_errors(run: RunHistory) -> Tensor:
    """Return the standard error of each client's mean Shapley value over rounds, ``[N]`` float64."""
    squares = _measured(run, "shapley_error").square()
    return squares.nansum(0).sqrt() / (~squares.isnan()).sum(0)


def _measured(run: RunHistory, name: str) -> Tensor:
    """Return what was measured of each client, ``[rounds, N]`` float64; NaN where it was not."""
    rows = []
    for round_idx, values in run.tables.get(f"{PREFIX}contributions/{name}", {}).items():
        clients = run.tables[f"{PREFIX}contributions/clients"][round_idx].long()
        row = torch.full((len(run.sizes),), nan, dtype=torch.float64)
        row[clients] = values.double()
        rows.append(row)
    if not rows:
        return torch.empty(0, len(run.sizes), dtype=torch.float64)
    return torch.stack(rows)


def label_entropies(run: RunHistory) -> Tensor | None:
    """Return the entropy of each client's labels in nats, ``[N]`` float64; None where no labels are known."""
    if run.labels is None:
        return None
    shares = run.labels.double() / run.labels.sum(1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(1)


def pearson(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float:
    """Compute Pearson's correlation of the pairs in which neither is NaN; NaN if one of them does not vary."""
    x = torch.as_tensor(first, dtype=torch.float64)
    y = torch.as_tensor(second, dtype=torch.float64)
    is_pair = ~(x.isnan() | y.isnan())
    x = x[is_pair] - x[is_pair].mean()
    y = y[is_pair] - y[is_pair].mean()
    lengths = x.norm() * y.norm()
    if not lengths > 0:
        return nan
    return float(x @ y / lengths)


def contribution_table(
    run: RunHistory, quantities: Mapping[str, Sequence[float]] | None = None
) -> tuple[list[str], list[list[float]]]:
    """Return one row per client: its number, samples, label entropy, further quantities, and every score of the run.

    Args:
        run: The history of the run.
        quantities: Further numbers of each client, such as its share of wrong labels, by name.

    Returns:
        The names of the columns, and the rows.
    """
    columns: dict[str, Sequence[float]] = {"client": range(len(run.sizes)), **_quantities(run, quantities)}
    for score in scores_of(run):
        columns[score] = client_scores(run, score).tolist()
    if "shapley" in columns:
        columns["shapley_error"] = shapley_errors(run).tolist()
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return list(columns), rows


def score_correlations(
    run: RunHistory, quantities: Mapping[str, Sequence[float]] | None = None
) -> dict[str, dict[str, float]]:
    """Compute Pearson's correlation of every score of a run with size, label entropy and further quantities.

    Args:
        run: The history of the run.
        quantities: Further numbers of each client, such as its share of wrong labels, by name.

    Returns:
        The correlations, by the score and the quantity; NaN where one does not vary.
    """
    correlations: dict[str, dict[str, float]] = {}
    for score in scores_of(run):
        values = client_scores(run, score)
        correlations[score] = {name: pearson(values, of) for name, of in _quantities(run, quantities).items()}
    return correlations


def _quantities(run: RunHistory, further: Mapping[str, Sequence[float]] | None) -> dict[str, Sequence[float]]:
    """Return what is known of each client beside its scores."""
    known: dict[str, Sequence[float]] = {"samples": run.sizes}
    entropies = label_entropies(run)
    if entropies is not None:
        known["label_entropy"] = entropies.tolist()
    for name, values in (further or {}).items():
        if len(values) != len(run.sizes):
            raise arguments.invalid(f"quantities[{name!r}]", f"one number for each of {len(run.sizes)} clients", values)
        known[name] = values
    return known


def separation(scores: Sequence[float] | Tensor, is_bad: Sequence[bool]) -> float:
    """Compute the area under the ROC curve: the probability that a bad client has a lower score than a good one.

    Args:
        scores: The score of each client; those with NaN are left out.
        is_bad: Whether each client is bad, such as one with wrong labels.

    Returns:
        1 if all bad clients have the lowest scores, 0.5 for scores that tell nothing; ties count a half. NaN without a
        client of each kind.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    flags = torch.as_tensor(is_bad, dtype=torch.bool)
    bad = values[flags & ~values.isnan()][:, None]
    good = values[~flags & ~values.isnan()]
    # The mean of no pairs is NaN.
    return float(((bad < good).double() + (bad == good).double() / 2).mean())
