"""A run that is stopped and resumed, compared with the same run without a break."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from federations import Classifier, trainer
from lightning_fedhaw.extending import ClientVectors

ROUNDS = 3
COMBINATIONS = tuple(itertools.product(("sequential", "vectorized"), ("32-true", "64-true", "bf16-true", "bf16-mixed")))
"""Engines and precisions."""


def rotated(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return each name with one engine and precision, all of which occur among several names."""
    return [(name, *combination) for name, combination in zip(names, itertools.cycle(COMBINATIONS))]


class Scheduled(Classifier):
    """Learning rate and momentum differ from round to round; the model can be called, and computes in any precision."""

    def __init__(self, hidden: int = 4, **kwargs: Any):
        super().__init__(partial(torch.optim.SGD, lr=0.05, momentum=0.5), hidden=hidden, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[0].weight.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=ROUNDS, pct_start=0.5)
        return [optimizer], [schedule]


class SaveAfter(pl.Callback):
    """Writes a checkpoint after some rounds."""

    def __init__(self, rounds: int):
        self.rounds = rounds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.rounds:
            trainer.save_checkpoint("stopped.ckpt")


def end_of(callbacks: Sequence[pl.Callback], data: Any, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Fit, and return everything that a run leaves behind but the time that it took."""
    rule, *others = callbacks
    module = Scheduled()
    runner = trainer(ROUNDS, rule, others, client_eval=False, num_clients=4, **options)
    runner.fit(module, data, ckpt_path=ckpt_path)
    federation = runner.fit_loop.federation
    tally = federation.tally.state_dict()
    del tally["seconds"]
    states = {}
    for number, callback in enumerate(runner.callbacks):
        states[f"{number} {type(callback).__name__}"] = callback.state_dict()
    return {
        "model": dict(module.state_dict()),
        "server": federation.server.parameters(),
        "callbacks": states,
        "tally": tally,
        "optimizer": runner.optimizers[0].state_dict(),
        "rounds": (runner.global_step, runner.current_epoch),
        "logged": dict(runner.callback_metrics),
    }


def check_resume(make: Callable[[], Sequence[pl.Callback]], data: Any, **options: Any) -> None:
    """Compare a run that was stopped and resumed with the same run without a break.

    It is stopped after the first round with precisions of the model, and after the second one otherwise.

    Args:
        make: Makes the callbacks; the first is the rule.
        data: The data.
        options: Those of the trainer.
    """
    stop = 2
    if options["precision"] in ("64-true", "bf16-true"):
        stop = 1
    straight = end_of([*make(), SaveAfter(stop)], data, **options)
    resumed = end_of([*make(), SaveAfter(0)], data, "stopped.ckpt", **options)
    assert_same(straight, resumed)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Compare two trees to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key, value in a.items():
            assert_same(value, b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for position, value in enumerate(a):
            assert_same(value, b[position], f"{path}/{position}")
    elif isinstance(a, ClientVectors):
        assert_same(a.state_dict(), b.state_dict(), path)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), path
    else:
        # NaN is the number that differs from itself.
        assert a == b or (a != a and b != b), (path, a, b)
