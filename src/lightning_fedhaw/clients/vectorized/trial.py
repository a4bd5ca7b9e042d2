"""A trial of a module's step, which finds out whether and how many clients can be trained in one computation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from lightning.pytorch.plugins import DoublePrecision, Precision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_fedhaw.clients.optimizer_states import states_of
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.clients.vectorized.calls import Sharing, worth_sharing
from lightning_fedhaw.clients.vectorized.comparison import first_difference, is_finite, number_of_bytes
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.guard import NoLogger, StepGuard
from lightning_fedhaw.clients.vectorized.optimizers import check_scalable, row_states
from lightning_fedhaw.clients.vectorized.pair import DifferenceError, Pair
from lightning_fedhaw.clients.vectorized.snapshot import Snapshot
from lightning_fedhaw.clients.vectorized.tracing import LineFinder, explained, quiet_collector, reads_index
from lightning_fedhaw.clients.vectorized.turns import many_clients
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import foreign_random_states, isolated_randomness, seed_randomness, torch_random_states
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.vectors.layout import ParameterLayout

FEW_SAMPLES = 8
"""The samples of a client that are enough for the comparison: float64 is slow on many devices."""

MAX_LENGTHS = 64
"""The number of lengths of shorter batches that are tried in a call with longer ones."""


@dataclass(frozen=True)
class Facts:
    """The facts about a step that the vectorized engine needs.

    Attributes:
        row_states: Names of the optimizer's states that have the parameter's shape.
        uses_index: Whether the step reads ``batch_idx``.
        draws_dropout: Whether it uses dropout.
        draws_other: Whether it draws other random numbers, which differ between the engines.
        is_compared: Whether its values could be compared with those of a client alone.
        bytes_per_client: The memory of one more client, in bytes.
        frozen: The number of frozen parameters that the step computes with.
        sharing: The shorter batches that may be part of a call with longer ones.
    """

    row_states: frozenset[str]
    uses_index: bool
    draws_dropout: bool
    draws_other: bool
    is_compared: bool
    bytes_per_client: int
    frozen: int
    sharing: Sharing

    @property
    def is_fixed(self) -> bool:
        """Whether all calls are the same operations: without random numbers, and whatever the batch index is."""
        return not (self.uses_index or self.draws_dropout or self.draws_other)


def probe(
    host: Host,
    layout: ParameterLayout,
    data: ClientData,
    plan: LocalPlan,
    objectives: Sequence[ClientObjective] = (),
    *,
    shares_calls: bool = False,
) -> Facts:
    """Try a module's step on two clients at once, and compare it with each client alone.

    The module and all that its step has changed are restored.

    Args:
        host: The trainer around the module.
        layout: Its trainable parameters.
        data: The clients' data.
        plan: The local work of a client in a round.
        objectives: The terms that clients add to their loss.
        shares_calls: Whether to find out which shorter batches may be part of a call with longer ones.

    Raises:
        NotVectorizableError: If the step has side effects or gives other values, with the reason and the line.
    """
    step = f"`{type(host.module).__name__}.training_step`"
    if host.obstacle is not None:
        raise NotVectorizableError(f"{step} {host.obstacle}")
    if layout.frozen_parameters:
        raise NotVectorizableError(f"{step} moves frozen parameters, such as `{layout.frozen_parameters[0]}`")
    if not data.is_sliced:
        raise NotVectorizableError(
            f"the data set {type(data.dataset).__name__} is not tensors in memory (a `TensorDataset` with the default"
            " `collate_fn` and a plain `DataLoader`)"
        )
    try:
        names = row_states(host.optimizers[0], states_of(host.optimizers[0]))
        check_scalable(host.optimizers[0], plan)
    except ValueError as error:
        raise NotVectorizableError(f"the optimizer {error}") from error
    uses_index = reads_index(host.module.training_step)
    snapshot = Snapshot(host.module, host.optimizers, layout)
    with isolated_randomness(host.device), quiet_collector(), host.logging_to(NoLogger()), many_clients(host):
        try:
            trial = _Trial(host, layout, data, plan, objectives, snapshot)
            return trial.facts(names, uses_index, data, shares_calls)
        except NotVectorizableError as error:
            raise NotVectorizableError(f"{step} {error}") from error
        finally:
            snapshot.restore()


class _Trial(Pair):
    """A trial of a step, by two clients with different models and data."""

    def facts(self, row_states: frozenset[str], uses_index: bool, data: ClientData, shares_calls: bool) -> Facts:
        """Try the step, and return what was found out.

        Args:
            row_states: Names of the optimizer's states that have the parameter's shape.
            uses_index: Whether the step reads ``batch_idx``.
            data: The clients' data.
            shares_calls: Whether to try shorter batches in calls with longer ones.

        Raises:
            NotVectorizableError: If the step cannot be batched.
        """
        guard = StepGuard()
        draws_other = False
        is_compared = True
        # A step that reads its number may do something else from the second batch on.
        num_batches = 2 if uses_index else 1
        for self.index in range(num_batches):
            for row in (0, 1):
                self._try_alone(row)
            draws_other |= self._try_together(guard)
            is_compared &= self._compare(draws_other)
        sharing = Sharing()
        if shares_calls and is_compared and not (uses_index or guard.calls or draws_other):
            sharing = self._sharing(data)
        return Facts(
            row_states=row_states,
            uses_index=uses_index,
            draws_dropout=guard.calls > 0,
            draws_other=draws_other,
            is_compared=is_compared,
            bytes_per_client=self._bytes(len(row_states)),
            frozen=sum(self.frozen.values()),
            sharing=sharing,
        )

    # ------------------------------------------------------------------ one client, and both at once

    def _try_alone(self, row: int) -> None:
        """Run the step for one client, and refuse side effects.

        Raises:
            NotVectorizableError: If the step fails, changes something that would pass from client to client, or draws
                random numbers that no batched call could give each client.
        """
        seed_randomness(self.seeds[row], self.host.device)
        state_before = foreign_random_states()
        with _errors_refuse():
            self._run_measured(row)
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change.description + self._line_that(change.has_happened))
        state_after = foreign_random_states()
        if state_after != state_before:
            line = self._line_that(lambda: foreign_random_states() != state_after)
            raise NotVectorizableError(f"draws from NumPy's or Python's random numbers, once for all clients{line}")

    def _run_measured(self, row: int) -> None:
        """Run the step for one client, and measure the memory of its activations."""
        try:
            self.alone(row, self._measured())
        except RuntimeError:
            # Steps that compute gradients themselves may not allow the measurement. Then activations are estimated, at
            # ten times the batch.
            seed_randomness(self.seeds[row], self.host.device)
            self.alone(row, nullcontext())
            self.activations = max(self.activations, 10 * sum(number_of_bytes(tensor[row]) for tensor in self.batch))

    def _try_together(self, guard: StepGuard) -> bool:
        """Run the step for both clients at once.

        Returns:
            Whether the step draws random numbers other than dropout's.

        Raises:
            NotVectorizableError: If the step fails, or changes something that would pass from client to client.
        """
        self.snapshot.restore()
        seed_randomness(self.seeds[0], self.host.device)
        state_before = torch_random_states(self.host.device)
        with _errors_refuse():
            self.together(guard)
        change = self.snapshot.changed()
        if change is not None:
            raise NotVectorizableError(change.description)
        return not torch.equal(state_before, torch_random_states(self.host.device))

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure the tensors saved for the backward pass, and count the frozen parameters that are computed with."""
        # By address, because several tensors may share their memory.
        saved_bytes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        def record_frozen(module: nn.Module, inputs: object) -> None:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    self.frozen[parameter] = parameter.numel()

        with (
            register_module_forward_pre_hook(record_frozen),
            torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        ):
            yield
        self.activations = sum(saved_bytes.values())

    # ------------------------------------------------------------------ the comparison

    def _compare(self, draws_other: bool) -> bool:
        """Compare both clients at once with each alone, with the same masks and the same other random numbers.

        The comparison is in float64, where rounding is many orders of magnitude below the error of a wrong computation,
        or else in float32. A few samples are enough, unless the step works with full batches only.

        Args:
            draws_other: Whether the step draws random numbers other than dropout's.

        Returns:
            False if no comparison is possible: because a batched call cannot give clients the same random numbers, or
            because a client alone has a loss or a gradient that is not finite.

        Raises:
            NotVectorizableError: If a value differs by more than rounding, or the step cannot be run in either
                precision.
        """
        for precision, dtype, size in (
            (DoublePrecision(), torch.float64, min(FEW_SAMPLES, self.batch_size)),
            (DoublePrecision(), torch.float64, self.batch_size),
            (Precision(), torch.float32, self.batch_size),
        ):
            self.snapshot.restore()
            try:
                with self.computing_in(precision, dtype, size):
                    alone = [self.alone_with_masks(row) for row in (0, 1)]
                    self.snapshot.restore()
                    seed_randomness(self.seeds[0], self.host.device)
                    together = self.together(StepGuard(), same_draws=True)
                    self.check_equal(together, alone, dtype)
            except DifferenceError as error:
                raise NotVectorizableError(f"{error}{self._step_line()}") from error
            except Exception as error:
                # The user's code may raise anything in a precision that is not its own, so the next one is tried.
                failure = error
                continue
            return all(map(is_finite, alone))
        if draws_other and "same randomness" in str(failure):
            return False
        raise NotVectorizableError(f"cannot be compared in float64 or float32: it {explained(failure)}") from failure

    def _sharing(self, data: ClientData) -> Sharing:
        """Try the lengths of the clients' last batches in calls with longer batches, whose further samples are ignored.

        A step qualifies if its loss and all that it logs are means over samples that do not influence each other. Every
        length is tried: a step may do something else with a batch of one sample.
        """
        size = self.batch_size
        remainders = torch.unique(data.num_examples % data.settings.batch_size).tolist()
        lengths = []
        for length in remainders:
            if 0 < length < size and worth_sharing(size, length, 1, self.layout.numel):
                lengths.append(length)
        if not lengths or data.settings.drop_last:
            return Sharing()
        lengths = lengths[-MAX_LENGTHS:]
        self.snapshot.restore()
        try:
            with self.computing_in(DoublePrecision(), torch.float64, size):
                for pair in _pairs([size, *lengths]):
                    if not self._is_mean(pair):
                        return Sharing()
        except Exception:
            # The user's code may raise anything with other batches than its own. Then no calls are shared.
            return Sharing()
        return Sharing(size, frozenset(lengths))

    def _is_mean(self, lengths: Sequence[int]) -> bool:
        """Return whether the values of two clients with longer batches are those of their first samples alone.

        Args:
            lengths: The number of samples of each.
        """
        alone = [self.alone(row, nullcontext(), length) for row, length in enumerate(lengths)]
        self.snapshot.restore()
        together = self.together(StepGuard(), lengths=lengths)
        for row in (0, 1):
            if not is_finite(alone[row]) or first_difference(together[row], alone[row], torch.float64) is not None:
                return False
        return True

    # ------------------------------------------------------------------ lines of code, and memory

    def _step_line(self) -> str:
        """Return the line where ``training_step`` begins, in brackets."""
        step = self.host.module.training_step
        if not hasattr(step, "__code__"):
            return ""
        return f" ({inspect.getsourcefile(step)}:{step.__code__.co_firstlineno})"

    def _line_that(self, changed: Callable[[], bool]) -> str:
        """Find the line of the user's code after which something has changed, by running the step again."""
        self.snapshot.restore()
        finder = LineFinder(changed)
        try:
            self.alone(0, finder)
        except Exception:
            # The second run of the user's code may fail where the first did not; then the line remains unknown.
            return ""
        if finder.line is None:
            return ""
        return f" ({finder.line})"

    def _bytes(self, num_states: int) -> int:
        """Estimate the memory of one more client, in bytes.

        Args:
            num_states: The number of the optimizer's states that have the parameter's shape.
        """
        layout = self.trained
        # A client's parameters, their copy where rows are picked by index, gradients, and states of the optimizer.
        copies = (3 + max(num_states, 1)) * layout.message_bytes
        vectors = 2 * layout.numel * layout.dtype.itemsize
        buffers = 2 * sum(number_of_bytes(buffer) for buffer in layout.tracked_buffers(self.host.module).values())
        batch = 2 * sum(number_of_bytes(tensor[0]) for tensor in self.batch)
        terms = 0
        for state in self.states:
            terms += sum(number_of_bytes(value[0]) for value in state.values())
        # The backward pass needs about as much again as the forward pass has saved.
        total: int = copies + vectors + buffers + batch + terms + 2 * self.activations
        return total


@contextmanager
def _errors_refuse() -> Iterator[None]:
    """Turn any error of a step into a reason why it cannot be batched."""
    try:
        yield
    except Exception as error:
        # The user's code may raise anything, and so may torch for operations that cannot be batched. If the error is
        # the step's own, the sequential engine will raise it again.
        raise NotVectorizableError(explained(error)) from error


def _pairs(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield lengths two by two; a last one together with the first."""
    for begin in range(0, len(lengths), 2):
        pair = lengths[begin : begin + 2]
        yield pair if len(pair) == 2 else [*pair, lengths[0]]
