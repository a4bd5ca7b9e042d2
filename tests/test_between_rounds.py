"""The module between rounds, and what a trainer says while a client trains: as in a stock trainer."""

import copy
import io
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, flat, samples, trainer, val_loader
from lightning_fedhaw import FedAvgCallback, FederatedCallback, FederatedTrainer, IIDPartitioner

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*num_workers.*bottleneck", "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)
doors = pytest.mark.parametrize("door", ["stock", "FederatedTrainer", "rule"])

LOG = []


def data(count=32):
    return DataLoader(samples(count), batch_size=8)


def fit(module, door="FederatedTrainer", rounds=3, clients=2, callbacks=(), ckpt_path=None, **kwargs):
    LOG.clear()
    options = {"client_eval": False, "partitioner": IIDPartitioner(), "num_clients": clients, **kwargs}
    if door == "stock":
        runner = pl.Trainer(max_epochs=rounds, callbacks=list(callbacks), **QUIET)
    elif door == "rule":
        runner = pl.Trainer(max_epochs=rounds, callbacks=[FedAvgCallback(**options), *callbacks], **QUIET)
    else:
        callbacks = [FedAvgCallback(), *callbacks]
        runner = FederatedTrainer(rounds=rounds, callbacks=callbacks, **{**QUIET, **options})
    runner.fit(module, data(), ckpt_path=ckpt_path)
    return runner


# ---------------------------------------------------------------------- changes between rounds


class Anneals(Classifier):
    """Changes buffers and parameters in the hooks of an epoch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("epochs_seen", torch.tensor(0))
        self.average = nn.Linear(6, 8, bias=False)

    def training_step(self, batch, batch_idx):
        LOG.append((self.current_epoch, float(self.temperature), int(self.epochs_seen)))
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.epochs_seen += 1

    def on_train_epoch_end(self):
        self.temperature.data.mul_(0.5)
        with torch.no_grad():
            self.average.weight.copy_(self.net[0].weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


EXPECTED = [(0, 1.0, 1), (1, 0.5, 2), (2, 0.25, 3)]


@doors
def test_changes_between_rounds_are_the_global_models(door):
    module = Anneals()
    fit(module, door)
    assert sorted(set(LOG)) == EXPECTED
    assert (float(module.temperature), int(module.epochs_seen)) == (0.125, 3)
    assert torch.equal(module.average.weight, module.net[0].weight)


def test_the_vectorized_engine_sees_them():
    module = Anneals()
    module.training_step = lambda batch, batch_idx: cross_entropy(module.net(batch[0]) * module.temperature, batch[1])
    again = copy.deepcopy(module)
    again.training_step = lambda batch, batch_idx: cross_entropy(again.net(batch[0]) * again.temperature, batch[1])
    fit(module, engine="vectorized")
    fit(again, engine="sequential")
    torch.testing.assert_close(flat(module), flat(again))


@pytest.mark.parametrize("hook", ["on_round_start", "on_round_end", "on_train_epoch_start", "on_validation_end"])
def test_whichever_hook_of_a_callback_makes_the_change(hook):
    class Zeroes(FederatedCallback):
        pass

    def zero(self, trainer, module, *_):
        module.net[0].weight.data.zero_()

    class Sees(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                LOG.append(bool(self.net[0].weight.any()))
            return super().training_step(batch, batch_idx)

    setattr(Zeroes, hook, zero)
    runner = trainer(rounds=2, num_clients=2, callbacks=[Zeroes()], client_eval=False, num_sanity_val_steps=0)
    LOG.clear()
    runner.fit(Sees(), data(), val_loader())
    is_before_the_first = hook in ("on_round_start", "on_train_epoch_start")
    assert [not is_before_the_first] * 2 + [False] * 2 == LOG


@pytest.mark.parametrize("policy", ["average", "keep", "local", {"temperature": "local", "epochs_seen": "keep"}])
def test_buffers_that_hooks_change_whatever_the_policy(policy):
    fit(Anneals(), buffers=policy)
    assert sorted(set(LOG)) == EXPECTED


def test_low_precision_keeps_the_servers_vector_where_nothing_was_changed():
    class Shifts(Classifier):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[0].bias[0] = 7.0

    module = Shifts()
    runner = fit(module, rounds=1, precision="bf16-true")
    server = runner.fit_loop.federation.server
    before = server.parameters().clone()
    runner.save_checkpoint("changed.ckpt")
    state = torch.load("changed.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]["federation"]
    changed = state["parameters"] != before
    assert changed.nonzero().tolist() == [[48]], "the first bias, after 8 x 6 weights"
    assert state["parameters"][48] == 7.0
    assert not torch.equal(before, server.layout.rounded(before)), "the vector is finer than the module"


def test_a_failed_round_keeps_what_hooks_did_before_it():
    class Breaks(Anneals):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and len(LOG) < 100:
                LOG.extend([None] * 100)
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module)
    assert (float(module.temperature), int(module.epochs_seen)) == (0.5, 2)


def test_resuming_is_bit_identical():
    straight, first, second = Anneals(), Anneals(), Anneals()
    fit(straight)
    fit(first, rounds=2).save_checkpoint("two.ckpt")
    fit(second, ckpt_path="two.ckpt")
    assert torch.equal(flat(straight), flat(second))
    assert int(second.epochs_seen) == 3


class Disagrees(Anneals):
    """Where a forked process can find it."""

    def on_train_epoch_start(self):
        self.temperature.fill_(float(self.trainer.global_rank))


def test_processes_must_make_the_same_change():
    place = {"devices": 2, "strategy": "federated_notebook"}
    fit(Anneals(), rounds=2, **place)
    with pytest.raises(Exception, match="`temperature` was changed in the module, and not to the same values"):
        fit(Disagrees(), **place)


# ---------------------------------------------------------------------- schedules, and what the trainer says


class Warms(Classifier):
    """Steps a schedule of its own in every optimizer step."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 100)
        self.schedule = {"attribute": schedule, "list": [schedule], "dict": {"warm-up": schedule}}[self.place]
        return optimizer

    def optimizer_step(self, *args, **kwargs):
        optimizer = self.optimizers()
        LOG.append((self.current_epoch, round(100 * optimizer.param_groups[0]["lr"])))
        super().optimizer_step(*args, **kwargs)
        holder = {"attribute": lambda s: s, "list": lambda s: s[0], "dict": lambda s: s["warm-up"]}[self.place]
        holder(self.schedule).step()


@pytest.mark.parametrize("place", ["attribute", "list", "dict"])
def test_schedules_that_the_module_holds_start_where_the_round_began(place):
    fit(Warms(place), rounds=2, engine="auto")
    assert LOG == [(0, 1), (0, 2)] * 2 + [(1, 3), (1, 4)] * 2


class StepsOnTheLast(Classifier):
    """Lightning's documented way to step a schedule in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()
        runner = self.trainer
        LOG.append((runner.is_last_batch, runner.num_training_batches, runner.estimated_stepping_batches))
        if runner.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.parametrize(
    ("work", "count"), [({"local_epochs": 2}, 4), ({"local_epochs": 1.5}, 3), ({"local_steps": 4}, 4)]
)
def test_the_last_batch_is_that_of_the_clients_task(work, count):
    runner = fit(StepsOnTheLast(), rounds=3, **work)
    assert [last for last, *_ in LOG] == ([False] * (count - 1) + [True]) * 6
    assert {entry[1:] for entry in LOG} == {(2, 3)}, "batches of a pass, rounds"
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.125
    assert (runner.is_last_batch, runner.num_training_batches, runner.max_steps) == (True, 1, -1)


def test_a_step_that_asks_for_the_last_batch_is_not_batched():
    class Asks(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (2.0 if self.trainer.is_last_batch else 1.0)

    with pytest.raises(ValueError, match="asks for `is_last_batch`, which differs from client to client"):
        fit(Asks(), engine="vectorized")


# ---------------------------------------------------------------------- copies


class Copies(Classifier):
    """Copies itself in every hook."""

    def __init__(self):
        super().__init__(torch.optim.SGD)

    def copy(self, where):
        file = io.BytesIO()
        torch.save(self, file)
        file.seek(0)
        assert b"fedhaw" not in pickle.dumps(self)
        for twin in (copy.deepcopy(self), pickle.loads(pickle.dumps(self)), torch.load(file, weights_only=False)):
            assert torch.equal(flat(twin), flat(self))
            assert twin.log.__func__ is pl.LightningModule.log
            assert twin.log.__self__ is twin
        LOG.append(where)

    def training_step(self, batch, batch_idx):
        self.copy("step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.copy("validation")

    def on_train_batch_end(self, *_):
        self.copy("batch")

    def on_train_epoch_end(self):
        self.copy("epoch")


class CopiesTheModule(FederatedCallback):
    def on_client_end(self, trainer, pl_module, update):
        pl_module.copy("client")


@pytest.mark.parametrize("door", ["FederatedTrainer", "rule"])
def test_a_module_can_be_copied_in_any_hook(door):
    callbacks = [CopiesTheModule()]
    options = {"client_eval": False, "partitioner": IIDPartitioner(), "num_clients": 2}
    LOG.clear()
    if door == "rule":
        runner = pl.Trainer(max_epochs=1, callbacks=[FedAvgCallback(**options), *callbacks], **QUIET)
    else:
        runner = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback(), *callbacks], **QUIET, **options)
    runner.fit(Copies(), data(16), val_loader())
    assert set(LOG) == {"step", "validation", "batch", "epoch", "client"}
