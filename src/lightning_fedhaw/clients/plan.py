"""The local work of each client in a round, where clients may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_fedhaw import arguments, per_client
from lightning_fedhaw.options import FederationOptions, OptimizerState
from lightning_fedhaw.user_functions import called


@dataclass(frozen=True)
class LocalPlan:
    """The local work of a client in a round: a number of epochs, or a number of optimizer steps.

    ``epochs``, ``steps`` and ``lr_scale`` are one value for all clients or one for each, and the methods return a
    client's.

    Attributes:
        epochs: Passes over the client's data, or fractions of one; ``None`` where steps are counted.
        steps: Optimizer steps; ``None`` where epochs are counted.
        limit: Batches a pass at most: a number, or a share of the pass.
        optimizer_state: Whether clients keep their optimizer state from round to round.
        seed: The federation's seed.
        channels_last: Whether 4-D parameters are laid out channels-last during local training.
        lr_scale: Factor on the client's learning rates; it may also be a function of the client's number.
    """

    epochs: Any
    steps: Any
    limit: int | float | None
    optimizer_state: OptimizerState
    seed: int
    channels_last: bool = False
    lr_scale: Any = None

    @classmethod
    def of(cls, options: FederationOptions, limit: int | float | None, num_clients: int) -> LocalPlan:
        """Make the plan of a federation.

        Args:
            options: Its arguments.
            limit: Batches a pass at most.
            num_clients: N.

        Raises:
            ValueError: If an argument does not have one value for each client.
        """
        for name in ("local_epochs", "local_steps", "client_lr_scale"):
            per_client.check_clients(name, getattr(options, name), num_clients)
        lr_scale = options.client_lr_scale
        if callable(lr_scale):
            lr_scale = _called(lr_scale, num_clients)
        epochs = None
        if options.local_steps is None:
            epochs = options.local_epochs or 1
        return cls(
            epochs=epochs,
            steps=options.local_steps,
            limit=limit,
            optimizer_state=options.optimizer_state,
            seed=options.resolved_seed,
            channels_last=options.channels_last,
            lr_scale=lr_scale,
        )

    def epochs_of(self, client: int) -> int | float | None:
        """Return a client's passes; ``None`` where steps are counted."""
        passes: int | float | None = _value_of(self.epochs, client)
        return passes

    def steps_of(self, client: int) -> int | None:
        """Return a client's optimizer steps; ``None`` where epochs are counted."""
        steps: int | None = _value_of(self.steps, client)
        return steps

    def lr_scale_of(self, client: int) -> float:
        """Return the factor on a client's learning rates."""
        if self.lr_scale is None:
            return 1.0
        return float(_value_of(self.lr_scale, client))


def _value_of(values: Any, client: int) -> Any:
    if isinstance(values, (tuple, Mapping)):
        return values[client]
    return values


def _called(function: Callable[[int], Any], num_clients: int) -> tuple[float, ...]:
    """Return the values of a function of the client's number, for all clients."""
    # All clients at the start, so that a wrong value is found before the first round.
    scales = []
    for client in range(num_clients):
        hint = f"That is its value for client {client}."
        scales.append(
            arguments.number("client_lr_scale", called("client_lr_scale", function, client), above=0, hint=hint)
        )
    return tuple(scales)
