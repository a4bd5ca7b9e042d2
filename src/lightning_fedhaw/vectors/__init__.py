"""Parameter vectors: the flat view of a model, and where the vectors of a cohort are kept."""
