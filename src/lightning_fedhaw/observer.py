"""Hooks for people who watch a federation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback


class FederatedCallback(Callback):
    """A callback with hooks inside a round. Any callback that has methods of these names gets the calls.

    Observers see, and change nothing: weights belong to rules, messages to channels, losses to client objectives.
    """

    def on_federation_start(self, trainer: Any, pl_module: Any, federation: Any) -> None:
        """A ``fit`` is about to play its first round.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model in it.
            federation: The :class:`~lightning_fedhaw.federation.federation.Federation`, new or resumed.
        """

    def on_round_start(self, trainer: Any, pl_module: Any, round_idx: int, clients: list[int]) -> None:
        """A cohort was drawn; nobody has trained yet.

        Args:
            trainer: The trainer.
            pl_module: The module, with the global model in it.
            round_idx: The round's number, from 0.
            clients: The cohort.
        """

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        """A client has trained and its message has crossed the uplink.

        Args:
            trainer: The trainer.
            pl_module: The module, with the client's model in it.
            update: The :class:`~lightning_fedhaw.extending.ClientUpdate`. Its displacement is only valid
                during the call.
        """

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        """The new global model is in the module.

        Args:
            trainer: The trainer.
            pl_module: The module.
            report: The round's :class:`~lightning_fedhaw.federation.records.Report`.
        """
