"""A server's learning rate and momentum that are learned while training, against fixed ones that start the same.

    python examples/learned_server_optimizer.py

scikit-learn's digits, ten clients by Dirichlet(0.3), five of them a round and five more that are asked for a gradient.
No download, under a minute on two cores. Prints the accuracy of both for three starting rates; writes
`outputs/learned_server_optimizer.png` with accuracy, rate and momentum over rounds.
"""

from __future__ import annotations

import torch
from digits import DigitClassifier, digits
from short_runs import history_of, new_module, read_arguments

from lightning_fedhaw import FedAvgMCallback
from lightning_fedhaw.plotting import RunHistory, draw_bands

STARTS = (0.03, 0.3, 1.0)


def rule_of(lr: float, *, is_learned: bool) -> FedAvgMCallback:
    """Return FedAvgM, which learns its rate and its momentum or keeps them."""
    if not is_learned:
        return FedAvgMCallback(lr=lr, momentum=0.9)
    # Their logarithm and logit are learned, so that steps are relative and both stay where they make sense.
    links = {"lr": "exp", "momentum": "sigmoid"}
    return FedAvgMCallback(
        lr=lr, momentum=0.9, learn=("lr", "momentum"), links=links, hyper_optimizer=torch.optim.Adam, hyper_lr=0.1
    )


def train(rule: FedAvgMCallback, rounds: int) -> RunHistory:
    """Train the digits federation, and return its numbers."""
    return history_of(rule, new_module(DigitClassifier), digits(10, 0.3, 1), rounds, clients_per_round=5)


def main() -> None:
    """Compare learned and fixed numbers for every start."""
    arguments = read_arguments(__doc__)

    runs: dict[str, list[RunHistory]] = {}
    print(f"{'start':>6}  {'fixed':>6}  {'learned':>7}  the learned rate and momentum at the end")
    for start in STARTS:
        fixed = train(rule_of(start, is_learned=False), arguments.rounds)
        learned = train(rule_of(start, is_learned=True), arguments.rounds)
        runs[f"fixed {start}"] = [fixed]
        runs[f"learned from {start}"] = [learned]
        rate = learned.curve("learned/lr")[-1]
        momentum = learned.curve("learned/momentum")[-1]
        accuracies = f"{fixed.curve('val_acc')[-1]:>6.1%}  {learned.curve('val_acc')[-1]:>7.1%}"
        print(f"{start:>6}  {accuracies}  {rate:.3f}, {momentum:.3f}")
    path = arguments.output / "learned_server_optimizer.png"
    draw_bands(runs, ["val_acc", "learned/lr", "learned/momentum"], path)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
