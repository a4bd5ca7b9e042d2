"""Deployments in memory: the sites of a small federation, and the same federation simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from federations import QUIET, Classifier, samples
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.deploy import ClientSide, InMemorySites, Message, ServerSide

DATA = samples(30)
PARTS = [Subset(DATA, range(0, 7)), Subset(DATA, range(7, 19)), Subset(DATA, range(19, 30))]
PROXY = samples(12, seed=4)
NAMES = ["a", "b", "c"]


class Plain(Classifier):
    """A small module that can be called, without metrics of torchmetrics."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        del self.accuracy

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


MakeCallbacks = Callable[[], Sequence[pl.Callback]]


def make_trainer(callbacks: MakeCallbacks, rounds: int = 2, **options: Any) -> FederatedTrainer:
    """A quiet trainer with new callbacks."""
    return FederatedTrainer(rounds=rounds, callbacks=list(callbacks()), **{"client_eval": False, **QUIET, **options})


def client_side(callbacks: MakeCallbacks, model: Any = Plain, part: int = 0, **kwargs: Any) -> ClientSide:
    """A site with the data of one client."""
    side = {name: kwargs.pop(name) for name in ("name", "memory_folder") if name in kwargs}
    data = kwargs.pop("data", None) or (lambda: DataLoader(PARTS[part], batch_size=4, shuffle=True))
    return ClientSide(partial(make_trainer, callbacks, **kwargs), model, data, **{"name": NAMES[part], **side})


def in_memory(callbacks: MakeCallbacks, model: Any = Plain, parts: Sequence[int] = (0, 1, 2), **kwargs: Any):
    """Sites in memory; their addresses say nothing about their numbers."""
    return InMemorySites({f"node {9 - part}": client_side(callbacks, model, part, **kwargs) for part in parts})


def server_side(callbacks: MakeCallbacks, sites: Any, model: Any = Plain, **kwargs: Any) -> ServerSide:
    """A server that waits for nobody."""
    names = ("num_sites", "val", "proxy", "folder", "wait_timeout")
    side = {name: kwargs.pop(name) for name in names if name in kwargs}
    trainer = make_trainer(callbacks, seed=5, **kwargs)
    return ServerSide(trainer, model(), sites, **{"num_sites": 3, "wait_timeout": 0, **side})


def deploy(callbacks: MakeCallbacks, model: Any = Plain, sites: Any = None, **kwargs: Any) -> ServerSide:
    """Run a deployment in memory."""
    options = {name: value for name, value in kwargs.items() if name not in ("folder", "val", "proxy", "num_sites")}
    side = server_side(callbacks, sites or in_memory(callbacks, model, **options), model, **kwargs)
    side.fit()
    return side


def simulate(callbacks: MakeCallbacks, model: Any = Plain, val: Any = None, proxy: Any = None, **options: Any):
    """Run the same federation in the simulator; return trainer and module."""
    trainer = make_trainer(callbacks, seed=5, engine="sequential", **options)
    module = model()
    trainer.fit(module, FederatedDataModule(PARTS, batch_size=4, proxy=proxy, val=val))
    return trainer, module


def differences(side: ServerSide, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """What has other bits in a deployment than in a simulation: the model, the rule's state, what is logged."""
    different = []
    for name, value in module.state_dict().items():
        if not torch.equal(side.model.state_dict()[name], value):
            different.append(name)
    (rule,) = [callback for callback in trainer.callbacks if hasattr(callback, "step")]
    (rule_here,) = [callback for callback in side.trainer.callbacks if hasattr(callback, "step")]
    here = dict(leaves(rule_here.state_dict()))
    for path, value in leaves(rule.state_dict()):
        # What clients keep is at the sites.
        if "clients" not in path and not same(here.get(path), value):
            different.append(f"state {path}")
    for name, value in trainer.callback_metrics.items():
        if not same(side.trainer.callback_metrics.get(name), value):
            different.append(f"metric {name}")
    return different


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside of dictionaries and lists, by their path."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{path}/{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def same(first: Any, second: Any) -> bool:
    """Whether two values have the same bits."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    return type(first) is type(second) and repr(first) == repr(second)


class Scripted:
    """Sites whose replies a test changes: ``change(task, round, address, reply)`` returns a reply, or None for none."""

    def __init__(self, sites: InMemorySites, change: Callable[[str, int, str, Message], Message | None]):
        self.inner = sites
        self.change = change
        self.rounds = {"query": -1, "train": -1, "evaluate": -1}
        self.bytes = {"down": 0, "up": 0}

    def present(self) -> dict[str, str]:
        return self.inner.present()

    def ask(self, task: Any, messages: Mapping[str, Message], timeout: float) -> Iterator[tuple[str, Message]]:
        self.rounds[task] += 1
        for address, reply in self.inner.ask(task, messages, timeout):
            if task == "train":
                self.bytes["down"] += messages[address].num_bytes
                self.bytes["up"] += reply.num_bytes
            changed = self.change(task, self.rounds[task], address, reply)
            if changed is not None:
                yield address, changed
