"""Large blocks of host memory, which are reused instead of being returned to the kernel; and errors of lacking memory.

Blocks above 32 MB are mapped by malloc every time, and the first touch of a new one takes several times as long as the
arithmetic on it. A block of :func:`empty` is reused once no tensor shares it any more. No more memory is held than was
in use at one time, and :func:`release` returns what is spare.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""The device of tensors that no computation on the model's device needs at the moment."""

LARGE = 1 << 25
"""The size in bytes from which a block is reused."""

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    # Libraries that allocate memory without PyTorch's allocator: cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT.
    "_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
    "CUFFT_ALLOC_FAILED",
    # PyTorch's allocator, where it cannot even query how much is free.
    "NVML_SUCCESS == ",
    # cuBLAS, where there is no memory for its handle. An index out of bounds can look like this, too; then the next
    # operation fails with that error's own message.
    "CUBLAS_STATUS_NOT_INITIALIZED",
)

_spare: list[Tensor] = []
_keeping = False


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor on any device; large blocks of host memory are reused."""
    global _keeping
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    # The smallest one that is large enough, unless it is more than twice as large as needed.
    fitting = [number for number, block in enumerate(_spare) if size <= block.numel() <= 2 * size]
    if fitting:
        block = _spare.pop(min(fitting, key=lambda number: _spare[number].numel()))
    else:
        release()
        block = torch.empty(size, dtype=torch.uint8)
    _keeping = True
    # The tensor and all its views share the lease; when the last of them is gone, so is the lease.
    lease = block[:size].numpy()
    weakref.finalize(lease, _keep, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


def release() -> None:
    """Return unused blocks to the kernel, and those that become unused before the next call of :func:`empty`."""
    global _keeping
    _keeping = False
    _spare.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _keep(block: Tensor) -> None:
    """Keep a block for reuse, unless blocks were released since it was given out."""
    if _keeping:
        _spare.append(block)
