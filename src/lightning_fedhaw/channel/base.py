"""What the air does to a message between server and client: the base of every channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_fedhaw.streams import stream

Link = Literal["uplink", "downlink"]
Fallback = Literal["zero_update", "reuse_update", "reuse_model", "discard"]


@dataclass(frozen=True)
class Filled:
    """What stands in for a message that was not heard.

    Attributes:
        displacement: ``[P]``, measured from the model that was broadcast this round.
        num_steps: Optimiser steps behind it; 0 for a zero update.
    """

    displacement: Tensor
    num_steps: int


class Channel(Callback):
    """Changes, delays or loses the messages of one link. Several compose in list order.

    A new channel overrides :meth:`outage` (which messages are lost), :meth:`transmit` (what the receiver gets of the
    rest), or both. Losses are drawn before local training, so a client whose uplink fails does not train; messages are
    changed one client at a time.

    On the uplink the message is the client's displacement from the model it heard, on the downlink it is the global
    model. Buffers are not changed.

    A channel with state of its own overrides :meth:`state_dict`, :meth:`load_state_dict` and :meth:`reset`, and
    replaces values instead of changing them in place: a round that is interrupted is undone by putting back
    the old ones.

    Args:
        link: ``"uplink"``: from the clients to the server. ``"downlink"``: from the server to the clients.
        fallback: What the receiver uses for a message it did not hear. On the uplink: ``"zero_update"``: the model just
            broadcast, in a slot that keeps its weight (the published client error of FedHAW). ``"reuse_update"``: the
            client's last update that was heard, applied to the current model. ``"reuse_model"``: its last model that
            was heard. ``"discard"``: nothing, and the weights of the others are normalised. The reuse policies are a
            zero update until something was heard. On the downlink: ``"reuse_model"``: the client trains the last
            global model it heard, and does not take part before it heard one. ``"discard"``: it does not take part.
            Default: ``"zero_update"`` on the uplink, ``"discard"`` on the downlink.
        name: Tells two channels of one class on one link apart in a checkpoint.

    Raises:
        ValueError: If ``link`` or ``fallback`` is unknown, or the fallback has no meaning on the link.
    """

    def __init__(self, link: Link = "uplink", fallback: Fallback | None = None, name: str | None = None) -> None:
        super().__init__()
        if fallback is None:
            fallback = "zero_update" if link == "uplink" else "discard"
        if link not in get_args(Link):
            raise ValueError(f"`link` must be one of {', '.join(map(repr, get_args(Link)))}, got {link!r}.")
        allowed = get_args(Fallback) if link == "uplink" else ("reuse_model", "discard")
        if fallback not in allowed:
            raise ValueError(
                f"`fallback` on the {link} must be one of {', '.join(map(repr, allowed))}, got {fallback!r}."
            )
        self.link: Link = link
        self.fallback: Fallback = fallback
        self.name = name
        self._heard: dict[int, dict[str, Any]] = {}

    @property
    def state_key(self) -> str:
        """Class, link and name: Lightning keeps one state per key."""
        return "/".join(filter(None, (type(self).__qualname__, self.link, self.name)))

    def outage(self, round_: int, clients: list[int], seed: int) -> Tensor:
        """Which messages of the round are lost, ``[K]`` bool. None by default.

        Args:
            round_: The round's number.
            clients: The cohort.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return torch.zeros(len(clients), dtype=torch.bool)

    def transmit(self, message: Tensor, *, round_: int, client: int, seed: int) -> Tensor:
        """What the receiver gets of a message ``[P]`` that is not lost. The message itself by default.

        Args:
            message: ``[P]``. Not to be changed: return a new tensor.
            round_: The round's number.
            client: The client at the far end.
            seed: The federation's seed; draw from :meth:`stream`.
        """
        return message

    def stream(self, seed: int, round_: int, client: int, purpose: str) -> torch.Generator:
        """The channel's own randomness for one client and round."""
        return stream(seed, "channel", self.state_key, "client", client, "round", round_, purpose)

    def fill(self, client: int, start: Tensor) -> Filled | None:
        """What the server uses for an uplink message it did not hear; ``None`` if the client is left out.

        Args:
            client: The client that was not heard.
            start: ``[P]``, the model that was broadcast this round.
        """
        if self.fallback == "discard":
            return None
        last = self._heard.get(client)
        if last is None or self.fallback == "zero_update":
            return Filled(torch.zeros_like(start), 0)
        kept = last["vector"].to(start)
        return Filled(kept if self.fallback == "reuse_update" else kept - start, last["num_steps"])

    def remember(self, client: int, start: Tensor, displacement: Tensor, num_steps: int) -> None:
        """Keep what was heard from a client, if the fallback will want it."""
        if self.fallback == "reuse_update":
            self._heard[client] = {"vector": displacement.clone(), "num_steps": num_steps}
        elif self.fallback == "reuse_model":
            self._heard[client] = {"vector": start + displacement, "num_steps": num_steps}

    def last_broadcast(self, client: int) -> Tensor | None:
        """The last global model ``[P]`` a client heard, on a downlink that reuses it."""
        kept = self._heard.get(client)
        return None if kept is None else kept["vector"]

    def reset(self) -> None:
        """Forget what another run left behind."""
        self._heard = {}

    def state_dict(self) -> dict[str, Any]:
        """What was heard last, for a checkpoint."""
        return {"heard": dict(self._heard)} if self._heard else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was heard last from a checkpoint."""
        self._heard = dict(state_dict.get("heard", {}))
