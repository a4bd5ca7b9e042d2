"""What a deployment does not carry, refused by name before the first round."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import nn

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.federation.buffer_names import policies_by_name
from lightning_fedhaw.options import FederationOptions, patterns_of
from lightning_fedhaw.rule import Rule, find_rule
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.local_names import local_names


def refuse(trainer: pl.Trainer, callbacks: Sequence[object], module: nn.Module, options: FederationOptions) -> None:
    """Refuse what would differ from the simulator.

    Args:
        trainer: The server's trainer.
        callbacks: Its callbacks.
        module: The module.
        options: The arguments of the federation.

    Raises:
        ValueError: Naming what is not supported, and what to do.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"The server of a deployment is one process, and the trainer has {trainer.world_size}. Set `devices=1,"
            " num_nodes=1`."
        )
    for callback in callbacks:
        if isinstance(callback, Channel):
            raise ValueError(
                f"`{type(callback).__name__}` simulates a channel, and a deployment has real ones. Leave it out; for"
                " differential privacy or compression use those of the engine."
            )
    _refuse_rule(find_rule(callbacks))
    _refuse_buffers(find_rule(callbacks), module, options)


def _refuse_rule(rule: Rule) -> None:
    """Refuse a rule that asks clients for more than their updates."""
    reason = None
    if rule.probe is not None:
        reason = "asks a second cohort for loss and gradient (`probe`)"
    elif type(rule).inquiry is not Rule.inquiry:
        reason = "asks clients for further derivatives (`inquiry`)"
    elif rule.needs_rate_tangents:
        reason = "carries derivatives through the clients' local steps"
    if reason is not None:
        raise ValueError(
            f"`{type(rule).__name__}` {reason}, which is not supported in a deployment. Use a rule that learns from the"
            " clients' updates or from the server's data."
        )


def _refuse_buffers(rule: Rule, module: nn.Module, options: FederationOptions) -> None:
    """Refuse policies of buffers for which the server would need the clients' data, or buffers that are not sent."""
    local = local_names(options.local_parameters, module)
    layout = ParameterLayout.of(module, patterns_of(options.buffers), local)
    for name, policy in policies_by_name(options.buffers, module, layout).items():
        if policy == "recalibrate":
            raise ValueError(
                f'`buffers="recalibrate"` (of `{name}`) runs the new global model on the clients\' data, which is not'
                ' supported in a deployment. Use `buffers="average"`, "local" or "keep".'
            )
        if policy != "average" and rule.base_rule.reads_buffers:
            raise ValueError(
                f"`{type(rule).__name__}` computes with the clients' buffers, and `{name}` ({policy!r}) is"
                ' not sent. Use `buffers="average"`, or another rule.'
            )
