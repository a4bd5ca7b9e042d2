"""Weights by a power of the clients' sizes whose exponent is learned, between weights by examples and uniform ones.

    python examples/learned_weighting.py

scikit-learn's digits: two large clients with three classes each, and eight small clients with all classes. By examples
the two large ones drown the others, and uniform weights are better; the exponent is learned from both ends. No
download, under a minute on two cores. Prints a table; writes `outputs/learned_weighting.png`.
"""

from __future__ import annotations

import torch
from digits import DigitClassifier
from short_runs import history_of, new_module, read_arguments
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from lightning_fedhaw import (
    FedAvgCallback,
    FederatedDataModule,
    IndexPartitioner,
    LearnedWeightingCallback,
    Probe,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_bands


def unequal_clients() -> FederatedDataModule:
    """Give two clients most samples of six digits, and eight clients a few samples of all digits."""
    pixels, digits = load_digits(return_X_y=True)
    arrays = train_test_split(pixels / 16.0, digits, test_size=0.2, random_state=0, stratify=digits)
    x_train, x_val, y_train, y_val = (torch.as_tensor(array) for array in arrays)
    large = []
    spare = [(y_train > 5).nonzero().flatten()]
    for own in ((0, 1, 2), (3, 4, 5)):
        samples = torch.isin(y_train, torch.tensor(own)).nonzero().flatten()
        large.append(samples[80:])
        spare.append(samples[:80])
    mixed = torch.cat(spare)
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))[:320]]
    return FederatedDataModule(
        TensorDataset(x_train.float(), y_train.long()),
        val=TensorDataset(x_val.float(), y_val.long()),
        batch_size=16,
        partitioner=IndexPartitioner([*large, *mixed.split(40)]),
    )


def main() -> None:
    """Compare fixed exponents with learned ones."""
    arguments = read_arguments(__doc__)

    # The loss of which client counts: here that of an average client, and not that of an average sample.
    probe = Probe("cohort", weighting="uniform")
    rules: dict[str, AggregationRule] = {
        "by examples": FedAvgCallback("examples"),
        "uniform": FedAvgCallback("uniform"),
        "learned from 1": LearnedWeightingCallback(1.0, hyper_lr=0.05, probe=probe),
        "learned from 0": LearnedWeightingCallback(0.0, hyper_lr=0.05, probe=probe),
    }
    runs: dict[str, list[RunHistory]] = {}
    print(f"{'weights':16}{'accuracy':>10}{'exponent':>10}")
    for name, rule in rules.items():
        history = history_of(rule, new_module(DigitClassifier), unequal_clients(), arguments.rounds, seed=1)
        runs[name] = [history]
        exponent = {"by examples": "1", "uniform": "0"}.get(name)
        if exponent is None:
            exponent = f"{history.curve('learned/exponent')[-1]:.2f}"
        print(f"{name:16}{history.curve('val_acc')[-1]:>10.1%}{exponent:>10}")
    path = arguments.output / "learned_weighting.png"
    draw_bands(runs, ["val_acc", "learned/exponent"], path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
