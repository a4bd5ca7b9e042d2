"""What clients compute in bilevel optimization: pure functions of a client's two losses.

With the lower loss ``g``, the upper loss ``f``, lower variables ``y`` [P], upper variables ``x`` [U], and ``H``, ``J``
the second derivatives of ``g`` in ``y, y`` and in ``x, y``, the hypergradient is::

    dF/dx = grad_x f - J H^-1 grad_y f          at the minimum y of the mean of all clients' g

Means over clients of what is computed here estimate its factors. A mean of the clients' own hypergradients does not,
because the inverse of a mean is not the mean of the inverses.

Sources: P. Xiao, K. Ji: Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative
Differentiation. ICML 2023. D. A. Tarzanagh, M. Li, C. Thrampoulidis, S. Oymak: FedNest. ICML 2022. Y. Yang, P. Xiao,
K. Ji: SimFBO. NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_fedhaw.inquiry import LocalProblem


def multiplied(problem: LocalProblem, vector: Tensor, rate: float) -> Tensor:
    """Return ``(I - rate H) vector`` ``[P]``, one factor of the Neumann series and of iterative differentiation."""
    return vector - rate * problem.hessian_product(vector)


def hypergradient(problem: LocalProblem, vector: Tensor, factor: float) -> tuple[Tensor, float]:
    """Return ``grad_x f - factor J vector`` ``[U]``, and the upper loss.

    Args:
        problem: The client's problem, at the last lower variables.
        vector: ``[P]``, the estimate of ``H^-1 grad_y f`` up to the factor.
        factor: The factor.
    """
    gradients = problem.upper_gradients()
    return gradients.upper - factor * problem.mixed_product(vector), gradients.loss


def neumann_sum(multiply: Callable[[Tensor], Tensor], start: Tensor, terms: int) -> Tensor:
    """Return ``start + A start + ... + A^terms start`` ``[P]``.

    Args:
        multiply: Multiplies a vector by ``A``.
        start: ``[P]``.
        terms: The highest power.
    """
    power = start
    total = start
    for _ in range(terms):
        power = multiply(power)
        total = total + power
    return total


def local_hypergradient(problem: LocalProblem, rate: float, terms: int) -> tuple[Tensor, float]:
    """Return a client's own hypergradient ``[U]`` by its own Neumann series, and the upper loss (LFedNest).

    Args:
        problem: The client's problem.
        rate: The factor of the series.
        terms: The highest power of the series.
    """
    gradients = problem.upper_gradients()
    series = neumann_sum(lambda vector: multiplied(problem, vector, rate), gradients.lower, terms)
    return gradients.upper - rate * problem.mixed_product(series), gradients.loss


def corrected_lower_steps(problem: LocalProblem, mean_gradient: Tensor, rate: float) -> Tensor:
    """Take the lower steps of FedNest's SVRG on a round's batches, and return the displacement ``[P]``.

    In each step ``y <- y - rate (grad g(y; batch) - grad g(y_0; batch) + mean_gradient)``.

    Args:
        problem: The client's problem, at the lower variables ``y_0`` that it received.
        mean_gradient: ``[P]``, the mean of all clients' full gradients at ``y_0``.
        rate: The learning rate.
    """
    lower = problem.lower
    for batch in problem.batches():
        change = batch.at(lower, problem.upper).lower_gradient() - batch.lower_gradient()
        lower = lower - rate * (change + mean_gradient)
    return lower - problem.lower


def corrected_upper_steps(problem: LocalProblem, direction: Tensor, rate: float, steps: int) -> Tensor:
    """Take local upper steps that correct the global direction, and return the displacement ``[U]``.

    In each step ``x <- x - rate / steps (grad_x f(x) - grad_x f(x_0) + direction)``.

    Args:
        problem: The client's problem, at the upper variables ``x_0`` that it received.
        direction: ``[U]``, the global hypergradient at ``x_0``.
        rate: The learning rate of all steps together.
        steps: The number of steps.
    """
    upper = problem.upper
    start_gradient = problem.upper_gradients().upper
    for _ in range(steps):
        gradient = problem.at(problem.lower, upper).upper_gradients().upper
        upper = upper - rate / steps * (gradient - start_gradient + direction)
    return upper - problem.upper


def single_loop_directions(problem: LocalProblem, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the directions of lower variables, vector and upper variables in a single loop, and the upper loss.

    Args:
        problem: The client's problem.
        vector: ``[P]``, the estimate of ``H^-1 grad_y f``.

    Returns:
        ``grad_y g`` ``[P]``, ``H vector - grad_y f`` ``[P]``, ``grad_x f - J vector`` ``[U]``, and ``f``.
    """
    gradients = problem.upper_gradients()
    hessian_product, mixed_product = problem.products(vector)
    return (
        problem.lower_gradient(),
        hessian_product - gradients.lower,
        gradients.upper - mixed_product,
        gradients.loss,
    )


def within(vector: Tensor, radius: float | None) -> Tensor:
    """Project a vector onto the ball of a radius; ``None`` leaves it as it is."""
    if radius is None:
        return vector
    norm = float(torch.linalg.vector_norm(vector))
    if norm <= radius:
        return vector
    return vector * (radius / norm)
