"""Diagnostics: observers that measure a training run and change nothing, and the formulas and pictures behind them."""

from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.diagnostics.coherence import Coherence, cohort_coherence, cosines, critical_round
from lightning_fedhaw.diagnostics.drift import Drift, layer_shares
from lightning_fedhaw.diagnostics.label_coherence import LabelCoherence, label_mixture, label_similarities
from lightning_fedhaw.diagnostics.pictures import draw_coherence, draw_cosines, draw_drift, draw_shrinking
from lightning_fedhaw.diagnostics.shrinking import Shrinking, ShrinkingTerms, shrinking_terms

__all__ = [
    "Coherence",
    "Diagnostic",
    "Drift",
    "LabelCoherence",
    "Shrinking",
    "ShrinkingTerms",
    "cohort_coherence",
    "cosines",
    "critical_round",
    "draw_coherence",
    "draw_cosines",
    "draw_drift",
    "draw_shrinking",
    "label_mixture",
    "label_similarities",
    "layer_shares",
    "shrinking_terms",
]
