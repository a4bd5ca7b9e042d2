"""How a cohort trains: the local plan and the engines."""

from lightning_fedhaw.clients.engine import Engine, LocalPlan, Visit
from lightning_fedhaw.clients.sequential import SequentialEngine

__all__ = ["Engine", "LocalPlan", "SequentialEngine", "Visit"]
