"""The client side of a deployment: the simulator's local training, for one site and one message at a time."""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.site import options_of, run_at_site
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of
from lightning_fedhaw.clients.engine import ClientTask
from lightning_fedhaw.clients.evaluation import ClientEvaluation
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.deploy.agreement import terms_of
from lightning_fedhaw.deploy.messages import Message, packed, unpacked
from lightning_fedhaw.deploy.training_state import scale_from, sent_state, state_from
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.files import load_checked, write_bytes

MEMORY_FILE = "memory.pt"
"""The file in ``memory_folder`` with what a site keeps."""

MakeTrainer = Callable[[], pl.Trainer]
MakeModel = Callable[[], pl.LightningModule]


class ClientSide:
    """A site: it trains and evaluates the models that a server sends, with the simulator's own engine and streams.

    Every message is answered by a new trainer and a copy of the model, so a site may be a process that lives as long as
    a federation, or a new one for every message. What it keeps between rounds (an optimizer's state, states of client
    objectives, local parameters and buffers) is its memory, which is given and returned.

    Args:
        make_trainer: Makes the trainer, with the same arguments and callbacks as on the server. Its loggers,
            checkpoints and progress bars are left out.
        make_model: Makes the model, by the same code as on the server.
        make_data: Returns the site's data: a ``LightningDataModule`` or a ``DataLoader``, as ``fit`` takes them.
        name: The site's name, by which the server knows it again. Default: the engine's own identity of the site.
        memory_folder: The folder where the memory is kept, so that it survives the end of the process. Default: the
            engine keeps it as long as the process lives.

    Example:
        >>> site = ClientSide(make_trainer, make_model, make_data, name="hospital-a")  # doctest: +SKIP
    """

    def __init__(
        self,
        make_trainer: MakeTrainer,
        make_model: MakeModel,
        make_data: Callable[[], Any],
        *,
        name: str | None = None,
        memory_folder: str | Path | None = None,
    ) -> None:
        self.make_trainer: MakeTrainer = arguments.function("make_trainer", make_trainer, "make_trainer()")
        self._make_model: MakeModel = arguments.function("make_model", make_model, "make_model()")
        self._make_data = arguments.function("make_data", make_data, "make_data()")
        self.name = arguments.optional(arguments.text, "name", name)
        self._memory_file = Path(memory_folder) / MEMORY_FILE if memory_folder is not None else None
        self._model: pl.LightningModule | None = None
        self._data: Any = None

    def answer(self, task: str, message: Message, memory: bytes | None = None) -> tuple[Message, bytes | None]:
        """Do what the server asks for.

        Args:
            task: ``"query"``, ``"train"`` or ``"evaluate"``.
            message: The server's message.
            memory: What the site has kept; not used with ``memory_folder``.

        Returns:
            The reply, which holds the error if the work failed; and what the site keeps from now on, ``None`` if that
            has not changed.
        """
        try:
            if self._memory_file is not None:
                memory = self._memory_file.read_bytes() if self._memory_file.exists() else None
            work = _WORKS[task](unpacked(message), memory)
            trainer = self.make_trainer()
            module = self._copy_of_model()
            if task == "query":
                work.reply["name"] = self.name
                work.reply["terms"] = terms_of(module, callbacks_of(trainer), options_of(trainer))
            run_at_site(trainer, module, self._data, work)
            reply = packed(work.reply)
        except Exception as error:  # the user's code runs, which may raise anything; the server names the site
            return Message(error=f"{type(error).__name__}: {error}"), None
        if self._memory_file is not None and work.memory is not None:
            if self._memory_file.exists() and work.is_overtaken(self._memory_file.read_bytes()):
                return Message(error="a later round has begun meanwhile"), None
            write_bytes(self._memory_file, work.memory)
        return reply, work.memory

    def _copy_of_model(self) -> pl.LightningModule:
        """Return a copy of the model as it was made, so that no message depends on an earlier one."""
        if self._model is None:
            self._model = self._make_model()
            self._data = self._make_data()
        return copy.deepcopy(self._model)


class _Work(ABC):
    """A piece of work of a site.

    Args:
        content: The content of the server's message.
        memory: What the site has kept.

    Attributes:
        reply: The content of the reply.
        memory: What the site keeps from now on; ``None`` if that has not changed.
    """

    def __init__(self, content: Mapping[str, Any], memory: bytes | None) -> None:
        self.content = content
        self.round = int(content["round"])
        self.num_clients = int(content["num_clients"])
        self.client = int(content["client"])
        self.seed = int(content["seed"])
        self.reply: dict[str, Any] = {}
        self.memory: bytes | None = None
        self._kept = memory

    def prepare(self, federation: Federation) -> None:
        """Install the model and the buffers that the server has sent, and what the site remembers."""
        server = federation.server
        start = self._start(federation)
        buffers = dict(server.buffers)
        for name, value in self.content["buffers"].items():
            _check_shape(name, value, buffers.get(name))
            buffers[name] = value.to(federation.host.device)
        server.install(start, buffers)
        self._remember(federation)

    @abstractmethod
    def do(self, federation: Federation) -> None:
        """Do the work."""

    def _start(self, federation: Federation) -> Tensor:
        """Return the parameters ``[P]`` that the server has sent.

        Raises:
            ValueError: If they are those of another model.
        """
        layout = federation.layout
        sent = self.content["parameters"]
        tensors = []
        for name, present in zip(layout.names, layout.tensors(federation.host.module), strict=True):
            _check_shape(name, sent.get(name), present)
            tensors.append(sent[name].to(federation.host.device))
        return layout.read(tensors)

    # ------------------------------------------------------------------ what a site keeps

    def _remember(self, federation: Federation) -> None:
        """Load what the site kept when the server received its last update.

        Raises:
            ValueError: If the site does not have it.
        """
        last_received = int(self.content["received"])
        self._earlier: dict[int, Any] = {}
        if last_received < 0:
            return
        kept: dict[str, Any] = {}
        if self._kept is not None:
            kept = load_checked(io.BytesIO(self._kept), MEMORY_FILE)  # type: ignore[assignment]
        if kept.get("run") == self.content["run"] and last_received in kept["rounds"]:
            state = kept["rounds"][last_received]
            self._earlier[last_received] = state
            federation.run_state.load_entries(state["entries"], federation.engine)
            federation.engine.attributes.load_state_dict(state["entries"]["attributes"])
            for objective, states in zip(federation.engine.objectives, state["objectives"], strict=True):
                objective.load_state_dict({"clients": states})
        elif self.content["remembers"]:
            raise ValueError(
                f"the site has lost what it kept after round {last_received} (states of optimizers or objectives, local"
                " parameters), and cannot go on with other values. Keep it in files by `memory_folder=`, or start a new"
                " run"
            )

    def is_overtaken(self, memory: bytes) -> bool:
        """Return whether what the site keeps is of a later round of this run, because this one took too long."""
        kept: Any = load_checked(io.BytesIO(memory), MEMORY_FILE)
        is_of_this_run: bool = kept["run"] == self.content["run"]
        return is_of_this_run and max(kept["rounds"]) > self.round

    def _keep(self, federation: Federation) -> bool:
        """Keep the state after this round, and the one before it, in case the server does not receive the update.

        Returns:
            Whether there is anything to keep.
        """
        engine = federation.engine
        entries = federation.run_state.entries(engine)
        objectives = [objective.state_dict().get("clients", {}) for objective in engine.objectives]
        is_empty = not any(objectives)
        for name in ("optimizers", "buffers", "local_parameters"):
            is_empty = is_empty and not entries[name]
        is_empty = is_empty and not any(entries["attributes"]["kept"].values())
        if is_empty:
            return False
        rounds = {**self._earlier, self.round: {"entries": entries, "objectives": objectives}}
        file = io.BytesIO()
        torch.save({"run": self.content["run"], "rounds": rounds}, file)
        self.memory = file.getvalue()
        return True


class _Query(_Work):
    """The site introduces itself, and counts its examples."""

    def prepare(self, federation: Federation) -> None:
        """Install nothing: the site has no number yet."""

    def do(self, federation: Federation) -> None:
        """Count the examples."""
        self.reply["num_examples"] = len(federation.data.train_indices[self.client])


class _Training(_Work):
    """The site's local training in a round."""

    def do(self, federation: Federation) -> None:
        """Train, and reply with what the simulator's server receives."""
        engine = federation.engine
        device = federation.host.device
        engine.restore_end_state([state_from(self.content["begin"])])
        for objective, mean in zip(federation.shared_states.sharing, self.content["means"], strict=True):
            objective.mean = {name: value.to(device) for name, value in mean.items()}
        federation.local_training.show(federation.rule, *engine.objectives)
        engine.lr_scale = scale_from(self.content["lr_scale"], device)
        start = federation.server.parameters()
        slot = torch.empty_like(start)
        task = ClientTask(self.client, start, federation.buffers.start(self.client), lambda: slot)
        with closing(engine.run([task])) as updates:
            update = next(updates)
            # Now, while the module holds the client's model.
            self._read_model(federation, update)
            update = federation.training.initial_losses.added_to(update, {self.client: start})
            self._read(federation, update)
            engine.commit(update)
        end = engine.end_state()
        engine.restore_end_state([end])
        self.reply["end"] = sent_state(end)
        self.reply["remembers"] = self._keep(federation)

    def _read_model(self, federation: Federation, update: ClientUpdate) -> None:
        """Put the client's model into the reply, in its own types."""
        layout = federation.layout
        parameters = {}
        for name, tensor in zip(layout.names, layout.tensors(federation.host.module), strict=True):
            parameters[name] = tensor.detach().clone()
        self.reply["parameters"] = parameters
        self.reply["buffers"] = {name: update.buffers[name] for name in federation.buffers.averaged}

    def _read(self, federation: Federation, update: ClientUpdate) -> None:
        """Put the numbers of an update into the reply, and the changes of shared states."""
        for name in ("num_examples", "num_steps", "num_skipped", "num_batches", "lr_scale", "initial_loss"):
            self.reply[name] = getattr(update, name)
        self.reply["nonfinite"] = federation.screening.nonfinite_content(update)
        self.reply["changes"] = federation.shared_states.changes(update)
        self.reply["logged"] = _logged(update)


class _Evaluation(_Work):
    """The evaluation of the global model on the site's own data."""

    def do(self, federation: Federation) -> None:
        """Evaluate, and reply with the metrics."""
        own = federation.run_state.own_tensors(federation.engine)
        moving = federation.layout.frozen_parameters
        evaluation = ClientEvaluation(
            federation.host, federation.data, federation.ranks, self.seed, own, moving, self.content["batch_size"]
        )
        (share,) = evaluation.measure([self.client])
        self.reply["row"] = dict(share.rows[0])
        self.reply["higher_is_better"] = dict(share.higher_is_better)
        self.reply["num_examples"] = int(federation.data.num_evaluation_examples[self.client])


_WORKS: dict[str, type[_Work]] = {"query": _Query, "train": _Training, "evaluate": _Evaluation}


def _logged(update: ClientUpdate) -> dict[str, list[Any]]:
    """Return what a client logged as plain values; a metric by its value on the client's samples."""
    content = {}
    for name, logged in update.logged.items():
        if not isinstance(logged, Logged):
            continue
        if logged.metric is not None:
            assert not isinstance(logged.metric, str)
            value = float(logged.metric.compute())
            logged = replace(logged, total=value * update.num_examples, weight=float(update.num_examples), metric=None)
            content[name] = [logged.total, logged.weight, "mean", dict(logged.options), True]
            continue
        content[name] = [logged.total, logged.weight, logged.reduction, dict(logged.options), False]
    return content


def _check_shape(name: str, sent: Tensor | None, present: Tensor | None) -> None:
    """Refuse a tensor of another model."""
    if sent is None or present is None or sent.shape != present.shape:
        there = "missing" if sent is None else str(list(sent.shape))
        here = "missing" if present is None else str(list(present.shape))
        raise ValueError(f"the server's model is another one: its `{name}` is {there}, and the site's is {here}")
