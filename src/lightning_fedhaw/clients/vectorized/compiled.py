"""A batched step as compiled graphs, one for each shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fedhaw.clients.records import Pending
from lightning_fedhaw.clients.vectorized.batched import Arguments, BatchedStep, Gradients

MAX_SHAPES = 64
"""Shapes that are compiled at most; others run as they are."""

TOLERANCE = 1e-3
"""Relative difference between compiled and eager gradients that is taken for rounding."""


class CompiledStep:
    """Does what a batched step does, through graphs that are traced once for each number of rows and batch size.

    A graph has the Python numbers in it that were there when it was traced. So every graph's first call is held against
    the step itself, and in every round the first call through a graph of an earlier one; where they differ, or where
    nothing can be compiled, the step runs as it is.
    """

    def __init__(self) -> None:
        self.is_off = False
        self._graphs: dict[Any, _Graph] = {}
        self._seconds, self._new = 0.0, 0
        self._to_check: set[Any] = set()

    def begin(self, step: BatchedStep) -> None:
        """A round begins, with a step of its own."""
        self.step, self._to_check = step, set(self._graphs)

    def padding(self, rows: int, at_most: int) -> int:
        """Rows to add, so that there are few numbers of rows: 16, 64, ..., and all."""
        bucket = 16
        while bucket < rows:
            bucket *= 4
        return 0 if self.is_off else min(bucket, at_most) - rows

    def gradients(self, trained: Sequence[int], call: Arguments) -> Gradients:
        """As the batched step's."""
        shape = tuple(t.shape for t in call[2])
        if self.is_off or (shape not in self._graphs and len(self._graphs) >= MAX_SHAPES):
            return self.step.gradients(trained, call)
        must_check = shape in self._to_check
        try:
            if shape not in self._graphs:
                must_check = True
                begin = time.perf_counter()
                if not self._new:
                    rank_zero_info(
                        "Compiling the clients' step, once for each number of rows and batch size; it may take minutes."
                    )
                graph = _Graph(self.step, trained, call)
                graph(call)
                self._graphs[shape] = graph
                self._seconds += time.perf_counter() - begin
                self._new += 1
            found = self._graphs[shape](call)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            self.step.recorder.drop_pending()
            self._give_up(f"nothing could be compiled here ({type(error).__name__}: {first[:200]})")
            return self.step.gradients(trained, call)
        if not must_check:
            self.step.recorder.pend(self._graphs[shape].pending)
            return found
        if shape in self._to_check:
            self._to_check = set()
        buffers = [buffer.clone() for buffer in call[1]]
        eager = self.step.gradients(trained, (call[0], buffers, *call[2:]))
        if not _agree((found, found.buffers(call[1])), (eager, eager.buffers(buffers))):
            self._give_up("the compiled step gives other numbers than the step itself: it may use a Python number")
        return eager._replace(replaced=list(enumerate(eager.buffers(buffers))))

    def _give_up(self, why: str) -> None:
        self.is_off = True
        rank_zero_warn(f"`compile_clients=True` has no effect from now on: {why}.")

    def report(self) -> None:
        """Say what was compiled in a round, in one line."""
        if self._new:
            rank_zero_info(f"Compiled the clients' step for {self._new} shapes in {self._seconds:.1f} s.")
        self._seconds, self._new = 0.0, 0


class _Graph:
    """One traced and compiled call."""

    def __init__(self, step: BatchedStep, trained: Sequence[int], call: Arguments) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        self.step, self.trained = step, trained
        flat, self._build = _flattened(call)
        self.pending: list[Pending] = []
        graph = make_fx(self._run, tracing_mode="real")(*flat)
        self._compiled: Callable[..., Sequence[Tensor]] = torch.compile(graph, dynamic=False)

    def _run(self, *flat: Tensor) -> list[Tensor]:
        call = self._build(flat)
        parameters = [p.detach().requires_grad_() for p in call[0]]
        # Copies, because a step may change both in place.
        buffers, data = ([tensor.clone() for tensor in tensors] for tensors in call[1:3])
        found = self.step.gradients(self.trained, (parameters, buffers, data, *call[3:]))
        self.has_loss = found.losses is not None
        self.is_used = [gradient is not None for gradient in found.gradients]
        self.pending = self.step.recorder.drop_pending()
        losses = [] if found.losses is None else [found.losses]
        used = [gradient for gradient in found.gradients if gradient is not None]
        self.counts = (len(losses), len(used), len(buffers))
        return [*losses, *used, *found.buffers(buffers), *found.logged]

    def __call__(self, call: Arguments) -> Gradients:
        flat, _ = _flattened(call)
        given = list(self._compiled(*(tensor.detach() for tensor in flat)))
        losses, used, buffers = (
            given[sum(self.counts[:i]) : sum(self.counts[: i + 1])] for i in range(len(self.counts))
        )
        each = iter(used)
        gradients = [next(each) if is_used else None for is_used in self.is_used]
        logged = given[sum(self.counts) :]
        return Gradients(losses[0] if losses else None, gradients, list(enumerate(buffers)), logged)


def _flattened(call: Arguments) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Arguments]]:
    parameters, buffers, data, index, starts, states = call
    # Counts and names alone: what is built lives as long as the graph, and the tensors must not.
    counts = (len(parameters), len(buffers), len(data))
    has_starts = starts is not None
    names, keys = list(starts or ()), [list(state) for state in states]
    flat = [*parameters, *buffers, *data, *(starts or {}).values(), *(v for state in states for v in state.values())]

    def build(tensors: Sequence[Tensor]) -> Arguments:
        each = iter(tensors)
        lists = [[next(each) for _ in range(count)] for count in counts]
        own_starts = {name: next(each) for name in names} if has_starts else None
        return lists[0], lists[1], lists[2], index, own_starts, [{k: next(each) for k in own} for own in keys]

    return flat, build


def _agree(one: tuple[Gradients, list[Tensor]], other: tuple[Gradients, list[Tensor]]) -> bool:
    (a, own), (b, others) = one, other
    left, right = (*a.gradients, *a.logged, a.losses, *own), (*b.gradients, *b.logged, b.losses, *others)
    pairs = list(zip(left, right, strict=False))
    if len(a.logged) != len(b.logged) or any((x is None) != (y is None) for x, y in pairs):
        return False
    for x, y in pairs:
        if x is not None and y is not None:
            scale = TOLERANCE * float(y.double().nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
            loose = 1 if x.dtype.itemsize >= 4 else 50
            if not torch.allclose(x.double(), y.double(), rtol=TOLERANCE * loose, atol=scale * loose, equal_nan=True):
                return False
    return True
