"""The second half of restoring a model in double precision, which Lightning rounds to single precision."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


@torch.no_grad()
def restore_exactly(trainer: pl.Trainer) -> None:
    """Give a model in float64 the digits of its checkpoint that were rounded away.

    Lightning loads the checkpoint into the module as the user made it, in float32, and converts the module to float64
    afterwards.

    Args:
        trainer: The trainer, while it restores its loops.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector._loaded_checkpoint
    saved: dict[str, Tensor] = checkpoint.get("state_dict", {})
    module = trainer.lightning_module
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        value = saved.get(name)
        if tensor.dtype != torch.float64 or value is None or value.dtype != torch.float64:
            continue
        rounded = value.float().to(tensor)
        # Other numbers are not the checkpoint's: a hook has written them since.
        if torch.allclose(tensor, rounded, rtol=0, atol=0, equal_nan=True):
            tensor.copy_(value)
