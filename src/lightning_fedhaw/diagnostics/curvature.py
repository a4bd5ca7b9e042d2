"""Curvature: the largest eigenvalues and the trace of the Hessian of the global model's loss."""

from __future__ import annotations

import time
from math import nan

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.held_out import HeldOutDiagnostic, HeldOutLoss, Source, check_second_derivative
from lightning_fedhaw.diagnostics.spectrum import flatness_ratio, hutchinson_trace, largest_eigenvalues
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.streams import stream

COUNT = 5
"""The eigenvalues that are logged, as in the paper."""

_PRECISIONS = ("32-true", "64-true")


class Curvature(HeldOutDiagnostic):
    """Measures how sharp the loss of the global model is, on validation or proxy data in evaluation mode.

    The loss is that of ``training_step``. After ``diagnostics/curvature/`` it logs:

    - ``eigenvalue_1`` to ``eigenvalue_5``, the algebraically largest of the exact Hessian, and ``residual``: within
      this distance of each of them the Hessian has an eigenvalue;
    - the flatness ``ratio`` of the first to the fifth, NaN if the fifth is not positive;
    - the ``trace`` and its standard error ``trace_error``.

    What this costs is said before the first round.

    Args:
        every_n_rounds: It measures after every n-th round.
        data: Whether the loss is on ``"validation"`` or on ``"proxy"`` data.
        samples: The samples of the loss at most, drawn once.
        batch_size: Samples that are computed at once at most.
        steps: The steps of Lanczos' method, each a product of the Hessian with a vector.
        trace_samples: The random vectors for the trace, each another product; 0 for no trace.
    """

    def __init__(
        self,
        every_n_rounds: int = 10,
        *,
        data: Source = "validation",
        samples: int = 512,
        batch_size: int = 256,
        steps: int = 50,
        trace_samples: int = 10,
    ) -> None:
        super().__init__(every_n_rounds, data, samples, batch_size)
        self.steps = arguments.integer("steps", steps, minimum=COUNT)
        self.trace_samples = arguments.integer("trace_samples", trace_samples, minimum=0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse half precision, in which a second derivative is rounding, and read the samples."""
        name = type(self).__name__
        if trainer.precision not in _PRECISIONS:
            raise ValueError(
                f"`{name}` needs derivatives in full precision, and `precision` is {trainer.precision!r}. Use"
                f" '32-true' or '64-true', or remove `{name}`."
            )
        super().on_train_start(trainer, pl_module)

    def prepare(self, federation: Federation, loss: HeldOutLoss) -> None:
        """Refuse a loss without a second derivative, and say what curvature costs."""
        name = type(self).__name__
        begin = time.perf_counter()
        check_second_derivative(name, loss, federation)
        seconds = time.perf_counter() - begin
        products = min(self.steps, federation.layout.numel) + self.trace_samples
        megabytes = min(self.steps, federation.layout.numel) * federation.server.parameters().nbytes / 1e6
        rank_zero_info(
            f"{name}: after every {self.every_n_rounds} rounds {products} products with the Hessian on"
            f" {loss.samples} samples, about {2 * products} gradient passes over them or"
            f" {products * seconds:.2g} s, and {megabytes:.3g} MB for the basis."
        )

    def measure(self, aggregated: Aggregated) -> None:
        """Compute eigenvalues and trace at the new global model."""
        loss = self.loss
        vector = aggregated.server.parameters()

        def product(direction: Tensor) -> Tensor:
            return loss.hessian_product(vector, direction)

        generator = stream(aggregated.server.seed, "round", aggregated.round, "curvature")
        start = torch.randn(vector.numel(), generator=generator, dtype=torch.float64).to(vector)
        found = largest_eigenvalues(product, start, COUNT, self.steps)
        for number in range(COUNT):
            value = nan
            if number < len(found.values):
                value = float(found.values[number])
            aggregated.log(f"curvature/eigenvalue_{number + 1}", value)
        aggregated.log("curvature/residual", float(found.residuals.max()))
        ratio = nan
        if len(found.values) == COUNT:
            ratio = flatness_ratio(found.values)
        aggregated.log("curvature/ratio", ratio)
        if self.trace_samples:
            trace = hutchinson_trace(product, vector, self.trace_samples, generator)
            aggregated.log("curvature/trace", trace.value)
            aggregated.log("curvature/trace_error", trace.error)
