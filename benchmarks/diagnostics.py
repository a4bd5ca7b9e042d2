"""Two studies with diagnostics on scikit-learn's digits: statements of the FedLAW paper, and clients with wrong labels.

    python benchmarks/diagnostics.py fedlaw --seeds 0 1 2
    python benchmarks/diagnostics.py noise --seeds 0 1 2

``fedlaw`` asks what Z. Li, T. Lin, X. Shang and C. Wu (Revisiting Weighted Aggregation in Federated Learning with
Neural Networks, ICML 2023, sections 4 and 5) report of CIFAR-10: the coherence of updates around the critical round
with and without a learned scale; whether more local epochs give a smaller scale and a flatter end; what learned weights
go along with.

``noise`` gives 3 of 10 clients wrong labels, half of them or all, and asks how well each score of a client separates
them: the area under the ROC curve.

Both print tables in Markdown. Other values of ``--clients``, ``--rounds`` and ``--epochs`` make longer studies.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from math import nan
from statistics import fmean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_fedhaw import (
    DirichletPartitioner,
    FedAdpCallback,
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    FedLAWCallback,
    IndexPartitioner,
)
from lightning_fedhaw.diagnostics import (
    Coherence,
    Contributions,
    Curvature,
    Shrinking,
    client_scores,
    critical_round,
    pearson,
    separation,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory

PROXY = 100
VALIDATION = 360
Rules = Mapping[str, Callable[[], AggregationRule]]


class Digits(pl.LightningModule):
    """A network of 4,810 parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples in an order of the seed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def part(pixels: Tensor, labels: Tensor, begin: int, end: int | None) -> TensorDataset:
    return TensorDataset(pixels[begin:end], labels[begin:end])


def fit(
    rule: AggregationRule,
    data: FederatedDataModule,
    seed: int,
    rounds: int,
    local_epochs: int,
    observers: Sequence[pl.Callback],
    model: Digits | None = None,
    **options: Any,
) -> RunHistory:
    """Run a federation, and return its history."""
    run = RunHistory()
    trainer = FederatedTrainer(
        rounds=rounds,
        local_epochs=local_epochs,
        storage="device",
        seed=seed,
        callbacks=[rule, *observers, run],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **{"client_eval": False, **options},
    )
    with redirect_stdout(StringIO()):
        trainer.fit(model or Digits(seed), data)
    return run


def data_of(
    seed: int, clients: int, partitioner: Any, wrong: Callable[[Tensor], Tensor] | None = None
) -> FederatedDataModule:
    """Make the data: proxy, validation, and training samples, whose labels ``wrong(labels)`` may replace."""
    pixels, labels = digits(seed)
    training = labels[PROXY + VALIDATION :]
    if wrong is not None:
        training = wrong(training)
    return FederatedDataModule(
        TensorDataset(pixels[PROXY + VALIDATION :], training),
        num_clients=clients,
        partitioner=partitioner,
        batch_size=16,
        val=part(pixels, labels, PROXY, PROXY + VALIDATION),
        proxy=part(pixels, labels, 0, PROXY),
    )


# ---------------------------------------------------------------------- statements of the FedLAW paper


def fedlaw(seeds: Sequence[int], clients: int, rounds: int, epochs: Sequence[int], alpha: float) -> None:
    """Print what was measured with and without a learned scale, for each number of local epochs."""
    rules: Rules = {
        "FedAvg": FedAvgCallback,
        "learned scale": lambda: FedLAWCallback("scale", server_epochs=30),
        "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
    }
    print(
        "| method | local epochs | accuracy, % | coherence, first 5 rounds | last 10 rounds | critical round"
        " | scale, last 10 rounds | ratio r | largest eigenvalue | largest / fifth |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    correlations: dict[tuple[int, str], list[float]] = {}
    for local_epochs in epochs:
        for name, make in rules.items():
            rows = []
            criticals = []
            for seed in seeds:
                observers = [Coherence(), Shrinking(), Curvature(rounds, samples=VALIDATION, steps=40)]
                data = data_of(seed, clients, DirichletPartitioner(alpha))
                run = fit(make(), data, seed, rounds, local_epochs, observers)
                rows.append(_measured(run))
                criticals.append(critical_round(run.curve("diagnostics/coherence")))
                if name == "FedLAW":
                    for quantity, value in _correlations(run).items():
                        correlations.setdefault((local_epochs, quantity), []).append(value)
            cells = [_cell(column) for column in zip(*rows, strict=True)]
            critical = ", ".join("none" if number is None else str(number + 1) for number in criticals)
            print(f"| {name} | {local_epochs} | {' | '.join([*cells[:3], critical, *cells[3:]])} |", flush=True)
    print("\n| local epochs | quantity of a client | correlation with its weight |\n|---|---|---|")
    for (local_epochs, quantity), values in correlations.items():
        print(f"| {local_epochs} | {quantity} | {_cell(values)} |")


def _measured(run: RunHistory) -> list[float]:
    coherence = run.curve("diagnostics/coherence")
    ratios = torch.tensor(run.curve("diagnostics/shrinking/ratio"))
    scales = torch.tensor(run.curve("scale"))
    return [
        100 * fmean(run.curve("val_acc")[-10:]),
        fmean(coherence[:5]),
        fmean(coherence[-10:]),
        float(scales[-10:].nanmean()),
        float(ratios.nanmedian()),
        run.curve("diagnostics/curvature/eigenvalue_1")[-1],
        run.curve("diagnostics/curvature/ratio")[-1],
    ]


def _correlations(run: RunHistory) -> dict[str, float]:
    """Correlate the mean weights with size and heterogeneity degree, as Table 11 of the paper does."""
    assert run.labels is not None
    weights = client_scores(run)
    sizes = torch.tensor(run.sizes, dtype=torch.float64)
    shares = run.labels.double() / run.labels.sum(1, keepdim=True)
    degrees = 1 / shares.var(1)
    quantities = {"size": sizes, "1 / variance of its label shares": degrees, "product of both": sizes * degrees}
    return {name: pearson(weights, values) for name, values in quantities.items()}


# ---------------------------------------------------------------------- clients with wrong labels


def noise(seeds: Sequence[int], clients: int, rounds: int, epochs: Sequence[int], alpha: float) -> None:
    """Print how well each score separates 3 clients with wrong labels."""
    rules: Rules = {
        "FedAvg": FedAvgCallback,
        "FedHAW": lambda: FedHAWCallback(lr_lambda=0.3),
        "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
        "FedAdp": FedAdpCallback,
    }
    shares = (0.5, 1.0)
    results: dict[tuple[str, str], dict[float, list[float]]] = {}
    for share in shares:
        for seed in seeds:
            bad = [client < 3 for client in range(clients)]
            data = _noisy_data(seed, clients, alpha, share, bad)
            for name, make in rules.items():
                observers: list[pl.Callback] = [Coherence()]
                if name == "FedAvg":
                    observers.append(Contributions(5, permutations=5))
                run = fit(make(), data, seed, rounds, epochs[0], observers)
                for score, values in _scores(name, run).items():
                    column = results.setdefault((name, score), {}).setdefault(share, [])
                    column.append(separation(values, bad))
    heads = " | ".join(f"{share:.0%} wrong" for share in shares)
    print(f"| run | score | {heads} |\n|---|---|{'---|' * len(shares)}")
    for (name, score), columns in results.items():
        print(f"| {name} | {score} | {' | '.join(_cell(columns[share]) for share in shares)} |")


def _noisy_data(seed: int, clients: int, alpha: float, share: float, bad: Sequence[bool]) -> FederatedDataModule:
    """Split by the true labels, and replace a share of the labels of bad clients by others."""
    _, labels = digits(seed)
    training = labels[PROXY + VALIDATION :]
    split = DirichletPartitioner(alpha).partition(clients, num_samples=len(training), labels=training, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    indices = [torch.as_tensor(samples) for samples in split.indices]

    def wrong(clean: Tensor) -> Tensor:
        changed = clean.clone()
        for samples, is_bad in zip(indices, bad, strict=True):
            if is_bad:
                chosen = samples[torch.rand(len(samples), generator=generator) < share]
                # By 1 to 9, so that every one of them is wrong.
                changed[chosen] = (clean[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
        return changed

    return data_of(seed, clients, IndexPartitioner([samples.tolist() for samples in indices]), wrong)


def _scores(name: str, run: RunHistory) -> dict[str, Tensor]:
    """Return every score of the clients of a run."""
    scores = {"mean cosine with the others": _mean_cosines(run)}
    if name == "FedAvg":
        scores["leave-one-out"] = client_scores(run, "leave_one_out")
        scores["Shapley value"] = client_scores(run, "shapley")
        return scores
    # Against the share of the samples, because a small client is not a bad one.
    sizes = torch.tensor(run.sizes, dtype=torch.float64)
    scores["weight / share of the samples"] = client_scores(run) / (sizes / sizes.sum())
    return scores


def _mean_cosines(run: RunHistory) -> Tensor:
    means = []
    for pairs in run.tables["diagnostics/cosines"].values():
        means.append((pairs.double().sum(1) - 1) / (len(pairs) - 1))
    return torch.stack(means).mean(0)


def _cell(values: Sequence[float]) -> str:
    """Format the mean and the standard deviation over seeds."""
    kept = [value for value in values if value == value]
    if not kept:
        return "-"
    deviation = stdev(kept) if len(kept) > 1 else nan
    return f"{fmean(kept):.3g} ± {deviation:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("fedlaw", "noise"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet split")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    study = {"fedlaw": fedlaw, "noise": noise}[args.study]
    study(args.seeds, args.clients, args.rounds, args.epochs, args.alpha)


if __name__ == "__main__":
    main()
