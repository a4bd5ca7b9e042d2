"""The options that all commands have that draw."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lightning_fedhaw.figures.base import FORMATS, THEMES


class _AddFormat(argparse.Action):
    """Collects formats; the default holds where none is given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a format, in the place of the default if it is the first one."""
        formats = getattr(namespace, self.dest)
        if formats is self.default:
            formats = ()
        setattr(namespace, self.dest, (*formats, values))


def add_picture_options(parser: argparse.ArgumentParser, formats: Sequence[str] = ("png",)) -> None:
    """Add ``--format`` and ``--theme``, whose values are called ``formats`` and ``theme``.

    Args:
        parser: The parser of the command.
        formats: The formats of the pictures by default.
    """
    parser.add_argument(
        "--format",
        action=_AddFormat,
        choices=FORMATS,
        default=tuple(formats),
        dest="formats",
        help=f"format of the pictures, default {' and '.join(formats)}; give it again for several, such as"
        " `--format pdf --format svg`",
    )
    parser.add_argument("--theme", choices=THEMES, default="light", help="for light or for dark pages; default light")
