"""The command ``fedhaw init``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FILES = ("project.py", "config.yaml", "sweep.yaml")
"""The files of a project, as they lie next to this one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fedhaw init``: write a commented project that runs.

    Args:
        argv: The arguments after the command; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="fedhaw init",
        description="Write a project to start from: a module, its data, a configuration and a sweep, with comments.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder, or one without these files")
    folder = parser.parse_args(list(sys.argv[1:] if argv is None else argv)).folder
    try:
        write_project(folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in FILES:
        print(f"written: {folder / name}")
    print(f"\ncd {folder}")
    print("fedhaw fit --config config.yaml     # one run")
    print("fedhaw sweep sweep.yaml             # a comparison")
    return 0


def write_project(folder: Path) -> None:
    """Write the files of a project.

    Args:
        folder: The folder, which is created if need be.

    Raises:
        ValueError: If the folder has a file of one of these names.
    """
    for name in FILES:
        if folder.joinpath(name).exists():
            raise ValueError(f"{str(folder / name)!r} is there already, and would be overwritten. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source = Path(__file__).with_name(name)
        folder.joinpath(name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
