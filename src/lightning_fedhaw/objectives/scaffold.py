"""SCAFFOLD: control variates correct the clients' gradients by their difference from the average gradient.

S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled Averaging
for Federated Learning. ICML 2020. The server's part is ``aggregation/scaffold.py``.
"""

from __future__ import annotations

from typing import Literal

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import GRADIENT, ClientObjective, ClientState, Named
from lightning_fedhaw.objectives.local_normalizer import ParameterGroup, normalizer, sgd_groups
from lightning_fedhaw.objectives.local_training import LocalTraining

ControlOption = Literal["II", "I"]


class ScaffoldObjective(ClientObjective):
    """The clients' part of SCAFFOLD: ``<c - c_k, w>`` in each client's loss, which corrects its gradients.

    The control variate ``c_k`` [P] estimates the client's gradient; ``c`` is the mean over all N clients, on the
    server. Both begin at zero. After local training the client's control variate becomes, depending on ``option``::

        "II"   c_k <- c_k - c + (start - end) / (lr A_k)
        "I"    c_k <- the gradient of the client's mean loss at start

    ``A_k`` is the number of steps or, with momentum or proximal terms, the local normalizer. A client whose update is
    not received changes neither ``c_k`` nor ``c``. Messages have twice the bytes of the model on both links.

    This class works with any rule; the published method is :class:`~lightning_fedhaw.ScaffoldCallback`.

    Args:
        option: How control variates are computed. ``"II"`` costs nothing and needs an SGD without dampening; learning
            rates and momentum are read from ``configure_optimizers``, for each parameter group and as scheduled.
            ``"I"`` costs one more pass over the client's data and works with any optimizer.
        name: Distinguishes two objectives of one class in a checkpoint.

    Raises:
        ValueError: If ``option`` is unknown; when ``fit`` begins, if it needs an SGD and the module has another
            optimizer.
    """

    key = "Scaffold"

    shares_state = True

    def __init__(self, option: ControlOption = "II", name: str | None = None) -> None:
        super().__init__(name)
        self.option = arguments.choice("option", option, ControlOption)
        self.needs_gradient = self.option == "I"
        self.needs_learning_rates = self.option == "II"
        self._groups: dict[str, ParameterGroup] = {}
        self._proximal = 0.0

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Read the parameter groups of the clients' optimizer, for option II.

        Raises:
            ValueError: If the optimizer is not an SGD whose normalizer is known.
        """
        if self.option != "II":
            return
        groups = sgd_groups(local_training, "SCAFFOLD", 'use `option="I"`, which works with any optimizer')
        group_of: dict[torch.nn.Parameter, ParameterGroup] = {}
        for group in groups:
            group_of.update(dict.fromkeys(group["params"], group))
        # The groups themselves and not their learning rates, because a client may have rates of its own.
        self._groups = {}
        for name, parameter in local_training.module.named_parameters():
            if parameter in group_of:
                self._groups[name] = group_of[parameter]
        self._proximal = local_training.proximal

    def _distance(self, name: str, steps: int) -> float:
        """Return ``lr A_k``, how far a parameter moves in a number of steps along gradients of -1."""
        group = self._groups[name]
        rate = float(group["lr"])
        return rate * normalizer(steps, group["momentum"], group["nesterov"], rate * self._proximal)

    def client_state(self, client: int, start: Named) -> ClientState:
        """Return ``c - c_k``, the correction of the gradients; see :meth:`ClientObjective.client_state`."""
        controls = super().client_state(client, start)
        mean = self.broadcast_mean(client)
        # Parameters with a learning rate of 0 do not move, so they need no correction; without `c` in the state,
        # `end_client` leaves their control variates unchanged.
        resting = set()
        for name, group in self._groups.items():
            if not float(group["lr"]):
                resting.add(name)
        state: ClientState = {}
        for name, control in controls.items():
            if name in mean and name not in resting:
                state[name] = mean[name] - control.to(mean[name])
            else:
                state[name] = -control
        return state

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """Return ``c - c_k``; see :meth:`ClientObjective.gradient`."""
        return state

    def init_client(self, start: Named) -> ClientState:
        """Return ``c_k = 0``."""
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """Return the new ``c_k``.

        It is unchanged if no step was made, and for parameters with a learning rate of 0.
        """
        if self.option == "I":
            return {name: state[GRADIENT + name] for name in start}
        if not num_steps:
            return {}
        controls: ClientState = {}
        for name, value in start.items():
            distance = self._distance(name, num_steps)
            mean_gradient = (value - end[name]) / distance if distance else 0.0
            controls[name] = mean_gradient - state[name]
        return controls
