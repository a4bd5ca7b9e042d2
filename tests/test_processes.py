"""Clients on several processes: the numbers of one."""

import os
import runpy
import socket
import sys
from functools import cache, partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, WeightedRandomSampler

import programs
from federations import QUIET, Classifier, flat, loader, momentum, samples, trainer, val_loader
from lightning_fedhaw import (
    AvailabilityChannel,
    AWGNChannel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FadingChannel,
    FedAvgCallback,
    FedBECallback,
    FedDFCallback,
    FedDynCallback,
    FederatedDataModule,
    FederatedStrategy,
    FederatedTrainer,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedProx,
    GilbertElliott,
    OverTheAirChannel,
    PacketLossChannel,
    PublishedFedHAWCallback,
    QuantizationChannel,
    ScaffoldCallback,
    ServerFineTuningCallback,
    SparsificationChannel,
    StragglerChannel,
)
from lightning_fedhaw.extending import Channel, ClientObjective
from lightning_fedhaw.objectives import ScaffoldObjective
from lightning_fedhaw.ranks import Ranks, assign

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning", "ignore:.*num_workers.*bottleneck"
)
several = pytest.mark.parametrize("processes", [2, 3])


def haw(**kwargs):
    return FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, **kwargs)


def published():
    return PublishedFedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, jacobian="exact", memory="host")


def fit(processes, rule=None, module=None, data=None, callbacks=(), ckpt_path=None, **kwargs):
    """A fit in processes that are forked from this one."""
    place = {} if processes == 1 else {"devices": processes, "strategy": "federated_notebook"}
    rule = rule or haw()
    options = {"num_clients": 5, "clients_per_round": 4, "reduction": "ordered", **place, **kwargs}
    runner = trainer(rule=rule, callbacks=callbacks, **options)
    module = module or Classifier(norm=True, dropout=0.2)
    val = None if isinstance(data, FederatedDataModule) else val_loader()
    runner.fit(module, data or loader(drop_last=True), val, ckpt_path=ckpt_path)
    return runner, module, rule


def same(a, b):
    assert torch.equal(flat(a[1]), flat(b[1]))
    assert a[0].callback_metrics.keys() == b[0].callback_metrics.keys()
    for name, value in a[0].callback_metrics.items():
        assert torch.equal(value, b[0].callback_metrics[name]), name
    for name, value in a[2].state.items():
        theirs = b[2].state[name]
        for mine, other in (
            ((value.matrix, theirs.matrix), (value.start, theirs.start)) if name == "previous" else ([(value, theirs)])
        ):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other)), name
    times = ("seconds", "run")
    assert {k: v for k, v in a[0].federation_summary.items() if k not in times} == {
        k: v for k, v in b[0].federation_summary.items() if k not in times
    }


RULES = {
    "FedAvg": FedAvgCallback,
    "uniform": lambda: FedAvgCallback(weighting="uniform"),
    "FedHAW": haw,
    "published": published,
}


@cache
def on_one_process(rule):
    return fit(1, RULES[rule]())


@several
@pytest.mark.parametrize("rule", RULES)
def test_ordered_sums_give_the_bits_of_one_process(rule, processes):
    same(on_one_process(rule), fit(processes, RULES[rule]()))


def logits(module, batch):
    return module.net(batch[0])


WITH_PROXY = {
    "FedLAW": lambda: FedLAWCallback(server_epochs=3, batch_size=16),
    "FedLAW in stages": lambda: FedLAWCallback("in_stages", server_epochs=14),
    "fine-tuning": lambda: ServerFineTuningCallback(2),
    "FedDF": lambda: FedDFCallback(2, logits=logits),
    "FedBE": lambda: FedBECallback(2, logits=logits),
    "FedHyper": FedHyperCallback,
    "FedHyper G+SL": lambda: FedHyperCallback("G+SL"),
    "FedHyper G+CL": lambda: FedHyperCallback("G+CL", normalize_by="norms", hyper_lr=0.1),
}


@pytest.mark.parametrize("rule", WITH_PROXY.values(), ids=WITH_PROXY.keys())
def test_rules_that_train_on_the_server_and_pace_clients(rule):
    def data():
        return FederatedDataModule(samples(150), batch_size=8, proxy=30, drop_last=True)

    same(fit(1, rule(), data=data()), fit(2, rule(), data=data()))


class Halved(DataLoader):
    """Works on batches."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 2, y


@pytest.mark.parametrize("kind", [DataLoader, Halved])
def test_samplers_and_loaders_that_say_something(kind):
    def data():
        sampler = WeightedRandomSampler((1.0 + samples().tensors[1]).tolist(), 120)
        return kind(samples(), batch_size=8, sampler=sampler, drop_last=True)

    same(fit(1, FedAvgCallback(), data=data()), fit(2, FedAvgCallback(), data=data()))


@pytest.mark.parametrize("rule", ["FedAvg", "FedHAW"])
def test_fast_sums_agree_closely(rule):
    one, two = on_one_process(rule), fit(2, RULES[rule](), reduction="fast")
    assert torch.allclose(flat(one[1]), flat(two[1]), rtol=1e-6, atol=1e-7)


STORAGE = {
    "host": {"storage": "host"},
    "bf16": {"storage_dtype": torch.bfloat16},
    "bf16 in rows": {"storage_dtype": torch.bfloat16, "storage": "device"},
}


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE.keys())
@pytest.mark.parametrize(
    ("processes", "parts"),
    [
        (2, lambda: {"rule": haw()}),
        (3, lambda: {"rule": FedAvgCallback(), "callbacks": [ScaffoldObjective()], "module": Classifier()}),
    ],
    ids=["rows", "a sum and a shared state"],
)
def test_wherever_vectors_are_kept(processes, parts, storage):
    same(fit(1, rounds=2, **parts(), **storage), fit(processes, rounds=2, **parts(), **storage))


def test_through_the_second_door_with_a_stock_strategy():
    def stock(**place):
        rule = haw(num_clients=5, alpha=10.0, clients_per_round=4, reduction="ordered")
        runner = pl.Trainer(max_epochs=3, callbacks=[rule], **QUIET, **place)
        module = Classifier(norm=True, dropout=0.2)
        runner.fit(module, loader(drop_last=True), val_loader())
        return module

    one, two = stock(devices=1), stock(devices=2, strategy="ddp_notebook")
    assert torch.equal(flat(one), flat(two))
    assert torch.equal(flat(fit(2)[1]), flat(two))


class Lossy(Channel):
    """Loses a different client every round."""

    def outage(self, round_idx, clients, seed):
        return torch.tensor([client % 3 == round_idx % 3 for client in clients])


class Memory(ClientObjective):
    """Pulls a client towards where it ended last."""

    def init_client(self, start):
        return {name: value.clone() for name, value in start.items()}

    def penalty(self, parameters, start, state):
        return sum(0.1 * (p - state[name]).square().sum() for name, p in parameters.items())

    def end_client(self, state, start, end, num_steps):
        return {name: value.clone() for name, value in end.items()}


STATEFUL = {
    "kept state": lambda: {"optimizer_state": "kept"},
    "local buffers": lambda: {"buffers": "local"},
    "recalibrated": lambda: {"buffers": "recalibrate"},
    "reused updates": lambda: {"callbacks": [Lossy(fallback="reuse_update")]},
    "reused models": lambda: {"callbacks": [Lossy(link="downlink", fallback="reuse_model")]},
    "objective": lambda: {"callbacks": [Memory()]},
    "FedDyn": lambda: {"rule": FedDynCallback(regularization=0.1)},
    "SCAFFOLD": lambda: {"rule": ScaffoldCallback()},
    "SCAFFOLD's old controls": lambda: {
        "rule": ScaffoldCallback(),
        "callbacks": [Lossy(link="downlink", fallback="reuse_model")],
    },
    "SCAFFOLD I with FedHAW": lambda: {"callbacks": [ScaffoldObjective("I"), FedProx()]},
}


UPLINK = [
    lambda: [SparsificationChannel(0.3), PacketLossChannel(0.3, 64, lost="last", retries=1), AWGNChannel(20.0)],
    lambda: [
        *(FadingChannel(20.0, per="layer"), QuantizationChannel(6)),
        *(ErasureChannel(burst=GilbertElliott(0.2, 0.5), fallback="reuse_update"), AvailabilityChannel(mean=0.9)),
        *(StragglerChannel(60.0, 1.0), PacketLossChannel(0.2, 64, link="downlink")),
    ],
]
SUMS = [lambda: [DifferentialPrivacyChannel(0.5, 0.1, delta=None), OverTheAirChannel(20.0, truncation=0.3)]]


@pytest.mark.parametrize(
    ("make", "rule"),
    [*((make, haw) for make in UPLINK), *((make, lambda: FedAvgCallback("uniform")) for make in SUMS)],
    ids=["memory", "losses", "sums"],
)
def test_channels(make, rule):
    def play(processes):
        return fit(processes, rule(), module=Classifier(), rounds=5, callbacks=make())

    same(play(1), play(2))


@pytest.mark.parametrize("options", STATEFUL.values(), ids=STATEFUL.keys())
def test_clients_that_remember(options):
    def play(processes):
        return fit(processes, module=Classifier(momentum, norm=True), rounds=5, **options())

    same(play(1), play(2))


def with_checkpoints(count, rounds, **more):
    """A run in which much is remembered from round to round."""
    options = {
        "optimizer_state": "kept",
        "buffers": "local",
        "enable_checkpointing": True,
        "checkpoint_every_n_rounds": 3,
        "default_root_dir": ".",
    }
    callbacks = [SparsificationChannel(0.5), Lossy(fallback="reuse_update"), Memory(), ScaffoldObjective("I")]
    return fit(count, module=Classifier(momentum, norm=True), rounds=rounds, callbacks=callbacks, **options, **more)


@cache
def straight():
    run = with_checkpoints(1, 6)
    for path in Path("checkpoints").iterdir():
        path.unlink()
    return run


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("processes", [(2, 1), (1, 2), (3, 2)], ids=str)
def test_a_checkpoint_goes_on_with_any_number_of_processes(processes):
    expected = straight()
    with_checkpoints(processes[0], 3)
    (path,) = Path("checkpoints").glob("round=*.ckpt")
    assert path.name == "round=3.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["FedHAWCallback"]["previous"]["matrix"].shape[1] == 99
    same(expected, with_checkpoints(processes[1], 6, ckpt_path=path))


class Counts(Classifier):
    """Logs in every way there is."""

    def __init__(self):
        super().__init__()
        self.trained = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.trained(loss.detach(), weight=len(x))
        self.log("trained", self.trained)
        self.log("examples", float(len(x)), reduce_fx="sum")
        return loss

    def on_validation_epoch_start(self):
        self.correct, self.seen, self.batches = 0, 0, []
        self.log("val_begun", 0.7)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        x, y = batch
        correct = (self.net(x).argmax(1) == y).float()
        self.correct, self.seen = self.correct + correct.sum(), self.seen + len(x)
        self.batches.append(batch_idx)
        self.log("val_acc_step", correct.mean(), on_step=True, on_epoch=True)
        self.log("val_worst", correct.mean(), reduce_fx="min", sync_dist=True)
        self.log("val_examples", float(len(x)), reduce_fx="sum")

    def on_validation_epoch_end(self):
        self.log("val_own", self.correct / self.seen)
        if self.trainer.is_global_zero:
            self.log("val_of_the_first", 1.5, rank_zero_only=True)
        assert len(set(self.batches)) == len(self.batches)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("batch_size", [7, 16, 60], ids=["many", "few", "fewer than processes"])
def test_validation_and_logs_are_those_of_one_process(batch_size):
    def play(processes):
        place = {} if processes == 1 else {"devices": processes, "strategy": "federated_notebook"}
        stop = EarlyStopping("val_loss", patience=1, min_delta=0.05)
        keep = ModelCheckpoint(dirpath=f"of{processes}", monitor="val_acc_step_epoch", mode="max")
        runner = trainer(
            rounds=20, callbacks=[stop, keep], enable_checkpointing=True, num_clients=5, reduction="ordered", **place
        )
        module = Counts()
        runner.fit(module, loader(), DataLoader(samples(60, seed=1), batch_size=batch_size, shuffle=batch_size == 60))
        return runner.callback_metrics, runner.federation_summary["rounds"], Path(keep.best_model_path).name

    one, three = play(1), play(3)
    assert one[1:] == three[1:]
    assert one[1] < 20
    assert one[0].keys() == three[0].keys()
    for name, value in one[0].items():
        assert float(three[0][name]) == pytest.approx(float(value), rel=1e-6), name
    assert float(three[0]["val_examples"]) == 60
    if batch_size != 60:  # shuffled batches add up in another order
        assert float(three[0]["val_loss"]) == float(one[0]["val_loss"])


def test_validate_and_test_outside_of_fit():
    def play(processes):
        place = {} if processes == 1 else {"devices": processes, "strategy": "federated_notebook"}
        return trainer(**place).validate(Classifier(), DataLoader(samples(61, seed=1), batch_size=8), verbose=False)

    assert play(1) == play(2)


class Spoils(Classifier):
    """Diverges on client 2's data, wherever it is trained."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        if (batch[0][:, 0] == 77).any():
            if self.error:
                raise ValueError(self.error)
            return super().training_step(batch, batch_idx) * float("nan")
        return super().training_step(batch, batch_idx)


def marked(client=2):
    data = samples(120)
    data.tensors[0][client * 24 : (client + 1) * 24, 0] = 77
    return DataLoader(data, batch_size=8)


def by_order():
    from lightning_fedhaw import IndexPartitioner

    return {"partitioner": IndexPartitioner([range(24 * k, 24 * k + 24) for k in range(5)]), "alpha": None}


@pytest.mark.filterwarnings("ignore:Client 2 returned non-finite")
def test_a_client_that_diverges_is_left_out_whoever_trains_it():
    def play(processes):
        return fit(processes, module=Spoils(), data=marked(), clients_per_round=None, **by_order())

    with pytest.warns(UserWarning, match="Client 2 returned non-finite"):
        one = play(1)
    two = play(2)
    same(one, two)
    assert two[0].federation_summary["nonfinite_updates"] == 3


@pytest.mark.parametrize("client", [0, 1])  # one of each process
def test_an_error_on_one_process_ends_the_run_and_is_shown(client):
    with pytest.raises(Exception, match="no good") as raised:
        fit(2, module=Spoils(error="no good"), data=marked(client), clients_per_round=None, **by_order())
    assert "Process" in str(raised.value)


def test_more_processes_than_clients():
    same(fit(1, num_clients=2, clients_per_round=None), fit(3, num_clients=2, clients_per_round=None))


def test_processes_with_other_data_are_refused():
    class Other(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(samples(120, seed=self.trainer.global_rank), batch_size=8)

    with pytest.raises(Exception, match="were given other training data"):
        trainer(devices=2, strategy="federated_notebook").fit(Classifier(), Other())


def test_manual_optimization_with_its_own_schedule():
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()
            self.lr_schedulers().step()

    same(fit(1, module=Manual(), rule=FedAvgCallback()), fit(2, module=Manual(), rule=FedAvgCallback()))


# ---------------------------------------------------------------------- launchers

SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from federations import Classifier, QUIET, flat, loader, val_loader
from lightning_fedhaw import FedHAWCallback, FederatedTrainer

class Mortal(Classifier):
    def training_step(self, batch, batch_idx):
        if os.environ.get("DIES_IN_ROUND") == str(self.trainer.global_step) and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    torch.set_num_threads(1)
    module = Mortal()
    place = eval(sys.argv[1])
    trainer = FederatedTrainer(rounds=6, num_clients=5, alpha=10.0, reduction="ordered", checkpoint_every_n_rounds=2,
                               callbacks=[FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1)], default_root_dir=".",
                               **{{**QUIET, "enable_checkpointing": True}}, **place)
    print(type(trainer.strategy).__name__, flush=True)
    trainer.fit(module, loader(), val_loader())
    if trainer.is_global_zero:
        torch.save(flat(module), "end.pt")
"""


@pytest.fixture
def script():
    Path("run.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    return "run.py"


@pytest.fixture(scope="module")
def reference():
    module = Classifier()
    trainer(rounds=6, rule=haw(), num_clients=5, reduction="ordered").fit(module, loader(), val_loader())
    return flat(module)


def test_devices_choose_the_strategy_and_a_rank_that_dies_is_reported_and_the_run_goes_on(script, reference):
    env = {"DIES_IN_ROUND": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    code, printed = programs.run_script(script, repr({"devices": 2}), env=env)
    assert code != 0
    assert "FederatedStrategy" in printed
    assert "lost contact with the others" in printed or "terminated with code" in printed
    assert not Path("end.pt").exists()
    (path,) = Path("checkpoints").glob("round=*.ckpt")
    assert path.name == "round=2.ckpt"
    module = Classifier()
    options = {"checkpoint_every_n_rounds": 2, "enable_checkpointing": True, "default_root_dir": "."}
    resumed = trainer(rounds=6, rule=haw(), num_clients=5, reduction="ordered", **options)
    resumed.fit(module, loader(), val_loader(), ckpt_path=path)
    assert torch.equal(flat(module), reference)


def worker(path, place):
    """One of several processes that something else has started."""
    sys.argv = [path, repr(place)]
    runpy.run_path(path, run_name="__main__")


def test_torchrun(script, reference):
    """What `torchrun --standalone` does, but that its agent forks the processes."""

    def agent():
        standalone = {"run_id": "run", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        config = LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", monitor_interval=0.1, **standalone)
        elastic_launch(config, worker)(script, {"devices": 2})

    code, printed = programs.Forked(agent).wait()
    assert code == 0, printed
    assert torch.equal(torch.load("end.pt"), reference)


def test_two_nodes_on_loopback(script, reference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    node = partial(worker, script, {"devices": 1, "num_nodes": 2})
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [programs.Forked(node, {**address, "NODE_RANK": str(rank)}, log=f"log{rank}") for rank in range(2)]
    for forked in nodes:
        code, printed = forked.wait()
        assert code == 0, printed
    assert torch.equal(torch.load("end.pt"), reference)


def test_spawned_processes_bring_everything_home():
    one = fit(1, rule=haw(), module=Classifier(momentum))
    two = fit(2, rule=haw(), module=Classifier(momentum), strategy="federated_spawn")
    same(one, two)


def test_strategies_that_spread_a_model_are_refused():
    from lightning.pytorch.strategies import ModelParallelStrategy

    for strategy in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", ModelParallelStrategy()):
        with pytest.raises(ValueError, match='strategy=.*is not supported.*Set `strategy="federated"`'):
            FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], strategy=strategy, **QUIET)


def test_a_launcher_with_more_processes_than_the_trainer_knows_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match=r"WORLD_SIZE=4.*set to 1.*Set `devices` \(times `num_nodes`\) to 4"):
        FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **{**QUIET, "devices": 1})


def test_threads_per_worker_is_checked():
    with pytest.raises(ValueError, match="`threads_per_worker` must be a whole number of at least 1, got 0"):
        FederatedStrategy(threads_per_worker=0)


# ---------------------------------------------------------------------- dealing


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_dealing_is_even(costs, size):
    assigned = assign(costs, size)
    loads = [sum(c for c, rank in zip(costs, assigned, strict=True) if rank == r) for r in range(size)]
    best = max(max(costs), sum(costs) / size)
    assert sum(loads) == sum(costs)
    assert max(loads) <= 2 * best
    if len(costs) <= size:
        assert max(loads) == max(costs)


@given(st.lists(st.integers(1, 100), min_size=3, max_size=20), st.integers(2, 4))
def test_whoever_has_a_home_stays(costs, size):
    assert assign(costs, size, {1: size - 1})[1] == size - 1


def test_one_process_talks_to_nobody():
    ranks = Ranks()
    assert ranks.exchange(lambda: 3) == [3]
    assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
