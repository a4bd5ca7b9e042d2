"""Why FedLAW collapses with error rates up to 0.8 here and not in the publication: how its proxy images are scaled.

The FedHAW authors' loaders scale the images of clients to [-1, 1], and those of the test and of the proxy data, which
are a part of it, to [-0.5, 0.5]. The server of FedLAW learns the scale of the model on proxy data, so half as large
images make it ask for a larger model. This experiment runs FedLAW of ``mnist.py`` both ways.

    python benchmarks/parity/fedlaw_images.py --data SPLIT.npz
    python benchmarks/parity/fedlaw_images.py --data SPLIT.npz --errors 0.2 0.8 --rounds 200 --seeds 0 1 2

``SPLIT.npz`` is the file of ``mnist.py``. With 30 rounds, the default, a run takes about two minutes of one core. Every
run is written to ``--out`` when it is finished and is not repeated. Prints a table as Markdown: accuracy on test images
that are scaled as the proxy images, the scale that the server learned, and the Euclidean norm of the model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from mnist import LEARNING_RATE, Data, load, read_run, run, write_csv
from torch.utils.data import Dataset, TensorDataset

from lightning_fedhaw import FederatedCallback

SCALINGS = {"equal": 1.0, "half": 0.5}
"""The factor on test and proxy images: as large as those of the clients, or half as large, as in the authors' code."""

SHOWN = (5, 10)
"""Rounds in which the model's norm is shown."""


class Norms(FederatedCallback):
    """Collects the norm of the model after every round."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        squares = sum(parameter.detach().square().sum() for parameter in pl_module.parameters())
        self.values.append(float(squares) ** 0.5)


def scaled(data: Data, factor: float) -> Data:
    """Return the split with test and proxy images multiplied by a factor."""
    return replace(data, test=_times(data.test, factor), proxy=_times(data.proxy, factor))


def _times(dataset: Dataset[Any], factor: float) -> TensorDataset:
    samples = torch.utils.data.default_collate([dataset[index] for index in range(len(dataset))])  # type: ignore[arg-type]
    return TensorDataset(samples[0] * factor, samples[1])


def finished(args: argparse.Namespace, data: Data, factor: float, errors: float, seed: int) -> tuple[Any, list[float]]:
    """Return a run and the model's norms; carry it out unless it is there."""
    path = args.out / f"fedlaw_{args.rounds}_images{factor:g}_errors{errors:g}_seed{seed}.csv"
    norms_path = path.with_suffix(".norms.csv")
    if not norms_path.exists():
        norms = Norms()
        rows = run("fedlaw", seed, args.rounds, LEARNING_RATE, errors, scaled(data, factor), norms)
        write_csv(path, [asdict(row) for row in rows])
        write_csv(norms_path, [{"norm": value} for value in norms.values])
    values = np.loadtxt(norms_path, skiprows=1, ndmin=1).tolist()
    return read_run(path), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the split, an npz file")
    parser.add_argument("--out", type=Path, default=Path("outputs/fedlaw_images"), help="folder of the finished runs")
    parser.add_argument("--errors", type=float, nargs="+", default=[0.8], help="largest error rates")
    parser.add_argument("--images", nargs="+", choices=SCALINGS, default=list(SCALINGS), help="test and proxy images")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load(args.data, "alpha01")
    shown = [number for number in SHOWN if number < args.rounds] + [args.rounds]
    print("| error rates up to | test and proxy images | seed | norm, rounds " + ", ".join(map(str, shown)), end="")
    print(" | lowest scale | accuracy, last ten rounds (%) |\n|---|---|---|---|---:|---:|")
    for errors, name, seed in product(args.errors, args.images, args.seeds):
        rows, norms = finished(args, data, SCALINGS[name], errors, seed)
        cells = [f"{errors:g}", name, str(seed), ", ".join(f"{norms[number - 1]:.2f}" for number in shown)]
        cells.append(f"{min(row.scale for row in rows):.3f}")
        cells.append(f"{100 * np.mean([row.test_accuracy for row in rows[-10:]]):.1f}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
