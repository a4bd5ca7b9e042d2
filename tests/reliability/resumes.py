"""A run that goes on from any round ends as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from random import Random

from reliability import endings, plans
from reliability.endings import Outcome
from reliability.records import Record, first_difference, record_of

ROUNDS = 4
TRIES = 40
PROCESSES_SHARE = 0.04


def run(plan: plans.Plan, folder: Path, resumed_from: Path | None = None) -> Record:
    """Train to the last round, and return what that led to."""
    trainer = plan.trainer(ROUNDS, [plans.every_round(folder)], enable_checkpointing=True)
    trainer.fit(plan.net(), plan.data(), ckpt_path=resumed_from)
    return record_of(trainer, folder / f"rounds={ROUNDS}.ckpt")


def trial(number: int, random: Random, folder: Path) -> Outcome:
    """Run a random federation, go on from one of its rounds, and compare."""
    for attempt in range(TRIES):
        processes = 2 if random.random() < PROCESSES_SHARE else 1
        plan = plans.drawn(random, processes=processes)
        stop = random.randrange(1, ROUNDS)
        print(f"attempt {attempt}, round {stop}: {plan}")
        whole = folder / f"whole {attempt}"
        try:
            straight = run(plan, whole)
        except Exception as error:
            # Combinations that the package refuses are no resumes; the trials of configurations look at those.
            outcome = endings.of_error(error)
            if not outcome.passed:
                return Outcome(False, outcome.label, f"{outcome.detail} {plan}")
            print(outcome.detail)
            continue
        resumed = run(plan, folder / "resumed", whole / f"rounds={stop}.ckpt")
        difference = first_difference(straight, resumed)
        if difference:
            return Outcome(False, "differs", f"from round {stop}: {difference}. {plan}")
        return Outcome(True, "identical")
    return Outcome(False, "no federation that runs")
