"""Methods compared on the same federations, over seeds and settings: ``fedhaw compare`` as a function."""

from lightning_fedhaw.comparing.cells import Cell
from lightning_fedhaw.comparing.study import Comparison, compare

__all__ = ["Cell", "Comparison", "compare"]
