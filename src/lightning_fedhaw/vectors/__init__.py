"""Parameter vectors: the flat view of a model, and the stores of a cohort's vectors."""

from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

__all__ = ["AccumulatedVectors", "ClientVectors", "CohortVectors", "ParameterLayout"]
