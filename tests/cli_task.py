"""What a user of the command line has: a data module in a file, and a module without an optimizer of its own."""

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from federations import Classifier, samples


class Samples(pl.LightningDataModule):
    def __init__(self, count: int = 120, batch_size: int = 8):
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def train_dataloader(self):
        return DataLoader(samples(self.count), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(60, seed=1), batch_size=32)

    test_dataloader = predict_dataloader = val_dataloader


class SavedSamples(Samples):
    """Reads its arguments from its hyper-parameters, as many data modules do."""

    def __init__(self, count: int = 120, batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(samples(self.hparams.count), batch_size=self.hparams.batch_size, shuffle=True)


class Network(Classifier):
    def __init__(self, hidden: int = 8, dropout: float = 0.0):
        super().__init__(hidden=hidden, dropout=dropout, seed=5)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch[0]).square().mean())
