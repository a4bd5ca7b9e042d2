"""The vectorized engine: many clients at once, as stacks of parameters in one batched computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_fedhaw.clients.engine import ClientTask, Engine, locate
from lightning_fedhaw.clients.optimizer_states import restore_settings, settings_of
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.clients.vectorized.batched import BatchedStep
from lightning_fedhaw.clients.vectorized.calls import Sharing
from lightning_fedhaw.clients.vectorized.chunk import Chunk
from lightning_fedhaw.clients.vectorized.compiled import CompiledStep
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.guard import StepGuard
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.repeated import ChangedStepError, RepeatedStep, RepeatError
from lightning_fedhaw.clients.vectorized.snapshot import Attributes
from lightning_fedhaw.clients.vectorized.tracing import explained, quiet_collector
from lightning_fedhaw.clients.vectorized.trial import Facts
from lightning_fedhaw.clients.vectorized.turns import many_clients
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import is_out_of_memory


class VectorizedEngine(Engine):
    """The engine that trains many clients at once, for modules whose step has no side effects, as the trial finds out.

    Clients with more batches continue when others have finished, and shorter last batches of equal length share a call:
    nothing is padded, and no client's model changes after its last step.

    Args:
        host: The trainer around it.
        layout: Where each trainable parameter lives in the flat vector.
        data: The clients' data.
        plan: The local work of a client in a round.
        objectives: The terms that clients add to their loss.
        facts: What the trial found out.
        chunk_memory: Bytes in use at a time.
        compile_clients: Whether the step is compiled from the second round on.
        fallback: The engine that continues if a step turns out not to be vectorizable after all; without it, that is
            an error.

    Attributes:
        chunk: The number of clients that train at once.
        gave_up: Whether the fallback has taken over.
        rounds: The number of rounds that this engine has begun.
    """

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective] = (),
        *,
        facts: Facts,
        chunk_memory: int,
        compile_clients: bool = False,
        fallback: Engine | None = None,
    ) -> None:
        super().__init__(host, layout, data, plan, objectives)
        self.facts = facts
        self.fallback = fallback
        self.gave_up = False
        self.chunk = max(1, chunk_memory // facts.bytes_per_client)
        self.compile_clients = compile_clients
        self.rounds = 0
        self.compiled: CompiledStep | None = None
        self.repeated: RepeatedStep | None = None
        if facts.is_fixed and not _has_hooks(host.module):
            self.repeated = RepeatedStep()
        # The state for which the trial found that calls may be shared.
        self._tried: Attributes | None = None
        if facts.sharing.lengths:
            self._tried = Attributes(host.module, copies_tensors=False)

    @property
    def clients_at_once(self) -> int:
        """The clients of a chunk, as long as the step proves vectorizable."""
        if self.gave_up:
            return 1
        return self.chunk

    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort, chunk by chunk. The module's own tensors are not replaced.

        Yields:
            Each client's update, in the order of the tasks.
        """
        host = self.host
        pending = iter(tasks)
        # Parts of a chunk that failed, to be trained again before the next chunk.
        failed: deque[list[ClientTask]] = deque()
        with isolated_randomness(host.device), StackRecorder(host.module, host.callbacks) as recorder:
            step = BatchedStep(host, self.layout, self.objectives, recorder, StepGuard())
            # From the second round on, so that a run of one round does not wait for the compiler.
            if self.compile_clients and self.rounds and self.compiled is None:
                self.compiled = CompiledStep()
            self._check_sharing()
            if self.repeated is not None:
                self.repeated.begin(step)
                self.repeated.must_not_change = self._tried is not None
            if self.compiled is not None:
                self.compiled.begin(step, self.repeated or step)
            self.rounds += 1
            while not self.gave_up:
                chunk_tasks = failed.popleft() if failed else list(islice(pending, self.chunk))
                if not chunk_tasks:
                    break
                trained = self._try(step, chunk_tasks)
                if trained is not None:
                    try:
                        yield from trained.updates()
                    finally:
                        host.client = None
                else:
                    # Where memory ran out, the chunk is smaller by now. The first part goes to the very front.
                    if chunk_tasks[self.chunk :]:
                        failed.appendleft(chunk_tasks[self.chunk :])
                    failed.appendleft(chunk_tasks[: self.chunk])
                # Its stacks are released before the next chunk makes its own.
                del trained
            if self.compiled is not None:
                self.compiled.report()
        # `optimizer.step` would set this; a schedule that steps next warns without it.
        host.optimizers[0]._opt_called = True  # type: ignore[attr-defined]
        if self.gave_up and self.fallback is not None:
            self.fallback.optimizer_states = self.optimizer_states
            self.fallback.lr_scale = self.lr_scale
            yield from self.fallback.run(chain(*failed, pending))

    def _check_sharing(self) -> None:
        """Share no calls where the step may do something else than in the trial, or where that would not be noticed."""
        if self._tried is None:
            return
        is_compared = self.repeated is not None and not torch.is_anomaly_enabled()
        if not is_compared or self._tried.changed() is not None:
            self._stop_sharing()

    def _stop_sharing(self) -> None:
        """Make separate calls for shorter batches from now on."""
        self._tried = None
        self.facts = replace(self.facts, sharing=Sharing())
        if self.repeated is not None:
            self.repeated.must_not_change = False

    def _try(self, step: BatchedStep, tasks: Sequence[ClientTask]) -> Chunk | None:
        """Train some clients at once.

        Returns:
            The trained chunk; ``None`` if it failed and the clients can be trained again in another way.

        Raises:
            Exception: Any error of the step, where nothing helps.
        """
        optimizers = self.host.optimizers
        settings = settings_of(optimizers)
        try:
            chunk = Chunk(self, tasks, step, self.facts, self.compiled, self.repeated)
            with quiet_collector(runs=True), many_clients(self.host):
                self._train(chunk)
            if repr(settings_of(optimizers)) != repr(settings):
                raise NotVectorizableError("changes settings of the optimizer, which all clients share here")
            return chunk
        except Exception as error:
            # The user's code may raise anything; the sequential engine, or fewer clients at a time, may succeed.
            restore_settings(optimizers, settings)
            # Raised here: an error that its own frames refer to keeps their memory until a garbage collection.
            if not self._recovers(error, step, tasks):
                raise
        step.recorder.forget()
        return None

    def _train(self, chunk: Chunk) -> None:
        """Train a chunk, and check that no step did in this round what it did not do in the trial.

        Raises:
            NotVectorizableError: If a step changed something that would pass from client to client. It is restored.
        """
        attributes = Attributes(self.host.module, copies_tensors=False)
        with ExitStack() as undo:
            # Undone after an interruption (Ctrl+C), too.
            undo.callback(attributes.restore)
            chunk.train()
            change = attributes.changed()
            if change is not None:
                raise NotVectorizableError(change.description)
            # Nothing is to be undone.
            undo.pop_all()

    def _recovers(self, error: Exception, step: BatchedStep, tasks: Sequence[ClientTask]) -> bool:
        """After a failure reduce the number of clients at a time, or give up for the fallback.

        Returns:
            Whether the clients can be trained again; false if neither helps.
        """
        if isinstance(error, (RepeatError, ChangedStepError)):
            # The step itself makes the calls from now on, or the shared ones are separate.
            self._stop_sharing()
            return True
        if is_out_of_memory(error) and len(tasks) > 1:
            self.chunk = (len(tasks) + 1) // 2
            rank_zero_warn(
                f"{len(tasks)} clients at once do not fit into memory; they are trained again, {self.chunk} at a time."
                " `chunk_memory=` bounds what is tried."
            )
            return True
        if self.fallback is not None:
            self.gave_up = True
            rank_zero_warn(
                f"The sequential engine trains from here on: in round {self.host.round} `training_step`"
                f" {explained(error)}."
            )
            return True
        clients = ", ".join(str(task.client) for task in tasks[:10])
        if len(tasks) > 10:
            clients += " ..."
        locate(
            error,
            f"{len(tasks)} clients at once ({clients}), round {self.host.round}",
            step.recorder.batch_size,
            self.data.settings.batch_size,
            ' `engine="sequential"` trains one after another, and takes any step.',
        )
        return False


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a layer has hooks, which would not be called where a recorded call is repeated."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
