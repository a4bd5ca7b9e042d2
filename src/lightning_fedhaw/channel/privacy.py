"""Client-level differential privacy: clipped updates, and noise on their sum.

H. B. McMahan, D. Ramage, K. Talwar, L. Zhang: Learning Differentially Private Recurrent Language Models. ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.awgn import add_noise
from lightning_fedhaw.channel.base import AggregateChannel, Arrivals, Channel, ChannelContext
from lightning_fedhaw.channel.scale import ordinary
from lightning_fedhaw.cohort import ClientUpdate


def clipped(vector: Tensor, bound: float) -> Tensor:
    """A vector scaled down to a Euclidean norm of ``bound`` where it is longer; itself where not."""
    scaled, power = ordinary(vector)
    norm = float(torch.linalg.vector_norm(scaled, dtype=torch.float64))
    return vector if norm / power <= bound else scaled * (bound / norm)


def epsilon(
    noise_multiplier: float, delta: float, rounds: int, *, num_clients: int, drawn_uniformly: int | None
) -> float:
    """The epsilon of many releases of a noisy sum, by Renyi accounting; needs the extra ``privacy``.

    Neighbors are two federations that differ in everything one client holds. Replacing a client moves a sum of
    vectors of norm C by up to 2 C, so noise of ``noise_multiplier * C`` is ``noise_multiplier / 2`` of the sensitivity.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        delta: The probability with which the bound may fail.
        rounds: Releases that a client may have been part of.
        num_clients: N.
        drawn_uniformly: Clients a round, where every set of so many is equally likely and nobody knows who came; this
            amplifies privacy. ``None``: no amplification.

    Raises:
        ModuleNotFoundError: If the extra is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Accounting for privacy needs dp-accounting, which is not installed:"
            ' `pip install "lightning-fedhaw[privacy]"`. `DifferentialPrivacyChannel(delta=None)` works without.'
        ) from error
    if not rounds:
        return 0.0
    if not noise_multiplier:
        return float("inf")
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    event = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
    if drawn_uniformly is not None and drawn_uniformly < num_clients:
        event = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, drawn_uniformly, event)
    return float(accountant.compose(event, rounds).get_epsilon(delta))


class DifferentialPrivacyChannel(AggregateChannel):
    """Client-level differential privacy of the global models, against whoever sees them all.

    Each update is clipped to the norm C, and noise ``N(0, (noise_multiplier C)^2)`` is put on their unweighted sum,
    which is divided by the number of clients that were drawn, m, whoever arrived: DP-FedAvg with fixed weights. After
    T rounds the sequence of global models is (epsilon, delta)-differentially private with respect to everything that
    one client holds. The server is trusted: it sees the sum before the noise.

    Uniform draws amplify where clients remember nothing from round to round; with error feedback, kept optimizers,
    client objectives with a state or reused broadcasts, the client that came most often counts, as with other samplers.

    This holds for rules that name the same weight for every client (``FedAvgCallback(weighting="uniform")``, and
    rules on top of it, for which the noisy average is all they see), for samplers that draw uniformly or do not look
    at data, and for messages that are lost for reasons other than data. It does not cover what else leaves a run:
    logged training losses, numbers of clients received, the table of client metrics, buffers (refused unless
    ``buffers="keep"``), what an objective sends beside the update. Noise comes from the run's seeded generator, for
    study: whoever knows the seed can take it off again.

    Args:
        clip: C.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.
        delta: For the epsilon in the run summary; well below 1 / N. ``None``: without accounting, which is what the
            extra ``privacy`` is for.
        name: As in :class:`Channel`. The channel is for the uplink.

    Raises:
        ValueError: If an argument is out of range; at the start of a fit, if rule, buffers or other channels break the
            guarantee.
        ModuleNotFoundError: At the start of a fit, if there is a delta and the extra is missing.
    """

    key = "PrivacyChannel"

    _parts: dict[int, int]
    _terms: dict[str, float]

    def __init__(
        self, clip: float, noise_multiplier: float, *, delta: float | None = 1e-5, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.clip = arguments.number("clip", clip, above=0, infinite=True)
        self.noise_multiplier = arguments.number("noise_multiplier", noise_multiplier, minimum=0)
        if self.clip == float("inf") and self.noise_multiplier:
            raise ValueError("`noise_multiplier` is in units of `clip`, which must be finite then, got inf.")
        self.delta = arguments.optional(arguments.probability, "delta", delta)
        self.reset()

    def prepare(self, context: ChannelContext) -> None:
        """Refuse what the guarantee does not hold for."""
        super().prepare(context)
        assert context.unnormalized_weight is not None
        probes = [ClientUpdate(client, 1 + client, 1 + 2 * client, 0, torch.zeros(1)) for client in range(2)]
        self._check_weights([float(context.unnormalized_weight(probe)) for probe in probes])
        # What a client remembers says in which rounds it was, and these are secret where sampling amplifies.
        self._amplified = None if context.clients_remember else context.drawn_uniformly
        if context.side_payloads:
            raise ValueError(
                f"`DifferentialPrivacyChannel` protects updates, and {' and '.join(context.side_payloads)} would leave"
                ' the clients beside them without noise. Set `buffers="keep"`, and leave out objectives that share'
                " their state."
            )
        channels = list(context.channels)
        for later in channels[channels.index(self) + 1 :]:
            if type(later).transmit is not Channel.transmit:
                raise ValueError(
                    f"`{type(later).__name__}` comes after `DifferentialPrivacyChannel` and could make updates longer"
                    " than `clip`. Put `DifferentialPrivacyChannel` behind it."
                )
        if self.delta is not None:
            self.epsilon()

    def _check_weights(self, weights: Sequence[float]) -> None:
        if len(set(weights)) > 1:
            raise ValueError(
                f"`DifferentialPrivacyChannel` needs the same weight for every client, and {self.context.rule} weighs"
                ' them by what they hold or do. Use `FedAvgCallback(weighting="uniform")`, alone or in'
                " `FedOptCallback(rule=...)`."
            )

    def _check_terms(self) -> None:
        """Refuse to count rounds together that were not played alike."""
        terms = {"noise_multiplier": self.noise_multiplier, "clients drawn at random": self._amplified or 0}
        if self.delta is not None and self._terms not in ({}, terms):
            told = ", ".join(f"{name} from {self._terms[name]} to {now}" for name, now in terms.items())
            raise ValueError(
                f"`DifferentialPrivacyChannel` counts what rounds that are alike have spent, and goes on with other"
                f" ones: {told}. Go on as before, start a new run, or set `delta=None` for no accounting."
            )
        self._terms = terms

    def epsilon(self) -> float:
        """What the rounds so far have spent."""
        assert self.delta is not None
        drawn = self._amplified
        # Without amplification, it counts who came most often.
        rounds = self._releases if drawn is not None else max(self._parts.values(), default=0)
        return epsilon(
            self.noise_multiplier, self.delta, rounds, num_clients=self.context.num_clients, drawn_uniformly=drawn
        )

    @property
    def remembers(self) -> bool:
        """No message depends on what was spent."""
        return False

    def summary(self) -> dict[str, float]:
        """Epsilon and delta, for the run summary."""
        return {} if self.delta is None else {"epsilon": self.epsilon(), "delta": self.delta}

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The update, clipped; see :meth:`Channel.transmit`."""
        return clipped(message, self.clip)

    def superpose(self, total: Tensor, arrivals: Arrivals) -> Tensor:
        """The noisy sum over the fixed number of clients; see :meth:`AggregateChannel.superpose`."""
        self._check_weights(arrivals.weights.tolist())
        self._check_terms()
        weight, noisy = float(arrivals.weights[0]), total
        if self.noise_multiplier:
            generator = self._stream(arrivals.seed, "round", arrivals.round, "noise")
            noisy = add_noise(total, weight * self.noise_multiplier * self.clip, generator)
        self._releases += 1
        self._parts = {**self._parts, **{client: self._parts.get(client, 0) + 1 for client in arrivals.clients}}
        # The rule is going to divide by those who are in the sum.
        present = len(arrivals.clients)
        return noisy if present == arrivals.drawn else noisy * (present / arrivals.drawn)

    def reset(self) -> None:
        """Forget what another run spent."""
        super().reset()
        self._releases = 0
        self._parts, self._terms = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What was spent, for a checkpoint."""
        return {**super().state_dict(), "releases": self._releases, "parts": dict(self._parts), "terms": self._terms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was spent from a checkpoint."""
        super().load_state_dict(state_dict)
        self._releases = state_dict.get("releases", 0)
        self._parts = dict(state_dict.get("parts", {}))
        self._terms = dict(state_dict.get("terms", {}))
