"""Synthetic(alpha, beta): classification data of clients that differ in their task and in their inputs.

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in Heterogeneous Networks.
MLSys 2020, section 5.1; with 100 clients as K. Rush, Z. Charles, Z. Garrett use it: arXiv:2301.07806, appendix B.2.

For each client, with ``N(mean, standard deviation)``::

    n = 50 + floor(exp(m)),  m ~ N(4, 2)           its number of samples
    u ~ N(0, alpha);  W [10, 60], b [10] ~ N(u, 1)    its task
    B ~ N(0, beta);   v [60] ~ N(B, 1)                the mean of its inputs
    x ~ N(v, diag(j^-1.2));  label = argmax(W x + b)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.data.partitioners import IndexPartitioner
from lightning_fedhaw.streams import stream

FEATURES = 60
CLASSES = 10


class Synthetic(argument_names.NamedArguments):
    """Generated classification data for a federation: 60 features, 10 classes, clients of very different size.

    The paper says neither whether its numbers are variances or standard deviations nor how it splits; as in the
    authors' scripts they are standard deviations, and by default nothing is set aside. A client's samples depend on the
    seed and its number alone.

    Args:
        alpha: How much the clients' tasks differ.
        beta: How much the clients' inputs differ.
        num_clients: N.
        max_samples: Samples of a client at most; sizes have a heavy tail, and about one client in a hundred has more
            than 5,000.
        test_fraction: The share of each client's samples that is its test set.
        iid: Whether all clients have one task, and no input feature is particular to a client.
        seed: The seed of all draws.

    Raises:
        ValueError: If an argument is not one of the allowed values.

    Example:
        >>> data = Synthetic(1.0, 1.0, num_clients=3, max_samples=100)
        >>> data.sizes
        [58, 54, 100]
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        *,
        num_clients: int = 100,
        max_samples: int | None = None,
        test_fraction: float = 0.0,
        iid: bool = False,
        seed: int = 0,
    ) -> None:
        self.alpha = arguments.number("alpha", alpha, minimum=0)
        self.beta = arguments.number("beta", beta, minimum=0)
        self.num_clients = arguments.integer("num_clients", num_clients, minimum=1)
        self.max_samples = arguments.optional(arguments.integer, "max_samples", max_samples, minimum=2)
        self.test_fraction = arguments.number("test_fraction", test_fraction, minimum=0, below=1)
        self.iid = arguments.flag("iid", iid)
        self.seed = arguments.integer("seed", seed, minimum=0)

    @cached_property
    def clients(self) -> Sequence[tuple[Tensor, Tensor]]:
        """For each client its inputs ``[samples, 60]`` and labels ``[samples]``."""
        return [self._client(client) for client in range(self.num_clients)]

    def _client(self, client: int) -> tuple[Tensor, Tensor]:
        generator = stream(self.seed, "synthetic", "client", client)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        count = 50 + int((4 + 2 * normal(1)).exp())
        if self.max_samples is not None:
            count = min(count, self.max_samples)
        shift = self.alpha * normal(1)
        center = self.beta * normal(1)
        if self.iid:
            generator = stream(self.seed, "synthetic", "task")
            task = normal(CLASSES, FEATURES + 1)
            means = center.expand(FEATURES)
            generator = stream(self.seed, "synthetic", "client", client, "inputs")
        else:
            task = shift + normal(CLASSES, FEATURES + 1)
            means = center + normal(FEATURES)
        deviations = torch.arange(1, FEATURES + 1) ** -0.6
        inputs = means + deviations * normal(count, FEATURES)
        labels = (inputs @ task[:, :-1].T + task[:, -1]).argmax(1)
        return inputs, labels

    @property
    def sizes(self) -> list[int]:
        """Samples of each client, those for testing included."""
        return [len(labels) for _, labels in self.clients]

    def _train_size(self, samples: int) -> int:
        # Every client trains.
        return max(1, samples - round(self.test_fraction * samples))

    @property
    def train(self) -> TensorDataset:
        """The training samples of all clients, client after client."""
        inputs = []
        labels = []
        for x, y in self.clients:
            size = self._train_size(len(y))
            inputs.append(x[:size])
            labels.append(y[:size])
        return TensorDataset(torch.cat(inputs), torch.cat(labels))

    @property
    def partitioner(self) -> IndexPartitioner:
        """The split of :attr:`train` into the clients' samples."""
        indices = []
        begin = 0
        for size in self.sizes:
            end = begin + self._train_size(size)
            indices.append(range(begin, end))
            begin = end
        return IndexPartitioner(indices)

    @property
    def test(self) -> list[TensorDataset]:
        """The test samples of each client."""
        datasets = []
        for x, y in self.clients:
            size = self._train_size(len(y))
            datasets.append(TensorDataset(x[size:], y[size:]))
        return datasets

    def datamodule(self, batch_size: int, **options: Any) -> FederatedDataModule:
        """Return the data module of this federation.

        Args:
            batch_size: Samples of a batch.
            options: Further arguments of :class:`~lightning_fedhaw.FederatedDataModule`.
        """
        if self.test_fraction and not {"val", "test"} & set(options):
            options["val"] = self.test
        return FederatedDataModule(self.train, batch_size=batch_size, partitioner=self.partitioner, **options)
