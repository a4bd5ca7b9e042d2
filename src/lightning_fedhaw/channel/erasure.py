"""Messages that do not arrive: independent erasures, and bursts of them.

The client error of the FedHAW experiments (A. Nakai-Kasai and T. Wadayama, arXiv 2605.00458); bursts by E. N. Gilbert,
Capacity of a Burst-Noise Channel, 1960, and E. O. Elliott, 1963.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, ChannelContext


@dataclass(frozen=True)
class GilbertElliott:
    """A link that is good or bad, by a Markov chain over rounds, and loses messages with a probability for each.

    In the long run it is bad in ``enter / (enter + leave)`` of the rounds, for ``1 / leave`` rounds on end.

    Attributes:
        enter: Probability of turning bad from one round to the next.
        leave: Probability of turning good.
        loss_good: Probability of a loss in a good round.
        loss_bad: Probability of a loss in a bad round.

    Raises:
        ValueError: If one is no probability, or the link would never change.
    """

    enter: float
    leave: float
    loss_good: float = 0.0
    loss_bad: float = 1.0

    def __post_init__(self) -> None:
        for name in ("enter", "leave", "loss_good", "loss_bad"):
            object.__setattr__(self, name, arguments.probability(name, getattr(self, name)))
        if self.enter + self.leave == 0:
            raise ValueError("`enter` and `leave` must not both be 0, got 0 and 0: such a link never changes.")

    @property
    def share_bad(self) -> float:
        """The share of bad rounds in the long run, which is also the chance to begin in one."""
        return self.enter / (self.enter + self.leave)

    @property
    def rate(self) -> float:
        """The share of losses in the long run."""
        return self.share_bad * self.loss_bad + (1 - self.share_bad) * self.loss_good


def is_bad(link: GilbertElliott, round_idx: int, uniform: Callable[[int], float]) -> bool:
    """Whether a link is bad in a round, without the rounds before it as far as they do not matter.

    Each round has one number, which says where the chain goes from either state. Where it goes to the same state from
    both, the past is forgotten; looking back ends there, or at round 0.

    Args:
        link: The chain.
        round_idx: The round, from 0.
        uniform: ``uniform(round)`` in [0, 1): the number of a round.
    """
    after_good_later: list[tuple[bool, bool]] = []
    for past in range(round_idx, -1, -1):
        number = uniform(past)
        if past == 0:
            from_good = from_bad = number < link.share_bad
        else:
            from_good, from_bad = number < link.enter, number < 1 - link.leave
        after_good_later.append((from_good, from_bad))
        if from_good == from_bad:
            break
    state = after_good_later.pop()[0]
    while after_good_later:
        state = after_good_later.pop()[state]
    return state


def legacy_draws(seed: int, num_clients: int, max_probability: float, round_idx: int) -> tuple[Tensor, Tensor]:
    """The error rates and one round's failures as the FedHAW authors' code draws them.

    Args:
        seed: What the code gives to NumPy's legacy generator.
        num_clients: N.
        max_probability: Upper end of the rates.
        round_idx: The round, from 0.

    Returns:
        ``[N]`` float64 rates and ``[N]`` bool failures.
    """
    draws = np.random.RandomState(seed).random_sample((round_idx + 2, num_clients))
    rates = draws[0] * max_probability
    return torch.from_numpy(rates), torch.from_numpy(draws[-1] < rates)


class ErasureChannel(Channel):
    """Loses whole messages: on the uplink a client that fails does not train (``fallback`` says what takes its place).

    Give one of ``probability``, ``max_probability`` and ``burst``.

    Args:
        probability: Of each message, independently: a number, or one per client ``[N]``.
        max_probability: Each client has a rate of its own, drawn uniformly up to this one, once a run.
        burst: Losses that come in bursts, each client's link by itself.
        legacy_seed: With ``max_probability``: rates and failures exactly as the FedHAW authors' code draws them from
            this seed (theirs was 23).
        channel: The arguments of :class:`Channel`.

    Raises:
        ValueError: If not exactly one is given, a probability is out of [0, 1], or there are not N of them.
        TypeError: If ``burst`` is no :class:`GilbertElliott`.
    """

    key = "ErasureChannel"

    def __init__(
        self,
        probability: float | Sequence[float] | Tensor | None = None,
        *,
        max_probability: float | None = None,
        burst: GilbertElliott | None = None,
        legacy_seed: int | None = None,
        **channel: Any,
    ) -> None:
        arguments.check_names(type(self).__name__, channel, arguments.constructor_names(type(self)))
        super().__init__(**channel)
        models = {"probability": probability, "max_probability": max_probability, "burst": burst}
        given = [name for name, value in models.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                "Give exactly one of `probability`, `max_probability` and `burst`, got"
                f" {' and '.join(f'`{name}`' for name in given) or 'none'}."
            )
        self.legacy_seed = arguments.optional(arguments.integer, "legacy_seed", legacy_seed, minimum=0)
        if legacy_seed is not None and max_probability is None:
            raise ValueError("`legacy_seed` repeats the authors' draws of rates: give `max_probability` with it.")
        self.max_probability = arguments.optional(arguments.probability, "max_probability", max_probability)
        self.burst = arguments.optional(
            arguments.instance, "burst", burst, GilbertElliott, example="GilbertElliott(0.1, 0.5)"
        )
        self.probability = arguments.optional(
            arguments.numbers,
            "probability",
            probability,
            allowed="a number in [0, 1], or one per client",
            maximum=1,
            or_one=True,
        )

    def prepare(self, context: ChannelContext) -> None:
        """Refuse rates of another federation."""
        if self.probability is not None and self.probability.ndim and self.probability.shape != (context.num_clients,):
            raise ValueError(
                f"`probability` of `ErasureChannel` must be a number or one per client [{context.num_clients}], got the"
                f" shape {list(self.probability.shape)}."
            )
        super().prepare(context)

    def rates(self, clients: list[int], seed: int) -> Tensor:
        """Clients' loss rates, ``[K]`` float64; those of a burst model in the long run."""
        if (burst := self.burst) is not None:
            return torch.full((len(clients),), burst.rate, dtype=torch.float64)
        if self.probability is not None:
            return self.probability.expand(self.context.num_clients)[clients]
        assert self.max_probability is not None
        if self.legacy_seed is not None:
            return legacy_draws(self.legacy_seed, self.context.num_clients, self.max_probability, 0)[0][clients]
        generators = [self._stream(seed, "client", client, "rate") for client in clients]
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
        return self.max_probability * torch.stack(draws)

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """The messages that are lost; see :meth:`Channel.outage`."""
        if self.legacy_seed is not None:
            assert self.max_probability is not None
            return legacy_draws(self.legacy_seed, self.context.num_clients, self.max_probability, round_idx)[1][clients]
        draws = self._uniform(seed, round_idx, clients, "outage")
        if (burst := self.burst) is None:
            return draws < self.rates(clients, seed)
        bad = torch.tensor([self._is_bad(burst, round_idx, client, seed) for client in clients])
        return draws < torch.where(bad, burst.loss_bad, burst.loss_good)

    def _is_bad(self, burst: GilbertElliott, round_idx: int, client: int, seed: int) -> bool:
        return is_bad(burst, round_idx, lambda past: float(self._uniform(seed, past, [client], "burst")))
