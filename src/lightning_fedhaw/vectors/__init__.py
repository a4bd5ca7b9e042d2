"""Parameter vectors: the flat view of a model, and where the vectors of a cohort are kept."""

from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.layout import ParameterLayout

__all__ = ["AccumulatedVectors", "ClientVectors", "CohortVectors", "ParameterLayout"]
