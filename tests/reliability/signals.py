"""Runs that are killed, preempted or asked to end, and what is left of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from reliability.endings import Outcome
from reliability.forked import POLL_SECONDS, Ending, Forked
from reliability.plans import CLIENTS, Plan
from reliability.records import Record, first_difference, record_of

ROUNDS = 8
LONGEST_RUN = 60.0
GRACE_SECONDS = 30.0
TRIES = 6
LARGEST_DELAY = 0.02
"""Seconds of a checkpoint's writing after which a kill still lies within it."""

EVENTS_PER_ROUND = 4
WRITES = ("os.rename", "os.remove", "os.truncate", "os.link")

RULES = (
    *("scaffold II", "fedhaw", "scaffold I", "fedadam", "fedopt on scaffold", "feddyn"),
    *("published fedhaw", "fedhyper G+SL", "fedopt, scheduled", "fednova"),
)
OPTIMIZERS = ("stepped", "annealed", "momentum")
NEEDS_SGD = ("scaffold II", "fedopt on scaffold", "fednova")
"""Rules that divide by a client's learning rates, and need SGD that starts anew in every round."""


class Teller(pl.Callback):
    """Tells the parent process that a fit has begun, or that two rounds are over."""

    def __init__(self, process: Forked, *, after_round: bool = False) -> None:
        self.process = process
        self.after_round = after_round

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.after_round:
            self.process.tell()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The second round, so that the checkpoint of the first has been written, whatever order callbacks have.
        if self.after_round and trainer.current_epoch == 1:
            self.process.tell()


def plan_of(number: int, random: Random) -> Plan:
    """Choose the federation of a trial: its number walks through engines, rules and schedules."""
    federation: dict[str, Any] = {
        "num_clients": CLIENTS,
        "alpha": 5.0,
        "clients_per_round": random.choice([None, 3]),
        "seed": random.randrange(1000),
        "engine": ("sequential", "vectorized")[number % 2],
        "optimizer_state": random.choice(["fresh", "kept"]),
        "buffers": random.choice(["average", "local"]),
        "client_eval": False,
    }
    rule = RULES[number // 2 % len(RULES)]
    optimizer = OPTIMIZERS[number // 2 % len(OPTIMIZERS)]
    if rule in NEEDS_SGD:
        optimizer = "stepped"
        federation["optimizer_state"] = "fresh"
    return Plan(
        rule=rule,
        channels=random.choice([[], [], ["erasure, reuse update"], ["sparsified"], ["erasure, downlink, reuse"]]),
        model={
            "optimizer": optimizer,
            "norm": random.random() < 0.5,
            "hidden": random.choice([8, 500]),
        },
        federation=federation,
        drops_last=True,
    )


def train(plan: Plan, folder: Path, callbacks: list[Any], ckpt_path: Path | None = None, **others: Any) -> Record:
    """Train with a checkpoint every round, and return the record of the end."""
    trainer = trainer_of(plan, folder, callbacks, **others)
    trainer.fit(plan.net(), plan.data(), ckpt_path=ckpt_path)
    return record_of(trainer, folder / "checkpoints/last.ckpt")


def trainer_of(plan: Plan, folder: Path, callbacks: list[Any], **others: Any) -> pl.Trainer:
    """Create a trainer that keeps the checkpoint of the latest round."""
    common = {"enable_checkpointing": True, "default_root_dir": folder, **others}
    if plan.is_stock:
        latest = ModelCheckpoint(folder / "checkpoints", save_last=True)
        return plan.trainer(ROUNDS, [*callbacks, latest], **common)
    return plan.trainer(ROUNDS, callbacks, checkpoint_every_n_rounds=1, **common)


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


class WriteWatch:
    """Tells the parent process of one step of a checkpoint's writing: an opening, a renaming, a removal.

    Args:
        process: The process.
        number: The step, counted from 1 over the whole run.
        is_fatal: Whether the process kills itself there, instead.
    """

    def __init__(self, process: Forked, number: int, *, is_fatal: bool) -> None:
        self.process = process
        self.number = number
        self.is_fatal = is_fatal
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wxa+"))
        if not (opens or event in WRITES) or "checkpoints" not in str(arguments[0]):
            return
        self.count += 1
        if self.count == self.number:
            if self.is_fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.process.tell()


def kill(number: int, random: Random, folder: Path) -> Outcome:
    """Kill a run, half of the times within a write of a checkpoint, go on, and compare with a run left alone."""
    in_write = number // 2 % 2 == 1
    plan = plan_of(number, random)
    begin = time.monotonic()
    straight = train(plan, folder / "whole", [])
    duration = time.monotonic() - begin
    print(f"{'within a write' if in_write else 'at any moment'}, {duration:.1f} s: {plan}")
    share = random.random()
    for attempt in range(TRIES):
        broken = folder / f"killed {attempt}"
        if in_write:
            step = 1 + int(share * EVENTS_PER_ROUND * ROUNDS)
            ending = killed_in_write(plan, broken, step, random.choice([0.0, random.uniform(0, LARGEST_DELAY)]))
        else:
            ending = killed_at(plan, broken, share * duration)
        if ending.code == -signal.SIGKILL:
            return after_kill(plan, broken, straight)
        if ending.code != 0:
            return Outcome(False, "the run failed before it was killed", f"{ending.error}. {plan}")
        # It was over before the kill.
        share *= 0.7
    return Outcome(False, "never killed", str(plan))


def killed_at(plan: Plan, folder: Path, seconds: float) -> Ending:
    """Kill a run some seconds after it has begun."""
    process = Forked(lambda me: train(plan, folder, [Teller(me)]) and None, folder)
    if process.listen(LONGEST_RUN):
        time.sleep(seconds)
    process.send(signal.SIGKILL)
    return process.wait(LONGEST_RUN)


def killed_in_write(plan: Plan, folder: Path, step: int, seconds: float) -> Ending:
    """Kill a run at a step of its writing of checkpoints, or some seconds after it."""

    def job(me: Forked) -> None:
        sys.addaudithook(WriteWatch(me, step, is_fatal=seconds == 0))
        train(plan, folder, [])

    process = Forked(job, folder)
    # A run that kills itself or ends closes the pipe, which ends the waiting too.
    if process.listen(LONGEST_RUN):
        time.sleep(seconds)
        process.send(signal.SIGKILL)
    return process.wait(LONGEST_RUN)


def after_kill(plan: Plan, folder: Path, straight: Record) -> Outcome:
    """Go on with what a killed run has left, and compare."""
    latest = folder / "checkpoints/last.ckpt"
    begun = latest if latest.exists() else None
    if begun is None:
        # Killed between the first checkpoint and its second name.
        begun = next((folder / "checkpoints").glob("round=*.ckpt"), None)
    rounds = rounds_of(begun)
    resumed = train(plan, folder, [], begun)
    if rounds == ROUNDS:
        # No round was left to play, so nothing was logged.
        del straight["metrics"], resumed["metrics"]
    difference = first_difference(straight, resumed)
    if difference:
        return Outcome(False, "differs", f"{difference}. {plan}")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if names != ["last.ckpt", f"round={ROUNDS}.ckpt"]:
        return Outcome(False, "files are left behind", f"{names}. {plan}")
    return Outcome(True, "identical" if begun else "identical, from the beginning")


def rounds_of(path: Path | None) -> int:
    """Return the rounds that a checkpoint holds; 0 without one."""
    return 0 if path is None else int(torch.load(path, weights_only=True)["global_step"])


# ---------------------------------------------------------------------------------------------------------------------
# Slurm
# ---------------------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}
STEP_SECONDS = 0.002
LONG_STEP_SECONDS = 0.01


def slurm_job(plan: Plan, folder: Path) -> Callable[[Forked], None]:
    """Return the job that Slurm starts, the first time and after each requeue."""

    def job(me: Forked) -> None:
        os.environ.update(SLURM)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        train(plan, folder, [Teller(me)])

    return job


def preemption(number: int, random: Random, folder: Path) -> Outcome:
    """Preempt a Slurm job by SIGUSR1: it saves, is queued again, and ends as if nothing had happened."""
    plan = plan_of(number, random)
    plan.is_stock = random.random() < 0.3
    begin = time.monotonic()
    straight = train(plan, folder / "whole", [])
    moment = random.uniform(0, 0.8) * (time.monotonic() - begin)
    plan.model["pause"] = STEP_SECONDS
    for attempt in range(TRIES):
        home = folder / f"job {attempt}"
        add_scontrol(home)
        process = Forked(slurm_job(plan, home), home)
        process.listen(LONGEST_RUN)
        time.sleep(moment)
        is_early = process.is_running
        process.send(signal.SIGUSR1)
        is_requeued = wait_for(home / "requeued", process)
        # What Slurm does with the job that was queued again.
        process.send(signal.SIGTERM)
        time.sleep(0.05)
        process.send(signal.SIGKILL)
        ending = process.wait(LONGEST_RUN)
        if is_requeued:
            return after_preemption(plan, home, straight)
        if ending.code != 0 or is_early:
            return Outcome(False, "not requeued", f"exit {ending.code} {ending.error}. {plan}")
        moment *= 0.6
    return Outcome(False, "never preempted", str(plan))


def add_scontrol(folder: Path) -> None:
    """Simulate Slurm's command: it notes what it was asked."""
    folder.mkdir(parents=True)
    command = folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/requeued"\n')
    command.chmod(0o700)


def wait_for(file: Path, process: Forked) -> bool:
    """Wait until a file is there or the process has ended; return whether it is there."""
    deadline = time.monotonic() + GRACE_SECONDS
    while process.is_running and not file.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return file.exists()


def after_preemption(plan: Plan, folder: Path, straight: Record) -> Outcome:
    """Start the job again, as Slurm would, and compare."""
    if not list(folder.glob("hpc_ckpt_*.ckpt")):
        return Outcome(False, "requeued, not saved", str(plan))
    plan.model["pause"] = 0.0
    again = Forked(lambda me: slurm_end(plan, folder, me, straight), folder / "again").wait(LONGEST_RUN)
    if again.timed_out or again.error:
        return Outcome(False, "the requeued job failed", f"{again.error} (timed out: {again.timed_out}). {plan}")
    if again.value:
        return Outcome(False, "differs", f"{again.value}. {plan}")
    return Outcome(True, "saved, requeued, identical")


def slurm_end(plan: Plan, folder: Path, me: Forked, straight: Record) -> str:
    """Run a requeued job to its end, and return the first difference; Lightning finds the checkpoint itself."""
    os.environ.update(SLURM)
    return first_difference(straight, train(plan, folder, []))


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_job(plan: Plan, folder: Path, rank: int, port: int, saves: bool) -> Callable[[Forked], None]:
    """Return the job of one of two processes that a launcher has started; ``saves``: also when it is interrupted."""

    def job(me: Forked) -> None:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        callbacks: list[Any] = [Teller(me, after_round=True)]
        if saves:
            callbacks.append(OnExceptionCheckpoint(folder / "checkpoints", "interrupted"))
        trainer = trainer_of(plan, folder, callbacks, devices=2)
        trainer.fit(plan.net(), plan.data())

    return job


def termination(number: int, random: Random, folder: Path) -> Outcome:
    """Ask two processes to end while a client trains: both do, soon, and what they leave goes on."""
    plan = plan_of(number, random)
    plan.federation["reduction"] = "ordered"
    # A batched step of half of the clients rounds differently from one of all of them.
    plan.federation["engine"] = "sequential"
    straight = train(plan, folder / "whole", [])
    # A step that waits changes no bits: it only makes sure that the signal comes while a client trains.
    plan.model["pause"] = LONG_STEP_SECONDS
    home = folder / "two"
    port = free_port()
    saves = random.random() < 0.5
    processes = [Forked(rank_job(plan, home, rank, port, saves), home / str(rank)) for rank in range(2)]
    if not all(process.listen(LONGEST_RUN) for process in processes):
        endings = [process.wait(0) for process in processes]
        return Outcome(False, "two processes did not begin", f"{[ending.error for ending in endings]}. {plan}")
    time.sleep(random.uniform(0, 0.3))
    number_sent = random.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
    receivers = random.choice([[0, 1], [0], [1]])
    for rank in receivers:
        processes[rank].send(number_sent)
    begin = time.monotonic()
    endings = [process.wait(max(0.0, begin + GRACE_SECONDS - time.monotonic())) for process in processes]
    seconds = time.monotonic() - begin
    situation = f"{number_sent.name} to {receivers}, {seconds:.1f} s, {[ending.code for ending in endings]}: {plan}"
    print(situation)
    if any(ending.timed_out for ending in endings):
        return Outcome(False, "did not end", situation)
    return after_termination(plan, home, straight, situation)


def after_termination(plan: Plan, folder: Path, straight: Record, situation: str) -> Outcome:
    """Go on, in one process, with what two have left, and compare."""
    left = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not left:
        return Outcome(False, "ended without a checkpoint", situation)
    plan.model["pause"] = 0.0
    difference = first_difference(straight, train(plan, folder / "one", [], left[-1]))
    if difference:
        return Outcome(False, "differs", f"from {left[-1].name}: {difference}. {situation}")
    return Outcome(True, "ended in time, identical")


TRIALS = {"kills": kill, "slurm": preemption, "sigterm": termination}
