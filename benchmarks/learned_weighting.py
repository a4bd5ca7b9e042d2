"""Reproduce Figures 8 and 13 of Federated Automatic Differentiation: weights by examples, uniform, and learned.

    python benchmarks/learned_weighting.py run --seeds 0 1 2 3 4
    python benchmarks/learned_weighting.py report                   (tables, and docs/images/learned_weighting.png)

Synthetic(1,1), 100 clients with at most 2,000 samples, 50 of them a round and 50 for the gradient, one local epoch of
SGD with batches of 10. Every run adds one line to `benchmarks/results/learned_weighting.jsonl`; a run that is there is
not repeated, so the study may be stopped and continued. The report is of the seeds that all rules have, for each
client rate.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from journal import Journal
from matplotlib.figure import Figure
from pictures import save_for_pages
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_fedhaw import FedAvgCallback, FederatedTrainer, LearnedWeightingCallback, Probe
from lightning_fedhaw.data import Synthetic
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.figures.base import ink, new_figure

JOURNAL = Journal("learned_weighting", "rule", "rate", "seed", "form")
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

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
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


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int, str]]:
    """Name the runs of the study, seed after seed."""
    for seed in arguments.seeds:
        for rate in arguments.rates:
            for name in arguments.rules:
                yield name, rate, seed, arguments.form


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is missing."""
    for cell in cells(arguments):
        if not JOURNAL.has(*cell):
            JOURNAL.add(run(*cell))


class Results:
    """The runs of the parallel form.

    Attributes:
        seeds: For each client rate the seeds with which every rule has run.
    """

    def __init__(self) -> None:
        self.runs = {(r["rule"], r["rate"], r["seed"]): r for r in JOURNAL.runs() if r["form"] == "parallel"}
        self.seeds: dict[float, list[int]] = {}
        for rate in RATES:
            seeds = sorted({seed for _, _, seed in self.runs})
            self.seeds[rate] = [seed for seed in seeds if all((name, rate, seed) in self.runs for name in RULES)]

    def curves(self, name: str, rate: float, quantity: str) -> Tensor:
        """Return ``[seeds, rounds]``, the losses or exponents at the rounds of :data:`CURVE`; empty without them."""
        rows = [self.runs[name, rate, seed][quantity] for seed in self.seeds[rate]]
        return torch.tensor([[row[str(t)] for t in CURVE if str(t) in row] for row in rows])

    def losses(self, name: str, rate: float, finished_rounds: int) -> Tensor:
        """Return ``[seeds]``, the losses after some rounds."""
        return self.curves(name, rate, "losses")[:, CURVE.index(finished_rounds)]


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over the first axis."""
    return values.std(0) / len(values) ** 0.5


def table(results: Results) -> str:
    """Return the means and standard errors of the loss, and the mean exponents, in Markdown."""
    lines = [
        "| client rate | seeds | weights | " + " | ".join(f"round {t}" for t in ROUNDS) + " | exponent then |",
        "|---|---|---|" + "---:|" * (len(ROUNDS) + 1),
    ]
    for rate in RATES:
        for name in RULES:
            entries = []
            for t in ROUNDS:
                values = results.losses(name, rate, t)
                entries.append(f"{values.mean():.3f} ± {standard_error(values):.3f}")
            exponents = results.curves(name, rate, "exponents").mean(0)
            shown = ""
            if len(exponents):
                shown = ", ".join(f"{exponents[CURVE.index(t)]:.2f}" for t in ROUNDS)
            lines.append(f"| {rate} | {len(results.seeds[rate])} | {name} | {' | '.join(entries)} | {shown} |")
    return "\n".join(lines)


def envelope_table(results: Results) -> str:
    """Return how far learned weighting is above the better of the two fixed ones, paired over seeds, in Markdown."""
    lines = [
        "| client rate | learned | " + " | ".join(f"round {t}" for t in ROUNDS) + " | within two standard errors |",
        "|---|---|" + "---:|" * (len(ROUNDS) + 1),
    ]
    for rate in RATES:
        for name in RULES[2:]:
            entries = []
            within = 0
            for t in ROUNDS:
                fixed = [results.losses(rule, rate, t) for rule in ("examples", "uniform")]
                difference = results.losses(name, rate, t) - min(fixed, key=lambda values: float(values.mean()))
                error = standard_error(difference)
                within += bool(difference.mean() <= 2 * error)
                entries.append(f"{difference.mean():+.3f} ± {error:.3f}")
            lines.append(f"| {rate} | {name} | {' | '.join(entries)} | {within} of {len(ROUNDS)} |")
    return "\n".join(lines)


LOOKS = {
    "examples": (None, "--"),
    "uniform": ("#999999", "-."),
    "from 1, 0.01": ("#D55E00", ":"),
    "from 1, 0.05": ("#D55E00", "-"),
    "from 0, 0.01": ("#0072B2", ":"),
    "from 0, 0.05": ("#0072B2", "-"),
}
"""Color and line of each rule; None is the color of text."""


def draw(results: Results) -> Figure:
    """Draw loss and exponent over rounds for both client rates: means, and bands of a standard error."""
    figure = new_figure(10, 7)
    panels = figure.subplots(2, len(RATES), sharex=True, sharey="row")
    for column, rate in enumerate(RATES):
        for axes, quantity in zip(panels[:, column], ("losses", "exponents"), strict=True):
            for name, (own_color, line) in LOOKS.items():
                color = own_color or ink()
                curves = results.curves(name, rate, quantity)
                if not curves.numel():
                    continue
                mean = curves.mean(0)
                error = standard_error(curves)
                axes.plot(CURVE, mean, line, color=color)
                if axes is panels[0, 0]:
                    axes.lines[-1].set_label(name if name in ("examples", "uniform") else f"learned {name}")
                axes.fill_between(CURVE, mean - error, mean + error, color=color, alpha=0.12, lw=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, lw=0.6)
        panels[0, column].set(title=f"client rate {rate}")
        panels[1, column].set(xlabel="round")
    panels[0, 0].set(ylabel="loss of all training samples")
    panels[1, 0].set(ylabel="exponent")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--form", choices=("parallel", "sequential"), default="parallel")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/learned_weighting.png"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*val_dataloader.*|.*validation_step.*|.*num_workers.*")
    if arguments.command == "run":
        run_all(arguments)
        return
    results = Results()
    print(f"{table(results)}\n\n{envelope_table(results)}")
    save_for_pages(partial(draw, results), arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
