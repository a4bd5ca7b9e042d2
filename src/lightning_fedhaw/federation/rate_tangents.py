"""What a learned rate of the clients needs of a federation: derivatives of gradients, and one more vector up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_fedhaw.autodiff.duals import dual_of, load_rules, parts_of
from lightning_fedhaw.channel.base import Link
from lightning_fedhaw.clients.clipping import clipped
from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.steps import BatchData, Host, Terms
from lightning_fedhaw.clients.tangents import check_tangents
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import Server


class RateTangentPayload:
    """The tangents that clients send with their updates, as precisely as they have computed them: no channel acts.

    Nothing happens for rules that read none.

    Args:
        host: The trainer around the federation.
        server: The global model, which computes the loss at any parameters.
        rule: The aggregation rule.
        engine: The engine, which is given what it needs.

    Raises:
        ValueError: If the derivatives of the clients' training are not known.
    """

    def __init__(self, host: Host, server: Server, rule: Rule, engine: Engine) -> None:
        self.host = host
        self.server = server
        self.is_sent = rule.needs_rate_tangents
        if not self.is_sent:
            return
        self._check(rule, engine)
        check_tangents(host.optimizers[0], engine.initial_states[0])
        engine.gradient_slope = self.gradient_slope
        self._has_recurrent_layers = any(isinstance(layer, nn.RNNBase) for layer in host.module.modules())

    @property
    def links(self) -> Sequence[Link]:
        """The uplink only."""
        return ("uplink",)

    @property
    def message_bytes(self) -> int:
        """Bytes of a tangent, which is as large as the model."""
        return self.is_sent * self.server.layout.message_bytes

    @property
    def contents(self) -> list[str]:
        """The kind of data that clients send, in words."""
        if not self.is_sent:
            return []
        return ["rate tangents"]

    def _check(self, rule: Rule, engine: Engine) -> None:
        """Refuse training through which no derivative is carried."""
        host = self.host
        reading = []
        for objective in engine.objectives:
            if objective.reads_batch:
                reading.append(type(objective).__name__)
        reason = None
        if not host.module.automatic_optimization:
            reason = "manual optimization; use automatic optimization"
        elif len(host.optimizers) != 1:
            reason = f"{len(host.optimizers)} optimizers; use one"
        elif host.accumulate != 1:
            reason = f"`accumulate_grad_batches={host.accumulate}`; use larger batches instead"
        elif host.scaler is not None:
            reason = 'a loss scale; use `precision="bf16-mixed"` or "32-true"'
        elif self.server.layout.local:
            reason = f"local parameters ({', '.join(self.server.layout.local[:5])}); share them"
        elif reading:
            reason = f"{', '.join(reading)}, which reads the batch; leave it out"
        if reason is not None:
            raise ValueError(
                f"`{type(rule).__name__}` carries derivatives through the clients' local steps, and cannot with"
                f' {reason}, or use `FedHyperCallback("SL")`, which needs no derivative.'
            )

    def gradient_slope(
        self, vector: Tensor, tangent: Tensor, data: BatchData, batch_idx: int, terms: Terms | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a batch, and its change along a tangent; see ``engine.GradientSlope``.

        The module's buffers are those of the client, and its draws are those of the step that follows.
        """
        layout = self.server.layout
        with isolated_randomness(self.host.device), torch.enable_grad(), self._level():
            dual = dual_of(vector.detach().clone().requires_grad_(), tangent)
            views = layout.views(dual)
            loss = self.server.loss(dual, data, batch_idx)
            dual_terms = None
            if terms is not None:
                objectives = [objective for objective, _ in terms.all]
                states = [state for _, state in terms.all]
                dual_terms = Terms(objectives, views, terms.start, states)
                loss = dual_terms.added_to(loss, dual_terms.open)
            (gradient,) = torch.autograd.grad(loss, dual)
            slices: Sequence[Tensor | None] = list(layout.views(gradient).values())
            with torch.no_grad():
                if dual_terms is not None:
                    slices = dual_terms.add_closed_gradients(slices, list(views.values()))
                # Gradients are clipped by client; here is one.
                rows: list[Tensor | None] = []
                for part in slices:
                    rows.append(None if part is None else part.unsqueeze(0))
                values, tangents = _unpacked(clipped(rows, self.host.clipping))
        return layout.read(values), layout.read(tangents)

    @contextmanager
    def _level(self) -> Iterator[None]:
        """Compute with dual numbers, by kernels that have second derivatives."""
        load_rules()
        flags = torch.backends.cudnn
        with (
            dual_level(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(
                enabled=flags.enabled and not self._has_recurrent_layers,
                benchmark=flags.benchmark,
                deterministic=flags.deterministic,
                allow_tf32=flags.allow_tf32,
            ),
        ):
            yield


def _unpacked(rows: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return values and tangents of duals ``[1, *shape]``, without their first axis."""
    values: list[Tensor] = []
    tangents: list[Tensor] = []
    for row in rows:
        assert row is not None
        value, tangent = parts_of(row[0])
        if tangent is None:
            tangent = torch.zeros_like(value)
        values.append(value.detach().clone())
        tangents.append(tangent.detach().clone())
    return values, tangents
