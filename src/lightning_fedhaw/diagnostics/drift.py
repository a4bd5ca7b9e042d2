"""Drift: how far the clients' models are from the global one, layer by layer.

Shapes: K clients are in the cohort, L layers in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.base import Diagnostic, check_single_updates
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated

Reference = Literal["broadcast", "new"]


def layer_shares(distances: Tensor) -> Tensor:
    """Return the share of each layer ``[L]`` in the squared distances of all clients; 0 where nothing has moved.

    Args:
        distances: ``[L, K]``, the distance of each client in each layer.
    """
    squares = distances.square().sum(1)
    total = squares.sum()
    if total == 0:
        return squares
    return squares / total


def merged_layers(groups: Mapping[str, Sequence[slice]], depth: int | None) -> dict[str, list[slice]]:
    """Merge layers whose names share their first parts, and neighboring slices of a layer.

    Args:
        groups: The slices of each layer in the flat vector, by the name of the layer.
        depth: The parts of a name, between its points, that count; ``None`` for all.
    """
    merged: dict[str, list[slice]] = {}
    for name, slices in groups.items():
        parts = name.split(".")[:depth]
        merged.setdefault(".".join(parts) or "model", []).extend(slices)
    return {name: _joined(slices) for name, slices in merged.items()}


def _joined(slices: Sequence[slice]) -> list[slice]:
    """Join neighboring slices, each of which takes a pass of its own."""
    joined: list[slice] = []
    for part in slices:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return joined


class Drift(Diagnostic):
    """Measures how far the clients' models are from the global one.

    After ``diagnostics/drift/`` it logs ``mean`` and ``max`` over the clients and, for each layer, ``share/NAME``, its
    share in the squared distances, and ``distance/NAME``, the mean over the clients.

    Args:
        every_n_rounds: It measures after every n-th round.
        reference: The global model: ``"broadcast"``, which the clients started from, or the ``"new"`` one.
        depth: The parts of a module's name that make a layer: with 1, ``encoder.block.3`` belongs to ``encoder``. By
            default each module that has parameters of its own is a layer.
    """

    def __init__(
        self, every_n_rounds: int = 1, *, reference: Reference = "broadcast", depth: int | None = None
    ) -> None:
        super().__init__(every_n_rounds)
        self.reference = arguments.choice("reference", reference, Reference)
        self.depth = arguments.optional(arguments.integer, "depth", depth, minimum=1)

    def check(self, federation: Federation) -> None:
        """Refuse a federation that keeps only the sum of the updates."""
        check_single_updates(type(self).__name__, federation)

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the distances of all clients in all layers."""
        layers = merged_layers(aggregated.server.layout.groups(), self.depth)
        vectors = aggregated.cohort.vectors
        if self.reference == "new":
            distances = vectors.distances(aggregated.server.parameters(), layers)
        else:
            distances = vectors.displacements.norms(layers)
        lengths = distances.square().sum(0).sqrt()
        aggregated.log("drift/mean", float(lengths.mean()))
        aggregated.log("drift/max", float(lengths.max()))
        shares = layer_shares(distances).tolist()
        means = distances.mean(1).tolist()
        for name, share, mean in zip(layers, shares, means, strict=True):
            aggregated.log(f"drift/share/{name}", share)
            aggregated.log(f"drift/distance/{name}", mean)
