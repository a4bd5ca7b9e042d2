"""Checks of what a federation is given by rules and client objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.origins import count_shared
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.rule import LocalLRScale, Rule, RuleOutput
from lightning_fedhaw.vectors.layout import ParameterLayout


def check_objectives(objectives: Sequence[ClientObjective], host: Host) -> None:
    """Refuse client objectives where there is no loss to which they could be added."""
    if objectives and not host.module.automatic_optimization:
        names = ", ".join(type(objective).__name__ for objective in objectives)
        raise ValueError(
            f"Client objectives ({names}) are added to the loss that `training_step` returns, and with"
            " `automatic_optimization=False` it returns none. Add the term in `training_step`, or use automatic"
            " optimization."
        )


def check_probing(rule: Rule, host: Host) -> None:
    """Refuse a rule with a probe that cannot learn from it, or where there is no loss to probe."""
    if type(rule).learn_from is Rule.learn_from:
        raise TypeError(
            f"`{type(rule).__name__}` sets `probe` and has no method `learn_from`, which receives the answers."
            " Implement `learn_from(probe, state, server)`, or leave `probe` out."
        )
    if not host.module.automatic_optimization:
        raise ValueError(
            f"`{type(rule).__name__}` probes the loss that `training_step` returns, and with"
            " `automatic_optimization=False` it returns none. Use automatic optimization, or another rule."
        )


def check_inquiring(rule: Rule, host: Host, buffers: Buffers) -> None:
    """Refuse a rule that asks clients for derivatives where there is no loss to derive, or one that cannot be right."""
    if not host.module.automatic_optimization:
        raise ValueError(
            f"`{type(rule).__name__}` asks clients for derivatives of the loss that `training_step` returns, and with"
            " `automatic_optimization=False` it returns none. Use automatic optimization, or another rule."
        )
    if host.scaler is not None:
        raise ValueError(
            f"`{type(rule).__name__}` asks clients for second derivatives, which underflow with a loss scale. Use"
            ' `precision="bf16-mixed"` or "32-true".'
        )
    moving = [name for name in buffers.kinds.statistics if buffers.policy_of.get(name) in ("average", "local")]
    if moving and not rule.clients_train:
        raise ValueError(
            f"In the rounds of `{type(rule).__name__}` clients answer with gradients and do not train, so the running"
            f" statistics of normalization layers (`{min(moving)}`) would stay as they are, and validation reads them."
            ' Set `buffers="recalibrate"`, or `buffers="keep"` for those of a pretrained model.'
        )


def check_held_out(rule: Rule, data: ClientData) -> None:
    """Refuse clients without held-out samples, and held-out samples that are training samples."""
    name = type(rule).__name__
    remedy = (
        "Hold some out by `client_val_fraction=0.2`, give `FederatedDataModule(val=[...])` one data set for each"
        " client, or leave small clients out by `min_client_samples=`."
    )
    held_out: Sequence[Tensor] = data.held_out_indices
    if data.evaluation is not None:
        held_out = data.evaluation.train_indices
    without = [client for client, samples in enumerate(held_out) if not len(samples)]
    if without:
        raise ValueError(
            f"`{name}` computes the upper loss on held-out samples of every client, and {len(without)} of"
            f" {data.num_clients} clients have none (client {without[0]}). {remedy}"
        )
    if data.evaluation is None:
        return
    for client, samples in enumerate(held_out):
        shared = count_shared(data.dataset, data.train_indices[client], data.evaluation.dataset, samples)
        if shared:
            raise ValueError(
                f"`{name}` needs held-out samples that no lower loss is computed on, and {shared} of client {client}"
                f" are among its training samples. {remedy}"
            )


def check_step(step: Any, rule: str, clients: int) -> None:
    """Refuse an output of a rule that is of another type, or not for this cohort."""
    if not isinstance(step, RuleOutput):
        raise TypeError(
            f"`{rule}.step` must return a `RuleOutput(parameters, state, weights)`, got {type(step).__name__}."
        )
    if not isinstance(step.state, Mapping):
        raise TypeError(
            f"`{rule}.step` must return the rule's state as a dictionary, got {type(step.state).__name__}. A rule"
            " without state returns the one that it was given."
        )
    if step.weights.shape != (clients,):
        raise ValueError(
            f"`{rule}.step` must return one weight per client of the cohort, [{clients}], got"
            f" {list(step.weights.shape)}."
        )


def local_lr_scale(rule: Rule, layout: ParameterLayout, objectives: Sequence[ClientObjective]) -> LocalLRScale | None:
    """Return the rule's scale of the clients' learning rates in the next round; ``None`` without one.

    Raises:
        ValueError: If it changes them and a client objective divides by them.
    """
    lr_scale = rule.local_lr_scale(rule.state, layout)
    if lr_scale is not None and any(objective.needs_learning_rates for objective in objectives):
        raise ValueError(
            f"`{type(rule).__name__}` changes the clients' learning rates within a round, and a client objective"
            ' divides by them. Use a rule that leaves them alone, or for SCAFFOLD `option="I"`.'
        )
    return lr_scale
