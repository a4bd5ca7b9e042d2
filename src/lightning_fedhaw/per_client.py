"""Arguments that take one value for all clients, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning_fedhaw import arguments

Checked = TypeVar("Checked")


def one_or_per_client(check: Callable[..., Checked], name: str, value: Any, **limits: Any) -> Any:
    """Check a value for all clients, or one for each: a list or a mapping from clients to values.

    Args:
        check: The check for one value.
        name: The argument.
        value: Its value.
        limits: Keyword arguments of the check.

    Returns:
        The checked value; a tuple, or a dictionary, if there is one for each client.

    Example:
        >>> one_or_per_client(arguments.passes, "local_epochs", [1, 0.5])
        (1, 0.5)
    """
    if isinstance(value, Mapping):
        by_client: dict[int, Checked] = {}
        for client, client_value in value.items():
            number_of_client = arguments.plain_number(client)
            if not isinstance(number_of_client, int):
                raise arguments.invalid(name, "a mapping from client numbers to values", value)
            hint = f"That is the value of client {client}."
            by_client[number_of_client] = check(name, client_value, hint=hint, **limits)
        return by_client
    # A set has no order, so it does not say which value is whose.
    is_scalar = isinstance(value, (str, bytes, set, frozenset)) or not hasattr(value, "__iter__")
    if is_scalar or (hasattr(value, "ndim") and value.ndim == 0):
        return check(name, value, **limits)
    values = arguments.plain_list(value)
    if not values:
        return check(name, values, **limits)  # which refuses it
    checked = []
    for client, client_value in enumerate(values):
        hint = f"That is the value of client {client}."
        checked.append(check(name, client_value, hint=hint, **limits))
    return tuple(checked)


def check_clients(name: str, value: object, num_clients: int) -> None:
    """Refuse what :func:`one_or_per_client` returned if it does not have one value for each client.

    Args:
        name: The argument.
        value: Its value.
        num_clients: N.

    Raises:
        ValueError: If clients are missing, or there are values for clients that do not exist.
    """
    if isinstance(value, tuple) and len(value) != num_clients:
        raise ValueError(f"`{name}` must be one value, or one for each of the {num_clients} clients, got {len(value)}.")
    if isinstance(value, Mapping) and set(value) != set(range(num_clients)):
        raise ValueError(
            f"`{name}` must have a value for each of the clients 0 to {num_clients - 1}, got values for"
            f" {len(value)} clients, {sorted(value)[:10]}."
        )
