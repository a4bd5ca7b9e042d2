"""Diagnostics: observers that measure a training run and change nothing, and the formulas and pictures behind them."""

from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.diagnostics.coherence import Coherence, cohort_coherence, cosines, critical_round
from lightning_fedhaw.diagnostics.contributions import (
    Contributions,
    ShapleyValues,
    coalition_weights,
    leave_one_out,
    shapley_values,
)
from lightning_fedhaw.diagnostics.curvature import Curvature
from lightning_fedhaw.diagnostics.drift import Drift, layer_shares
from lightning_fedhaw.diagnostics.held_out import HeldOutLoss
from lightning_fedhaw.diagnostics.label_coherence import LabelCoherence, label_mixture, label_similarities
from lightning_fedhaw.diagnostics.landscape import Landscape, barycentric, simplex_grid
from lightning_fedhaw.diagnostics.lines import eigenvector_losses, loss_of_module, scale_losses, segment_losses
from lightning_fedhaw.diagnostics.parameters import Histogram, ParameterHistogram, symmetric_histogram
from lightning_fedhaw.diagnostics.pictures import (
    draw_coherence,
    draw_contributions,
    draw_cosines,
    draw_curvature,
    draw_drift,
    draw_landscape,
    draw_parameters,
    draw_shrinking,
)
from lightning_fedhaw.diagnostics.scores import (
    client_scores,
    contribution_table,
    label_entropies,
    pearson,
    score_correlations,
    scores_of,
    separation,
    shapley_errors,
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
    "Contributions",
    "Curvature",
    "Diagnostic",
    "Drift",
    "Eigenvalues",
    "Estimate",
    "HeldOutLoss",
    "Histogram",
    "LabelCoherence",
    "Landscape",
    "ParameterHistogram",
    "ShapleyValues",
    "Shrinking",
    "ShrinkingTerms",
    "barycentric",
    "client_scores",
    "coalition_weights",
    "cohort_coherence",
    "contribution_table",
    "cosines",
    "critical_round",
    "draw_coherence",
    "draw_contributions",
    "draw_cosines",
    "draw_curvature",
    "draw_drift",
    "draw_landscape",
    "draw_parameters",
    "draw_shrinking",
    "eigenvector_losses",
    "flatness_ratio",
    "hutchinson_trace",
    "label_entropies",
    "label_mixture",
    "label_similarities",
    "largest_eigenvalues",
    "layer_shares",
    "leave_one_out",
    "loss_of_module",
    "pearson",
    "scale_losses",
    "score_correlations",
    "scores_of",
    "segment_losses",
    "separation",
    "shapley_errors",
    "shapley_values",
    "shrinking_terms",
    "simplex_grid",
    "symmetric_histogram",
]
