"""The loss of models on a fixed set of samples, with derivatives, for diagnostics.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.evaluation import validation_loaders
from lightning_fedhaw.clients.attributes import ClientAttributes
from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.diagnostics.spectrum import largest_eigenvalues
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.isolation import (
    evaluation_mode,
    isolated_randomness,
    seed_randomness,
    twice_differentiable,
)
from lightning_fedhaw.rule import Batch
from lightning_fedhaw.server import Server
from lightning_fedhaw.streams import seed_of, stream

Source = Literal["validation", "proxy"]


class HeldOutLoss:
    """The mean training loss on some samples, in evaluation mode, at any parameters.

    Everything that the module draws is the same in every call, so the loss is one function of the parameters.

    Args:
        server: The server, which calls the module.
        batches: The batches, with the number of samples of each.
    """

    def __init__(self, server: Server, batches: list[tuple[int, Batch]]) -> None:
        self.server = server
        self.batches = batches
        self.samples = sum(size for size, _ in batches)

    @torch.no_grad()
    def __call__(self, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> float:
        """Return the mean loss at parameters ``[P]``, with other buffers than the global model's if they are given."""
        total = 0.0
        with evaluation_mode(self.server.module):
            for index, (size, batch) in enumerate(self.batches):
                total += size * self._loss(index, batch, vector, buffers).item()
        return total / self.samples

    def top_eigenvector(self, vector: Tensor, steps: int = 50) -> Tensor:
        """Return the direction ``[P]`` of the largest eigenvalue of the Hessian at parameters ``[P]``.

        Args:
            vector: The parameters.
            steps: The steps of Lanczos' method.
        """
        generator = stream(self.server.seed, "diagnostics", "eigenvector")
        start = torch.randn(vector.numel(), generator=generator, dtype=torch.float64).to(vector)
        return largest_eigenvalues(lambda direction: self.hessian_product(vector, direction), start, 1, steps).vector

    def hessian_product(self, vector: Tensor, direction: Tensor) -> Tensor:
        """Return the product ``[P]`` of the exact Hessian at parameters ``[P]`` with a direction ``[P]``.

        Raises:
            RuntimeError: If the loss has no second derivative.
        """
        leaf = vector.detach().clone().requires_grad_()
        with evaluation_mode(self.server.module), twice_differentiable(), torch.enable_grad():
            for index, (size, batch) in enumerate(self.batches):
                loss = self._loss(index, batch, leaf) * (size / self.samples)
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                if not gradient.requires_grad:
                    raise RuntimeError("its gradient does not depend on the parameters")
                # Not `grad`, which would pass over a kernel without a second derivative as if it were a constant.
                torch.autograd.backward(gradient, direction)
        product = leaf.grad
        assert product is not None, "every batch has added to it"
        return product

    def _loss(self, index: int, batch: Batch, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        seed_randomness(seed_of(self.server.seed, "diagnostics", "batch", index), vector.device)
        return self.server.loss(vector, self.server.prepare(batch), index, buffers=buffers)


class HeldOutDiagnostic(Diagnostic, ABC):
    """A diagnostic that needs the loss on held-out samples, which are drawn once.

    Args:
        every_n_rounds: It measures after every n-th round.
        data: Whether the loss is on ``"validation"`` or on ``"proxy"`` data.
        samples: The samples of the loss at most.
        batch_size: Samples that are computed at once at most.
    """

    def __init__(self, every_n_rounds: int, data: Source, samples: int, batch_size: int) -> None:
        super().__init__(every_n_rounds)
        self.data = arguments.choice("data", data, Source)
        self.samples = arguments.integer("samples", samples, minimum=1)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self._federation: Federation | None = None
        self._loss: HeldOutLoss | None = None

    def check(self, federation: Federation) -> None:
        """Keep the federation until the validation data is there."""
        self._federation = federation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the samples, and refuse what cannot be measured on them."""
        federation = self._federation
        assert federation is not None, "on_federation_start comes first"
        self._federation = None
        self._loss = held_out_loss(type(self).__name__, trainer, federation, self.data, self.samples, self.batch_size)
        self.prepare(federation, self._loss)

    @abstractmethod
    def prepare(self, federation: Federation, loss: HeldOutLoss) -> None:
        """Refuse what cannot be measured, and say what measuring costs, before the first round."""

    @property
    def loss(self) -> HeldOutLoss:
        """The loss, while a run is going on."""
        assert self._loss is not None, "on_train_start comes first"
        return self._loss

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Release the samples."""
        self._loss = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the samples."""
        self._loss = None
        self._federation = None


def held_out_loss(
    name: str, trainer: pl.Trainer, federation: Federation, source: Source, samples: int, batch_size: int
) -> HeldOutLoss:
    """Make the loss on a random choice of held-out samples, which is the same in every run with the same seed.

    Args:
        name: The observer, for messages.
        trainer: The trainer, which has the validation data.
        federation: The federation, whose server has the proxy data.
        source: Which data.
        samples: The number of samples at most.
        batch_size: Samples of a batch at most.

    Raises:
        ValueError: If there is no such data, or the module cannot compute a loss on it.
    """
    server = federation.server
    if source == "proxy":
        dataset, collate = server.proxy_dataset, federation.data.settings.collate_samples
        remedy = "give `FederatedDataModule(..., proxy=...)` some"
    else:
        dataset, collate = _validation_data(trainer)
        remedy = "give `fit` or the data module a validation `DataLoader` whose data set has a length"
    other = {"proxy": "validation", "validation": "proxy"}[source]
    if dataset is None or len(dataset) == 0:
        raise ValueError(f"`{name}` needs {source} data, and there is none: {remedy}, or set `data={other!r}`.")
    order = torch.randperm(len(dataset), generator=stream(server.seed, "diagnostics", "samples"))[:samples]
    batches: list[tuple[int, Batch]] = []
    with isolated_randomness(federation.host.device):
        seed_randomness(seed_of(server.seed, "diagnostics", "reading"), federation.host.device)
        for index in torch.split(order, batch_size):
            batches.append((len(index), collate([dataset[i] for i in index.tolist()])))
    loss = HeldOutLoss(server, batches)
    try:
        with tried_out(federation):
            loss(server.parameters())
    except Exception as error:
        # The user's module may raise anything.
        raise ValueError(
            f"`{name}` cannot compute the training loss on the {source} data: {_first_line(error)}"
            f" ({type(error).__name__}). Its samples must look like training samples."
        ) from error
    return loss


def check_second_derivative(name: str, loss: HeldOutLoss, federation: Federation) -> None:
    """Refuse a module whose loss has no second derivative.

    Raises:
        ValueError: Naming the observer and the reason.
    """
    vector = federation.server.parameters()
    try:
        with tried_out(federation):
            loss.hessian_product(vector, torch.ones_like(vector))
    except RuntimeError as error:
        # The loss itself was computed before. What may fail now are operations of PyTorch without a second derivative,
        # which raise this error or `NotImplementedError`, a kind of it.
        raise ValueError(
            f"`{name}` needs the second derivative of the loss, and the module has none: {_first_line(error)}"
            f" ({type(error).__name__}). Replace that operation, or remove `{name}`."
        ) from error


@contextmanager
def tried_out(federation: Federation) -> Iterator[None]:
    """Let the module be called outside of a round without a trace: no random state and no attribute changes."""
    attributes = ClientAttributes(federation.host.module, federation.host.device)
    attributes.begin()
    try:
        with isolated_randomness(federation.host.device):
            yield
    finally:
        attributes.restore()


def _validation_data(trainer: pl.Trainer) -> tuple[Any, Any]:
    """Return the data set of the first validation loader and its collation; None where there is none with a length."""
    for loader in validation_loaders(trainer):
        # Not its batches, of which each process has a share.
        if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__"):
            return loader.dataset, loader.collate_fn
        break
    return None, None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
