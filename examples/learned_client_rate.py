"""A learned client rate by exact differentiation, next to FedHyper's SL, its one-sample approximation, and fixed rates.

    python examples/learned_client_rate.py

scikit-learn's digits, ten clients by Dirichlet(0.3), five of them a round. No download, under a minute on two cores.
Prints the accuracy for rates that are too small, right and too large; writes `outputs/learned_client_rate.png` with
accuracy and the factor on the clients' rate over rounds.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from digits import DigitClassifier, digits

from lightning_fedhaw import FedAvgCallback, FederatedTrainer, FedHyperCallback, LearnedClientRateCallback
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_bands

STARTS = (0.03, 0.3, 3.0)
"""The clients' rate, as a multiple of the module's."""


def rules_of() -> dict[str, AggregationRule]:
    """Return the three ways to have a rate."""
    return {
        "fixed": FedAvgCallback(),
        "exact": LearnedClientRateCallback(hyper_lr=0.1, bounds=(0.01, 100.0)),
        "FedHyper SL": FedHyperCallback("SL", beta_bounds=(0.01, 100.0)),
    }


def train(rule: AggregationRule, start: float, rounds: int) -> RunHistory:
    """Train one federation, and return its numbers."""
    history = RunHistory()
    torch.manual_seed(0)
    trainer = FederatedTrainer(
        rounds=rounds,
        clients_per_round=5,
        callbacks=[rule, history],
        client_eval=False,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DigitClassifier()
    module.lr = start * module.lr
    trainer.fit(module, digits(10, 0.3, 1))
    return history


def main() -> None:
    """Compare the three for every start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)

    runs: dict[str, list[RunHistory]] = {}
    print(f"{'start':>6}  {'rate':<12}  {'accuracy':>8}  the learned factor at the end")
    for start in STARTS:
        for name, rule in rules_of().items():
            history = train(rule, start, arguments.rounds)
            runs[f"{name} from {start}"] = [history]
            factor = ""
            for number in rule.summary().values():
                factor = f"{number:.3f}"
            if name == "FedHyper SL":
                factor = f"{rule.summary()['beta']:.3f}"
            print(f"{start:>6}  {name:<12}  {history.curve('val_acc')[-1]:>8.1%}  {factor}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "learned_client_rate.png"
    draw_bands(runs, ["val_acc", "learned/factor", "beta"], path)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
