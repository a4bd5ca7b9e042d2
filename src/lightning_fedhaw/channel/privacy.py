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
    """Scale a vector down to a Euclidean norm; return the vector itself if it is not longer.

    Args:
        vector: ``[d]``, floating.
        bound: The largest norm that is allowed.
    """
    scaled, factor = ordinary(vector)
    norm = float(torch.linalg.vector_norm(scaled, dtype=torch.float64))
    if norm / factor <= bound:
        return vector
    if bound / norm < torch.finfo(vector.dtype).tiny:
        # The quotient would be a subnormal number, which has few digits.
        return scaled / norm * bound
    return scaled * (bound / norm)


def epsilon(
    noise_multiplier: float, delta: float, rounds: int, *, num_clients: int, drawn_uniformly: int | None
) -> float:
    """Return the epsilon of repeated releases of a noisy sum, by Renyi accounting.

    Two federations are neighbors if they differ in all the data of one client. Replacing a client changes a sum of
    vectors of norm C by up to 2 C, so noise of ``noise_multiplier * C`` is ``noise_multiplier / 2`` times the
    sensitivity.

    Args:
        noise_multiplier: Standard deviation of the noise divided by the clipping bound.
        delta: The delta of (epsilon, delta)-differential privacy.
        rounds: The number of releases that a client may have contributed to.
        num_clients: N, the number of clients.
        drawn_uniformly: The number of clients per round, if every set of that many is equally likely and the sets are
            secret, which amplifies privacy. ``None``: no amplification.

    Raises:
        ModuleNotFoundError: If the extra ``privacy`` is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Privacy accounting needs dp-accounting, which is not installed:"
            " `pip install dp-accounting`. `DifferentialPrivacyChannel(delta=None)` works without it."
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
    """Client-level differential privacy of the global models, against an observer who sees all of them.

    Each update is clipped to the norm C, and noise ``N(0, (noise_multiplier C)^2)`` is added to their unweighted sum,
    which is divided by the number of clients that were drawn, m, however many updates were received: DP-FedAvg with
    fixed weights. After T rounds the sequence of global models is (epsilon, delta)-differentially private with respect
    to all the data of one client. The server is trusted: it sees the sum before the noise.

    Uniform client sampling amplifies privacy if clients keep no state from round to round. With error feedback, kept
    optimizer states, client objectives with a state or reused broadcasts there is no amplification, and neither is
    there with other samplers: epsilon is then that of the client that participated most often.

    The guarantee holds for rules that give every client the same weight (``FedAvgCallback(weighting="uniform")``, and
    rules on top of it, which see only the noisy average), for samplers that draw uniformly or independently of the
    data, and for messages that are lost for reasons other than data. It does not cover other outputs of a run: logged
    training losses, numbers of received updates, the table of client metrics, buffers (refused unless
    ``buffers="keep"``), and what an objective sends in addition to the update. The noise comes from the run's seeded
    generator, which is meant for research: with the seed it can be subtracted again.

    Args:
        clip: The clipping bound C.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.
        delta: The delta for the epsilon in the run summary; it should be well below 1 / N. ``None``: no accounting,
            for which the extra ``privacy`` is needed.
        name: As in :class:`Channel`. The channel is always on the uplink.

    Raises:
        ValueError: If an argument is out of range; at the start of a fit, if the rule, the buffers or other channels
            violate the guarantee.
        ModuleNotFoundError: At the start of a fit, if ``delta`` is given and the extra ``privacy`` is missing.
    """

    key = "PrivacyChannel"

    _num_releases: int
    _releases_of_client: dict[int, int]
    _accounted_settings: dict[str, float]

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
        """Refuse a federation for which the guarantee does not hold.

        Raises:
            ValueError: If the rule weights clients differently, something is sent in addition to the updates, or a
                later channel changes updates after they were clipped.
            ModuleNotFoundError: If ``delta`` is given and the extra ``privacy`` is missing.
        """
        if context.is_probe:
            raise ValueError(
                "`DifferentialPrivacyChannel` accounts for one message a client and round, and"
                f" {context.rule} asks clients for further ones (a probe or an inquiry), which it would not count. Let"
                ' a rule probe the server\'s own data (`probe=Probe("proxy")`), or use a rule that reads updates only.'
            )
        super().prepare(context)
        assert context.unnormalized_weight is not None
        # Two clients that differ in everything a weight may depend on: samples and steps.
        weights = []
        for client in range(2):
            update = ClientUpdate(client, 1 + client, 1 + 2 * client, 0, torch.zeros(1))
            weights.append(float(context.unnormalized_weight(update)))
        self._check_weights(weights)
        # The state that a client keeps reveals in which rounds it participated, and amplification needs this secret.
        self._sampled_clients = None if context.clients_remember else context.drawn_uniformly
        if context.side_payloads:
            raise ValueError(
                "`DifferentialPrivacyChannel` protects only the updates, and clients would send"
                f" {' and '.join(context.side_payloads)} in addition to them, without noise. Set"
                ' `buffers="keep"`, and leave out objectives that share their state.'
            )
        channels = list(context.channels)
        for later in channels[channels.index(self) + 1 :]:
            if type(later).transmit is not Channel.transmit:
                raise ValueError(
                    f"`{type(later).__name__}` comes after `DifferentialPrivacyChannel` and could make updates longer"
                    " than `clip`. Put `DifferentialPrivacyChannel` after it."
                )
        if self.delta is not None:
            # Finds out now, and not after the last round, whether the extra is installed.
            self.epsilon()

    def _check_weights(self, weights: Sequence[float]) -> None:
        if len(set(weights)) > 1:
            raise ValueError(
                f"`DifferentialPrivacyChannel` needs the same weight for every client, and {self.context.rule} weights"
                ' clients by their data or their work. Use `FedAvgCallback(weighting="uniform")`, alone or in'
                " `FedOptCallback(rule=...)`."
            )

    def _check_settings(self) -> None:
        """Refuse to add up the privacy loss of rounds with different settings, for which the accounting is wrong."""
        settings = {"noise_multiplier": self.noise_multiplier, "clients drawn at random": self._sampled_clients or 0}
        if self.delta is not None and self._accounted_settings not in ({}, settings):
            changes = []
            for name, value in settings.items():
                changes.append(f"{name} from {self._accounted_settings[name]} to {value}")
            raise ValueError(
                "`DifferentialPrivacyChannel` can only account for rounds with equal settings, and the resumed run"
                f" changes {', '.join(changes)}. Resume with the settings of the checkpoint, start a new run, or set"
                " `delta=None` for no accounting."
            )
        self._accounted_settings = settings

    def epsilon(self) -> float:
        """Return the epsilon of the rounds so far."""
        assert self.delta is not None
        if self._sampled_clients is None:
            # Without amplification, the client that participated most often has the largest epsilon.
            rounds = max(self._releases_of_client.values(), default=0)
        else:
            rounds = self._num_releases
        return epsilon(
            self.noise_multiplier,
            self.delta,
            rounds,
            num_clients=self.context.num_clients,
            drawn_uniformly=self._sampled_clients,
        )

    @property
    def remembers(self) -> bool:
        """False: the state is for the accounting, and no message depends on it."""
        return False

    def summary(self) -> dict[str, float]:
        """Return epsilon and delta, for the run summary."""
        if self.delta is None:
            return {}
        return {"epsilon": self.epsilon(), "delta": self.delta}

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the clipped update; see :meth:`Channel.transmit`."""
        return clipped(message, self.clip)

    def superpose(self, total: Tensor, arrivals: Arrivals) -> Tensor:
        """Return the noisy sum for the number of drawn clients; see :meth:`AggregateChannel.superpose`."""
        self._check_weights(arrivals.weights.tolist())
        self._check_settings()
        noisy = total
        if self.noise_multiplier:
            weight = float(arrivals.weights[0])
            generator = self._named_stream(arrivals.seed, "round", arrivals.round, "noise")
            noisy = add_noise(total, weight * self.noise_multiplier * self.clip, generator)
        self._num_releases += 1
        # A new dictionary, so that an interrupted round can restore the old one.
        releases_of_client = dict(self._releases_of_client)
        for client in arrivals.clients:
            releases_of_client[client] = releases_of_client.get(client, 0) + 1
        self._releases_of_client = releases_of_client
        # The rule is going to divide by the number of clients in the sum, and the guarantee needs that of all drawn.
        num_received = len(arrivals.clients)
        if num_received == arrivals.drawn:
            return noisy
        return noisy * (num_received / arrivals.drawn)

    def reset(self) -> None:
        """Forget the releases of an earlier run."""
        super().reset()
        self._num_releases = 0
        self._releases_of_client = {}
        self._accounted_settings = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the releases so far, for a checkpoint."""
        return {
            **super().state_dict(),
            "releases": self._num_releases,
            "parts": dict(self._releases_of_client),
            "terms": self._accounted_settings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the releases so far from a checkpoint."""
        super().load_state_dict(state_dict)
        self._num_releases = state_dict.get("releases", 0)
        self._releases_of_client = dict(state_dict.get("parts", {}))
        self._accounted_settings = dict(state_dict.get("terms", {}))
