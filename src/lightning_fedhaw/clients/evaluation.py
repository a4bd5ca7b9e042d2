"""The evaluation of the global model on every client's own data, at the end of a run and after some rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, default_collate
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_only

from lightning_fedhaw.clients.module_snapshot import ModuleSnapshot
from lightning_fedhaw.clients.records import EvaluationRecorder, Logged, metrics_of
from lightning_fedhaw.clients.steps import Host, Validation
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.numbered import NumberedDataset
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.streams import seed_of

CollateFunction = Callable[[list[Any]], Any]
"""A function that makes a batch from a list of samples."""

EVALUATION_CAP = 1000
"""The number of samples that a client is evaluated on at most."""


@dataclass(frozen=True)
class ClientMetrics:
    """The metrics of all clients.

    Attributes:
        values: ``[N]`` per metric that some client logged; NaN for clients where it is undefined.
        higher_is_better: Whether higher is better, for metrics that say so.
        num_examples: ``[N]``, the samples of each client that its values stand for.
    """

    values: dict[str, Tensor]
    higher_is_better: dict[str, bool]
    num_examples: Tensor


@dataclass(frozen=True)
class EvaluationShare:
    """The metrics of the clients that one process evaluates.

    Attributes:
        rows: The metrics of each of its clients, in their order.
        higher_is_better: Whether higher is better, for metrics that say so.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    higher_is_better: dict[str, bool] = field(default_factory=dict)


class ClientEvaluation:
    """The evaluation of clients one by one, which leaves the module unchanged.

    For each client a validation runs as if it were the first after the last round: nothing that a client's validation
    leaves in the module reaches the next client, so values do not depend on the order or on the number of processes.

    Args:
        host: The trainer around the federation.
        data: The clients' data.
        ranks: The processes, each of which evaluates a part of the clients.
        seed: The federation's seed, for models that draw.
        own: The parameters and buffers that a client has instead of the global model's, by client and name.
        moving: The names of frozen parameters that a step moves.
        batch_size: Samples in a batch; ``None`` for those of training.
    """

    def __init__(
        self,
        host: Host,
        data: ClientData,
        ranks: Ranks,
        seed: int,
        own: Mapping[int, Mapping[str, Tensor]],
        moving: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> None:
        self.host = host
        self.validation: Validation = host.validation
        self.data = data.for_evaluation(self.validation.collate_fn, batch_size)
        self.ranks = ranks
        self.seed = seed
        self.moving = moving
        self.own = own

    def evaluate(self) -> ClientMetrics:
        """Evaluate the model that is in the module on all clients."""
        clients = range(self.ranks.rank, self.data.num_clients, self.ranks.size)
        return self._merged(self.measure(clients))

    @torch.no_grad()
    def measure(self, clients: Sequence[int]) -> list[EvaluationShare]:
        """Evaluate the model that is in the module on some clients.

        Args:
            clients: The clients that this process evaluates.

        Returns:
            The metrics of the clients of each process.
        """
        snapshot = ModuleSnapshot(self.host.module, self.moving)
        self._global_model = self._tensors_of_which_clients_have_their_own()
        unrestored: list[str] = []
        try:
            with self.validation.stage(), _each_warning_once():
                shares = self.ranks.exchange(lambda: self._evaluate_share(snapshot, clients))
        finally:
            self.host.client = None
            unrestored = snapshot.restore()
            for tensor, value in self._global_model.values():
                tensor.copy_(value)
        if unrestored:
            rank_zero_warn(
                f"The evaluation of the clients has changed {', '.join(unrestored)}, which cannot be put back: only"
                " values, containers, tensors and objects of your own classes are. If later rounds or your code depend"
                " on it, leave the evaluation out by `client_eval=False`, without `client_eval_every_n_rounds`."
            )
        return shares

    def _evaluate_share(self, snapshot: ModuleSnapshot, clients: Sequence[int]) -> EvaluationShare:
        """Evaluate clients in this process."""
        share = EvaluationShare()
        with (
            self.ranks.alone(),
            isolated_randomness(self.host.device),
            EvaluationRecorder(self.host.module, self.host.callbacks) as recorder,
        ):
            for client in clients:
                if share.rows:
                    # The first client finds the module as the snapshot took it.
                    snapshot.put_back()
                self.host.client = client
                self._load(client)
                self._prepare_metrics()
                seed_randomness(seed_of(self.seed, "client", client, "evaluation"), self.host.device)
                share.rows.append(self._evaluate_client(client, recorder, share))
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
        names: set[str] = set()
        for tensors in self.own.values():
            names.update(tensors)
        return {name: (named[name], named[name].detach().clone()) for name in sorted(names)}

    def _prepare_metrics(self) -> None:
        for metric in metrics_of(self.host.module):
            metric.reset()
            # A client is evaluated by one process, so its metrics have nothing to synchronize.
            metric.sync_on_compute = False

    def _evaluate_client(self, client: int, recorder: EvaluationRecorder, share: EvaluationShare) -> dict[str, float]:
        """Run the validation of one client, and return what it logged."""
        validation = self.validation
        validation.start()
        for batch in self.data.evaluation_batches(client, EVALUATION_CAP):
            recorder.batch_size = batch.size
            validation.step(batch.data, batch.index)
        # Before the hook at the end, which may reset the metrics; Lightning reads them there, too.
        row = _values_of(recorder.collect(), share)
        validation.epoch_end()
        row.update(_values_of(recorder.collect(), share))
        validation.end()
        return row

    def _merged(self, shares: list[EvaluationShare]) -> ClientMetrics:
        """Put the processes' clients back into one order."""
        rows = []
        for client in range(self.data.num_clients):
            share = shares[client % self.ranks.size]
            rows.append(share.rows[client // self.ranks.size])
        higher_is_better = {}
        for share in shares:
            higher_is_better.update(share.higher_is_better)
        return metrics_of_rows(rows, higher_is_better, self.data.num_evaluation_examples)


def metrics_of_rows(
    rows: Sequence[Mapping[str, float]], higher_is_better: dict[str, bool], num_examples: Tensor
) -> ClientMetrics:
    """Return the metrics of all clients from those of each, in their order."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    values = {}
    for name in names:
        values[name] = torch.tensor([row.get(name, nan) for row in rows])
    return ClientMetrics(values, higher_is_better, num_examples)


def measured_on(data: ClientData, collate_fn: CollateFunction | None) -> str:
    """Say which of their samples clients are evaluated on, and what of training these go through.

    Args:
        data: The clients' data.
        collate_fn: The function by which validation makes batches, if there is one.
    """
    if data.evaluation is not None:
        # The clients have data sets of their own for evaluation, which no training reads.
        return "held-out data"
    samples = "training data"
    if data.has_held_out_data:
        samples = "held-out data"
    if data.evaluation_dataset is not None:
        return f"{samples}, as `train_eval` reads it"
    reading = []
    if has_transform(data.dataset):
        reading.append("the training transform")
    if collate_fn is None and data.settings.collate_fn is not default_collate:
        reading.append("the training loader's `collate_fn`")
    if not reading:
        return samples
    return f"{samples}, through {' and '.join(reading)}"


def has_transform(dataset: object) -> bool:
    """Return whether a data set, or one inside it, has a transform in the attribute that torchvision gives it."""
    if isinstance(dataset, (Subset, NumberedDataset)):
        return has_transform(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return any(has_transform(inner) for inner in dataset.datasets)
    return getattr(dataset, "transform", None) is not None or getattr(dataset, "transforms", None) is not None


def _values_of(records: Mapping[str, Logged], share: EvaluationShare) -> dict[str, float]:
    """Return the values that one client logged; what their metrics say of themselves goes into the share."""
    values = {}
    for name, logged in records.items():
        if isinstance(logged.metric, Metric):
            # Not reset here: another logged metric may be computed from this one.
            values[name] = _computed(logged.metric)
            higher_is_better = getattr(logged.metric, "higher_is_better", None)
            if higher_is_better is not None:
                share.higher_is_better[name] = higher_is_better
        elif logged.reduction == "mean" and logged.weight == 0:
            # Logged with `batch_size=0`: there was nothing to take the mean of.
            values[name] = nan
        else:
            values[name] = logged.value
    return values


def _computed(metric: Metric) -> float:
    """Compute a metric; NaN where torchmetrics itself calls the value meaningless, such as an AUROC of one class."""
    with _collected_warnings() as caught:
        value = float(metric.compute())
    if any("should be meaningless" in str(warning.message) for warning in caught):
        return nan
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return value


@contextmanager
def _collected_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings inside the context, on every process."""
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    # The values of a client must not depend on the process on which it is evaluated.
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(record=True) as caught:
            # Filters of the user's come into effect when the warnings are given again.
            warnings.simplefilter("always")
            yield caught
    finally:
        rank_zero_only.rank = rank  # type: ignore[attr-defined]


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Give each warning once at the end, however many clients have caused it."""
    with _collected_warnings() as caught:
        yield
    texts = set()
    for warning in caught:
        text = (warning.category, str(warning.message))
        if text not in texts:
            texts.add(text)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
