"""Compare the scale-free FedHAW, which needs no tuning, with FedAvg and the tuned published rule.

    python benchmarks/scale_free.py --data SPLIT.npz [--seeds 0 1 2 3 4] [--jobs 2]

``SPLIT.npz`` is the file of ``parity/mnist.py``. The cells of the study are federations in four families: MNIST with
the authors' split, the digits of scikit-learn, Synthetic(1, 1), and a small CNN. They vary one thing at a time: a small
and a well-tuned local learning rate, local epochs, batch size, optimizer, partial participation, mislabeled clients.

Every run has 40 rounds, and its score is the mean test accuracy of the last ten. The published rule uses the best of
five step sizes on seed 0, for each cell separately. The scale-free rule has one setting for all cells. Runs are made by
``lightning_fedhaw.comparing``: finished ones are kept in ``--out`` and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import save_for_pages
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import DirichletPartitioner, IndexPartitioner
from lightning_fedhaw.comparing import Cell, Comparison, compare
from lightning_fedhaw.data import Partitioner
from lightning_fedhaw.figures.base import ink, new_figure

ROUNDS = 40
LAST = 10
RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Values of the published rule's ``lr_gamma``; ``lr_lambda`` is ten times as large."""

Data = tuple[TensorDataset, TensorDataset, Partitioner]

RULES = {"FedAvg": "FedAvg", "default": "FedHAW", "lr_gamma=0": "FedHAW(lr_gamma=0.0)"}
TUNED = "published, tuned"
PROBED_RATES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""The same with a probe, whose gradient is that of one step and not of a round's steps."""
FAMILIES = {
    TUNED: ("", RATES),
    "exact, tuned": (", jacobian='exact'", RATES),
    "exact with a probe, tuned": (", jacobian='exact', probe=Probe()", PROBED_RATES),
}
"""Forms of the published rule: their arguments beside the step sizes, and the rates of which each takes the best."""


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
class Federation:
    """A federation and its local training."""

    data: Callable[..., Data]
    model: Callable[[], nn.Module]
    lr: float
    epochs: int = 1
    batch_size: int = 32
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    clients_per_round: int | None = None

    def load(self, path: Path) -> Data:
        """Return the data, from a file or without one."""
        from_file = self.data in (mnist, pictures)
        return self.data(path) if from_file else self.data()


IMAGES, SMALL = partial(mlp, 784, 128), partial(mlp, 64, 64)
FEDERATIONS = {
    "MNIST, SGD 0.001": Federation(mnist, IMAGES, 0.001, batch_size=64),
    "MNIST, SGD 0.05": Federation(mnist, IMAGES, 0.05, batch_size=64),
    "MNIST, SGD 0.05, E=5": Federation(mnist, IMAGES, 0.05, epochs=5, batch_size=64),
    "MNIST, SGD 0.02, batch 10": Federation(mnist, IMAGES, 0.02, batch_size=10),
    "MNIST, Adam 0.001": Federation(mnist, IMAGES, 0.001, batch_size=64, optimizer=torch.optim.Adam),
    "digits, SGD 0.01": Federation(digits, SMALL, 0.01),
    "digits, SGD 0.2": Federation(digits, SMALL, 0.2),
    "digits, SGD 0.2, E=5": Federation(digits, SMALL, 0.2, epochs=5),
    "digits, 3 of 10 mislabeled": Federation(mislabeled, SMALL, 0.2, epochs=3),
    "Synthetic, SGD 0.001": Federation(synthetic, logistic, 0.001, batch_size=10),
    "Synthetic, SGD 0.02": Federation(synthetic, logistic, 0.02, batch_size=10),
    "Synthetic, SGD 0.02, 6 of 30": Federation(synthetic, logistic, 0.02, batch_size=10, clients_per_round=6),
    "CNN, SGD 0.005": Federation(pictures, cnn, 0.005),
    "CNN, SGD 0.1": Federation(pictures, cnn, 0.1),
    "CNN, Adam 0.002": Federation(pictures, cnn, 0.002, optimizer=torch.optim.Adam),
}


class Model(pl.LightningModule):
    """The model of a federation, with its optimizer."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.net, self.federation = federation.model(), federation

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.federation.optimizer(self.parameters(), lr=self.federation.lr)  # type: ignore[call-arg]


class Samples(pl.LightningDataModule):
    """The data of a federation."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__()
        self.batch_size = FEDERATIONS[name].batch_size
        self.samples, self.test, _ = FEDERATIONS[name].load(path)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=1000)


def cell(name: str, path: Path) -> Cell:
    """Return a federation as a cell of a comparison."""
    federation = FEDERATIONS[name]
    _, _, partitioner = federation.load(path)
    options: dict[str, Any] = {"local_epochs": federation.epochs, "clients_per_round": federation.clients_per_round}
    options |= {"num_clients": partitioner.num_clients or 10, "partitioner": partitioner}
    return Cell(name, partial(Model, federation), partial(Samples, name, path), options, "val_acc")


# ---------------------------------------------------------------------- the study


def scores_of(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the scores ``[seeds]`` in percent of a comparison on one cell, by method."""
    scores: dict[str, list[float]] = {}
    for record in comparison.records:
        scores.setdefault(record["run"]["method"], []).append(100 * float(np.mean(record["curve"][-LAST:])))
    return {method: np.array(values) for method, values in scores.items()}


def with_rate(family: str, rate: float) -> str:
    """Return the expression of a form of the published rule with its step sizes."""
    return f"PublishedFedHAW(lr_gamma={rate:g}, lr_lambda={10 * rate:g}{FAMILIES[family][0]})"


def study(name: str, args: argparse.Namespace) -> tuple[dict[str, np.ndarray], list[str]]:
    """Run a federation, and return its scores ``[seeds]`` by column of the table, and the best published rates."""
    play = partial(compare, cells=cell(name, args.data), rounds=ROUNDS, output=args.out, jobs=args.jobs, progress=print)
    rules = {"FedAvg": RULES["FedAvg"]}
    best_rates = []
    for family in args.published:
        methods = {f"{rate:g}": with_rate(family, rate) for rate in FAMILIES[family][1]}
        rates = scores_of(play(methods, seeds=args.seeds[:1]))
        best = max(rates, key=lambda rate: rates[rate][0])
        rules[family] = with_rate(family, float(best))
        best_rates.append(best)
    return scores_of(play({**rules, **RULES}, seeds=args.seeds)), best_rates


def table(results: dict[str, tuple[dict[str, np.ndarray], list[str]]]) -> str:
    """Return the Markdown table."""
    lines: list[str] = []
    for name, (scores, best_rates) in results.items():
        if not lines:
            lines.append("| cell | " + " | ".join(scores) + " | best published rate |")
            lines.append("|---|" + "---:|" * (len(scores) + 1))
        columns = [spread(values) for values in scores.values()]
        lines.append(f"| {name} | " + " | ".join(columns) + f" | {', '.join(best_rates)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Format mean and sample standard deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.1f} ± {deviation:.1f}"


def draw(scores: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw the gain of each rule over FedAvg for every seed."""
    figure = new_figure(9.5, 6.2)
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
    axes.axvline(0, color=ink(), lw=1)
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks([-50, -20, -5, -2, 0, 2, 5, 20, 50], ["-50", "-20", "-5", "-2", "0", "2", "5", "20", "50"])
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set(xlabel="accuracy over FedAvg's, mean of the last ten rounds (points; small: one seed)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the split of MNIST, an npz file")
    parser.add_argument("--out", type=Path, default=Path("outputs/scale_free"), help="folder of the finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", nargs="+", choices=FEDERATIONS, default=list(FEDERATIONS), metavar="CELL")
    parser.add_argument("--published", nargs="+", choices=FAMILIES, default=[TUNED], help="forms of the published rule")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at the same time")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/scale_free.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/scale_free.png"))
    args = parser.parse_args()
    results = {name: study(name, args) for name in args.cells}
    markdown = table(results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(markdown)
    all_scores = {name: scores for name, (scores, _) in results.items()}
    save_for_pages(partial(draw, all_scores), args.picture, dpi=150)
    print(markdown)


if __name__ == "__main__":
    main()
