"""Advice for runs that have run out of memory."""

from __future__ import annotations

import torch

from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.memory import HOST


def memory_advice(
    device: torch.device, data: ClientData, rule: Rule, options: FederationOptions, *, is_summed: bool
) -> str:
    """Name the settings that need less memory and are not in use yet.

    Args:
        device: The device of the model.
        data: The clients' data.
        rule: The aggregation rule.
        options: The federation's arguments.
        is_summed: Whether a channel acts on the sum of the cohort, so that no rows are kept.
    """
    advice = ["give the clients a smaller `batch_size`"]
    if device != HOST:
        if data.device == device:
            advice.append('keep the training data in host memory by `data_device="cpu"`')
        is_summable = rule.unnormalized_weight is not None and options.storage != "device"
        if not is_summable and not is_summed and options.storage != "host":
            advice.append('keep the clients\' vectors in host memory by `storage="host"`')
        if rule.keeps_cohort and getattr(rule.base_rule, "memory", None) == "device":
            name = type(rule.base_rule).__name__
            advice.append(f'keep those of the last round there by `{name}(memory="host")`')
    return f"Memory has run out. To need less: {'; '.join(advice)}."
