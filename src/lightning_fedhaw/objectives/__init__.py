"""Client objectives: what clients add to their loss, one file each."""

from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.objectives.feddyn import FedDyn
from lightning_fedhaw.objectives.fedprox import FedProx
from lightning_fedhaw.objectives.scaffold import Scaffold

__all__ = ["ClientObjective", "FedDyn", "FedProx", "Scaffold"]
