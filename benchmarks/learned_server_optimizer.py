"""Reproduce Table 4 and Figure 6 of Federated Automatic Differentiation on a small scale: a play by its speakers.

    python benchmarks/learned_server_optimizer.py run --text PLAY.txt --trials 30
    python benchmarks/learned_server_optimizer.py report   (the table, and docs/images/learned_server_optimizer.png)

``PLAY.txt`` has speeches that are divided by empty lines; the first line of each is the speaker's name and a colon. A
client is a speaker, and predicts the next character by a GRU. The last fifth of each speaker's text is for testing.

A trial draws the clients' learning rate log-uniformly from (0.001, 10), and trains with FedAvgM of rate 1.0 and
momentum 0.9 twice: fixed, and learned as published (SGD with rate 0.01, by the gradient of as many other clients).
Every run adds one line to ``benchmarks/results/learned_server_optimizer.jsonl``; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from journal import Journal
from matplotlib.figure import Figure
from pictures import save_for_pages
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_fedhaw import FedAvgMCallback, FederatedDataModule, FederatedTrainer
from lightning_fedhaw.data import IndexPartitioner
from lightning_fedhaw.figures.base import new_figure

JOURNAL = Journal("learned_server_optimizer", "trial", "rule")
ROUNDS = 40
COHORT = 20
BATCH_SIZE = 10
WINDOW = 80
"""Characters of a sample."""
MOST_WINDOWS = 50
"""Training samples of a speaker at most: the first ones."""
MOST_TEST_WINDOWS = 10
"""Test samples of a speaker at most."""
RATES = (1e-3, 10.0)
RULES = ("fixed", "learned")
START = {"lr": 1.0, "momentum": 0.9}
"""The server's fixed numbers, from which the learned ones start."""
LOOKS = {"fixed": ("#D55E00", "--", "x"), "learned": ("#0072B2", "-", "o")}
"""Color, line and marker of each rule."""


class Play(NamedTuple):
    """A play as a federation.

    Attributes:
        train: ``[samples, WINDOW + 1]`` int64, the characters' numbers; neighboring samples share one.
        test: The same for testing.
        parts: The training samples of each speaker.
        characters: How many characters there are.
    """

    train: Tensor
    test: Tensor
    parts: list[range]
    characters: int


def speeches(text: str) -> dict[str, str]:
    """Return what each speaker says, in order of appearance."""
    lines: dict[str, list[str]] = {}
    for speech in text.split("\n\n"):
        speaker, _, words = speech.strip().partition(":\n")
        if words:
            lines.setdefault(speaker, []).append(words)
    return {speaker: "\n".join(parts) for speaker, parts in lines.items()}


@lru_cache
def play_of(path: Path) -> Play:
    """Read a play. Speakers of fewer than five samples are left out."""
    text = path.read_text()
    number_of = {character: number for number, character in enumerate(sorted(set(text)))}
    train: list[Tensor] = []
    test: list[Tensor] = []
    parts: list[range] = []
    begin = 0
    for words in speeches(text).values():
        numbers = torch.tensor([number_of[character] for character in words])
        if len(numbers) < 5 * WINDOW + 1:
            continue
        windows = numbers.unfold(0, WINDOW + 1, WINDOW)
        held_out = len(windows) // 5
        kept = min(len(windows) - held_out, MOST_WINDOWS)
        train.append(windows[:kept])
        test.append(windows[-held_out:][:MOST_TEST_WINDOWS])
        parts.append(range(begin, begin + kept))
        begin += kept
    return Play(torch.cat(train), torch.cat(test), parts, len(number_of))


class Characters(pl.LightningModule):
    """Predicts the next character."""

    def __init__(self, characters: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(characters, 8)
        self.cell = nn.GRU(8, 64, batch_first=True)
        self.head = nn.Linear(64, characters)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(windows))[0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (windows,) = batch
        scores = self(windows[:, :-1])
        return cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Testing(pl.Callback):
    """Loss and accuracy on the test samples, and what is learned, every ten rounds."""

    def __init__(self, test: Tensor) -> None:
        self.test = test
        self.records: list[dict[str, float]] = []

    def on_round_end(self, trainer: pl.Trainer, pl_module: Characters, report: Any) -> None:
        finished = report.round + 1
        if finished % 10:
            return
        with torch.no_grad():
            scores = pl_module(self.test[:, :-1]).flatten(0, 1)
            labels = self.test[:, 1:].flatten()
            loss = float(cross_entropy(scores, labels))
            accuracy = float((scores.argmax(1) == labels).float().mean())
        record = {"round": finished, "loss": round(loss, 5), "accuracy": round(accuracy, 5)}
        for name in ("learned/lr", "learned/momentum"):
            if name in report.metrics:
                record[name] = round(report.metrics[name], 5)
        self.records.append(record)


def rule_of(name: str) -> FedAvgMCallback:
    """Return the rule of a name in :data:`RULES`."""
    if name == "fixed":
        return FedAvgMCallback(**START)
    return FedAvgMCallback(**START, learn=("lr", "momentum"))


def rate_of(trial: int) -> float:
    """Draw the clients' learning rate of a trial."""
    share = float(torch.rand((), generator=torch.Generator().manual_seed(trial)))
    low, high = (math.log(rate) for rate in RATES)
    return math.exp(low + share * (high - low))


def run(path: Path, trial: int, name: str, engine: str) -> dict[str, Any]:
    """Train once."""
    play = play_of(path)
    rate = rate_of(trial)
    testing = Testing(play.test)
    trainer = FederatedTrainer(
        rounds=ROUNDS,
        clients_per_round=COHORT,
        seed=trial,
        engine=engine,
        client_eval=False,
        callbacks=[rule_of(name), testing],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    data = FederatedDataModule(
        TensorDataset(play.train), batch_size=BATCH_SIZE, partitioner=IndexPartitioner(play.parts)
    )
    torch.manual_seed(trial)
    module = Characters(play.characters, rate)
    begin = time.perf_counter()
    ended_early = False
    try:
        trainer.fit(module, data)
    except (FloatingPointError, RuntimeError) as error:
        print(f"{name}, trial {trial}: {error}", flush=True)
        ended_early = True
    seconds = round(time.perf_counter() - begin, 1)
    last = testing.records[-1] if testing.records else {"loss": math.nan, "accuracy": 0.0}
    # A model that is worse than guessing among all characters has diverged, too.
    diverged = ended_early or not last["loss"] < math.log(play.characters)
    cell = {"trial": trial, "rule": name, "rate": rate}
    return {**cell, "rounds": testing.records, "diverged": diverged, "seconds": seconds}


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is missing, trial after trial."""
    for trial in range(arguments.trials):
        for name in RULES:
            if not JOURNAL.has(trial, name):
                JOURNAL.add(run(arguments.text, trial, name, arguments.engine))


def accuracy_of(result: dict[str, Any]) -> float:
    """Return the test accuracy after the last round, in percent; 0 for a run that has diverged."""
    if result["diverged"]:
        return 0.0
    return 100 * float(result["rounds"][-1]["accuracy"])


def expected_maximum(values: list[float], draws: int) -> float:
    """Return the mean of the largest of some draws with replacement."""
    count = len(values)
    total = 0.0
    for rank, value in enumerate(sorted(values)):
        total += value * (((rank + 1) / count) ** draws - (rank / count) ** draws)
    return total


Trials = dict[str, list[dict[str, Any]]]
"""The runs of each rule, trial after trial."""


def complete_trials() -> Trials:
    """Return the trials that have both runs."""
    runs = {(run["trial"], run["rule"]): run for run in JOURNAL.runs()}
    numbers = sorted({trial for trial, _ in runs})
    complete = [trial for trial in numbers if all((trial, name) in runs for name in RULES)]
    return {name: [runs[trial, name] for trial in complete] for name in RULES}


def table() -> str:
    """Return the table of all trials that have both runs, in Markdown."""
    trials = complete_trials()
    count = len(trials["fixed"])
    differences = []
    for fixed, learned in zip(trials["fixed"], trials["learned"], strict=True):
        if not (fixed["diverged"] and learned["diverged"]):
            differences.append(accuracy_of(learned) - accuracy_of(fixed))
    if len(differences) < 2:
        return "Fewer than two trials have both runs, one of them not diverged.\n"
    draws = [draw for draw in (1, 3, 10) if draw < count]
    lines = [
        "| server rate and momentum | trials | best accuracy (%) | "
        + " | ".join(f"mean best of {draw}" for draw in draws)
        + " | diverged | best client rate |",
        "|---|" + "---:|" * (len(draws) + 4),
    ]
    for name, runs in trials.items():
        values = [accuracy_of(run) for run in runs]
        best = runs[values.index(max(values))]
        means = " | ".join(f"{expected_maximum(values, draw):.1f}" for draw in draws)
        diverged = sum(run["diverged"] for run in runs)
        lines.append(f"| {name} | {count} | {max(values):.1f} | {means} | {diverged} | {best['rate']:.3g} |")
    wins = sum(difference > 0 for difference in differences)
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return (
        "\n".join(lines)
        + f"\n\nIn {len(differences)} trials at least one run has not diverged. There learned minus fixed is "
        + f"{mean:+.2f} +- {error:.2f} points, and learned is better in {wins}.\n"
    )


def draw() -> Figure:
    """Draw the expected best accuracy by the number of trials, the accuracy by client rate, and what is learned."""
    trials = complete_trials()
    figure = new_figure(11, 3.6)
    expected, by_rate, learned = figure.subplots(1, 3)
    for name, (color, line, marker) in LOOKS.items():
        values = [accuracy_of(run) for run in trials[name]]
        numbers = range(1, len(values) + 1)
        maxima = [expected_maximum(values, number) for number in numbers]
        expected.plot(numbers, maxima, line, color=color, label=name)
        rates = [run["rate"] for run in trials[name]]
        by_rate.plot(rates, values, marker, color=color, markerfacecolor="none", label=name)
    for run in trials["learned"]:
        if run["diverged"]:
            continue
        rounds = [record for record in run["rounds"] if "learned/lr" in record]
        server_rates = [START["lr"], *(record["learned/lr"] for record in rounds)]
        momenta = [START["momentum"], *(record["learned/momentum"] for record in rounds)]
        learned.plot(server_rates, momenta, "-", color="#999999", lw=0.8)
        learned.plot(server_rates[-1], momenta[-1], "o", color=LOOKS["learned"][0], ms=4)
    expected.set(xlabel="trials", ylabel="expected best test accuracy (%)")
    by_rate.set(xlabel="client learning rate", ylabel="test accuracy (%)", xscale="log")
    learned.set(xlabel="server learning rate", ylabel="server momentum", title="learned, from 1 and 0.9 to round 40")
    for axes in (expected, by_rate, learned):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    expected.legend(frameon=False)
    return figure


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--text", type=Path, help="the play, for `run`")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/learned_server_optimizer.png"))
    parser.add_argument("--engine", choices=("auto", "sequential", "vectorized"), default="auto")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*val_dataloader.*|.*validation_step.*|.*num_workers.*")
    if arguments.command == "report":
        print(table())
        if JOURNAL.runs():
            save_for_pages(draw, arguments.picture)
        return
    if arguments.text is None:
        parser.error("`run` needs the play: --text PLAY.txt")
    run_all(arguments)


if __name__ == "__main__":
    main()
