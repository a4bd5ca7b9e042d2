"""The buffers of the model (BatchNorm statistics, counters): those that clients start from, and the server's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_fedhaw.channel.base import Link
from lightning_fedhaw.clients.local_buffers import LocalBuffers
from lightning_fedhaw.clients.records import LogRecorder
from lightning_fedhaw.clients.steps import turns
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.federation.buffer_kinds import BufferKinds
from lightning_fedhaw.federation.buffer_names import is_named, listed, policies_by_name
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.options import BufferPolicy
from lightning_fedhaw.rule import RuleOutput
from lightning_fedhaw.server import averaged_buffers
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.kernels import all_finite

RECALIBRATION_BATCHES = 50
"""The number of batches that buffers are recomputed on, over the whole cohort."""


class Buffers:
    """The buffers of clients and server, by the policies that the argument ``buffers`` names.

    Frozen parameters that a pattern of it matches count as buffers.

    Args:
        context: What all steps of a round work with.

    Attributes:
        policy_of: The policy of each buffer by name.
        kinds: The kinds of the buffers.
        local: Each client's own buffers, with ``"local"``, which its engine keeps.

    Raises:
        ValueError: If a pattern matches nothing, or buffers cannot be recalibrated by the user's module.
    """

    def __init__(self, context: RunContext) -> None:
        host = context.host
        server = context.server
        self.policies = context.options.buffers
        self.policy_of = policies_by_name(self.policies, server.module, server.layout)
        self.host = host
        self.server = server
        self.data = context.data
        self.seed = context.seed
        self.kinds = BufferKinds(host.module, server.buffers)
        # Derived buffers belong to the weights that a client receives, and not to those that it had before.
        kept = frozenset(name for name in self._names("local") if name not in self.kinds.derived_names)
        self.local = LocalBuffers(kept, is_in_use=self.remembers)
        self._averaged = [name for name in self.policy_of if self._is_averaged(name)]
        self._has_warned = False
        if self._names("recalibrate") or self.policies == "recalibrate":
            self._check_recalibration()

    def _check_recalibration(self) -> None:
        """Refuse to recalibrate where the module does not allow it, or where there is nothing to recompute."""
        if not self.host.module.automatic_optimization:
            raise ValueError(
                '`buffers="recalibrate"` runs `training_step` without stepping optimizers, which'
                ' `automatic_optimization=False` does not allow. Use `buffers="average"`.'
            )
        if self.policies != "recalibrate" and not self.kinds.statistics.intersection(self._names("recalibrate")):
            raise ValueError(
                'The policy "recalibrate" recomputes running statistics of normalization layers, and `buffers` names it'
                f" for {listed(self._names('recalibrate'))} only. Use another policy for them."
            )

    def _names(self, policy: BufferPolicy) -> list[str]:
        """List the buffers with a policy."""
        return [name for name, its_policy in self.policy_of.items() if its_policy == policy]

    def _is_averaged(self, name: str) -> bool:
        """Return whether the server combines the clients' buffers under this name."""
        policy = self.policy_of[name]
        # The only client's buffers are the server's, as in central training.
        if policy == "local" and self.data.num_clients > 1:
            # The average of statistics serves to evaluate the global model; other local buffers stay with their client.
            buffer = self.server.buffers[name]
            is_counter = not (buffer.is_floating_point() or buffer.is_complex())
            return name not in self.kinds.derived_names and (is_counter or name in self.kinds.statistics)
        return policy != "keep"

    @property
    def remembers(self) -> bool:
        """Whether clients keep buffers from round to round."""
        return self.policies == "local" or "local" in self.policy_of.values()

    @property
    def links(self) -> Sequence[Link]:
        """Both links."""
        return ("downlink", "uplink")

    @property
    def message_bytes(self) -> int:
        """Bytes of buffers that are sent in addition to a model, on either link; those that stay local do not count."""
        nbytes = 0
        for name in (*self._names("average"), *self._names("recalibrate")):
            buffer = self.server.buffers[name]
            nbytes += buffer.numel() * buffer.element_size()
        return nbytes

    @property
    def contents(self) -> list[str]:
        """The kinds of data that clients send, in words."""
        return ["buffers"] if self._averaged else []

    @property
    def averaged(self) -> Sequence[str]:
        """The names of the buffers that the server combines, which clients have to send."""
        return self._averaged

    def start(self, client: int) -> Mapping[str, Tensor]:
        """Return the buffers that a client starts from."""
        own = self.local.start(client)
        if not own:
            return self.server.buffers
        return {**self.server.buffers, **own}

    def sent(self, update: ClientUpdate) -> Mapping[str, Tensor]:
        """Return the buffers of an update that count: all except those that the server never changes."""
        sent = {}
        for name, buffer in update.buffers.items():
            if self.policy_of[name] != "keep":
                sent[name] = buffer
        return sent

    def changed(self, update: ClientUpdate) -> dict[str, Tensor]:
        """Return the buffers of an update that training has changed, in host memory."""
        changed = {}
        for name, buffer in update.buffers.items():
            if not _is_same(buffer, self.server.buffers[name]):
                changed[name] = buffer.cpu()
        return changed

    def aggregate(
        self, cohort: Cohort, step: RuleOutput, updates: Sequence[ClientUpdate]
    ) -> Mapping[str, Tensor] | None:
        """Combine the received buffers: averages by the rule's weights, and the widest range of observers.

        Args:
            cohort: The cohort that was aggregated.
            step: The rule's output.
            updates: The updates that were received from their clients; a channel's substitutes have no buffers.

        Returns:
            The server's new buffers; ``None`` if they do not change.
        """
        if not self._averaged or not updates:
            return None
        weight_of = dict(zip(cohort.clients.tolist(), step.weights.tolist(), strict=True))
        weights = torch.tensor([weight_of[update.client] for update in updates], dtype=torch.float64)
        total = weights.sum()
        if not total > 0:
            return None
        weights = weights / total
        starts = {}
        for name in self._averaged:
            # The widest range counts, and not an average of ranges.
            if name not in self.kinds.ranges:
                starts[name] = self.server.buffers[name]
        combined = averaged_buffers(starts, (update.buffers for update in updates), weights)
        changed = []
        for name in self.kinds.unknown:
            # One read of a constant (a mask, a table), which is equal; a NaN is not.
            if name not in combined or torch.equal(combined[name], starts[name]):
                continue
            changed.append(name)
            if not all_finite(combined[name]):
                combined[name] = _mean_of_finite(starts[name], self._stack(name, updates), weights)
        for name in self._averaged:
            if name in self.kinds.minima:
                combined[name] = self._stack(name, updates).amin(0)
            elif name in self.kinds.maxima:
                combined[name] = self._stack(name, updates).amax(0)
        self._warn_of_averages(changed, updates)
        return {**self.server.buffers, **combined}

    def _stack(self, name: str, updates: Sequence[ClientUpdate]) -> Tensor:
        """Stack the clients' buffers under one name, ``[K, *shape]``."""
        start = self.server.buffers[name]
        return torch.stack([update.buffers.get(name, start).to(start.device) for update in updates])

    def _warn_of_averages(self, changed: Sequence[str], updates: Sequence[ClientUpdate]) -> None:
        """Warn once of buffers in which clients differ, unless a pattern has named them.

        Args:
            changed: Buffers of an unknown kind that clients may have changed.
            updates: The updates that were received from their clients.
        """
        if self._has_warned:
            return
        names = []
        for name in changed:
            if is_named(name, self.policies):
                continue
            stack = self._stack(name, updates)
            if not _is_same(stack, stack[:1].expand_as(stack)):
                names.append(name)
        if names:
            self._has_warned = True
            rank_zero_warn(
                f"Each client changed {listed(names)} in its own way. These buffers are no running statistics of a"
                " normalization layer, and the server averages them, which is wrong for directions, queues or extremes."
                f' Choose what is right for each, such as `buffers={{"{names[0]}": "local"}}` (each client keeps its'
                ' own), "keep" (the server\'s never changes), or "average" (as now, without this warning).'
            )

    def complete(self, round_idx: int, updates: Sequence[ClientUpdate]) -> None:
        """Compute the buffers that follow from the new global model, which is in the module.

        Args:
            round_idx: The round's number.
            updates: The updates that were received from their clients.
        """
        self._derive(updates)
        if updates and (self.policies == "recalibrate" or self._names("recalibrate")):
            self.recalibrate(round_idx, [update.client for update in updates])

    @torch.no_grad()
    def _derive(self, updates: Sequence[ClientUpdate]) -> None:
        """Compute the buffers that follow from other tensors."""
        if not self.kinds.derived:
            return
        for layer in self.kinds.derived:
            is_averaged = all(name in self._averaged for name in layer.names)
            layer.derive(are_clients_own=is_averaged and len(updates) == 1)
        module_buffers = self.server.layout.tracked_buffers(self.server.module)
        derived = {name: module_buffers[name].detach().clone() for name in self.kinds.derived_names}
        self.server.buffers = {**self.server.buffers, **derived}

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
        with (
            _cumulative_statistics(norms),
            isolated_randomness(self.host.device),
            LogRecorder(module),
            turns(self.host),
        ):
            for client in clients:
                self.host.client = client
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
        """List the layers whose running statistics are recalibrated; those of frozen layers are not."""
        module = self.host.module
        tracked = self.server.layout.tracked_buffers(module)
        buffers = {id(tracked[name]) for name in self._names("recalibrate")}
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


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, NaN included."""
    return torch.equal(first, second) or torch.equal(first.nan_to_num(), second.nan_to_num())


def _mean_of_finite(start: Tensor, stack: Tensor, weights: Tensor) -> Tensor:
    """Average a buffer that may have been NaN or infinite before training.

    Args:
        start: ``[*shape]``, the buffer before training.
        stack: ``[K, *shape]``, the clients' buffers.
        weights: ``[K]``, summing to one.

    Returns:
        The mean of the clients whose element is finite; where none is, the element stays what it was.
    """
    dtype = torch.promote_types(start.dtype, torch.float32)
    is_finite = torch.isfinite(stack)
    shares = weights.to(start.device, dtype).reshape(-1, *[1] * start.ndim) * is_finite
    total = shares.sum(0)
    mean = (torch.where(is_finite, stack, 0).to(dtype) * shares).sum(0) / total
    return torch.where(total > 0, mean, start.to(dtype)).to(start.dtype)
