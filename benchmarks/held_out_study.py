"""Judge FedHAW's default on federations that it was not developed on, against simple rivals, untuned and tuned.

    python benchmarks/held_out_study.py PACKAGES [--seeds 0 1 2 3 4] [--cells "languages" ...] [--report-only]

``held_out_cells.py`` has the list of the federations, written down beforehand, and says how to get their data. Every
run has 40 rounds. Each rival runs with the arguments it has by default and with the best of three rates, which is
chosen for each cell on seed 100, by the mean of the last ten rounds. FedHAW has one setting for all.

Numbers are test accuracy in percent, or 100 R2 for regression (at least -100). Every run is stored as a JSON file in
``--out`` and is not repeated, so that an interrupted study goes on where it was. The report compares over cells,
paired, and names the cells with label noise apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from held_out_cells import CELLS, Cell, Split
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import (
    ErasureChannel,
    FedAdamCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FederatedTrainer,
    FedExPCallback,
    FedHAWCallback,
    GeometricMedianCallback,
    IndexPartitioner,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.report.history import RunHistory

ROUNDS = 40
LAST = 10
TUNING_SEED = 100
WORST = -100.0
"""A regression that diverges would otherwise decide a mean over cells alone."""

Make = Callable[[], AggregationRule]
DEFAULT = "FedHAW"
UNTUNED: dict[str, Make] = {
    DEFAULT: FedHAWCallback,
    "FedAvg": FedAvgCallback,
    "FedAvgM": FedAvgMCallback,
    "FedAdam": FedAdamCallback,
    "FedExP": FedExPCallback,
}
RATES: dict[str, dict[str, Make]] = {
    "FedAvgM, tuned": {f"FedAvgM lr={rate:g}": partial(FedAvgMCallback, rate) for rate in (0.1, 0.3, 1.0)},
    "FedAdam, tuned": {f"FedAdam lr={rate:g}": partial(FedAdamCallback, rate) for rate in (0.01, 0.03, 0.1)},
    "FedExP, tuned": {f"FedExP eps={eps:g}": partial(FedExPCallback, eps) for eps in (1e-5, 1e-3, 1e-1)},
}
VARIANTS: dict[str, Make] = {
    "lr_lambda=0.3": partial(FedHAWCallback, lr_lambda=0.3),
    "lr_gamma=0": partial(FedHAWCallback, lr_gamma=0.0),
    "step to 1, lr_gamma=0": partial(FedHAWCallback, step_bounds=(1.0, 1.0), lr_gamma=0.0),
    "step to 2": partial(FedHAWCallback, step_bounds=(1.0, 2.0)),
    "step to 4": partial(FedHAWCallback, step_bounds=(1.0, 4.0)),
    "geometric median": GeometricMedianCallback,
}
"""What else can be chosen, run only with ``--variants`` and not part of the comparison."""

RULES: dict[str, Make] = {**UNTUNED, **VARIANTS}
for rates in RATES.values():
    RULES |= rates


class Model(pl.LightningModule):
    """The model of a cell, with its optimizer."""

    def __init__(self, cell: Cell, split: Split) -> None:
        super().__init__()
        self.net = cell.network(split)
        self.cell = cell
        self.split = split

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        if self.split.is_regression:
            return mse_loss(output.squeeze(-1), batch[1])
        return cross_entropy(output, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        output = self.net(batch[0])
        if self.split.is_regression:
            error = mse_loss(output.squeeze(-1), batch[1])
            score = 1 - error / batch[1].var(correction=0)
        else:
            score = (output.argmax(1) == batch[1]).float().mean()
        self.log("score", score)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.cell.optimizer(self.parameters(), lr=self.cell.lr)  # type: ignore[call-arg]


def run(cell: Cell, rule: str, seed: int, packages: Path) -> dict[str, Any]:
    """Run a federation; a run that diverges keeps its last score."""
    split = cell.split(packages)
    torch.manual_seed(seed)
    history = RunHistory()
    callbacks: list[Any] = [RULES[rule](), history]
    if cell.max_error:
        callbacks.append(ErasureChannel(max_probability=cell.max_error))
    trainer = FederatedTrainer(
        rounds=ROUNDS,
        local_epochs=cell.epochs,
        clients_per_round=cell.clients_per_round,
        num_clients=len(split.parts),
        partitioner=IndexPartitioner(split.parts),
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
    train = DataLoader(TensorDataset(split.x, split.y), batch_size=cell.batch_size, shuffle=True)
    test = DataLoader(TensorDataset(split.test_x, split.test_y), batch_size=len(split.test_y))
    begin = time.perf_counter()
    diverged = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(Model(cell, split), train, test)
    except FloatingPointError:
        diverged = True
    scores = [max(100 * float(value), WORST) for value in history.curve("score")]
    last = scores[-1] if scores else 0.0
    scores += [last] * (ROUNDS - len(scores))
    return {"scores": scores, "diverged": diverged, "seconds": time.perf_counter() - begin}


# ---------------------------------------------------------------------- the study


class Study:
    """The runs by cell, rule and seed, each in a file."""

    def __init__(self, out: Path, packages: Path, run_missing: bool) -> None:
        self.out = out
        self.packages = packages
        self.run_missing = run_missing

    def get(self, cell: str, rule: str, seed: int) -> dict[str, Any] | None:
        """Return a stored run; run it if it is missing and ``run_missing`` is true."""
        name = "".join(c if c.isalnum() or c in ".-=" else "_" for c in f"{cell}-{rule}-{seed}")
        path = self.out / f"{name}.json"
        if not path.exists():
            if not self.run_missing:
                return None
            result = run(CELLS[cell], rule, seed, self.packages)
            print(f"{cell}, {rule}, seed {seed}: {last_ten(result):.2f} in {result['seconds']:.0f} s", flush=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(result))
            os.replace(unfinished, path)
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored

    def tuned(self, cell: str, column: str) -> str | None:
        """Return the setting of a rival that is best on the seed for tuning."""
        scores: dict[str, float] = {}
        for setting in RATES[column]:
            result = self.get(cell, setting, TUNING_SEED)
            if result is None:
                return None
            scores[setting] = last_ten(result)
        return max(scores, key=lambda setting: scores[setting])

    def column(self, cell: str, column: str, seeds: list[int]) -> dict[int, dict[str, Any]]:
        """Return the finished runs of a column of the table by seed."""
        rule: str | None = column
        if column in RATES:
            rule = self.tuned(cell, column)
        if rule is None:
            return {}
        runs: dict[int, dict[str, Any]] = {}
        for seed in seeds:
            result = self.get(cell, rule, seed)
            if result is not None:
                runs[seed] = result
        return runs


def last_ten(result: dict[str, Any]) -> float:
    return float(np.mean(result["scores"][-LAST:]))


def area(result: dict[str, Any]) -> float:
    return float(np.mean(result["scores"]))


def worst_dip(result: dict[str, Any]) -> float:
    """Return how far a score ever fell below the best one before it, after the first five rounds."""
    scores = np.array(result["scores"])
    return float((np.maximum.accumulate(scores) - scores)[5:].max())


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "mean of the last ten": last_ten,
    "area": area,
    "worst dip": worst_dip,
}


def cell_table(study: Study, cells: list[str], seeds: list[int], columns: list[str]) -> str:
    """Return the means of the last ten rounds by cell, as mean and sample standard deviation over seeds."""
    lines = ["| cell | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for cell in cells:
        entries = []
        for column in columns:
            values = [last_ten(result) for result in study.column(cell, column, seeds).values()]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            entries.append(f"{np.mean(values):.1f} ± {spread:.1f}" if values else "")
        lines.append(f"| {cell} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def differences(
    study: Study, cells: list[str], seeds: list[int], rival: str, measure: Callable[[dict[str, Any]], float]
) -> list[float]:
    """Return the default minus a rival for each cell, paired over seeds."""
    found: list[float] = []
    for cell in cells:
        ours, theirs = (study.column(cell, column, seeds) for column in (DEFAULT, rival))
        shared = sorted(set(ours) & set(theirs))
        if shared:
            found.append(float(np.mean([measure(ours[seed]) - measure(theirs[seed]) for seed in shared])))
    return found


def comparison_table(study: Study, cells: list[str], seeds: list[int], rivals: list[str]) -> str:
    """Return the differences over cells: mean and standard error, and the worst cell."""
    lines = ["| default minus | " + " | ".join(MEASURES) + " | worst cell |", "|---|" + "---:|" * (len(MEASURES) + 1)]
    for rival in rivals:
        entries = []
        for measure in MEASURES.values():
            values = differences(study, cells, seeds, rival, measure)
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            entries.append(f"{np.mean(values):+.1f} ± {error:.1f}" if values else "")
        worst = min(differences(study, cells, seeds, rival, last_ten), default=0.0)
        lines.append(f"| {rival} | " + " | ".join(entries) + f" | {worst:+.1f} |")
    return "\n".join(lines) + "\n"


def report(study: Study, cells: list[str], seeds: list[int], columns: list[str]) -> str:
    """Return the tables; those over cells leave out the cells with label noise."""
    shown = [DEFAULT, *(name for name in columns if name != DEFAULT)]
    judged = [name for name in cells if not CELLS[name].has_label_noise]
    noisy = [name for name in cells if CELLS[name].has_label_noise]
    parts: list[str] = []
    if judged:
        parts += [comparison_table(study, judged, seeds, shown[1:]), cell_table(study, judged, seeds, shown)]
    if noisy:
        parts += ["With label noise:\n", cell_table(study, noisy, seeds, shown)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder with the packages' files")
    parser.add_argument("--out", type=Path, default=Path("outputs/held_out"), help="folder of the finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--columns", nargs="+", choices=[*UNTUNED, *RATES], default=[*UNTUNED, *RATES])
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=[])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/held_out.md"))
    parser.add_argument("--report-only", action="store_true", help="run nothing, report the stored runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        study = Study(args.out, args.packages, run_missing=True)
        for seed in args.seeds:  # one seed at a time, so that there are early results for every cell
            for cell in args.cells:
                for column in [*args.columns, *args.variants]:
                    study.column(cell, column, [seed])
    stored = Study(args.out, args.packages, run_missing=False)
    text = report(stored, args.cells, args.seeds, [*args.columns, *args.variants])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
