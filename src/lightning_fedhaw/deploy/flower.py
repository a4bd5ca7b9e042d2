"""Deployment on Flower: a strategy whose rounds are those of a trainer, and a client app whose nodes are sites.

``flwr`` is imported when these functions are called. Nothing below ``flwr.app``, ``flwr.serverapp`` and
``flwr.clientapp`` is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_fedhaw.deploy.client_side import ClientSide
from lightning_fedhaw.deploy.engines import engine_module
from lightning_fedhaw.deploy.messages import Message
from lightning_fedhaw.deploy.server_side import ServerSide
from lightning_fedhaw.deploy.sites import Task
from lightning_fedhaw.report.history import find_history

__all__ = ["client_app", "flower_strategy"]

MEMORY = "lightning_fedhaw"
"""The record in a node's state with what the site keeps."""

POLL_SECONDS = 0.2
"""Seconds between two looks for a reply."""

MakeSite = Callable[[Mapping[str, Any], Mapping[str, Any]], ClientSide]


class GridSites:
    """The nodes of a Flower run as sites.

    A node's identity is the name with which its key was registered, else the name that its site gives itself, else the
    number of the node, which without a registered key is another one after every start.

    Args:
        grid: The grid of the ``ServerApp``.
    """

    def __init__(self, grid: Any) -> None:
        self.grid = grid
        self._app = engine_module("flwr.app")

    def present(self) -> dict[str, str]:
        """Return the nodes that are connected now, with the names of registered keys."""
        return {str(node.node_id): str(getattr(node, "name", "") or "") for node in self.grid.get_nodes()}

    def ask(self, task: Task, messages: Mapping[str, Message], timeout: float) -> Iterator[tuple[str, Message]]:
        """Send messages to nodes, and yield the replies in the order of the messages, one at a time.

        Replies that came early wait at the SuperLink, so that a rule that needs a sum only needs the memory of one.
        """
        if not messages:
            return
        requests = []
        for address, message in messages.items():
            content = to_record(self._app, message)
            requests.append(self._app.Message(content=content, dst_node_id=int(address), message_type=task))
        deadline = time.monotonic() + timeout
        message_ids = list(self.grid.push_messages(requests))
        for address, message_id in zip(messages, message_ids, strict=True):
            reply = None
            if message_id is not None:
                reply = self._pull(message_id, deadline)
            if reply is not None:
                yield address, reply

    def _pull(self, message_id: str, deadline: float) -> Message | None:
        """Wait for one reply; ``None`` if it does not come in time."""
        while True:
            for reply in self.grid.pull_messages([message_id]):
                if reply.has_error():
                    return Message(error=f"Flower says: {reply.error.reason or reply.error.code}")
                return from_record(reply.content)
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)


def flower_strategy(trainer: pl.Trainer, model: pl.LightningModule, **settings: Any) -> Any:
    """Make a Flower strategy of any rule.

    ``strategy.start(grid)`` waits for the nodes, and runs the rounds of the trainer, with its validation, loggers and
    callbacks.

    Args:
        trainer: The trainer, with a rule among its callbacks.
        model: The model.
        settings: Further arguments of :class:`~lightning_fedhaw.deploy.ServerSide`: ``num_sites``, ``folder``, ...

    Returns:
        A ``flwr.serverapp.strategy.Strategy``.

    Raises:
        ImportError: If ``flwr`` is not installed, or in a version that was not tried.

    Example:
        >>> strategy = flower_strategy(trainer, model, num_sites=3, folder="server")  # doctest: +SKIP
        >>> result = strategy.start(grid)  # doctest: +SKIP
    """
    app = engine_module("flwr.app")
    engine = engine_module("flwr.serverapp").strategy

    class FlowerStrategy(engine.Strategy):  # type: ignore[misc, name-defined]
        """A strategy whose rounds are those of a trainer."""

        def start(self, grid: Any, *_: Any, **arguments: Any) -> Any:
            """Run the rounds, and return Flower's record of them; all but the grid is the trainer's."""
            self._refuse(arguments)
            self.side = ServerSide(trainer, model, GridSites(grid), **settings)
            self.side.fit()
            result = engine.Result()
            result.arrays = app.ArrayRecord(model.state_dict())
            for round_idx, row in enumerate(find_history(trainer.callbacks).metrics):  # type: ignore[attr-defined]
                numbers = {name: float(value) for name, value in row.items()}
                result.train_metrics_clientapp[round_idx + 1] = app.MetricRecord(numbers)
            return result

        def _refuse(self, arguments: Mapping[str, Any]) -> None:
            """Refuse what the trainer says: a number of rounds, initial arrays and further arguments."""
            given = [name for name, value in arguments.items() if value is not None]
            if given:
                raise ValueError(
                    f"`{given[0]}` is the trainer's, which `start(grid)` runs: set `rounds`, loggers and validation"
                    " there, and load initial weights into the model."
                )

        def summary(self) -> None:
            """Say nothing: the trainer's start-up line does."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            """Refuse to be called: :meth:`start` runs the rounds."""
            raise NotImplementedError("The rounds are the trainer's. Call `strategy.start(grid)`.")

        aggregate_train = configure_train
        configure_evaluate = configure_train
        aggregate_evaluate = configure_train

    return FlowerStrategy()


def client_app(make_site: MakeSite) -> Any:
    """Make a Flower client app, whose nodes query, train and evaluate.

    Args:
        make_site: ``make_site(node_config, run_config)`` makes the client side of a node from the configurations of the
            node and of the run.

    Returns:
        A ``flwr.clientapp.ClientApp``.

    Raises:
        ImportError: If ``flwr`` is not installed, or in a version that was not tried.
    """
    app = engine_module("flwr.app")
    flower_app = engine_module("flwr.clientapp").ClientApp()
    # Where a process serves several messages or nodes.
    sites: dict[int, ClientSide] = {}

    def answer(message: Any, context: Any) -> Any:
        if context.node_id not in sites:
            sites[context.node_id] = make_site(context.node_config, context.run_config)
        site = sites[context.node_id]
        kept = context.state.get(MEMORY)
        task = message.metadata.message_type.partition(".")[0]
        memory = kept["memory"] if kept is not None else None
        reply, memory = site.answer(task, from_record(message.content), memory)
        if memory is not None:
            context.state[MEMORY] = app.ConfigRecord({"memory": memory})
        return app.Message(content=to_record(app, reply), reply_to=message)

    for register in (flower_app.query, flower_app.train, flower_app.evaluate):
        register()(answer)
    return flower_app


def to_record(app: Any, message: Message) -> Any:
    """Return a message as Flower's ``RecordDict``.

    Args:
        app: The module ``flwr.app``.
        message: The message.
    """
    arrays = app.ArrayRecord({name: app.Array(array) for name, array in message.arrays.items()})
    return app.RecordDict({"arrays": arrays, "text": app.ConfigRecord({"text": message.text, "error": message.error})})


def from_record(content: Any) -> Message:
    """Return the message in Flower's ``RecordDict``."""
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    return Message(arrays, str(content["text"]["text"]), str(content["text"]["error"]))
