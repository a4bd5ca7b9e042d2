"""Attributes of a module that training changes belong to the client that trains."""

import warnings
from collections import defaultdict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, flat, samples, trainer
from lightning_fedhaw import FedAvgCallback, FederatedCallback, FederatedTrainer, IIDPartitioner
from lightning_fedhaw.clients.packed import are_same, pack, unpack
from lightning_fedhaw.data import FixedSequenceSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers.*bottleneck")


def data(count=48):
    return DataLoader(samples(count), batch_size=8)


def fit(module, rounds=2, clients=3, second_door=False, ckpt_path=None, **kwargs):
    """Three clients with two batches each, unless it is said otherwise."""
    if second_door:
        rule = FedAvgCallback(num_clients=clients, partitioner=IIDPartitioner())
        runner = pl.Trainer(max_epochs=rounds, callbacks=[rule], **QUIET)
    else:
        options = {"partitioner": IIDPartitioner(), "alpha": None, "client_eval": False, **kwargs}
        runner = trainer(rounds=rounds, num_clients=clients, **options)
    runner.fit(module, data(), ckpt_path=ckpt_path)
    return runner


LOG = []
"""What the steps below have seen; not in the module, where it would be a client's."""


class Remembers(Classifier):
    """Has state of all kinds, which it reads and changes in every step."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.state = torch.zeros(2)
        self.array = np.zeros(2)
        self.cache = {"seen": []}
        self.pairs = (1, [2])
        LOG.clear()

    def training_step(self, batch, batch_idx):
        LOG.append(
            (self.current_epoch, self.steps, float(self.state[0]), len(self.cache["seen"]), hasattr(self, "new"))
        )
        self.steps += 1
        self.state += 1
        self.array += 1
        self.cache["seen"].append(batch_idx)
        self.pairs[1].append(batch_idx)
        self.new = self.steps
        return super().training_step(batch, batch_idx) * (1 + self.steps / 10)


FIRST = [(0, 0, 0.0, 0, False), (0, 1, 1.0, 1, True)]
SECOND = [(1, 2, 2.0, 2, True), (1, 3, 3.0, 3, True)]


@pytest.mark.parametrize("second_door", [False, True])
def test_every_client_has_its_own_and_finds_it_again(second_door):
    fit(Remembers(), second_door=second_door)
    assert LOG == FIRST * 3 + SECOND * 3


def test_one_client_alone_is_a_stock_fit():
    federated, stock = Remembers(), Remembers()
    fit(federated, clients=1)
    pl.Trainer(max_epochs=2, **QUIET).fit(stock, data())
    torch.testing.assert_close(flat(federated), flat(stock), rtol=0, atol=1e-7)
    assert (federated.steps, federated.new, federated.cache, federated.pairs) == (
        stock.steps,
        stock.new,
        stock.cache,
        stock.pairs,
    )
    assert torch.equal(federated.state, stock.state)
    assert federated.array.tolist() == stock.array.tolist() == [12.0, 12.0]


def test_a_client_that_comes_later_starts_from_where_fit_began():
    fit(Remembers(), rounds=3, sampler=FixedSequenceSampler([[0], [0, 1], [1, 2]]))
    seen = [(steps, has_new) for _, steps, _, _, has_new in LOG]
    client_0 = [(0, False), (1, True), (2, True), (3, True)]
    assert seen == [*client_0, (0, False), (1, True), (2, True), (3, True), (0, False), (1, True)]


def test_what_several_clients_added_is_shown_together():
    module = Remembers()
    seen = module.cache["seen"]
    fit(module, rounds=1)
    assert module.cache["seen"] == [0, 1, 0, 1, 0, 1]
    assert module.cache["seen"] is seen, "the same object, which others may hold"
    assert (module.steps, module.new) == (2, 2), "the mean of the clients' numbers"
    assert module.state.tolist() == [0.0, 0.0], "a tensor of several numbers is what it was before the round"


class Averages(Classifier):
    """Lists and sums that an epoch hook averages and clears."""

    def __init__(self):
        super().__init__()
        self.outputs = []
        self.by_name = defaultdict(list)
        self.total = 0.0
        self.count = 0
        LOG.clear()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        self.by_name["loss"].append(loss.detach())
        self.total += loss.item()
        self.count += 1
        return loss

    def on_train_epoch_end(self):
        logged = float(self.trainer.callback_metrics["train_loss"])
        means = (torch.stack(self.outputs).mean(), torch.stack(self.by_name["loss"]).mean(), self.total / self.count)
        LOG.append((logged, len(self.outputs), [float(mean) for mean in means]))
        self.outputs.clear()
        self.by_name.clear()
        self.total = 0.0
        self.count = 0


def test_epoch_hooks_that_average_and_clear_see_all_clients_of_the_round():
    fit(Averages(), rounds=3)
    assert [count for _, count, _ in LOG] == [6, 6, 6]
    for logged, _, means in LOG:
        assert means == pytest.approx([logged] * 3, rel=1e-5)


def test_a_value_that_a_hook_sets_between_rounds_is_everybodys():
    class Resets(Remembers):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.steps = 100

    fit(Resets(), rounds=3)
    assert [steps for epoch, steps, *_ in LOG if epoch == 2] == [100, 101] * 3


def test_a_class_that_is_looked_up_in_the_first_step_is_no_state():
    class Lazy(Classifier):
        output_class = None

        def training_step(self, batch, batch_idx):
            self.output_class = self.output_class or dict
            return self.output_class(loss=super().training_step(batch, batch_idx))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is changed in local training")
        fit(Lazy(), rounds=2)


def test_what_cannot_be_kept_is_named_once():
    class Holds(Classifier):
        thing = None

        def training_step(self, batch, batch_idx):
            self.thing = torch.distributions.Normal(0.0, 1.0)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"`self\.thing` is changed in local training, and cannot be kept") as caught:
        fit(Holds())
    assert len([warning for warning in caught if "self.thing" in str(warning.message)]) == 1


def test_a_resumed_run_goes_on_with_every_clients_own():
    straight, first, second = Remembers(), Remembers(), Remembers()
    fit(straight, rounds=4)
    expected = [entry for entry in LOG if entry[0] >= 2]
    LOG.clear()
    runner = fit(first, rounds=2)
    runner.save_checkpoint("kept.ckpt")
    assert torch.load("kept.ckpt", weights_only=True)
    LOG.clear()
    fit(second, rounds=4, ckpt_path="kept.ckpt")
    assert expected == LOG
    assert torch.equal(flat(straight), flat(second))
    assert (straight.cache, straight.steps, straight.new) == (second.cache, second.steps, second.new)


def test_a_failed_round_is_undone():
    class Fails(Remembers):
        def training_step(self, batch, batch_idx):
            if len(LOG) == 9:  # the second client of the second round
                LOG.append(None)
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module, straight = Fails(), Remembers()
    runner = trainer(rounds=2, num_clients=3, alpha=None, partitioner=IIDPartitioner(), client_eval=False)
    with pytest.raises(RuntimeError, match="boom"):
        runner.fit(module, data())
    assert (module.steps, module.cache) == (2, {"seen": [0, 1] * 3}), "as the first round left it"
    LOG.clear()
    runner.fit(module, data())
    assert LOG == SECOND * 3
    fit(straight)
    assert torch.equal(flat(module), flat(straight))


def test_an_observer_that_fails_after_the_aggregation_undoes_what_was_shown():
    class Fails(FederatedCallback):
        def on_round_end(self, trainer, pl_module, report):
            if report.round == 1:
                raise RuntimeError("boom")

    module = Remembers()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, callbacks=[Fails()])
    assert (module.steps, module.cache) == (2, {"seen": [0, 1] * 3})


def test_steps_that_the_server_makes_are_nobodys():
    fit(Remembers(), rounds=2, buffers="recalibrate")
    assert [entry for entry in LOG if entry[0] == 1][:6] == SECOND * 3


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_several_processes_keep_and_show_the_same():
    results = []
    for place in ({}, {"devices": 2, "strategy": "federated_notebook", "reduction": "ordered"}):
        module = SaysWhatItShows()
        runner = fit(module, rounds=3, sampler=FixedSequenceSampler([[0, 1], [1, 2], [0, 1, 2]]), **place)
        results.append((flat(module), float(runner.callback_metrics["shown"])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == pytest.approx(14 + 100 * (4 + 6 + 4) / 3)


class SaysWhatItShows(Remembers):
    """Where a spawned process can find it."""

    def on_train_epoch_end(self):
        self.log("shown", float(len(self.cache["seen"]) + 100 * self.steps), sync_dist=True)


def test_the_automatic_engine_trains_such_a_module_sequentially():
    runner = FederatedTrainer(
        rounds=2, num_clients=12, partitioner=IIDPartitioner(), callbacks=[FedAvgCallback()], client_eval=False, **QUIET
    )
    runner.fit(Remembers(), DataLoader(samples(96), batch_size=8))
    assert LOG == [(0, 0, 0.0, 0, False)] * 12 + [(1, 1, 1.0, 1, True)] * 12


def test_packed_values_are_copies_that_compare_by_value():
    nan = float("nan")
    value = {"a": [1, (2.5, None)], "b": {3, 1}, "c": torch.tensor([nan, 1.0]), 4: np.arange(3), "d": defaultdict(list)}
    packed = pack(value)
    value["c"][1] = 2.0
    value["a"].append(0)
    again = unpack(packed, torch.device("cpu"))
    assert (again["a"], again["b"]) == ([1, (2.5, None)], {1, 3})
    assert (float(again["c"][1]), again[4].tolist(), again["d"]["new"]) == (1.0, [0, 1, 2], [])
    seen = (torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"), torch.device("cuda", 1))
    again = unpack(pack(seen), torch.device("cuda", 0))
    assert again == (torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"), torch.device("cuda", 0))
    assert type(again[1]) is torch.Size
    assert are_same(packed, pack(unpack(packed, torch.device("cpu")))), "NaN included"
    assert not are_same(packed, pack(value))
