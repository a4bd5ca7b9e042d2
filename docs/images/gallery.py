"""Draws the pictures of docs/gallery.md: ``python docs/images/gallery.py``, about half a minute on one core."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
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
from lightning_fedhaw.plotting import RunHistory, draw_client_curves, draw_lines, draw_spread  # noqa: E402

ROUNDS = 24
SEEDS = (1,)
RULES = {
    "FedAvg": FedAvgCallback,
    "FedHAW": FedHAWCallback,
    "FedLAW": lambda: FedLAWCallback("both", server_epochs=60),
}


def save(figure: Figure, name: str) -> None:
    """Save a figure in few colors, which makes a small file."""
    path = ROOT / "docs" / "images" / f"gallery_{name}.png"
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


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
    save(draw_lines(scales, by_scale, None, "scale of the final model", "validation loss"), "scale")
    distances = torch.linspace(-2, 2, 21).tolist()
    along = {name: eigenvector_losses(loss, distances, steps=30) for name, loss in losses.items()}
    save(draw_lines(distances, along, None, "distance along the top eigenvector", "validation loss"), "eigenvector")


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    histories, models = runs()
    save(draw_coherence(histories), "coherence")
    save(draw_shrinking(histories), "shrinking")
    save(draw_curvature(histories), "curvature")
    save(draw_spread(histories, "val_acc"), "spread")
    save(draw_client_curves(histories["FedAvg"][0], "val_acc"), "client_curves")
    save(draw_parameters({name: group[0] for name, group in histories.items()}), "parameters")
    run = histories["FedLAW"][0]
    save(draw_cosines(run, round_idx=0), "cosines")
    save(draw_drift(run), "drift")
    save(draw_contributions(run), "contributions")
    save(draw_landscape(run), "landscape")
    draw_lines_through(models)


if __name__ == "__main__":
    main()
