"""The full gradient of a client's loss, for client objectives that ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fedhaw.clients.local_parameters import LocalParameters
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.streams import seed_of


class FullGradient:
    """The gradients on all training data of a client, computed without changing the module.

    Args:
        context: What all steps of a round work with.
        local_parameters: The clients' own parameters, with which their loss is computed.
    """

    def __init__(self, context: RunContext, local_parameters: LocalParameters) -> None:
        self.host = context.host
        self.server = context.server
        self.data = context.data
        self.seed = context.seed
        self.local_parameters = local_parameters

    def compute(self, client: int, start: Tensor) -> Tensor:
        """Compute the gradient ``[P]`` of a client's mean loss over its training data.

        Args:
            client: The client's number.
            start: ``[P]``, the model that the client received.
        """
        round_idx = self.host.round
        total = torch.zeros_like(start)
        num_samples = 0
        vector = start.detach().requires_grad_()
        own = self.local_parameters.start(client)
        with isolated_randomness(self.host.device), torch.enable_grad():
            seed_randomness(seed_of(self.seed, "client", client, "round", round_idx, "gradient"), self.host.device)
            for batch in self.data.batches(client, round_idx, epochs=1):
                loss = self.server.loss(vector, self.host.prepare(batch.data), batch.index, local_parameters=own)
                (gradient,) = torch.autograd.grad(loss, vector)
                total.add_(gradient, alpha=batch.size)
                num_samples += batch.size
        return total / num_samples
