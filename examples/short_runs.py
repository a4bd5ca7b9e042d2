"""What the examples that compare several short runs share: their command line and a run without any output."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory


def read_arguments(
    description: str | None, rounds: int = 30, *, has_data: bool = False, has_seeds: bool = False
) -> argparse.Namespace:
    """Read the number of rounds, the folder for pictures and, where asked for, data and seeds; and make runs quiet."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    if has_data:
        text = "an npz file with train_x, train_y, test_x and test_y, such as MNIST; default: scikit-learn's digits"
        parser.add_argument("--data", type=Path, default=None, help=text)
    if has_seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    return arguments


def images(path: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Read training and test images as vectors of pixels from 0 to 1: of a file, or scikit-learn's digits."""
    if path is None:
        pixels, digits = load_digits(return_X_y=True)
        arrays = train_test_split(pixels / 16.0, digits, test_size=0.2, random_state=0, stratify=digits)
        x_train, x_test, y_train, y_test = (torch.as_tensor(array) for array in arrays)
    else:
        with np.load(path) as file:
            x_train, y_train, x_test, y_test = (
                torch.as_tensor(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")
            )
        if x_train.max() > 1:
            x_train, x_test = x_train / 255, x_test / 255
    train = TensorDataset(x_train.flatten(1).float(), y_train.long())
    return train, TensorDataset(x_test.flatten(1).float(), y_test.long())


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


def new_module(kind: Callable[[], pl.LightningModule]) -> Any:
    """Make a module with the same initial model in every run."""
    torch.manual_seed(0)
    return kind()
