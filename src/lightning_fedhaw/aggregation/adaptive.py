"""FedAdagrad, FedAdam and FedYogi: adaptive optimizers on the server.

S. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar, H. B. McMahan: Adaptive Federated
Optimization. ICLR 2021, Algorithm 2.

With ``delta`` [P], the proposed displacement ``sum_k p_k (w_k - w)``, everything per element::

    m <- beta1 m + (1 - beta1) delta
    v <- v + delta^2                                       FedAdagrad
    v <- beta2 v + (1 - beta2) delta^2                     FedAdam
    v <- v - (1 - beta2) delta^2 sign(v - delta^2)         FedYogi
    w <- w + lr m / (sqrt(v) + tau)

``tau`` stands outside the root, and no bias is corrected; so these are not the optimizers of ``torch.optim``. All else,
such as schedules and other rules' proposals, is FedOpt's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.fedopt import FedOptCallback
from lightning_fedhaw.aggregation.server_steps import Settings, root

Method = Literal["adagrad", "adam", "yogi"]


def second_moment(v: Tensor, delta: Tensor, method: Method, beta2: float) -> Tensor:
    """Return the next second moment ``v`` of FedAdagrad, FedAdam or FedYogi, which stays at least 0.

    Args:
        v: ``[...]``, the present second moment.
        delta: ``[...]``, the displacement.
        method: The rule.
        beta2: Decay of the second moment; not used by ``"adagrad"``.
    """
    square = delta.square()
    if method == "adagrad":
        return v + square
    if method == "adam":
        return beta2 * v + (1 - beta2) * square
    return v - (1 - beta2) * square * torch.sign(v - square)


class AdaptiveOptimizer(torch.optim.Optimizer):
    """The optimizer of FedAdagrad, FedAdam and FedYogi, for a gradient that is minus the displacement.

    It is an optimizer of torch, so that schedules and checkpoints treat it as any other.

    Args:
        parameters: The tensors to step, or groups of them.
        lr: The server's learning rate.
        method: The formula of the second moment.
        betas: Decay of the two moments; the second is not used by ``"adagrad"``.
        tau: The constant that is added to the root of the second moment.
        initial: The second moment before the first step.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        method: Method,
        betas: tuple[float, float],
        tau: float,
        initial: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "method": method, "betas": betas, "tau": tau, "initial": initial})

    @staticmethod
    def pure_step(parameter: Tensor, gradient: Tensor, memory: Settings, settings: Settings) -> Tensor:
        """Return a parameter after a step; see :data:`~lightning_fedhaw.aggregation.server_steps.PureStep`."""
        beta1, beta2 = settings["betas"]
        m = memory.get("m", torch.zeros_like(parameter))
        v = memory.get("v", torch.full_like(parameter, settings["initial"]))
        next_m = beta1 * m - (1 - beta1) * gradient
        next_v = second_moment(v, -gradient, settings["method"], beta2)
        new_parameter: Tensor = parameter + settings["lr"] * next_m / (root(next_v) + settings["tau"])
        return new_parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on the present gradients."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                delta = -parameter.grad
                state = self.state[parameter]
                # On the first step there are no moments; that `v` does not start at 0 is part of the algorithm.
                m = state.get("m", torch.zeros_like(delta))
                v = state.get("v", torch.full_like(delta, group["initial"]))
                state["m"] = beta1 * m + (1 - beta1) * delta
                state["v"] = second_moment(v, delta, group["method"], beta2)
                parameter.add_(state["m"] / (state["v"].sqrt() + group["tau"]), alpha=group["lr"])


class _AdaptiveCallback(FedOptCallback):
    """The part that the three adaptive rules share: checked arguments, and the optimizer that they make."""

    def __init__(
        self,
        method: Method,
        lr: float,
        betas: tuple[float, float],
        tau: float,
        initial_second_moment: float | None,
        **options: Any,
    ) -> None:
        self.beta1 = arguments.number("beta1", betas[0], minimum=0, below=1)
        self.beta2 = arguments.number("beta2", betas[1], minimum=0, below=1)
        self.tau = arguments.number("tau", tau, above=0)
        if initial_second_moment is None:
            initial_second_moment = self.tau**2
        self.initial_second_moment = arguments.number("initial_second_moment", initial_second_moment, minimum=0)
        optimizer = partial(
            AdaptiveOptimizer,
            method=method,
            betas=(self.beta1, self.beta2),
            tau=self.tau,
            initial=self.initial_second_moment,
        )
        super().__init__(optimizer, lr, **options)


class FedAdagradCallback(_AdaptiveCallback):
    """Adagrad on the server.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        tau: The constant that is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`~lightning_fedhaw.FedOptCallback`: ``lr_scheduler``, ``rule``,
            ``learn`` (here ``"lr"``, ``"beta1"``, ``"tau"``) and what belongs to it, and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedAdagradCallback"

    def __init__(
        self,
        lr: float = 0.1,
        beta1: float = 0.0,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("adagrad", lr, (beta1, 0.0), tau, initial_second_moment, **options)


class FedAdamCallback(_AdaptiveCallback):
    """Adam on the server, without bias correction.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: The constant that is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`~lightning_fedhaw.FedOptCallback`: ``lr_scheduler``, ``rule``,
            ``learn`` (here ``"lr"``, ``"beta1"``, ``"beta2"``, ``"tau"``) and what belongs to it, and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedAdamCallback"

    def __init__(
        self,
        lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("adam", lr, (beta1, beta2), tau, initial_second_moment, **options)


class FedYogiCallback(_AdaptiveCallback):
    """Yogi on the server: Adam whose second moment changes by at most the square of the displacement.

    Args:
        lr: The server's learning rate.
        beta1: Decay of the first moment.
        beta2: One minus the rate of the second moment.
        tau: The constant that is added to the root of the second moment: smaller is more adaptive.
        initial_second_moment: The second moment before the first round. Default: ``tau**2``; many libraries take 0.
        options: The further arguments of :class:`~lightning_fedhaw.FedOptCallback`: ``lr_scheduler``, ``rule``,
            ``learn`` (here ``"lr"``, ``"beta1"``, ``"beta2"``, ``"tau"``) and what belongs to it, and the federation's.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedYogiCallback"

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_second_moment: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__("yogi", lr, (beta1, beta2), tau, initial_second_moment, **options)
