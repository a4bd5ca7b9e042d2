"""FedHAW's robustness experiment: clients that fail at random, and what each rule makes of those that do not.

    python examples/communication_errors.py                                  scikit-learn's digits
    python examples/communication_errors.py --data MNIST --rounds 200        by torchvision, which downloads it
    python examples/communication_errors.py --data mnist.npz --errors 0.2 0.8 --methods FedAvg FedHAW

As in the paper, every client draws an error rate uniformly up to the maximum, once a run; a client that fails does not
train, and the model just broadcast takes its place (``ErasureChannel(max_probability=...)``). ``--fallback`` has the
other policies, ``--legacy-seed 23`` the rates and failures of the authors' code. Prints the mean accuracy of
the last ten rounds for each method and maximal rate, and draws it, with the curves at the highest rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from compare_rules import RULES, load, options, play, print_table, quietly

import lightning_fedhaw as fed
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_curves, draw_lines

Method = Callable[[], tuple[AggregationRule, list[pl.Callback]]]


def plain(name: str) -> Method:
    return lambda: (RULES[name](), [])


METHODS: dict[str, Method] = {
    **{name: plain(name) for name in ("FedAvg", "FedHyper G", "FedLWS", "FedLAW", "FedAdp", "FedHAW")},
    "FedProx": lambda: (fed.FedAvgCallback(), [fed.FedProx(1e-3)]),
    "FedProx + HAW": lambda: (fed.FedHAWCallback(), [fed.FedProx(1e-3)]),
}


def final(history: RunHistory) -> float:
    """Mean accuracy of the last ten rounds."""
    last = history.curve("val_acc")[-10:]
    return sum(last) / len(last)


def draw(errors: Sequence[float], runs: Mapping[str, Mapping[float, RunHistory]], folder: Path) -> list[Path]:
    """Accuracy over error rates, and over rounds at the highest."""
    paths = [folder / "communication_errors.png", folder / "communication_errors_rounds.png"]
    means = {name: [final(of[error]) for error in errors] for name, of in runs.items()}
    draw_lines(errors, means, paths[0], "largest error rate of a client", "val_acc, mean of the last ten rounds")
    draw_curves({name: of[errors[-1]] for name, of in runs.items()}, paths[1])
    return paths


def main(argv: list[str] | None = None) -> dict[str, dict[float, RunHistory]]:
    parser = options(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--errors", nargs="+", type=float, default=[0.0, 0.2, 0.5, 0.8], help="largest error rates")
    policies = ("zero_update", "reuse_update", "reuse_model", "discard")
    parser.add_argument(
        "--fallback", default="zero_update", choices=policies, help="what takes a failed client's place"
    )
    parser.add_argument("--legacy-seed", type=int, help="draw as the authors' code does from this seed")
    args = parser.parse_args(argv)
    quietly()
    warnings.filterwarnings("ignore", message="No client update was received in round")

    split, errors = load(args.data, args.folder), sorted(args.errors)
    runs: dict[str, dict[float, RunHistory]] = {name: {} for name in args.methods}
    for name in args.methods:
        for error in errors:
            print(f"\n{name}, errors up to {error:g}")
            rule, more = METHODS[name]()
            channel = fed.ErasureChannel(max_probability=error, legacy_seed=args.legacy_seed, fallback=args.fallback)
            runs[name][error], _, _ = play(rule, split, args, channel, *more)
    rows = [[name, *(f"{final(of[error]):.1%}" for error in errors)] for name, of in runs.items()]
    print_table([["method", *(f"errors up to {error:g}" for error in errors)], *rows])
    for picture in draw(errors, runs, args.output):
        print(f"picture: {picture}")
    return runs


if __name__ == "__main__":
    main()
