"""Local training in random states of its own: nothing a client draws reaches the program around it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_randomness(device: torch.device) -> Iterator[None]:
    """Save the global random states of torch (CPU and ``device``), NumPy and ``random``; restore them at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_randomness(seed: int, device: torch.device) -> None:
    """Seed the global random states that a model may draw from; only inside :func:`isolated_randomness`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
