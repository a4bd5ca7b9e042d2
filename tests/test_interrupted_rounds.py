"""A run that is interrupted at any point of a round, and goes on: every round is run and counted once."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from federations import QUIET, Classifier, flat, loader, trainer, val_loader
from lightning_fedhaw import AvailabilityChannel, FedAvgCallback, FedAvgMCallback, FedHAWCallback
from lightning_fedhaw.report.history import RunHistory, find_history

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")

ROUNDS = 4
FAILS_IN = 2


class Plug:
    """Raises an error once, where and when it is asked to."""

    def __init__(self, place: str | None, error: type[BaseException] = RuntimeError):
        self.place = place
        self.error = error

    def pull(self, place: str, round_idx: int) -> None:
        if place == self.place and round_idx == FAILS_IN:
            self.place = None
            raise self.error("pulled the plug")


class Net(Classifier):
    """Fails in a client's batch or in the validation."""

    def __init__(self, plug: Plug):
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), norm=True, dropout=0.2)
        # Not an attribute of the module, which the undo of a round would plug in again.
        self.pull = plug.pull

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            self.pull("training_step", self.trainer.current_epoch)
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and self.trainer.state.fn == "fit":
            self.pull("validation_step", self.trainer.current_epoch)


class Rule(FedAvgCallback):
    """Fails on the server."""

    key = "FedAvgCallback"

    def __init__(self, plug: Plug, **options: Any):
        super().__init__(**options)
        self.pull = plug.pull

    def step(self, cohort: Any, state: Any, server: Any) -> Any:
        self.pull("step", cohort.round)
        return super().step(cohort, state, server)


class Keep(ModelCheckpoint):
    """Fails when it saves."""

    def __init__(self, plug: Plug):
        super().__init__("kept", "{step}", save_top_k=-1)
        self.pull = plug.pull

    def _save_checkpoint(self, trainer: pl.Trainer, path: str) -> None:
        self.pull("save", trainer.current_epoch)
        super()._save_checkpoint(trainer, path)


class SavesBroken(pl.Callback):
    """As Lightning's own callback, whose file the next `fit` of the same trainer would take without being asked."""

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint("broken.ckpt")


HOOKS = (
    *("on_train_epoch_start", "on_round_start", "on_client_start", "on_client_end", "on_round_end"),
    *("on_validation_start", "on_validation_end", "on_train_epoch_end"),
)
PLACES = (*HOOKS, "training_step", "step", "validation_step", "save")


class Pulls(pl.Callback):
    """Fails in a hook."""

    def __init__(self, plug: Plug):
        for hook in HOOKS:
            setattr(self, hook, self._puller(hook, plug))

    def _puller(self, hook: str, plug: Plug) -> Any:
        def pull(trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking and trainer.state.fn == "fit":
                plug.pull(hook, trainer.current_epoch)

        return pull


OPTIONS = {"num_clients": 4, "alpha": 10.0, "clients_per_round": 3, "optimizer_state": "kept", "client_eval": False}


def made(plug: Plug, door: int = 1) -> tuple[pl.Trainer, pl.LightningModule]:
    own = [Pulls(plug), Keep(plug), SavesBroken()]
    if door == 1:
        return trainer(ROUNDS, Rule(plug), own, **{**OPTIONS, "enable_checkpointing": True}), Net(plug)
    quiet = {**QUIET, "enable_checkpointing": True}
    return pl.Trainer(max_epochs=ROUNDS, callbacks=[Rule(plug, **OPTIONS), *own], **quiet), Net(plug)


def fit(runner: pl.Trainer, module: pl.LightningModule, path: Any = None, fails: bool = False) -> dict[str, Any]:
    """Fit, and return everything that belongs to the rounds."""
    expected = contextlib.nullcontext()
    if fails:
        # Lightning ends the process after Ctrl+C.
        expected = pytest.raises((RuntimeError, SystemExit))
    with expected:
        runner.fit(module, loader(80, drop_last=True), val_loader(), ckpt_path=path)
    (history,) = [callback for callback in runner.callbacks if isinstance(callback, RunHistory)]
    tally = runner.fit_loop.federation.tally.state_dict()
    del tally["seconds"]
    return {
        "rounds": (runner.global_step, runner.current_epoch),
        "tally": tally,
        "rows": [dict(row) for row in history.metrics],
        "weights": history.weights.nan_to_num(-1).tolist(),
        "model": flat(module).tolist(),
        "modes": [layer.training for layer in module.modules()],
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("straight")):
        torch.manual_seed(0)
        return fit(*made(Plug(None)))


@pytest.mark.parametrize("place", PLACES)
def test_every_round_is_played_and_counted_once(place, straight):
    plug = Plug(place)
    runner, module = made(plug)
    fit(runner, module, fails=True)
    assert plug.place is None, "the plug was pulled"
    newest = sorted(Path("kept").iterdir())[-1]
    assert fit(*made(Plug(None)), path="broken.ckpt") == straight
    assert fit(*made(Plug(None)), path=newest) == straight
    # Without a checkpoint the same trainer goes on from what it has in memory.
    assert fit(runner, module) == straight


@pytest.mark.parametrize("place", ["training_step", "on_round_end", "validation_step", "on_train_epoch_end"])
def test_ctrl_c_loses_and_doubles_nothing(place, straight):
    handler = signal.getsignal(signal.SIGINT)
    runner, module = made(Plug(place, KeyboardInterrupt), door=2)
    try:
        fit(runner, module, fails=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert fit(*made(Plug(None), door=2), path="broken.ckpt") == straight


def test_a_round_that_failed_is_in_no_count_and_no_row():
    runner, module = made(Plug("on_round_end"))
    fit(runner, module, fails=True)
    (history,) = [callback for callback in runner.callbacks if isinstance(callback, RunHistory)]
    tally = runner.fit_loop.federation.tally
    assert len(history.metrics) == len(history.weights) == FAILS_IN
    assert tally.received == 3 * FAILS_IN
    assert tally.bytes_up == FAILS_IN * history.metrics[0]["bytes_up"]


class OneByOne:
    """Draws one client after the other."""

    def sample(self, round_idx, *, num_clients, sizes, seed):
        return [round_idx % num_clients]


def test_weights_of_earlier_rounds_clients_are_gone():
    class Sees(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            names = {**trainer.callback_metrics, **trainer.logged_metrics, **trainer.progress_bar_metrics}
            self.seen.append(sorted(name for name in names if "/client_" in name))

    sees = Sees()
    trainer(3, FedHAWCallback(), [sees], sampler=OneByOne(), client_eval=False).fit(Classifier(), loader(60))
    assert [[name for name in names if name.startswith("weight/")] for names in sees.seen] == [
        ["weight/client_0"],
        ["weight/client_1"],
        ["weight/client_2"],
    ]


def with_a_round_without_clients(rounds: int, ckpt_path: str | None = None) -> pl.Trainer:
    """All clients are available in round 0 and none in round 1; a callback needs the loss in every round."""
    runner = trainer(
        rounds=rounds,
        rule=FedAvgMCallback(),
        callbacks=[
            AvailabilityChannel([[1, 1, 1, 1], [0, 0, 0, 0]]),
            EarlyStopping("train_loss", patience=5, check_on_train_epoch_end=True),
        ],
        num_clients=4,
    )
    runner.fit(Classifier(), loader(), ckpt_path=ckpt_path)
    return runner


@pytest.mark.filterwarnings("ignore:No client update was received in round 1")
def test_a_skipped_round_after_a_resume_shows_what_an_uninterrupted_run_shows(tmp_path):
    path = str(tmp_path / "one.ckpt")
    with_a_round_without_clients(1).save_checkpoint(path)
    resumed = with_a_round_without_clients(2, path)
    straight = with_a_round_without_clients(2)
    assert resumed.callback_metrics.keys() == straight.callback_metrics.keys() >= {"train_loss"}
    assert resumed.callback_metrics["train_loss"] == straight.callback_metrics["train_loss"]
    assert resumed.federation_summary["metrics"].keys() == straight.federation_summary["metrics"].keys()
    for runner in (resumed, straight):
        rows = find_history(runner.callbacks).metrics
        assert "train_loss" in rows[0]
        assert "train_loss" not in rows[1], "no client trained in this round"
