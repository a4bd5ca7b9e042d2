"""A limit for YAML files: anchors within anchors make a few lines as large as the memory."""

from __future__ import annotations

from collections.abc import Callable

import yaml
from jsonargparse import get_loader, set_loader

MOST_VALUES = 1_000_000
"""Values of a configuration, each anchor counted wherever it is repeated."""


def limit_yaml() -> None:
    """Make jsonargparse refuse YAML that would expand to more than a million values."""
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
            yaml.YAMLError: If it expands to too many values, contains itself, or is no YAML.
        """
        try:
            # Without an alias, the values are no more than the characters.
            if "&" in text and "*" in text:
                _count(yaml.compose(text, Loader=yaml.SafeLoader), {})
            return self.loader(text)
        except RecursionError as error:
            raise yaml.YAMLError("it is nested too deeply") from error


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the values below a node, each as often as it is repeated.

    Args:
        node: The node.
        known: The counts of the nodes that were visited; changed in place.

    Raises:
        yaml.YAMLError: If there are too many, or the node contains itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        return known[id(node)]
    # What contains itself has no end.
    known[id(node)] = MOST_VALUES
    count = 1
    for child in node.value:
        # A child of a mapping is a pair of a key and a value.
        members = child if isinstance(node, yaml.MappingNode) else [child]
        for member in members:
            count += _count(member, known)
    if count > MOST_VALUES:
        raise yaml.YAMLError(
            f"its anchors repeat each other to more than {MOST_VALUES:,} values. Write out what is meant"
        )
    known[id(node)] = count
    return count
