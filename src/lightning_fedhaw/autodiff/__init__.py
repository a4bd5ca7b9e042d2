"""Federated automatic differentiation: derivatives of programs that cross the border between server and clients.

A federated program is ordinary Python: :func:`broadcast` sends a server value to the clients, :func:`map_clients` works
on it there, :func:`sum` and :func:`mean` bring the result back. :func:`value_and_grad` differentiates such a program in
one of three modes, and :func:`cost` tells beforehand what each mode sends.

K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation. arXiv:2301.07806.
"""

from lightning_fedhaw.autodiff.modes import CostSheet, Derivative, ModeCost, cost, jacobian, value_and_grad
from lightning_fedhaw.autodiff.placement import Placed, broadcast, gradient, map_clients, mean, place, sum, weighted_sum
from lightning_fedhaw.autodiff.primitives import Clients, DropOuts, Traffic
from lightning_fedhaw.autodiff.unroll import unroll

__all__ = [
    "Clients",
    "CostSheet",
    "Derivative",
    "DropOuts",
    "ModeCost",
    "Placed",
    "Traffic",
    "broadcast",
    "cost",
    "gradient",
    "jacobian",
    "map_clients",
    "mean",
    "place",
    "sum",
    "unroll",
    "value_and_grad",
    "weighted_sum",
]
