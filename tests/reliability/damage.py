"""Checkpoint files with a flipped bit or without their end: none is taken for whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from reliability import endings
from reliability.endings import Outcome
from reliability.plans import CLIENTS, Plan, every_round
from reliability.records import first_difference

ROUNDS = 2
TRIES = 100

PLANS = (
    ("scaffold II", "fresh", "sequential"),
    ("fedhaw", "kept", "vectorized"),
    ("fedadam", "kept", "sequential"),
    ("published fedhaw", "fresh", "sequential"),
)


def plan_of(number: int) -> Plan:
    rule, optimizer_state, engine = PLANS[number % len(PLANS)]
    options = {"num_clients": CLIENTS, "alpha": 5.0, "seed": 1, "client_eval": False, "buffers": "local"}
    return Plan(
        rule=rule,
        channels=["erasure, reuse update"],
        model={"optimizer": "stepped", "norm": True},
        federation={**options, "optimizer_state": optimizer_state, "engine": engine},
        drops_last=True,
    )


@cache
def sound_file(number: int) -> bytes:
    """Return the bytes of the checkpoint after the first round of a federation."""
    folder = Path("sound")
    trainer = plan_of(number).trainer(ROUNDS - 1, [every_round(folder)], enable_checkpointing=True)
    trainer.fit(plan_of(number).net(), plan_of(number).data())
    return (folder / f"rounds={ROUNDS - 1}.ckpt").read_bytes()


def flip(number: int, random: Random, folder: Path) -> Outcome:
    """Flip one bit of a checkpoint that matters, and read it."""
    sound = sound_file(number)
    path = folder / "flipped.ckpt"
    for attempt in range(TRIES):
        position = random.randrange(len(sound))
        spoilt = bytearray(sound)
        spoilt[position] ^= 1 << random.randrange(8)
        path.write_bytes(spoilt)
        outcome = read(number, path, random)
        if not outcome.passed and is_same_content(path, sound):
            # The gaps between a checkpoint's parts hold nothing that anybody reads.
            print(f"byte {position} of {len(sound)} means nothing")
            continue
        return Outcome(outcome.passed, outcome.label, f"byte {position} of {len(sound)}, {attempt}: {outcome.detail}")
    return Outcome(False, "no bit that matters")


def cut(number: int, random: Random, folder: Path) -> Outcome:
    """Cut a checkpoint off, and read it."""
    sound = sound_file(number)
    path = folder / "cut.ckpt"
    length = random.choice([0, random.randrange(len(sound)), random.randrange(len(sound)), len(sound) - 1])
    path.write_bytes(sound[:length])
    outcome = read(number, path, random)
    return Outcome(outcome.passed, outcome.label, f"{length} of {len(sound)} bytes: {outcome.detail}")


def is_same_content(path: Path, sound: bytes) -> bool:
    """Return whether a file still gives what the sound one gives."""
    whole = path.with_name("sound.ckpt")
    whole.write_bytes(sound)
    try:
        contents = [torch.load(file, weights_only=True) for file in (path, whole)]
    except Exception:  # whatever a damaged file leads to: it is not the same
        return False
    return not first_difference(contents[0], contents[1])


def read(number: int, path: Path, random: Random) -> Outcome:
    """Go on from a damaged file, or validate it: the end must be a sentence with the file's name."""
    plan = plan_of(number)
    trainer = plan.trainer(ROUNDS, [])
    uses: list[Callable[..., Any]] = [trainer.fit, trainer.fit, trainer.fit, trainer.validate]
    use = random.choice(uses)
    try:
        use(plan.net(), datamodule=plan.data(), ckpt_path=path)
    except Exception as error:
        outcome = endings.of_error(error)
        if not outcome.passed:
            return outcome
        if path.name not in str(error):
            return Outcome(False, "a sentence without the file's name", outcome.detail)
        return Outcome(True, "refused by name", outcome.detail)
    return Outcome(False, f"taken for whole by {use.__name__}")


TRIALS = {"flips": flip, "cuts": cut}
