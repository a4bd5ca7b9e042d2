"""A learned client rate by exact differentiation, next to FedHyper's SL, its one-sample approximation, and fixed rates.

    python examples/learned_client_rate.py

scikit-learn's digits, ten clients by Dirichlet(0.3), five of them a round. No download, under a minute on two cores.
Prints the accuracy for rates that are too small, right and too large; writes `outputs/learned_client_rate.png` with
accuracy and the factor on the clients' rate over rounds.
"""

from __future__ import annotations

from digits import DigitClassifier, digits
from short_runs import history_of, new_module, read_arguments

from lightning_fedhaw import FedAvgCallback, FedHyperCallback, LearnedClientRateCallback
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_bands

STARTS = (0.03, 0.3, 3.0)
"""The clients' rate, as a multiple of the module's."""

FACTORS = {"exact": "learned_factor", "FedHyper SL": "beta"}
"""The name of the learned factor in each rule's run summary."""


def rules_of() -> dict[str, AggregationRule]:
    """Return the three ways to have a rate."""
    return {
        "fixed": FedAvgCallback(),
        "exact": LearnedClientRateCallback(hyper_lr=0.1, bounds=(0.01, 100.0)),
        "FedHyper SL": FedHyperCallback("SL", beta_bounds=(0.01, 100.0)),
    }


def main() -> None:
    """Compare the three for every start."""
    arguments = read_arguments(__doc__)

    runs: dict[str, list[RunHistory]] = {}
    print(f"{'start':>6}  {'rate':<12}  {'accuracy':>8}  the learned factor at the end")
    for start in STARTS:
        for name, rule in rules_of().items():
            module = new_module(DigitClassifier)
            module.lr = start * module.lr
            history = history_of(rule, module, digits(10, 0.3, 1), arguments.rounds, clients_per_round=5)
            runs[f"{name} from {start}"] = [history]
            factor = ""
            if name in FACTORS:
                factor = f"{rule.summary()[FACTORS[name]]:.3f}"
            print(f"{start:>6}  {name:<12}  {history.curve('val_acc')[-1]:>8.1%}  {factor}")
    path = arguments.output / "learned_client_rate.png"
    draw_bands(runs, ["val_acc", "learned/factor", "beta"], path)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
