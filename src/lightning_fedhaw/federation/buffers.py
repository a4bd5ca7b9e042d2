"""The buffers of the model (BatchNorm statistics, counters): those that clients start from, and the server's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.options import BufferPolicy
from lightning_fedhaw.rule import RuleOutput
from lightning_fedhaw.server import Server, averaged_buffers
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.memory import HOST

RECALIBRATION_BATCHES = 50
"""The number of batches that buffers are recomputed on, over the whole cohort."""


class Buffers:
    """The buffers of clients and server, by the policy that the argument ``buffers`` names.

    Args:
        policy: The argument ``buffers``.
        host: The trainer around the federation.
        server: The global model.
        data: The clients' data.
        seed: The federation's seed, for models that draw while buffers are recalibrated.

    Attributes:
        local: Each client's own buffers, with ``"local"``, in host memory.

    Raises:
        ValueError: If buffers cannot be recalibrated by the user's module.
    """

    def __init__(self, policy: BufferPolicy, host: Host, server: Server, data: ClientData, seed: int) -> None:
        if policy == "recalibrate" and not host.module.automatic_optimization:
            raise ValueError(
                '`buffers="recalibrate"` runs `training_step` without stepping optimizers, which'
                ' `automatic_optimization=False` does not allow. Use `buffers="average"`.'
            )
        self.policy = policy
        self.host = host
        self.server = server
        self.data = data
        self.seed = seed
        self.local: dict[int, dict[str, Tensor]] = {}

    @property
    def message_bytes(self) -> int:
        """Bytes of buffers that are sent in addition to a model, on either link."""
        if self.policy in ("keep", "local"):
            return 0
        return sum(buffer.numel() * buffer.element_size() for buffer in self.server.buffers.values())

    @property
    def contents(self) -> list[str]:
        """The kinds of data that clients send, in words."""
        if self.policy == "keep" or not self.server.buffers:
            return []
        return ["buffers"]

    def start(self, client: int) -> Mapping[str, Tensor]:
        """Return the buffers that a client starts from."""
        if client not in self.local:
            return self.server.buffers
        own = self.local[client]
        return {name: own.get(name, buffer) for name, buffer in self.server.buffers.items()}

    def sent(self, update: ClientUpdate) -> Mapping[str, Tensor]:
        """Return the buffers of an update that clients send."""
        if self.policy == "keep":
            return {}
        return update.buffers

    def changed(self, update: ClientUpdate) -> dict[str, Tensor]:
        """Return the buffers of an update that training has changed, in host memory."""
        changed = {}
        for name, buffer in update.buffers.items():
            if not torch.equal(buffer, self.server.buffers[name]):
                changed[name] = buffer.cpu()
        return changed

    def remember(self, update: ClientUpdate) -> None:
        """Keep the buffers of a client whose update was received for its next round, with ``"local"``."""
        if self.policy == "local":
            self.local[update.client] = {name: buffer.to(HOST) for name, buffer in update.buffers.items()}

    def reset_local(self, names: Sequence[str]) -> None:
        """Let all clients start from the server's buffers with these names, where they have kept their own."""
        if not names:
            return
        for client, own in self.local.items():
            self.local[client] = {name: buffer for name, buffer in own.items() if name not in names}

    def load(self, local: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Load clients' own buffers from a checkpoint, except those that are frozen by now."""
        self.local = {}
        for client, buffers in local.items():
            self.local[client] = {name: b for name, b in buffers.items() if name in self.server.layout.buffers}

    def aggregate(
        self, cohort: Cohort, step: RuleOutput, updates: Sequence[ClientUpdate]
    ) -> Mapping[str, Tensor] | None:
        """Average the received buffers by the rule's weights.

        Args:
            cohort: The cohort that was aggregated.
            step: The rule's output.
            updates: The updates that were received from their clients; a channel's substitutes have no buffers.

        Returns:
            The server's new buffers; ``None`` if they do not change.
        """
        if self.policy == "keep" or not self.server.buffers or not updates:
            return None
        weight_of = dict(zip(cohort.clients.tolist(), step.weights.tolist(), strict=True))
        weights = torch.tensor([weight_of[update.client] for update in updates], dtype=torch.float64)
        total = weights.sum()
        if not total > 0:
            return None
        return averaged_buffers(self.server.buffers, (update.buffers for update in updates), weights / total)

    @torch.no_grad()
    def recalibrate(self, round_idx: int, clients: Sequence[int]) -> None:
        """Recompute the running statistics of normalization layers on data of the cohort.

        Args:
            round_idx: The round's number.
            clients: The clients whose update was received.
        """
        module = self.host.module
        norms = self._norms()
        limit = max(1, RECALIBRATION_BATCHES // len(clients))
        with _cumulative_statistics(norms), isolated_randomness(self.host.device), LogRecorder(module):
            for client in clients:
                seed_randomness(
                    seed_of(self.seed, "client", client, "round", round_idx, "recalibrate"), self.host.device
                )
                for batch in self.data.batches(client, round_idx, epochs=1, limit=limit):
                    self.host.forward(self.host.prepare(batch.data), batch.index)
        recomputed = {id(buffer) for norm in norms for buffer in norm.buffers()}
        statistics = {}
        for name, buffer in module.named_buffers():
            if id(buffer) in recomputed:
                statistics[name] = buffer.detach().clone()
        self.server.buffers = {**self.server.buffers, **statistics}
        # The passes may have changed other buffers, which are restored.
        self.server.write(self.server.parameters(), self.server.buffers)

    def _norms(self) -> list[nn.modules.batchnorm._NormBase]:
        """List the layers whose running statistics belong to the federation; those of frozen layers do not."""
        module = self.host.module
        buffers = {id(buffer) for buffer in self.server.layout.tracked_buffers(module).values()}
        norms = []
        for submodule in module.modules():
            if id(getattr(submodule, "running_mean", None)) in buffers and hasattr(submodule, "momentum"):
                norms.append(cast("nn.modules.batchnorm._NormBase", submodule))
        return norms


@contextmanager
def _cumulative_statistics(norms: Sequence[nn.modules.batchnorm._NormBase]) -> Iterator[None]:
    """Let normalization layers average all batches inside the context; restore momentum and mode at its end."""
    settings = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum, PyTorch averages all batches with equal weights.
            norm.momentum = None
            norm.train()
        yield
    finally:
        for norm, momentum, training in settings:
            norm.momentum = momentum
            norm.train(training)
