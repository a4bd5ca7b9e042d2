"""Drawn dogs in the folder layout of Stanford Dogs, for demonstrations without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.io import savemat

from lightning_fedhaw.extending import stream

# Breed, coat, second color, ears, pattern.
BREEDS = (
    ("golden", (214, 168, 92), (240, 214, 160), "hanging", "plain"),
    ("midnight", (44, 42, 48), (150, 92, 48), "pricked", "saddle"),
    ("dalmatian", (240, 238, 232), (36, 34, 36), "hanging", "spots"),
    ("fox", (204, 96, 38), (246, 240, 230), "pricked", "saddle"),
    ("slate", (112, 122, 138), (206, 212, 220), "round", "plain"),
    ("cocoa", (98, 60, 36), (150, 104, 70), "hanging", "plain"),
    ("snow", (248, 246, 242), (226, 216, 206), "pricked", "plain"),
    ("brindle", (150, 112, 70), (58, 40, 28), "round", "stripes"),
    ("harlequin", (196, 200, 206), (40, 42, 48), "pricked", "spots"),
    ("ginger", (186, 104, 62), (246, 232, 210), "round", "saddle"),
    ("tiger", (222, 178, 112), (92, 56, 30), "hanging", "stripes"),
    ("panda", (242, 242, 242), (30, 30, 34), "round", "saddle"),
)
BACKGROUNDS = ((132, 170, 96), (168, 190, 132), (196, 182, 150), (150, 186, 212), (204, 204, 200), (120, 132, 112))


def write_demo_dogs(
    root: str | Path, classes: int = 12, train: int = 40, test: int = 15, size: int = 96, seed: int = 0
) -> Path:
    """Write images and lists as the official archives hold them; a folder that is complete is left as it is.

    Args:
        root: The folder.
        classes: Breeds, at most 12.
        train: Training images of each.
        test: Test images of each.
        size: Pixels of a side.
        seed: Seed of poses, backgrounds and shades.
    """
    if not 1 <= classes <= len(BREEDS):
        raise ValueError(f"`classes` must be from 1 to {len(BREEDS)}, got {classes}.")
    root = Path(root)
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, breed in enumerate(BREEDS[:classes]):
        folder = f"n{label:08d}-{breed[0]}"
        (root / "Images" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(train + test):
            name = f"{folder}/n{label:08d}_{i}.jpg"
            # Training images come first; the official labels begin with 1.
            split = "train" if i < train else "test"
            lists[split].append((name, label + 1))
            if not (root / "Images" / name).exists():
                draw_dog(label, size, stream(seed, "dog", label, i)).save(root / "Images" / name, quality=90)
    for split, entries in lists.items():
        files = np.empty((len(entries), 1), dtype=object)
        files[:, 0] = [name for name, _ in entries]
        labels = np.array([label for _, label in entries], dtype=np.uint8)[:, None]
        savemat(root / f"{split}_list.mat", {"file_list": files, "labels": labels})
    return root


def draw_dog(label: int, size: int, generator: torch.Generator) -> Image.Image:
    """Draw a dog of a breed, seen from the side, at four times its size, and scale it down for smooth edges.

    Args:
        label: The number of the breed.
        size: Pixels of a side.
        generator: Generator of pose, background and shades.
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
        red, green, blue = (min(255, round(channel * factor)) for channel in color)
        return red, green, blue

    _, coat, second, ears, pattern = BREEDS[label]
    light = between(0.85, 1.1)
    coat = shade(coat, light)
    second = shade(second, light)
    dark = shade(coat, 0.8)
    background = BACKGROUNDS[int(between(0, len(BACKGROUNDS)))]
    picture = Image.new("RGB", (4 * size, 4 * size), shade(background, between(0.9, 1.15)))
    pen = ImageDraw.Draw(picture)
    zoom = between(0.75, 1.05)
    right = between(-0.06, 0.06)
    down = between(-0.04, 0.08)

    def xy(*numbers: float) -> list[tuple[float, float]]:
        """Convert coordinates of the unit square, x and y in turn, to pixels."""
        points = []
        for x, y in zip(numbers[::2], numbers[1::2], strict=True):
            column = 4 * size * (0.5 + zoom * (x - 0.5) + right)
            row = 4 * size * (0.5 + zoom * (y - 0.5) + down)
            points.append((column, row))
        return points

    horizon = xy(0, between(0.7, 0.85))[0][1]
    pen.rectangle([(0, horizon), (4 * size, 4 * size)], fill=shade(background, between(0.65, 0.8)))
    thick = round(4 * size * 0.06 * zoom)
    pen.line(xy(0.2, 0.52, 0.1, between(0.25, 0.5)), fill=coat, width=thick)
    for foot, color in ((0.3, dark), (0.58, dark), (0.24, coat), (0.64, coat)):
        pen.rounded_rectangle(xy(foot, 0.6, foot + 0.085, 0.9), radius=thick / 2, fill=color)
    pen.ellipse(xy(0.17, 0.42, 0.75, 0.74), fill=coat)
    if pattern == "saddle":
        pen.chord(xy(0.2, 0.42, 0.72, 0.72), 180, 360, fill=second)
    elif pattern == "stripes":
        for x in (0.27, 0.36, 0.45, 0.54, 0.63):
            pen.line(xy(x + between(-0.02, 0.02), 0.46, x, 0.68), fill=second, width=thick // 2)
    elif pattern == "spots":
        for _ in range(11):
            x = between(0.24, 0.66)
            y = between(0.48, 0.67)
            r = between(0.015, 0.035)
            pen.ellipse(xy(x - r, y - r, x + r, y + r), fill=second)
    pen.polygon(xy(0.58, 0.5, 0.66, 0.32, 0.8, 0.4, 0.74, 0.6), fill=coat)
    pen.ellipse(xy(0.62, 0.18, 0.86, 0.42), fill=coat)
    pen.rounded_rectangle(xy(0.76, 0.28, 0.95, 0.4), radius=thick, fill=second if pattern != "spots" else coat)
    pen.ellipse(xy(0.91, 0.275, 0.96, 0.325), fill=(24, 22, 24))
    pen.ellipse(xy(0.765, 0.245, 0.8, 0.28), fill=(24, 22, 24))
    ear = second if pattern in ("saddle", "spots") else dark
    if ears == "pricked":
        pen.polygon(xy(0.64, 0.24, 0.65, 0.06, 0.75, 0.2), fill=ear)
    elif ears == "hanging":
        pen.ellipse(xy(0.61, 0.2, 0.71, 0.46), fill=ear)
    else:
        pen.ellipse(xy(0.61, 0.12, 0.74, 0.25), fill=ear)
    if between(0, 1) < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    noise = torch.randn(size, size, 3, generator=generator).mul_(6)
    return Image.fromarray((torch.as_tensor(np.array(picture)) + noise).clamp_(0, 255).byte().numpy())
