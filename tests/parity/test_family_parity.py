"""FedAdp, FedHyper-G, FedLWS and FedLAW against their formulas, over whole federations of full-batch local SGD.

``pytest tests/parity -rP`` prints the largest differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fedhaw import FedAdpCallback, FedAvgCallback, FedHyperCallback, FedLAWCallback, FedLWSCallback
from lightning_fedhaw.extending import AggregationRule
from parity.authors_formulas import local_sgd
from parity.family_formulas import Server, fedadp, fedavg, fedhyper, fedlaw, fedlws
from parity.federation import EVERYONE, ROUNDS, SIZES, SOME, Network, flat, from_trainer, proxy_samples, samples

EPOCHS = 5
TIMID, BOLD = 0.2, 3.0
"""Local rates: with the second, steps are long enough to turn round, so that FedHyper's rate falls as well as rises."""


@dataclass(frozen=True)
class Case:
    """The package's rule, and the formulas' server, each made anew for a run; the local rate; the error in float64."""

    ours: Callable[[], AggregationRule]
    theirs: Callable[[], Server]
    mu: float = TIMID
    allowed: float = 1e-11


SGD = {"server_epochs": 30, "lr": 0.02, "scheduler": None, "optimizer": torch.optim.SGD}
CASES = {
    "FedAvg": Case(FedAvgCallback, fedavg),
    # The code adds 1e-12 to the cosine's denominator: for a client alone, whose angle is 0, that is an angle of 1e-6.
    "FedAdp": Case(FedAdpCallback, fedadp, allowed=1e-5),
    "FedHyper-G, bounds of the code, unweighted": Case(
        partial(FedHyperCallback, alpha_bounds=(0.2, 5.0), weighting="uniform"), fedhyper
    ),
    "FedHyper-G, the same within [0.95, 1.5]": Case(
        partial(FedHyperCallback, alpha_bounds=(0.95, 1.5), weighting="uniform"), partial(fedhyper, 0.95, 1.5), BOLD
    ),
    "FedLWS, beta 0.1, no bounds (FedHAW's authors)": Case(
        partial(FedLWSCallback, beta=0.1, tau_min=0.0, tau_max=float("inf")), partial(fedlws, 0.1)
    ),
    "FedLWS, beta 0.03, tau in [0.01, 0.2] (its code)": Case(FedLWSCallback, partial(fedlws, 0.03, 0.01, 0.2)),
    "FedLAW, SGD": Case(partial(FedLAWCallback, **SGD), lambda: fedlaw(proxy_samples(), epochs=30, lr=0.02)),
    "FedLAW, SGD with momentum 0.9, rate halved every 20 epochs": Case(
        partial(FedLAWCallback, server_epochs=50, lr=0.01, optimizer=partial(torch.optim.SGD, momentum=0.9)),
        lambda: fedlaw(proxy_samples(), epochs=50, lr=0.01, momentum=0.9, halved_every=20),
    ),
}
COHORTS = {"everyone": EVERYONE, "some": SOME}

Rounds = list[tuple[np.ndarray, dict[str, float]]]


def from_formulas(start: np.ndarray, cohorts: list[list[int]], server: Server, mu: float) -> Rounds:
    """Full-batch descent on every client, then the server, round by round."""
    x, y, own = samples()
    w, rounds = start, []
    for cohort in cohorts:
        models = [local_sgd(w, x, y, [own[k]] * EPOCHS, len(own[k]), mu) for k in cohort]
        w, learned = server(w, np.stack(models), cohort, np.array([SIZES[k] for k in cohort], dtype=float))
        rounds.append((w, learned))
    return rounds


def largest_differences(case: Case, cohorts: list[list[int]], precision: Any) -> dict[str, float]:
    """Relative to how far the model has come, and of every learned number relative to that number."""
    start, watcher = from_trainer(
        case.ours(), cohorts, mu=case.mu, epochs=EPOCHS, batch_size=max(SIZES), precision=precision
    )
    theirs = from_formulas(start, cohorts, case.theirs(), case.mu)
    assert len(watcher.rounds) == len(theirs) == ROUNDS
    found: dict[str, float] = {}
    for (w, logged), (expected, learned) in zip(watcher.rounds, theirs, strict=True):
        errors = {"displacement": np.linalg.norm(w - expected) / np.linalg.norm(expected - start)}
        errors |= {name: abs(logged[name] - value) / abs(value) for name, value in learned.items()}
        found = {name: max(float(error), found.get(name, 0.0)) for name, error in errors.items()}
    return found


@pytest.mark.parametrize("cohorts", COHORTS)
@pytest.mark.parametrize("name", CASES)
def test_eight_rounds_in_float64(name, cohorts):
    found = largest_differences(CASES[name], COHORTS[cohorts], "64-true")
    print(f"{name}, {cohorts}, float64: {found}")
    assert max(found.values()) < CASES[name].allowed


@pytest.mark.parametrize("name", CASES)
def test_eight_rounds_in_float32(name):
    found = largest_differences(CASES[name], EVERYONE, "32-true")
    print(f"{name}, everyone, float32: {found}")
    assert max(found.values()) < 1e-4


def ends(name: str, rule: Callable[[], Server] | None = None) -> tuple[np.ndarray, Rounds]:
    """The start, and what the formulas make of it."""
    case = CASES[name]
    start = flat(Network(case.mu))
    return start, from_formulas(start, EVERYONE, (rule or case.theirs)(), case.mu)


@pytest.mark.parametrize("name", [name for name in CASES if name != "FedAvg"])
def test_everything_moves_and_is_not_fedavg(name):
    """What the cases tell apart is larger than what they may be off by."""
    start, rounds = ends(name)
    _, averaged = ends(name, fedavg)
    moved = np.linalg.norm(averaged[-1][0] - start)
    distance = np.linalg.norm(rounds[-1][0] - averaged[-1][0]) / moved
    first, last = (np.array(list(rounds[t][1].values())) for t in (0, -1))
    print(
        f"{name}: FedAvg's model moves by {moved:.2f}, this one ends at {distance:.3f} of that from it; {rounds[-1][1]}"
    )
    assert moved > 1
    assert distance > 1e-3
    assert np.abs(last - first).max() > 1e-4


def test_fedhypers_rate_is_free_in_one_case_and_meets_both_bounds_in_the_other():
    free, bound = ([learned["alpha"] for _, learned in ends(name)[1]] for name in CASES if name.startswith("FedHyper"))
    assert all(0.2 < alpha < 5 for alpha in free)
    assert {0.95, 1.5} < set(bound)
