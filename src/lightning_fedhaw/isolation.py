"""Isolation: draws of a client's training, and calls of a module with other tensors, do not affect the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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


@contextmanager
def substituted_tensors(module: nn.Module, substitutes: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace some of a module's parameters and buffers inside the context.

    Tied tensors stay tied. Unlike after ``torch.func.functional_call``, a submodule that is registered under several
    names has its own tensors back at the end.

    Args:
        module: The module.
        substitutes: The tensors to use instead, by the names of ``named_parameters`` and ``named_buffers``.
    """
    originals = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    substitute_of = {id(originals[name]): tensor for name, tensor in substitutes.items()}
    # `Any`, because torch types these dictionaries by what they hold at most: parameters, and buffers.
    replaced: list[tuple[Any, str, Tensor]] = []
    try:
        for submodule in module.modules():
            for holder in (submodule._parameters, submodule._buffers):
                for name, tensor in holder.items():
                    if tensor is not None and id(tensor) in substitute_of:
                        replaced.append((holder, name, tensor))
        # Each dictionary occurs once here, whatever the number of names of its submodule.
        for holder, name, tensor in replaced:
            holder[name] = substitute_of[id(tensor)]
        yield
    finally:
        for holder, name, tensor in replaced:
            holder[name] = tensor


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own mode."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use kernels that have a second derivative, and products in full precision."""
    matmul = torch.backends.cuda.matmul
    was_allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        # Fused attention and cuDNN's recurrent layers have first derivatives only.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = was_allowed
