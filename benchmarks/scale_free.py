"""Compare the scale-free FedHAW, which needs no tuning, with FedAvg and the tuned published rule.

    python benchmarks/scale_free.py --data SPLIT.npz [--seeds 0 1 2 3 4]

``SPLIT.npz`` is the file of ``parity/mnist.py``. The cells of the study are federations in four families: MNIST with
the authors' split, the digits of scikit-learn, Synthetic(1, 1), and a small CNN. They vary one thing at a time: a small
and a well-tuned local learning rate, local epochs, batch size, optimizer, partial participation, mislabeled clients.

Every run has 40 rounds, and its score is the mean test accuracy of the last ten. The published rule uses the best of
five step sizes on seed 0, for each cell separately. The scale-free rule has one setting for all cells. Every run is
stored as a JSON file in ``--out`` and is not repeated, so an interrupted study can be resumed. ``--report-only``
creates the table and the picture from the stored runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import (
    DirichletPartitioner,
    FedAvgCallback,
    FederatedTrainer,
    FedHAWCallback,
    IndexPartitioner,
    PublishedFedHAWCallback,
)
from lightning_fedhaw.data import Partitioner
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.report.history import RunHistory

ROUNDS = 40
LAST = 10
RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Values of the published rule's ``lr_gamma``; ``lr_lambda`` is ten times as large."""

Data = tuple[TensorDataset, TensorDataset, Partitioner]


def published(rate: float) -> AggregationRule:
    return PublishedFedHAWCallback(lr_gamma=rate, lr_lambda=10 * rate)


RULES: dict[str, Callable[[], AggregationRule]] = {
    "FedAvg": FedAvgCallback,
    **{f"published {rate:g}": partial(published, rate) for rate in RATES},
    "default": FedHAWCallback,
    "lr_gamma=0": partial(FedHAWCallback, lr_gamma=0.0),
}
TUNED = "published, tuned"
SHOWN = ["FedAvg", TUNED, "default", "lr_gamma=0"]


# ---------------------------------------------------------------------- federations


@lru_cache
def mnist(path: Path, samples: int = 3000) -> Data:
    """Return some images of the authors' split with their clients; pixels are in [-1, 1]."""
    with np.load(path) as file:
        chosen = torch.randperm(len(file["train_y"]), generator=torch.Generator().manual_seed(0))[:samples].numpy()
        owner = file["client_alpha01"][chosen]
        train = _images(file["train_x"][chosen], file["train_y"][chosen])
        test = _images(file["test_x"][:2000], file["test_y"][:2000])
    return train, test, IndexPartitioner([np.flatnonzero(owner == k).tolist() for k in range(10)])


def _images(x: np.ndarray, y: np.ndarray) -> TensorDataset:
    return TensorDataset(torch.as_tensor(x).flatten(1).float() / 127.5 - 1, torch.as_tensor(y).long())


@lru_cache
def pictures(path: Path) -> Data:
    """Return the same images in two dimensions, with a new split."""
    train, test, _ = mnist(path)
    shaped = [TensorDataset(x.view(-1, 1, 28, 28), y) for x, y in (train.tensors, test.tensors)]
    return shaped[0], shaped[1], DirichletPartitioner(alpha=0.3)


@lru_cache
def digits() -> Data:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return TensorDataset(x[:1347], y[:1347]), TensorDataset(x[1347:], y[1347:]), DirichletPartitioner(alpha=0.1)


@lru_cache
def mislabeled() -> Data:
    """Return the digits in an even split, where three of ten clients have random labels."""
    train, test, _ = digits()
    x, y = train.tensors
    draw = np.random.default_rng(0)
    owner = draw.integers(0, 10, len(y))
    wrong = torch.as_tensor(np.isin(owner, [1, 4, 7]))
    y = torch.where(wrong, torch.as_tensor(draw.integers(0, 10, len(y))), y)
    return TensorDataset(x, y), test, IndexPartitioner([np.flatnonzero(owner == k).tolist() for k in range(10)])


@lru_cache
def synthetic(clients: int = 30) -> Data:
    """Return Synthetic(1, 1) (Li et al., FedProx): clients differ in inputs and true model; 80 % are for training."""
    draw = np.random.default_rng(0)
    deviation = np.sqrt(np.arange(1.0, 61) ** -1.2)
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for _ in range(clients):
        samples = int(min(50 + np.exp(draw.normal(4, 1)), 600))
        model, inputs = draw.normal(0, 1), draw.normal(0, 1)
        mean, weight, bias = draw.normal(inputs, 1, 60), draw.normal(model, 1, (10, 60)), draw.normal(model, 1, 10)
        x = draw.normal(mean, deviation, (samples, 60))
        y, cut = (x @ weight.T + bias).argmax(1), int(0.8 * samples)
        parts["train"].append((x[:cut], y[:cut]))
        parts["test"].append((x[cut:], y[cut:]))
    ends = np.cumsum([0, *(len(y) for _, y in parts["train"])])
    train, test = (
        TensorDataset(
            torch.tensor(np.concatenate([x for x, _ in part]), dtype=torch.float32),
            torch.tensor(np.concatenate([y for _, y in part])),
        )
        for part in parts.values()
    )
    return train, test, IndexPartitioner([list(range(a, b)) for a, b in itertools.pairwise(ends)])


# ---------------------------------------------------------------------- models and cells


def mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def logistic() -> nn.Module:
    model = nn.Linear(60, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


@dataclass(frozen=True)
class Cell:
    """A federation and its local training."""

    data: Callable[..., Data]
    model: Callable[[], nn.Module]
    lr: float
    epochs: int = 1
    batch_size: int = 32
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    clients_per_round: int | None = None


IMAGES, SMALL = partial(mlp, 784, 128), partial(mlp, 64, 64)
CELLS = {
    "MNIST, SGD 0.001": Cell(mnist, IMAGES, 0.001, batch_size=64),
    "MNIST, SGD 0.05": Cell(mnist, IMAGES, 0.05, batch_size=64),
    "MNIST, SGD 0.05, E=5": Cell(mnist, IMAGES, 0.05, epochs=5, batch_size=64),
    "MNIST, SGD 0.02, batch 10": Cell(mnist, IMAGES, 0.02, batch_size=10),
    "MNIST, Adam 0.001": Cell(mnist, IMAGES, 0.001, batch_size=64, optimizer=torch.optim.Adam),
    "digits, SGD 0.01": Cell(digits, SMALL, 0.01),
    "digits, SGD 0.2": Cell(digits, SMALL, 0.2),
    "digits, SGD 0.2, E=5": Cell(digits, SMALL, 0.2, epochs=5),
    "digits, 3 of 10 mislabeled": Cell(mislabeled, SMALL, 0.2, epochs=3),
    "Synthetic, SGD 0.001": Cell(synthetic, logistic, 0.001, batch_size=10),
    "Synthetic, SGD 0.02": Cell(synthetic, logistic, 0.02, batch_size=10),
    "Synthetic, SGD 0.02, 6 of 30": Cell(synthetic, logistic, 0.02, batch_size=10, clients_per_round=6),
    "CNN, SGD 0.005": Cell(pictures, cnn, 0.005),
    "CNN, SGD 0.1": Cell(pictures, cnn, 0.1),
    "CNN, Adam 0.002": Cell(pictures, cnn, 0.002, optimizer=torch.optim.Adam),
}


class Model(pl.LightningModule):
    """The model of a cell, with its optimizer."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.net, self.cell = cell.model(), cell

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.cell.optimizer(self.parameters(), lr=self.cell.lr)  # type: ignore[call-arg]


def run(cell: Cell, rule: str, seed: int, path: Path) -> dict[str, Any]:
    """Run a federation; a run that diverges keeps its last accuracy."""
    from_file = cell.data in (mnist, pictures)
    train, test, partitioner = cell.data(path) if from_file else cell.data()
    torch.manual_seed(seed)
    history = RunHistory()
    trainer = FederatedTrainer(
        rounds=ROUNDS,
        local_epochs=cell.epochs,
        clients_per_round=cell.clients_per_round,
        num_clients=partitioner.num_clients or 10,
        partitioner=partitioner,
        seed=seed,
        callbacks=[RULES[rule](), history],
        client_eval=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    diverged = False
    loaders = DataLoader(train, batch_size=cell.batch_size, shuffle=True), DataLoader(test, batch_size=1000)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(Model(cell), *loaders)
    except FloatingPointError:
        diverged = True
    accuracy = [float(value) for value in history.curve("val_acc")]
    accuracy += [accuracy[-1] if accuracy else 0.0] * (ROUNDS - len(accuracy))
    return {"accuracy": accuracy, "diverged": diverged, "seconds": time.perf_counter() - begin}


# ---------------------------------------------------------------------- the study


class Study:
    """The runs by cell, rule and seed, each in a file."""

    def __init__(self, out: Path, data: Path, run_missing: bool) -> None:
        self.out, self.data, self.run_missing = out, data, run_missing

    def get(self, cell: str, rule: str, seed: int) -> dict[str, Any] | None:
        """Return a stored run; run it if it is missing and ``run_missing`` is true."""
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{cell}-{rule}-{seed}")
        path = self.out / f"{name}.json"
        if not path.exists():
            if not self.run_missing:
                return None
            result = run(CELLS[cell], rule, seed, self.data)
            print(f"{cell}, {rule}, seed {seed}: {_score(result):.2f} in {result['seconds']:.0f} s", flush=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(result))
            os.replace(unfinished, path)
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored

    def tuned(self, cell: str) -> str | None:
        """Return the published rule with the best step size on seed 0."""
        found = {rule: self.get(cell, rule, 0) for rule in (f"published {rate:g}" for rate in RATES)}
        scores = {rule: _score(result) for rule, result in found.items() if result is not None}
        return max(scores, key=lambda rule: scores[rule]) if len(scores) == len(RATES) else None

    def row(self, cell: str, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
        """Return the finished runs of a cell, by column of the table."""
        runs = {}
        for shown in SHOWN:
            rule = self.tuned(cell) if shown == TUNED else shown
            if rule is not None:
                runs[shown] = [r for seed in seeds if (r := self.get(cell, rule, seed)) is not None]
        return runs


def _score(result: dict[str, Any]) -> float:
    return float(100 * np.mean(result["accuracy"][-LAST:]))


def table(study: Study, seeds: list[int]) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """Return the Markdown table, and the accuracies ``[seeds]`` by cell and rule."""
    lines = ["| cell | " + " | ".join(SHOWN) + " | best published rate |", "|---|" + "---:|" * (len(SHOWN) + 1)]
    scores: dict[str, dict[str, np.ndarray]] = {}
    for cell in CELLS:
        runs = study.row(cell, seeds)
        scores[cell] = {name: np.array([_score(r) for r in results]) for name, results in runs.items() if results}
        cells = []
        for name in SHOWN:
            values = scores[cell].get(name)
            if values is None:
                cells.append("")
                continue
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            lost = sum(r["diverged"] for r in runs[name])
            cells.append(f"{values.mean():.1f} ± {spread:.1f}" + (f" ({lost} diverged)" if lost else ""))
        best = (study.tuned(cell) or "").removeprefix("published ")
        lines.append(f"| {cell} | " + " | ".join(cells) + f" | {best} |")
    return "\n".join(lines) + "\n", scores


def draw(scores: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw the gain of each rule over FedAvg for every seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    looks = {TUNED: ("#D55E00", "s"), "default": ("#0072B2", "o"), "lr_gamma=0": ("#009E73", "^")}
    names = [cell for cell in scores if "FedAvg" in scores[cell]]
    for offset, (rule, (color, marker)) in zip((0.22, 0.0, -0.22), looks.items(), strict=True):
        for at, cell in enumerate(reversed(names)):
            if rule not in scores[cell]:
                continue
            shared = min(len(scores[cell][rule]), len(scores[cell]["FedAvg"]))
            gains = scores[cell][rule][:shared] - scores[cell]["FedAvg"][:shared]
            label = {"published, tuned": "published rule, best of five rates", "default": "FedHAWCallback()"}.get(
                rule, rule
            )
            axes.plot(gains, np.full(shared, at + offset), marker, color=color, alpha=0.35, ms=4)
            axes.plot(
                *(gains.mean(), at + offset, marker),
                **{"color": color, "ms": 8, "label": label if at == 0 else None},
            )
    axes.axvline(0, color="black", lw=1)
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks([-50, -20, -5, -2, 0, 2, 5, 20, 50], ["-50", "-20", "-5", "-2", "0", "2", "5", "20", "50"])
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set(xlabel="accuracy over FedAvg's, mean of the last ten rounds (points; small: one seed)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the split of MNIST, an npz file")
    parser.add_argument("--out", type=Path, default=Path("outputs/scale_free"), help="folder of the finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/scale_free.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/scale_free.png"))
    parser.add_argument("--report-only", action="store_true", help="run nothing, report the stored runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        study = Study(args.out, args.data, run_missing=True)
        for seed in args.seeds:  # one seed at a time, so that there are early results for every cell
            for cell in CELLS:
                study.row(cell, [seed])
    markdown, scores = table(Study(args.out, args.data, run_missing=False), args.seeds)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(markdown)
    draw(scores, args.picture)
    print(markdown)


if __name__ == "__main__":
    main()
