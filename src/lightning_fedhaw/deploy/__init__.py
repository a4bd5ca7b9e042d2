"""Deployment on an existing engine: the server side and the client side of a federation, and adapters of engines."""

from lightning_fedhaw.deploy.client_side import ClientSide
from lightning_fedhaw.deploy.messages import Message
from lightning_fedhaw.deploy.server_side import ServerSide, rounds_done
from lightning_fedhaw.deploy.sites import InMemorySites, Sites

__all__ = ["ClientSide", "InMemorySites", "Message", "ServerSide", "Sites", "rounds_done"]
