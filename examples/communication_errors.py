"""FedHAW's robustness experiment: clients fail at random, and each rule aggregates the updates that are received.

    python examples/communication_errors.py                                  scikit-learn's digits
    python examples/communication_errors.py --data MNIST --rounds 200        by torchvision, which downloads it
    python examples/communication_errors.py --data mnist.npz --errors 0.2 0.8 --methods FedAvg FedHAW

As in the paper, every client draws an error rate uniformly up to the maximum, once a run; a client that fails does not
train, and the broadcast model is a substitute for its own (``ErasureChannel(max_probability=...)``). ``--fallback``
chooses another policy, ``--legacy-seed 23`` the rates and failures of the authors' code. Prints the mean accuracy of
the last ten rounds for each method and maximal rate, and draws it, with the curves at the highest rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from compare_rules import RULES, federation_parser, load, mean_of_last, print_table, run, silence

import lightning_fedhaw as fed
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_curves, draw_lines

Method = Callable[[], tuple[AggregationRule, list[pl.Callback]]]


Accuracies = Mapping[str, Sequence[float]]


def method(rule: str, *objectives: Callable[[], fed.FedProx]) -> Method:
    """Return a function that creates a rule of ``compare_rules.py`` and objectives for one run."""
    return lambda: (RULES[rule](), [objective() for objective in objectives])


METHODS: dict[str, Method] = {
    "FedAvg": method("FedAvg"),
    "FedHyper G": method("FedHyper G"),
    "FedLWS": method("FedLWS"),
    "FedLAW": method("FedLAW"),
    "FedAdp": method("FedAdp"),
    "FedHAW": method("FedHAW"),
    "FedProx": method("FedAvg", lambda: fed.FedProx(1e-3)),
    "FedProx + HAW": method("FedHAW", lambda: fed.FedProx(1e-3)),
}


def draw(
    errors: Sequence[float], accuracies: Accuracies, worst_runs: Mapping[str, RunHistory], folder: Path
) -> list[Path]:
    """Draw accuracy over error rates, and over rounds at the highest rate.

    Args:
        errors: The largest error rates.
        accuracies: The mean accuracy of the last ten rounds at each rate, by method.
        worst_runs: The run at the highest rate, by method.
        folder: Where the pictures are saved.

    Returns:
        The paths of the pictures.
    """
    over_errors = folder / "communication_errors.png"
    over_rounds = folder / "communication_errors_rounds.png"
    ylabel = "val_acc, mean of the last ten rounds"
    draw_lines(errors, accuracies, over_errors, "largest error rate of a client", ylabel)
    draw_curves(worst_runs, over_rounds)
    return [over_errors, over_rounds]


def main(argv: list[str] | None = None) -> dict[str, dict[float, RunHistory]]:
    parser = federation_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--errors", nargs="+", type=float, default=[0.0, 0.2, 0.5, 0.8], help="largest error rates")
    policies = ("zero_update", "reuse_update", "reuse_model", "discard")
    parser.add_argument(
        "--fallback", default="zero_update", choices=policies, help="the substitute for a failed client's update"
    )
    parser.add_argument("--legacy-seed", type=int, help="draw as the authors' code does from this seed")
    args = parser.parse_args(argv)
    silence()
    warnings.filterwarnings("ignore", message="No client update was received in round")

    split = load(args.data, args.folder)
    errors = sorted(args.errors)
    runs: dict[str, dict[float, RunHistory]] = {}
    accuracies: dict[str, list[float]] = {}
    table = [["method"]]
    for error in errors:
        table[0].append(f"errors up to {error:g}")
    for name in args.methods:
        runs[name] = {}
        accuracies[name] = []
        for error in errors:
            print(f"\n{name}, errors up to {error:g}")
            rule, objectives = METHODS[name]()
            channel = fed.ErasureChannel(max_probability=error, legacy_seed=args.legacy_seed, fallback=args.fallback)
            history, _ = run(rule, split, args, channel, *objectives)
            runs[name][error] = history
            accuracies[name].append(mean_of_last(history.curve("val_acc")))
        table.append([name])
        for accuracy in accuracies[name]:
            table[-1].append(f"{accuracy:.1%}")
    print_table(table)
    worst_runs = {name: histories[errors[-1]] for name, histories in runs.items()}
    for picture in draw(errors, accuracies, worst_runs, args.output):
        print(f"picture: {picture}")
    return runs


if __name__ == "__main__":
    main()
