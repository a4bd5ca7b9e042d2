"""The problem of each client, as a rule's inquiry sees it: its losses, at the model it received, on its own samples.

Shapes: P trainable parameters, U parameters that only the server changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.steps import turns
from lightning_fedhaw.data.client_data import Batch as ClientBatch
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.local_problem import BilevelLosses, ClientProblem, SizedBatch
from lightning_fedhaw.federation.probe_batches import with_larger_batches
from lightning_fedhaw.federation.records import RoundPlan
from lightning_fedhaw.federation.weight_decay import weight_decay
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.layout import ParameterLayout


class ClientProblems:
    """The clients' problems in the rounds of a run.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which knows those that a client starts from.
    """

    def __init__(self, context: RunContext, buffers: Buffers) -> None:
        self.host = context.host
        self.server = context.server
        self.rule = context.rule
        self.data = context.data
        self.seed = context.seed
        self.buffers = buffers
        # How samples are read in passes over training samples (False) and held-out samples (True).
        self._passes: dict[bool, ClientData] = {}
        self._decay: Tensor | None = None

    def begin_round(self, engine: Engine) -> None:
        """Read what all clients of a round have in common.

        Args:
            engine: The engine, which knows the clients' local work.
        """
        self._settle_passes(engine)
        self._decay = weight_decay(self.host.module, self.host.optimizers, self.server.layout)

    def of(self, client: int, plan: RoundPlan, engine: Engine) -> ClientProblem:
        """Make the problem of one client at the model that it received.

        Args:
            client: The client's number.
            plan: The plan of the round.
            engine: The engine, which knows the clients' local work and own parameters.
        """
        layout, upper = self._upper()
        name = ("client", client, "round", plan.round, "inquiry")
        return ClientProblem(
            losses=BilevelLosses(self.server, layout, self.rule.upper_loss),
            lower=plan.models[client],
            upper=upper,
            own={"buffers": self.buffers.start(client), "local_parameters": engine.local_parameters.start(client)},
            seed=lambda number: seed_randomness(seed_of(self.seed, *name, number), self.host.device),
            training=partial(self._training_pass, client, plan.round, engine),
            held_out=partial(self._held_out_pass, client, plan.round, engine),
            local_training=partial(self._local_training, client, plan.round, engine),
            decay=self._decay,
        )

    def _upper(self) -> tuple[ParameterLayout, Tensor]:
        """Return the layout of the parameters that only the server changes, and their values ``[U]``."""
        values = self.rule.server_parameters(self.rule.state)
        # In the module's dtypes: the rule may keep the values in a wider one.
        layout = ParameterLayout.of_tensors({name: self.server.module.get_parameter(name) for name in values})
        return layout, layout.read(list(values.values()))

    # ------------------------------------------------------------------ a client's batches

    def _training_pass(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make one pass over a client's training samples."""
        data = self._passes[False]
        return self._prepared(data.typical_pass(client, round_idx, limit=engine.plan.limit))

    def _held_out_pass(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make one pass over a client's held-out samples."""
        data = self._passes[True]
        return self._prepared(data.full_pass(client, round_idx, held_out=True, limit=engine.plan.limit))

    def _local_training(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make the batches of a client's local training in a round."""
        plan = engine.plan
        epochs = plan.epochs_of(client)
        steps = plan.steps_of(client)
        return self._prepared(self.data.batches(client, round_idx, epochs=epochs, num_batches=steps, limit=plan.limit))

    def _prepared(self, batches: Iterable[ClientBatch]) -> Iterator[SizedBatch]:
        """Move batches to the model's device, each when it is asked for."""
        for batch in batches:
            yield self.host.prepare(batch.data), batch.index, batch.size

    # ------------------------------------------------------------------ the size of batches

    def _settle_passes(self, engine: Engine) -> None:
        """Choose how samples are read, once a run: in larger batches where they give the same gradients."""
        if self._passes:
            return
        self._passes[False] = with_larger_batches(self.data, self._gradients, held_out=False, limit=engine.plan.limit)
        if not self.rule.needs_held_out_data:
            return
        # As validation reads them, without what is for training only, such as augmentation.
        held_out = self.data.for_evaluation(self.host.validation.collate_fn)
        held_out.settings = replace(held_out.settings, drop_last=False)
        gradients = partial(self._gradients, held_out=True)
        self._passes[True] = with_larger_batches(held_out, gradients, held_out=True, limit=engine.plan.limit)

    def _gradients(self, client: int, batches: Iterable[ClientBatch], *, held_out: bool = False) -> Sequence[Tensor]:
        """Return the gradients ``[P]`` and ``[U]`` of one of the losses over some batches, at the global model."""
        layout, upper = self._upper()
        problem = ClientProblem(
            losses=BilevelLosses(self.server, layout, self.rule.upper_loss),
            lower=self.server.parameters(),
            upper=upper,
            own={"buffers": self.server.buffers, "local_parameters": self.server.local_parameters},
            seed=lambda _: seed_randomness(seed_of(self.seed, "inquiry", "batch size"), self.host.device),
            training=lambda: self._prepared(batches),
            held_out=lambda: self._prepared(batches),
            local_training=lambda: (),
        )
        with isolated_randomness(self.host.device), turns(self.host):
            self.host.client = client
            if not held_out:
                return problem.lower_gradients()
            gradients = problem.upper_gradients()
            return gradients.lower, gradients.upper
