"""The largest eigenvalues and the trace of a symmetric matrix of which only products with vectors are known.

Shapes: the matrix is ``[P, P]``, and S steps are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""``product(vector [P])`` returns the product ``[P]`` of the matrix with a vector."""

_BREAKDOWN = 100
"""Units of rounding below which a new direction is nothing but rounding."""


@dataclass(frozen=True)
class Eigenvalues:
    """The algebraically largest eigenvalues of a matrix, as Lanczos' method approximates them.

    Attributes:
        values: Float64 on the CPU, the largest first.
        residuals: For each, a distance within which the matrix has an eigenvalue.
        vector: ``[P]`` of length 1, the direction of the largest.
    """

    values: Tensor
    residuals: Tensor
    vector: Tensor


def largest_eigenvalues(product: Product, start: Tensor, count: int = 5, steps: int = 50) -> Eigenvalues:
    """Approximate the algebraically largest eigenvalues by Lanczos' method with full re-orthogonalization.

    Other than by power iteration, negative eigenvalues of large magnitude are not mistaken for them. After P steps they
    are exact, with their multiplicities; after fewer steps an eigenvalue of several directions is seen once.

    Args:
        product: The matrix.
        start: ``[P]``, a random vector; it decides the dtype and the device of the basis.
        count: How many eigenvalues.
        steps: The products that are computed, P at most. The basis needs memory for that many vectors.

    Returns:
        The eigenvalues, as many as there are steps at most; NaN if the matrix is not finite.
    """
    steps = min(steps, start.numel())
    basis = start.new_empty(steps, start.numel())
    basis[0] = start / start.norm()
    diagonal = torch.zeros(steps, dtype=torch.float64)
    beside = torch.zeros(steps, dtype=torch.float64)
    largest = 0.0
    for step in range(steps):
        image = product(basis[step])
        diagonal[step] = torch.dot(basis[step], image).item()
        image = _orthogonal(image, basis[: step + 1])
        beside[step] = image.norm().item()
        largest = max(largest, abs(float(diagonal[step])), float(beside[step]))
        if step + 1 == steps:
            break
        if beside[step] <= _BREAKDOWN * torch.finfo(start.dtype).eps * largest:
            # The directions so far are a subspace that the matrix does not leave: go on in another one.
            beside[step] = 0.0
            image = _another(basis[: step + 1])
        basis[step + 1] = image / image.norm()
    tridiagonal = diagonal.diag() + beside[:-1].diag(1) + beside[:-1].diag(-1)
    if not tridiagonal.isfinite().all():
        undefined = torch.full((count,), nan, dtype=torch.float64)
        return Eigenvalues(undefined, undefined, torch.full_like(start, nan))
    values, vectors = torch.linalg.eigh(tridiagonal)
    residuals = (beside[-1] * vectors[-1]).abs()
    largest_vector = basis.T @ vectors[:, -1].to(basis)
    return Eigenvalues(values.flip(0)[:count], residuals.flip(0)[:count], largest_vector)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Remove from a vector ``[P]`` what lies in the directions of a basis ``[S, P]``."""
    # Twice, because a single pass leaves the rounding of a vector that is almost in them.
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _another(basis: Tensor) -> Tensor:
    """Return a vector ``[P]`` that is orthogonal to a basis ``[S, P]``, which is not all of the space."""
    generator = torch.Generator().manual_seed(len(basis))
    vector = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    return _orthogonal(vector / vector.norm(), basis)


@dataclass(frozen=True)
class Estimate:
    """An estimate from random samples.

    Attributes:
        value: The mean.
        error: Its standard error; NaN of a single sample.
    """

    value: float
    error: float

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """Make the estimate from samples ``[n]``."""
        error = nan
        if len(samples) > 1:
            error = float(samples.std() / len(samples) ** 0.5)
        return cls(float(samples.mean()), error)


def hutchinson_trace(product: Product, like: Tensor, samples: int, generator: torch.Generator) -> Estimate:
    """Estimate the trace as the mean of ``<z, A z>`` over random vectors of signs.

    Args:
        product: The matrix.
        like: A vector ``[P]`` of the dtype and on the device of the products.
        samples: The products that are computed.
        generator: Draws the signs, on the CPU.
    """
    values = torch.zeros(samples, dtype=torch.float64)
    for sample in range(samples):
        signs = torch.randint(0, 2, (like.numel(),), generator=generator).to(like) * 2 - 1
        values[sample] = torch.dot(signs, product(signs)).item()
    return Estimate.of(values)


def flatness_ratio(eigenvalues: Tensor) -> float:
    """Return the largest of the eigenvalues divided by the last; a smaller one is flatter.

    Args:
        eigenvalues: The five largest, the largest first; NaN if the last is not positive.
    """
    if len(eigenvalues) == 0 or not eigenvalues[-1] > 0:
        return nan
    return float(eigenvalues[0] / eigenvalues[-1])
