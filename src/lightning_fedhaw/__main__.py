"""The command ``fedhaw``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from lightning_fedhaw import __version__

DESCRIPTION = "Any LightningModule as a federation, from flags and YAML files."


def main(argv: list[str] | None = None) -> int:
    """Run ``fedhaw fit|validate|test|predict`` (:class:`~lightning_fedhaw.cli.FederatedCLI`), ``plot`` or ``compare``.

    Modules in the working directory can be named in class paths, as with ``python -m``.

    Args:
        argv: The arguments after the command. Default: ``sys.argv[1:]``.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:]
    if argv is not None:
        arguments = list(argv)
    # Imported where they are needed: pictures need matplotlib and no jsonargparse, other commands the reverse.
    if arguments[:1] == ["plot"]:
        import_module("lightning_fedhaw.report.plot_command").main(arguments[1:])
        return 0
    status: int
    if arguments[:1] == ["compare"]:
        status = import_module("lightning_fedhaw.comparing.command").main(arguments[1:])
        return status
    if arguments[:1] == ["sweep"]:
        status = import_module("lightning_fedhaw.sweeping.command").main(arguments[1:])
        return status
    try:
        from lightning_fedhaw.cli import FedhawCommand
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("jsonargparse", "docstring_parser"):
            raise
        print('`fedhaw` needs jsonargparse: pip install "jsonargparse[signatures]"', file=sys.stderr)
        return 1
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    FedhawCommand(args=argv, parser_kwargs={"prog": "fedhaw", "description": DESCRIPTION, "version": __version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
