"""Memory: large blocks of the host's, used again instead of being given back to the kernel; and none left.

Blocks above 32 MB are mapped anew by malloc every time, and the first touch of a fresh one takes several times as long
as the arithmetic on it. A block that comes from here is used again once no tensor shares it any more; as much is held
as was once in use at the same time, until :func:`release`.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""Where tensors are kept that no computation on the model's device needs at the moment."""

LARGE = 1 << 25
"""Bytes from which a block is kept."""

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    # Libraries that ask for memory of their own behind PyTorch's allocator: cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT.
    "_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
    "CUFFT_ALLOC_FAILED",
    # What PyTorch's allocator says where it cannot even ask how much is free.
    "NVML_SUCCESS == ",
    # What cuBLAS says where its handle finds no room. An index out of bounds can look like this too; then whatever is
    # tried next fails with that error's own words.
    "CUBLAS_STATUS_NOT_INITIALIZED",
)

_spare: list[Tensor] = []
_keeping = False


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty`` on any device, which remembers large blocks of host memory."""
    global _keeping
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    fitting = [i for i, block in enumerate(_spare) if size <= block.numel() <= 2 * size]
    if fitting:
        block = _spare.pop(min(fitting, key=lambda i: _spare[i].numel()))
    else:
        release()
        block = torch.empty(size, dtype=torch.uint8)
    _keeping = True
    # The tensor and all its views share the lease; when the last of them is gone, so is the lease.
    lease = block[:size].numpy()
    weakref.finalize(lease, _keep, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


def release() -> None:
    """Give back to the kernel what nobody uses, and what comes free before the next block is asked for."""
    global _keeping
    _keeping = False
    _spare.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _keep(block: Tensor) -> None:
    if _keeping:
        _spare.append(block)
