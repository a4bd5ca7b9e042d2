"""FedHAW without units: learn the server's step, the global scale and the clients' weights without tuning.

The idea is that of A. Nakai-Kasai and T. Wadayama (FedHAW, arXiv 2605.00458): the server learns from models that it
already has, without proxy data or extra bytes. The steps here are the package's own; those of the paper are in
:class:`~lightning_fedhaw.PublishedFedHAWCallback`. The published steps are in units of the loss, the model and the
learning rate, so their sizes must be tuned for every problem, and the scale multiplies the model in every round, which
makes it a hardly damped oscillator. Here every hypergradient is divided by the lengths of the vectors that it is a
product of, the learned step multiplies the cohort's displacement and not the model, and the scale is bounded and
decays.

Symbols, here and in every state and log of the rule:

==============  =====  ===================================================================================
``beta``        []     log of the server's step along the displacement
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
``w``           [P]    the global model that was broadcast
``d_k``         [P]    ``w_k - w``, the displacement of client k in this cohort B
``d'_k``        [P]    the displacement of client k in the previous cohort A
``d``           [P]    ``sum_B p_k d_k``, weighted by examples
``d'``          [P]    ``sum_A s_k d'_k``, the direction that was taken, with ``s = softmax_A(lambda)``
==============  =====  ===================================================================================

One round is::

    c        =  cos(d, d')                                      the agreement of two rounds
    beta     <- clip(beta + (lr_step if c > 0 else 1) c)        log of the server's step, from 1 to 8 by default
    gamma    <- clip(0.8 gamma + lr_gamma exp(beta) <d, w> / |w|^2)         the model's relative growth, with decay
    lambda_k <- lambda_k + lr_lambda s_k <d, d'_k - d'> / (|d| rms_A |d'_k|)
    w        <- exp(gamma) (w + exp(beta) sum_B softmax_B(lambda)_k d_k)

The server's step grows while rounds agree and falls at once when they do not, so it stays as large as the loss allows.
``d`` is weighted by examples, and not by the learned weights, so that a weight is judged by its effect on the loss of
all clients, and not on a loss that it has changed itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import normalized
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer
from lightning_fedhaw.aggregation.hypergradient import (
    HypergradientRule,
    Memory,
    learned_logits,
    scale_and_weight_metrics,
)
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot

DAMPING = 0.8
"""The factor by which the log-scale decays in every round."""

FALL = 1.0
"""The step size with which the server's step falls when two rounds disagree, so that it falls by ``exp(cosine)``."""


def next_server_step(beta: Tensor, cosine: Tensor, lr: float, bounds: tuple[float, float] = (1.0, 8.0)) -> Tensor:
    """Return the next log of the server's step: it grows while rounds agree, and falls faster when they do not.

    Args:
        beta: ``[]``, the present log of the step.
        cosine: ``[]``, between this round's displacement and the previous one's.
        lr: Step size upwards.
        bounds: The smallest and the largest step, not their logs.
    """
    smallest, largest = bounds
    step_size = lr if cosine > 0 else FALL
    return (beta + step_size * cosine).clamp(math.log(smallest), math.log(largest))


def next_scale(gamma: Tensor, growth: Tensor, lr: float, bounds: tuple[float, float] = (0.9, 1.1)) -> Tensor:
    """Return the next log-scale of the model: a multiple of the model's own growth, which decays in a few rounds.

    Args:
        gamma: ``[]``, the present log-scale.
        growth: ``[]``, the part of the displacement along the model, relative to the model: ``<d, w> / |w|^2``.
        lr: The multiple.
        bounds: The smallest and the largest scale, not their logs.
    """
    smallest, largest = bounds
    return (DAMPING * gamma + lr * growth).clamp(math.log(smallest), math.log(largest))


def weight_hypergradient(products: Tensor, norms: Tensor, length: Tensor, shares: Tensor) -> Tensor:
    """Compute the hypergradient of the previous cohort's logits: ``-s_k <d, d'_k - d'> / (|d| rms |d'_k|)``.

    Args:
        products: ``[A]``, the inner products ``<d, d'_k>``.
        norms: ``[A]``, the lengths ``|d'_k|``.
        length: ``[]``, the length ``|d|``.
        shares: ``[A]``, the softmax of the logits over the previous cohort.

    Returns:
        ``[A]`` without units, summing to zero; all zero where one of the lengths is.
    """
    rms = (shares * norms.square()).sum().sqrt()  # []
    losses = -ratio(products, length * rms)  # [A]
    return shares * (losses - (shares * losses).sum())


def ratio(product: Tensor, lengths: Tensor) -> Tensor:
    """Divide an inner product by the vectors' lengths; 0 where a length is 0 or the quotient is not finite."""
    quotient = torch.where(lengths > 0, product / lengths, torch.zeros_like(product))
    return torch.nan_to_num(quotient, nan=0.0, posinf=0.0, neginf=0.0)


class FedHAWCallback(HypergradientRule):
    """Learn the server's step, the scale of the model and the weight of each client without tuning.

    The first round in which an update is received is FedAvg. The server needs no data of its own. The rule of the
    paper, whose step sizes must be tuned for every problem, is :class:`PublishedFedHAWCallback`.

    Args:
        lr_gamma: The multiple of the model's own growth that the scale adds to it.
        lr_lambda: Step size of the logits. With 0 no weights are learned, and no cohort is kept.
        lr_step: Step size of the logarithm of the server's step.
        scale_bounds: The smallest and largest scale allowed.
        step_bounds: The smallest and largest step of the server. With a smallest one of 1, a round goes at least as
            far as FedAvg.
        hyper_optimizer: Makes the optimizer of ``lambda_`` from ``(parameters, lr=...)``, such as ``torch.optim.Adam``
            or a ``functools.partial`` of it; one that steps on a given gradient. Default: ``torch.optim.SGD``.
        memory: Where the previous cohort's models are kept: on the model's ``"device"``, or in ``"host"`` memory.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``gamma`` [], ``beta`` [] and ``lambda_`` [N] in float64 on the CPU; after the first cohort also
            ``direction`` [P], and where weights are learned its client numbers and its vectors, ``previous_clients``
            and ``previous``.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``hyper_optimizer`` makes no optimizer that steps on a given gradient, or an argument is unknown.

    Example:
        >>> rule = FedHAWCallback()
        >>> rule.init(torch.zeros(4), torch.tensor([10, 30]))["lambda_"].exp().tolist()
        [0.25, 0.75]
    """

    key = "FedHAWCallback"

    prog_bar = ("scale", "server_step")

    arguments_elsewhere = dict.fromkeys(
        ("jacobian", "gamma_for_lambda", "pseudo_gradient", "normalize_by", "learning_rate", "takes_substitutes"),
        "PublishedFedHAWCallback",
    )

    def __init__(
        self,
        lr_gamma: float = 0.5,
        lr_lambda: float = 0.3,
        *,
        lr_step: float = 0.3,
        scale_bounds: tuple[float, float] = (0.9, 1.1),
        step_bounds: tuple[float, float] = (1.0, 8.0),
        hyper_optimizer: OptimizerFactory | None = None,
        memory: Memory = "device",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.lr_gamma = arguments.number("lr_gamma", lr_gamma, minimum=0)
        self.lr_lambda = arguments.number("lr_lambda", lr_lambda, minimum=0)
        self.lr_step = arguments.number("lr_step", lr_step, minimum=0)
        self.scale_bounds = arguments.bounds_around_one("scale_bounds", scale_bounds)
        self.step_bounds = arguments.bounds_around_one("step_bounds", step_bounds)
        if hyper_optimizer is not None:
            check_optimizer("hyper_optimizer", hyper_optimizer, self.lr_lambda)
        self.hyper_optimizer = hyper_optimizer or torch.optim.SGD
        self.memory: Memory = arguments.choice("memory", memory, Memory)

    @property
    def resume_key(self) -> str:
        """The settings that the kept vectors and the hyper-optimizer's memory depend on; step sizes may change."""
        optimizer_name = getattr(self.hyper_optimizer, "__name__", "given")
        learns_weights = "lr_lambda>0" if self.lr_lambda else "lr_lambda=0"
        return f"{type(self).key}({learns_weights}, hyper_optimizer={optimizer_name})"

    def summary(self) -> dict[str, float]:
        """Return the scale and the server's step, and the range of the weights over all clients."""
        learned = super().summary()
        scale = learned.pop("scale")
        return {"scale": scale, "server_step": self.state["beta"].exp().item(), **learned}

    def divergence_hint(self) -> str:
        """Return the scale, if its bounds allowed it to leave its usual range."""
        if self.has_usual_scale:
            return ""
        return (
            f" FedHAW's scale stands at {self.scale:.3g}, and it multiplies the model every round: lower `lr_gamma`"
            f" ({self.lr_gamma}), or narrow `scale_bounds` {self.scale_bounds}."
        )

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return a server's step and a scale of 1, and weights by examples, with which the first round is FedAvg."""
        return {**super().init(start, num_examples), "beta": torch.zeros((), dtype=torch.float64)}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Step the learned numbers if there was a previous cohort, then aggregate."""
        displacements = cohort.vectors.displacements
        shares = normalized(cohort.num_examples)  # [K]
        mean = displacements.weighted_sum(shares)  # [P]
        # Not a deep copy: entries are replaced, and the tensors in them never changed.
        state = dict(state)
        metrics: dict[str, float] = {"agreement": 0.0}
        if "direction" in state:
            state, metrics = self._hyper_step(cohort.start, mean, state)
        weights = shares  # [K]
        direction = mean  # [P]
        # Without learned weights no cohort has to be kept, and the vectors are read once instead of four times.
        if self.lr_lambda:
            weights = torch.softmax(state["lambda_"][cohort.clients], 0)  # [K]
            direction = displacements.weighted_sum(weights)  # [P]
            state["previous_clients"] = cohort.clients.clone()
            state["previous"] = cohort.vectors.to(self.memory_device(cohort.start))
        state["direction"] = direction
        metrics |= scale_and_weight_metrics(state["gamma"], state["lambda_"], cohort.clients, weights)
        server_step = state["beta"].exp().item()
        metrics["server_step"] = server_step
        scale = state["gamma"].exp().item()
        # In place: the sum is a new vector already, and another one of the model's size is not needed.
        return RuleOutput((cohort.start + server_step * direction).mul_(scale), state, weights, metrics)

    def _hyper_step(self, w: Tensor, mean: Tensor, state: State) -> tuple[State, dict[str, float]]:
        """Step the server's step, the scale and the logits.

        Args:
            w: ``[P]``, the model that was broadcast.
            mean: ``[P]``, the mean displacement ``d`` of this cohort, weighted by examples.
            state: The rule's state. Not changed.

        Returns:
            The new state, and numbers for the log.
        """
        direction = state["direction"].to(mean)  # [P]
        length = dot(mean, mean).sqrt()  # []
        cosine = ratio(dot(mean, direction), length * dot(direction, direction).sqrt())  # []
        beta = next_server_step(state["beta"], cosine, self.lr_step, self.step_bounds)  # []
        growth = beta.exp() * ratio(dot(mean, w), dot(w, w))  # []
        gamma = next_scale(state["gamma"], growth, self.lr_gamma, self.scale_bounds)  # []
        state = {**state, "beta": beta, "gamma": gamma}
        metrics = {"agreement": cosine.item(), "hypergradient_lambda": 0.0}
        if self.lr_lambda:
            grad = self._lambda_hypergradient(mean, length, state)  # [N]
            stepped, memory = self.descend("lambda", state["lambda_"], grad, self.lr_lambda, state)
            lambda_ = learned_logits(state["lambda_"], stepped, state["previous_clients"])  # [N]
            state = {**state, "lambda_": lambda_, **memory}
            metrics["hypergradient_lambda"] = grad.norm().item()
        return state, metrics

    def _lambda_hypergradient(self, mean: Tensor, length: Tensor, state: State) -> Tensor:
        """Compute the hypergradient of all logits, ``[N]``; it is zero for clients outside of the previous cohort.

        Args:
            mean: ``[P]``, the mean displacement ``d`` of this cohort, weighted by examples.
            length: ``[]``, its length.
            state: The rule's state. Not changed.
        """
        lambda_ = state["lambda_"]  # [N]
        clients = state["previous_clients"]  # [A]
        previous = state["previous"].displacements
        shares = torch.softmax(lambda_[clients], 0)  # [A]
        grad = torch.zeros_like(lambda_)
        grad[clients] = weight_hypergradient(previous.inner(mean), previous.norms(), length, shares)
        return grad
