"""The parts of a round: failures, channels, buffers, storage, logs, observers."""

import csv
from functools import partial

import pytest
import torch
import torchmetrics
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from federations import Classifier, flat, loader, samples, train, trainer, val_loader
from lightning_fedhaw import (
    ErasureChannel,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FederatedCallback,
    FedHAWCallback,
    FedHyperCallback,
    FedNovaCallback,
    FedOptCallback,
    FedProx,
    IndexPartitioner,
    PublishedFedHAWCallback,
    ScaffoldCallback,
)
from lightning_fedhaw.data import FixedSequenceSampler
from lightning_fedhaw.extending import AggregationRule, Channel, ClientObjective, RuleOutput

HALVES = {"num_clients": 2, "alpha": None, "partitioner": IndexPartitioner([range(0, 20), range(20, 40)])}


def plain(count=40):
    return DataLoader(samples(count), batch_size=8)


# ---------------------------------------------------------------------- clients that fail


class Poisoned(Classifier):
    """The client that owns the first samples returns NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        poisoned = (batch[0][:, None] == samples(40).tensors[0][:20]).all(-1).any()
        return loss * float("nan") if poisoned else loss


def test_a_client_that_returns_nan_is_named_and_left_out():
    module, other = Poisoned(), Classifier()
    runner = trainer(rounds=2, **HALVES)
    with pytest.warns(UserWarning, match=r"Client 0 returned non-finite parameters in round \d and was left out"):
        runner.fit(module, plain())
    assert runner.federation_summary["nonfinite_updates"] == 2
    assert float(runner.callback_metrics["train_loss"]) < 10, "its loss is left out too"
    trainer(rounds=2, **{**HALVES, "sampler": FixedSequenceSampler([[1], [1]])}).fit(other, plain())
    assert torch.equal(flat(module), flat(other)), "a client that failed equals one that did not come"


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_a_round_in_which_only_states_of_objectives_fail_says_so():
    class Failing(ClientObjective):
        def gradient(self, parameters, start, state):
            return {name: torch.zeros_like(value) for name, value in parameters.items()}

        def end_client(self, state, start, end, num_steps):
            return {"own": torch.tensor(torch.nan)}

    told = r"Every client of round 0 .*\(Client 0 returned non-finite states of client objectives in round 0\)"
    with pytest.raises(FloatingPointError, match=told):
        trainer(callbacks=[Failing()]).fit(Classifier(), loader())


def test_a_client_that_returns_nan_can_end_the_run_and_the_global_model_survives():
    module = Poisoned()
    with pytest.raises(FloatingPointError, match='Client 0 .* round 0, and `on_nonfinite="raise"`'):
        trainer(rounds=2, on_nonfinite="raise", **HALVES).fit(module, plain())
    assert torch.equal(flat(module), flat(Classifier()))
    assert "log" not in vars(module), "the module's own log is back"


def test_nan_in_a_buffer_counts():
    class BadBuffer(Classifier):
        def on_train_batch_end(self, *_):
            self.net[1].running_mean.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"buffers \['net.1.running_mean'\]"):
        trainer(on_nonfinite="raise").fit(BadBuffer(norm=True), loader())


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_when_everybody_diverges_the_run_ends():
    class Diverges(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    module = Diverges()
    with pytest.raises(FloatingPointError, match="Every client of round 0 returned non-finite"):
        trainer().fit(module, loader())
    assert torch.equal(flat(module), flat(Classifier()))


def test_a_rule_that_returns_nan_is_stopped_before_it_is_installed():
    class Breaks(AggregationRule):
        def step(self, cohort, state, server):
            weights = torch.ones(len(cohort), dtype=torch.float64) / len(cohort)
            return RuleOutput(cohort.start * float("nan"), state, weights)

    module = Classifier()
    with pytest.raises(FloatingPointError, match="non-finite global parameters, which were not installed"):
        trainer(rule=Breaks()).fit(module, loader())
    assert torch.equal(flat(module), flat(Classifier()))


def test_an_interrupt_in_the_middle_of_a_client_leaves_a_global_model():
    class Interrupted(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 1:
                raise RuntimeError("pulled the plug")

    module, other = Interrupted(), Classifier(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(rounds=3).fit(module, loader())
    trainer(rounds=1).fit(other, loader())
    assert torch.equal(flat(module), flat(other))
    assert all(not optimizer.state for optimizer in module.trainer.optimizers)


# ---------------------------------------------------------------------- channels


class Losing(Channel):
    """Loses the messages of given clients in given rounds."""

    def __init__(self, losses, **kwargs):
        super().__init__(**kwargs)
        self.losses = losses

    def outage(self, round_idx, clients, seed):
        return torch.tensor([client in self.losses.get(round_idx, ()) for client in clients])


class Scaling(Channel):
    def transmit(self, message, *, round_idx, client, seed):
        return message * 2


class Quadratic(Classifier):
    """One parameter; client k's samples pull it to their value: the local result is the value itself."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.net.weight)

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.net.weight - batch[0][self.trainer.current_epoch if len(batch[0]) > 1 else 0]).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def erasure(fallback):
    """Round 0: 2.0 and -1.0, both received; round 1: client 0 returns 1.5 and client 1 is erased."""
    data = torch.utils.data.TensorDataset(torch.tensor([[2.0], [1.5], [-1.0], [7.0]]))
    module = Quadratic()
    runner = trainer(
        rounds=2,
        num_clients=2,
        alpha=None,
        partitioner=IndexPartitioner([[0, 1], [2, 3]]),
        callbacks=[Losing({1: [1]}, fallback=fallback)],
        client_eval=False,
    )
    runner.fit(module, DataLoader(data, batch_size=2))
    return float(module.net.weight.detach())


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [("reuse_model", 0.25), ("reuse_update", 0.5), ("zero_update", 1.0), ("discard", 1.5)],
)
def test_what_stands_in_for_an_erased_message(fallback, expected):
    assert erasure(fallback) == pytest.approx(expected, abs=1e-6)


def test_a_failed_client_does_not_train():
    class Counting(FederatedCallback):
        trained = 0

        def on_client_end(self, trainer, pl_module, update):
            self.trained += 1

    counting = Counting()
    runner = trainer(rounds=2, callbacks=[Losing({0: [1, 2]}), counting])
    runner.fit(Classifier(), loader())
    assert counting.trained == 6
    assert runner.federation_summary["bytes_up"] == 6 * 83 * 4
    assert runner.federation_summary["bytes_down"] == 8 * 83 * 4


def test_channels_compose_in_list_order_and_do_not_touch_other_draws():
    twice, once = Classifier(), Classifier()
    trainer(rounds=1, callbacks=[Scaling(), Scaling(name="again")]).fit(twice, loader())
    trainer(rounds=1).fit(once, loader())
    start = flat(Classifier())
    assert torch.allclose(flat(twice) - start, 4 * (flat(once) - start), atol=1e-6)


def test_a_downlink_that_reuses_the_last_model():
    """Client 1 trains from the model of round 0 in round 1; its update is measured from what it received."""
    seen = {}

    class Watch(FederatedCallback):
        def on_client_end(self, trainer, pl_module, update):
            now = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            seen[trainer.global_step, update.client] = now - update.displacement

    runner = trainer(rounds=2, callbacks=[Losing({1: [1]}, link="downlink", fallback="reuse_model"), Watch()])
    runner.fit(Classifier(), loader())
    assert torch.allclose(seen[1, 1], seen[0, 1], atol=1e-7)
    assert not torch.allclose(seen[1, 2], seen[0, 2], atol=1e-4)


def test_a_client_that_never_heard_a_model_does_not_take_part():
    runner = trainer(rounds=1, callbacks=[Losing({0: [0]}, link="downlink", fallback="reuse_model")])
    runner.fit(Classifier(), loader())
    assert runner.federation_summary["clients_per_round"] == 3


def test_a_round_without_anybody_changes_nothing_and_is_logged():
    rule, module, other = PublishedFedHAWCallback(lr_gamma=0.1, normalize_by="lr*steps"), Classifier(), Classifier()
    nobody = Losing({2: range(4)})
    with pytest.warns(UserWarning, match="No client update was received in round 2"):
        trainer(rounds=3, rule=rule, callbacks=[nobody]).fit(module, loader())
    reference = PublishedFedHAWCallback(lr_gamma=0.1, normalize_by="lr*steps")
    trainer(rounds=2, rule=reference).fit(other, loader())
    assert torch.equal(flat(module), flat(other))
    assert torch.equal(rule.state["gamma"], reference.state["gamma"])
    assert float(module.trainer.callback_metrics["round_skipped"]) == 1


def test_a_round_without_anybody_can_follow_the_authors_code():
    rule, module, other = PublishedFedHAWCallback(lr_gamma=0.1, normalize_by="lr*steps"), Classifier(), Classifier()
    trainer(rounds=3, rule=rule, callbacks=[Losing({2: range(4)})], empty_round="follow").fit(module, loader())
    reference = PublishedFedHAWCallback(lr_gamma=0.1, normalize_by="lr*steps")
    trainer(rounds=2, rule=reference).fit(other, loader())
    scale = rule.scale
    assert scale != 1
    assert scale == reference.scale
    assert torch.allclose(flat(module), scale * flat(other), atol=1e-6), (
        "the model is multiplied by the scale all the same"
    )


def test_channel_memory_survives_a_checkpoint():
    def run(rounds, ckpt_path=None):
        module = Classifier()
        channel = Losing({1: [0], 3: [2]}, fallback="reuse_update")
        runner = trainer(rounds=rounds, callbacks=[channel], default_root_dir="kept")
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        runner.save_checkpoint("stopped.ckpt")
        return module

    straight = run(4)
    run(3)
    assert torch.equal(flat(straight), flat(run(4, "stopped.ckpt")))


def test_channels_are_checked():
    with pytest.raises(ValueError, match="`link` must be one of 'uplink', 'downlink', got 'sidelink'"):
        Channel(link="sidelink")
    with pytest.raises(ValueError, match="`fallback` must be one of 'reuse_model', 'discard', .* on the downlink"):
        Channel(link="downlink", fallback="zero_update")
    assert Channel(name="a").state_key == "Channel/uplink/a"


# ---------------------------------------------------------------------- client objectives


class Proximal(ClientObjective):
    def __init__(self, strength, name=None):
        super().__init__(name)
        self.strength = strength

    def penalty(self, parameters, start, state):
        return 0.5 * self.strength * sum((p - start[name]).square().sum() for name, p in parameters.items())


class Remembers(ClientObjective):
    """Adds the sum of all rounds' movements as a linear term: needs state, and shows when it is lost."""

    def init_client(self, start):
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def penalty(self, parameters, start, state):
        return sum((p * state[name].to(p)).sum() for name, p in parameters.items())

    def end_client(self, state, start, end, num_steps):
        return {name: state[name] + end[name] - start[name] for name in state}


def by_hand(module, strength):
    """Two clients, one pass, FedAvg, with the proximal gradient written out."""
    x, y = samples(40).tensors
    net, results = module.net, []
    server = [p.detach().clone() for p in net.parameters()]
    for part in (range(0, 20), range(20, 40)):
        with torch.no_grad():
            for p, s in zip(net.parameters(), server, strict=True):
                p.copy_(s)
        for i in range(0, 20, 8):
            index = list(part)[i : i + 8]
            grads = torch.autograd.grad(cross_entropy(net(x[index]), y[index]), list(net.parameters()))
            with torch.no_grad():
                for p, g, s in zip(net.parameters(), grads, server, strict=True):
                    p -= 0.1 * (g + strength * (p - s))
        results.append([p.detach().clone() for p in net.parameters()])
    return torch.cat([((a + b) / 2).flatten() for a, b in zip(*results, strict=True)]).double()


@pytest.mark.parametrize("clip", [None, 1e9], ids=["plain step", "automatic step"])
def test_client_objectives_add_up(clip):
    module = Classifier()
    objectives = [Proximal(0.5), Proximal(1.5, name="again")]
    trainer(rounds=1, callbacks=objectives, gradient_clip_val=clip, **HALVES).fit(module, plain())
    assert torch.allclose(flat(module), by_hand(Classifier(), 2.0), atol=1e-6)
    assert not torch.allclose(flat(module), by_hand(Classifier(), 0.0), atol=1e-4)


def test_client_state_is_kept_for_those_who_came_and_survives_a_checkpoint():
    def run(rounds, ckpt_path=None):
        module, objective = Classifier(), Remembers()
        runner = trainer(rounds=rounds, callbacks=[objective], clients_per_round=2, seed=1)
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        runner.save_checkpoint("stopped.ckpt")
        return module, objective

    straight, objective = run(3)
    run(2)
    assert torch.equal(flat(straight), flat(run(3, "stopped.ckpt")[0]))
    one_round = run(1)[1]
    assert len(one_round.state_dict()["clients"]) == 2
    assert all(value.device.type == "cpu" for s in objective.state_dict()["clients"].values() for value in s.values())


def test_objectives_need_automatic_optimization():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"Client objectives \(Proximal\).*automatic_optimization=False"):
        trainer(callbacks=[Proximal(1.0)]).fit(Manual(), loader())


# ---------------------------------------------------------------------- buffers


def buffers(policy, rounds=2, **kwargs):
    module = Classifier(norm=True)
    runner = trainer(rounds=rounds, buffers=policy, **{**HALVES, **kwargs})
    runner.fit(module, plain())
    return module.net[1], runner


def test_buffers_are_averaged_by_weight_and_counters_take_the_maximum():
    seen = []

    class Watch(FederatedCallback):
        def on_client_end(self, trainer, pl_module, update):
            seen.append((update.num_examples, {k: v.clone() for k, v in update.buffers.items()}))

    uneven = IndexPartitioner([range(0, 30), range(30, 40)])
    norm, _ = buffers("average", rounds=1, callbacks=[Watch()], partitioner=uneven)
    (n0, b0), (n1, b1) = seen
    assert (n0, n1) == (30, 10)
    assert torch.allclose(
        norm.running_mean, 0.75 * b0["net.1.running_mean"] + 0.25 * b1["net.1.running_mean"], atol=1e-6
    )
    assert norm.num_batches_tracked.dtype == torch.int64
    assert int(norm.num_batches_tracked) == 4 == max(int(b["net.1.num_batches_tracked"]) for b in (b0, b1))


def test_buffers_are_never_scaled():
    class Halves(FedAvgCallback):
        def step(self, cohort, state, server):
            step = super().step(cohort, state, server)
            return RuleOutput(step.parameters / 2, state, step.weights)

    halved, plain_norm = buffers("average", rounds=1, rule=Halves())[0], buffers("average", rounds=1)[0]
    assert torch.equal(halved.weight, plain_norm.weight / 2)
    assert torch.equal(halved.running_var, plain_norm.running_var)


def test_buffers_that_nobody_changes_stay_what_they_are_to_the_last_bit():
    class Constant(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e3)

    module = Constant()
    trainer(rounds=3, num_clients=3).fit(module, loader())
    assert torch.equal(module.mean, Constant().mean)


def test_kept_buffers_stay():
    norm, _ = buffers("keep")
    assert norm.running_mean.abs().max() == 0
    assert int(norm.num_batches_tracked) == 0


def test_local_buffers_stay_with_their_client():
    starts = {}

    class Watch(FederatedCallback):
        def on_client_end(self, trainer, pl_module, update):
            starts[trainer.global_step, update.client] = update.buffers["net.1.num_batches_tracked"].item()

    _, runner = buffers("local", callbacks=[Watch()])
    assert starts == {(0, 0): 3, (0, 1): 3, (1, 0): 6, (1, 1): 6}
    assert set(runner.fit_loop.federation.buffers.local.of_clients) == {0, 1}


def test_recalibrated_buffers_are_those_of_the_global_model():
    norm, runner = buffers("recalibrate")
    module = runner.lightning_module
    x = samples(40).tensors[0]
    with torch.no_grad():
        batches = [x[i : i + 8] for base in (0, 20) for i in range(base, base + 20, 8)]
        batches = [b[: 20 - (i % 3) * 8] if i % 3 == 2 else b for i, b in enumerate(batches)]
        means = torch.stack([module.net[0](b).mean(0) for b in batches])
    assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-5)
    assert norm.momentum == 0.1


# ---------------------------------------------------------------------- where the vectors go


@pytest.mark.parametrize("rule", [FedAvgCallback, FedHAWCallback])
def test_storage_does_not_change_the_result(rule):
    def run(**kwargs):
        return flat(train(rule=rule(), rounds=4, **kwargs)[1])

    device = run(storage="device")
    assert torch.equal(device, run(storage="host"))
    assert torch.allclose(device, run(), atol=1e-6)
    half = run(storage="host", storage_dtype=torch.bfloat16)
    assert not torch.equal(device, half)
    assert torch.allclose(device, half, atol=5e-3)


def test_rules_that_know_their_weights_keep_no_vectors():
    class Asks(FedAvgCallback):
        def step(self, cohort, state, server):
            cohort.vectors.inner(cohort.start)
            return super().step(cohort, state, server)

    with pytest.raises(RuntimeError, match="`Asks` declares `unnormalized_weight`.*asked for `inner`"):
        trainer(rule=Asks()).fit(Classifier(), loader())
    trainer(rule=Asks(), storage="device").fit(Classifier(), loader())


# ---------------------------------------------------------------------- logs


class Logs(Classifier):
    def __init__(self):
        super().__init__()
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        size = float(len(x))
        self.log("mean", size)
        self.log("epoch_only", size, on_step=False, on_epoch=True)
        self.log("both", size, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", torch.tensor(size), reduce_fx="max")
        self.log("smallest", size, reduce_fx=min)
        self.log("total", size, reduce_fx="sum")
        self.log("weighted", size, batch_size=1)
        self.log("hidden", 1.0, logger=False)
        self.log_dict({"pair/a": 1.0, "pair/b": 2.0})
        self.train_accuracy(z, y)
        self.log("accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return cross_entropy(z, y)


def test_self_log_is_merged_once_a_round_weighted_by_examples():
    from lightning.pytorch.loggers import CSVLogger

    runner = trainer(
        rounds=3,
        num_clients=2,
        alpha=None,
        partitioner=IndexPartitioner([range(0, 20), range(20, 31)]),  # batches of 8, 8, 4 and of 8, 3
        logger=CSVLogger("logs"),
        log_every_n_steps=50,
        enable_progress_bar=False,
    )
    runner.fit(Logs(), plain(31), val_loader())
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    weighted = (8 * 8 + 8 * 8 + 4 * 4 + 8 * 8 + 3 * 3) / 31
    for name in ("mean", "epoch_only", "both", "both_step", "both_epoch"):
        assert metrics[name] == pytest.approx(weighted), name
    assert (metrics["largest"], metrics["smallest"], metrics["total"]) == (8.0, 3.0, 31.0)
    assert metrics["weighted"] == pytest.approx(31 / 5)
    assert metrics["pair/b"] == 2.0
    assert 0 < metrics["accuracy"] < 1
    assert metrics["accuracy"] * 31 == pytest.approx(round(metrics["accuracy"] * 31), abs=1e-3), "pooled over clients"
    assert runner.progress_bar_metrics["both_epoch"] == pytest.approx(weighted)
    with open(runner.logger.log_dir + "/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["mean"]] == [0, 1, 2]
    assert [int(r["step"]) for r in rows if r["accuracy"]] == [0, 1, 2]
    assert [int(r["step"]) for r in rows if r["val_acc"]] == [0, 1, 2]
    assert "hidden" not in rows[0]
    assert any(r["summary/rounds"] for r in rows)


def test_metrics_are_reset_once_a_round():
    class Watch(FederatedCallback):
        counts: list = []  # noqa: RUF012

        def on_round_start(self, trainer, pl_module, round_idx, clients):
            self.counts.append(int(pl_module.train_accuracy.tp.sum() + pl_module.train_accuracy.fn.sum()))

    watch = Watch()
    trainer(rounds=3, callbacks=[watch]).fit(Logs(), plain())
    assert watch.counts == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_step": False, "on_epoch": False}, "logs nothing"),
        ({"enable_graph": True}, "enable_graph=True"),
        ({"reduce_fx": torch.std}, "reduce_fx"),
        ({"value": torch.zeros(2)}, "single number"),
        ({"value": {"a": 1.0}}, "its own name"),
        ({"value": "text"}, "takes a number"),
    ],
)
def test_what_self_log_cannot_do_is_refused_by_name(arguments, message):
    class Asks(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("it", **{"value": 1.0, **arguments})
            return cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(ValueError, match=message):
        trainer().fit(Asks(), loader())


def test_epoch_hooks_may_log():
    class Hooks(Classifier):
        def on_train_epoch_end(self):
            self.log("from_epoch_end", 3.0)

    runner, _ = train(Hooks())
    assert float(runner.callback_metrics["from_epoch_end"]) == 3.0


# ---------------------------------------------------------------------- observers, and the end


def test_observers_see_rounds_and_clients():
    class Watch(FederatedCallback):
        def __init__(self):
            self.seen = []

        def on_round_start(self, trainer, pl_module, round_idx, clients):
            self.seen.append(("start", round_idx, tuple(clients)))

        def on_client_end(self, trainer, pl_module, update):
            self.seen.append(("client", update.client, update.num_examples))

        def on_round_end(self, trainer, pl_module, report):
            self.seen.append(("end", report.round, sorted(report.logged)))

    watch = Watch()
    trainer(rounds=1, callbacks=[watch], **HALVES).fit(Classifier(), plain())
    assert watch.seen == [
        ("start", 0, (0, 1)), ("client", 0, 20), ("client", 1, 20), ("end", 0, ["train_loss"]),
    ]  # fmt: skip


def test_the_closing_table(capsys):
    runner, module = train(rounds=2, rule=FedHAWCallback(), val=val_loader())
    summary, out = runner.federation_summary, capsys.readouterr().out
    assert (summary["rule"], summary["rounds"], summary["clients"], summary["parameters"]) == (
        "FedHAWCallback",
        2,
        4,
        83,
    )
    assert summary["bytes_down"] == summary["bytes_up"] == 2 * 4 * 83 * 4
    assert list(summary["seconds"]) == ["broadcast", "local training", "channel", "aggregation", "validation"]
    assert summary["weight_min"] <= 0.25 <= summary["weight_max"]
    assert out.count("FedHAWCallback") == 1
    for word in ("worst decile", "val_acc", "scale", "local training"):
        assert word in out
    x, y = samples(120).tensors
    accuracies = []
    for own in runner.fit_loop.federation.data.train_indices:
        accuracies.append((module.net(x[own]).argmax(1) == y[own]).float().mean())
    stats = summary["client_metrics"]["val_acc"]
    assert stats["mean"] == pytest.approx(float(torch.stack(accuracies).mean()), abs=1e-6)
    assert stats["std"] == pytest.approx(float(torch.stack(accuracies).std()), abs=1e-6)
    assert stats["worst_decile"] == pytest.approx(float(torch.stack(accuracies).quantile(0.1)), abs=1e-6)


STEPS = partial(StepLR, step_size=2)
RULES = {
    FedHAWCallback: (
        "lr_gamma=1, lr_lambda=0, lr_step=0.5, momentum=0.8, damping=0.25, scale_bounds=(0.9, 1.1),"
        " step_bounds=(1, 64), guard=True, hyper_optimizer=SGD, memory=device",
        ["scale", "server step", "weight min", "weight max"],
    ),
    PublishedFedHAWCallback: (
        "PublishedFedHAWCallback(lr_gamma=0.001, lr_lambda=0.01, jacobian=diagonal, gamma_for_lambda=new,"
        " pseudo_gradient=weighted, normalize_by=lr, hyper_optimizer=SGD, memory=device",
        ["scale", "weight min", "weight max"],
    ),
    FedHyperCallback: ("alpha_bounds=(0.333333, 3), beta_bounds=(0.1, 10), normalize_by=none, hyper_lr=1", ["alpha"]),
    ScaffoldCallback: ("ScaffoldCallback(option=II, server_lr=1)", ["ScaffoldObjective, FedProx"]),
    FedNovaCallback: ("FedNovaCallback(momentum=0, proximal=0.5", ["tau eff"]),
    FedAdpCallback: ("smooth_by=participations", ["weight/min", "weight/max"]),
    FedAdamCallback: ("FedAdamCallback(lr=0.1, beta1=0.9, beta2=0.99, tau=0.001", ["server lr"]),
    partial(
        FedOptCallback, partial(torch.optim.SGD, momentum=0.9), rule=FedAdpCallback(gompertz=0.5), lr_scheduler=STEPS
    ): (
        "optimizer=SGD(momentum=0.9), lr=1, lr_scheduler=StepLR(step_size=2), rule=FedAdpCallback(gompertz=0.5,",
        ["server lr", "weight/min", "weight/max"],
    ),
}


@pytest.mark.parametrize(("make", "opening", "closing"), [(make, *told) for make, told in RULES.items()])
def test_the_opening_line_has_the_settings_and_the_table_what_was_learned(make, opening, closing, caplog, capsys):
    beside = [ErasureChannel(0.25, fallback="discard"), FedProx(mu=0.5)]
    train(rounds=3, rule=make(), callbacks=beside, seed=4, client_eval=False)
    (block,) = [message for message in caplog.messages if message.startswith("Federation:")]
    table = capsys.readouterr().out
    lines = {line.split()[0]: line for line in block.splitlines()[1:]}
    assert opening in lines["rule"]
    assert lines["channels"].endswith(" ErasureChannel(probability=0.25, link=uplink, fallback=discard)")
    assert "FedProx(mu=0.5)" in lines["objectives"]
    assert "4 clients with " in lines["clients"]
    for word in (*closing, "ErasureChannel (uplink)", "objectives"):
        assert word in table, word


def test_held_out_data_is_not_trained_on_and_is_what_clients_are_evaluated_on():
    runner, _ = train(rounds=1, client_val_fraction=0.25)
    data = runner.fit_loop.federation.data
    for own, kept, held in zip(data.partition.indices, data.train_indices, data.held_out_indices, strict=True):
        assert sorted([*kept.tolist(), *held.tolist()]) == own.tolist()
        assert len(held) == round(0.25 * len(own))
    assert sum(b.size for b in data.evaluation_batches(0, 1000)) == len(data.held_out_indices[0])
    assert sum(b.size for b in data.evaluation_batches(0, 3)) == 3


def test_client_evaluation_can_be_left_out():
    runner, _ = train(rounds=1, client_eval=False)
    assert runner.federation_summary["client_metrics"] == {}


def test_validation_and_prediction_use_the_global_model():
    runner, module = train(rounds=2, val=val_loader())
    logged = float(runner.callback_metrics["val_acc"])
    (result,) = runner.validate(module, val_loader(), verbose=False)
    assert result["val_acc"] == logged
    predictions = torch.cat(runner.predict(module, val_loader()))
    assert (predictions == samples(60, seed=1).tensors[1]).float().mean() == pytest.approx(logged)
