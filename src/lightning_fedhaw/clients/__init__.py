"""How a cohort trains: the local plan, the engines, and what clients add to their loss."""

from lightning_fedhaw.clients.engine import Engine, LocalPlan, Visit
from lightning_fedhaw.clients.objective import ClientObjective
from lightning_fedhaw.clients.sequential import SequentialEngine

__all__ = ["ClientObjective", "Engine", "LocalPlan", "SequentialEngine", "Visit"]
