"""FedLAW: learn the scale and the weights of the received models on a few labeled samples of the server's own.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks. ICML 2023.

With received models ``u_k`` [P], shares ``p_k`` of the training examples and the training loss ``L`` on proxy data::

    w <- c sum_k s_k u_k        (c, s) = argmin L(c sum_k s_k u_k)        s on the simplex, c > 0

by gradient descent on ``x`` and ``x_c``, from ``s = p`` and ``c = scale`` in every round::

    exponential    s = softmax(x)           c = exp(x_c)
    quadratic      s_k = x_k^2 / sum x^2    c = x_c^2

The mix is differentiated, not unrolled: a step is one pass of a batch through the model, one weighted sum of the
cohort and one inner product with each of its models. ``docs/parity.md`` lists what differs from the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, check_optimizer, check_schedule, normalized
from lightning_fedhaw.aggregation.proxy import ADAM, OptimizerFactory, descend, mean_loss
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State

Learn = Literal["both", "scale", "weights", "in_stages", "nothing"]
Base = Literal["exponential", "quadratic"]
Weighting = Literal["examples", "uniform"]
FirstStage = Literal["scale", "weights"]

LOGIT_FLOOR = 30.0
"""How far below the largest a client's first logit may lie."""

SCALES = (1e-3, 1e3)
"""A scale outside of this range has left no model; it is refused."""

SWA_START, SWA_PERIOD, SWA_ANNEALING = 6, 100, 10
"""The authors' schedule for the stage of the weights: cosine of that period, then from that epoch on the running mean,
while the rate goes to ``swa_lr`` within that many epochs."""


def published_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Half the rate every 20 epochs."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)


STEP_LR: Callable[[torch.optim.Optimizer], Any] = published_schedule


def variables(shares: Tensor, scale: float, base: Base = "exponential") -> tuple[Tensor, Tensor]:
    """The ``x`` [K] and ``x_c`` [] that give these shares and this scale."""
    if base == "quadratic":
        return shares.sqrt(), torch.tensor(scale, dtype=shares.dtype).sqrt()
    logits = shares.log()
    return logits.clamp(min=logits.max() - LOGIT_FLOOR), torch.tensor(scale, dtype=shares.dtype).log()


def mix(x: Tensor, x_c: Tensor, base: Base = "exponential") -> tuple[Tensor, Tensor]:
    """The shares ``s`` [K], which sum to one, and the scale ``c`` []."""
    if base == "quadratic":
        return x.square() / x.square().sum(), x_c.square()
    return torch.softmax(x, 0), x_c.exp()


def swa_rate(epoch: int, lr: float, swa_lr: float) -> float:
    """The rate of an epoch in the stage of the weights, as in the authors' code."""
    base = lr * (1 + math.cos(math.pi * min(epoch, SWA_START) / SWA_PERIOD)) / 2
    done = min(max(epoch - SWA_START, 0) / SWA_ANNEALING, 1.0)
    return base + (swa_lr - base) * (1 - math.cos(math.pi * done)) / 2


class FedLAWCallback(AggregationRule):
    """Learn how much the averaged model is shrunk, and how much each client counts, on the server's proxy data.

    The data comes from ``FederatedDataModule(proxy=...)``. The server's buffers (BatchNorm statistics) are the
    clients', averaged with the learned weights; the passes over proxy data leave them alone.

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
        lr: Rate of the optimizer.
        optimizer: Makes it from ``(variables, lr=...)``; ``Adam(betas=(0.5, 0.999))`` as published.
        scheduler: Makes a schedule that steps once a pass from the optimizer: half the rate after every 20 passes.
            ``None`` keeps the rate.
        swa_lr: With ``"in_stages"``: the rate in which the stage of the weights ends.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``scale``, the last one, for the run summary: every round learns anew.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes none.

    Example:
        >>> shares, scale = mix(*variables(torch.tensor([0.25, 0.75]), scale=0.97))
        >>> shares, scale
        (tensor([0.2500, 0.7500]), tensor(0.9700))
    """

    key = "FedLAWCallback"

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
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = STEP_LR,
        swa_lr: float = 0.05,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        low, high = SCALES
        self.learn = arguments.choice("learn", learn, Learn)
        self.scale = arguments.number("scale", scale, minimum=low, maximum=high)
        self.base = arguments.choice("base", base, Base)
        self.weighting = arguments.choice("weighting", weighting, Weighting)
        self.first_stage = arguments.choice("first_stage", first_stage, FirstStage)
        self.server_epochs = arguments.integer("server_epochs", server_epochs, minimum=0)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.lr = arguments.number("lr", lr, above=0)
        check_schedule("scheduler", scheduler, check_optimizer("optimizer", optimizer, self.lr, given="closure"))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.swa_lr = arguments.number("swa_lr", swa_lr, minimum=0)
        if self.learn == "in_stages" and 0 < self.server_epochs < 2 * (SWA_START + 1):
            raise ValueError(
                f'`server_epochs` must be at least {2 * (SWA_START + 1)} with `learn="in_stages"`, whose weights are'
                f" averaged from the {SWA_START + 1}th epoch of their half on, got {self.server_epochs}."
            )

    prog_bar = ("scale",)
    summary_metrics = ("weight/min", "weight/max", "proxy_loss_before", "proxy_loss_after")

    @property
    def _learns(self) -> bool:
        return self.learn != "nothing" and self.server_epochs > 0

    def summary(self) -> dict[str, float]:
        """The last round's scale."""
        return {"scale": float(self.state["scale"])} if "scale" in self.state else {}

    def check(self, server: ServerView) -> None:
        """Try the loss on proxy data, if there is something to learn."""
        if self._learns:
            server.check_proxy(type(self).__name__, server.loss)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Learn scale and weights for this cohort, and mix it with them."""
        counts = cohort.num_examples if self.weighting == "examples" else cohort.num_examples.clamp(1, 1)
        weights, scale = normalized(counts), torch.tensor(self.scale, dtype=torch.float64)
        metrics: dict[str, float] = {}
        if self._learns:
            weights, scale, metrics = self._learned(cohort, weights, scale, server)
        metrics |= {"scale": scale.item(), "weight/min": weights.min().item(), "weight/max": weights.max().item()}
        return RuleOutput(cohort.vectors.weighted_sum(scale * weights), {"scale": scale.clone()}, weights, metrics)

    def _learned(
        self, cohort: Cohort, shares: Tensor, scale: Tensor, server: ServerView
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        x, x_c = (variable.requires_grad_() for variable in variables(shares, self.scale, self.base))

        def loss(_: Tensor, batch: Any) -> Tensor:
            s, c = mix(x, x_c, self.base)
            return server.loss(cohort.vectors.weighted_sum(c * s), batch)

        before = mean_loss(loss, server, self.batch_size)
        is_finite = math.isfinite(before) and self._descend(loss, x, x_c, cohort.round, server)
        with torch.no_grad():
            s, c = mix(x, x_c, self.base)
        low, high = SCALES
        if is_finite and bool(torch.isfinite(s).all()) and low <= c <= high:
            after = mean_loss(loss, server, self.batch_size)
            if math.isfinite(after):
                return s, c, {"proxy_loss_before": before, "proxy_loss_after": after}
        rank_zero_warn(
            f"FedLAW's descent of round {cohort.round} ended with the scale {c.item():.3g} (finite weights:"
            f" {bool(torch.isfinite(s).all())}, proxy loss before: {before:.3g}) and was refused: the round is"
            f" FedAvg's, with the scale {self.scale}. Lower `lr` ({self.lr}), or look for what is not finite in the"
            " proxy data, such as batches without a label that counts."
        )
        return shares, scale, {"proxy_loss_before": before, "proxy_loss_after": before, "server_steps_refused": 1.0}

    def _descend(
        self, loss: Callable[[Tensor, Any], Tensor], x: Tensor, x_c: Tensor, round_idx: int, server: ServerView
    ) -> bool:
        def descent(learned: list[Tensor], name: str, epochs: int, average: _Averaging | None = None) -> bool:
            optimizer = self.optimizer(learned, lr=self.lr)
            make = self.scheduler if average is None else average.on
            return descend(
                learned,
                loss,
                server,
                *("round", round_idx, name),
                epochs=epochs,
                batch_size=self.batch_size,
                optimizer=optimizer,
                scheduler=None if make is None else make(optimizer),
            )

        if self.learn != "in_stages":
            learned = {"both": [x, x_c], "scale": [x_c], "weights": [x]}[self.learn]
            return descent(learned, self.learn, self.server_epochs)
        half, is_finite = self.server_epochs // 2, True
        for stage in ("scale", "weights") if self.first_stage == "scale" else ("weights", "scale"):
            if stage == "scale":
                is_finite = is_finite and descent([x_c], stage, half)
            else:
                average = _Averaging(x, self.lr, self.swa_lr)
                is_finite = is_finite and descent([x], stage, half, average)
                with torch.no_grad():
                    x.copy_(average.mean)
        return is_finite


class _Averaging:
    """The schedule of the stage of the weights, and the running mean of what is learned in it."""

    def __init__(self, variable: Tensor, lr: float, swa_lr: float) -> None:
        self.variable, self.rate = variable, partial(swa_rate, lr=lr, swa_lr=swa_lr)
        self.mean, self.epoch = variable.detach().clone(), 0

    def on(self, optimizer: torch.optim.Optimizer) -> _Averaging:
        self.optimizer = optimizer
        return self

    def step(self) -> None:
        if self.epoch >= SWA_START:
            self.mean += (self.variable.detach() - self.mean) / (self.epoch - SWA_START + 1)
        self.epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.epoch)
