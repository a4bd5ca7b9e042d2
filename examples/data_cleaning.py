"""Data cleaning: half of the clients have many wrong labels, which learned weights of the samples find.

    python examples/data_cleaning.py [--data mnist.npz] [--seeds 0 1 2]

Ten clients; half of the labels of five of them are wrong. Each client holds out some samples whose labels were checked.
AggITD learns one weight for each training sample, which never leaves its client. Default: scikit-learn's digits, no
download, half a minute on two cores. Prints accuracy, and how well the weights tell wrong labels from right ones (AUC:
0.5 is chance, 1 is perfect); writes `outputs/data_cleaning.png`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from matplotlib import pyplot as plt
from short_runs import history_of, images, new_module, read_arguments
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_fedhaw import FedAvgCallback, FederatedDataModule, IndexPartitioner
from lightning_fedhaw.bilevel import AggITDCallback, SampleWeights, with_indices
from lightning_fedhaw.extending import AggregationRule

CLIENTS = 10
NOISY_CLIENTS = 5
SHARE_OF_WRONG_LABELS = 0.5
SHARE_OF_CHECKED_SAMPLES = 0.2


class WeightedClassifier(pl.LightningModule):
    """An ordinary module, but for a weight for each sample in the training loss."""

    def __init__(self, samples: int, pixels: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 10))
        self.weights = SampleWeights(samples)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        losses = cross_entropy(self.net(images), labels, reduction="none")
        return (self.weights(index) * losses).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.3)


class NoisyFederation:
    """The samples of all clients: checked ones, and training samples some of whose labels are wrong.

    Attributes:
        train: The training samples with their numbers.
        is_wrong: ``[samples]``, whose label is wrong.
        parts: The training samples of each client.
        checked: The checked samples of each client.
    """

    def __init__(self, train: TensorDataset, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = train.tensors
        order = torch.randperm(len(labels), generator=generator)
        num_checked = int(SHARE_OF_CHECKED_SAMPLES * len(order))
        checked, rest = order[:num_checked], order[num_checked:]
        self.checked = [TensorDataset(inputs[own], labels[own]) for own in checked.chunk(CLIENTS)]
        self.parts = list(torch.arange(len(rest)).chunk(CLIENTS))
        noisy = torch.cat(self.parts[:NOISY_CLIENTS])
        self.is_wrong = torch.zeros(len(rest), dtype=torch.bool)
        self.is_wrong[noisy] = torch.rand(len(noisy), generator=generator) < SHARE_OF_WRONG_LABELS
        given = labels[rest].clone()
        shifts = torch.randint(1, 10, (len(rest),), generator=generator)
        given[self.is_wrong] = (given + shifts)[self.is_wrong] % 10
        self.train = with_indices(TensorDataset(inputs[rest], given))

    def data(self) -> FederatedDataModule:
        """Return the clients, each with checked samples of its own."""
        return FederatedDataModule(
            self.train, partitioner=IndexPartitioner(self.parts), num_clients=CLIENTS, batch_size=16, val=self.checked
        )


def main() -> None:
    """Compare FedAvg with learned weights, over seeds."""
    arguments = read_arguments(__doc__, rounds=30, has_data=True, has_seeds=True)
    train, test = images(arguments.data)
    print(f"{'rule':10}{'seed':>6}{'accuracy':>10}{'AUC':>8}")
    for seed in arguments.seeds:
        federation = NoisyFederation(train, seed)
        rules: dict[str, AggregationRule] = {
            "FedAvg": FedAvgCallback(),
            "AggITD": AggITDCallback(
                "weights", lower_rounds=3, q="sum", upper_lr=0.5, upper_optimizer=torch.optim.Adam, clip=10.0
            ),
        }
        for name, rule in rules.items():
            torch.manual_seed(seed)
            module = new_module(partial(WeightedClassifier, len(federation.train), train.tensors[0].shape[1]))
            history_of(
                rule, module, federation.data(), arguments.rounds, seed=seed, local_epochs=5, limit_val_batches=0
            )
            weights = 2 * torch.sigmoid(module.weights.logits.detach())
            auc = "-"
            if name == "AggITD":
                auc = f"{roc_auc_score(~federation.is_wrong, weights):.3f}"
            print(f"{name:10}{seed:>6}{accuracy(module, test):>10.1%}{auc:>8}")
    path = arguments.output / "data_cleaning.png"
    draw(weights, federation.is_wrong, path)
    print(f"picture: {path}")


@torch.no_grad()
def accuracy(module: WeightedClassifier, test: TensorDataset) -> float:
    """Return the share of test samples that the global model classifies right."""
    inputs, labels = test.tensors
    return float((module.net(inputs).argmax(1) == labels).float().mean())


def draw(weights: Tensor, is_wrong: Tensor, path: Path) -> None:
    """Draw the weights of samples with right and with wrong labels."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    bins = torch.linspace(0, 2, 41).numpy()
    for name, chosen in (("right label", ~is_wrong), ("wrong label", is_wrong)):
        axis.hist(weights[chosen].numpy(), bins=bins, alpha=0.6, density=True, label=name)
    axis.set_xlabel("learned weight of a training sample")
    axis.set_ylabel("density")
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
