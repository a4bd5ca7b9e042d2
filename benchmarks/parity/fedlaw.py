"""Look for the FedLAW paper's findings about its learned scale in small federations.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks. ICML 2023,
section 4: with adaptive global weight shrinking the scale is below 1, rises as training converges, and is smaller if
clients have similar data.

    python benchmarks/parity/fedlaw.py --data SPLIT.npz

``SPLIT.npz`` holds MNIST as ``mnist.py`` describes; without it, only scikit-learn's digits are used. Local training
is that of the paper: SGD 0.08, times 0.99 a round, momentum 0.9, weight decay 5e-4, 20 clients, full participation. The
model, the images (the paper uses CIFAR-10), the number of samples and the batch size differ.

Every run is written to the folder ``--out`` when it is finished and is not repeated. At the end, and with
``--report-only`` at any time, the script creates a table (``--results``) and a picture (``--pictures``) from the
finished runs.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from mnist import spread, write_csv
from pictures import save_for_pages  # in a folder that the file above adds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import (
    DirichletPartitioner,
    FederatedCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedLAWCallback,
    IIDPartitioner,
)
from lightning_fedhaw.figures.base import ink, new_figure

ROUNDS, CLIENTS, PROXY_SAMPLES, TEST_SAMPLES = 40, 20, 200, 2000
EARLY, MIDDLE, LATE = slice(0, 10), slice(10, 20), slice(30, 40)
"""The rounds that are compared: "below 1" is of the late ones, "rises" from the middle to the late ones."""
FEDERATIONS = ("digits", "mnist2000", "mnist4000")
SPLITS: dict[str, Callable[[], Any]] = {
    "IID": IIDPartitioner,
    "Dirichlet(1)": lambda: DirichletPartitioner(1.0),
    "Dirichlet(0.1)": lambda: DirichletPartitioner(0.1),
}
# Okabe and Ito's colors; line styles tell them apart in gray.
STYLES = {"IID": ("#0072B2", "-"), "Dirichlet(1)": ("#E69F00", "--"), "Dirichlet(0.1)": ("#D55E00", ":")}


@dataclass(frozen=True)
class Round:
    """One row of a run's CSV."""

    scale: float
    test_accuracy: float
    train_loss: float


@dataclass(frozen=True)
class Task:
    """Data, a maker of networks, and the batch size."""

    train: TensorDataset
    test: TensorDataset
    network: Callable[[], nn.Module]
    batch_size: int


Runs = dict[tuple[str, int, str], np.ndarray]
"""By federation, local epochs and split: scale and accuracy, ``[seeds, rounds, 2]``."""


def digits() -> Task:
    """1,437 images of 8 x 8 and the paper's MLP."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 8 - 1, labels, test_size=0.2, random_state=0, stratify=labels)
    x, test_x, y, test_y = (torch.as_tensor(part) for part in parts)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    return Task(TensorDataset(x.float(), y), TensorDataset(test_x.float(), test_y), network, batch_size=16)


def mnist(path: Path, samples: int) -> Task:
    """Some images of MNIST and a small convolutional network."""
    draw = np.random.default_rng(0)
    with np.load(path) as arrays:
        sizes = {"train": samples, "test": TEST_SAMPLES}
        picked = {part: draw.permutation(len(arrays[f"{part}_y"]))[:size] for part, size in sizes.items()}
        train, test = (
            TensorDataset(
                torch.from_numpy(arrays[f"{part}_x"][index])[:, None].float() / 127.5 - 1,
                torch.from_numpy(arrays[f"{part}_y"][index]).long(),
            )
            for part, index in picked.items()
        )

    def network() -> nn.Module:
        layers = [nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10))

    return Task(train, test, network, batch_size=32)


class Classifier(pl.LightningModule):
    """An ordinary module with the paper's local solver."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.08, momentum=0.9, weight_decay=5e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)}


class Recorder(FederatedCallback):
    """Collects a :class:`Round` after every validation."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self._seen = (float("nan"), float("nan"))

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        self._seen = (report.metrics["scale"], float(report.logged["train_loss"].value))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scale, train_loss = self._seen
        self.rounds.append(Round(scale, float(trainer.callback_metrics["val_acc"]), train_loss))


def run(task: Task, local_epochs: int, split: str, seed: int) -> list[Round]:
    """One run; the initial model, the split, the proxy data and the batches depend on the seed alone."""
    torch.manual_seed(seed)
    recorder = Recorder()
    data = FederatedDataModule(
        task.train,
        num_clients=CLIENTS,
        partitioner=SPLITS[split](),
        batch_size=task.batch_size,
        val=DataLoader(task.test, batch_size=len(task.test)),
        proxy=PROXY_SAMPLES,
        seed=seed,
    )
    trainer = FederatedTrainer(
        rounds=ROUNDS,
        local_epochs=local_epochs,
        seed=seed,
        callbacks=[FedLAWCallback("scale", server_epochs=40, batch_size=PROXY_SAMPLES), recorder],
        client_eval=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with redirect_stdout(StringIO()):  # the run summary
        trainer.fit(Classifier(task.network()), datamodule=data)
    return recorder.rounds


def run_file(args: argparse.Namespace, name: str, local_epochs: int, split: str, seed: int) -> Path:
    return args.out / f"{name}_E{local_epochs}_{split.replace('(', '').replace(')', '')}_seed{seed}.csv"


def finished(args: argparse.Namespace) -> Runs:
    """The cells of which there are runs."""
    found: Runs = {}
    for name, local_epochs, split in product(FEDERATIONS, args.local_epochs, SPLITS):
        rows = []
        for path in (run_file(args, name, local_epochs, split, seed) for seed in args.seeds):
            if path.exists():
                with path.open(newline="") as file:
                    rows.append([(float(r["scale"]), float(r["test_accuracy"])) for r in csv.DictReader(file)])
        if rows:
            found[name, local_epochs, split] = np.array(rows)
    return found


def table(runs: Runs) -> str:
    """One row per cell, as markdown; mean and standard deviation over seeds."""
    head = ("data", "E", "split", "scale, rounds 1 to 10", "11 to 20", "31 to 40", "below 1", "rises", "IID is smaller")
    lines = [
        "| " + " | ".join((*head, "accuracy, rounds 31 to 40 (%)")) + " |",
        "|---|---:|---|" + "---:|" * (len(head) - 2),
    ]
    for (name, local_epochs, split), values in runs.items():
        early, middle, late = (values[:, part, 0].mean(1) for part in (EARLY, MIDDLE, LATE))
        cells = [name, str(local_epochs), split, *(_cell(part, 4) for part in (early, middle, late))]
        cells += [_count(late < 1), _count(late > middle)]
        alike = runs.get((name, local_epochs, "IID"))
        known = split != "IID" and alike is not None
        pairs = min(len(alike), len(values)) if known else 0  # seeds are played in order
        cells.append(_count(alike[:pairs, LATE, 0].mean(1) < late[:pairs]) if known else "")
        cells.append(_cell(100 * values[:, LATE, 1].mean(1), 1))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray, digits: int) -> str:
    mean, deviation = spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _count(holds: np.ndarray) -> str:
    return f"{int(holds.sum())} of {len(holds)}"


def draw(runs: Runs) -> Figure:
    """The scale by round; bands are one standard deviation over seeds."""
    panels = list(dict.fromkeys((name, local_epochs) for name, local_epochs, _ in runs))
    figure = new_figure(5.2 * min(2, len(panels)), 3.4 * -(-len(panels) // 2))
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False).flatten()
    for axes, (name, local_epochs) in zip(grid, panels, strict=False):
        for split, (color, style) in STYLES.items():
            if (name, local_epochs, split) in runs:
                mean, deviation = spread(runs[name, local_epochs, split][:, :, 0])
                at = np.arange(1, len(mean) + 1)
                axes.plot(at, mean, style, color=color, lw=1.8, label=split)
                axes.fill_between(at, mean - deviation, mean + deviation, color=color, alpha=0.18, lw=0)
        axes.axhline(1, color=ink(), lw=0.8)
        axes.set(title=f"{name}, E = {local_epochs}", xlabel="communication round", ylabel="learned scale")
        axes.set_ylim(0.88, 1.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    for axes in grid[len(panels) :]:
        axes.remove()
    grid[0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST, an npz file")
    parser.add_argument("--out", type=Path, default=Path("outputs/fedlaw_findings"), help="folder of the finished runs")
    parser.add_argument("--federations", nargs="+", choices=FEDERATIONS, default=FEDERATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--local-epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the table")
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"), help="folder of the picture")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report on what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    for name, seed in product(args.federations, args.seeds):
        if args.report_only or (name != "digits" and args.data is None):
            continue
        task = digits() if name == "digits" else mnist(args.data, int(name.removeprefix("mnist")))
        for local_epochs, split in product(args.local_epochs, SPLITS):
            path = run_file(args, name, local_epochs, split, seed)
            if not path.exists():
                rows = run(task, local_epochs, split, seed)
                write_csv(path, [asdict(row) for row in rows])
                print(f"{path.stem}: scale {rows[-1].scale:.4f}, accuracy {rows[-1].test_accuracy:.4f}", flush=True)
    runs = finished(args)
    if not runs:
        print("No finished runs.")
        return
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "fedlaw_findings.md").write_text(table(runs))
    save_for_pages(partial(draw, runs), args.pictures / "fedlaw_findings.png", dpi=150)
    print(table(runs))


if __name__ == "__main__":
    main()
