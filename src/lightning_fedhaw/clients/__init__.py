"""How a cohort trains: the local plan, the engines, and what clients add to their loss."""

from lightning_fedhaw.clients.objective import ClientObjective
from lightning_fedhaw.clients.sequential import LocalPlan, SequentialEngine, Visit

__all__ = ["ClientObjective", "LocalPlan", "SequentialEngine", "Visit"]
