"""Upper variables: parameters of a module that only the server changes.

Shapes: U upper variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fedhaw import arguments
from lightning_fedhaw.vectors.layout import ParameterLayout


class UpperVariables:
    """The upper variables of a run, selected by names.

    Those of a submodule with the attribute ``is_client_placed`` belong to clients: each client reads and changes only
    the rows of its own samples, and nothing of them is sent.

    Args:
        names: Names of submodules or parameters, or patterns of them, such as ``"net.0.*"``.

    Attributes:
        layout: Where each of them lives in a vector ``[U]``, those that are shared first; known once they are frozen.
        shared: The layout of those that are sent.
        placed: The layout of those that stay with the clients.

    Raises:
        ValueError: If no name is given.
    """

    def __init__(self, names: str | Sequence[str]) -> None:
        allowed = "the name of a submodule or of a parameter, or a pattern such as 'net.0.*', or several"
        patterns = [names] if isinstance(names, str) else names
        if not isinstance(patterns, Sequence) or not patterns:
            raise arguments.invalid("upper", allowed, names)
        for pattern in patterns:
            if not isinstance(pattern, str) or not pattern:
                raise arguments.invalid("upper", allowed, names)
        self.patterns = tuple(patterns)
        self.layout = self.shared = self.placed = ParameterLayout.of_tensors({})
        self._parameters: dict[str, nn.Parameter] = {}
        self._placed_names: set[str] = set()

    def __repr__(self) -> str:
        if len(self.patterns) == 1:
            return repr(self.patterns[0])
        return repr(list(self.patterns))

    def are_in(self, module: pl.LightningModule) -> bool:
        """Return whether a module has parameters with all of the names."""
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        return all(any(_matches(name, pattern) for name in names) for pattern in self.patterns)

    def freeze(self, module: pl.LightningModule) -> None:
        """Freeze the upper variables, so that clients do not train them.

        Raises:
            ValueError: If a pattern matches no trainable parameter, or all parameters are matched.
        """
        self.release()
        trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        first_name = {parameter: name for name, parameter in trainable.items()}
        upper: dict[str, nn.Parameter] = {}
        for pattern in self.patterns:
            matching: dict[str, nn.Parameter] = {}
            # By all names of a parameter that several submodules share.
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if parameter in first_name and _matches(name, pattern):
                    matching[first_name[parameter]] = parameter
            if not matching:
                raise ValueError(_no_match(pattern, module, trainable))
            upper.update(matching)
        if len(upper) == len(trainable):
            raise ValueError(
                f"`upper`={self!r} names all {len(trainable)} trainable parameters, and none is left for clients to"
                " train. Leave some out, such as the head of the model."
            )
        self._placed_names = _client_placed(module) & upper.keys()
        # In the module's order, whatever the order of the patterns, those that are shared first.
        names = [name for name in trainable if name in upper]
        names.sort(key=lambda name: name in self._placed_names)
        self._parameters = {name: trainable[name] for name in names}
        self.update_layout()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)

    def update_layout(self) -> None:
        """Read shapes and dtypes again, which a trainer may have changed since the upper variables were frozen."""
        shared = {name: p for name, p in self._parameters.items() if name not in self._placed_names}
        placed = {name: p for name, p in self._parameters.items() if name in self._placed_names}
        self.layout = ParameterLayout.of_tensors(self._parameters)
        self.shared = ParameterLayout.of_tensors(shared)
        self.placed = ParameterLayout.of_tensors(placed)

    def release(self) -> None:
        """Make the upper variables trainable again."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._parameters = {}

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the shared part of a vector ``[U]`` and that of the clients, by ``"shared"`` and ``"placed"``.

        A part without variables is left out.
        """
        shared, placed = torch.split(vector, [self.shared.numel, self.placed.numel])
        parts: dict[str, Tensor] = {}
        if self.shared.numel:
            parts["shared"] = shared
        if self.placed.numel:
            parts["placed"] = placed
        return parts

    def read(self) -> Tensor:
        """Return the values of the upper variables in the module, ``[U]``."""
        return self.layout.read([parameter.detach() for parameter in self._parameters.values()])

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse an optimizer of upper variables, which would have two owners.

        Upper variables among others are allowed (``Adam(self.parameters())``): they have no gradient there, so no step
        changes them.

        Raises:
            ValueError: If all parameters of a group are upper variables.
        """
        upper = {id(parameter): name for name, parameter in self._parameters.items()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                names = [upper[id(parameter)] for parameter in group["params"] if id(parameter) in upper]
                if names and len(names) == len(group["params"]):
                    raise ValueError(
                        f"`configure_optimizers` makes an optimizer of the upper variable `{names[0]}`, which the rule"
                        " steps on the server by `upper_optimizer`. Leave it out of `configure_optimizers`."
                    )


def _client_placed(module: nn.Module) -> set[str]:
    """Return the names of the parameters of which each client has its own rows."""
    names: set[str] = set()
    for prefix, submodule in module.named_modules():
        if getattr(submodule, "is_client_placed", False):
            for name, _ in submodule.named_parameters():
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _no_match(pattern: str, module: nn.Module, trainable: dict[str, nn.Parameter]) -> str:
    """Say that a pattern matches nothing, and suggest the nearest name."""
    if any(_matches(name, pattern) for name, _ in module.named_parameters()):
        return f"`upper` names '{pattern}', whose parameters are frozen in the module. Set `requires_grad` for them."
    submodules = [name for name, _ in module.named_modules() if name]
    similar = get_close_matches(pattern, [*submodules, *trainable], 1)
    hint = f"; did you mean '{similar[0]}'?" if similar else "."
    return (
        f"`upper` names '{pattern}', and no trainable parameter has such a name{hint} There are {list(trainable)[:10]}."
    )
