"""The engine of a server whose clients are sites: it sends messages, and yields the updates of the replies."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any, NoReturn, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw.clients.engine import ClientTask, EndState
from lightning_fedhaw.clients.evaluation import ClientMetrics, metrics_of_rows
from lightning_fedhaw.clients.local_parameters import LOCAL_PARAMETERS
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.clients.sequential import SequentialEngine, furthest_of
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.deploy.messages import Message, merged, packed
from lightning_fedhaw.deploy.roster import Roster
from lightning_fedhaw.deploy.sites import Task
from lightning_fedhaw.deploy.training_state import sent_scale, sent_state, state_from
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.repeated import RepeatedWarnings
from lightning_fedhaw.federation.screening import NONFINITE
from lightning_fedhaw.federation.shared_states import SHARED_CHANGES
from lightning_fedhaw.ranks import Ranks

_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What is raised by a reply that is none."""


class Exchange(Protocol):
    """Sends messages to clients, and yields the contents of their replies in the order of the messages."""

    def __call__(self, task: Task, messages: Mapping[int, Message]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Clients that are absent or fail are left out."""


class SiteSamples(Dataset[object]):
    """The training samples of a site, of which the server knows the number only.

    Args:
        count: Their number.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> NoReturn:
        raise RuntimeError("The training samples of a deployment are at the sites, and the server cannot read them.")


class SentBuffers(dict[str, Tensor]):
    """The buffers that a site has sent. Those that stay there are an error and not a default."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return a buffer that was sent.

        Raises:
            ValueError: If it was not.
        """
        if name not in self:
            raise ValueError(
                f"The clients' buffer `{name}` was asked for, and with its policy sites do not send it. Use"
                ' `buffers="average"`.'
            )
        return self[name]


class RemoteEngine(SequentialEngine):
    """The sequential engine of a federation whose clients are sites.

    Settings and schedules are those of the server's module, and go to the sites with the model. What clients keep is at
    the sites.

    Args:
        federation: The federation, whose engine it replaces.
        roster: The sites.
        exchange: Carries messages.
    """

    elsewhere = "at their sites"

    def __init__(self, federation: Federation, roster: Roster, exchange: Exchange) -> None:
        engine = federation.engine
        super().__init__(engine.host, engine.layout, engine.data, engine.plan, engine.objectives)
        self.succeed(engine)
        self.server = federation.server
        self.buffers = federation.buffers
        self.sharing = federation.shared_states.sharing
        self.seed = federation.seed
        self.identity = federation.run_state.identity
        self.needs_initial_loss = federation.rule.needs_initial_loss
        self.roster = roster
        self.exchange = exchange
        self.absent: set[int] = set()
        self.warnings = RepeatedWarnings()
        self._remembering: dict[int, bool] = {}

    # ------------------------------------------------------------------ a round

    def run(self, tasks: Iterable[ClientTask]) -> Generator[ClientUpdate, None, None]:
        """Let the sites train, and yield their updates as the replies come in, in the order of the tasks."""
        tasks_of = {task.client: task for task in tasks}
        for optimizer in self.host.optimizers:
            # The sites step; a schedule of the server would warn that nobody does.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        begin = self.current_state()
        self._end_state = begin
        end_states = [begin]
        scales = []
        self.absent = set(tasks_of)
        for client, content in self.exchange("train", self._messages(tasks_of, begin)):
            try:
                update = self._received(tasks_of[client], content)
                end = state_from(content["end"])
            except _MALFORMED as error:
                # A site may send anything; one that sends something else than an update is left out.
                self._reject(client, error)
                continue
            self.absent.discard(client)
            self._remembering[client] = bool(content["remembers"])
            end_states.append(end)
            scales += end.scales
            yield update
        self._end_state = furthest_of(end_states)._replace(scales=scales)

    def commit(self, update: ClientUpdate) -> None:
        """Note that a client's update was received, by which its site knows what to keep."""
        remembers = self._remembering[update.client]
        self.roster.note_received(update.client, self.host.round, remembers=remembers)

    def _reject(self, client: int, error: Exception) -> None:
        name = self.roster.identities[client]
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        self.warnings.warn(
            f"rejected {name}",
            f"The reply of site {name!r} (client {client}) in round {self.host.round} was left out: {reason}.",
        )

    # ------------------------------------------------------------------ messages

    def _messages(self, tasks: Mapping[int, ClientTask], begin: EndState) -> dict[int, Message]:
        """Make the message of each client; the tensors of all are the same."""
        if not tasks:
            return {}
        start = next(iter(tasks.values())).start
        common = packed(
            {
                **self._model(start),
                "begin": sent_state(begin),
                "lr_scale": sent_scale(self.lr_scale),
                "means": [dict(objective.mean) for objective in self.sharing],
            }
        )
        return {client: merged(common, self._own_part(client, self.host.round)) for client in tasks}

    def _model(self, start: Tensor) -> dict[str, Any]:
        """Return the global model as it is sent: parameters in their own types, and the buffers that all receive."""
        parameters = {}
        views = self.layout.views(start)
        for dtype, (name, view) in zip(self.layout.dtypes, views.items(), strict=True):
            parameters[name] = view.to(dtype)
        return {
            "parameters": parameters,
            "round": self.host.round,
            "num_clients": self.data.num_clients,
            "seed": self.seed,
            "run": self.identity.run,
        }

    def _own_part(self, client: int, round_idx: int) -> Message:
        """Return the part of a message that is for one client.

        Args:
            client: The client.
            round_idx: The client has what it kept in the rounds before this one.
        """
        standing = self.roster.standing(client, round_idx)
        buffers = {}
        kept_by_clients = self.buffers.local.names
        policies = self.buffers.policy_of
        derived = self.buffers.kinds.derived_names
        for name, value in self.server.buffers.items():
            is_everybodys = policies[name] != "keep" or name in derived
            # A client starts from the server's, and has its own from its first update on.
            is_its_own = name in kept_by_clients and standing.received >= 0
            if is_everybodys and not is_its_own:
                buffers[name] = value
        return packed(
            {"client": client, "buffers": buffers, "received": standing.received, "remembers": standing.remembers}
        )

    def _received(self, task: ClientTask, content: Mapping[str, Any]) -> ClientUpdate:
        """Make an update from the content of a reply.

        Raises:
            KeyError: If it lacks something.
            ValueError: If it is not of this model.
        """
        device = self.host.device
        tensors = [self._of_shape(content["parameters"], name, shape) for name, shape in self._shapes()]
        displacement = self.layout.read(tensors, out=task.slot()).sub_(task.start)
        buffers = SentBuffers()
        for name in self.buffers.averaged:
            buffers[name] = self._of_shape(content["buffers"], name, self.server.buffers[name].shape)
        changes = [{name: value.to(device) for name, value in change.items()} for change in content["changes"]]
        if len(changes) != len(self.sharing) or any(set(change) - set(self.layout.names) for change in changes):
            raise ValueError("its changes of shared states are those of other client objectives")
        initial_loss = float(content["initial_loss"])
        if self.needs_initial_loss and not isfinite(initial_loss):
            raise ValueError("its loss at the model that it received is not finite")
        num_examples = _count(content, "num_examples")
        expected = self.roster.sizes[task.client]
        if num_examples != expected:
            raise ValueError(f"it has {num_examples} training examples, and had {expected} when it joined")
        return ClientUpdate(
            client=task.client,
            num_examples=num_examples,
            num_steps=_count(content, "num_steps"),
            num_skipped=_count(content, "num_skipped"),
            displacement=displacement,
            buffers=buffers,
            logged=self._logged(content["logged"]),
            memory={
                "objectives": [{} for _ in self.objectives],
                LOCAL_PARAMETERS: {},
                SHARED_CHANGES: changes,
                NONFINITE: content["nonfinite"],
            },
            num_batches=_count(content, "num_batches"),
            initial_loss=initial_loss,
            lr_scale=float(content["lr_scale"]),
            inverse_probability=task.inverse_probability,
        )

    def _shapes(self) -> Iterable[tuple[str, torch.Size]]:
        return zip(self.layout.names, self.layout.shapes, strict=True)

    def _of_shape(self, sent: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        """Return a tensor that a site has sent, on the server's device.

        Raises:
            ValueError: If it has another shape.
        """
        tensor = sent[name]
        if tensor.shape != shape:
            raise ValueError(f"its `{name}` is {list(tensor.shape)}, and the server's is {list(shape)}")
        return tensor.to(self.host.device)

    def _logged(self, content: Mapping[str, Any]) -> dict[str, Logged]:
        """Make the records of what a client has logged."""
        logged = {}
        for name, (total, weight, reduction, options, is_metric) in content.items():
            logged[name] = Logged(total, weight, reduction, options)
            if is_metric and self.warnings.counts[name] == 0:
                self.warnings.counts[name] += 1
                rank_zero_warn(
                    f"`{name}` is a torchmetrics object that sites log while they train. The server logs the mean of"
                    " their values, weighted by examples; a simulation pools their states."
                )
        return logged

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, own: Mapping[int, Mapping[str, Tensor]], ranks: Ranks, batch_size: int | None) -> ClientMetrics:
        """Let all sites evaluate the global model on their own data; those that are absent have no values.

        Args:
            own: Not used: each site has what is its own.
            ranks: Not used.
            batch_size: Samples in a batch; ``None`` for those of a site's training.
        """
        common = packed({**self._model(self.server.parameters()), "batch_size": batch_size})
        clients = range(len(self.roster))
        # With what they have kept in this round.
        after_round = self.host.round + 1
        messages = {client: merged(common, self._own_part(client, after_round)) for client in clients}
        rows: list[dict[str, float]] = [{} for _ in clients]
        num_examples = [0 for _ in clients]
        higher_is_better: dict[str, bool] = {}
        for client, content in self.exchange("evaluate", messages):
            try:
                rows[client] = {str(name): float(value) for name, value in content["row"].items()}
                num_examples[client] = _count(content, "num_examples")
                higher_is_better.update(content["higher_is_better"])
            except _MALFORMED as error:
                self._reject(client, error)
        return metrics_of_rows(rows, higher_is_better, torch.tensor(num_examples))


def _count(content: Mapping[str, Any], name: str) -> int:
    """Return a number of a reply.

    Raises:
        ValueError: If it is negative.
    """
    number = int(content[name])
    if number < 0:
        raise ValueError(f"its `{name}` is {number}")
    return number
