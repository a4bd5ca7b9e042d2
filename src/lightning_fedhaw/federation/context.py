"""What all steps of a round work with."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import Server


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that are there before its federation, and are never replaced.

    Attributes:
        host: The trainer around the federation.
        server: The global model.
        data: The clients' data.
        rule: The aggregation rule.
        options: The federation's arguments.
        ranks: The processes that share the work.
        seed: The federation's seed, as it was when the run began.
    """

    host: Host
    server: Server
    data: ClientData
    rule: Rule
    options: FederationOptions
    ranks: Ranks
    seed: int
