"""Eigenvalues by Lanczos' method and traces, against the matrices themselves."""

from math import isnan

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_fedhaw.diagnostics import flatness_ratio, hutchinson_trace, largest_eigenvalues


def product_with(matrix):
    return lambda vector: matrix @ vector


def started(count, dtype=torch.float64):
    return torch.randn(count, generator=torch.Generator().manual_seed(5), dtype=dtype)


def test_the_largest_values_and_not_those_of_the_largest_magnitude():
    matrix = torch.tensor([5, 2, 1, 0.5, 0.25, -6], dtype=torch.float64).diag()
    found = largest_eigenvalues(product_with(matrix), started(6), 5, 50)
    assert found.values.tolist() == pytest.approx([5, 2, 1, 0.5, 0.25], abs=1e-12)
    assert found.residuals.max() < 1e-10
    assert flatness_ratio(found.values) == pytest.approx(20)


def test_a_subspace_that_is_not_left_is_not_the_end():
    # The directions of a start are exhausted after two steps: two values, of several directions each.
    matrix = torch.tensor([3.0, 3, 3, -1, -1, -1, -1], dtype=torch.float64).diag()
    found = largest_eigenvalues(product_with(matrix), started(7), 5, 7)
    assert found.values.tolist() == pytest.approx([3, 3, 3, -1, -1], abs=1e-10)
    zeros = largest_eigenvalues(product_with(torch.zeros(4, 4)), started(4, torch.float32), 5, 10)
    assert zeros.values.tolist() == [0, 0, 0, 0]


def test_a_ratio_needs_positive_values():
    assert isnan(flatness_ratio(torch.tensor([3.0, 0.0])))
    assert isnan(flatness_ratio(torch.tensor([3.0, -1.0])))


def test_what_is_not_finite_is_not_a_number():
    found = largest_eigenvalues(lambda vector: vector * torch.inf, started(6), 5, 3)
    assert found.values.isnan().all()


@pytest.mark.parametrize("trained", [False, True])
def test_the_hessian_of_a_network_of_500_parameters(trained):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x = torch.randn(60, 10, dtype=torch.float64)
    y = (x @ torch.randn(10, 3, dtype=torch.float64)).argmax(1)
    if trained:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    vector = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        tensors = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return cross_entropy(functional_call(net, tensors, x), y)

    assert 490 <= len(vector) <= 530
    full = hessian(loss, vector)
    exact = torch.linalg.eigvalsh(full)
    assert exact[0] < -1e-3, "indefinite"

    def product(direction):
        leaf = vector.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient, leaf, direction)[0]

    found = largest_eigenvalues(product, started(len(vector)), 5, 50)
    assert torch.allclose(found.values, exact.flip(0)[:5], rtol=0, atol=1e-6)
    assert found.residuals.max() < 1e-3


def test_the_trace_and_its_error():
    generator = torch.Generator().manual_seed(0)
    # Signs give the trace of a diagonal matrix exactly.
    diagonal = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    exact = hutchinson_trace(product_with(diagonal.diag()), diagonal, 3, generator)
    assert exact.value == pytest.approx(3)
    assert exact.error == pytest.approx(0)
    matrix = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    estimate = hutchinson_trace(product_with(matrix), matrix[0], 400, generator)
    # The variance of one sample is twice the sum of the squares beside the diagonal.
    expected = (2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 400).sqrt().item()
    assert estimate.error == pytest.approx(expected, rel=0.15)
    assert abs(estimate.value - matrix.trace().item()) < 4 * estimate.error
    assert isnan(hutchinson_trace(product_with(matrix), matrix[0], 1, generator).error)
