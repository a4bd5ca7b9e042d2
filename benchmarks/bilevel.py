"""Compare bilevel rules on MNIST with the settings of FedNest: hyper-representation and loss tuning.

    python benchmarks/bilevel.py run MNIST.npz [--tasks representation imbalance] [--splits iid non-iid] [--seeds 0 1]
    python benchmarks/bilevel.py long MNIST.npz              non-iid hyper-representation over 500 outer steps
    python benchmarks/bilevel.py table
    python benchmarks/bilevel.py plot PICTURE.png

``MNIST.npz`` has train_x, train_y, test_x and test_y. 100 clients, 10 of them a round, equal weights, an MLP 784-200-10
with dropout 0.5 and SGD 0.01, five local epochs. Hyper-representation: the first layer is the upper variable, the head
the lower one, batches of 64, rate 0.01. Loss tuning: class sizes fall from 6,000 to 61, a scale and a shift for each
class are the upper variables, all weights the lower ones, batches of 10, rate 0.02. The split is iid with half of each
client's samples held out, or two shards of one class a client with a fifth held out.

Every run adds one line to ``benchmarks/results/bilevel.jsonl`` and is not repeated. Curves are over communication
rounds; the test set is evaluated after every outer step.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from journal import Journal
from matplotlib.figure import Figure
from pictures import save_for_pages
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FederatedTrainer, IIDPartitioner, ShardPartitioner
from lightning_fedhaw.bilevel import AggITDCallback, BilevelRule, FedNestCallback, SimFBOCallback
from lightning_fedhaw.figures.base import new_figure

JOURNAL = Journal("bilevel", "task", "split", "rule", "seed", "outer_steps")
TASKS = ("representation", "imbalance")
SPLITS = ("iid", "non-iid")
LOOKS = {
    "AggITD": ("#0072B2", "-"),
    "FedNest": ("#D55E00", "-"),
    "LFedNest": ("#E69F00", "--"),
    "SimFBO": ("#009E73", "-."),
    "no tuning": ("#999999", ":"),
}
"""Color and line of each rule."""
RULES = tuple(LOOKS)
OUTER_STEPS = 100
LONG_OUTER_STEPS = 500
CLIENTS = 100
LOWER_LR = 0.01
UPPER_LR = {"representation": 0.01, "imbalance": 0.02}
BATCH_SIZE = {"representation": 64, "imbalance": 10}
LOWER_ROUNDS = {"representation": 1, "imbalance": 3}
TERMS = {"representation": 5, "imbalance": 3}
CLASS_SIZES = [ceil(6000 * 0.01 ** (i / 9)) for i in range(10)]


class Model(pl.LightningModule):
    """An MLP whose lower loss is that of one of the two tasks."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(200, 10)
        # As in the authors' code: half of each logit and no shift at the beginning.
        self.scale = nn.Parameter(torch.zeros(10))
        self.shift = nn.Parameter(torch.zeros(10))
        if task == "representation":
            self.scale.requires_grad_(False)
            self.shift.requires_grad_(False)
        weights = torch.tensor([0.01 ** (-i / 9) for i in range(10)])
        self.register_buffer("class_weights", weights / weights.norm(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        if self.task == "imbalance":
            return cross_entropy(logits * torch.sigmoid(self.scale) + self.shift, batch[1])
        # The norm is not squared in the authors' code, which adds that of the bias: its Hessian is unbounded near zero,
        # where the bias is pulled, and the series explodes there.
        return cross_entropy(logits, batch[1]) + 0.05 * self.head.weight.norm()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        weight = self.class_weights if self.task == "imbalance" else None
        self.log("val_loss", cross_entropy(logits, batch[1], weight=weight))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LOWER_LR)


def rule_of(name: str, task: str) -> Any:
    """Return a rule with the settings of a task."""
    if name == "no tuning":
        return FedAvgCallback("uniform")
    upper: str | list[str] = "body" if task == "representation" else ["scale", "shift"]
    settings: dict[str, Any] = {"upper_lr": UPPER_LR[task]}
    if name == "AggITD":
        # As many factors as FedNest has in its series; here each is a round of lower training, too.
        return AggITDCallback(upper, lower_rounds=TERMS[task], **settings)
    if name == "SimFBO":
        return SimFBOCallback(upper, vector_lr=0.1, lower_lr=0.1, radius=10.0, **settings)
    return FedNestCallback(upper, lower_rounds=LOWER_ROUNDS[task], terms=TERMS[task], variant=name, **settings)


@lru_cache
def arrays(path: str, task: str) -> tuple[TensorDataset, DataLoader[Any]]:
    """Read training samples and test batches; the classes of loss tuning are cut to their sizes."""
    data = np.load(path)
    train_x, train_y = scaled(data["train_x"]), torch.tensor(data["train_y"]).long()
    if task == "imbalance":
        chosen = [torch.nonzero(train_y == label).flatten()[:size] for label, size in enumerate(CLASS_SIZES)]
        index = torch.cat(chosen).sort().values
        train_x, train_y = train_x[index], train_y[index]
    images, labels = scaled(data["test_x"]), torch.tensor(data["test_y"]).long()
    # Cut once: collating them anew for every evaluation took a third of a run.
    batches = list(zip(images.split(1000), labels.split(1000), strict=True))
    return TensorDataset(train_x, train_y), DataLoader(batches, batch_size=None)


def scaled(images: np.ndarray) -> Tensor:
    """Return images with the mean and standard deviation of MNIST's pixels taken out."""
    pixels = torch.tensor(images).float().reshape(len(images), 784)
    if pixels.max() > 1.5:
        pixels = pixels / 255
    return (pixels - 0.1307) / 0.3081


class Curve(pl.Callback):
    """Test accuracy by communication round."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = 100 * float(trainer.callback_metrics["val_acc"])
        self.points.append((trainer.global_step, round(accuracy, 3)))


def run(path: str, task: str, split: str, rule_name: str, seed: int, outer_steps: int) -> dict[str, Any]:
    """Run one federation; rules without outer steps run as many rounds as AggITD."""
    train, test = arrays(path, task)
    rule = rule_of(rule_name, task)
    # Rules without lower rounds of their own run as many rounds as AggITD.
    rounds_per_outer_step = rule_of("AggITD", task).rounds_per_outer_step
    if isinstance(rule, BilevelRule) and not isinstance(rule, SimFBOCallback):
        rounds_per_outer_step = rule.rounds_per_outer_step
    torch.manual_seed(seed)
    curve = Curve()
    is_iid = split == "iid"
    partitioner = IIDPartitioner() if is_iid else ShardPartitioner(2)
    trainer = FederatedTrainer(
        rounds=outer_steps * rounds_per_outer_step,
        clients_per_round=10,
        num_clients=CLIENTS,
        partitioner=partitioner,
        client_val_fraction=0.5 if is_iid else 0.2,
        local_epochs=5,
        seed=seed,
        client_eval=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=rounds_per_outer_step,
        callbacks=[rule, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    begin = time.perf_counter()
    trainer.fit(Model(task), FederatedDataModule(train, batch_size=BATCH_SIZE[task], val=test))
    seconds = time.perf_counter() - begin
    return {
        "task": task,
        "split": split,
        "rule": rule_name,
        "seed": seed,
        "outer_steps": outer_steps,
        "rounds_per_outer_step": rounds_per_outer_step,
        "curve": curve.points,
        "seconds": round(seconds, 1),
    }


def run_missing(path: str, cells: Sequence[tuple[str, str, str, int, int]]) -> None:
    """Run what is missing of some cells: task, split, rule, seed and outer steps."""
    for cell in cells:
        if not JOURNAL.has(*cell):
            JOURNAL.add(run(path, *cell))


def last_mean(result: dict[str, Any], until: int | None = None) -> float:
    """Return the mean test accuracy of the last tenth of a curve, up to a round."""
    values = [accuracy for rounds, accuracy in result["curve"] if until is None or rounds <= until]
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def table() -> str:
    """Return the table in Markdown: accuracy after equal rounds and after equal outer steps."""
    runs = JOURNAL.runs()
    lines = [
        "| task | split | rule | seeds | rounds an outer step | after the rounds of AggITD | at the end | rounds |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for outer_steps in (OUTER_STEPS, LONG_OUTER_STEPS):
        for task in TASKS:
            shared = outer_steps * rule_of("AggITD", task).rounds_per_outer_step
            for split in SPLITS:
                for rule in RULES:
                    chosen = [
                        r
                        for r in runs
                        if (r["task"], r["split"], r["rule"], r["outer_steps"]) == (task, split, rule, outer_steps)
                    ]
                    if not chosen:
                        continue
                    equal = ", ".join(f"{last_mean(r, shared):.1f}" for r in chosen)
                    end = ", ".join(f"{last_mean(r):.1f}" for r in chosen)
                    per_step = chosen[0]["rounds_per_outer_step"]
                    rounds = chosen[0]["curve"][-1][0]
                    row = (task, split, rule, len(chosen), per_step, equal, end, rounds)
                    lines.append("| " + " | ".join(str(entry) for entry in row) + " |")
    return "\n".join(lines)


def draw() -> Figure:
    """Draw the curves of all runs of 100 outer steps, a panel for each task and split."""
    figure = new_figure(9, 6.2)
    panels = figure.subplots(len(TASKS), len(SPLITS), sharey="row")
    runs = JOURNAL.runs()
    for row, task in enumerate(TASKS):
        for column, split in enumerate(SPLITS):
            axes = panels[row, column]
            for rule, (color, line) in LOOKS.items():
                for result in runs:
                    key = (result["task"], result["split"], result["rule"], result["outer_steps"])
                    if key == (task, split, rule, OUTER_STEPS):
                        axes.plot(*zip(*result["curve"], strict=True), line, color=color, lw=1.2)
            axes.set_title(f"{task}, {split}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, lw=0.6)
        panels[row, 0].set(ylabel="test accuracy (%)")
    for axes in panels[-1]:
        axes.set(xlabel="communication round")
    for rule, (color, line) in LOOKS.items():
        panels[0, 0].plot([], [], line, color=color, label=rule)
    figure.legend(loc="outside lower center", ncols=len(LOOKS), frameon=False)
    return figure


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "long", "table", "plot"))
    parser.add_argument("path", nargs="?", help="the data, or the picture")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--outer-steps", type=int, default=OUTER_STEPS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.command == "table":
        print(table())
        return
    if options.path is None:
        parser.error(f"`{options.command}` needs a path")
    if options.command == "plot":
        save_for_pages(draw, Path(options.path))
        return
    cells = []
    if options.command == "long":
        cells = [("representation", "non-iid", rule, 0, LONG_OUTER_STEPS) for rule in ("AggITD", "FedNest")]
    else:
        # A seed at a time, so that early results are there for all.
        for seed in options.seeds:
            for task in options.tasks:
                for split in options.splits:
                    cells += [(task, split, rule, seed, options.outer_steps) for rule in options.rules]
    run_missing(options.path, cells)


if __name__ == "__main__":
    main()
