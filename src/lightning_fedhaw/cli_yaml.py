"""Limits for YAML files: a few lines of anchors may be as large as the memory, and deep values take hours to parse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import yaml
from jsonargparse import get_loader, set_loader

MOST_VALUES = 1_000_000
"""Values of a configuration, each anchor counted wherever it is repeated."""

MOST_LEVELS = 100
"""Values within values. For several hundred of them jsonargparse, which numbers every key, would take minutes."""


def limit_yaml() -> None:
    """Make jsonargparse refuse YAML that would expand to more than a million values, or to more than 100 levels."""
    loader = get_loader("yaml")
    if not isinstance(loader, _LimitedLoader):
        set_loader("yaml", _LimitedLoader(loader), exceptions=(yaml.YAMLError,))


class _LimitedLoader:
    """A loader of YAML that counts the values before it makes them.

    Args:
        loader: The loader of jsonargparse.
    """

    def __init__(self, loader: Callable[[str], object]) -> None:
        self.loader = loader

    def __call__(self, text: str) -> object:
        """Load a text.

        Raises:
            yaml.YAMLError: If it expands to too many values or levels, contains itself, or is no YAML.
        """
        has_aliases = "&" in text and "*" in text
        try:
            # Without an alias, the values and the levels are no more than the characters.
            if has_aliases or len(text) > MOST_LEVELS:
                _measure(yaml.compose(text, Loader=yaml.SafeLoader), {})
            return self.loader(text)
        except RecursionError as error:
            raise yaml.YAMLError("it is nested too deeply") from error
        except ValueError as error:
            # Such as a number with more digits than Python reads.
            raise yaml.YAMLError(f"it holds a value that cannot be read ({error})") from error


class _Size(NamedTuple):
    """The size of a node: its values, each as often as it is repeated, and the levels of values within values."""

    values: int
    levels: int


_ENDLESS = _Size(MOST_VALUES, 0)
"""The size of a node that is being measured: what contains itself has no end."""


def _measure(node: yaml.Node | None, known: dict[int, _Size]) -> _Size:
    """Measure a node.

    Args:
        node: The node.
        known: The sizes of the nodes that were visited; changed in place.

    Raises:
        yaml.YAMLError: If it is too large or too deep, or contains itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return _Size(1, 0)
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _ENDLESS
    values = 1
    levels = 0
    for child in node.value:
        # A child of a mapping is a pair of a key and a value.
        members = child if isinstance(node, yaml.MappingNode) else [child]
        for member in members:
            size = _measure(member, known)
            values += size.values
            levels = max(levels, size.levels)
    levels += 1
    if values > MOST_VALUES:
        raise yaml.YAMLError(
            f"its anchors repeat each other to more than {MOST_VALUES:,} values. Write out what is meant"
        )
    if levels > MOST_LEVELS:
        raise yaml.YAMLError(f"it is nested too deeply: it has more than {MOST_LEVELS} values within each other")
    known[id(node)] = _Size(values, levels)
    return known[id(node)]
