"""Holds a package's own model to the promise that a LightningModule does not change: what every script here shares.

A script says how its package trains, as the package's documentation does it, and `hold` trains it several times from
the same seed: with the stock `Trainer`; with one client, which must end with the weights of the stock `Trainer`; and
with three clients through both entry points. One JSON line says what came of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_fedhaw import FedAvgCallback, FederatedTrainer, FedHAWCallback
from lightning_fedhaw.isolation import seed_randomness
from lightning_fedhaw.streams import seed_of

SEED = 7
EPOCHS = 2
TOLERANCE = 1e-6

NOT_OURS = ("does not have many workers", "`isinstance(treespec, LeafSpec)` is deprecated", "tensorboardX")
"""Warnings of Lightning itself that say nothing about the package or the federation."""


@dataclass
class Trained:
    """What a training run left.

    Attributes:
        trainer: The trainer that was used.
        module: The module it trained.
    """

    trainer: pl.Trainer
    module: pl.LightningModule

    @property
    def start(self) -> dict[str, Tensor]:
        """The trainable parameters before training."""
        return next(callback.parameters for callback in self.trainer.callbacks if isinstance(callback, Start))


class Start(pl.Callback):
    """Remembers the trainable parameters before training, so that a run that moves nothing is noticed."""

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy them."""
        self.parameters = parameters_of(pl_module)


class LikeOneClient(pl.Callback):
    """Gives a stock trainer the two things that tell it from a federation of one client; then both must be equal.

    - A client's local training starts each round in a random state of its own, from which dropout and the like draw.
    - The server adds the clients' displacements, weighted by their numbers of examples, to the model it sent out, and
      `start + n * (end - start) / n` is not always `end` in floating point. Adam and its kin turn a gradient that is
      zero but for rounding (that of a bias in front of a normalization) into a whole step, so the last bit may
      separate two runs.

    Args:
        examples: The number of training examples, where the training loader does not show it.
    """

    def __init__(self, examples: int | None = None) -> None:
        self.examples = examples

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the model."""
        self.start = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the epoch in the random state of a client's round."""
        if batch_idx == 0:
            seed_randomness(seed_of(SEED, "client", 0, "round", trainer.current_epoch, "model"), torch.device("cpu"))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round as the server does."""
        examples = float(self.examples or len(trainer.train_dataloader.dataset))
        trainable = [p for p in pl_module.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, start in zip(trainable, self.start, strict=True):
                total = (parameter - start) * examples
                parameter.copy_(total * (1.0 / examples) + start)


@dataclass
class Setting:
    """How to train this time.

    Attributes:
        trainer_class: The class of the trainer, for packages that let users make it.
        callbacks: What the one-line change adds to `callbacks=[...]`.
        comparable: Whether the result is compared with that of the stock trainer, so that whatever counts steps, such
            as a learning-rate schedule, has to be left out.
        epochs: Epochs, or rounds.
    """

    trainer_class: type[pl.Trainer] = pl.Trainer
    callbacks: list[pl.Callback] = field(default_factory=list)
    comparable: bool = False
    epochs: int = EPOCHS

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer, for packages that make it themselves."""
        return {
            "max_epochs": self.epochs,
            "accelerator": "cpu",
            "devices": 1,
            "callbacks": [*self.callbacks, Start()],
            "logger": CSVLogger(tempfile.mkdtemp()),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tempfile.mkdtemp(),
        }

    def trainer(self, **more: Any) -> pl.Trainer:
        """Make the trainer."""
        arguments = self.arguments
        callbacks = [*arguments.pop("callbacks"), *more.pop("callbacks", [])]
        return self.trainer_class(callbacks=callbacks, **{**arguments, **more})


Train = Callable[[Setting], Trained]


def fitted(
    setting: Setting, module: pl.LightningModule, *data: Any, more: Mapping[str, Any] = {}, **fit: Any
) -> Trained:
    """Train a module as most documentation does: make a trainer, and call `fit`."""
    trainer = setting.trainer(**more)
    trainer.fit(module, *data, **fit)
    return Trained(trainer, module)


def parameters_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the trainable parameters, in float64."""
    return {name: p.detach().double().clone() for name, p in module.named_parameters() if p.requires_grad}


def buffers_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the buffers, in float64."""
    return {name: b.detach().double().clone() for name, b in module.named_buffers()}


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Find the largest difference of two sets of tensors.

    Raises:
        AssertionError: If their names differ.
    """
    assert first.keys() == second.keys(), f"other tensors: {sorted(first.keys() ^ second.keys())}"
    largest = 0.0
    for name, tensor in first.items():
        if tensor.numel():
            largest = max(largest, float((tensor - second[name]).abs().nan_to_num(nan=0.0).max()))
    return largest


def hold(
    package: str,
    train: Train,
    *,
    case: str = "",
    as_documented: Train | None = None,
    own_trainer: bool = True,
    rule_arguments: Mapping[str, Any] | None = None,
    why_not_equal: str = "",
    others: tuple[str, ...] = (),
) -> None:
    """Train in all ways and print what came of it as one JSON line.

    Args:
        package: The package's name in the registry.
        train: Trains the package's model on its data as the setting says.
        case: What is trained, where the script tries several models.
        as_documented: How the package's documentation trains, where `train` had to depart from it.
        own_trainer: Whether users make the trainer, so that it can be a `FederatedTrainer`.
        rule_arguments: Further arguments of the rule, such as a partitioner, that the package needs. The last run, as
            documented and with all defaults of `FedHAWCallback()`, does without.
        why_not_equal: Why one client alone does not end with the weights of the stock trainer, if that is expected.
        others: More packages whose versions matter.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    versions = {name: importlib.metadata.version(name) for name in (package, *others, "torch", "lightning")}
    rule_arguments = rule_arguments or {}
    line: dict[str, Any] = {"package": package, "case": case, "versions": versions}
    line["rule arguments"] = {name: str(value) for name, value in rule_arguments.items()}
    line["why not equal"] = why_not_equal
    begin = time.process_time()
    _try_one_client(line, train, rule_arguments)
    for name, rule in (("FedAvg", FedAvgCallback), ("FedHAW", FedHAWCallback)):
        _try_three_clients(line, f"three clients, {name}", train, rule, rule_arguments, own_trainer)
    federated = _attempt(line, "as documented", as_documented or train, Setting(callbacks=[FedHAWCallback()]))
    if federated is not None:
        line["as documented"] = _outcome(federated)
    line["seconds of CPU"] = round(time.process_time() - begin, 1)
    line["as promised"] = _as_promised(line)
    del line["known warnings"]
    print(json.dumps({key: value for key, value in line.items() if value not in ("", {})}))


def _try_one_client(line: dict[str, Any], train: Train, rule_arguments: Mapping[str, Any]) -> None:
    """Compare one client alone with the stock trainer, and that with itself."""
    rule = FedAvgCallback(num_clients=1, optimizer_state="kept", **rule_arguments)
    stock = _attempt(line, "stock", train, Setting(comparable=True))
    again = _attempt(line, "stock again", train, Setting(comparable=True))
    like_one = _attempt(line, "stock like one client", train, Setting(callbacks=[LikeOneClient()], comparable=True))
    alone = _attempt(line, "one client", train, Setting(callbacks=[rule], comparable=True))
    if stock is not None and again is not None:
        line["stock again"] = _compare(stock, again)
    if stock is not None and alone is not None:
        line["one client"] = _compare(stock, alone)
    if like_one is not None and alone is not None:
        line["one client to stock like one client"] = _compare(like_one, alone)


def _try_three_clients(
    line: dict[str, Any], key: str, train: Train, rule: Any, rule_arguments: Mapping[str, Any], own_trainer: bool
) -> None:
    """Train with three clients through both entry points, whose weights must be equal."""
    first = _attempt(line, key, train, Setting(callbacks=[rule(num_clients=3, **rule_arguments)]))
    if first is not None:
        line[key] = _outcome(first)
    if not own_trainer:
        return
    other_key = f"{key}, FederatedTrainer"
    second = _attempt(line, other_key, train, Setting(_three_clients(rule_arguments), [rule()]))
    if second is not None:
        line[other_key] = _outcome(second)
    if first is not None and second is not None:
        difference = largest_difference(parameters_of(first.module), parameters_of(second.module))
        line[other_key]["to the rule in a stock Trainer"] = difference


def _three_clients(rule_arguments: Mapping[str, Any]) -> type[pl.Trainer]:
    class ThreeClients(FederatedTrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(num_clients=3, **rule_arguments, **arguments)

    return ThreeClients


def _attempt(line: dict[str, Any], key: str, train: Train, setting: Setting) -> Trained | None:
    """Train with the same seed as every other run; keep the sentence of an error, and all warnings of ours."""
    pl.seed_everything(SEED, verbose=False)
    with _warnings(line, key):
        try:
            return train(setting)
        except Exception as error:
            sentence = str(error).split("\n")[0][:400]
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            line.setdefault("errors", {})[key] = f"{type(error).__name__}: {sentence} ({place})"
            return None


@contextmanager
def _warnings(line: dict[str, Any], key: str) -> Iterator[None]:
    """Keep the warnings that a run with the stock trainer did not give."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = {str(w.message).split("\n")[0][:300] for w in caught}
    texts = {text for text in texts if not any(part in text for part in NOT_OURS)}
    known = line.setdefault("known warnings", set())
    if key.startswith("stock"):
        known |= texts
    for text in sorted(texts - known):
        keys = line.setdefault("warnings", {}).setdefault(text, [])
        keys.append(key)


def _compare(stock: Trained, other: Trained) -> dict[str, Any]:
    difference = largest_difference(parameters_of(stock.module), parameters_of(other.module))
    buffers = largest_difference(buffers_of(stock.module), buffers_of(other.module))
    result = {"difference": difference, "buffers": buffers, "lost metrics": _lost_metrics(stock.trainer, other.trainer)}
    result["moved"] = largest_difference(stock.start, parameters_of(stock.module))
    return result


def _lost_metrics(stock: pl.Trainer, other: pl.Trainer) -> list[str]:
    """List the metrics that the stock trainer has as a number and the other trainer has not."""
    after = _numbers(other)
    return sorted(
        name
        for name, value in _numbers(stock).items()
        if math.isfinite(value) and not math.isfinite(after.get(name, math.nan))
    )


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _outcome(trained: Trained) -> dict[str, Any]:
    summary = trained.trainer.federation_summary  # type: ignore[attr-defined]
    finite = all(bool(p.isfinite().all()) for p in parameters_of(trained.module).values())
    return {
        "rounds": trained.trainer.global_step,
        "finite": finite,
        "logged": len(trained.trainer.callback_metrics),
        "clients measured on": list(summary["client_metrics"]),
    }


def _as_promised(line: dict[str, Any]) -> bool:
    """Say whether nothing failed, all numbers are there, and one client alone ends where the stock trainer ends."""
    if "errors" in line or line["one client"]["lost metrics"]:
        return False
    if not all(line[f"three clients, {name}"]["finite"] for name in ("FedAvg", "FedHAW")):
        return False
    equal = line["one client to stock like one client"]["difference"] <= TOLERANCE
    return bool(equal or line["why not equal"])
