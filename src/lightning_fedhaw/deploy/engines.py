"""Imports of engines, which are optional, and were tried in some versions only."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

TRIED = {"flwr": "1.42", "nvflare": "2.9"}
"""The version of each engine with which its adapter was tried; later ones may have renamed what it uses."""


def engine_module(name: str) -> ModuleType:
    """Import a module of an engine.

    Args:
        name: The dotted name, which begins with the engine's.

    Raises:
        ImportError: If the engine is not installed, or in a version with which the adapter was not tried.
    """
    engine = name.partition(".")[0]
    remedy = f'Install it by `pip install "{engine}=={TRIED[engine]}.*"`.'
    try:
        installed = version(engine)
    except PackageNotFoundError as error:
        raise ImportError(f"`{engine}` is not installed. {remedy}") from error
    if not f"{installed}.".startswith(f"{TRIED[engine]}."):
        raise ImportError(
            f"`{engine}` {installed} is installed, and the adapter was tried with {TRIED[engine]}. {remedy}"
        )
    return import_module(name)
