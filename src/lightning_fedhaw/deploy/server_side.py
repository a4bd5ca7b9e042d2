"""The server side of a deployment: the simulator's own run, whose clients are sites that an engine connects."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint
from lightning_fedhaw.adapter.site import prepare_server
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.data.module import FederatedDataModule
from lightning_fedhaw.deploy.agreement import disagreement, terms_of
from lightning_fedhaw.deploy.messages import Message, packed, unpacked
from lightning_fedhaw.deploy.refusals import refuse
from lightning_fedhaw.deploy.remote_engine import RemoteEngine, SiteSamples
from lightning_fedhaw.deploy.roster import Roster
from lightning_fedhaw.deploy.sites import Sites, Task
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.repeated import RepeatedWarnings
from lightning_fedhaw.files import load_checked
from lightning_fedhaw.report.history import find_history

LAST_CHECKPOINT = "last.ckpt"
POLL_SECONDS = 1.0
"""Seconds between two looks at who is there, while the server waits."""


class ServerSide:
    """The server of a deployment: a trainer whose clients are sites.

    The trainer runs its rounds as in a simulation, with its rule, loggers, checkpoints, validation and callbacks. Only
    the clients' work is done at the sites. Results are those of the simulator, bit for bit, where sites compute with
    the same library versions and kind of processor.

    Args:
        trainer: A :class:`~lightning_fedhaw.FederatedTrainer`, or a stock trainer with a rule. Its channels have to be
            left out; its arguments about splits are not used.
        model: The model.
        sites: The sites, as an engine connects them.
        num_sites: Sites that the server waits for before the first round. Default: the trainer's ``num_clients``.
        val: Validation data of the server's own: a data set, or ready loaders.
        proxy: Server data for rules that need some: a data set.
        batch_size: Samples in a batch of ``val`` and ``proxy``.
        folder: The folder of a checkpoint after every round, from which a server that is started again goes on.
        wait_timeout: Seconds to wait for sites.
        round_timeout: Seconds to wait for the replies of a round; a site that needs longer is left out of it.

    Attributes:
        roster: The sites and their numbers.

    Raises:
        ValueError: If an argument is not one of the allowed values, or the trainer has something that a deployment does
            not carry, which is named.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        sites: Sites,
        *,
        num_sites: int | None = None,
        val: Any = None,
        proxy: Dataset[object] | None = None,
        batch_size: int = 32,
        folder: str | Path | None = None,
        wait_timeout: float = 3600.0,
        round_timeout: float = 3600.0,
    ) -> None:
        self.trainer: pl.Trainer = arguments.instance("trainer", trainer, pl.Trainer, example="FederatedTrainer(...)")
        self.model: pl.LightningModule = arguments.instance(
            "model", model, pl.LightningModule, example="your LightningModule"
        )
        self.sites: Sites = arguments.provider(
            "sites", sites, "ask", kind="lightning_fedhaw.deploy.Sites", example="InMemorySites({...})"
        )
        self.options = prepare_server(trainer)
        self.num_sites = _number_of_sites(num_sites, self.options.num_clients)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.folder = Path(folder) if folder is not None else None
        self.wait_timeout = arguments.number("wait_timeout", wait_timeout, minimum=0)
        self.round_timeout = arguments.number("round_timeout", round_timeout, above=0)
        self.roster = Roster()
        self._val = val
        self._proxy: Dataset[object] | None = arguments.optional(
            arguments.provider, "proxy", proxy, "__getitem__", kind="torch.utils.data.Dataset", example="your data set"
        )
        callbacks = callbacks_of(trainer)
        refuse(trainer, callbacks, model, self.options)
        self._terms = terms_of(model, callbacks, self.options)
        # The address of each identity, and why an address is not taken.
        self._addresses: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._warnings = RepeatedWarnings()
        self._federation: Federation | None = None

    def fit(self) -> None:
        """Wait for the sites, and run the rounds, or what is left of them.

        Raises:
            TimeoutError: If not enough sites come in time, saying how many are missing.
            ValueError: If the checkpoint is of other sites.
        """
        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            self._load_roster(checkpoint)
        self._meet()
        data = FederatedDataModule(
            [SiteSamples(size) for size in self.roster.sizes],
            batch_size=self.batch_size,
            val=self._val,
            proxy=self._proxy,
        )
        callbacks = callbacks_of(self.trainer)
        callbacks.insert(0, _ServerCallback(self))
        if self.folder is not None:
            callbacks.append(RoundCheckpoint(1, self.folder))
        self.trainer.fit(self.model, datamodule=data, ckpt_path=checkpoint)

    # ------------------------------------------------------------------ who is there

    def _last_checkpoint(self) -> Path | None:
        """Return the checkpoint from which the run goes on; ``None`` if it begins."""
        if self.folder is None:
            return None
        path = self.folder / LAST_CHECKPOINT
        return path if path.exists() else None

    def _load_roster(self, path: Path) -> None:
        """Take the roster of a checkpoint.

        Raises:
            ValueError: If it has none, or one of fewer sites.
        """
        with path.open("rb") as file:
            checkpoint: Any = load_checked(file, str(path))
        state = checkpoint.get("callbacks", {}).get(_ServerCallback.state_key)
        if state is None:
            raise ValueError(f"{str(path)!r} is of a run without sites. Give another `folder`.")
        self.roster.load_state_dict(state)
        if len(self.roster) < self.num_sites:
            raise ValueError(
                f"{str(path)!r} is of the {len(self.roster)} sites {self.roster.identities}, and `num_sites` is"
                f" {self.num_sites}. Set `num_sites={len(self.roster)}`, or give another `folder`."
            )

    def _meet(self) -> None:
        """Wait for sites, and give them numbers; those without a number may join in a later round."""
        self._await_sites()
        for identity in list(self._addresses):
            if self.roster.number(identity) is None:
                del self._addresses[identity]

    def _await_sites(self) -> None:
        """Wait until as many sites are there as are needed: all of them, or in a resumed run any of the roster.

        Raises:
            TimeoutError: If they do not come in time.
            ValueError: If others are there than those of the checkpoint.
        """
        is_resumed = len(self.roster) > 0
        newcomers: dict[str, int] = {}
        deadline = time.monotonic() + self.wait_timeout
        missing = -1
        while True:
            newcomers.update(self._look_around())
            newcomers = {identity: size for identity, size in newcomers.items() if identity in self._addresses}
            still_missing = self.num_sites - len(newcomers)
            if is_resumed:
                still_missing = self._missing_of_roster(newcomers)
            if still_missing <= 0:
                if not is_resumed:
                    self._number(newcomers)
                return
            if still_missing != missing:
                missing = still_missing
                rank_zero_info(f"Waiting for {missing} of {self.num_sites} sites, {self.wait_timeout:.0f} s at most.")
            if time.monotonic() >= deadline:
                raise TimeoutError(self._shortage(missing))
            time.sleep(min(POLL_SECONDS, self.wait_timeout))

    def _missing_of_roster(self, newcomers: Mapping[str, int]) -> int:
        """Return how many sites of a checkpoint's roster have to come before the run goes on: one, or none.

        Raises:
            ValueError: If as many others are there.
        """
        if any(identity in self._addresses for identity in self.roster.identities):
            return 0
        if len(newcomers) >= self.num_sites:
            raise ValueError(
                f"The checkpoint is of the sites {self.roster.identities}, and none of them is here, but"
                f" {sorted(newcomers)}. Start these sites, or give another `folder`."
            )
        return 1

    def _number(self, newcomers: Mapping[str, int]) -> None:
        """Give the first sites their numbers, in an order that does not depend on who came first."""
        described = []
        for identity in sorted(newcomers)[: self.num_sites]:
            number = self.roster.add(identity, newcomers[identity])
            described.append(f"{number} is {identity!r} with {newcomers[identity]} samples")
        rank_zero_info(f"Sites: {', '.join(described)}.")

    def _shortage(self, missing: int) -> str:
        sentence = f"{missing} of {self.num_sites} sites were missing after {self.wait_timeout:.0f} s."
        for reason in self._refused.values():
            sentence += f" {reason}"
        return f"{sentence} Start them, wait longer (`wait_timeout=`), or lower `num_sites`."

    def _look_around(self) -> dict[str, int]:
        """Find out who is there, and ask those that came to introduce themselves.

        Returns:
            The training examples of sites that are not in the roster, by identity.
        """
        present = self.sites.present()
        for identity, address in list(self._addresses.items()):
            if address not in present:
                del self._addresses[identity]
                # A site that came back under another address was the second one of its identity until now.
                self._refused.clear()
        self._refused = {address: reason for address, reason in self._refused.items() if address in present}
        known = {*self._addresses.values(), *self._refused}
        new = [address for address in present if address not in known]
        if not new:
            return {}
        question = packed({"round": 0, "client": 0, "num_clients": self._num_clients, "seed": 0})
        newcomers: dict[str, int] = {}
        messages = dict.fromkeys(new, question)
        for address, reply in self.sites.ask("query", messages, self.round_timeout):
            self._introduce(address, present[address], reply, newcomers)
        return newcomers

    @property
    def _num_clients(self) -> int:
        return max(len(self.roster), self.num_sites)

    def _introduce(self, address: str, vouched: str, reply: Message, newcomers: dict[str, int]) -> None:
        """Take a site that has introduced itself, or say why it is left out.

        Args:
            address: Its address.
            vouched: The identity that the engine vouches for; empty if there is none.
            reply: Its reply.
            newcomers: Gets its training examples, if it is not in the roster.
        """
        try:
            if reply.error:
                raise ValueError(f"it failed: {reply.error}")
            content = unpacked(reply)
            identity = vouched or content["name"] or address
            num_examples = int(content["num_examples"])
            if num_examples < 1:
                raise ValueError(f"it has {num_examples} training examples")
            difference = disagreement(self._terms, content["terms"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._refuse(address, f"Site {address!r} is left out: {_without_stop(error)}.")
            return
        if identity in self._addresses:
            self._refuse(
                address,
                f"Two sites have the identity {identity!r}, and the second one ({address}) is left out: give each a"
                " `name` of its own.",
            )
            return
        if difference is not None:
            self._refuse(address, f"Site {identity!r} {difference}")
            return
        number = self.roster.number(identity)
        if number is None:
            newcomers[identity] = num_examples
        elif self.roster.sizes[number] != num_examples:
            self._refuse(
                address,
                f"Site {identity!r} has {num_examples} training examples, and had {self.roster.sizes[number]} when it"
                " joined: weights and streams depend on them. Give it the same data, or start a new run.",
            )
            return
        self._addresses[identity] = address

    def _refuse(self, address: str, reason: str) -> None:
        self._refused[address] = reason
        self._warnings.warn(f"refused {address}", reason)

    # ------------------------------------------------------------------ a run

    def begin(self, federation: Federation) -> None:
        """Let a federation's clients be the sites.

        Args:
            federation: The federation that the trainer has built.
        """
        federation.engine = RemoteEngine(federation, self.roster, self.exchange)
        self._federation = federation

    def welcome(self) -> None:
        """Before a round, find out who is there, and admit sites that are not in the roster."""
        for identity, num_examples in self._look_around().items():
            reason = self._admit(identity, num_examples)
            if reason is not None:
                self._refuse(self._addresses.pop(identity), f"Site {identity!r} cannot join: {reason}")
        if not any(identity in self._addresses for identity in self.roster.identities):
            rank_zero_info(f"No site is there; waiting for one, {self.wait_timeout:.0f} s at most.")
            self._meet()

    def _admit(self, identity: str, num_examples: int) -> str | None:
        """Admit a site that comes after the first round.

        Returns:
            Why it cannot be; ``None`` if it was.
        """
        federation = self._federation
        assert federation is not None
        if federation.shared_states.sharing:
            names = ", ".join(type(objective).__name__ for objective in federation.shared_states.sharing)
            return f"{names} averages states over all sites, whose number must not change."
        sizes = torch.tensor([*self.roster.sizes, num_examples])
        try:
            LocalPlan.of(federation.options, None, len(sizes))
            state = federation.rule.admit(federation.rule.state, sizes)
        except ValueError as error:
            return str(error)
        federation.rule.state = state
        federation.data.append(num_examples)
        find_history(callbacks_of(self.trainer)).admit(num_examples)
        number = self.roster.add(identity, num_examples)
        rank_zero_info(f"Site {identity!r} with {num_examples} samples has joined as client {number}.")
        return None

    def exchange(self, task: Task, messages: Mapping[int, Message]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Carry messages to clients, and yield the contents of the replies in the order of the messages.

        Args:
            task: What is asked for.
            messages: A message for each client.
        """
        clients: dict[str, int] = {}
        for client in messages:
            identity = self.roster.identities[client]
            if identity in self._addresses:
                clients[self._addresses[identity]] = client
            else:
                self._warn(client, f"was not there when it was asked to {task}")
        by_address = {address: messages[client] for address, client in clients.items()}
        answered: set[int] = set()
        failures: list[str] = []
        for address, reply in self.sites.ask(task, by_address, self.round_timeout):
            client = clients[address]
            answered.add(client)
            try:
                if reply.error:
                    raise ValueError(f"it failed: {reply.error}")
                content = unpacked(reply)
            except ValueError as error:
                failures.append(
                    f"Site {self.roster.identities[client]!r} (client {client}) is left out: {_without_stop(error)}."
                )
                self._warnings.warn(f"failed {client}", failures[-1])
                continue
            yield client, content
        if failures and len(failures) == len(messages):
            raise RuntimeError(f"All sites failed when they were asked to {task}. {failures[0]}")
        for client in clients.values():
            if client not in answered:
                self._warn(client, f"did not answer within {self.round_timeout:.0f} s when it was asked to {task}")

    def _warn(self, client: int, event: str) -> None:
        identity = self.roster.identities[client]
        self._warnings.warn(f"absent {identity}", f"Site {identity!r} (client {client}) {event}.")


class _ServerCallback(pl.Callback):
    """Connects a run with the server side, and keeps the roster in its checkpoints.

    Args:
        side: The server side.
    """

    state_key = "lightning_fedhaw.Roster"

    def __init__(self, side: ServerSide) -> None:
        self.side = side

    def on_federation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, federation: Federation) -> None:
        """Let the clients be the sites."""
        if trainer.global_step == 0:
            self.side.roster.forget_rounds()
        self.side.begin(federation)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out who is there."""
        self.side.welcome()

    def state_dict(self) -> dict[str, Any]:
        """Return the roster."""
        return self.side.roster.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the roster of the checkpoint."""
        self.side.roster.load_state_dict(state_dict)


def rounds_done(folder: str | Path) -> int:
    """Return the number of rounds whose checkpoint a server has written, also from another process.

    Args:
        folder: The ``folder`` of a :class:`ServerSide`, which need not exist yet.
    """
    path = Path(folder) / LAST_CHECKPOINT
    if not path.exists():
        return 0
    with path.open("rb") as file:
        checkpoint: Any = load_checked(file, str(path))
    return int(checkpoint["global_step"])


def _number_of_sites(num_sites: int | None, num_clients: int | None) -> int:
    """Return the number of sites to wait for."""
    if num_sites is None and num_clients is None:
        raise ValueError(
            "`num_sites` must say how many sites take part, got none. Set it, or the trainer's `num_clients`."
        )
    return arguments.integer("num_sites", num_clients if num_sites is None else num_sites, minimum=1)


def _without_stop(error: Exception) -> str:
    """Return an error's sentence as a part of another one."""
    return str(error).rstrip(".")
