"""The screening of updates for NaN and infinity, which are excluded from the aggregation or end the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.local_parameters import LOCAL_PARAMETERS
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.records import Received, RoundPlan
from lightning_fedhaw.options import OnNonfinite
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import all_finite


class Screening:
    """The screening of every update, and of all that a round has received.

    Args:
        policy: The argument ``on_nonfinite``.
        buffers: The policies for buffers, which say what a client started from and what it sends.
        rule: The aggregation rule, which may have a hint when training diverges.
        uplink: The channels from clients to server, which may have made an update non-finite.
    """

    def __init__(
        self,
        policy: OnNonfinite,
        buffers: Buffers,
        rule: Rule,
        uplink: Sequence[Channel],
    ) -> None:
        self.policy = policy
        self.buffers = buffers
        self.rule = rule
        self.uplink = uplink

    def nonfinite_reason(self, round_idx: int, update: ClientUpdate, circumstance: str = "") -> str | None:
        """Say why an update has to be excluded.

        Args:
            round_idx: The round's number.
            update: The update.
            circumstance: An addition to the sentence.

        Returns:
            A sentence; ``None`` if the update is finite.

        Raises:
            FloatingPointError: If the update is not finite and ``on_nonfinite="raise"``.
        """
        content = self._nonfinite_content(update)
        if content is None:
            return None
        sentence = f"Client {update.client} returned non-finite {content} in round {round_idx}{circumstance}"
        if self.policy == "raise":
            raise FloatingPointError(
                f'{sentence}, and `on_nonfinite="raise"` ends the run. Lower the local learning rate, clip gradients,'
                ' or set `on_nonfinite="exclude"`.'
            )
        return sentence

    def check_round(self, plan: RoundPlan, received: Received) -> None:
        """Warn of excluded updates, and end the run where training has diverged.

        Args:
            plan: The clients of the round.
            received: The updates that were received.

        Raises:
            FloatingPointError: If nothing was received because every update was excluded.
        """
        for sentence in received.excluded:
            rank_zero_warn(f"{sentence} and was left out of the aggregation.")
        updates = received.updates
        # If channels lost most of the cohort, the few clients that trained may be the few that always fail.
        if not updates and len(plan.trainees) > len(plan.clients) / 2:
            raise FloatingPointError(
                f"Every client of round {plan.round} returned non-finite values, so training has diverged"
                f" ({received.excluded[0]}). The global model is the one before this round. Lower the local learning"
                f" rate, or clip gradients (`gradient_clip_val=1.0`).{self.rule.divergence_hint()}"
                f"{self._channel_advice()}"
            )
        if updates and not any(update.num_steps for update in updates):
            rank_zero_warn(f"No client made an optimizer step in round {plan.round}; `training_step` may return None.")

    def _channel_advice(self) -> str:
        """Name the channels that change what clients send."""
        names = [f"`{type(channel).__name__}`" for channel in self.uplink if changes_messages(channel)]
        if not names:
            return ""
        return f" Or {' and '.join(names)} spoiled what they sent; then make it gentler."

    def _nonfinite_content(self, update: ClientUpdate) -> str | None:
        """Name the content of an update that is not finite; ``None`` if all is finite."""
        buffers = self.buffers.sent(update)
        states = [value for state in update.memory["objectives"] for value in state.values()]
        local_parameters = list(update.memory[LOCAL_PARAMETERS].values())
        # Almost always all is finite, which this finds out with one wait for the device.
        if _sums_are_finite([update.displacement, *buffers.values(), *states, *local_parameters]):
            return None
        start = self.buffers.start(update.client)
        exempt = self.buffers.host.nonfinite_buffers
        spoiled = [n for n, buffer in buffers.items() if n not in exempt and _is_spoiled(buffer, start[n])]
        if spoiled:
            return f"buffers {spoiled[:3]}"
        if not all_finite(update.displacement):
            return "parameters"
        if not all(all_finite(parameter) for parameter in local_parameters):
            return "local parameters"
        if not all(all_finite(state) for state in states):
            return "states of client objectives"
        return None


def changes_messages(channel: Channel) -> bool:
    """Return whether a channel may change the messages that it delivers."""
    return type(channel).transmit is not Channel.transmit


def _is_spoiled(buffer: Tensor, start: Tensor) -> bool:
    """Return whether training put NaN or infinity into a buffer, which may have had some from the start.

    An attention mask has infinities, and a threshold may be NaN until it is computed.
    """
    if not (buffer.is_floating_point() or buffer.is_complex()) or all_finite(buffer):
        return False
    start = start.to(buffer.device)
    # NaN is the number that differs from itself.
    is_same = (buffer == start) | (buffer.isnan() & start.isnan())
    return bool((~torch.isfinite(buffer) & ~is_same).any())


def _sums_are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every tensor adds up to a finite number, which proves it finite; false for complex tensors."""
    if any(tensor.is_complex() for tensor in tensors):
        return False
    sums = [tensor.sum().to(tensors[0]) for tensor in tensors]
    return all_finite(torch.stack(sums))
