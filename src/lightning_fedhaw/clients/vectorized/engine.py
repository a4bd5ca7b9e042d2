"""The vectorized engine: many clients at once, as stacks of parameters in one batched computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from itertools import chain, islice

from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw.clients.engine import ClientTask, Engine, LocalPlan, locate, restore_settings, settings_of
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.clients.vectorized.batched import BatchedStep
from lightning_fedhaw.clients.vectorized.chunk import Chunk
from lightning_fedhaw.clients.vectorized.compiled import CompiledStep
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.guard import StepGuard
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.snapshot import Attributes
from lightning_fedhaw.clients.vectorized.tracing import explained, quiet_collector
from lightning_fedhaw.clients.vectorized.trial import Facts
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import is_out_of_memory


class VectorizedEngine(Engine):
    """Train many clients at once, for modules whose step has no side effects, as the probe finds out.

    Clients with more batches continue when others have finished, and a shorter last batch is a call of its own together
    with those of the same length: nothing is padded, and no client moves on after its last step.

    Args:
        host: As in the base class, like the four that follow.
        layout: As there.
        data: As there.
        plan: As there.
        objectives: As there.
        facts: What the probe found out.
        chunk_memory: Bytes in use at a time.
        compile_clients: Whether the step is compiled from the second round on.
        fallback: Continues where a step turns out not to be vectorizable after all; without it, that is an error.

    Attributes:
        chunk: How many clients train at once.
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

    @property
    def clients_at_once(self) -> int:
        """The clients of a chunk, as long as the step proves vectorizable."""
        return 1 if self.gave_up else self.chunk

    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort, chunk by chunk. The module keeps its own tensors throughout.

        Yields:
            Each client's update, in the order of the tasks.
        """
        host = self.host
        pending = iter(tasks)
        # Parts of a chunk that failed, to be trained again before the next chunk.
        again: deque[list[ClientTask]] = deque()
        with isolated_randomness(host.device), StackRecorder(host.module, host.callbacks) as recorder:
            step = BatchedStep(host, self.layout, self.objectives, recorder, StepGuard())
            if self.compile_clients and self.rounds and self.compiled is None:
                self.compiled = CompiledStep()
            if self.compiled is not None:
                self.compiled.begin(step)
            self.rounds += 1
            while not self.gave_up:
                part = again.popleft() if again else list(islice(pending, self.chunk))
                if not part:
                    break
                trained = self._try(step, part)
                if trained is not None:
                    yield from trained.updates()
                else:
                    # Where memory ran out, the chunk is smaller by now.
                    again.extendleft(rest for rest in (part[self.chunk :], part[: self.chunk]) if rest)
                # Its stacks are released before the next chunk makes its own.
                del trained
            if self.compiled is not None:
                self.compiled.report()
        # What `optimizer.step` would leave behind; a schedule that steps next looks for it.
        host.optimizers[0]._opt_called = True  # type: ignore[attr-defined]
        if self.gave_up and self.fallback is not None:
            self.fallback.optimizer_states = self.optimizer_states
            self.fallback.lr_scale = self.lr_scale
            yield from self.fallback.run(chain(*again, pending))

    def _try(self, step: BatchedStep, tasks: Sequence[ClientTask]) -> Chunk | None:
        """Train some clients; ``None`` if it failed in a way that can be mended, which is done.

        Raises:
            Exception: Whatever the step raises, where nothing helps.
        """
        optimizers = self.host.optimizers
        settings = settings_of(optimizers)
        try:
            chunk = Chunk(self, tasks, step, self.facts, self.compiled)
            with quiet_collector(runs=True):
                self._train(chunk)
            if repr(settings_of(optimizers)) != repr(settings):
                raise NotVectorizableError("changes settings of the optimizer, which all clients share here")
            return chunk
        except Exception as error:
            # The user's code may raise anything; the sequential engine, or less memory, may do without.
            restore_settings(optimizers, settings)
            # Raised here: an error that its own frames know keeps all that they hold, until a garbage collection.
            if not self._recovers(error, step, tasks):
                raise
        step.recorder.forget()
        return None

    def _train(self, chunk: Chunk) -> None:
        """Train some clients, and look whether a step did what it did not do in the trial.

        Raises:
            NotVectorizableError: If something was left behind that would pass from client to client. It is put back.
        """
        attributes = Attributes(self.host.module, copies_tensors=False)
        try:
            chunk.train()
            change = attributes.changed()
            if change is not None:
                raise NotVectorizableError(change.what)
        except BaseException:
            attributes.restore()
            raise

    def _recovers(self, error: Exception, step: BatchedStep, tasks: Sequence[ClientTask]) -> bool:
        """After a failure choose fewer clients at a time, or one after another; false if neither helps."""
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
                "Going on with the sequential engine for the rest of the run: in round"
                f" {self.host.round} `training_step` {explained(error)}."
            )
            return True
        clients = ", ".join(str(task.client) for task in tasks[:10])
        if len(tasks) > 10:
            clients += " ..."
        locate(
            error,
            f"{len(tasks)} clients at once ({clients}), round {self.host.round}",
            step.recorder.batch_size,
            ' `engine="sequential"` trains one after another, and takes any step.',
        )
        return False
