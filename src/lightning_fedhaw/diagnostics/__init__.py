"""Diagnostics: observers that measure a training run and change nothing, and the formulas and pictures behind them."""

from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.diagnostics.coherence import Coherence, cohort_coherence, cosines, critical_round
from lightning_fedhaw.diagnostics.curvature import Curvature
from lightning_fedhaw.diagnostics.drift import Drift, layer_shares
from lightning_fedhaw.diagnostics.label_coherence import LabelCoherence, label_mixture, label_similarities
from lightning_fedhaw.diagnostics.pictures import (
    draw_coherence,
    draw_cosines,
    draw_curvature,
    draw_drift,
    draw_shrinking,
)
from lightning_fedhaw.diagnostics.shrinking import Shrinking, ShrinkingTerms, shrinking_terms
from lightning_fedhaw.diagnostics.spectrum import (
    Eigenvalues,
    Estimate,
    flatness_ratio,
    hutchinson_trace,
    largest_eigenvalues,
)

__all__ = [
    "Coherence",
    "Curvature",
    "Diagnostic",
    "Drift",
    "Eigenvalues",
    "Estimate",
    "LabelCoherence",
    "Shrinking",
    "ShrinkingTerms",
    "cohort_coherence",
    "cosines",
    "critical_round",
    "draw_coherence",
    "draw_cosines",
    "draw_curvature",
    "draw_drift",
    "draw_shrinking",
    "flatness_ratio",
    "hutchinson_trace",
    "label_mixture",
    "label_similarities",
    "largest_eigenvalues",
    "layer_shares",
    "shrinking_terms",
]
