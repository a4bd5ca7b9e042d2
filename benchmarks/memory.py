"""Measure the peak memory of a federation above that of the imports, and its growth over the rounds.

    python benchmarks/memory.py [--case NAME] [--rounds 50]

Without `--case`, every case runs in a new process, and the table is printed as Markdown. The bounds of the large model,
above the data, are 10 P floats for FedAvg and (2 K + 6) P floats for FedHAW.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from tempfile import TemporaryDirectory
from typing import NamedTuple


class Case(NamedTuple):
    """The sizes of a federation; ``widths`` are the layer widths of the model, from its inputs to its classes."""

    samples: int
    widths: tuple[int, ...]
    clients: int
    cohort: int
    batch: int
    rule: str
    rounds: int
    vectors: int | None = None  # P floats allowed above the data
    checkpoint: bool = False


CASES = {
    "10 clients, P = 1e7, FedAvg": Case(100, (10_000, 1000), 10, 10, 10, "FedAvgCallback", 3, 10),
    "10 clients, P = 1e7, FedHAW": Case(100, (10_000, 1000), 10, 10, 10, "FedHAWCallback", 4, 26),
    "the same with checkpoints": Case(100, (10_000, 1000), 10, 10, 10, "FedHAWCallback", 4, 26, True),
    "10,000 clients x 10, 1,000 a round, FedAvg": Case(100_000, (60, 10), 10_000, 1000, 10, "FedAvgCallback", 3),
    "10,000 clients x 10, 1,000 a round, FedHAW": Case(100_000, (60, 10), 10_000, 1000, 10, "FedHAWCallback", 3),
    "1,000 clients x 60, 100 a round, MLP, FedAvg": Case(
        60_000, (784, 128, 128, 10), 1000, 100, 20, "FedAvgCallback", 50
    ),
    "1,000 clients x 60, 100 a round, MLP, FedHAW": Case(
        60_000, (784, 128, 128, 10), 1000, 100, 20, "FedHAWCallback", 50
    ),
}


def memory(key: str) -> float:
    """Return an entry of the kernel's status of this process, in MB."""
    with open("/proc/self/status") as file:
        entry = re.search(rf"{key}:\s+(\d+)", file.read())
    assert entry is not None
    return int(entry[1]) * 1024 / 1e6


def play(case: Case, rounds: int) -> str:
    """Run a case in this process, and return the cells of its row."""
    import lightning.pytorch as pl
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torch.utils.data import TensorDataset

    torch_only = memory("VmRSS")
    import lightning_fedhaw as lf

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for inputs, outputs in zip(case.widths, case.widths[1:], strict=False):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            self.net = nn.Sequential(*layers[:-1])

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Meter(lf.FederatedCallback):
        def __init__(self) -> None:
            super().__init__()
            self.resident: list[float] = []
            self.first = 0.0

        def on_round_start(self, *_: object) -> None:
            self.first = self.first or time.perf_counter()

        def on_round_end(self, *_: object) -> None:
            self.resident.append(memory("VmRSS"))

    torch.set_num_threads(1)
    # The first use of autograd and of an optimizer loads libraries, whose memory counts as that of the imports.
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0).step()
    imported = memory("VmRSS")
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.rand(case.samples, case.widths[0], generator=generator),
        torch.randint(case.widths[-1], (case.samples,), generator=generator),
    )
    size = sum(tensor.nbytes for tensor in data.tensors) / 1e6
    meter, module = Meter(), Module()
    vector = sum(p.numel() for p in module.parameters()) * 4 / 1e6
    with TemporaryDirectory() as root:
        trainer = lf.FederatedTrainer(
            rounds=rounds,
            clients_per_round=case.cohort,
            callbacks=[getattr(lf, case.rule)(), meter],
            logger=False,
            default_root_dir=root,
            enable_checkpointing=case.checkpoint,
            enable_model_summary=False,
            enable_progress_bar=False,
            accelerator="cpu",
        )
        begin = time.perf_counter()
        trainer.fit(module, lf.FederatedDataModule(data, case.clients, lf.IIDPartitioner(), batch_size=case.batch))
    above = memory("VmHWM") - imported
    marks = sorted({1, 2, 3, rounds // 2, rounds})
    grows = ", ".join(f"{meter.resident[t - 1] - imported:.0f}" for t in marks)
    floats = f"{(above - size) / vector:.1f} P" if case.vectors else ""
    bound = f"{case.vectors} P" if case.vectors else ""
    return (
        f"{torch_only:.0f} / {imported:.0f} | {size:.0f} | {vector:.3g} | {above:.0f} | {floats} | {bound}"
        f" | {grows} (rounds {', '.join(map(str, marks))}) | {meter.first - begin:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    if args.case:
        case = CASES[args.case]
        print(f"| {args.case} |", play(case, args.rounds or case.rounds))
        return
    print(
        "| case | baseline: torch and Lightning / with this package | data | one vector | peak above the baseline"
        " | less data | bound | resident above the baseline after a round | seconds to the first round |"
    )
    print("|---" * 9 + "|")
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(next(line for line in done.stdout.splitlines() if line.startswith(f"| {name}")), flush=True)


if __name__ == "__main__":
    main()
