"""SCAFFOLD: clients step along the average gradient of all, by what they know of each other's.

S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled Averaging
for Federated Learning. ICML 2020. The server's part is ``aggregation/scaffold.py``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import GRADIENT, ClientObjective, ClientState, Named, find_objectives
from lightning_fedhaw.objectives.local_normalizer import normalizer, sgd_groups

ControlOption = Literal["II", "I"]


class ScaffoldObjective(ClientObjective):
    """Add ``<c - c_k, w>`` to each client's loss: its gradients are corrected by how it differs from all clients.

    A control ``c_k`` [P] is what the client's gradient was; ``c`` is the mean over all N clients, and lives on the
    server. Both begin at zero. After a round of local work the client's control becomes, by ``option``::

        "II"   c_k <- c_k - c + (start - end) / (lr A_k)
        "I"    c_k <- the gradient of the client's mean loss at start

    with ``A_k`` the number of steps, or how far momentum and proximal terms let them reach. A client whose update is
    not received changes neither ``c_k`` nor ``c``. Twice the bytes of the model travel each way.

    This is the clients' part, for any rule; the published method is :class:`~lightning_fedhaw.ScaffoldCallback`.

    Args:
        option: How controls are found. ``"II"`` costs nothing and needs an SGD without dampening; rates and momentum
            are read from ``configure_optimizers``, for each parameter group and as scheduled. ``"I"`` costs one
            more pass over the client's data and goes with any optimizer.
        name: Tells two objectives of one class apart in a checkpoint.

    Raises:
        ValueError: If ``option`` is unknown; when ``fit`` begins, if it needs an SGD and there is none.
    """

    key = "Scaffold"

    shares_state = True

    def __init__(self, option: ControlOption = "II", name: str | None = None) -> None:
        super().__init__(name)
        self.option = arguments.choice("option", option, ControlOption)
        self.needs_gradient = self.option == "I"
        self.needs_learning_rates = self.option == "II"
        self._groups: dict[str, dict[str, Any]] = {}
        self._proximal = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how far the clients' optimizer goes."""
        if self.option == "II":
            groups = sgd_groups(trainer, "SCAFFOLD", 'say `option="I"`, which asks nothing of the optimizer')
            group_of = {parameter: group for group in groups for parameter in group["params"]}
            self._groups = {n: group_of[p] for n, p in pl_module.named_parameters() if p in group_of}
            self._proximal = sum(objective.proximal for objective in find_objectives(trainer.callbacks))

    def _reach(self, name: str, steps: int) -> float:
        group = self._groups[name]
        rate = float(group["lr"])
        return rate * normalizer(steps, group["momentum"], group["nesterov"], rate * self._proximal)

    def client_state(self, client: int, start: Named) -> ClientState:
        """``c - c_k``, which is all that local work needs to know."""
        own, broadcast_mean = super().client_state(client, start), self.broadcast_mean(client)
        # A parameter whose rate is zero goes nowhere, so nothing is lost by leaving c out; and its control stays.
        rests = {name for name, group in self._groups.items() if not float(group["lr"])}
        return {
            name: broadcast_mean[name] - value.to(broadcast_mean[name])
            if name in broadcast_mean and name not in rests
            else -value
            for name, value in own.items()
        }

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """``c - c_k``."""
        return state

    def init_client(self, start: Named) -> ClientState:
        """``c_k = 0``."""
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """The new ``c_k``; it stays where no step was made, and for parameters whose rate is zero."""
        if self.option == "I":
            return {name: state[GRADIENT + name] for name in start}
        if not num_steps:
            return {}
        new = {}
        for name, value in start.items():
            reach = self._reach(name, num_steps)
            new[name] = ((value - end[name]) / reach if reach else 0.0) - state[name]
        return new
