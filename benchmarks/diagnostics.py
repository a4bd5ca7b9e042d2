"""Studies with diagnostics on scikit-learn's digits or MNIST: statements of FedLAW's paper, wrong labels, and the cost.

    python benchmarks/diagnostics.py fedlaw --clients 20 --rounds 200 --epochs 1 5 10 --seeds 0 1 2
    python benchmarks/diagnostics.py fedlaw --mnist SPLIT.npz --alpha 1 --rounds 100 --epochs 1 5 10
    python benchmarks/diagnostics.py noise --rounds 100 --alpha 0.5
    python benchmarks/diagnostics.py table
    python benchmarks/diagnostics.py cost

``fedlaw`` asks what Z. Li, T. Lin, X. Shang and C. Wu (Revisiting Weighted Aggregation in Federated Learning with
Neural Networks, ICML 2023, sections 4 and 5) report of CIFAR-10: the coherence of updates around the critical round
with and without a learned scale; whether more local epochs give a smaller scale and a flatter end; what learned weights
go along with.

``noise`` gives 3 of 10 clients wrong labels, half of them or all, and asks how well each score of a client separates
them: the area under the ROC curve.

``cost`` measures what observers add to a round of digits, in processor time: they measure in every second round, and
each of these rounds is compared with its neighbor. The table has the median over the pairs.

``SPLIT.npz`` is the file of ``parity/mnist.py``: 4,000 of its training images, which keep their clients under the split
of Dirichlet(0.1) or Dirichlet(1), and local training as in the paper. Every run adds a line to ``--results`` and is not
repeated, so that an interrupted study resumes; ``table`` prints the finished runs as tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from math import nan
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

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
    Drift,
    LabelCoherence,
    ParameterHistogram,
    Shrinking,
    client_scores,
    critical_round,
    pearson,
    separation,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory

RESULTS = Path(__file__).parent / "results" / "diagnostics.jsonl"
PROXY = 100
VALIDATION = 360
MNIST_SAMPLES = 4000
MNIST_SPLITS = {0.1: "client_alpha01", 1.0: "client_alpha1"}
BAD_CLIENTS = 3
WRONG = (0.5, 1.0)
FEDLAW_RULES: Mapping[str, Callable[[], AggregationRule]] = {
    "FedAvg": FedAvgCallback,
    "learned scale": lambda: FedLAWCallback("scale", server_epochs=30),
    "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
}
NOISE_RULES: Mapping[str, Callable[[], AggregationRule]] = {
    "FedAvg": FedAvgCallback,
    "FedHAW": lambda: FedHAWCallback(lr_lambda=0.3),
    "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
    "FedAdp": FedAdpCallback,
}


class Digits(pl.LightningModule):
    """A network of 4,810 parameters for digits."""

    pixels = 64

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(torch.nn.Linear(self.pixels, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Mnist(Digits):
    """A network of 50,890 parameters for MNIST, with the local training of the FedLAW paper."""

    pixels = 784

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.08, momentum=0.9, weight_decay=5e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples in an order of the seed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def part(pixels: Tensor, labels: Tensor, begin: int, end: int | None) -> TensorDataset:
    return TensorDataset(pixels[begin:end], labels[begin:end])


@dataclass(frozen=True)
class Samples:
    """The samples of a study.

    Attributes:
        network: Makes the model of a seed.
        pixels: The images of training, as the rows of a matrix.
        labels: Their labels.
        clients: The numbers of each client's training samples.
        proxy: The proxy data.
        validation: The validation data.
        batch_size: The samples in a batch of local training.
    """

    network: Callable[[int], Digits]
    pixels: Tensor
    labels: Tensor
    clients: list[Tensor]
    proxy: TensorDataset
    validation: TensorDataset
    batch_size: int

    def data(self, labels: Tensor | None = None) -> FederatedDataModule:
        """Return the data of a run, with other labels of training if they are given."""
        if labels is None:
            labels = self.labels
        return FederatedDataModule(
            TensorDataset(self.pixels, labels),
            num_clients=len(self.clients),
            partitioner=IndexPartitioner([samples.tolist() for samples in self.clients]),
            batch_size=self.batch_size,
            val=self.validation,
            proxy=self.proxy,
        )


def digits_samples(seed: int, clients: int, alpha: float) -> Samples:
    """Split scikit-learn's digits by Dirichlet(alpha)."""
    pixels, labels = digits(seed)
    training = labels[PROXY + VALIDATION :]
    split = DirichletPartitioner(alpha).partition(clients, num_samples=len(training), labels=training, seed=seed)
    return Samples(
        network=Digits,
        pixels=pixels[PROXY + VALIDATION :],
        labels=training,
        clients=[torch.as_tensor(samples) for samples in split.indices],
        proxy=part(pixels, labels, 0, PROXY),
        validation=part(pixels, labels, PROXY, PROXY + VALIDATION),
        batch_size=16,
    )


def mnist_samples(path: Path, seed: int, alpha: float) -> Samples:
    """Draw training images of MNIST, which stay with their clients of the file, and test images for the server."""
    generator = torch.Generator().manual_seed(seed)
    with np.load(path) as arrays:
        drawn = torch.randperm(len(arrays["train_y"]), generator=generator)[:MNIST_SAMPLES].numpy()
        tested = torch.randperm(len(arrays["test_y"]), generator=generator)[: PROXY + VALIDATION].numpy()
        pixels = torch.tensor(arrays["train_x"][drawn]).flatten(1).float() / 255
        labels = torch.tensor(arrays["train_y"][drawn]).long()
        client_of = torch.tensor(arrays[MNIST_SPLITS[alpha]][drawn]).long()
        test_pixels = torch.tensor(arrays["test_x"][tested]).flatten(1).float() / 255
        test_labels = torch.tensor(arrays["test_y"][tested]).long()
    return Samples(
        network=Mnist,
        pixels=pixels,
        labels=labels,
        clients=[(client_of == client).nonzero()[:, 0] for client in range(int(client_of.max()) + 1)],
        proxy=part(test_pixels, test_labels, 0, PROXY),
        validation=part(test_pixels, test_labels, PROXY, None),
        batch_size=32,
    )


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


# ---------------------------------------------------------------------- runs, and their records


@dataclass(frozen=True)
class Run:
    """What identifies a run: the study, its setting, the method and the seed.

    Attributes:
        study: ``"fedlaw"`` or ``"noise"``.
        data: ``"digits"`` or ``"MNIST"``.
        clients: The number of clients.
        rounds: The communication rounds.
        epochs: The local epochs in a round.
        alpha: The parameter of the Dirichlet split.
        wrong: The share of wrong labels of bad clients.
        method: The name of the rule.
        seed: Of the data, the model and the federation.
    """

    study: str
    data: str
    clients: int
    rounds: int
    epochs: int
    alpha: float
    wrong: float
    method: str
    seed: int


Records = dict[Run, dict[str, float | None]]
"""What was measured of each finished run; ``None`` where it is undefined."""


def finished(path: Path) -> Records:
    """Read the records of the runs that are finished."""
    records: Records = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            records[Run(**entry["run"])] = entry["measured"]
    return records


def plan(args: argparse.Namespace) -> list[Run]:
    """List the runs of a study; all methods of a seed come before the next seed."""
    rules, shares = (FEDLAW_RULES, (0.0,)) if args.study == "fedlaw" else (NOISE_RULES, WRONG)
    data = "digits" if args.mnist is None else "MNIST"
    runs = []
    for seed in args.seeds:
        for epochs in args.epochs:
            for share in shares:
                for method in rules:
                    runs.append(
                        Run(args.study, data, args.clients, args.rounds, epochs, args.alpha, share, method, seed)
                    )
    return runs


def perform(runs: Iterable[Run], mnist: Path | None, results: Path) -> None:
    """Perform the runs that are not finished, and write a line for each."""
    done = finished(results)
    for run in runs:
        if run in done:
            continue
        if mnist is None:
            samples = digits_samples(run.seed, run.clients, run.alpha)
        else:
            samples = mnist_samples(mnist, run.seed, run.alpha)
        start = time.process_time()
        measured = {"fedlaw": fedlaw, "noise": noise}[run.study](run, samples)
        # JSON knows no NaN.
        entry = {name: value if value == value else None for name, value in measured.items()}
        entry["processor_seconds"] = round(time.process_time() - start, 1)
        line = json.dumps({"run": asdict(run), "measured": entry})
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


# ---------------------------------------------------------------------- statements of the FedLAW paper


def fedlaw(run: Run, samples: Samples) -> dict[str, float]:
    """Measure what the statements are about."""
    observers = [Coherence(), Shrinking(), Curvature(run.rounds, samples=VALIDATION, steps=40)]
    rule = FEDLAW_RULES[run.method]()
    history = fit(rule, samples.data(), run.seed, run.rounds, run.epochs, observers, samples.network(run.seed))
    coherence = history.curve("diagnostics/coherence")
    critical = critical_round(coherence)
    end = len(coherence) if critical is None else critical
    measured = {
        "accuracy": 100 * fmean(history.curve("val_acc")[-10:]),
        "critical": nan if critical is None else critical + 1.0,
        "coherence_first": fmean(coherence[:5]),
        "coherence_before": fmean(coherence[:end] or [nan]),
        "coherence_after": fmean(coherence[end:] or [nan]),
        "coherence_last": fmean(coherence[-10:]),
        "scale": fmean(history.curve("scale")[-10:]),
        "ratio": float(torch.tensor(history.curve("diagnostics/shrinking/ratio")).nanmedian()),
        "eigenvalue": history.curve("diagnostics/curvature/eigenvalue_1")[-1],
        "flatness": history.curve("diagnostics/curvature/ratio")[-1],
    }
    if run.method == "FedLAW":
        measured |= _correlations(history)
    return measured


def _correlations(history: RunHistory) -> dict[str, float]:
    """Correlate the mean weights with size and heterogeneity degree, as Table 11 of the paper does."""
    assert history.labels is not None
    weights = client_scores(history)
    sizes = torch.tensor(history.sizes, dtype=torch.float64)
    shares = history.labels.double() / history.labels.sum(1, keepdim=True)
    degrees = 1 / shares.var(1)
    quantities = {"size": sizes, "1 / variance of its label shares": degrees, "product of both": sizes * degrees}
    return {f"correlation with {name}": pearson(weights, values) for name, values in quantities.items()}


# ---------------------------------------------------------------------- clients with wrong labels


def noise(run: Run, samples: Samples) -> dict[str, float]:
    """Measure how well each score separates the clients with wrong labels."""
    is_bad = [client < BAD_CLIENTS for client in range(len(samples.clients))]
    observers: list[pl.Callback] = [Coherence()]
    if run.method == "FedAvg":
        observers.append(Contributions(5, permutations=5))
    rule = NOISE_RULES[run.method]()
    data = samples.data(_noisy_labels(run, samples))
    history = fit(rule, data, run.seed, run.rounds, run.epochs, observers, samples.network(run.seed))
    measured = {"accuracy": 100 * fmean(history.curve("val_acc")[-10:])}
    for score, values in _scores(run.method, history).items():
        measured[score] = separation(values, is_bad)
    return measured


def _noisy_labels(run: Run, samples: Samples) -> Tensor:
    """Replace a share of the labels of bad clients by others."""
    generator = torch.Generator().manual_seed(run.seed)
    labels = samples.labels.clone()
    for numbers in samples.clients[:BAD_CLIENTS]:
        chosen = numbers[torch.rand(len(numbers), generator=generator) < run.wrong]
        # By 1 to 9, so that every one of them is wrong.
        labels[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
    return labels


def _scores(method: str, history: RunHistory) -> dict[str, Tensor]:
    """Return every score of the clients of a run."""
    scores = {"mean cosine with the others": _mean_cosines(history)}
    if method == "FedAvg":
        scores["leave-one-out"] = client_scores(history, "leave_one_out")
        scores["Shapley value"] = client_scores(history, "shapley")
        return scores
    # Against the share of the samples, because a small client is not a bad one.
    sizes = torch.tensor(history.sizes, dtype=torch.float64)
    scores["weight / share of the samples"] = client_scores(history) / (sizes / sizes.sum())
    return scores


def _mean_cosines(history: RunHistory) -> Tensor:
    means = []
    for pairs in history.tables["diagnostics/cosines"].values():
        means.append((pairs.double().sum(1) - 1) / (len(pairs) - 1))
    return torch.stack(means).mean(0)


# ---------------------------------------------------------------------- cost


class Clock(pl.Callback):
    """Reads the processor time at the start of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.process_time())


def cost(rounds: int) -> None:
    """Print what observers add to a round, when they measure in every second one."""
    cases: dict[str, tuple[Sequence[Callable[[int], pl.Callback]], bool]] = {
        "nothing": ([], False),
        "`Coherence`": ([Coherence], False),
        "`LabelCoherence`": ([LabelCoherence], False),
        "`Shrinking`": ([Shrinking], False),
        "`Drift`": ([Drift], False),
        "`ParameterHistogram`": ([ParameterHistogram], False),
        "`client_eval_every_n_rounds`": ([], True),
        "it, `Coherence`, `Shrinking` and `Drift`": ([Coherence, Shrinking, Drift], True),
    }
    print("| measured | batches of validation | share of a round, % | ms |\n|---|---|---|---|")
    for name, (observers, evaluates) in cases.items():
        for batch_size in (16, 64) if evaluates else (16,):
            added, milliseconds = _cost(observers, rounds, batch_size, 2 if evaluates else None)
            print(f"| {name} | {batch_size} | {100 * added:.1f} | {milliseconds:.2f} |", flush=True)


def _cost(
    observers: Sequence[Callable[[int], pl.Callback]], rounds: int, batch_size: int, interval: int | None
) -> tuple[float, float]:
    """Return what a round costs more with observers, as a share of it and in milliseconds."""
    samples = digits_samples(0, 10, 0.5)
    data = samples.data()
    data.val_dataloader = lambda: DataLoader(samples.validation, batch_size)  # type: ignore[method-assign]
    clock = Clock()
    callbacks = [*[make(2) for make in observers], clock]
    fit(FedAvgCallback(), data, 0, rounds, 1, callbacks, engine="sequential", client_eval_every_n_rounds=interval)
    # The first round warms up, so the second, which is measured, is the first of a pair.
    durations = [end - start for start, end in zip(clock.seconds[1:], clock.seconds[2:], strict=False)]
    pairs = zip(durations[0::2], durations[1::2], strict=False)
    added = median(measured / plain - 1 for measured, plain in pairs)
    return added, 1000 * added * min(durations)


# ---------------------------------------------------------------------- tables

Groups = dict[tuple[str, ...], list[dict[str, float | None]]]
"""The records of the seeds of each row, by what identifies the row."""


def print_tables(records: Records) -> None:
    """Print the tables of both studies, with the number of seeds in every row."""
    print_fedlaw(records)
    print_correlations(records)
    print_noise(records)


def print_fedlaw(records: Records) -> None:
    """Print what was measured with and without a learned scale, for each number of local epochs."""
    columns = {
        "accuracy": "accuracy, %",
        "critical": "critical round",
        "coherence_first": "coherence, first 5 rounds",
        "coherence_before": "before the critical round",
        "coherence_after": "after the critical round",
        "coherence_last": "last 10 rounds",
        "scale": "scale, last 10 rounds",
        "ratio": "ratio r",
        "eigenvalue": "largest eigenvalue",
        "flatness": "largest / fifth",
    }
    print(f"| data | local epochs | method | seeds | {' | '.join(columns.values())} |")
    print(f"|---|---|---|---|{'---|' * len(columns)}")
    for row, measured in _groups(records, "fedlaw").items():
        cells = [_cell(measured, name) for name in columns]
        print(f"| {' | '.join([*row[:3], str(len(measured)), *cells])} |")


def print_correlations(records: Records) -> None:
    """Print what the weights of FedLAW go along with."""
    names = ["size", "1 / variance of its label shares", "product of both"]
    print(f"\n| data | local epochs | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for row, measured in _groups(records, "fedlaw").items():
        if row[2] == "FedLAW":
            cells = [_cell(measured, f"correlation with {name}") for name in names]
            print(f"| {' | '.join([*row[:2], *cells])} |")


def print_noise(records: Records) -> None:
    """Print how well each score separates, with the lowest of the seeds."""
    print("\n| data | run | score | wrong | seeds | area under the ROC curve | lowest |\n|---|---|---|---|---|---|---|")
    for row, measured in _groups(records, "noise").items():
        for name in measured[0]:
            if name not in ("accuracy", "processor_seconds"):
                lowest = min(_defined(measured, name), default=nan)
                cells = [row[0], row[2], name, row[3], str(len(measured)), _cell(measured, name), f"{lowest:.2f}"]
                print(f"| {' | '.join(cells)} |")


def _groups(records: Records, study: str) -> Groups:
    """Return the records of a study by data, epochs, method and share of wrong labels."""
    groups: Groups = {}
    for run, measured in records.items():
        if run.study == study:
            data = f"{run.data}, {run.clients} clients, Dirichlet({run.alpha:g}), {run.rounds} rounds"
            groups.setdefault((data, str(run.epochs), run.method, f"{run.wrong:.0%}"), []).append(measured)
    return groups


def _defined(measured: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    """Return a value of each seed in which it is defined."""
    values = []
    for record in measured:
        value = record.get(name)
        if value is not None:
            values.append(value)
    return values


def _cell(measured: Sequence[Mapping[str, float | None]], name: str) -> str:
    """Format the mean and the standard deviation over seeds."""
    values = _defined(measured, name)
    if not values:
        return "-"
    text = f"{fmean(values):.3g}"
    if len(values) > 1:
        text += f" ± {stdev(values):.2g}"
    if len(values) < len(measured):
        text += f" ({len(values)} of {len(measured)})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("fedlaw", "noise", "table", "cost"))
    parser.add_argument("--mnist", type=Path, help="the split of MNIST, an npz file; without it, digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=10, help="of digits; the file has 10")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet split; of MNIST 0.1 or 1")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.study == "table":
        print_tables(finished(args.results))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.study == "cost":
        cost(args.rounds)
        return
    perform(plan(args), args.mnist, args.results)


if __name__ == "__main__":
    main()
