"""A rule's probe: who is asked, what arrives, what it costs, and that it changes nothing else."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    AWGNChannel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedOptCallback,
    IndexPartitioner,
    OverTheAirChannel,
    Probe,
    QuantizationChannel,
    SparsificationChannel,
)
from lightning_fedhaw.extending import AggregationRule, RuleOutput

POINTS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 6.0], [0.0, 8.0]])
SPLIT = [[0, 1], [2, 3, 4]]


class Point(pl.LightningModule):
    """A point that is drawn to those of the data: the gradient of a batch is the point minus their mean."""

    def __init__(self, lr=0.5):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return (self.point - batch[0]).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Listener(FedAvgCallback):
    """FedAvg that keeps what its probe has answered."""

    def __init__(self, probe, **kwargs):
        super().__init__(**kwargs)
        self.probe = probe
        self.heard = []

    def learn_from(self, probe, state, server):
        self.heard.append(probe)
        return {**state, "gradient": probe.gradient}, {"heard": 1.0}


def ask(probe, rounds=1, callbacks=(), data=None, module=None, **kwargs):
    """A federation of two clients whose points have the means (2, 0) and (0, 6)."""
    rule = Listener(probe)
    kwargs = {"partitioner": IndexPartitioner(SPLIT), "num_clients": None, "alpha": None, **kwargs}
    data = data or DataLoader(TensorDataset(POINTS), batch_size=5)
    runner, module = train(module or Point(), data, rounds=rounds, rule=rule, callbacks=callbacks, **kwargs)
    return rule, runner


def test_the_parallel_form_asks_at_the_model_that_is_broadcast():
    rule, runner = ask(Probe("cohort"))
    (heard,) = rule.heard
    assert heard.model.tolist() == [1.0, 1.0]
    assert heard.clients.tolist() == [0, 1]
    assert heard.weights.tolist() == [0.4, 0.6]
    # Client 0 has the gradient (-1, 1), and client 1 has (1, -5).
    assert heard.gradient.tolist() == pytest.approx([0.4 * -1 + 0.6 * 1, 0.4 * 1 + 0.6 * -5])
    assert heard.loss == pytest.approx(0.4 * (1 + 5) / 4 + 0.6 * (10 + 26 + 50) / 6)
    metrics = runner.callback_metrics
    assert (metrics["probe_clients"], metrics["heard"]) == (2, 1)
    assert float(metrics["probe_loss"]) == pytest.approx(heard.loss)
    # The cohort has the model: a gradient and a loss are sent up beside the update of eight bytes.
    assert (metrics["bytes_down"], metrics["bytes_up"]) == (16, 16 + 2 * (8 + 4))


def test_the_sequential_form_asks_at_the_new_model_in_a_round_of_its_own():
    rule, runner = ask(Probe("cohort", form="sequential", weighting="uniform"), rounds=2)
    first, second = rule.heard
    new = 0.4 * torch.tensor([1.5, 0.5]) + 0.6 * torch.tensor([0.5, 3.5])
    assert torch.allclose(first.model, new)
    assert torch.allclose(first.gradient, new - torch.tensor([1.0, 3.0]))
    assert torch.equal(second.model, runner.lightning_module.point.detach())
    summary = runner.federation_summary
    assert summary["bytes_down"] == 2 * (16 + 16)
    tally = runner.fit_loop.federation.tally
    assert (tally.probe_rounds, tally.probe_answers, tally.skipped_probes) == (2, 4, 0)


def test_clients_are_drawn_afresh_and_those_outside_of_the_cohort_are_sent_the_model():
    rule = Listener(Probe(num_clients=3))
    runner, _ = train(rule=rule, rounds=6, num_clients=8, clients_per_round=2)
    drawn = [heard.clients.tolist() for heard in rule.heard]
    assert all(len(clients) == 3 and clients == sorted(clients) for clients in drawn)
    assert len({tuple(clients) for clients in drawn}) > 3
    federation = runner.fit_loop.federation
    message = federation.transport.message_bytes("downlink")
    strangers = sum(len(set(clients) - set(federation.cohort(t))) for t, clients in enumerate(drawn))
    assert runner.federation_summary["bytes_down"] == message * (6 * 2 + strangers)
    assert runner.federation_summary["bytes_up"] == message * (6 * 2 + 18) + 4 * 18


def test_held_out_data_and_data_of_the_server():
    # The last point of each client is held out: (3, 0) and (0, 8).
    held_out = {"client_val_fraction": 0.5}
    rule, runner = ask(Probe("validation", weighting="uniform"), **held_out)
    clients = runner.federation_clients
    means = [POINTS[samples].mean(0) for samples in clients.held_out_indices]
    assert torch.allclose(rule.heard[0].gradient, torch.ones(2) - torch.stack(means).mean(0))
    with pytest.raises(ValueError, match="`Listener` probes held-out data .* no client has any. Hold some out by"):
        ask(Probe("validation"))

    train_set = TensorDataset(POINTS)
    own = FederatedDataModule(train_set, batch_size=2, proxy=TensorDataset(POINTS[:3]))
    rule, runner = ask(Probe("proxy"), data=own)
    assert torch.allclose(rule.heard[0].gradient, torch.ones(2) - POINTS[:3].mean(0))
    assert runner.callback_metrics["bytes_up"] == 16
    with pytest.raises(ValueError, match="`Listener` works with data of the server's own, and there is none"):
        ask(Probe("proxy"))


def test_one_evaluation_set_for_each_client_is_its_held_out_data():
    sets = [TensorDataset(POINTS[:1]), TensorDataset(POINTS[4:])]
    data = FederatedDataModule(TensorDataset(POINTS), batch_size=2, val=sets)
    module = Point()
    module.validation_step = lambda batch, batch_idx: None
    rule, _ = ask(Probe("validation", weighting="uniform", batch_size=1), data=data, module=module)
    assert rule.heard[0].gradient.tolist() == [1 - 0.5, 1 - 4.0]


class Missing(ErasureChannel):
    """Some clients send no update, or no answer to the probe."""

    def __init__(self, updates=(), answers=()):
        super().__init__(0.5, fallback="discard")
        self.missing = {False: updates, True: answers}

    def outage(self, round_idx, clients, seed):
        return torch.tensor([client in self.missing[self.context.is_probe] for client in clients])


def test_answers_that_are_lost_are_left_out_and_without_any_nothing_is_learned():
    losses = [ErasureChannel(0.4), ErasureChannel(0.3, link="downlink")]
    rule = Listener(Probe())
    runner, _ = train(rule=rule, rounds=12, callbacks=losses, num_clients=6)
    counts = [len(heard.clients) for heard in rule.heard]
    assert len(set(counts)) > 2
    assert sum(counts) < 6 * 12 * 0.7
    assert all(heard.weights.sum() == pytest.approx(1) for heard in rule.heard)
    rule = Listener(Probe())
    with pytest.warns(UserWarning, match="No finite answer of the probe was received in round 0: what `Listener`"):
        runner, _ = train(rule=rule, rounds=1, callbacks=[Missing(answers=range(4))])
    assert rule.heard == []
    assert runner.callback_metrics["probe_skipped"] == 1
    assert runner.federation_summary["skipped_probes"] == 1


class Misses(ErasureChannel):
    """Keeps the model of round 1 from client 0, which then trains that of round 0."""

    def outage(self, round_idx, clients, seed):
        return torch.tensor([round_idx == 1 and client == 0 for client in clients])


def test_a_client_with_an_outdated_model_does_not_answer():
    rule, _ = ask(Probe("cohort"), rounds=2, callbacks=[Misses(0.1, link="downlink", fallback="reuse_model")])
    first, second = rule.heard
    assert first.clients.tolist() == [0, 1]
    assert second.clients.tolist() == [1]
    assert torch.allclose(second.gradient, second.model - torch.tensor([0.0, 6.0]))


class Spoiled(Point):
    """The loss of a client is not a number where one of its points is far away."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch[0].max() > 7:
            return loss * float("nan")
        return loss


def test_answers_that_are_not_finite_are_named_and_left_out():
    probe = Probe("cohort", form="sequential")
    with pytest.warns(UserWarning, match="Client 1 answered the probe of round 0 with a loss or gradient that is not"):
        rule, _ = ask(probe, module=Spoiled(), callbacks=[Missing(updates=[1])])
    assert rule.heard[0].clients.tolist() == [0]
    with pytest.raises(FloatingPointError, match='Client 1 .*, and `on_nonfinite="raise"` ends the run'):
        ask(probe, module=Spoiled(), on_nonfinite="raise", callbacks=[Missing(updates=[1])])


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_a_probe_changes_nothing_else(form, engine):
    channels = lambda: [  # noqa: E731
        SparsificationChannel(0.3),
        QuantizationChannel(4),
        ErasureChannel(0.3, fallback="reuse_update"),
        ErasureChannel(0.2, link="downlink", fallback="reuse_model"),
    ]
    options = {"rounds": 4, "num_clients": 5, "clients_per_round": 3, "engine": engine}
    options |= {"buffers": "local", "optimizer_state": "kept"}
    make = lambda: Classifier(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), norm=True, dropout=0.2)  # noqa: E731
    _, without = train(make(), loader(drop_last=True), rule=FedAvgCallback(), callbacks=channels(), **options)
    _, beside = train(make(), loader(drop_last=True), rule=Listener(Probe(form=form)), callbacks=channels(), **options)
    assert torch.equal(flat(without), flat(beside))


def test_messages_of_the_probe_go_through_the_channels_with_draws_of_their_own():
    clear, _ = ask(Probe("cohort"))
    rounded, runner = ask(Probe("cohort"), callbacks=[QuantizationChannel(8), AWGNChannel(snr_db=20.0)])
    difference = rounded.heard[0].gradient - clear.heard[0].gradient
    assert 0 < difference.abs().max() < 1
    assert runner.callback_metrics["bytes_up"] < 4 * 8 * 4
    summed, _ = ask(Probe("cohort"), callbacks=[OverTheAirChannel(snr_db=40.0)])
    assert summed.heard[0].gradient.tolist() == pytest.approx(clear.heard[0].gradient.tolist(), rel=0.2)
    assert not torch.equal(summed.heard[0].gradient, clear.heard[0].gradient)
    with pytest.raises(
        ValueError, match="accounts for one message a client and round, and Listener asks clients for further ones"
    ):
        private = DifferentialPrivacyChannel(1.0, 0.5, delta=None)
        train(rule=Listener(Probe(), weighting="uniform"), callbacks=[private])


def fit(rounds, ckpt_path=None, stock=False):
    federation = {"num_clients": 4, "alpha": 10.0} if stock else {}
    rule = Listener(Probe(num_clients=2), **federation)
    saved = ModelCheckpoint(dirpath="kept", save_top_k=-1, filename="{epoch}")
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [rule, saved]}
    if stock:
        runner = pl.Trainer(max_epochs=rounds, **options)
    else:
        runner = FederatedTrainer(rounds=rounds, num_clients=4, alpha=10.0, **options)
    module = Classifier(norm=True, dropout=0.2)
    runner.fit(module, loader(drop_last=True), ckpt_path=ckpt_path)
    return rule, module


def test_stopping_and_the_stock_trainer_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, module = fit(4)
    stock, other = fit(4, stock=True)
    rest, resumed = fit(4, ckpt_path="kept/epoch=1.ckpt")
    assert torch.equal(flat(module), flat(other))
    assert torch.equal(flat(module), flat(resumed))
    for rule, count in ((stock, 4), (rest, 2)):
        assert len(rule.heard) == count
        for mine, theirs in zip(whole.heard[-count:], rule.heard, strict=True):
            assert torch.equal(mine.gradient, theirs.gradient)
            assert mine.loss == theirs.loss
        assert torch.equal(whole.state["gradient"], rule.state["gradient"])


class Stumbling(Listener):
    """Fails once, after it has learned."""

    def step(self, cohort, state, server):
        if cohort.round == 1 and self.probe.form == "parallel":
            raise RuntimeError("stumbled")
        return super().step(cohort, state, server)


def test_a_round_that_fails_is_unlearned():
    rule = Stumbling(Probe("cohort"))
    with pytest.raises(RuntimeError, match="stumbled"):
        train(rule=rule, rounds=2)
    assert len(rule.heard) == 2
    assert torch.equal(rule.state["gradient"], rule.heard[0].gradient)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_bits_of_one(processes):
    ends = []
    for place in ({}, {"devices": processes, "strategy": "federated_notebook"}):
        rule = Listener(Probe(num_clients=4))
        runner = trainer(rule=rule, num_clients=5, clients_per_round=3, reduction="ordered", rounds=3, **place)
        module = Classifier(norm=True, dropout=0.2)
        runner.fit(module, loader(drop_last=True))
        ends.append((rule.state["gradient"], flat(module), runner.callback_metrics["probe_loss"]))
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine, theirs)


class Mute(AggregationRule):
    """Asks, and does not listen."""

    probe = Probe()

    def step(self, cohort, state, server):
        weights = self.cohort_weights(cohort)
        return RuleOutput(cohort.vectors.weighted_sum(weights), state, weights)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(TypeError, match="`Mute` sets `probe` and has no method `learn_from`, which receives"):
        train(rule=Mute())
    with pytest.raises(ValueError, match="`num_clients`=9 of `Listener`'s probe is more than the 4 clients that have"):
        train(rule=Listener(Probe(num_clients=9)))
    with pytest.raises(ValueError, match="`num_clients`=2 is for clients that are drawn, and `source`='cohort' draws"):
        Probe("cohort", 2)
    with pytest.raises(ValueError, match="`rule` .Listener. learns by a probe"):
        FedOptCallback(rule=Listener(Probe()))


def test_a_module_that_trains_by_hand_has_no_loss_to_ask_for():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="`Listener` probes the loss that .* `automatic_optimization=False`"):
        train(module, rule=Listener(Probe()))


SIZES = []
"""Sizes of batches; a global one, because what a step does to its module is undone after a probe."""


class Counting(Classifier):
    """Writes down the sizes of the batches that it is given."""

    def training_step(self, batch, batch_idx):
        SIZES.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


class Dropping(Counting):
    """Draws masks in two places, so that larger batches have other ones."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.net.insert(0, nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("make", "limits", "is_larger"),
    [
        (Counting, {}, True),
        (partial(Counting, norm=True), {}, False),  # batch statistics
        (Dropping, {}, False),
        (Counting, {"limit_train_batches": 3}, False),  # would be other samples
    ],
)
def test_batches_are_larger_than_in_training_where_the_gradient_stays(make, limits, is_larger):
    gradients = []
    for batch_size in (None, 8):
        SIZES.clear()
        rule = Listener(Probe("cohort", batch_size=batch_size))
        train(make(), rule=rule, rounds=2, **limits)
        gradients.append(rule.heard[1].gradient)
        if batch_size is None:
            assert (max(SIZES) > 16) == is_larger
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    if not is_larger:
        assert torch.equal(*gradients)


class Adding(Counting):
    """Adds up the losses of its samples."""

    def training_step(self, batch, batch_idx):
        return len(batch[0]) * super().training_step(batch, batch_idx)


def test_a_loss_that_adds_up_its_samples_keeps_the_batches_of_training():
    SIZES.clear()
    train(Adding(), rule=Listener(Probe("cohort")), rounds=1)
    assert max(SIZES) == 16, "only in the attempt"
