"""FedProx: a proximal term that keeps clients near the global model.

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in Heterogeneous Networks.
MLSys 2020.
"""

from __future__ import annotations

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named


class FedProx(ClientObjective):
    """The proximal term ``mu / 2 |w - start|^2`` in each client's loss; ``mu=0`` is bit-identical to no term.

    Args:
        mu: The proximal coefficient, at least 0. The authors of FedHAW and FedLAW use 1e-3.
        name: Distinguishes two objectives of one class in a checkpoint.

    Raises:
        ValueError: If ``mu`` is negative or not finite.

    Example:
        >>> import torch
        >>> w, start = {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}
        >>> FedProx(mu=0.5).gradient(w, start, {})
        {'w': tensor([1.])}
    """

    key = "FedProx"

    def __init__(self, mu: float = 1e-3, name: str | None = None) -> None:
        super().__init__(name)
        self.mu = arguments.number("mu", mu, minimum=0)
        self.proximal = self.mu

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """Return ``mu (w - start)``; see :meth:`ClientObjective.gradient`."""
        return {name: (value - start[name]).mul_(self.mu) for name, value in parameters.items()}
