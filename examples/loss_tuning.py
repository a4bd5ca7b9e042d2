"""Loss tuning for rare classes: scales and shifts of the logits are learned by a class-balanced loss.

    python examples/loss_tuning.py [--data mnist.npz]

Ten clients, whose classes fall from many samples to few. FedAvg trains on what is there; AggITD trains the same network
under logits that it tunes by the balanced loss of the clients' held-out samples. Default: scikit-learn's digits, no
download, under a minute on two cores. Prints a table; writes `outputs/loss_tuning.png`.
"""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from matplotlib import pyplot as plt
from short_runs import history_of, images, new_module, read_arguments
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import DirichletPartitioner, FedAvgCallback, FederatedDataModule, LongTailPartitioner
from lightning_fedhaw.bilevel import AggITDCallback, ClassLogits
from lightning_fedhaw.extending import AggregationRule

IMBALANCE = 50
"""The samples of class 0 for each sample of class 9."""


class TunedClassifier(pl.LightningModule):
    """An ordinary module, but for the part between logits and training loss."""

    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 10))
        self.tuning = ClassLogits(10)
        sizes = torch.tensor([IMBALANCE ** (-label / 9) for label in range(10)])
        self.register_buffer("balance", 1 / sizes, persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.tuning(self.net(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        is_right = logits.argmax(1) == batch[1]
        is_rare = batch[1] >= 7
        self.log("val_loss", cross_entropy(logits, batch[1], weight=self.balance))
        self.log("val_acc", is_right.float().mean())
        if is_rare.any():
            self.log("rare_acc", is_right[is_rare].float().mean(), batch_size=int(is_rare.sum()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.3)


def main() -> None:
    """Compare FedAvg with tuned logits."""
    arguments = read_arguments(__doc__, rounds=120, has_data=True)
    train, test = images(arguments.data)
    pixels = train.tensors[0].shape[1]
    rules: dict[str, AggregationRule] = {
        "FedAvg": FedAvgCallback(),
        "AggITD": AggITDCallback("tuning", lower_rounds=5, q="sum", upper_lr=0.2, upper_optimizer=torch.optim.Adam),
    }
    print(f"{'rule':10}{'accuracy':>10}{'classes 7 to 9':>16}")
    tuning = ClassLogits(10)
    for name, rule in rules.items():
        module = new_module(partial(TunedClassifier, pixels))
        if name == "FedAvg":
            # Half of each logit is what the tuned loss begins with; FedAvg takes the whole one.
            module.tuning = nn.Identity()
        history = history_of(
            rule, module, clients(train, test), arguments.rounds, seed=1, client_val_fraction=0.25, local_epochs=2
        )
        accuracy, rare = history.curve("val_acc")[-1], history.curve("rare_acc")[-1]
        print(f"{name:10}{accuracy:>10.1%}{rare:>16.1%}")
        if name == "AggITD":
            tuning = module.tuning
    path = arguments.output / "loss_tuning.png"
    draw(tuning, path)
    print(f"picture: {path}")


def clients(train: TensorDataset, test: TensorDataset) -> FederatedDataModule:
    """Cut the classes to a long tail, and split it over ten clients."""
    partitioner = LongTailPartitioner(IMBALANCE, DirichletPartitioner(1.0))
    return FederatedDataModule(train, num_clients=10, partitioner=partitioner, batch_size=16, val=DataLoader(test, 512))


def draw(tuning: ClassLogits, path: object) -> None:
    """Draw what was learned for each class."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
    for axis, name, values in (
        (axes[0], "scale of the logit", torch.sigmoid(tuning.scale)),
        (axes[1], "shift of the logit", tuning.shift),
    ):
        axis.bar(range(10), values.detach().numpy())
        axis.set_xlabel("class, from frequent to rare")
        axis.set_ylabel(name)
        axis.set_xticks(range(10))
    figure.savefig(path, dpi=120)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
