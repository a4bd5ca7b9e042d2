"""What the tests of diagnostics share: every observer, and a federation to watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from federations import Classifier, flat, samples, trainer
from lightning_fedhaw import FederatedDataModule
from lightning_fedhaw.diagnostics import (
    Coherence,
    Contributions,
    Curvature,
    Diagnostic,
    Drift,
    LabelCoherence,
    Landscape,
    ParameterHistogram,
    Shrinking,
)

OBSERVERS: dict[str, Callable[[], Diagnostic]] = {
    "coherence": Coherence,
    "contributions": partial(Contributions, 1, samples=40, permutations=2),
    "curvature": partial(Curvature, 1, samples=40, batch_size=25, steps=5, trace_samples=2),
    "drift": Drift,
    "label_coherence": LabelCoherence,
    "landscape": partial(Landscape, 1, resolution=3, samples=40),
    "parameters": partial(ParameterHistogram, 1, bins=7),
    "shrinking": Shrinking,
}
"""One of each kind, by the first part of the names of its series."""


def proxied(count: int = 120) -> FederatedDataModule:
    """Training data with some samples of the server's own."""
    return FederatedDataModule(samples(count), batch_size=8, val=samples(60, seed=1), proxy=samples(24, seed=5))


def everything_of(observers: Sequence[Diagnostic], **options: Any) -> dict[str, Tensor]:
    """Fit, and return what must not depend on observers: the model and every random state."""
    torch.manual_seed(1)
    module = Classifier(norm=True, dropout=0.3)
    runner = trainer(2, None, observers, storage="device", **options)
    runner.fit(module, proxied())
    metrics = {name: value for name, value in runner.callback_metrics.items() if not name.startswith("diagnostics/")}
    return {"model": flat(module), "random": torch.get_rng_state(), **metrics}
