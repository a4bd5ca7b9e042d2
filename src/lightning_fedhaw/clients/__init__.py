"""How a cohort trains: the local plan and the engines."""

from lightning_fedhaw.clients.engine import ClientTask, Engine
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.sequential import SequentialEngine

__all__ = ["ClientTask", "Engine", "LocalPlan", "SequentialEngine"]
