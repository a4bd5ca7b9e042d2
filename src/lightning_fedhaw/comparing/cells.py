"""A cell: the data, the model and the fixed settings of one federation of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.options import FederationOptions

_FIXED = ("seed", "client_eval", "run_summary")
"""The seed is a dimension of its own; the evaluation of each client and the run summary are no part of a comparison."""

OPTIONS = tuple(option.name for option in fields(FederationOptions) if option.name not in _FIXED)
"""The federation's options that a cell may set and a comparison may vary."""

# Options that replace each other: a change of one drops the other one.
_EXCLUSIVE = (
    ("alpha", "partitioner"),
    ("local_epochs", "local_steps"),
    ("clients_per_round", "sampler"),
    ("client_val_fraction", "client_val"),
)


@dataclass(frozen=True)
class Cell(argument_names.NamedArguments):
    """The data, the model and the fixed settings of one federation.

    Attributes:
        name: Its name in tables.
        model: Creates a new module: a function or a class. Settings ``model.NAME`` are its keyword arguments.
        data: Creates the data module. Settings ``data.NAME`` are its keyword arguments.
        options: Options of the federation (:class:`~lightning_fedhaw.FederationOptions`), which settings replace.
        metric: The metric that is compared. Default: an accuracy among those that are logged, else a loss.

    Raises:
        TypeError: If ``model`` or ``data`` creates nothing, or an option does not exist.
    """

    name: str
    model: Callable[..., pl.LightningModule]
    data: Callable[..., pl.LightningDataModule]
    options: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None

    def __post_init__(self) -> None:
        arguments.text("name", self.name)
        for name in ("model", "data"):
            value = getattr(self, name)
            # A module can be called too, but every run needs a new one.
            if isinstance(value, (nn.Module, pl.LightningDataModule)):
                raise TypeError(
                    f"`{name}` must create a new one for every run, got {type(value).__name__}(...). Give the class or"
                    f" a function; arguments are settings `{name}.NAME`."
                )
            arguments.function(name, value, f"{name}()")
        arguments.optional(arguments.text, "metric", self.metric)
        argument_names.check_names("Cell", self.options, OPTIONS)


def merged_options(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with some replaced; an option that contradicts a change is dropped."""
    merged = dict(base)
    for group in _EXCLUSIVE:
        if any(name in changes for name in group):
            for name in group:
                merged.pop(name, None)
    merged.update(changes)
    return merged
