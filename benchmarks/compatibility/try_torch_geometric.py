"""PyTorch Geometric: its graph isomorphism network on drawn graphs, with its `LightningDataset`, as in its examples."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from common import Setting, Trained, fitted, hold
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.datasets import FakeDataset
from torch_geometric.nn import GIN, MLP, global_add_pool


class GINClassifier(pl.LightningModule):
    """The module of PyG's `examples/pytorch_lightning/gin.py`."""

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int = 16) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, hidden_channels, 2, dropout=0.5, jk="cat", norm="batch_norm")
        self.classifier = MLP([hidden_channels, hidden_channels, out_channels], norm="batch_norm", dropout=0.5)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.classifier(global_add_pool(self.gnn(x, edge_index), batch))

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(data.x, data.edge_index, data.batch), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def validation_step(self, data: Data, batch_idx: int) -> None:
        loss = cross_entropy(self(data.x, data.edge_index, data.batch), data.y)
        self.log("val_loss", loss, batch_size=data.num_graphs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(setting: Setting) -> Trained:
    graphs = FakeDataset(num_graphs=80, avg_num_nodes=12, num_channels=8, num_classes=4, task="graph")
    # Its data module shuffles unless it is given a sampler.
    same_order = {"sampler": SequentialSampler(graphs[:60])} if setting.comparable else {}
    data = LightningDataset(graphs[:60], graphs[60:], batch_size=10, **same_order)
    return fitted(setting, GINClassifier(8, graphs.num_classes), datamodule=data)


if __name__ == "__main__":
    hold("torch-geometric", train)
