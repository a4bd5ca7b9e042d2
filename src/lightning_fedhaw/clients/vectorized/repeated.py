"""A batched step that is recorded, and then repeated without ``vmap`` and autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedhaw.clients.vectorized.batched import BatchedStep, Gradients, StepInputs
from lightning_fedhaw.clients.vectorized.program import Program, program_of
from lightning_fedhaw.clients.vectorized.recorder import PendingValue
from lightning_fedhaw.clients.vectorized.recording import DifferenceError, Pattern, Recording
from lightning_fedhaw.vectors.memory import is_out_of_memory

MAX_CHANGES = 3
"""How often a step may turn out to be another one, with few calls between, before it is no longer recorded."""

FEW_CALLS = 10
"""The number of repeated calls that are worth a new recording."""

_Key = tuple[object, ...]
"""What tells one program from another: the shapes and strides of the inputs, without the number of rows."""


class RepeatError(Exception):
    """The error of a program, which the step itself may not have."""


class ChangedStepError(Exception):
    """The error of a step that does something else than in earlier calls, so that the trial's findings are void."""


class RepeatedStep:
    """A batched step that repeats its operations, which takes half of the time for small models.

    A call of the step is mostly Python: ``vmap``, views, autograd's graph. Below them it is a sequence of operations on
    plain tensors, the same for every call with batches of one length. It is recorded while the step runs; repeating it
    gives the same results, bit for bit.

    A recording contains the Python numbers of the step. The trial found that no step changes them; so they are the same
    within a round, and another round may have others. Therefore the first call of each kind in a round is made by the
    step, and is compared with the earlier ones, operation by operation and number by number. Two calls with different
    numbers of rows show which of the integers are multiples of it.

    Attributes:
        is_off: Whether all calls are made by the step itself.
        must_not_change: Whether a step that has changed is an error.
    """

    def __init__(self) -> None:
        self.is_off = False
        self.must_not_change = False
        self._kinds: dict[_Key, _Kind] = {}

    def begin(self, step: BatchedStep) -> None:
        """Begin a round with its own batched step."""
        self.step = step
        for kind in self._kinds.values():
            kind.is_current = False

    def gradients(self, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Compute losses and gradients; the arguments are those of :meth:`BatchedStep.gradients`.

        Raises:
            RepeatError: If a program fails, after which all calls are made by the step itself.
            ChangedStepError: If the step has changed, or cannot be compared, where it must not change.
        """
        if self.is_off or torch.is_anomaly_enabled():
            return self.step.gradients(trained, inputs)
        tensors = inputs.tensors()
        rows = len(tensors[0])
        kind = self._kind_of(rows, tensors)
        if kind.num_changes > MAX_CHANGES:
            return self.step.gradients(trained, inputs)
        if not kind.serves(rows):
            return self._recorded(kind, rows, trained, inputs)
        try:
            with torch.no_grad():
                losses, gradients, replaced, logged = kind.program()(rows, tensors)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Any operation may fail in its own way; the step itself says where.
            self.is_off = True
            raise RepeatError from error
        self.step.recorder.pend(kind.pending)
        return Gradients(losses, gradients, replaced, logged)

    def _kind_of(self, rows: int, tensors: Sequence[Tensor]) -> _Kind:
        """Return the kind of a call."""
        # Of a single row other views are made.
        key: list[object] = [rows == 1]
        for tensor in tensors:
            key += tensor.shape[1:]
            key.append(tensor.stride())
        return self._kinds.setdefault(tuple(key), _Kind())

    def _recorded(self, kind: _Kind, rows: int, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Make a call by the step, and learn from its operations.

        Raises:
            ChangedStepError: If it has changed, or cannot be compared, where it must not change.
        """
        recording = Recording(rows, inputs.tensors())
        with recording:
            outputs = self.step.gradients(trained, inputs)
            recording.finish(outputs)
        recorder = self.step.recorder
        pending = recorder.drop_pending()
        recorder.pend(pending)
        if kind.learn(recording, pending) and self.must_not_change:
            raise ChangedStepError
        return outputs


class _Kind:
    """Calls of one kind: with batches of one length.

    Attributes:
        pending: The values that a call logs.
        is_current: Whether calls of this round have been compared with each other, or with those of earlier rounds.
        num_changes: How often a recording was another one than those before it, after few repeated calls.
    """

    def __init__(self) -> None:
        self.pending: list[PendingValue] = []
        self.is_current = False
        self.num_changes = 0
        self._pattern: Pattern | None = None
        self._program: Program | None = None
        self._num_repeated = 0

    def serves(self, rows: int) -> bool:
        """Return whether calls with a number of rows can be repeated in this round."""
        return self._pattern is not None and self.is_current and self._pattern.rows in (None, rows)

    def program(self) -> Program:
        """Return the program of the calls, which is written for the first one."""
        assert self._pattern is not None
        self._num_repeated += 1
        if self._program is None:
            self._program = program_of(self._pattern)
        return self._program

    def learn(self, recording: Recording, pending: list[PendingValue]) -> bool:
        """Learn from a recording.

        Returns:
            Whether it is another one than those before it, or cannot be compared.
        """
        if recording.obstacle is not None:
            self.num_changes = MAX_CHANGES + 1
            return True
        if self._pattern is not None and self._confirms(self._pattern, recording, pending):
            self.is_current = True
            return False
        has_changed = self._pattern is not None
        if self._pattern is not None and self._num_repeated < FEW_CALLS:
            self.num_changes += 1
        self._num_repeated = 0
        self._pattern = Pattern(recording)
        self._program = None
        self.pending = pending
        self.is_current = False
        return has_changed

    def _confirms(self, pattern: Pattern, recording: Recording, pending: list[PendingValue]) -> bool:
        """Return whether a recording agrees with the pattern, which may now be one for more numbers of rows."""
        rows = pattern.rows
        try:
            pattern.confirm(recording)
        except DifferenceError:
            return False
        if pattern.rows != rows:
            self._program = None
        return pending == self.pending
