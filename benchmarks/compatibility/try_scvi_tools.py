"""Scvi-tools: its variational autoencoder on drawn counts, trained by `model.train(callbacks=[...])`."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import scvi
import torch
from common import SEED, Setting, Trained, hold
from scvi.dataloaders import DataSplitter
from torch.utils.data import DataLoader


def joined(cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of single cells, each of which comes as a batch of one."""
    return {name: torch.cat([torch.as_tensor(np.atleast_2d(cell[name])) for cell in cells]) for name in cells[0]}


class CellByCell(DataSplitter):
    """The package's data, without its loader, whose sampler makes the batches (`batch_size=None`)."""

    shuffle = True

    def train_dataloader(self) -> DataLoader[Any]:
        cells = super().train_dataloader().dataset
        size = self.data_loader_kwargs["batch_size"]
        return DataLoader(cells, batch_size=size, shuffle=self.shuffle, collate_fn=joined)


class SCVI(scvi.model.SCVI):
    _data_splitter_cls = CellByCell


def train(setting: Setting, model_class: type[scvi.model.SCVI] = SCVI) -> Trained:
    scvi.settings.seed = SEED
    CellByCell.shuffle = not setting.comparable
    generator = np.random.default_rng(0)
    data = anndata.AnnData(generator.poisson(2.0, size=(200, 30)).astype(np.float32))
    model_class.setup_anndata(data)
    model = model_class(data, n_hidden=16, n_latent=4)
    arguments = setting.arguments
    model.train(
        train_size=0.9,
        batch_size=32,
        check_val_every_n_epoch=1,
        **{name: arguments[name] for name in ("max_epochs", "accelerator", "devices", "callbacks", "logger")},
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Trained(model.trainer, model.trainer.lightning_module)


if __name__ == "__main__":
    hold("scvi-tools", train, own_trainer=False, as_documented=lambda setting: train(setting, scvi.model.SCVI))
