"""The line of the user's code at which something happens, and the arguments that a step reads."""

from __future__ import annotations

import dis
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torchmetrics

from lightning_fedhaw import streams
from lightning_fedhaw.clients.vectorized.errors import ASKS_FOR_CLIENT, NotVectorizableError

if TYPE_CHECKING:
    from _typeshed import TraceFunction

# `dis` stands for the standard library, whose folder usually contains that of installed packages.
_LIBRARIES = tuple(str(Path(m.__file__ or "").parent) for m in (torch, lightning, torchmetrics, streams, dis))


def is_users(file: str) -> bool:
    """Return whether a source file is the user's, and not a library's."""
    return not file.startswith((*_LIBRARIES, "<"))


def is_users_class(kind: type) -> bool:
    """Return whether a class is written in a source file of the user's."""
    return is_users(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<")


class LineFinder:
    """A context around a call that finds the line of the user's code after which something has changed.

    Only frames under that call are considered: everything else that this thread runs, such as the functions of a tracer
    or a debugger, is not the user's step. Other threads have their own trace functions.

    Args:
        changed: Returns whether it has changed.

    Attributes:
        line: File and line; ``None`` if nothing has changed.
    """

    def __init__(self, changed: Callable[[], bool]) -> None:
        self.changed = changed
        self.line: str | None = None
        self._previous_line: str | None = None
        self._caller: FrameType | None = None
        self._outer_tracer: TraceFunction | None = None

    def __enter__(self) -> None:
        self._caller = sys._getframe(1)
        self._outer_tracer = sys.gettrace()
        sys.settrace(self._enter_frame)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._outer_tracer)
        self._caller = None

    def _enter_frame(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        """Trace the lines of the user's functions only."""
        if is_users(frame.f_code.co_filename):
            return self._trace_line
        return None

    def _trace_line(self, frame: FrameType, event: str, argument: object) -> TraceFunction:
        """Check, before a line is executed, whether the line before it has changed something."""
        if self.line is not None:
            return self._trace_line
        if self._previous_line is not None and self.changed():
            self.line = self._previous_line
        current: FrameType | None = frame
        if event == "return":
            # The calling line is continued next; it may be several callers up, with a library's between.
            current = self._users_caller(frame)
        if current is not None:
            self._previous_line = f"{current.f_code.co_filename}:{current.f_lineno}"
        return self._trace_line

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
    """Keep effects of the garbage collector from being taken for side effects of the step.

    Its callbacks are not called, and present garbage is not finalized.

    Args:
        runs: Whether garbage that is made inside the context is collected.
    """
    was_enabled = gc.isenabled()
    if runs and was_enabled:
        # What is unfrozen joins the oldest generation, whose collections depend on how much the younger ones have
        # passed on: recent garbage would pile up there from round to round, unseen.
        gc.collect(1)
    callbacks = list(gc.callbacks)
    # Where the program has frozen objects itself, unfreezing would release those, too.
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
    """Return whether ``training_step`` ever reads its second argument; true where that cannot be decided."""
    function = inspect.unwrap(getattr(step, "__func__", step))
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    takes_any = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if takes_any or "locals" in code.co_names:
        return True
    # After the batch, and after `self`.
    position = 2 if inspect.ismethod(step) else 1
    if code.co_argcount <= position:
        return False
    index = code.co_varnames[position]
    # A function inside the step may read it.
    if index in code.co_cellvars:
        return True
    for instruction in dis.get_instructions(code):
        if "LOAD" not in instruction.opname:
            continue
        names = instruction.argval
        if not isinstance(names, tuple):
            names = (names,)
        # From Python 3.13 on, one instruction may load two names.
        if index in names:
            return True
    return False


def explained(error: BaseException) -> str:
    """Describe an error in one line, as a sentence without its subject, with the line of the user's code behind it."""
    return _described(error) + _line_of(error)


def _described(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    if "data-dependent control flow" in str(error) or ".item()" in str(error):
        return (
            "needs the value of a tensor in Python (`if`, `.item()`, `float()`), and many clients at once have many;"
            " `torch.where` and `self.log(name, tensor)` do without"
        )
    if isinstance(error, NotVectorizableError):
        return first_line
    if "ManyClients" in first_line:
        # An index of a tensor that is none, which torch does not ask what it is.
        return ASKS_FOR_CLIENT
    if not first_line:
        return f"raises {type(error).__name__}"
    return f"raises {type(error).__name__}: {first_line[:200]}"


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
