"""What rules share that average the clients' models and then train the average on the server; no rule itself."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, check_optimizer, check_schedule, normalized
from lightning_fedhaw.aggregation.proxy import ADAM, OptimizerFactory, batches, descend, mean_loss
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State

Weighting = Literal["examples", "uniform"]
Ensemble = Literal["logits", "probabilities"]
ServerLoss = Callable[[Tensor, Tensor, Any], Tensor]
"""``loss(vector [P], numbers of the samples [batch], batch)``."""

Teacher = tuple[Tensor, Mapping[str, Tensor]]
"""A model: its parameters ``[P]`` and its buffers."""


def ensemble(logits: Iterable[Tensor], kind: Ensemble = "logits") -> Tensor:
    """What several teachers say together.

    Args:
        logits: ``[..., classes]`` of each.
        kind: Whether their logits are averaged, or their probabilities.

    Returns:
        ``[..., classes]``, probabilities.
    """
    total, count = torch.zeros(()), 0
    for each in logits:
        total, count = total.to(each) + (each if kind == "logits" else torch.softmax(each, -1)), count + 1
    return torch.softmax(total / count, -1) if kind == "logits" else total / count


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean over samples of KL(teacher || student).

    Args:
        logits: ``[..., classes]``, the student's.
        teacher: ``[..., classes]``, probabilities.
    """
    return kl_div(log_softmax(logits, -1), teacher, reduction="none").sum(-1).mean()


class ServerTraining(AggregationRule):
    """Average, then descend on a loss over proxy data. The moments of the optimizer do not outlive the round.

    The server's buffers are the clients' averaged ones; training on the server leaves them alone.
    """

    def __init__(
        self,
        server_epochs: int,
        batch_size: int,
        lr: float,
        optimizer: OptimizerFactory = ADAM,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        weighting: Weighting = "examples",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.server_epochs = arguments.integer("server_epochs", server_epochs, minimum=0)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.lr = arguments.number("lr", lr, above=0)
        check_schedule("scheduler", scheduler, check_optimizer("optimizer", optimizer, self.lr, given="closure"))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.weighting = arguments.choice("weighting", weighting, Weighting)

    summary_metrics = ("proxy_loss_before", "proxy_loss_after")

    @abstractmethod
    def objective(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> ServerLoss:
        """What a round trains the average on.

        Args:
            cohort: What reached the server.
            weights: ``[K]``, those of the average.
            average: ``[P]``.
            server: The module, and the proxy data.
        """

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average, then train."""
        counts = cohort.num_examples if self.weighting == "examples" else cohort.num_examples.clamp(1, 1)
        weights = normalized(counts)
        average = cohort.vectors.weighted_sum(weights)
        if not self.server_epochs:
            return RuleOutput(average, state, weights)
        objective = self.objective(cohort, weights, average, server)
        vector = average.clone().requires_grad_()

        def loss(index: Tensor, batch: Any) -> Tensor:
            return objective(vector, index, batch)

        optimizer = self.optimizer([vector], lr=self.lr)
        before = mean_loss(loss, server, self.batch_size)
        is_finite = math.isfinite(before) and descend(
            [vector],
            loss,
            server,
            *("round", cohort.round),
            epochs=self.server_epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=None if self.scheduler is None else self.scheduler(optimizer),
        )
        after = mean_loss(loss, server, self.batch_size) if is_finite else math.nan
        if math.isfinite(after):
            metrics = {"proxy_loss_before": before, "proxy_loss_after": after}
            return RuleOutput(vector.detach(), state, weights, metrics)
        cause = "diverged" if math.isfinite(before) else f"has no finite loss to begin with ({before})"
        rank_zero_warn(
            f"{type(self).__name__}'s training on the server {cause} in round {cohort.round} and was refused: the round"
            f" is FedAvg's. Lower `lr` ({self.lr}), or look for what is not finite in the proxy data, such as batches"
            " without a label that counts."
        )
        metrics = {"proxy_loss_before": before, "proxy_loss_after": before, "server_steps_refused": 1.0}
        return RuleOutput(average, state, weights, metrics)


class Distillation(ServerTraining):
    """Train the average on what an ensemble of teachers makes of proxy data; their predictions are made once a round.

    Args:
        ensemble: Whether the teachers' ``"logits"`` are averaged, or their ``"probabilities"``.
        logits: ``logits(module, batch)`` gives a model's logits ``[batch, ..., classes]``. Default: the module's
            ``forward`` of the batch, of its first element where it is a tuple or a list.
        settings: As in the base class.
    """

    def __init__(
        self, *, ensemble: Ensemble = "logits", logits: Callable[[Any, Any], Tensor] | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.ensemble: Ensemble = arguments.choice("ensemble", ensemble, Ensemble)
        self.logits = arguments.optional(arguments.function, "logits", logits, "logits(module, batch)")

    @abstractmethod
    def teachers(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> Iterable[Teacher]:
        """The models that teach in a round."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module whose logits nobody could get."""
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
        """The divergence from the teachers."""
        with torch.no_grad():
            predictions = (
                torch.cat(
                    [
                        server.predict(vector, batch, self.logits, buffers=buffers)
                        for _, batch in batches(server, self.batch_size)
                    ]
                )
                for vector, buffers in self.teachers(cohort, weights, average, server)
            )
            taught = ensemble(predictions, self.ensemble)

        def loss(vector: Tensor, index: Tensor, batch: Any) -> Tensor:
            logits = server.predict(vector, batch, self.logits, training=True)
            return divergence(logits, taught[index.to(taught.device)])

        return loss


def client_models(cohort: Cohort, displacements: Tensor) -> Iterable[Teacher]:
    """The clients' models, each with the buffers it came with.

    Args:
        cohort: What reached the server.
        displacements: ``[K, P]``.
    """
    for slot, row in enumerate(displacements):
        yield cohort.start + row.to(cohort.start), cohort.buffers[slot] if cohort.buffers else {}
