"""FedDyn: dynamic regularization of the clients' losses, which aligns their optima with the server's.

D. A. E. Acar, Y. Zhao, R. Matas, M. Mattina, P. Whatmough, V. Saligrama: Federated Learning Based on Dynamic
Regularization. ICLR 2021. The server's part is ``aggregation/feddyn.py``.
"""

from __future__ import annotations

from typing import Literal

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named

DynPenalty = Literal["square", "norm"]


class FedDynObjective(ClientObjective):
    """The clients' part of FedDyn: ``-<g_k, w> + alpha / 2 |w - start|^2`` in each client's loss.

    After local training ``g_k <- g_k - alpha (end - start)``. ``g_k`` [P] begins at zero; if clients minimize their
    objectives exactly, it is the gradient of the client's own loss. This class works with any rule; the published
    method is :class:`~lightning_fedhaw.FedDynCallback`.

    Args:
        regularization: The factor ``alpha``, at least 0.
        penalty: ``"square"``, as published. ``"norm"``: ``alpha / 2 |w - start|`` without the square, as in FedLAW's
            code and PFLlib: a gradient of constant norm.
        name: Distinguishes two objectives of one class in a checkpoint.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedDyn"

    def __init__(self, regularization: float = 0.01, penalty: DynPenalty = "square", name: str | None = None) -> None:
        super().__init__(name)
        self.regularization = arguments.number("regularization", regularization, minimum=0)
        self.is_square = arguments.choice("penalty", penalty, DynPenalty) == "square"
        self.proximal = self.regularization if self.is_square else 0.0

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """Return ``alpha (w - start) - g_k``; see :meth:`ClientObjective.gradient`."""
        displacements = {name: value - start[name] for name, value in parameters.items()}
        factor: torch.Tensor | float = self.regularization
        if not self.is_square:
            norms = [torch.linalg.vector_norm(displacement) for displacement in displacements.values()]
            norm = torch.stack(norms).square().sum().sqrt()
            # The norm is not differentiable at `start`, where the subgradient 0 is used.
            factor = torch.where(norm > 0, self.regularization / 2 / norm, 0.0)
        # In place on the fresh displacements: this is called for every step.
        return {name: value.mul_(factor).sub_(state[name]) for name, value in displacements.items()}

    def init_client(self, start: Named) -> ClientState:
        """Return ``g_k = 0``."""
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """Return ``g_k - alpha (end - start)``."""
        new_state = {}
        for name, value in state.items():
            new_state[name] = value - self.regularization * (end[name] - start[name])
        return new_state
