"""A batched step as compiled graphs, one for each shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fedhaw.clients.vectorized.batched import BatchedStep, Gradients, StepInputs
from lightning_fedhaw.clients.vectorized.recorder import PendingValue
from lightning_fedhaw.clients.vectorized.repeated import RepeatedStep

MAX_SHAPES = 64
"""The number of shapes that are compiled at most; other shapes run without a graph."""

TOLERANCE = 1e-3
"""Relative difference between compiled and eager gradients that is attributed to rounding."""

SMALLEST_BUCKET = 16
"""The number of rows that a graph is made for at least, if the chunk has as many."""

SAMPLED = 4
"""While speeds are compared, every so many calls one is made without a graph."""

ENOUGH_SAMPLES = 16
"""The number of these calls after which the speeds are compared."""

Shapes = tuple[torch.Size, ...]
"""The shapes of a batch's tensors, which tell one graph from another."""


class CompiledStep:
    """A batched step that runs as graphs, which are traced once for each number of rows and batch size.

    A graph contains the values that Python numbers had when it was traced. Therefore the first call of every graph is
    compared with the step itself, and so is, in every round, the first call of a graph from an earlier round. Where
    they differ, or where nothing can be compiled, the step runs without graphs. On the CPU the speed is compared, too:
    graphs that turn out slower than the step are no longer used.

    Attributes:
        is_off: Whether graphs are no longer used.
    """

    def __init__(self) -> None:
        self.is_off = False
        # While it is measured.
        self._speed: _Speed | None = _Speed()
        self._graphs: dict[Shapes, _Graph] = {}
        self._to_check: set[Shapes] = set()
        self._num_new = 0
        self._seconds = 0.0

    def begin(self, step: BatchedStep, plain: BatchedStep | RepeatedStep) -> None:
        """Begin a round.

        Args:
            step: The batched step of the round.
            plain: The step that would make the calls without graphs.
        """
        self.step = step
        self.plain = plain
        self._to_check = set(self._graphs)
        if step.host.device.type != "cpu":
            # A call returns before the device has made it.
            self._speed = None

    def padding(self, rows: int, at_most: int) -> int:
        """Return the number of rows to add to a call, so that graphs are needed for few numbers of rows only.

        These are 16, 64, 256 and so on, and the number of rows of the whole chunk.

        Args:
            rows: The rows of the call.
            at_most: The rows of the chunk.
        """
        if self.is_off:
            return 0
        bucket = SMALLEST_BUCKET
        while bucket < rows:
            bucket *= 4
        return min(bucket, at_most) - rows

    def gradients(self, trained: Sequence[int], inputs: StepInputs, rows: int) -> Gradients:
        """Compute losses and gradients.

        Args:
            trained: The numbers of the parameters to differentiate with respect to.
            inputs: The inputs of the call.
            rows: The number of rows without those that :meth:`padding` added; outputs may be of these only.
        """
        if self.is_off:
            return self.plain.gradients(trained, inputs)
        shape = tuple(tensor.shape for tensor in inputs.batch)
        if inputs.lengths is not None:
            shape += (inputs.lengths.shape,)
        is_new = shape not in self._graphs
        if is_new and len(self._graphs) >= MAX_SHAPES:
            return self.plain.gradients(trained, inputs)
        if self._speed is not None and not is_new and self._speed.takes_sample():
            with self._speed.of_plain_calls:
                return self.plain.gradients(trained, inputs.first(rows))
        try:
            if is_new:
                self._trace(shape, trained, inputs)
            measured: AbstractContextManager[None] = nullcontext()
            # The first calls of a round are compared with the step, and wait for the compiler.
            if self._speed is not None and not is_new:
                measured = self._speed.of_graphs
            with measured:
                compiled = self._graphs[shape](inputs)
        except Exception as error:
            # Tracing and compiling may raise anything, while the step itself has already run without graphs.
            first_line = str(error).strip().partition("\n")[0]
            self.step.recorder.drop_pending()
            self._give_up(f"nothing could be compiled here ({type(error).__name__}: {first_line[:200]})")
            return self.step.gradients(trained, inputs)
        if not is_new and shape not in self._to_check:
            self.step.recorder.pend(self._graphs[shape].pending)
            return compiled
        if shape in self._to_check:
            # One graph is enough: a Python number that has changed is in all of them.
            self._to_check = set()
        return self._checked(compiled, trained, inputs)

    def _trace(self, shape: Shapes, trained: Sequence[int], inputs: StepInputs) -> None:
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
        # The step may change buffers in place, and the buffers of the inputs are still to be compared.
        buffers = [buffer.clone() for buffer in inputs.buffers]
        eager = self.step.gradients(trained, inputs._replace(buffers=buffers))
        eager_buffers = eager.buffers(buffers)
        if not _agree(compiled, compiled.buffers(inputs.buffers), eager, eager_buffers):
            self._give_up("the compiled step gives other numbers than the step itself: it may use a Python number")
        return eager._replace(replaced=dict(enumerate(eager_buffers)))

    def _give_up(self, reason: str) -> None:
        self.is_off = True
        rank_zero_warn(f"`compile_clients=True` has no effect from now on: {reason}.")

    def report(self) -> None:
        """Log in one line how many shapes were compiled in a round."""
        if self._num_new:
            rank_zero_info(f"Compiled the clients' step for {self._num_new} shapes in {self._seconds:.1f} s.")
        self._num_new = 0
        self._seconds = 0.0
        self._compare_speed()

    def _compare_speed(self) -> None:
        """Give up if the graphs are slower, as soon as enough is measured."""
        speed = self._speed
        if speed is None or self.is_off or speed.num_samples < ENOUGH_SAMPLES:
            return
        self._speed = None
        if speed.of_graphs.mean > speed.of_plain_calls.mean:
            self._give_up(
                f"a call takes {1e3 * speed.of_graphs.mean:.2f} ms with a graph and"
                f" {1e3 * speed.of_plain_calls.mean:.2f} ms without"
            )


class _Stopwatch:
    """A context whose seconds are added up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._begin)

    @property
    def mean(self) -> float:
        """The mean, without the slowest tenth, in which another program was at work."""
        fastest = sorted(self.seconds)[: max(1, len(self.seconds) * 9 // 10)]
        return sum(fastest) / len(fastest)


class _Speed:
    """The speed of calls with graphs and without.

    Attributes:
        of_graphs: Measures calls with graphs.
        of_plain_calls: Measures the others.
    """

    def __init__(self) -> None:
        self.of_graphs = _Stopwatch()
        self.of_plain_calls = _Stopwatch()
        self._num_calls = 0

    @property
    def num_samples(self) -> int:
        """The number of calls of the rarer kind that were measured."""
        return min(len(self.of_graphs.seconds), len(self.of_plain_calls.seconds))

    def takes_sample(self) -> bool:
        """Return whether the next call is to be made without a graph."""
        self._num_calls += 1
        return self._num_calls % SAMPLED == 0


class _Graph:
    """One traced and compiled call.

    Args:
        step: The batched step.
        trained: The numbers of the parameters to differentiate with respect to.
        inputs: Inputs of the shapes that the graph is for.

    Attributes:
        pending: The logged values that a call gives, in their order.
    """

    def __init__(self, step: BatchedStep, trained: Sequence[int], inputs: StepInputs) -> None:
        # Imported only where something is compiled: it takes a while.
        from torch.fx.experimental.proxy_tensor import make_fx

        self.step = step
        self.trained = trained
        self.pending: list[PendingValue] = []
        flat, self._build = _flattened(inputs)
        graph = make_fx(self._run, tracing_mode="real")(*flat)
        self._compiled: Callable[..., Sequence[Tensor]] = torch.compile(graph, dynamic=False)

    def _run(self, *flat: Tensor) -> list[Tensor]:
        """Run the step while it is traced, and remember the order of its outputs."""
        inputs = self._build(flat)
        # Copies: a step may change both in place, and a graph must not change its inputs.
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
        flat_outputs = []
        for output in (outputs.losses, *outputs.gradients):
            if output is not None:
                flat_outputs.append(output)
        return [*flat_outputs, *outputs.buffers(buffers), *outputs.logged]

    def __call__(self, inputs: StepInputs) -> Gradients:
        flat, _ = _flattened(inputs)
        remaining = iter(self._compiled(*(tensor.detach() for tensor in flat)))
        losses = None
        if self.has_loss:
            losses = next(remaining)
        gradients: list[Tensor | None] = []
        for is_used in self.is_used:
            # A graph returns tensors only, so that unused parameters have no output.
            gradients.append(next(remaining) if is_used else None)
        buffers = list(islice(remaining, self.num_buffers))
        return Gradients(losses, gradients, dict(enumerate(buffers)), list(remaining))


def _flattened(inputs: StepInputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], StepInputs]]:
    """Return the tensors of a call's inputs as one list, and a function that builds such inputs from such a list."""
    # The function holds counts and names only: it lives as long as the graph, and the tensors must not.
    num_parameters = len(inputs.parameters)
    num_buffers = len(inputs.buffers)
    num_data = len(inputs.batch)
    batch_index = inputs.batch_index
    has_lengths = inputs.lengths is not None
    start_names: list[str] | None = None
    if inputs.starts is not None:
        start_names = list(inputs.starts)
    state_names = [list(state) for state in inputs.states]

    def build(tensors: Sequence[Tensor]) -> StepInputs:
        remaining = iter(tensors)
        parameters = list(islice(remaining, num_parameters))
        buffers = list(islice(remaining, num_buffers))
        batch = list(islice(remaining, num_data))
        lengths = None
        if has_lengths:
            lengths = next(remaining)
        starts = None
        if start_names is not None:
            starts = _named(remaining, start_names)
        states = [_named(remaining, names) for names in state_names]
        return StepInputs(parameters, buffers, batch, batch_index, starts, states, lengths)

    return inputs.tensors(), build


def _named(tensors: Iterator[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Take the next tensors, one for each name."""
    return {name: next(tensors) for name in names}


def _agree(
    compiled: Gradients, compiled_buffers: Sequence[Tensor], eager: Gradients, eager_buffers: Sequence[Tensor]
) -> bool:
    """Return whether two computations gave the same except for rounding."""
    if len(compiled.logged) != len(eager.logged):
        return False
    compiled_values = (*compiled.gradients, *compiled.logged, compiled.losses, *compiled_buffers)
    eager_values = (*eager.gradients, *eager.logged, eager.losses, *eager_buffers)
    return all(map(_is_close, compiled_values, eager_values))


def _is_close(compiled: Tensor | None, eager: Tensor | None) -> bool:
    if compiled is None or eager is None:
        return compiled is eager
    tolerance = TOLERANCE
    if compiled.dtype.itemsize < 4:
        # Half precision has so many bits less.
        tolerance *= 50
    largest = 0.0
    if eager.numel():
        largest = float(eager.double().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(compiled.double(), eager.double(), rtol=tolerance, atol=tolerance * largest, equal_nan=True)
