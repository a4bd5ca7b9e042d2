"""What the examples that compare several short runs share: their command line and a run without any output."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory


def read_arguments(description: str | None) -> argparse.Namespace:
    """Read the number of rounds and the folder for pictures, and make runs quiet."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    return arguments


def history_of(
    rule: AggregationRule, module: pl.LightningModule, data: FederatedDataModule, rounds: int, **options: Any
) -> RunHistory:
    """Train one federation, and return its numbers; ``options`` are arguments of the trainer."""
    history = RunHistory()
    trainer = FederatedTrainer(
        rounds=rounds,
        callbacks=[rule, history],
        client_eval=False,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)
    return history


def new_module(kind: type[pl.LightningModule]) -> Any:
    """Make a module with the same initial model in every run."""
    torch.manual_seed(0)
    return kind()
