"""The FedHAW authors' MNIST experiment: FedHAW and other rules on their split of MNIST over ten clients.

A. Nakai-Kasai and T. Wadayama: Federated Learning with Hypergradient-based Online Update of Aggregation Weights,
arXiv 2605.00458, section IV-B; https://github.com/a-nakai-k/FedHAW.

    python benchmarks/parity/mnist.py --data SPLIT.npz
    python benchmarks/parity/mnist.py --data SPLIT.npz --errors 0.2          clients that fail, section IV-C
    python benchmarks/parity/mnist.py --data SPLIT.npz --errors 0.5 --variants fedprox fedprox_haw       section IV-D

``SPLIT.npz`` holds ``train_x`` [60000, 28, 28] and ``test_x`` [10000, 28, 28] (bytes 0 to 255), ``train_y`` and
``test_y`` (labels), and the client of each training image under the two splits, ``client_alpha01`` and
``client_alpha1`` [60000]. Images are scaled to [-1, 1], for training and for testing. As in the authors' code, 100
of the test images are FedLAW's proxy data, and every rule is tested on the other 9,900. With
``--errors P`` every client has an error rate up to ``P`` and fails as in the authors' code (their seed, 23); a client
that fails does not train, and the model that was just broadcast is used instead.

Every (variant, seed) writes its rounds to the folder ``--out`` when it is finished and is not repeated, so an
interrupted experiment can be resumed. At the end, and with ``--report-only`` at any time, the script creates a table
and a CSV file (``--results``) and a picture for light and one for dark pages (``--pictures``) from the finished runs.
Variants that have no finished run in ``--out`` keep what the table and the CSV file say of them; so ``--report-only``
without any run draws the stored results again.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from lightning_fedhaw import (
    ErasureChannel,
    FedAdpCallback,
    FedAvgCallback,
    FederatedCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedLWSCallback,
    FedProx,
    IndexPartitioner,
    PublishedFedHAWCallback,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.figures.base import ink, new_figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from pictures import save_for_pages

LEARNING_RATE = 1e-3
BATCH_SIZE = 64
LAST_ROUNDS = 10
TARGET = 0.8
TEST_BATCH_SIZE = 1000
PROXY_SAMPLES = 100
ERROR_SEED = 23

VARIANTS: dict[str, Callable[[], AggregationRule]] = {
    "fedavg": FedAvgCallback,
    "fedadp": lambda: FedAdpCallback(gompertz=5.0),
    "fedlws": lambda: FedLWSCallback(beta=0.1, tau_min=0.0, tau_max=float("inf")),
    "fedhyper": lambda: FedHyperCallback("G", alpha_bounds=(0.2, 5.0), weighting="uniform"),
    "fedlaw": lambda: FedLAWCallback(
        server_epochs=100, batch_size=BATCH_SIZE, lr=0.01, optimizer=torch.optim.SGD, scheduler=None
    ),
    "diagonal": lambda: PublishedFedHAWCallback(lr_gamma=1e-3, lr_lambda=1e-2),
    "exact": lambda: PublishedFedHAWCallback(lr_gamma=1e-3, lr_lambda=1e-2, jacobian="exact"),
    "default": FedHAWCallback,
    "slow": lambda: PublishedFedHAWCallback(lr_gamma=1e-4, lr_lambda=1e-2),
    "fedprox": lambda: FedAvgCallback(weighting="batches"),
    "fedprox_haw": lambda: PublishedFedHAWCallback(lr_gamma=1e-4, lr_lambda=1e-2),
    "fedprox_default": FedHAWCallback,
    "scale_only": lambda: PublishedFedHAWCallback(lr_gamma=1e-3, lr_lambda=0.0),
    "diagonal_weights": lambda: PublishedFedHAWCallback(lr_gamma=0.0, lr_lambda=1e-2),
    "exact_weights": lambda: PublishedFedHAWCallback(lr_gamma=0.0, lr_lambda=1e-2, jacobian="exact"),
}
PROXIMAL = {"fedprox", "fedprox_haw", "fedprox_default"}
MAIN_VARIANTS = ["fedavg", "fedadp", "fedlws", "fedhyper", "fedlaw", "diagonal", "exact", "default"]
ERROR_VARIANTS = ["fedavg", "fedadp", "fedlws", "fedhyper", "slow", "diagonal", "default", "fedlaw"]
LABELS = {
    "fedavg": "FedAvg",
    "fedadp": "FedAdp",
    "fedlws": "FedLWS",
    "fedhyper": "FedHyper-G",
    "fedlaw": "FedLAW",
    "diagonal": "FedHAW, diagonal (authors' rule)",
    "exact": "FedHAW, exact",
    "default": "FedHAW, package defaults",
    "slow": "FedHAW, diagonal, lr_gamma 1e-4 (authors' with errors)",
    "fedprox": "FedProx",
    "fedprox_haw": "FedProx + HAW (authors' rule, lr_gamma 1e-4)",
    "fedprox_default": "FedProx + HAW, package defaults",
    "scale_only": "FedHAW, scale alone",
    "diagonal_weights": "FedHAW, diagonal, weights alone",
    "exact_weights": "FedHAW, exact, weights alone",
}
# Okabe and Ito's colors, told apart with any color vision; line styles tell them apart in gray.
STYLES = {
    "fedavg": (None, "--"),
    "diagonal": ("#0072B2", "-"),
    "exact": ("#D55E00", "-"),
    "default": ("#009E73", "-."),
    "fedadp": ("#CC79A7", "-"),
    "fedlws": ("#E69F00", "--"),
    "fedhyper": ("#56B4E9", "-"),
    "fedlaw": ("#7F7F7F", "-"),
    "slow": ("#D55E00", "-"),
    "fedprox": (None, "--"),
    "fedprox_haw": ("#0072B2", "-"),
    "fedprox_default": ("#009E73", "-."),
    "scale_only": ("#CC79A7", ":"),
    "diagonal_weights": ("#E69F00", ":"),
    "exact_weights": ("#56B4E9", ":"),
}


@dataclass(frozen=True)
class Round:
    """One row of a run's CSV."""

    round: int
    test_accuracy: float
    test_loss: float
    train_loss: float
    scale: float
    weight_min: float
    weight_max: float
    seconds: float
    server_seconds: float = float("nan")
    """Of the aggregation; the mean over the run."""


Runs = dict[str, list[list[Round]]]
"""Finished runs by variant, one list of rounds per seed."""


class MLP(pl.LightningModule):
    """784-128-128-10 with ReLU, negative log-likelihood and plain SGD."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(dim=1)
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.nll_loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.log("val_loss", F.nll_loss(scores, y))
        self.log("val_acc", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Recorder(FederatedCallback):
    """Collects a :class:`Round` after every validation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds: list[Round] = []
        self._since = time.perf_counter()
        self._metrics: dict[str, float] = {}
        self._train_loss = float("nan")

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        self._metrics = dict(report.metrics)
        self._train_loss = float(report.logged["train_loss"].value)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = [value for key, value in self._metrics.items() if key.startswith("weight/")]
        now = time.perf_counter()
        self.rounds.append(
            Round(
                round=len(self.rounds),
                test_accuracy=float(trainer.callback_metrics["val_acc"]),
                test_loss=float(trainer.callback_metrics["val_loss"]),
                train_loss=self._train_loss,
                scale=self._metrics.get("scale", 1.0),
                weight_min=min(weights, default=float("nan")),
                weight_max=max(weights, default=float("nan")),
                seconds=now - self._since,
            )
        )
        self._since = now
        if len(self.rounds) % 10 == 0:
            row = self.rounds[-1]
            print(f"{self.name} round {row.round}: accuracy {row.test_accuracy:.4f}, scale {row.scale:.4f}", flush=True)


# ---------------------------------------------------------------------- running


@dataclass(frozen=True)
class Data:
    """Training, test and proxy set, and each client's indices into the training set."""

    train: TensorDataset
    test: Dataset[Any]
    proxy: Dataset[Any]
    clients: list[list[int]]


def load(path: Path, split: str) -> Data:
    """The split; which test images are proxy data does not depend on anything."""
    with np.load(path) as arrays:
        train, test = (
            TensorDataset(_scaled(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"]).long())
            for part in ("train", "test")
        )
        owner = arrays[f"client_{split}"]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(42)).tolist()
    proxy, rest = Subset(test, order[:PROXY_SAMPLES]), TensorDataset(*test[sorted(order[PROXY_SAMPLES:])])
    return Data(train, rest, proxy, [np.flatnonzero(owner == k).tolist() for k in range(int(owner.max()) + 1)])


def _scaled(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).flatten(1).float() / 127.5 - 1


def run(
    variant: str, seed: int, rounds: int, lr: float, errors: float, data: Data, *observers: pl.Callback
) -> list[Round]:
    """Train one variant with one seed; the initial model and the clients' batches depend on the seed alone."""
    torch.manual_seed(seed)
    recorder = Recorder(f"{variant}, seed {seed},")
    callbacks: list[pl.Callback] = [VARIANTS[variant](), recorder, *observers]
    if variant in PROXIMAL:
        callbacks.append(FedProx(1e-3))
    if errors:
        callbacks.append(ErasureChannel(max_probability=errors, legacy_seed=ERROR_SEED, fallback="zero_update"))
    trainer = FederatedTrainer(
        rounds=rounds,
        local_epochs=1,
        seed=seed,
        callbacks=callbacks,
        client_eval=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # A batch of indices at a time: collating 10,000 samples one by one would cost a fifth of a run.
    batches = BatchSampler(SequentialSampler(data.test), TEST_BATCH_SIZE, drop_last=False)
    # FedLAW alone: FedHAW's guard would use it too, and the comparison is of what rules do without data on the server.
    proxy = None
    if variant == "fedlaw":
        proxy = data.proxy
    module = FederatedDataModule(
        data.train,
        partitioner=IndexPartitioner(data.clients),
        batch_size=BATCH_SIZE,
        val=DataLoader(data.test, sampler=batches, batch_size=None),
        proxy=proxy,
    )
    trainer.fit(MLP(lr), datamodule=module)
    server = trainer.federation_summary["seconds"]["aggregation"] / rounds
    return [replace(row, server_seconds=server) for row in recorder.rounds]


def run_file(args: argparse.Namespace, variant: str, seed: int) -> Path:
    return args.out / f"mnist_{args.split}_{args.rounds}_{variant}{apart(args)}_seed{seed}.csv"


def apart(args: argparse.Namespace) -> str:
    """What tells an experiment's files from the main one's."""
    rate = "" if args.lr == LEARNING_RATE else f"_lr{args.lr:g}"
    return rate + (f"_errors{args.errors:g}" if args.errors else "")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def read_run(path: Path) -> list[Round]:
    kinds = {f.name: int if f.name == "round" else float for f in fields(Round)}
    with path.open(newline="") as file:
        return [Round(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def finished(args: argparse.Namespace) -> Runs:
    """The runs that are there."""
    found: Runs = {}
    for variant in args.variants:
        paths = [run_file(args, variant, seed) for seed in args.seeds]
        if runs := [read_run(path) for path in paths if path.exists()]:
            found[variant] = runs
    return found


# ---------------------------------------------------------------------- reporting


def column(runs: Sequence[Sequence[Round]], name: str) -> np.ndarray:
    """``[seeds, rounds]``."""
    return np.array([[getattr(row, name) for row in rounds] for rounds in runs])


def spread(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    many = values.shape[axis] > 1
    return values.mean(axis), values.std(axis, ddof=1) if many else np.zeros_like(values.mean(axis))


def first_above(accuracy: np.ndarray, target: float) -> np.ndarray:
    """``[seeds]``: the first round (from 1) that reaches an accuracy; infinity where none does."""
    reached = accuracy >= target
    return np.where(reached.any(1), reached.argmax(1) + 1.0, np.inf)


def above_for_good(accuracy: np.ndarray, target: float) -> np.ndarray:
    """``[seeds]``: the first round (from 1) after which an accuracy is never lost again; infinity where it is."""
    below = accuracy[:, ::-1] < target
    stayed = np.where(below.any(1), below.argmax(1), accuracy.shape[1])
    return np.where(stayed > 0, accuracy.shape[1] - stayed + 1.0, np.inf)


def table(runs: Runs) -> str:
    """One row per variant, as markdown; mean and standard deviation over seeds."""
    head = (
        "rule",
        "seeds",
        f"accuracy, mean of last {LAST_ROUNDS} rounds (%)",
        "final accuracy (%)",
        f"first round above {TARGET:.0%}",
        f"above {TARGET:.0%} for good from",
        "final scale",
        "median seconds a round",
        "server milliseconds a round",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for variant, seeds in runs.items():
        accuracy = column(seeds, "test_accuracy")
        cells = (
            LABELS[variant],
            str(len(seeds)),
            _cell(100 * accuracy[:, -LAST_ROUNDS:].mean(1), 2),
            _cell(100 * accuracy[:, -1], 2),
            _cell(first_above(accuracy, TARGET), 1),
            _cell(above_for_good(accuracy, TARGET), 1),
            _cell(column(seeds, "scale")[:, -1], 4),
            f"{np.median(column(seeds, 'seconds')):.2f}",
            f"{1e3 * np.median(column(seeds, 'server_seconds')):.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray, digits: int) -> str:
    if not np.isfinite(values).all():
        reached = int(np.isfinite(values).sum())
        return f"reached by {reached} of {len(values)} seeds"
    mean, deviation = spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def tidy(runs: Runs) -> list[dict[str, Any]]:
    """One row per variant and round: means and standard deviations over seeds."""
    rows = []
    for variant, seeds in runs.items():
        columns = {name: spread(column(seeds, name)) for name in ("test_accuracy", "test_loss", "train_loss", "scale")}
        for t in range(len(seeds[0])):
            row: dict[str, Any] = {"variant": variant, "seeds": len(seeds), "round": t}
            for name, (mean, deviation) in columns.items():
                row[f"{name}_mean"], row[f"{name}_std"] = f"{mean[t]:.6f}", f"{deviation[t]:.6f}"
            rows.append(row)
    return rows


def kept(path: Path, runs: Runs, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of a CSV file by variant, for the variants that are wanted and have no finished run."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if not path.exists():
        return rows
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["variant"] in args.variants and row["variant"] not in runs:
                rows.setdefault(row["variant"], []).append(row)
    return rows


def lines_of(markdown: str) -> dict[str, str]:
    """The lines of a table by the rule's name."""
    lines: dict[str, str] = {}
    for line in markdown.splitlines():
        lines[line.split("|")[1].strip()] = line
    return lines


def draw(rows: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Accuracy and scale by round; bands are one standard deviation over seeds."""
    figure = new_figure(10.5, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for variant, rounds in rows.items():
        own_color, style = STYLES[variant]
        color = own_color or ink()
        for axes, name, factor in ((left, "test_accuracy", 100), (right, "scale", 1)):
            mean = factor * np.array([float(row[f"{name}_mean"]) for row in rounds])
            deviation = factor * np.array([float(row[f"{name}_std"]) for row in rounds])
            at = np.arange(1, len(mean) + 1)
            axes.plot(at, mean, style, color=color, lw=1.8, label=LABELS[variant])
            axes.fill_between(at, mean - deviation, mean + deviation, color=color, alpha=0.18, lw=0)
    left.set(xlabel="communication round", ylabel="test accuracy (%)", title="Accuracy of the global model")
    right.set(xlabel="communication round", ylabel="scale  exp(γ)", title="Scale of the averaged model")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, handlelength=3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        axes.margins(x=0.01)
    figure.suptitle(title, fontsize=12)
    return figure


def report(runs: Runs, args: argparse.Namespace) -> None:
    name = "mnist_parity"
    name += "" if args.split == "alpha01" else f"_{args.split}"
    name += apart(args)
    args.results.mkdir(parents=True, exist_ok=True)
    table_file = args.results / f"{name}.md"
    rows = kept(args.results / f"{name}.csv", runs, args)
    if not runs and not rows:
        print("No finished runs.")
        return
    for row in tidy(runs):
        rows.setdefault(row["variant"], []).append(row)
    rows = {variant: rows[variant] for variant in args.variants if variant in rows}
    lines = lines_of(table(runs))
    if table_file.exists():
        lines = lines_of(table_file.read_text()) | lines
    markdown = table({}) + "".join(f"{lines[LABELS[variant]]}\n" for variant in rows)
    table_file.write_text(markdown)
    write_csv(args.results / f"{name}.csv", [row for rounds in rows.values() for row in rounds])
    alpha = {"alpha01": "0.1", "alpha1": "1.0"}[args.split]
    seeds = max(int(rounds[0]["seeds"]) for rounds in rows.values())
    title = f"MNIST, ten clients, the FedHAW authors' Dirichlet({alpha}) split, mean of {seeds} seeds"
    title += f", error rates up to {args.errors:g}" if args.errors else ""
    save_for_pages(partial(draw, rows, title), args.pictures / f"{name}.png", dpi=150)
    print(markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the split, an npz file")
    parser.add_argument("--out", type=Path, default=Path("outputs/mnist_parity"), help="folder of the finished runs")
    parser.add_argument("--split", choices=["alpha01", "alpha1"], default="alpha01")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="by default the table's")
    parser.add_argument("--errors", type=float, default=0.0, help="largest error rate of a client")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="local learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of table and CSV")
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"), help="folder of the picture")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report on what is there")
    args = parser.parse_args()
    if args.data is None and not args.report_only:
        parser.error("runs need `--data`, the split")
    args.variants = args.variants or (ERROR_VARIANTS if args.errors else MAIN_VARIANTS)
    torch.set_num_threads(args.threads)
    data = None
    for seed in args.seeds:
        for variant in args.variants:
            path = run_file(args, variant, seed)
            if args.report_only or path.exists():
                continue
            data = data or load(args.data, args.split)
            write_csv(path, [asdict(row) for row in run(variant, seed, args.rounds, args.lr, args.errors, data)])
    report(finished(args), args)


if __name__ == "__main__":
    main()
