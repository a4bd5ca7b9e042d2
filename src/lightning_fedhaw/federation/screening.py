"""The screening of updates for NaN and infinity, which are excluded from the aggregation or end the run."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.local_parameters import LOCAL_PARAMETERS
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.records import Received, RoundPlan
from lightning_fedhaw.federation.repeated import RepeatedWarnings
from lightning_fedhaw.federation.shared_states import SHARED_CHANGES
from lightning_fedhaw.federation.stores import VectorStore
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.kernels import all_finite

NONFINITE = "non-finite content"
"""The entry of an update's memory that names what is not finite in the state that a client elsewhere keeps."""


class Screening:
    """The screening of every update, and of all that a round has received.

    Args:
        options: The federation's arguments: which updates are excluded, and which rounds are skipped or end the run.
        buffers: The policies for buffers, which say what a client started from and what it sends.
        rule: The aggregation rule, which says what a round needs and may have a hint when training diverges.
        uplink: The channels from clients to server, which may have made an update non-finite.

    Attributes:
        nonfinite_rounds: The last rounds in a row whose received updates were all excluded. Rounds in which nothing was
            received are not counted. It is undone with a round that fails, and part of a checkpoint.
    """

    def __init__(
        self,
        options: FederationOptions,
        buffers: Buffers,
        rule: Rule,
        uplink: Sequence[Channel],
    ) -> None:
        self.options = options
        self.buffers = buffers
        self.rule = rule
        self.uplink = uplink
        self.nonfinite_rounds = 0
        self.warnings = RepeatedWarnings()

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
        content = update.memory.get(NONFINITE) or self.nonfinite_content(update)
        if content is None:
            return None
        sentence = f"Client {update.client} returned non-finite {content} in round {round_idx}{circumstance}"
        self._check_policy(sentence)
        return sentence

    def misfit_reason(self, round_idx: int, update: ClientUpdate, store: VectorStore) -> str | None:
        """Say why an update has to be excluded that is finite, but not in the dtype in which it would be stored.

        Returns:
            A sentence; ``None`` if it can be stored.

        Raises:
            FloatingPointError: If it cannot and ``on_nonfinite="raise"``.
        """
        if store.fits(update):
            return None
        sentence = (
            f"The update of client {update.client} in round {round_idx} does not fit into"
            f" `storage_dtype`={self.options.storage_dtype} (torch.bfloat16 has nearly the range of float32)"
        )
        self._check_policy(sentence)
        return sentence

    def _check_policy(self, sentence: str) -> None:
        """End the run because of one update, if the user wants that."""
        if self.options.on_nonfinite == "raise":
            raise FloatingPointError(
                f'{sentence}, and `on_nonfinite="raise"` ends the run. Lower the local learning rate, clip gradients,'
                ' or set `on_nonfinite="exclude"`.'
            )

    def check_round(self, plan: RoundPlan, received: Received) -> None:
        """Warn of excluded updates, and end the run where training has diverged.

        Args:
            plan: The clients of the round.
            received: The updates that were received.

        Raises:
            FloatingPointError: If nothing was received because every update was excluded, in this round or in
                ``max_nonfinite_rounds`` rounds in a row.
        """
        self.check_answers(plan, received)
        updates = received.updates
        if updates and not any(update.num_steps for update in updates):
            self.warnings.warn(
                "no step",
                f"No client made an optimizer step in round {plan.round}; `training_step` may return None.",
            )

    def check_answers(self, plan: RoundPlan, received: Received) -> None:
        """Warn of excluded updates or answers, and end the run where nothing was received because all were excluded.

        Args:
            plan: The clients of the round.
            received: The updates that were received, or those of clients whose answers to an inquiry were.

        Raises:
            FloatingPointError: As :meth:`check_round`.
        """
        for client, sentence in received.excluded.items():
            self.warnings.warn(f"client {client}", f"{sentence} and was left out of the aggregation.")
        updates = received.updates
        self._count_round(received)
        # If channels lost most of the cohort, the few clients that trained may be the few that always fail.
        if received.excluded and not updates and len(plan.trainees) > len(plan.clients) / 2:
            raise self._divergence(f"Every client of round {plan.round} returned non-finite values", received)
        if self.nonfinite_rounds >= self.options.max_nonfinite_rounds:
            raise self._divergence(
                f"In {self.nonfinite_rounds} rounds in a row, up to round {plan.round}, every client whose update was"
                " received returned non-finite values",
                received,
            )

    def _count_round(self, received: Received) -> None:
        """Count the rounds in a row whose received updates were all excluded; lost messages say nothing."""
        if received.updates:
            self.nonfinite_rounds = 0
        elif received.excluded:
            self.nonfinite_rounds += 1

    def _divergence(self, finding: str, received: Received) -> FloatingPointError:
        """Make the error of a run that has diverged."""
        example = next(iter(received.excluded.values()))
        return FloatingPointError(
            f"{finding}, so training has diverged ({example}). The global model is the one before this round. Lower the"
            f" local learning rate, or clip gradients (`gradient_clip_val=1.0`).{self.rule.divergence_hint()}"
            f"{self._channel_advice()}"
        )

    def must_skip(self, plan: RoundPlan, received: Received) -> bool:
        """Return whether a round has too few updates for the rule, and warn of it."""
        shortage = None
        needed = self.rule.min_updates
        if not received.records or (not received.from_clients and self.options.empty_round == "skip"):
            shortage = "No client update was received"
        elif len(received.records) < needed <= len(plan.clients):
            # If too few clients were sampled, it is no accident of this round, and the rule refuses the cohort.
            rule = type(self.rule.base_rule).__name__
            shortage = f"{len(received.records)} updates were received of the {needed} that `{rule}` needs"
        if shortage is None:
            return False
        self.warnings.warn(
            "skipped",
            f"{shortage} in round {plan.round}: the global model and the rule's state stay as they were.",
        )
        return True

    def _channel_advice(self) -> str:
        """Name the channels that change what clients send."""
        names = []
        for channel in self.uplink:
            if changes_messages(channel):
                names.append(f"`{type(channel).__name__}`")
        if not names:
            return ""
        return f" Or {' and '.join(names)} spoiled what they sent; then make it gentler."

    def nonfinite_content(self, update: ClientUpdate) -> str | None:
        """Name the content of an update that is not finite; ``None`` if all is finite."""
        buffers = self.buffers.sent(update)
        states: list[Tensor] = []
        for state in (*update.memory["objectives"], *update.memory.get(SHARED_CHANGES, ())):
            states += state.values()
        local_parameters = list(update.memory[LOCAL_PARAMETERS].values())
        # Almost always all is finite, which this finds out with one wait for the device.
        if _sums_are_finite([update.displacement, *buffers.values(), *states, *local_parameters]):
            return None
        start = self.buffers.start(update.client)
        exempt = self.buffers.host.nonfinite_buffers
        spoiled = []
        for name, buffer in buffers.items():
            if name not in exempt and _is_spoiled(buffer, start[name]):
                spoiled.append(name)
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
    sums = [tensor.sum() for tensor in tensors]
    if len(sums) == 1:
        return isfinite(sums[0].item())
    # One transfer to the host for all of them.
    return all(map(isfinite, torch.stack([total.to(tensors[0]) for total in sums]).tolist()))
