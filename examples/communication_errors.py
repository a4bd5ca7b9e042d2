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

from collections.abc import Mapping, Sequence
from pathlib import Path

from compare_rules import RULES, federation_parser, run

from lightning_fedhaw.comparing import Comparison
from lightning_fedhaw.plotting import RunHistory, draw_curves, draw_lines

METHODS = {name: RULES[name] for name in ("FedAvg", "FedHyper G", "FedLWS", "FedLAW", "FedAdp", "FedHAW")}
METHODS |= {"FedProx": "FedAvg + FedProx(mu=0.001)", "FedProx + HAW": "FedHAW + FedProx(mu=0.001)"}


def draw(
    errors: Sequence[float],
    accuracies: Mapping[str, Sequence[float]],
    worst_runs: Mapping[str, RunHistory],
    folder: Path,
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


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, in aligned columns."""
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column))
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}"]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(f"{cell:>{width}}")
        print(*cells)


def main(argv: list[str] | None = None) -> Comparison:
    parser = federation_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--errors", nargs="+", type=float, default=[0.0, 0.2, 0.5, 0.8], help="largest error rates")
    policies = ("zero_update", "reuse_update", "reuse_model", "discard")
    parser.add_argument(
        "--fallback", default="zero_update", choices=policies, help="the substitute for a failed client's update"
    )
    parser.add_argument("--legacy-seed", type=int, help="draw as the authors' code does from this seed")
    args = parser.parse_args(argv)

    errors = sorted(args.errors)
    channels = []
    for error in errors:
        arguments = f"max_probability={error:g}, legacy_seed={args.legacy_seed}, fallback={args.fallback!r}"
        channels.append(f"ErasureChannel({arguments})")
    results = run({name: METHODS[name] for name in args.methods}, args, channel=channels)

    accuracies: dict[str, list[float]] = {name: [] for name in args.methods}
    for group in results.groups:  # one for each error rate
        for name in args.methods:
            accuracies[name].append(group.numbers(name)["last_ten"][0])
    table = [["method", *(f"errors up to {error:g}" for error in errors)]]
    for name, values in accuracies.items():
        table.append([name, *(f"{value:.1%}" for value in values)])
    print()
    print_table(table)
    worst_runs = {name: runs[0] for name, runs in results.histories(results.groups[-1]).items()}
    for picture in draw(errors, accuracies, worst_runs, args.output):
        print(f"picture: {picture}")
    return results


if __name__ == "__main__":
    main()
