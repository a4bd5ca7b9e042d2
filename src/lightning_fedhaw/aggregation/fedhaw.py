"""FedHAW without units: learn the server's step, the global scale and the clients' weights without tuning.

The idea is that of A. Nakai-Kasai and T. Wadayama (FedHAW, arXiv 2605.00458): the server learns from models that it
already has, without proxy data or extra bytes. The steps here are the package's own; those of the paper are in
:class:`~lightning_fedhaw.PublishedFedHAWCallback`. The published steps are in units of the loss, the model and the
learning rate, so their sizes must be tuned for every problem, and the scale multiplies the model in every round, which
makes it a hardly damped oscillator. Here every hypergradient is divided by the lengths of the vectors that it is a
product of, the learned step multiplies the direction that the server takes and not the model, and the scale is bounded
and decays.

Symbols, here and in every state and log of the rule:

==============  =====  ===================================================================================
``beta``        []     log of the server's step along its direction
``gamma``       []     log-scale; ``scale = exp(gamma)`` multiplies the model
``lambda_``     [N]    logits, one per client; ``weights = softmax(lambda_)`` over the clients of a cohort
``w``           [P]    the global model that was broadcast
``d_k``         [P]    ``w_k - w``, the displacement of client k in this cohort B
``d'_k``        [P]    the displacement of client k in the previous cohort A
``d``           [P]    ``sum_B p_k d_k``, weighted by examples
``e``           [P]    ``sum_B s_k d_k``, with ``s = softmax_B(lambda)``; the same as ``d`` if no weights are learned
``m``, ``q``    [P]    running means of ``e`` and of ``e^2``
``v``           [P]    the momentum, looked ahead; ``v'`` is that of the previous round
==============  =====  ===================================================================================

One round, the n-th in which an update was received, is::

    lambda_k <- lambda_k + lr_lambda s_k <d, d'_k - e'> / (|d| rms_A |d'_k|)
    m  <- 0.8 m + 0.2 e                    q <- 0.9 q + 0.1 e^2
    v  =  0.2 e + 0.8 m / (1 - 0.8^n)      r =  sqrt(q / (1 - 0.9^n))
    v  <- |v| u / |u|                      u =  v / (r + damping rms(r)),    from the second round on
    c  =  cos(d, v')                                            the agreement of this round with the direction taken
    beta  <- clip(beta + (lr_step if c > 0 else 1) c)           log of the server's step, from 1 to 64 by default,
             exp(beta) <= max(min(n, 10), min(1, 10/n) |w| / (20 |v|))      and not so far that the model jumps
    gamma <- clip(0.8 gamma + lr_gamma <d, w> / |w|^2)          the model's relative growth, with decay
    w     <- exp(gamma) (w + exp(beta) v)

The server's step grows while rounds agree and falls at once when they do not, so it stays as large as the loss allows.
The momentum averages over clients that are missing and directions that swing, which would otherwise read as a step that
is too long. The division by ``r`` lets parameters that move little move as far as others; a direction keeps its length,
so only the step decides how far the server goes. ``d`` is weighted by examples, and not by the learned weights, so that
a weight is judged by its effect on the loss of all clients, and not on a loss that it has changed itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer
from lightning_fedhaw.aggregation.hypergradient import (
    HypergradientRule,
    Memory,
    learned_logits,
    scale_and_weight_metrics,
)
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot

SCALE_DECAY = 0.8
"""The factor by which the log-scale decays in every round."""

FALL = 1.0
"""The step size with which the server's step falls when two rounds disagree, so that it falls by ``exp(cosine)``."""

SQUARES_DECAY = 0.9
"""The factor by which the mean of squares decays in every round."""

LONGEST = 0.05
"""The part of the model's length that an accelerated round may change, in the first rounds."""

EARLY = 10
"""The number of rounds with which that part begins to fall, and the step that is allowed from any model."""


def next_server_step(beta: Tensor, cosine: Tensor, lr: float, bounds: tuple[float, float] = (1.0, 64.0)) -> Tensor:
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
    return (SCALE_DECAY * gamma + lr * growth).clamp(math.log(smallest), math.log(largest))


def longest_step(model_length: float, direction_length: float, rounds: int) -> float:
    """Return the largest step of the server that does not change the model at once.

    Accelerated, a round changes a twentieth of the model at most, and from the tenth round on ever less, so that
    training comes to rest. A model that starts at zero, as linear ones do, is only as long as the way so far, and a
    part of it would allow no acceleration: a step of ten is allowed from any model, and reached in as many rounds.

    Args:
        model_length: ``|w|``.
        direction_length: ``|v|``.
        rounds: The rounds in which an update was received, this one included.
    """
    if direction_length == 0:
        return math.inf
    part = LONGEST * min(1.0, EARLY / rounds)
    return max(float(min(rounds, EARLY)), part * model_length / direction_length)


def looked_ahead(mean: Tensor, average: Tensor, momentum: float, rounds: int) -> Tensor:
    """Return the momentum as it will be if the next round agrees with this one, as Nesterov's method does.

    Args:
        mean: ``[P]``, the mean displacement of this round.
        average: ``[P]``, the running mean of the displacements, this one included, which started at zero.
        momentum: The decay of that running mean.
        rounds: The number of displacements in it.
    """
    # The running mean of a few rounds is too small by the part of it that is still the zero that it started from.
    correction = momentum / (1 - momentum**rounds)
    return ((1 - momentum) * mean).add_(average, alpha=correction)


def conditioned(direction: Tensor, squares: Tensor, damping: float) -> Tensor:
    """Divide a direction by the usual size of each parameter's displacement, and give it back its length.

    Args:
        direction: ``[P]``.
        squares: ``[P]``, a running mean of squared displacements; a common factor does not matter.
        damping: The size that is added to each parameter's, relative to the root of the mean square of all.

    Returns:
        ``[P]``, as long as ``direction``.
    """
    sizes = squares.sqrt()  # [P]
    root_mean_square = (squares.sum(dtype=torch.float64) / max(squares.numel(), 1)).sqrt().item()
    floor = damping * root_mean_square
    # Nothing has moved yet, or the damping is so large that all parameters count the same.
    if not 0 < floor < math.inf:
        return direction
    divided = direction / sizes.add_(floor)  # [P]
    length = dot(divided, divided).sqrt()  # []
    return divided.mul_(ratio(dot(direction, direction).sqrt(), length).item())


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
    """Learn how far the server goes, the scale of the model and, if wanted, each client's weight, without tuning.

    The first round in which an update is received is FedAvg. The server needs no data of its own. The rule of the
    paper, whose step sizes must be tuned for every problem, is :class:`PublishedFedHAWCallback`.

    Args:
        lr_gamma: The multiple of the model's own growth that the scale adds to it.
        lr_lambda: Step size of the logits. With 0 no weights are learned, and no cohort is kept.
        lr_step: Step size of the logarithm of the server's step.
        momentum: Decay of the running mean of the directions; 0 takes each round's own.
        damping: How evenly parameters count: they are divided by their usual displacement plus this multiple of the
            root mean square of all. ``inf`` does not divide.
        scale_bounds: The smallest and largest scale allowed.
        step_bounds: The smallest and largest step of the server. With a smallest one of 1, a round goes at least as
            far as FedAvg.
        guard: Whether the plain average replaces a model that has collapsed: by its loss on proxy data if the server
            has some, else by its norm. A warning says so once, and ``guarded_rounds`` counts the rounds.
        hyper_optimizer: Makes the optimizer of ``lambda_`` from ``(parameters, lr=...)``, such as ``torch.optim.Adam``
            or a ``functools.partial`` of it; one that steps on a given gradient. Default: ``torch.optim.SGD``.
        memory: Where the previous cohort's models are kept: on the model's ``"device"``, or in ``"host"`` memory.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``gamma`` [], ``beta`` [] and ``lambda_`` [N] in float64 on the CPU; after the first cohort also its
            ``rounds`` and ``momentum``, ``squares`` and ``direction``, [P] each, and where weights are learned the
            cohort's client numbers and its vectors, ``previous_clients`` and ``previous``.

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
        (
            "jacobian",
            "gamma_for_lambda",
            "pseudo_gradient",
            "normalize_by",
            "learning_rate",
            "takes_substitutes",
            "probe",
        ),
        "PublishedFedHAWCallback",
    )

    def __init__(
        self,
        lr_gamma: float = 1.0,
        lr_lambda: float = 0.0,
        *,
        lr_step: float = 0.5,
        momentum: float = 0.8,
        damping: float = 0.25,
        scale_bounds: tuple[float, float] = (0.9, 1.1),
        step_bounds: tuple[float, float] = (1.0, 64.0),
        guard: bool = True,
        hyper_optimizer: OptimizerFactory | None = None,
        memory: Memory = "device",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.lr_gamma = arguments.number("lr_gamma", lr_gamma, minimum=0)
        self.lr_lambda = arguments.number("lr_lambda", lr_lambda, minimum=0)
        self.lr_step = arguments.number("lr_step", lr_step, minimum=0)
        self.momentum = arguments.number("momentum", momentum, minimum=0, below=1)
        self.damping = arguments.number("damping", damping, above=0, infinite=True)
        self.scale_bounds = arguments.bounds_around_one("scale_bounds", scale_bounds)
        self.step_bounds = arguments.bounds_around_one("step_bounds", step_bounds)
        self.guard = arguments.flag("guard", guard)
        if hyper_optimizer is not None:
            check_optimizer("hyper_optimizer", hyper_optimizer, self.lr_lambda)
        self.hyper_optimizer = hyper_optimizer or torch.optim.SGD
        self.memory: Memory = arguments.choice("memory", memory, Memory)
        if self.lr_lambda:
            # Learned weights are known only when the cohort is complete, so its vectors are kept until then.
            self.unnormalized_weight = None  # type: ignore[assignment]

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization where none are learned; a subclass may override it."""
        return float(update.example_weight)

    @property
    def keeps_cohort(self) -> bool:  # type: ignore[override]
        """Whether the previous cohort's vectors are kept: only where weights are learned from them."""
        return self.lr_lambda > 0

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
        shares = self.cohort_weights(cohort)  # [K]
        mean = displacements.weighted_sum(shares).to(cohort.start)  # [P]
        new_state = dict(state)
        metrics: dict[str, float] = {"agreement": 0.0}
        weights = shares  # [K]
        target = mean  # [P]
        # Without learned weights the vectors are only summed, which can be done as they arrive.
        if self.lr_lambda:
            if "previous" in state:
                new_state, metrics["hypergradient_lambda"] = self._learn_weights(mean, new_state)
            weights = torch.softmax(new_state["lambda_"][cohort.clients], 0)  # [K]
            target = displacements.weighted_sum(weights).to(cohort.start)  # [P]
            new_state["previous_clients"] = cohort.clients.clone()
            new_state["previous"] = cohort.vectors.to(self.memory_device(cohort.start))
        direction = self._direction(target, state, new_state)  # [P]
        if "direction" in state:
            metrics["agreement"] = self._learn_step(cohort.start, mean, direction, state, new_state)
        new_state["direction"] = direction
        metrics |= scale_and_weight_metrics(new_state["gamma"], new_state["lambda_"], cohort.clients, weights)
        server_step = new_state["beta"].exp().item()
        metrics["server_step"] = server_step
        scale = new_state["gamma"].exp().item()
        # In place: the sum is a new vector already, and another one of the model's size is not needed.
        parameters = torch.add(cohort.start, direction, alpha=server_step).mul_(scale)  # [P]
        output = RuleOutput(parameters, new_state, weights, metrics)
        return self.guarded(output, cohort, state, server, shares, mean)

    def _direction(self, target: Tensor, state: State, new_state: State) -> Tensor:
        """Return the direction in which the server goes.

        Args:
            target: ``[P]``, the weighted mean displacement ``e``.
            state: The rule's state before the round. Not changed.
            new_state: Gets the new running means.

        Returns:
            ``[P]``: the momentum, divided by the usual displacements from the second round on.
        """
        rounds = state.get("rounds", 0) + 1
        new_state["rounds"] = rounds
        average = (1 - self.momentum) * target  # [P]
        if "momentum" in state:
            average.add_(state["momentum"].to(target), alpha=self.momentum)
        new_state["momentum"] = average
        squares = target.square().mul_(1 - SQUARES_DECAY)  # [P]
        if "squares" in state:
            squares.add_(state["squares"].to(target), alpha=SQUARES_DECAY)
        new_state["squares"] = squares
        # The first round has nothing to divide by but itself, and is FedAvg.
        if rounds == 1:
            return target
        return conditioned(looked_ahead(target, average, self.momentum, rounds), squares, self.damping)

    def _learn_step(self, w: Tensor, mean: Tensor, direction: Tensor, state: State, new_state: State) -> float:
        """Step the server's step and the scale.

        Args:
            w: ``[P]``, the model that was broadcast.
            mean: ``[P]``, the mean displacement ``d`` of this cohort, weighted by examples.
            direction: ``[P]``, in which the server is about to go.
            state: The rule's state before the round. Not changed.
            new_state: Gets the new numbers.

        Returns:
            The agreement of this round with the previous round's direction.
        """
        taken = state["direction"].to(mean)  # [P]
        cosine = ratio(dot(mean, taken), (dot(mean, mean) * dot(taken, taken)).sqrt())  # []
        beta = next_server_step(state["beta"], cosine, self.lr_step, self.step_bounds)  # []
        square = dot(w, w)  # []
        limit = longest_step(square.sqrt().item(), dot(direction, direction).sqrt().item(), new_state["rounds"])
        beta = beta.clamp(max=math.log(limit))  # []
        growth = ratio(dot(mean, w), square)  # []
        new_state["beta"] = beta
        new_state["gamma"] = next_scale(state["gamma"], growth, self.lr_gamma, self.scale_bounds)
        return cosine.item()

    def _learn_weights(self, mean: Tensor, state: State) -> tuple[State, float]:
        """Step the logits of the previous cohort's clients.

        Args:
            mean: ``[P]``, the mean displacement ``d`` of this cohort, weighted by examples.
            state: The rule's state. Not changed.

        Returns:
            The new state, and the length of the hypergradient.
        """
        lambda_ = state["lambda_"]  # [N]
        clients = state["previous_clients"]  # [A]
        previous = state["previous"].displacements
        shares = torch.softmax(lambda_[clients], 0)  # [A]
        grad = torch.zeros_like(lambda_)  # [N]
        length = dot(mean, mean).sqrt()  # []
        grad[clients] = weight_hypergradient(previous.inner(mean), previous.norms(), length, shares)
        stepped, memory = self.descend("lambda", lambda_, grad, self.lr_lambda, state)
        learned = learned_logits(lambda_, stepped, clients)  # [N]
        return {**state, "lambda_": learned, **memory}, grad.norm().item()
