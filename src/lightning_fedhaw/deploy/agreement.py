"""What server and sites have to agree in, compared before the first round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedhaw.federation.buffer_names import policies_by_name
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.options import FederationOptions, patterns_of, repr_settings
from lightning_fedhaw.rule import find_rule
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.local_names import local_names

COMMON_OPTIONS = ("local_epochs", "local_steps", "client_lr_scale", "optimizer_state", "channels_last")
"""Arguments of the trainer that decide how clients train."""

_MODEL = "Make both models by the same code."
_TRAINER = "Make both trainers with the same arguments."


def terms_of(module: nn.Module, callbacks: Sequence[object], options: FederationOptions) -> dict[str, Any]:
    """Return what the other side has to agree in, as plain values.

    Args:
        module: The module, before any training.
        callbacks: The trainer's callbacks.
        options: The arguments of the federation.
    """
    local = local_names(options.local_parameters, module)
    layout = ParameterLayout.of(module, patterns_of(options.buffers), local)
    policies = policies_by_name(options.buffers, module, layout)
    buffers = layout.tracked_buffers(module)
    fixed = {**layout.frozen_tensors(module), **layout.local_tensors(module)}
    for name, policy in policies.items():
        if policy == "keep":
            fixed[name] = buffers[name]
    parameters = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        parameters[name] = f"{list(shape)}"
    for name, policy in policies.items():
        parameters[name] = f"{list(buffers[name].shape)} ({policy})"
    return {
        "parameters": parameters,
        "local": sorted(local),
        "fixed": _digest(fixed),
        "rule": type(find_rule(callbacks)).key,
        "objectives": [repr_settings(objective) for objective in find_objectives(callbacks)],
        "options": {name: _text(getattr(options, name)) for name in COMMON_OPTIONS},
    }


def disagreement(server: Mapping[str, Any], site: Mapping[str, Any]) -> str | None:
    """Say in which way a site differs from the server; ``None`` if they agree.

    Returns:
        What follows the site's name in a sentence, with a remedy.
    """
    if set(server["local"]) != set(site["local"]):
        return (
            f"splits the parameters in another way: its local ones are {site['local']}, and the server's"
            f" {server['local']}. {_TRAINER}"
        )
    for name in [*server["parameters"], *site["parameters"]]:
        there = site["parameters"].get(name, "missing")
        here = server["parameters"].get(name, "missing")
        if there != here:
            return f"has another model: its `{name}` is {there}, and the server's is {here}. {_MODEL}"
    if server["fixed"] != site["fixed"]:
        return (
            "has other values in tensors that are not sent (frozen ones, local parameters, buffers that are kept)."
            f" {_MODEL} Seed what they draw, or load the same weights."
        )
    for name in ("rule", "objectives"):
        if server[name] != site[name]:
            return f"has {site[name]} as its {name}, and the server {server[name]}. {_TRAINER}"
    for name, value in server["options"].items():
        there = site["options"].get(name)
        if there != value:
            return f"has `{name}`={there}, and the server {value}. {_TRAINER}"
    return None


def _digest(named: Mapping[str, Tensor]) -> str:
    """Hash named tensors to hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(named):
        content = named[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {list(named[name].shape)} {named[name].dtype}".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _text(value: object) -> str:
    """Return an argument as a text that is the same in every process; functions by their names."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
