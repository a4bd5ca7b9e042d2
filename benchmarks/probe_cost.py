"""Measure what a learned server rate adds to a round: W1 with two local epochs, FedAvg and FedOpt in turn.

    python benchmarks/probe_cost.py --mnist SPLIT.npz

The probe has its default form and size. Times are those of the process's CPU, so that other work on the machine changes
them little. A ratio is that of two medians over the rounds of a repetition.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contenders"))

import ours
import torch
from workloads import Clock, Job, prepare

CHANGES = {"epochs": 2, "rounds": 3}


class ProcessClock(Clock):
    """Measures the seconds of this process's CPU between ticks."""

    def tick(self, *_: object) -> None:
        self.ticks.append(time.process_time())


def seconds_of(rule: str, data: str) -> float:
    """Return the median time of a round, without the first."""
    job = Job("W1", data, options={"rule": rule}, changes=CHANGES)
    clock = ProcessClock()
    ours.fit(job, clock)
    return statistics.median(clock.seconds[1:])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="the split, as in parity/mnist.py; random images of the same size without it")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        prepare(Job("W1", "", changes=CHANGES).workload, path, arguments.mnist)
        for _ in range(arguments.repetitions):
            plain = seconds_of("fedavg", str(path))
            learned = seconds_of("learned server rate", str(path))
            ratios.append(learned / plain)
            print(f"FedAvg {plain:.3f} s, learned server rate {learned:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
