"""Pictures of the documentation, each for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lightning_fedhaw.plotting import theme


def save_for_pages(draw: Callable[[], Figure], path: Path, dpi: int = 100) -> None:
    """Save a picture as ``NAME.png`` and ``NAME_dark.png``, in few colors, which makes small files.

    The site shows the one that fits its pages.

    Args:
        draw: Draws the picture in the present theme.
        path: The file of the picture for light pages.
        dpi: Pixels per inch.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for colors, suffix in (("light", ""), ("dark", "_dark")):
        picture = path.with_name(f"{path.stem}{suffix}.png")
        with theme(colors):
            draw().savefig(picture, dpi=dpi)
        Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
        print(f"picture: {picture}")
