"""Which line of the user's code did something, and what a step looks at."""

from __future__ import annotations

import dis
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
import torchmetrics

from lightning_fedhaw import streams
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError

# The standard library's folder too, which holds that of installed packages as a rule.
_LIBRARIES = tuple(str(Path(m.__file__ or "").parent) for m in (torch, lightning, torchmetrics, streams, dis))


def is_users(file: str) -> bool:
    """Whether a source file is the user's, and not a library's."""
    return not file.startswith((*_LIBRARIES, "<"))


def is_users_class(kind: type) -> bool:
    """Whether a class is written in a source file of the user's."""
    return is_users(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<")


class LineFinder:
    """Find the line of the user's code after which something has changed, entered around a call.

    Only frames under that call are looked at: whatever else this thread runs, such as a tracer's or a debugger's own
    functions, is not the user's step. Other threads have trace functions of their own.

    Args:
        changed: Whether it has.

    Attributes:
        found: File and line; ``None`` if there was none.
    """

    def __init__(self, changed: Callable[[], bool]) -> None:
        self.changed = changed
        self.found: str | None = None
        self._last: str | None = None
        self._caller: FrameType | None = None
        self._before: Any = None

    def __enter__(self) -> None:
        self._caller = sys._getframe(1)
        self._before = sys.gettrace()
        sys.settrace(self._enter_frame)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._caller = None

    def _enter_frame(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._see if is_users(frame.f_code.co_filename) else None

    def _see(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.found is None:
            if self._last is not None and self.changed():
                self.found = self._last
            # After a return, the rest of the line that called comes next, which may be in another function's caller.
            current = self._users_caller(frame) if event == "return" else frame
            if current is not None:
                self._last = f"{current.f_code.co_filename}:{current.f_lineno}"
        return self._see

    def _users_caller(self, frame: FrameType) -> FrameType | None:
        """Return the user's frame that called this one, if it is under the call that is watched."""
        caller = frame.f_back
        while caller is not None and caller is not self._caller:
            if is_users(caller.f_code.co_filename):
                return caller
            caller = caller.f_back
        return None


@contextmanager
def quiet_collector(runs: bool = False) -> Iterator[None]:
    """Keep what the garbage collector calls from looking like the step's own doing.

    Its callbacks are not called, and garbage that is there already is not finalized.

    Args:
        runs: Whether it goes on collecting what becomes garbage meanwhile.
    """
    was_enabled = gc.isenabled()
    callbacks = list(gc.callbacks)
    # Otherwise somebody else keeps objects there, and unfreezing would release them too.
    freezes = gc.get_freeze_count() == 0
    if not runs:
        gc.disable()
    gc.callbacks.clear()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        gc.callbacks[:0] = callbacks
        if was_enabled:
            gc.enable()


def reads_index(step: Callable[..., Any]) -> bool:
    """Whether ``training_step`` ever reads its second argument; true where that cannot be decided."""
    function = inspect.unwrap(getattr(step, "__func__", step))
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) or "locals" in code.co_names:
        return True
    arguments = code.co_varnames[: code.co_argcount]
    after_batch = arguments[2:] if inspect.ismethod(step) else arguments[1:]
    if not after_batch:
        return False
    index = after_batch[0]
    # A function inside the step may read it.
    if index in code.co_cellvars:
        return True
    for instruction in dis.get_instructions(code):
        if "LOAD" not in instruction.opname:
            continue
        # From Python 3.13 on, one instruction may load two names.
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if index in names:
            return True
    return False


def explained(error: BaseException) -> str:
    """Describe an error in one line, as a sentence without its subject, with the line of the user's code behind it."""
    return _described(error) + _line_of(error)


def _described(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    if "data-dependent control flow" in str(error) or ".item()" in str(error):
        return (
            "needs the value of a tensor in Python (`if`, `.item()`, `float()`), and many clients at once have many;"
            " `torch.where` and `self.log(name, tensor)` do without"
        )
    if isinstance(error, NotVectorizableError):
        return first
    if not first:
        return f"raises {type(error).__name__}"
    return f"raises {type(error).__name__}: {first[:200]}"


def _line_of(error: BaseException) -> str:
    """Return the last line of the user's code behind an error, in brackets."""
    line = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if is_users(file):
            line = f" ({file}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return line
