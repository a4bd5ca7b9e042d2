"""Programs as a shell starts them, but forked from this process, which has imported torch and Lightning already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any


class Forked:
    """A function in a process of its own, in this working directory.

    Args:
        function: What the process does.
        env: Variables of its environment in addition to those of this process.
        log: The file for what it prints.
    """

    def __init__(self, function: Callable[[], Any], env: Mapping[str, str] | None = None, log: str = "log") -> None:
        self._log = Path(log)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, env or {}))
        with warnings.catch_warnings():
            # Threads of libraries may run here; the copy uses none of them.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self._process.start()

    def _run(self, function: Callable[[], Any], env: Mapping[str, str]) -> None:
        # Nothing of the test session: its group of processes, its output, its warnings, its end.
        os.setsid()
        log = self._log.open("w", buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = log
        sys.stderr = log
        warnings.resetwarnings()
        atexit._clear()
        os.environ.update(env)
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        try:
            function()
        finally:
            atexit._run_exitfuncs()

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """Return its exit status and what it has printed; kill it, and what it has started, if it takes too long."""
        self._process.join(seconds)
        if self._process.is_alive():
            assert self._process.pid is not None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode, self._log.read_text()


def run_script(path: str, *arguments: str, **kwargs: Any) -> tuple[int, str]:
    """Return the exit status and the output of ``python path arguments``."""
    return Forked(partial(_run_as_main, runpy.run_path, path, path, arguments), **kwargs).wait()


def run_module(name: str, *arguments: str, **kwargs: Any) -> tuple[int, str]:
    """Return the exit status and the output of ``python -m name arguments``."""
    run = partial(runpy.run_module, alter_sys=True)
    return Forked(partial(_run_as_main, run, name, name, arguments), **kwargs).wait()


def _run_as_main(run: Callable[..., Any], target: str, name: str, arguments: Sequence[str]) -> None:
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(Path(name).parent))
    run(target, run_name="__main__")
