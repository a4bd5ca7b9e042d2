"""A batched step as compiled graphs, one for each shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fedhaw.clients.vectorized.batched import BatchedStep, Gradients, StepInputs
from lightning_fedhaw.clients.vectorized.recorder import PendingValue

MAX_SHAPES = 64
"""Shapes that are compiled at most; others run as they are."""

TOLERANCE = 1e-3
"""Relative difference between compiled and eager gradients that is attributed to rounding."""

SMALLEST_BUCKET = 16
"""Rows that a graph is made for at least, where the chunk has as many."""


class CompiledStep:
    """Compute a batched step through graphs that are traced once for each number of rows and batch size.

    A graph contains the Python numbers that were there when it was traced. So every graph's first call is compared with
    the step itself, and in every round the first call through a graph of an earlier one; where they differ, or where
    nothing can be compiled, the step runs as it is.
    """

    def __init__(self) -> None:
        self.is_off = False
        self._graphs: dict[Any, _Graph] = {}
        self._to_check: set[Any] = set()
        self._num_new = 0
        self._seconds = 0.0

    def begin(self, step: BatchedStep) -> None:
        """Begin a round, which has a step of its own."""
        self.step = step
        self._to_check = set(self._graphs)

    def padding(self, rows: int, at_most: int) -> int:
        """Return how many rows to add, so that there are few numbers of rows: 16, 64, ..., and all."""
        if self.is_off:
            return 0
        bucket = SMALLEST_BUCKET
        while bucket < rows:
            bucket *= 4
        return min(bucket, at_most) - rows

    def gradients(self, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Compute what :meth:`BatchedStep.gradients` computes."""
        shape = tuple(tensor.shape for tensor in inputs.batch)
        is_new = shape not in self._graphs
        if self.is_off or (is_new and len(self._graphs) >= MAX_SHAPES):
            return self.step.gradients(trained, inputs)
        try:
            if is_new:
                self._trace(shape, trained, inputs)
            compiled = self._graphs[shape](inputs)
        except Exception as error:
            # Tracing and compiling raise whatever the step's operations make them raise. The step itself is fine.
            first = str(error).strip().partition("\n")[0]
            self.step.recorder.drop_pending()
            self._give_up(f"nothing could be compiled here ({type(error).__name__}: {first[:200]})")
            return self.step.gradients(trained, inputs)
        if not is_new and shape not in self._to_check:
            self.step.recorder.pend(self._graphs[shape].pending)
            return compiled
        if shape in self._to_check:
            self._to_check = set()
        return self._checked(compiled, trained, inputs)

    def _trace(self, shape: Any, trained: Sequence[int], inputs: StepInputs) -> None:
        """Make a graph for a shape, and compile it by a first call."""
        begin = time.perf_counter()
        if not self._num_new:
            rank_zero_info(
                "Compiling the clients' step, once for each number of rows and batch size; it may take minutes."
            )
        graph = _Graph(self.step, trained, inputs)
        graph(inputs)
        self._graphs[shape] = graph
        self._seconds += time.perf_counter() - begin
        self._num_new += 1

    def _checked(self, compiled: Gradients, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Compare compiled gradients with those of the step itself, and return the latter."""
        # The step may change buffers in place, and those of the inputs are compared after it.
        buffers = [buffer.clone() for buffer in inputs.buffers]
        eager = self.step.gradients(trained, inputs._replace(buffers=buffers))
        eager_buffers = eager.buffers(buffers)
        if not _agree(compiled, compiled.buffers(inputs.buffers), eager, eager_buffers):
            self._give_up("the compiled step gives other numbers than the step itself: it may use a Python number")
        return eager._replace(replaced=dict(enumerate(eager_buffers)))

    def _give_up(self, why: str) -> None:
        self.is_off = True
        rank_zero_warn(f"`compile_clients=True` has no effect from now on: {why}.")

    def report(self) -> None:
        """Say what was compiled in a round, in one line."""
        if self._num_new:
            rank_zero_info(f"Compiled the clients' step for {self._num_new} shapes in {self._seconds:.1f} s.")
        self._num_new = 0
        self._seconds = 0.0


class _Graph:
    """One traced and compiled call."""

    def __init__(self, step: BatchedStep, trained: Sequence[int], inputs: StepInputs) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        self.step = step
        self.trained = trained
        self.pending: list[PendingValue] = []
        flat, self._build = _flattened(inputs)
        graph = make_fx(self._run, tracing_mode="real")(*flat)
        self._compiled: Callable[..., Sequence[Tensor]] = torch.compile(graph, dynamic=False)

    def _run(self, *flat: Tensor) -> list[Tensor]:
        """Run the step while it is traced, and note in which order its outputs are."""
        inputs = self._build(flat)
        # A step may change both in place, and a graph must not.
        buffers = [tensor.clone() for tensor in inputs.buffers]
        batch = [tensor.clone() for tensor in inputs.batch]
        parameters = [tensor.detach().requires_grad_() for tensor in inputs.parameters]
        outputs = self.step.gradients(
            self.trained, inputs._replace(parameters=parameters, buffers=buffers, batch=batch)
        )
        self.has_loss = outputs.losses is not None
        self.is_used = [gradient is not None for gradient in outputs.gradients]
        self.num_buffers = len(buffers)
        self.pending = self.step.recorder.drop_pending()
        losses = [] if outputs.losses is None else [outputs.losses]
        used = [gradient for gradient in outputs.gradients if gradient is not None]
        return [*losses, *used, *outputs.buffers(buffers), *outputs.logged]

    def __call__(self, inputs: StepInputs) -> Gradients:
        flat, _ = _flattened(inputs)
        remaining = iter(self._compiled(*(tensor.detach() for tensor in flat)))
        losses = next(remaining) if self.has_loss else None
        gradients = [next(remaining) if is_used else None for is_used in self.is_used]
        buffers = list(islice(remaining, self.num_buffers))
        return Gradients(losses, gradients, dict(enumerate(buffers)), list(remaining))


def _flattened(inputs: StepInputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], StepInputs]]:
    """Return the tensors of a call's inputs as one list, and a function that builds such inputs from such a list."""
    # Counts and names alone: the function lives as long as the graph, and the tensors must not.
    num_parameters = len(inputs.parameters)
    num_buffers = len(inputs.buffers)
    num_data = len(inputs.batch)
    batch_index = inputs.batch_index
    start_names = None if inputs.starts is None else list(inputs.starts)
    state_names = [list(state) for state in inputs.states]

    flat = [*inputs.parameters, *inputs.buffers, *inputs.batch]
    if inputs.starts is not None:
        flat += inputs.starts.values()
    for state in inputs.states:
        flat += state.values()

    def build(tensors: Sequence[Tensor]) -> StepInputs:
        remaining = iter(tensors)
        return StepInputs(
            parameters=list(islice(remaining, num_parameters)),
            buffers=list(islice(remaining, num_buffers)),
            batch=list(islice(remaining, num_data)),
            batch_index=batch_index,
            starts=None if start_names is None else _named(remaining, start_names),
            states=[_named(remaining, names) for names in state_names],
        )

    return flat, build


def _named(tensors: Iterator[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: next(tensors) for name in names}


def _agree(
    compiled: Gradients, compiled_buffers: Sequence[Tensor], eager: Gradients, eager_buffers: Sequence[Tensor]
) -> bool:
    """Whether two computations gave the same but for rounding."""
    if len(compiled.logged) != len(eager.logged):
        return False
    left = (*compiled.gradients, *compiled.logged, compiled.losses, *compiled_buffers)
    right = (*eager.gradients, *eager.logged, eager.losses, *eager_buffers)
    return all(map(_is_close, left, right))


def _is_close(compiled: Tensor | None, eager: Tensor | None) -> bool:
    if compiled is None or eager is None:
        return compiled is eager
    # Half precision rounds so much more coarsely.
    tolerance = TOLERANCE if compiled.dtype.itemsize >= 4 else 50 * TOLERANCE
    largest = 0.0
    if eager.numel():
        largest = float(eager.double().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(compiled.double(), eager.double(), rtol=tolerance, atol=tolerance * largest, equal_nan=True)
