"""Draws the pictures of docs/gallery.md, for light and dark pages: ``python docs/images/gallery.py``, a minute."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from pictures import save_for_pages  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from diagnostics import PROXY, VALIDATION, Digits, digits, digits_samples, fit, part  # noqa: E402
from lightning_fedhaw import FedAvgCallback, FedHAWCallback, FedLAWCallback  # noqa: E402
from lightning_fedhaw.diagnostics import (  # noqa: E402
    Coherence,
    Contributions,
    Curvature,
    Drift,
    Landscape,
    ParameterHistogram,
    Shrinking,
    draw_coherence,
    draw_contributions,
    draw_cosines,
    draw_curvature,
    draw_drift,
    draw_landscape,
    draw_parameters,
    draw_shrinking,
    eigenvector_losses,
    loss_of_module,
    scale_losses,
)
from lightning_fedhaw.plotting import (  # noqa: E402
    RunHistory,
    draw_bands,
    draw_client_curves,
    draw_clients,
    draw_labels,
    draw_lines,
    draw_spread,
    draw_weights,
)

ROUNDS = 24
SEEDS = (1,)
RULES = {
    "FedAvg": FedAvgCallback,
    "FedHAW": FedHAWCallback,
    "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
}


def save(draw: Callable[[], Figure], name: str) -> None:
    """Save a figure for light and for dark pages.

    Args:
        draw: Draws the figure in the present theme.
        name: The name of the file, without its suffix.
    """
    save_for_pages(draw, ROOT / "docs" / "images" / f"{name}.png")


def runs() -> tuple[dict[str, list[RunHistory]], dict[str, Digits]]:
    """Fit every rule with every seed, and return the histories and each rule's last model."""
    histories: dict[str, list[RunHistory]] = {}
    models = {}
    for name, make in RULES.items():
        for seed in SEEDS:
            observers = [
                Coherence(),
                Shrinking(),
                Drift(),
                ParameterHistogram(ROUNDS),
                Curvature(4, samples=VALIDATION, steps=20),
            ]
            if name == "FedLAW":
                observers += [Landscape(8, samples=200), Contributions(12, permutations=4, samples=200)]
            models[name] = Digits(seed)
            data = digits_samples(seed, 10, 0.3).data()
            run = fit(make(), data, seed, ROUNDS, 1, observers, models[name], client_eval_every_n_rounds=1)
            histories.setdefault(name, []).append(run)
    return histories, models


def draw_lines_through(models: dict[str, Digits]) -> None:
    """Draw the loss along the scale of each model, and along its top eigenvector."""
    pixels, labels = digits(SEEDS[-1])
    loader = DataLoader(part(pixels, labels, PROXY, PROXY + VALIDATION), batch_size=VALIDATION)
    losses = {name: loss_of_module(model, loader) for name, model in models.items()}
    scales = torch.linspace(0.5, 1.5, 21).tolist()
    by_scale = {name: scale_losses(loss, scales) for name, loss in losses.items()}
    save(partial(draw_lines, scales, by_scale, None, "scale of the final model", "validation loss"), "gallery_scale")
    distances = torch.linspace(-2, 2, 21).tolist()
    along = {name: eigenvector_losses(loss, distances, steps=30) for name, loss in losses.items()}
    label = "distance along the top eigenvector"
    save(partial(draw_lines, distances, along, None, label, "validation loss"), "gallery_eigenvector")


def draw_runs() -> None:
    """Draw what `fedhaw plot` draws: FedAvg and FedHAW with learned weights, over three seeds."""
    groups: dict[str, list[RunHistory]] = {}
    for name, make in (("FedAvg", FedAvgCallback), ("FedHAW", partial(FedHAWCallback, lr_lambda=0.3))):
        for seed in (1, 2, 3):
            data = digits_samples(seed, 10, 0.1).data()
            run = fit(make(), data, seed, 40, 1, [], Digits(seed), client_eval=True)
            groups.setdefault(name, []).append(run)
    first = groups["FedHAW"][0]
    save(partial(draw_bands, groups, ["val_acc"]), "bands")
    save(partial(draw_clients, groups, "val_acc"), "clients")
    save(partial(draw_labels, first), "labels")
    save(partial(draw_weights, first, title="weights that FedHAW learned"), "weights")


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    draw_runs()
    histories, models = runs()
    last = {name: group[0] for name, group in histories.items()}
    run = histories["FedLAW"][0]
    pictures = {
        "coherence": partial(draw_coherence, histories),
        "shrinking": partial(draw_shrinking, histories),
        "curvature": partial(draw_curvature, histories),
        "spread": partial(draw_spread, histories, "val_acc"),
        "client_curves": partial(draw_client_curves, histories["FedAvg"][0], "val_acc"),
        "parameters": partial(draw_parameters, last),
        "cosines": partial(draw_cosines, run, round_idx=0),
        "drift": partial(draw_drift, run),
        "contributions": partial(draw_contributions, run),
        "landscape": partial(draw_landscape, run),
    }
    for name, draw in pictures.items():
        save(draw, f"gallery_{name}")
    draw_lines_through(models)


if __name__ == "__main__":
    main()
