"""Isolation of global random states: draws of a client's training do not affect the rest of the program."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def isolated_randomness(device: torch.device) -> Iterator[None]:
    """Save the global random states of torch (CPU and ``device``), NumPy and ``random``, and restore them at the end.

    Args:
        device: The device of the model.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    # Not all CUDA devices, which is the default of `fork_rng`: their states are not used, and saving them takes time.
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_randomness(seed: int, device: torch.device) -> None:
    """Seed the global random states from which a model may draw; only inside of :func:`isolated_randomness`.

    Args:
        seed: The seed, of up to 63 bits.
        device: The device of the model.
    """
    # Not `torch.manual_seed`, which would also seed devices whose states are not restored at the end.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    # NumPy's legacy generator takes 32 bits.
    np.random.seed(seed & 0xFFFFFFFF)


def foreign_random_states() -> tuple[object, ...]:
    """Return the states of NumPy's and Python's random numbers, in a form that can be compared."""
    _, keys, *positions = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), *positions


def torch_random_states(device: torch.device) -> Tensor:
    """Return the states of torch's random numbers as one tensor."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
