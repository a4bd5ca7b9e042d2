"""The measurements behind two pieces of advice: what to do with clients that fail, and with labels that may be wrong.

    python benchmarks/advice.py erasures                     digits, error rates up to 0.8, two substitutes
    python benchmarks/advice.py labels [--data SPLIT.npz]    three clients in ten have random labels

``SPLIT.npz`` is the file of ``parity/mnist.py``; without it, the study of labels has two federations instead of three.
Results are in the folder ``--output``. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lightning_fedhaw import IndexPartitioner
from lightning_fedhaw.comparing import Cell, Comparison, compare
from lightning_fedhaw.comparing.federations import Arrays, cell_of, load_breast_cancer, load_digits

CLIENTS = 10
MISLABELED = (1, 4, 7)
SAMPLES = 3000


def mislabeled(source: partial[Arrays]) -> Arrays:
    """Return arrays in which the labels of three clients are random."""
    arrays = source()
    labels = arrays.y.clone()
    owners = owners_of(len(labels))
    draw = np.random.default_rng(1)
    for client in MISLABELED:
        labels[owners[client]] = torch.as_tensor(draw.integers(0, int(labels.max()) + 1, len(owners[client])))
    return arrays._replace(y=labels)


def owners_of(samples: int) -> list[list[int]]:
    """Return an even split of samples over the clients."""
    owner = np.random.default_rng(0).integers(0, CLIENTS, samples)
    return [np.flatnonzero(owner == client).tolist() for client in range(CLIENTS)]


def mnist(path: str) -> Arrays:
    """Return 3,000 training images of the authors' file, flat and in [-1, 1], and 2,000 for the test."""
    chosen = np.random.default_rng(0).permutation(60_000)[:SAMPLES]
    tensors = []
    with np.load(path) as file:
        for x, y in (
            (file["train_x"][chosen], file["train_y"][chosen]),
            (file["test_x"][:2000], file["test_y"][:2000]),
        ):
            tensors += [torch.as_tensor(x).flatten(1).float() / 127.5 - 1, torch.as_tensor(y).long()]
    return Arrays(*tensors)


def cell(name: str, source: partial[Arrays], lr: float, batch_size: int) -> Cell:
    """Return a federation in which three clients are mislabeled."""
    owners = owners_of(len(source().y))
    partitioner = IndexPartitioner(owners)
    noisy = partial(mislabeled, source)
    return cell_of(name, noisy, lr, hidden=(64, 64), batch_size=batch_size, local_epochs=3, partitioner=partitioner)


def erasures(args: argparse.Namespace) -> Comparison:
    """Compare what is used instead of a lost update."""
    channels = []
    for rate in args.errors:
        for fallback in ("zero_update", "reuse_update"):
            channels.append(f"ErasureChannel(max_probability={rate:g}, fallback={fallback!r})")
    return compare(
        ["FedAvg", "FedHAW"],
        "digits",
        settings={"channel": channels},
        seeds=args.seeds,
        output=args.output / "erasures",
        jobs=args.jobs,
        progress=print,
    )


def labels(args: argparse.Namespace) -> Comparison:
    """Compare what FedHAW learns where three clients in ten have random labels."""
    cells = [
        cell("digits, 3 of 10 mislabeled", partial(load_digits), 0.2, 32),
        cell("breast cancer, 3 of 10 mislabeled", partial(load_breast_cancer), 0.05, 8),
    ]
    if args.data is not None:
        cells.append(cell("MNIST, 3 of 10 mislabeled", partial(mnist, str(args.data)), 0.05, 32))
    rules = ["FedAvg", "FedHAW", "FedHAW(lr_gamma=0.0)", "FedHAW(lr_gamma=0.0, lr_step=0.0)"]
    return compare(rules, cells, seeds=args.seeds, output=args.output / "labels", jobs=args.jobs, progress=print)


STUDIES = {"erasures": erasures, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="the split of MNIST, an npz file")
    parser.add_argument("--errors", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="largest error rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/advice"))
    args = parser.parse_args()
    results = STUDIES[args.study](args)
    print(results.table("markdown"))
    print(results.differences("markdown"))


if __name__ == "__main__":
    main()
