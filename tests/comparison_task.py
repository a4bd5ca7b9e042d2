"""What a researcher brings to a comparison: a cell, a module and data by class path, and rules of their own."""

from dataclasses import replace

import torch

from cli_task import Samples
from federations import Classifier
from lightning_fedhaw import FedAvgCallback
from lightning_fedhaw.comparing import Cell


class Network(Classifier):
    """Starts from the seed of the run."""

    def __init__(self, hidden: int = 4, lr: float = 0.1):
        super().__init__(lambda p: torch.optim.SGD(p, lr=lr), hidden=hidden, seed=torch.initial_seed())


class Half(FedAvgCallback):
    """Goes a share of the way."""

    def __init__(self, share: float = 0.5):
        super().__init__()
        self.share = share

    def step(self, cohort, state, server):
        output = super().step(cohort, state, server)
        start = cohort.vectors.start
        return replace(output, parameters=torch.lerp(start, output.parameters, self.share))


class Broken(FedAvgCallback):
    """Raises an error of its own."""

    def step(self, cohort, state, server):
        raise ZeroDivisionError("no step")


class Runaway(FedAvgCallback):
    """Ends in infinity."""

    def step(self, cohort, state, server):
        output = super().step(cohort, state, server)
        return replace(output, parameters=output.parameters * 1e30)


def small() -> Cell:
    return Cell("small", Network, Samples, {"num_clients": 4, "alpha": 10.0})
