"""The settings of a federation in words and as plain values: for the start-up block, the run summary and loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from lightning.pytorch import Callback
from torch.optim import Optimizer

from lightning_fedhaw import argument_names
from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions, repr_settings
from lightning_fedhaw.rule import Rule

_PLAIN = (bool, int, float, str)


def optimizers_in_words(optimizers: Sequence[Optimizer]) -> str:
    """Return the names of the clients' optimizers with their learning rates."""
    words = []
    for optimizer in optimizers:
        rates: dict[str, None] = {}
        for group in optimizer.param_groups:
            # A schedule keeps the first rate there.
            rate = group.get("initial_lr", group.get("lr"))
            if rate is not None:
                rates[f"{float(rate):g}"] = None
        text = type(optimizer).__name__
        if rates:
            text += f" at learning rate {', '.join(rates)}"
        words.append(text)
    return "; ".join(words)


def training_in_words(rule: Rule, options: FederationOptions, optimizers: Sequence[Optimizer]) -> str:
    """Return how clients train in a round."""
    if not rule.clients_train:
        return "clients answer with gradients, and their optimizers take no steps"
    return f"{_local_work_in_words(options)}, {optimizers_in_words(optimizers)}"


def _local_work_in_words(options: FederationOptions) -> str:
    if options.local_steps is not None:
        return _amount(options.local_steps, "local step")
    if options.local_epochs is not None:
        return _amount(options.local_epochs, "local epoch")
    return "one local epoch"


def _amount(number: object, unit: str) -> str:
    if not isinstance(number, (int, float)):
        return f"{unit}s by client"
    if number == 1:
        return f"one {unit}"
    return f"{number:g} {unit}s"


def described_callbacks(callbacks: Iterable[Callback], kind: type[Channel] | type[ClientObjective]) -> list[str]:
    """Return the channels or the objectives among callbacks, with their settings."""
    return [repr_settings(callback) for callback in callbacks if isinstance(callback, kind)]


def brief(owner: object) -> str:
    """Return the class name of an object with those of its settings that are not the defaults."""
    defaults = []
    for parameter in argument_names.constructor_parameters(type(owner)):
        value = vars(owner).get(parameter.name)
        # Identity and type first: comparing arrays gives an array.
        if value is parameter.default or (isinstance(value, _PLAIN) and value == parameter.default):
            defaults.append(parameter.name)
    return repr_settings(owner, *defaults)


def plain_settings(rule: Rule, options: FederationOptions, callbacks: Iterable[Callback]) -> dict[str, object]:
    """Return the settings of a run as plain values, for the configuration that a logger keeps.

    The names are those of the command line, which the parameters of a sweep have too.

    Args:
        rule: The aggregation rule.
        options: The federation's arguments in force.
        callbacks: The trainer's callbacks.
    """
    settings: dict[str, object] = {"rule": type(rule).__name__}
    for name in argument_names.constructor_names(type(rule)):
        value = vars(rule).get(name)
        if value is not None and name not in FederationOptions.__dataclass_fields__:
            settings[f"rule.{name}"] = _plain(value)
    callbacks = list(callbacks)
    for name, kind in (("channel", Channel), ("objective", ClientObjective)):
        described = described_callbacks(callbacks, kind)
        if described:
            settings[name] = described[0] if len(described) == 1 else described
    for option in fields(options):
        value = getattr(options, option.name)
        if value is not None:
            settings[f"federation.{option.name}"] = _plain(value)
    settings["federation.seed"] = options.resolved_seed
    return settings


def _plain(value: object) -> object:
    """Return a value that loggers take: text where it is an object."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, type):
        return value.__name__
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if type(value).__module__.startswith("lightning_fedhaw."):
        return repr_settings(value)
    return str(getattr(value, "__name__", value))
