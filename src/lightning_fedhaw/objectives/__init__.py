"""Client objectives: terms that clients add to their loss, one file each."""

from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.objectives.feddyn import FedDynObjective
from lightning_fedhaw.objectives.fedntd import FedNTD
from lightning_fedhaw.objectives.fedprox import FedProx
from lightning_fedhaw.objectives.moon import MOON
from lightning_fedhaw.objectives.scaffold import ScaffoldObjective

__all__ = ["MOON", "ClientObjective", "FedDynObjective", "FedNTD", "FedProx", "ScaffoldObjective"]
