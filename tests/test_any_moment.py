"""Checkpoints that are asked for while a round runs, and runs that are asked to end."""

import os
import signal
import sys
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from federations import QUIET, Classifier, flat, loader, trainer, val_loader
from lightning_fedhaw import FedAvgCallback, FedHAWCallback, ScaffoldCallback, SparsificationChannel
from lightning_fedhaw.report.history import RunHistory

engines = pytest.mark.parametrize("engine", ["sequential", "vectorized"])


class Scheduled(Classifier):
    """A module with a schedule, whose second round calls a function of the test once, in the middle of a step."""

    def __init__(self, interrupt=None):
        super().__init__()
        # Not an attribute, because those belong to the clients.
        os.environ.pop("INTERRUPTED", None)
        interrupts["now"] = interrupt

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        if interrupts["now"] and self.trainer.global_step == 1 and "INTERRUPTED" not in os.environ:
            os.environ["INTERRUPTED"] = "once"
            interrupts["now"](self)
        loss = torch.nn.functional.cross_entropy(self.net[1:](hidden), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


interrupts = {}


def federation(make_rule=FedAvgCallback, callbacks=(), **options):
    return trainer(rule=make_rule(), callbacks=callbacks, **{"num_clients": 2, "engine": "sequential", **options})


def fit(runner, module, ckpt_path=None):
    runner.fit(module, loader(32), val_loader(), ckpt_path=ckpt_path)
    return runner


def end(runner):
    """What a run ends with: the model, the history and the counts."""
    (history,) = [callback for callback in runner.callbacks if isinstance(callback, RunHistory)]
    tally = runner.fit_loop.federation.tally.state_dict()
    del tally["seconds"]
    return flat(runner.lightning_module).tolist(), history.metrics, str(history.weights.tolist()), tally


def save(module):
    module.trainer.save_checkpoint("now.ckpt")


def in_a_handler(module):
    """Save in a signal handler, which Python calls in the middle of the step."""
    before = signal.signal(signal.SIGUSR1, lambda *_: save(module))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def in_a_thread(module):
    thread = threading.Thread(target=save, args=(module,))
    thread.start()
    thread.join()


# ---------------------------------------------------------------------- whoever asks


@engines
@pytest.mark.parametrize("ask", [in_a_handler, in_a_thread])
@pytest.mark.parametrize(
    ("make_rule", "options"),
    [
        (FedAvgCallback, {"optimizer_state": "kept", "buffers": "local"}),
        (lambda: ScaffoldCallback(option="I"), {}),
        (lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1), {"callbacks": [SparsificationChannel(0.5)]}),
    ],
)
def test_a_checkpoint_in_the_middle_of_a_step_holds_the_last_full_round(engine, ask, make_rule, options):
    whole = end(fit(federation(make_rule, engine=engine, **options), Scheduled()))
    # The run itself does not notice.
    assert end(fit(federation(make_rule, engine=engine, **options), Scheduled(ask))) == whole
    checkpoint = torch.load("now.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 1)
    assert len(checkpoint["callbacks"]["History"]["metrics"]) == len(checkpoint["callbacks"]["History"]["weights"]) == 1
    assert end(fit(federation(make_rule, engine=engine, **options), Scheduled(), "now.ckpt")) == whole


def test_what_is_saved_in_the_middle_is_what_is_saved_between_rounds():
    class Between(pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.save_checkpoint("between.ckpt")

    fit(federation(callbacks=[Between()]), Scheduled(save))
    between, now = (torch.load(path, weights_only=True) for path in ("between.ckpt", "now.ckpt"))
    assert now.keys() == between.keys()
    for name in ("global_step", "optimizer_states", "lr_schedulers"):
        assert now[name] == between[name], name
    assert now["state_dict"].keys() == between["state_dict"].keys()
    for name, value in between["state_dict"].items():
        assert torch.equal(now["state_dict"][name], value), name
    assert now["loops"]["fit_loop"].keys() == between["loops"]["fit_loop"].keys()


def test_hooks_of_the_module_see_the_whole_checkpoint_and_weights_alone_are_possible():
    class Filters(Scheduled):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {"net.0.bias": checkpoint["state_dict"]["net.0.bias"]}

    def both(module):
        save(module)
        module.trainer.save_checkpoint("weights.ckpt", weights_only=True)

    start = Classifier().net[0].bias.detach()
    fit(federation(), Filters(both))
    now, weights = (torch.load(path, weights_only=True) for path in ("now.ckpt", "weights.ckpt"))
    assert list(now["state_dict"]) == list(weights["state_dict"]) == ["net.0.bias"]
    assert not torch.equal(now["state_dict"]["net.0.bias"], start)
    assert "callbacks" in now
    assert "callbacks" not in weights


def test_bfloat16_keeps_the_servers_precision():
    whole = end(fit(federation(precision="bf16-true"), Scheduled()))
    fit(federation(precision="bf16-true"), Scheduled(save))
    assert end(fit(federation(precision="bf16-true"), Scheduled(), "now.ckpt")) == whole


# ---------------------------------------------------------------------- at any moment


class Moments(pl.Callback):
    """Saves at every so many lines of this package and of Lightning's loops, as a signal handler might."""

    def __init__(self, every):
        self.every = every
        self.lines = 0
        self.paths = []

    def on_train_start(self, runner, *_):
        def line(frame, event, _):
            if event == "line":
                self.lines += 1
                if self.lines % self.every == 0:
                    # Saving is not interrupted itself.
                    sys.settrace(None)
                    self.paths.append(f"{self.lines}.ckpt")
                    runner.save_checkpoint(self.paths[-1])
                    sys.settrace(call)
            return line

        def call(frame, event, _):
            path = frame.f_code.co_filename
            if "lightning_fedhaw" in path or "pytorch/loops" in path:
                return line
            return None

        sys.settrace(call)
        frame = sys._getframe()
        while frame:
            frame.f_trace = line
            frame = frame.f_back

    def on_train_end(self, *_):
        sys.settrace(None)


def test_at_any_line_of_a_run():
    whole = end(fit(federation(clients_per_round=1), Scheduled()))
    moments = Moments(every=487)
    traced = fit(federation(clients_per_round=1, callbacks=[moments]), Scheduled())
    assert end(traced) == whole
    assert len(moments.paths) > 10
    for path in moments.paths:
        model, _, weights, tally = end(fit(federation(clients_per_round=1), Scheduled(), path))
        assert (model, weights, tally) == (whole[0], whole[2], whole[3]), path


# ---------------------------------------------------------------------- SIGTERM


@engines
# Lightning takes `ckpt_path=None` for a wish to resume as soon as the trainer has a checkpoint callback.
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*no last checkpoint available")
@pytest.mark.parametrize("door", ["federated", "stock"])
def test_sigterm_stops_within_a_client_and_leaves_a_checkpoint(engine, door):
    steps = []

    class Counts(Scheduled):
        def on_after_backward(self):
            steps.append(self.trainer.global_step)

    def terminate(module):
        steps.append("signal")
        os.kill(os.getpid(), signal.SIGTERM)

    def runner(callbacks=()):
        options = {**QUIET, "enable_checkpointing": bool(callbacks)}
        if door == "federated":
            return federation(callbacks=callbacks, engine=engine, **options)
        rule = FedAvgCallback(alpha=10.0, num_clients=2, engine=engine)
        return pl.Trainer(max_epochs=3, callbacks=[rule, *callbacks], **options)

    kind = Counts if engine == "sequential" else Scheduled
    whole = end(fit(runner(), kind()))
    steps.clear()
    with pytest.raises(SIGTERMException):
        fit(runner([OnExceptionCheckpoint(".")]), kind(terminate))
    # The step that was interrupted is finished, and no other one begins.
    after = steps[steps.index("signal") + 1 :]
    assert len(after) == (engine == "sequential")
    assert end(fit(runner(), kind(), "on_exception.ckpt")) == whole


def interrupt(module):
    """Do what Ctrl+C does."""
    raise KeyboardInterrupt


def terminate(module):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("stop", "error"), [(terminate, SIGTERMException), (interrupt, SystemExit)])
def test_a_run_that_is_stopped_leaves_a_checkpoint_of_the_rounds_since_the_last_one(stop, error):
    options = {"checkpoint_every_n_rounds": 2, "default_root_dir": ".", "enable_checkpointing": True}
    with pytest.raises(error):
        fit(federation(**options), Scheduled(stop))
    assert torch.load("checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
