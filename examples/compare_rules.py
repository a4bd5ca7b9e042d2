"""Every aggregation rule on one federation: the same clients, cohorts, batches, proxy data and initial model.

    python examples/compare_rules.py                                        scikit-learn's digits
    python examples/compare_rules.py --data MNIST --clients-per-round 0.5   by torchvision, which downloads it
    python examples/compare_rules.py --data mnist.npz --rules FedAvg FedLAW FedHAW

An npz file holds `train_x` [samples, ...], `train_y`, `test_x` and `test_y`; images of bytes are scaled to [0, 1].
Rules are named after their classes, without "Callback". Prints a table and draws the curves. Rules that learn on the
server's data get `--proxy` samples of the training data; no rule trains its clients on them. Finished runs are kept in
`--output` and not repeated. The command `fedhaw compare` does the same with rules, data and settings of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_fedhaw.comparing import Comparison, compare
from lightning_fedhaw.plotting import draw_curves

# A rule is named after its class, without "Callback"; variants of a rule have a word more.
RULES = {
    "FedAvg": "FedAvg",
    "FedNova": "FedNova",
    "FedAvgM": "FedAvgM(lr=0.5, momentum=0.5)",
    "FedAdagrad": "FedAdagrad(lr=0.03)",
    "FedAdam": "FedAdam(lr=0.03)",
    "FedYogi": "FedYogi(lr=0.03)",
    "FedAdp": "FedAdp",
    "FedExP": "FedExP",
    "FedAWA": "FedAWA",
    "FedVG": "FedVG",
    "FedLWS": "FedLWS",
    "FedHyper G": "FedHyper('G', normalize_by='norms', hyper_lr=0.1)",
    "FedHyper G+SL": "FedHyper('G+SL', normalize_by='norms', hyper_lr=0.1)",
    "FedHyper G+CL": "FedHyper('G+CL', normalize_by='norms', hyper_lr=0.1)",
    "FedHAW": "FedHAW",
    "PublishedFedHAW": "PublishedFedHAW",
    "Scaffold": "Scaffold",
    "FedDyn": "FedDyn(regularization=0.1)",
    "FedLAW": "FedLAW(server_epochs=20)",
    "FedLAW in stages": "FedLAW('in_stages', server_epochs=20)",
    "ServerFineTuning": "ServerFineTuning",
    "FedDF": "FedDF(server_epochs=20)",
    "FedBE": "FedBE(server_epochs=20)",
    "CoordinateMedian": "CoordinateMedian",
    "TrimmedMean": "TrimmedMean(num_byzantine=1)",
    "Krum": "Krum(num_byzantine=1)",
    "MultiKrum": "MultiKrum(num_byzantine=1)",
    "GeometricMedian": "GeometricMedian",
}


def federation_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the options of a federation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, MNIST, FashionMNIST, CIFAR10, or an npz file")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where torchvision stores downloads")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--clients-per-round", type=float, default=1.0, help="share of the clients")
    parser.add_argument("--alpha", type=float, default=0.1, help="Dirichlet concentration: small is unequal")
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05, help="of the clients' SGD")
    parser.add_argument("--proxy", type=int, default=100, help="samples of the server's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at the same time")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser


def run(rules: dict[str, str], args: argparse.Namespace, **settings: list[Any]) -> Comparison:
    """Run rules on the federation that the options describe.

    Args:
        rules: The rules by name, as expressions.
        args: The options.
        settings: Further settings, each a list of values.
    """
    cell = f"torchvision({args.data!r}, root={str(args.folder)!r}, hidden=[128])"
    if args.data == "digits":
        cell = "digits(hidden=[128])"
    elif args.data.endswith(".npz"):
        cell = f"npz({args.data!r}, hidden=[128])"
    federation: dict[str, list[Any]] = {
        "num_clients": [args.clients],
        "clients_per_round": [args.clients_per_round],
        "alpha": [args.alpha],
        "local_epochs": [args.local_epochs],
        "model.lr": [args.lr],
        "data.batch_size": [args.batch_size],
        "data.proxy": [args.proxy],
    }
    return compare(
        rules,
        {Path(args.data).stem: cell},
        rounds=args.rounds,
        seeds=[args.seed],
        settings={**federation, **settings},
        target=getattr(args, "target", None),
        output=args.output,
        jobs=args.jobs,
        accelerator=args.accelerator,
        progress=print,
    )


def main(argv: list[str] | None = None) -> Comparison:
    parser = federation_parser(__doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose first round is printed")
    args = parser.parse_args(argv)
    results = run({name: RULES[name] for name in args.rules}, args)
    print(f"\n{results.table()}")
    histories = results.histories(results.groups[0])
    picture = args.output / "rules.png"
    draw_curves({name: runs[0] for name, runs in histories.items()}, picture)
    print("server ms: of aggregation, a round. MB up and down: of all rounds. state MB: what the rule keeps.")
    print(f"picture: {picture}")
    return results


if __name__ == "__main__":
    main()
