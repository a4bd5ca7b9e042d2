"""Draws the picture of docs/rules.md, for light and dark pages: ``python docs/images/rules.py``, some minutes.

Finished runs are kept in ``outputs/rules`` and not repeated.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from compare_rules import main  # noqa: E402
from pictures import save_for_pages  # noqa: E402

from lightning_fedhaw.plotting import draw_curves  # noqa: E402

if __name__ == "__main__":
    results = main(["--output", str(ROOT / "outputs" / "rules")])
    histories = results.histories(results.groups[0])
    runs = {name: history[0] for name, history in histories.items()}
    save_for_pages(partial(draw_curves, runs), ROOT / "docs" / "images" / "rules.png")
