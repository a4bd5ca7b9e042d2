"""Sweep files of Weights & Biases, run on this machine without an account."""

from lightning_fedhaw.sweeping.study import sweep

__all__ = ["sweep"]
