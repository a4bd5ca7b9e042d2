"""The evaluation of the global model on every client's own data at the end of a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.records import Logged, LogRecorder
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.federation.run_state import metrics_of
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.streams import seed_of

EVALUATION_CAP = 1000
"""The number of samples that a client is evaluated on at most."""


class ClientMetrics(NamedTuple):
    """The metrics of all clients.

    Attributes:
        values: ``[N]`` per metric that every client logged.
        higher_is_better: Whether higher is better, for metrics that say so.
    """

    values: dict[str, Tensor]
    higher_is_better: dict[str, bool]


@dataclass(frozen=True)
class EvaluationShare:
    """The metrics of the clients that one process evaluates.

    Attributes:
        rows: The metrics of each of its clients, in their order.
        higher_is_better: Whether higher is better, for metrics that say so.
    """

    rows: list[dict[str, float]]
    higher_is_better: dict[str, bool]


class ClientEvaluation:
    """The evaluation of clients one by one, which leaves the module unchanged.

    Args:
        host: The trainer around the federation.
        data: The clients' data.
        ranks: The processes, each of which evaluates a part of the clients.
        seed: The federation's seed, for models that draw.
        own: The parameters and buffers that a client has instead of the global model's, by client and name.
        moving: The names of frozen parameters that a step moves.
    """

    def __init__(
        self,
        host: Host,
        data: ClientData,
        ranks: Ranks,
        seed: int,
        own: Mapping[int, Mapping[str, Tensor]],
        moving: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.data = data
        self.ranks = ranks
        self.seed = seed
        self.moving = moving
        self.own = own

    @torch.no_grad()
    def evaluate(self) -> ClientMetrics:
        """Evaluate the model that is in the module on all clients."""
        module = self.host.module
        snapshot = ModuleSnapshot(module, self.moving)
        self._global_model = self._tensors_of_which_clients_have_their_own()
        # A client is evaluated by one process, so its metrics have nothing to synchronize.
        for metric in metrics_of(module):
            metric.sync_on_compute = False
        module.eval()
        try:
            shares = self.ranks.exchange(self._evaluate_share)
        finally:
            self.host.client = None
            snapshot.restore()
            for tensor, value in self._global_model.values():
                tensor.copy_(value)
        return self._merged(shares)

    def _evaluate_share(self) -> EvaluationShare:
        """Evaluate every ``size``-th client, beginning with the one of this process's number."""
        share = EvaluationShare([], {})
        with (
            isolated_randomness(self.host.device),
            LogRecorder(self.host.module, self.host.callbacks) as recorder,
        ):
            for client in range(self.ranks.rank, self.data.num_clients, self.ranks.size):
                self.host.client = client
                self._load(client)
                seed_randomness(seed_of(self.seed, "client", client, "evaluation"), self.host.device)
                for batch in self.data.evaluation_batches(client, EVALUATION_CAP):
                    recorder.batch_size = batch.size
                    self.host.evaluate(self.host.prepare(batch.data), batch.index)
                row = {}
                for name, logged in recorder.collect().items():
                    row[name] = _client_value(logged)
                    higher_is_better = getattr(logged.metric, "higher_is_better", None)
                    if higher_is_better is not None:
                        share.higher_is_better[name] = higher_is_better
                share.rows.append(row)
        return share

    def _load(self, client: int) -> None:
        """Load a client's own tensors; a client that has none is evaluated with those of the global model."""
        own = self.own.get(client, {})
        for name, (tensor, value) in self._global_model.items():
            tensor.copy_(own.get(name, value))

    def _tensors_of_which_clients_have_their_own(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return these tensors of the module by name, each with a copy of the global model's value."""
        module = self.host.module
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        names = {name for tensors in self.own.values() for name in tensors}
        return {name: (named[name], named[name].detach().clone()) for name in sorted(names)}

    def _merged(self, shares: list[EvaluationShare]) -> ClientMetrics:
        """Put the processes' clients back into one order."""
        rows = []
        for client in range(self.data.num_clients):
            share = shares[client % self.ranks.size]
            rows.append(share.rows[client // self.ranks.size])
        values = {}
        for name in rows[0]:
            if all(name in row for row in rows):
                values[name] = torch.tensor([row[name] for row in rows])
        higher_is_better = {}
        for share in shares:
            higher_is_better.update(share.higher_is_better)
        return ClientMetrics(values, higher_is_better)


class ModuleSnapshot:
    """The state of a module that an evaluation changes: modes, buffers, metrics, and containers of outputs.

    Args:
        module: The user's module.
        moving: The names of frozen parameters that a step moves.
    """

    def __init__(self, module: nn.Module, moving: Sequence[str] = ()) -> None:
        self.module = module
        self.modes = [(submodule, submodule.training) for submodule in module.modules()]
        tensors = [*module.buffers(), *(module.get_parameter(name) for name in moving)]
        self.buffers = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.metrics = [MetricSnapshot(metric) for metric in metrics_of(module)]
        self.containers: dict[str, Any] = {}
        for name, value in vars(module).items():
            # Private ones are PyTorch's and Lightning's own: submodules, parameters, hooks.
            if type(value) in (list, dict, set) and not name.startswith("_"):
                self.containers[name] = copy.copy(value)

    def restore(self) -> None:
        """Put everything back."""
        for submodule, training in self.modes:
            submodule.training = training
        for buffer, value in self.buffers:
            buffer.copy_(value)
        for metric in self.metrics:
            metric.restore()
        for name, container in self.containers.items():
            setattr(self.module, name, container)


class MetricSnapshot:
    """The state of a ``torchmetrics`` object.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.update_count = metric._update_count
        self.computed = metric._computed
        self.sync_on_compute = metric.sync_on_compute
        self.states: dict[str, Any] = {}
        for name, value in vars(metric).items():
            if name in metric._defaults:
                # Copies, because metrics change their tensors in place.
                self.states[name] = value.clone() if isinstance(value, Tensor) else copy.copy(value)

    def restore(self) -> None:
        """Put the state back."""
        for name, value in self.states.items():
            setattr(self.metric, name, value)
        self.metric._update_count = self.update_count
        self.metric._computed = self.computed
        self.metric.sync_on_compute = self.sync_on_compute


def _client_value(logged: Logged) -> float:
    """Return the value that one client logged under a name, and reset a metric for the next client."""
    if not isinstance(logged.metric, Metric):
        return logged.value
    value = float(logged.metric.compute())
    logged.metric.reset()
    return value
