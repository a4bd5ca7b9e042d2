"""Erasures: whole messages are lost, independently or in bursts.

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

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.channel.base import Channel, ChannelContext


@dataclass(frozen=True)
class GilbertElliott(argument_names.NamedArguments):
    """The Gilbert-Elliott model of burst losses: a Markov chain over rounds with a good and a bad state.

    In the long run the link is bad in a share ``enter / (enter + leave)`` of the rounds, and a bad period lasts
    ``1 / leave`` rounds on average.

    Attributes:
        enter: Probability of a transition from the good to the bad state, per round.
        leave: Probability of a transition from the bad to the good state, per round.
        loss_good: Probability that a message is lost in the good state.
        loss_bad: Probability that a message is lost in the bad state.

    Raises:
        ValueError: If an argument is not a probability, or the link would never change its state.
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
        """The share of bad rounds in the long run, which is also the probability that round 0 is bad."""
        return self.enter / (self.enter + self.leave)

    @property
    def rate(self) -> float:
        """The share of messages that are lost in the long run."""
        return self.share_bad * self.loss_bad + (1 - self.share_bad) * self.loss_good


def is_bad(link: GilbertElliott, round_idx: int, uniform: Callable[[int], float]) -> bool:
    """Return whether a link is bad in a round, looking back only as far as earlier rounds matter.

    One number per round decides where the chain goes from each of the two states. If it goes to the same state from
    both, earlier rounds do not matter. Looking back ends at such a round, or at round 0, so that the state of a link is
    a function of the round and needs no memory.

    Args:
        link: The Markov chain.
        round_idx: The round, from 0.
        uniform: ``uniform(round)`` in [0, 1): the number of a round.
    """
    transitions: list[tuple[bool, bool]] = []
    for past_round in range(round_idx, -1, -1):
        number = uniform(past_round)
        if past_round == 0:
            # The first state is drawn from the stationary distribution.
            from_good = number < link.share_bad
            from_bad = from_good
        else:
            from_good = number < link.enter
            from_bad = number < 1 - link.leave
        transitions.append((from_good, from_bad))
        if from_good == from_bad:
            break
    # Any first state will do: the earliest transition leads to the same state from both.
    bad = False
    for from_good, from_bad in reversed(transitions):
        bad = from_bad if bad else from_good
    return bad


def legacy_draws(seed: int, num_clients: int, max_probability: float, round_idx: int) -> tuple[Tensor, Tensor]:
    """Draw the loss rates and one round's losses exactly as the FedHAW authors' code does.

    Args:
        seed: The seed of NumPy's legacy generator in that code.
        num_clients: N, the number of clients.
        max_probability: The upper bound of the rates.
        round_idx: The round, from 0.

    Returns:
        The rates ``[N]`` float64, and the losses ``[N]`` bool.
    """
    # That code draws the rates first and then one row per round, all from one generator.
    draws = np.random.RandomState(seed).random_sample((round_idx + 2, num_clients))
    rates = draws[0] * max_probability
    return torch.from_numpy(rates), torch.from_numpy(draws[-1] < rates)


class ErasureChannel(Channel):
    """A channel that loses whole messages.

    On the uplink a client whose message is lost does not train, and the server uses a substitute (``fallback``). Give
    exactly one of ``probability``, ``max_probability`` and ``burst``.

    Args:
        probability: The probability that a message is lost, independently of all others: one number, or one per client
            ``[N]``.
        max_probability: Each client has its own loss rate, drawn uniformly from 0 to this number once per run.
        burst: Losses come in bursts, independently for each client.
        legacy_seed: With ``max_probability``: rates and losses exactly as the FedHAW authors' code draws them from
            this seed (they used 23).
        channel: The arguments of :class:`Channel`.

    Raises:
        ValueError: If not exactly one of the three is given, a probability is outside of [0, 1], or, at the start of a
            fit, there are not N of them.
        TypeError: If ``burst`` is not a :class:`GilbertElliott`.
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
        argument_names.check_names(type(self).__name__, channel, argument_names.constructor_names(type(self)))
        super().__init__(**channel)
        models = {"probability": probability, "max_probability": max_probability, "burst": burst}
        names = []
        for name, value in models.items():
            if value is not None:
                names.append(f"`{name}`")
        if len(names) != 1:
            raise ValueError(
                "Give exactly one of `probability`, `max_probability` and `burst`, got"
                f" {' and '.join(names) or 'none'}."
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
        """Refuse probabilities for another number of clients.

        Raises:
            ValueError: If there are several probabilities, but not one per client.
        """
        if self.probability is not None and self.probability.ndim > 0:
            shape = self.probability.shape
            if shape != (context.num_clients,):
                raise ValueError(
                    f"`probability` of `ErasureChannel` must be a number or one per client [{context.num_clients}], got"
                    f" the shape {list(shape)}."
                )
        super().prepare(context)

    def rates(self, clients: list[int], seed: int) -> Tensor:
        """Return the clients' loss rates; with bursts, those in the long run.

        Args:
            clients: The K clients.
            seed: The federation's seed.

        Returns:
            ``[K]`` float64.
        """
        if self.burst is not None:
            return torch.full((len(clients),), self.burst.rate, dtype=torch.float64)
        if self.probability is not None:
            return self.probability.expand(self.context.num_clients)[clients]
        assert self.max_probability is not None
        if self.legacy_seed is not None:
            rates, _ = legacy_draws(self.legacy_seed, self.context.num_clients, self.max_probability, 0)
            return rates[clients]
        draws = torch.empty(len(clients), dtype=torch.float64)
        for slot, client in enumerate(clients):
            generator = self._named_stream(seed, "client", client, "rate")
            # A stream per client, so that its rate does not depend on the other clients of the cohort.
            draws[slot] = torch.rand((), generator=generator, dtype=torch.float64)
        return self.max_probability * draws

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which messages are lost; see :meth:`Channel.outage`."""
        if self.legacy_seed is not None:
            assert self.max_probability is not None
            _, losses = legacy_draws(self.legacy_seed, self.context.num_clients, self.max_probability, round_idx)
            return losses[clients]
        draws = self._uniform_draws(seed, round_idx, clients, "outage")
        if self.burst is None:
            return draws < self.rates(clients, seed)
        bad = torch.tensor([self._is_bad(self.burst, round_idx, client, seed) for client in clients])
        return draws < torch.where(bad, self.burst.loss_bad, self.burst.loss_good)

    def _is_bad(self, burst: GilbertElliott, round_idx: int, client: int, seed: int) -> bool:
        def uniform(past_round: int) -> float:
            return float(self._uniform_draws(seed, past_round, [client], "burst"))

        return is_bad(burst, round_idx, uniform)
