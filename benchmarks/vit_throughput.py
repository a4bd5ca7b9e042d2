"""Compare the images per second of a federated ViT with those of the same module in a stock ``Trainer``.

    python benchmarks/vit_throughput.py [--json FILE] [--markdown FILE]         ViT-B/16 at 224 px on a GPU
    python benchmarks/vit_throughput.py --device cpu --model vit_tiny_patch16_224 --image-size 32 \
        --images 32 --batch-size 8 --precision 32-true                          a small test

All weights are trained, from random values, on random images that are on the model's device. Both log the loss of every
step. The batches of the stock trainer are slices of tensors, so its loader takes no time. The federation creates its
own batches.

An epoch of the stock trainer has as many images and steps as a round of the federation. The time of a round includes
broadcast, training of all clients and aggregation. Runs alternate, and the first round of each run is not timed.
Results are written after every run.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sheet import table
from speed import machine, write_between
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_fedhaw as fed
from lightning_fedhaw.data import IIDPartitioner
from lightning_fedhaw.extending import AggregationRule

CLASSES = 120
AIM = 0.98
"""Target for the ratio of images per second to the stock trainer."""
STOCK = "stock Trainer"
RULES: dict[str, Callable[[], AggregationRule]] = {"FedAvg": fed.FedAvgCallback, "FedHAW": fed.FedHAWCallback}


class Batches(Dataset[Any]):
    """Batches that are slices of tensors, the same in every epoch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, size: int) -> None:
        self.parts = list(zip(images.split(size), labels.split(size), strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parts[index]


class Clock(pl.Callback):
    """Record the start time of each epoch and the end time of the last one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ticks = device, list[float]()

    def tick(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ticks.append(time.perf_counter())

    def on_train_epoch_start(self, *_: Any) -> None:
        self.tick()

    def on_train_end(self, *_: Any) -> None:
        self.tick()

    @property
    def seconds(self) -> list[float]:
        """Seconds of each epoch except the first."""
        return [end - begin for begin, end in zip(self.ticks[1:], self.ticks[2:], strict=False)]


def play(rule: str | None, samples: TensorDataset, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each round after the first; without a rule, of each epoch of the stock trainer."""
    torch.manual_seed(0)
    module = fed.TimmClassifier(
        args.model, CLASSES, lr=1e-4, model_kwargs={"img_size": args.image_size} if args.image_size else {}
    )
    clock = Clock(samples.tensors[0].device)
    settings: dict[str, Any] = {
        "accelerator": "cpu" if args.device == "cpu" else "gpu",
        "devices": 1,
        "precision": args.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if rule is None:
        trainer = pl.Trainer(max_epochs=args.rounds + 1, callbacks=[clock], **settings)
        trainer.fit(module, DataLoader(Batches(*samples.tensors, args.batch_size), batch_size=None))
    else:
        federated = fed.FederatedTrainer(
            rounds=args.rounds + 1, callbacks=[RULES[rule](), clock], client_eval=False, **settings
        )
        data = fed.FederatedDataModule(samples, args.clients, IIDPartitioner(), batch_size=args.batch_size, seed=0)
        with redirect_stdout(StringIO()):  # hides the run summary
            federated.fit(module, data)
    assert len(clock.seconds) == args.rounds
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=int, help="default: the model's own")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument(
        "--images",
        type=int,
        default=1216,
        help="images per client, a multiple of the batch size; Stanford Dogs has 1,200",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="start no repetition that would probably end later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.images % args.batch_size:
        parser.error(f"--images must be a multiple of --batch-size {args.batch_size}, got {args.images}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")

    total, side = args.clients * args.images, args.image_size or 224
    generator = torch.Generator(args.device).manual_seed(0)
    samples = TensorDataset(
        torch.randn(total, 3, side, side, generator=generator, device=args.device),
        torch.randint(CLASSES, (total,), generator=generator, device=args.device),
    )
    found: dict[str, Any] = {
        "work": f"{args.model} at {side} px, {args.precision}, {args.clients} clients x {args.images} images, batch"
        f" {args.batch_size}, E=1, {args.rounds} rounds a run",
        "images": total,
        "seconds": {name: [] for name in (STOCK, *RULES)},
    }
    begin = time.perf_counter()
    for repetition in range(args.repetitions):
        spent = time.perf_counter() - begin
        if args.seconds is not None and spent * (repetition + 1) > args.seconds * repetition:
            break
        for name in found["seconds"] if repetition % 2 == 0 else reversed(found["seconds"]):
            seconds = statistics.median(play(None if name == STOCK else name, samples, args))
            found["seconds"][name].append(seconds)
            print(f"{name}: {total / seconds:.0f} images/s", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found))
    about = machine()
    hardware = about["processor"] if args.device == "cpu" else about["gpu"]
    text = f"{hardware}, torch {about['torch']}, Lightning {about['lightning']}.\n\n{report(found)}"
    print(f"\n{text}")
    if args.markdown:
        write_between(args.markdown, "vit", text)


def report(found: dict[str, Any]) -> str:
    """Return the table of the results so far."""
    rows = []
    for name, runs in found["seconds"].items():
        ratios = [stock / ours for stock, ours in zip(found["seconds"][STOCK], runs, strict=False)]
        rate = f"{found['images'] / statistics.median(runs):.0f}" if runs else "not run"
        ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
        rows.append([name, rate, ratio, "" if name == STOCK else f"{AIM:g}", str(len(runs))])
    head = ["", "images a second", "to the stock Trainer of the same repetition", "aim", "runs"]
    return f"{found['work']}.\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
