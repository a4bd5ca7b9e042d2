"""The loss of each client's training data at the model it received, for rules that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isnan

import torch
from torch import Tensor

from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.streams import seed_of


class InitialLosses:
    """The mean loss of a client's training data before local training, which its update brings to the server.

    It is the loss that ``training_step`` returns, with the module in training mode, as in local training. It costs one
    forward pass over the client's data, one client at a time in both engines, and leaves the module unchanged.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which knows those that a client starts from.
    """

    def __init__(self, context: RunContext, buffers: Buffers) -> None:
        self.host = context.host
        self.server = context.server
        self.data = context.data
        self.rule = context.rule
        self.seed = context.seed
        self.buffers = buffers

    def added_to(self, update: ClientUpdate, models: Mapping[int, Tensor]) -> ClientUpdate:
        """Return a client's update with its initial loss, if the rule needs it and the client has not sent it.

        Args:
            update: The client's update.
            models: The model that each client received, ``[P]``.
        """
        if not self.rule.needs_initial_loss or not isnan(update.initial_loss):
            return update
        return replace(update, initial_loss=self.compute(update.client, models[update.client]))

    def compute(self, client: int, start: Tensor) -> float:
        """Compute the mean loss of a client over its training data.

        Args:
            client: The client's number.
            start: ``[P]``, the model that the client received.

        Raises:
            ValueError: If ``training_step`` returns no loss.
        """
        round_idx = self.host.round
        total = torch.zeros((), dtype=torch.float64, device=self.host.device)
        num_samples = 0
        buffers = self.buffers.start(client)
        with isolated_randomness(self.host.device), torch.no_grad():
            seed_randomness(seed_of(self.seed, "client", client, "round", round_idx, "loss"), self.host.device)
            for batch in self.data.batches(client, round_idx, epochs=1):
                loss = self.server.loss(start, self.host.prepare(batch.data), batch.index, buffers=buffers)
                # Added on the device, which is then waited for once.
                total += loss.double() * batch.size
                num_samples += batch.size
        return float(total) / num_samples
