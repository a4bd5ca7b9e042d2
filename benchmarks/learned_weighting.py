"""Reproduce Figures 8 and 13 of Federated Automatic Differentiation: weights by examples, uniform, and learned.

    python benchmarks/learned_weighting.py run --seeds 0 1 2 3 4
    python benchmarks/learned_weighting.py table

Synthetic(1,1), 100 clients with at most 2,000 samples, 50 of them a round and 50 for the gradient, one local epoch of
SGD with batches of 10. Every run adds one line to `benchmarks/results/learned_weighting.jsonl`; a run that is there is
not repeated, so the study may be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_fedhaw import FedAvgCallback, FederatedTrainer, LearnedWeightingCallback, Probe
from lightning_fedhaw.data import Synthetic
from lightning_fedhaw.extending import AggregationRule

RESULTS = Path(__file__).parent / "results" / "learned_weighting.jsonl"
ROUNDS = (10, 50, 100, 200)
CURVE = (1, *range(5, max(ROUNDS) + 1, 5))
RATES = (0.03, 0.1)
RULES = ("examples", "uniform", "from 1, 0.01", "from 1, 0.05", "from 0, 0.01", "from 0, 0.05")


class Logistic(pl.LightningModule):
    """Multinomial logistic regression from zero."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Linear(60, 10)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class PooledLoss(pl.Callback):
    """The loss of all training samples, and the learned exponent, over the rounds."""

    def __init__(self, data: Synthetic) -> None:
        self.inputs, self.labels = data.train.tensors
        self.losses: dict[int, float] = {}
        self.exponents: dict[int, float] = {}

    def on_round_end(self, trainer: pl.Trainer, pl_module: Logistic, report: Any) -> None:
        finished = report.round + 1
        if finished not in CURVE:
            return
        with torch.no_grad():
            loss = float(cross_entropy(pl_module.net(self.inputs), self.labels))
        self.losses[finished] = round(loss, 5)
        if "learned/exponent" in report.metrics:
            self.exponents[finished] = round(report.metrics["learned/exponent"], 5)


def rule_of(name: str, form: str) -> AggregationRule:
    """Return the rule of a name in :data:`RULES`."""
    if name in ("examples", "uniform"):
        return FedAvgCallback(name)
    exponent, hyper_lr = (float(part) for part in name.removeprefix("from ").split(", "))
    # A client's gradient is that of all its samples, so larger batches change nothing but the time.
    return LearnedWeightingCallback(exponent, hyper_lr=hyper_lr, probe=Probe(form=form, batch_size=2000))


@lru_cache
def data_of(seed: int) -> Synthetic:
    """Return the data of a seed."""
    return Synthetic(1.0, 1.0, max_samples=2000, seed=seed)


def run(name: str, rate: float, seed: int, form: str) -> dict[str, Any]:
    """Run one cell of the study."""
    data = data_of(seed)
    record = PooledLoss(data)
    trainer = FederatedTrainer(
        rounds=max(ROUNDS),
        clients_per_round=50,
        seed=seed,
        client_eval=False,
        callbacks=[rule_of(name, form), record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    begin = time.perf_counter()
    trainer.fit(Logistic(rate), data.datamodule(10))
    seconds = time.perf_counter() - begin
    cell = {"rule": name, "rate": rate, "seed": seed, "form": form}
    return {**cell, "losses": record.losses, "exponents": record.exponents, "seconds": round(seconds, 1)}


def finished() -> list[dict[str, Any]]:
    """Return the runs that are there."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int, str]]:
    """Name the runs of the study, seed after seed."""
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for name in arguments.rules:
                yield name, rate, seed, arguments.form


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is missing."""
    for cell in cells(arguments):
        # Read again for each: two of these programs may share the work.
        there = {(r["rule"], r["rate"], r["seed"], r["form"]) for r in finished()}
        if cell in there:
            continue
        result = run(*cell)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)


def table() -> str:
    """Return the table of means and standard errors, in Markdown."""
    runs = finished()
    lines = [
        "| client rate | weights | seeds | " + " | ".join(f"round {t}" for t in ROUNDS) + " | exponent |",
        "|---|---|---|" + "---|" * (len(ROUNDS) + 1),
    ]
    for rate in RATES:
        for name in RULES:
            chosen = [r for r in runs if (r["rule"], r["rate"]) == (name, rate)]
            if not chosen:
                continue
            entries = []
            for finished_rounds in ROUNDS:
                values = torch.tensor([r["losses"][str(finished_rounds)] for r in chosen])
                entry = f"{values.mean():.3f}"
                if len(values) > 1:
                    entry += f" ± {values.std() / len(values) ** 0.5:.3f}"
                entries.append(entry)
            exponents = torch.tensor([list(r["exponents"].values()) for r in chosen]).mean(0)
            shown = "-"
            if not exponents.isnan().any():
                shown = ", ".join(f"{value:.2f}" for value in exponents)
            lines.append(f"| {rate} | {name} | {len(chosen)} | {' | '.join(entries)} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--form", choices=("parallel", "sequential"), default="parallel")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*val_dataloader.*|.*validation_step.*|.*num_workers.*")
    if arguments.command == "run":
        run_all(arguments)
    else:
        print(table())


if __name__ == "__main__":
    main()
