"""The command ``fedhaw``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from lightning_fedhaw import __version__

DESCRIPTION = (
    "Any LightningModule as a federation, from flags and YAML files. Mistakes are reported in one sentence; with"
    " `--debug`, an error comes with its traceback."
)

# Commands with parsers of their own, and the modules that run them. Imported where they are needed: pictures need
# matplotlib and no jsonargparse, other commands the reverse.
_MODULES = {
    "plot": "lightning_fedhaw.report.plot_command",
    "compare": "lightning_fedhaw.comparing.command",
    "sweep": "lightning_fedhaw.sweeping.command",
    "init": "lightning_fedhaw.starter.command",
}

_DEBUG = "--debug"


def main(argv: list[str] | None = None) -> int:
    """Run ``fedhaw fit|validate|test|predict`` (:class:`~lightning_fedhaw.cli.FederatedCLI`), or another command.

    Modules in the working directory can be named in class paths, as with ``python -m``. With ``--debug`` anywhere, a
    mistake that would be reported in one sentence is raised with its traceback.

    Args:
        argv: The arguments after the command. Default: ``sys.argv[1:]``.

    Returns:
        The exit status.
    """
    # Of the process itself, so that the processes that it starts with the same arguments know none either.
    words = sys.argv if argv is None else list(argv)
    is_debugged = _DEBUG in words
    while _DEBUG in words:
        words.remove(_DEBUG)
    if argv is not None:
        argv = words
    try:
        return _run(argv, sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        # A parser ends the process while it handles the error.
        if is_debugged and end.code and end.__context__ is not None:
            raise end.__context__ from None
        raise


def _run(argv: list[str] | None, arguments: list[str]) -> int:
    """Run a command.

    Args:
        argv: The arguments if they are not those of the process.
        arguments: The arguments.
    """
    if arguments and arguments[0] in _MODULES:
        result = import_module(_MODULES[arguments[0]]).main(arguments[1:])
        # Drawing returns the paths of the pictures.
        return result if isinstance(result, int) else 0
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
