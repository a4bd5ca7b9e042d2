"""The part shared by rules that average the clients' models and then train the average; no rule itself.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, Weighting, client_weights
from lightning_fedhaw.aggregation.factories import OptimizerFactory, SchedulerFactory, check_optimizer, check_schedule
from lightning_fedhaw.aggregation.proxy import ADAM, BatchLoss, batches, descend, mean_loss
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import Batch, PredictionFunction, RuleOutput, ServerView, State

Ensemble = Literal["logits", "probabilities"]
ServerLoss = Callable[[Tensor, Tensor, Batch], Tensor]
"""``loss(vector [P], indices of the proxy samples [batch], batch)`` returns a scalar."""

Teacher = tuple[Tensor, Mapping[str, Tensor]]
"""A model: its parameters ``[P]`` and its buffers."""


def ensemble(logits: Iterable[Tensor], kind: Ensemble = "logits") -> Tensor:
    """Average the predictions of several teachers.

    Args:
        logits: ``[..., classes]`` of each teacher; read one by one, so that only one is in memory.
        kind: Whether the teachers' logits are averaged, or their probabilities.

    Returns:
        ``[..., classes]``, probabilities.
    """
    total = torch.zeros(())
    count = 0
    for teacher_logits in logits:
        summand = teacher_logits
        if kind == "probabilities":
            summand = torch.softmax(teacher_logits, -1)
        total = total.to(teacher_logits) + summand  # [..., classes]
        count += 1
    mean = total / count
    if kind == "probabilities":
        return mean
    return torch.softmax(mean, -1)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over samples of KL(teacher || student).

    Args:
        logits: ``[..., classes]``, the student's.
        teacher: ``[..., classes]``, probabilities.
    """
    return kl_div(log_softmax(logits, -1), teacher, reduction="none").sum(-1).mean()


class ServerTraining(AggregationRule):
    """Average, then minimize a loss over proxy data. The optimizer's state does not outlive the round.

    The server's buffers are the clients' averaged ones; training on the server does not change them.
    """

    summary_metrics = ("proxy_loss_before", "proxy_loss_after")

    def __init__(
        self,
        server_epochs: int,
        batch_size: int,
        lr: float,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = None,
        weighting: Weighting = "examples",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.server_epochs = arguments.integer("server_epochs", server_epochs, minimum=0)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.lr = arguments.number("lr", lr, above=0)
        trial_optimizer = check_optimizer("optimizer", optimizer, self.lr, takes_closure=True)
        check_schedule("scheduler", scheduler, trial_optimizer)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)

    @abstractmethod
    def objective(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> ServerLoss:
        """Return the loss that the average is trained on in a round.

        Args:
            cohort: The updates that the server received.
            weights: ``[K]``, those of the average.
            average: ``[P]``.
            server: The module, and the proxy data.
        """

    def average_weights(self, cohort: Cohort) -> Tensor:
        """Return the weights of the average ``[K]``: by ``unnormalized_weight`` where a rule has it."""
        if self.unnormalized_weight is None:
            return client_weights(cohort, self.weighting)
        return self.cohort_weights(cohort)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the clients' models, then train the average."""
        weights = self.average_weights(cohort)  # [K]
        average = cohort.vectors.weighted_sum(weights)  # [P]
        if not self.server_epochs:
            return RuleOutput(average, state, weights)
        objective = self.objective(cohort, weights, average, server)
        # A copy: if the training is refused, the average itself is the result.
        vector = average.clone().requires_grad_()  # [P]

        def loss(index: Tensor, batch: Batch) -> Tensor:
            return objective(vector, index, batch)

        loss_before = mean_loss(loss, server, self.batch_size)
        loss_after = math.nan
        if math.isfinite(loss_before) and self._train(vector, loss, cohort.round, server):
            loss_after = mean_loss(loss, server, self.batch_size)
        if math.isfinite(loss_after):
            metrics = {"proxy_loss_before": loss_before, "proxy_loss_after": loss_after}
            return RuleOutput(vector.detach(), state, weights, metrics)
        cause = "diverged" if math.isfinite(loss_before) else f"has no finite loss to begin with ({loss_before})"
        rank_zero_warn(
            f"{type(self).__name__}'s training on the server {cause} in round {cohort.round} and was refused: the round"
            f" is FedAvg's. Lower `lr` ({self.lr}), or look for what is not finite in the proxy data, such as batches"
            " without a label that counts."
        )
        metrics = {"proxy_loss_before": loss_before, "proxy_loss_after": loss_before, "server_steps_refused": 1.0}
        return RuleOutput(average, state, weights, metrics)

    def _train(self, vector: Tensor, loss: BatchLoss, round_idx: int, server: ServerView) -> bool:
        """Train a vector ``[P]`` in place, and return whether it stayed finite."""
        optimizer = self.optimizer([vector], lr=self.lr)
        scheduler = None
        if self.scheduler is not None:
            scheduler = self.scheduler(optimizer)
        return descend(
            [vector],
            loss,
            server,
            "round",
            round_idx,
            epochs=self.server_epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
        )


class Distillation(ServerTraining):
    """Train the average to predict what an ensemble of teachers predicts on proxy data.

    The teachers' predictions are computed once a round.

    Args:
        ensemble: Whether the teachers' ``"logits"`` are averaged, or their ``"probabilities"``.
        logits: ``logits(module, batch)`` returns a model's logits ``[batch, ..., classes]``. Default: the module's
            ``forward`` of the batch, of its first element where it is a tuple or a list.
        settings: As in the base class.
    """

    reads_buffers = True

    def __init__(
        self, *, ensemble: Ensemble = "logits", logits: PredictionFunction | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.ensemble: Ensemble = arguments.choice("ensemble", ensemble, Ensemble)
        self.logits = arguments.optional(arguments.function, "logits", logits, "logits(module, batch)")

    @abstractmethod
    def teachers(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> Iterable[Teacher]:
        """Return the models that teach in a round; the arguments are those of :meth:`objective`."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module whose logits are not defined."""
        if self.logits is None and type(pl_module).forward is pl.LightningModule.forward:
            raise ValueError(
                f"`{type(self).__name__}` needs the model's logits, and {type(pl_module).__name__} has no `forward`."
                " Define it, or give `logits=lambda module, batch: ...`."
            )

    def check(self, server: ServerView) -> None:
        """Try to predict proxy data."""
        if self.server_epochs:
            server.check_proxy(type(self).__name__, lambda vector, batch: server.predict(vector, batch, self.logits))

    def objective(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> ServerLoss:
        """Return the divergence from the teachers."""
        with torch.no_grad():
            teachers = self.teachers(cohort, weights, average, server)
            # Lazily, so that one teacher's predictions are in memory at a time.
            targets = ensemble(self._predictions(teachers, server), self.ensemble)  # [samples, ..., classes]

        def loss(vector: Tensor, index: Tensor, batch: Batch) -> Tensor:
            logits = server.predict(vector, batch, self.logits, training=True)
            return divergence(logits, targets[index.to(targets.device)])

        return loss

    def _predictions(self, teachers: Iterable[Teacher], server: ServerView) -> Iterator[Tensor]:
        """Predict all proxy data ``[samples, ..., classes]`` in its own order, by one teacher after the other."""
        for vector, buffers in teachers:
            # Batches without the name of a stream are in the data set's own order, so a sample's index is its row.
            predictions: list[Tensor] = []
            for _, batch in batches(server, self.batch_size):
                predictions.append(server.predict(vector, batch, self.logits, buffers=buffers))
            yield torch.cat(predictions)


def client_models(cohort: Cohort, displacements: Tensor) -> Iterator[Teacher]:
    """Yield the clients' models, each with the buffers that its client sent.

    Args:
        cohort: The updates that the server received.
        displacements: ``[K, P]``.
    """
    for slot, displacement in enumerate(displacements):
        buffers = cohort.buffers[slot] if cohort.buffers else {}
        yield cohort.start + displacement.to(cohort.start), buffers
