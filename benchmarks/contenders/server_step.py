"""FedHAW's server step alone: K client vectors of P parameters come in, the next global model goes out.

``{"how": "ours"}``: ``PublishedFedHAWCallback.step``. ``{"how": "authors"}``: the same formulas as the authors' code
writes them, Python sums over clients for each named tensor. ``{"how": "read"}``: every vector of the cohort read once
by a dot product, which is what memory allows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from workloads import Clock, Job, run_contender

from lightning_fedhaw import PublishedFedHAWCallback
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

LAYERS = 8
LR, LR_GAMMA, LR_LAMBDA = 0.1, 1e-5, 1e-4
Named = dict[str, Tensor]


class Server:
    """The part of a server that the rule uses."""

    proxy_dataset = None

    def __init__(self, parameters: int) -> None:
        layers = [nn.Parameter(torch.empty(parameters // LAYERS, device="meta")) for _ in range(LAYERS)]
        self.layout = ParameterLayout.of(nn.ParameterList(layers))


def ours(start: Tensor, stacks: list[Tensor], rounds: int, clock: Clock) -> Tensor:
    clients, parameters = stacks[0].shape
    rule, server = PublishedFedHAWCallback(LR_GAMMA, LR_LAMBDA), Server(parameters)
    ones, everyone = torch.ones(clients, dtype=torch.int64), torch.arange(clients)
    state = rule.init(start, ones)
    for t in range(rounds):
        vectors = ClientVectors(stacks[t % 2], start)
        cohort = Cohort(t, everyone, ones, ones, ones.bool(), start, vectors, (LR,) * LAYERS)
        clock.tick()
        step = rule.step(cohort, state, server)
        clock.tick()
        start, state = step.parameters, step.state
    return start


def authors(start: Tensor, stacks: list[Tensor], rounds: int, clock: Clock) -> Tensor:
    names = [f"layer{i}" for i in range(LAYERS)]

    def named(vector: Tensor) -> Named:
        return dict(zip(names, vector.chunk(LAYERS), strict=True))

    clients = range(len(stacks[0]))
    centers = [torch.zeros_like(start) for _ in stacks]
    previous: list[Named] = []
    w, gamma, lambda_ = named(start), start.new_zeros(()), start.new_zeros(len(clients))
    for t in range(rounds):
        now = torch.cat(list(w.values()))
        stacks[t % 2] += now - centers[t % 2]  # displacements become models where they are: a copy would be gigabytes
        centers[t % 2] = now
        cohort = [named(row) for row in stacks[t % 2]]
        clock.tick()
        if previous:
            s = lambda_.exp() / lambda_.exp().sum()
            r = {n: w[n] - sum(s[k] * cohort[k][n] for k in clients) for n in names}
            gamma = gamma - LR_GAMMA * gamma.exp() / LR * sum((r[n] * w[n]).sum() for n in names)
            for k in clients:
                inner = sum((r[n] * previous[k][n]).sum() for n in names)
                lambda_[k] -= LR_LAMBDA * (2 * gamma).exp() / LR * s[k] * (1 - s[k]) * inner
        s = lambda_.exp() / lambda_.exp().sum()
        w = {n: gamma.exp() * sum(s[k] * cohort[k][n] for k in clients) for n in names}
        clock.tick()
        previous = cohort
    return torch.cat(list(w.values()))


def read(start: Tensor, stacks: list[Tensor], rounds: int, clock: Clock) -> Tensor:
    for t in range(rounds):
        clock.tick()
        for row in stacks[t % 2]:
            torch.dot(row, row)
        clock.tick()
    return start


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    clients, parameters = job.options["clients"], job.options["parameters"] // LAYERS * LAYERS
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(parameters, generator=generator).to(job.device)
    stacks = [torch.empty(clients, parameters, device=job.device) for _ in range(2)]
    for stack in stacks:
        for row in stack:
            row.copy_(torch.randn(parameters, generator=generator)).mul_(0.01)
    clock = Clock(job.device, every=2)
    how = {"ours": ours, "authors": authors, "read": read}[job.options["how"]]
    end = how(start, stacks, job.options["rounds"] + 1, clock)
    return clock, lambda: end.double().norm().item()


if __name__ == "__main__":
    run_contender(play)
