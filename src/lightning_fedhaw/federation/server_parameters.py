"""The parameters that only the server changes, as clients are sent them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fedhaw.channel.base import Link
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import Server


class ServerParametersPayload:
    """The parameters that only the server changes, which clients are sent with the model.

    Args:
        server: The global model.
        rule: The aggregation rule, which has the values.
    """

    links: Sequence[Link] = ("downlink",)

    def __init__(self, server: Server, rule: Rule) -> None:
        self.server = server
        self.rule = rule

    @property
    def message_bytes(self) -> int:
        """Bytes in addition to a model."""
        total = 0
        for name in self.rule.server_parameters(self.rule.state):
            if name in self.rule.client_placed:
                continue
            parameter = self.server.module.get_parameter(name)
            total += parameter.numel() * parameter.element_size()
        return total

    @property
    def contents(self) -> list[str]:
        """Nothing: clients do not send them."""
        return []
