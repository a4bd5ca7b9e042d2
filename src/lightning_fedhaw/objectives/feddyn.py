"""FedDyn: each client bends its loss until all clients' optima are the server's.

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
    """Add ``-<g_k, w> + alpha / 2 |w - start|^2`` to each client's loss, then ``g_k <- g_k - alpha (end - start)``.

    ``g_k`` [P] begins at zero; where clients solve their problem it is the gradient of the client's own loss. This is
    the clients' part, for any rule; the published method is :class:`~lightning_fedhaw.FedDynCallback`.

    Args:
        regularization: The factor ``alpha``, at least 0.
        penalty: ``"square"``, as published. ``"norm"``: ``alpha / 2 |w - start|`` without the square, as in FedLAW's
            code and PFLlib: a pull of constant length.
        name: Tells two objectives of one class apart in a checkpoint.

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
        """``alpha (w - start) - g_k``."""
        moved = {name: value - start[name] for name, value in parameters.items()}
        factor: torch.Tensor | float = self.regularization
        if not self.is_square:
            length = torch.stack([torch.linalg.vector_norm(value) for value in moved.values()]).square().sum().sqrt()
            factor = torch.where(length > 0, self.regularization / 2 / length, 0.0)
        return {name: value.mul_(factor).sub_(state[name]) for name, value in moved.items()}

    def init_client(self, start: Named) -> ClientState:
        """``g_k = 0``."""
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """``g_k - alpha (end - start)``."""
        return {name: own - self.regularization * (end[name] - start[name]) for name, own in state.items()}
