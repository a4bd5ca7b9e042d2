"""The names of the parameters that stay with the clients, as the argument ``local_parameters`` selects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_fedhaw.user_functions import called
from lightning_fedhaw.vectors.layout import trainable

NAMES_SHOWN = 20
"""The number of parameter names that an error lists at most."""


def local_names(choice: str | Sequence[str] | Callable[[str], bool] | None, module: nn.Module) -> list[str]:
    """Return the names of a module's trainable parameters that stay with the clients.

    Args:
        choice: The argument ``local_parameters``.
        module: The module.

    Raises:
        ValueError: If a pattern matches no trainable parameter, if none is selected, or if all are.

    Example:
        >>> local_names("1.*", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        ['1.weight', '1.bias']
    """
    if choice is None:
        return []
    names = list(trainable(module))
    local: list[str] = []
    if callable(choice):
        for name in names:
            if called("local_parameters", choice, name):
                local.append(name)
    else:
        patterns = [choice] if isinstance(choice, str) else choice
        for pattern in patterns:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(
                    f"`local_parameters` has the pattern {pattern!r}, which matches no trainable parameter of"
                    f" {type(module).__name__}. {_listed(names)} A pattern matches the whole name, so that 'head.*'"
                    " stands for all parameters of `self.head`."
                )
            local += matching
    if not local:
        raise ValueError(f"`local_parameters` selects no trainable parameter. {_listed(names)}")
    if set(local) == set(names):
        raise ValueError(
            f"`local_parameters` selects every trainable parameter of {type(module).__name__}, so clients would have"
            f" nothing to send. Leave some to be shared. {_listed(names)}"
        )
    return [name for name in names if name in local]


def _listed(names: Sequence[str]) -> str:
    """List parameter names in a sentence."""
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f", and {len(names) - NAMES_SHOWN} more"
    return f"Its trainable parameters are {shown}."
