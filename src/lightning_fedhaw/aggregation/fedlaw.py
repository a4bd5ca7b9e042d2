"""FedLAW: learn the scale and the weights of the received models on a few labeled samples of the server's own.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks. ICML 2023.

With received models ``u_k`` [P], shares ``p_k`` of the training examples and the training loss ``L`` on proxy data::

    w <- c sum_k s_k u_k        (c, s) = argmin L(c sum_k s_k u_k)        s on the simplex, c > 0

by gradient descent on ``x`` and ``x_c``, from ``s = p`` and ``c = scale`` in every round::

    exponential    s = softmax(x)           c = exp(x_c)
    quadratic      s_k = x_k^2 / sum x^2    c = x_c^2

The derivative of the mix is used instead of a graph through all models: a step is one pass of a batch through the
model, one weighted sum of the cohort and one inner product with each of its models. ``docs/parity.md`` lists what
differs from the authors' code.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import Weighting, client_weights
from lightning_fedhaw.aggregation.factories import OptimizerFactory, SchedulerFactory, check_optimizer, check_schedule
from lightning_fedhaw.aggregation.guard import GuardedRule
from lightning_fedhaw.aggregation.proxy import ADAM, BatchLoss, descend, mean_loss
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import Batch, RuleOutput, ServerView, State

Learn = Literal["both", "scale", "weights", "in_stages", "nothing"]
Base = Literal["exponential", "quadratic"]
FirstStage = Literal["scale", "weights"]

LOGIT_FLOOR = 30.0
"""How far below the largest a client's first logit may lie: a client without examples would have the logit -inf."""

SCALES = (1e-3, 1e3)
"""The range of usable scales. With a scale outside of it nothing is left of the model, so it is refused."""

SWA_PERIOD = 100
"""In the authors' schedule for the stage of the weights: the epochs in which a cosine would take the rate to zero."""

SWA_START = 6
"""In that schedule: the epoch from which on the weights are averaged and the rate leaves the cosine."""

SWA_ANNEALING = 10
"""In that schedule: the epochs in which the rate then goes to ``swa_lr``."""


def published_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the published schedule, which halves the rate every 20 epochs."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)


STEP_LR: SchedulerFactory = published_schedule  # a function has a name that a configuration file can hold


def variables(shares: Tensor, scale: float, base: Base = "exponential") -> tuple[Tensor, Tensor]:
    """Return the variables ``x`` [K] and ``x_c`` [] that give these shares [K] and this scale."""
    scale_tensor = torch.tensor(scale, dtype=shares.dtype)  # []
    if base == "quadratic":
        return shares.sqrt(), scale_tensor.sqrt()
    logits = shares.log()  # [K]
    return logits.clamp(min=logits.max() - LOGIT_FLOOR), scale_tensor.log()


def mix(x: Tensor, x_c: Tensor, base: Base = "exponential") -> tuple[Tensor, Tensor]:
    """Return the shares ``s`` [K], which sum to one, and the scale ``c`` [] that ``x`` [K] and ``x_c`` [] give."""
    if base == "quadratic":
        return x.square() / x.square().sum(), x_c.square()
    return torch.softmax(x, 0), x_c.exp()


def swa_rate(epoch: int, lr: float, swa_lr: float) -> float:
    """Return the rate of an epoch in the stage of the weights, as in the authors' code."""
    cosine_rate = lr * (1 + math.cos(math.pi * min(epoch, SWA_START) / SWA_PERIOD)) / 2
    progress = min(max(epoch - SWA_START, 0) / SWA_ANNEALING, 1.0)
    return cosine_rate + (swa_lr - cosine_rate) * (1 - math.cos(math.pi * progress)) / 2


class FedLAWCallback(GuardedRule):
    """Learn the scale of the averaged model and the weight of each client on the server's proxy data.

    The data comes from ``FederatedDataModule(proxy=...)``. The server's buffers (BatchNorm statistics) are the
    clients', averaged with the learned weights; the passes over proxy data do not change them.

    Args:
        learn: ``"both"`` at once: FedLAW. ``"scale"`` alone, with the weights of FedAvg: adaptive global weight
            shrinking. ``"weights"`` alone: attentive aggregation. ``"in_stages"``: one after the other, half of the
            epochs each, the weights by stochastic weight averaging. ``"nothing"``: a fixed scale, without proxy data.
        scale: The scale before it is learned, and the fixed one.
        base: Whether variables become shares and scale by exponentials or by squares.
        weighting: Shares before they are learned: by ``"examples"``, or ``"uniform"``.
        first_stage: With ``"in_stages"``: the ``"scale"``, as in the paper, or the ``"weights"``, as in the code.
        server_epochs: Passes over the proxy data each round; 0 is FedAvg. The scale needs about 30, the weights 80.
        batch_size: Proxy samples of a step at most.
        lr: Learning rate of the optimizer.
        optimizer: Makes it from ``(variables, lr=...)``. Default: ``Adam(betas=(0.5, 0.999))``, as published.
        scheduler: Makes a schedule that steps once a pass from the optimizer. Default: half the rate after every 20
            passes, as published. ``None`` keeps the rate.
        swa_lr: With ``"in_stages"``: the rate at the end of the stage of the weights.
        guard: Whether the plain average replaces a model that has collapsed, as in :class:`FedHAWCallback`. Default:
            no, as published.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``scale``, the last one, for the run summary: every round learns from the start.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes no optimizer.

    Example:
        >>> shares, scale = mix(*variables(torch.tensor([0.25, 0.75]), scale=0.97))
        >>> shares, scale
        (tensor([0.2500, 0.7500]), tensor(0.9700))
    """

    key = "FedLAWCallback"

    prog_bar = ("scale",)
    summary_metrics = ("weight/min", "weight/max", "proxy_loss_before", "proxy_loss_after")

    def __init__(
        self,
        learn: Learn = "both",
        *,
        scale: float = 1.0,
        base: Base = "exponential",
        weighting: Weighting = "examples",
        first_stage: FirstStage = "scale",
        server_epochs: int = 100,
        batch_size: int = 128,
        lr: float = 0.01,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = STEP_LR,
        swa_lr: float = 0.05,
        guard: bool = False,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        smallest, largest = SCALES
        self.learn: Learn = arguments.choice("learn", learn, Learn)
        self.scale = arguments.number("scale", scale, minimum=smallest, maximum=largest)
        self.base: Base = arguments.choice("base", base, Base)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)
        self.first_stage: FirstStage = arguments.choice("first_stage", first_stage, FirstStage)
        self.server_epochs = arguments.integer("server_epochs", server_epochs, minimum=0)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.lr = arguments.number("lr", lr, above=0)
        trial_optimizer = check_optimizer("optimizer", optimizer, self.lr, takes_closure=True)
        check_schedule("scheduler", scheduler, trial_optimizer)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.swa_lr = arguments.number("swa_lr", swa_lr, minimum=0)
        self.guard = arguments.flag("guard", guard)
        if self.learn == "in_stages" and 0 < self.server_epochs < 2 * (SWA_START + 1):
            raise ValueError(
                f'`server_epochs` must be at least {2 * (SWA_START + 1)} with `learn="in_stages"`, whose weights are'
                f" averaged from the {SWA_START + 1}th epoch of their half on, got {self.server_epochs}."
            )
        # If nothing is learned, it is FedAvg, and has FedAvg's cohort.
        self.takes_substitutes = not self._learns

    @property
    def _learns(self) -> bool:
        return self.learn != "nothing" and self.server_epochs > 0

    def summary(self) -> dict[str, float]:
        """Return the last round's scale."""
        if "scale" not in self.state:
            return {}
        return {"scale": float(self.state["scale"]), **self.guard_summary()}

    def check(self, server: ServerView) -> None:
        """Try the loss on proxy data, if there is something to learn."""
        if self._learns:
            server.check_proxy(type(self).__name__, server.loss)
        else:
            super().check(server)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Learn scale and weights for this cohort, and mix its models with them."""
        shares = client_weights(cohort, self.weighting)  # [K]
        weights = shares
        scale = torch.tensor(self.scale, dtype=torch.float64)  # []
        metrics: dict[str, float] = {}
        if self._learns:
            weights, scale, metrics = self._learn_mix(cohort, weights, scale, server)
        metrics |= {"scale": scale.item(), "weight/min": weights.min().item(), "weight/max": weights.max().item()}
        mix = cohort.vectors.weighted_sum(scale * weights)  # [P]
        output = RuleOutput(mix, {"scale": scale.clone()}, weights, metrics)
        return self.guarded(output, cohort, state, server, shares)

    def _learn_mix(
        self, cohort: Cohort, shares: Tensor, scale: Tensor, server: ServerView
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Learn the weights [K] and the scale [], starting from given ones; return them and numbers for the log."""
        x, x_c = variables(shares, self.scale, self.base)
        x.requires_grad_()  # [K]
        x_c.requires_grad_()  # []

        def loss(_: Tensor, batch: Batch) -> Tensor:
            s, c = mix(x, x_c, self.base)
            return server.loss(cohort.vectors.weighted_sum(c * s), batch)

        loss_before = mean_loss(loss, server, self.batch_size)
        # A loss that is not finite has no gradient to follow.
        is_finite = math.isfinite(loss_before) and self._descend(loss, x, x_c, cohort.round, server)
        with torch.no_grad():
            s, c = mix(x, x_c, self.base)
        smallest, largest = SCALES
        if is_finite and bool(torch.isfinite(s).all()) and smallest <= c <= largest:
            loss_after = mean_loss(loss, server, self.batch_size)
            if math.isfinite(loss_after):
                return s, c, {"proxy_loss_before": loss_before, "proxy_loss_after": loss_after}
        rank_zero_warn(
            f"FedLAW's descent of round {cohort.round} ended with the scale {c.item():.3g} (finite weights:"
            f" {bool(torch.isfinite(s).all())}, proxy loss before: {loss_before:.3g}) and was refused: the round is"
            f" FedAvg's, with the scale {self.scale}. Lower `lr` ({self.lr}), or look for what is not finite in the"
            " proxy data, such as batches without a label that counts."
        )
        metrics = {"proxy_loss_before": loss_before, "proxy_loss_after": loss_before, "server_steps_refused": 1.0}
        return shares, scale, metrics

    def _descend(self, loss: BatchLoss, x: Tensor, x_c: Tensor, round_idx: int, server: ServerView) -> bool:
        """Step the variables in place, at once or in stages; return whether they stayed finite."""
        if self.learn != "in_stages":
            learned = {"both": [x, x_c], "scale": [x_c], "weights": [x]}[self.learn]
            return self._run_stage(
                self.learn, learned, loss, round_idx, server, epochs=self.server_epochs, scheduler=self.scheduler
            )
        epochs = self.server_epochs // 2
        stages = ("scale", "weights")
        if self.first_stage == "weights":
            stages = ("weights", "scale")
        for stage in stages:
            if stage == "scale":
                is_finite = self._run_stage(
                    stage, [x_c], loss, round_idx, server, epochs=epochs, scheduler=self.scheduler
                )
            else:
                averaging = _WeightAveraging(x, self.lr, self.swa_lr)
                is_finite = self._run_stage(
                    stage, [x], loss, round_idx, server, epochs=epochs, scheduler=averaging.schedule
                )
                # In place, because the next stage and the caller use the same variable.
                with torch.no_grad():
                    x.copy_(averaging.mean)
            if not is_finite:
                return False
        return True

    def _run_stage(
        self,
        stage: str,
        learned: list[Tensor],
        loss: BatchLoss,
        round_idx: int,
        server: ServerView,
        *,
        epochs: int,
        scheduler: SchedulerFactory | None,
    ) -> bool:
        """Step some of the variables in place; return whether they stayed finite."""
        optimizer = self.optimizer(learned, lr=self.lr)
        return descend(
            learned,
            loss,
            server,
            "round",
            round_idx,
            stage,
            epochs=epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=None if scheduler is None else scheduler(optimizer),
        )


class _WeightAveraging:
    """The schedule of the stage of the weights, and the running mean of the variable that is learned in it."""

    def __init__(self, variable: Tensor, lr: float, swa_lr: float) -> None:
        self.variable = variable
        self.lr = lr
        self.swa_lr = swa_lr
        self.mean = variable.detach().clone()
        self.epoch = 0

    def schedule(self, optimizer: torch.optim.Optimizer) -> _WeightAveraging:
        """Take an optimizer whose rate to set; return the schedule, which is this object."""
        self.optimizer = optimizer
        return self

    def step(self) -> None:
        # Epochs count from 0, and the one that has just ended is counted below.
        if self.epoch >= SWA_START:
            self.mean += (self.variable.detach() - self.mean) / (self.epoch - SWA_START + 1)
        self.epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = swa_rate(self.epoch, self.lr, self.swa_lr)
