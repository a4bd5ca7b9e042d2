"""What the collaborators of a federation do by themselves."""

import pytest
import torch

from federations import Classifier, loader, trainer
from lightning_fedhaw import ErasureChannel, FedAvgCallback, ScaffoldCallback
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.placement import Placement
from lightning_fedhaw.federation.records import Received, RoundPlan, Tally, UpdateRecord
from lightning_fedhaw.federation.stores import OrderedSum, RowStore, RunningSum, make_store
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks


def update(client, displacement=(0.0, 0.0)):
    return ClientUpdate(client, 10, 5, 0, torch.tensor(displacement))


def record(client, unnormalized_weight=1.0, received=True):
    return UpdateRecord(update(client), received, unnormalized_weight, rank=0, rms=0.0)


def test_long_work_is_distributed_first():
    placement = Placement(Ranks(1, 2), is_sticky=False)
    # 5 to process 0, 4 to process 1, 2 to process 1 (4 < 5), 1 to process 0 (5 < 6).
    assert placement.assign([7, 8, 9, 3], {7: 5.0, 8: 1.0, 9: 4.0, 3: 2.0}.__getitem__) == [9, 3]
    assert placement.process_of == {7: 0, 8: 0, 9: 1, 3: 1}


@pytest.mark.parametrize("is_sticky", [True, False])
def test_clients_come_back_to_what_they_left_behind(is_sticky):
    placement = Placement(Ranks(0, 2), is_sticky=is_sticky)
    placement.assign([0, 1], [3.0, 2.0].__getitem__)
    # Alone, 2 is the longest and would go to process 0, and 0 to process 1.
    own_clients = placement.assign([0, 2], [3.0, 0.0, 9.0].__getitem__)
    assert own_clients == ([0] if is_sticky else [2])
    assert placement.process_of == ({0: 0, 1: 1, 2: 1} if is_sticky else {0: 1, 2: 0})


def test_clients_come_back_in_a_resumed_run():
    placement = Placement(Ranks(0, 2), is_sticky=True)
    placement.assign([0, 1], [3.0, 2.0].__getitem__)
    state = placement.state_dict()
    resumed = Placement(Ranks(0, 2), is_sticky=True)
    resumed.load_state_dict(state)
    assert resumed.assign([0, 2], [3.0, 0.0, 9.0].__getitem__) == [0]
    # Three processes have other sums anyway.
    other = Placement(Ranks(0, 3), is_sticky=True)
    other.load_state_dict(state)
    assert other.process_of == {}
    assert Placement(Ranks(0, 2), is_sticky=False).state_dict() == Placement(Ranks(), is_sticky=True).state_dict() == {}


def test_memories_are_merged_by_the_process_that_trained_last():
    placement = Placement(Ranks(0, 2), is_sticky=True)
    placement.process_of = {1: 1, 2: 0}
    # 3 has not been back since a checkpoint, so both processes have the same of it; 4 was forgotten where it is.
    placement.process_of[4] = 1
    memories = [{2: "new", 1: "old", 3: "same", 4: "old"}, {1: "new", 2: "old", 3: "same"}]
    assert list(placement.merged(memories).items()) == [(1, "new"), (2, "new"), (3, "same")]
    assert placement.merged([None, {1: "new"}]) == {1: "new"}
    assert placement.merged([4, 4]) == 4


def test_slots_are_those_that_train_and_those_that_may_be_filled():
    channel = ErasureChannel(0.5)
    models = {4: torch.zeros(2), 1: torch.zeros(2), 3: torch.zeros(2)}
    plan = RoundPlan(0, [1, 2, 3, 4], torch.zeros(2), models, {1: channel})
    assert plan.trainees == [4, 3]
    assert plan.slots == [4, 3, 1]
    received = Received([record(4), record(1, received=False)], [])
    assert [each.client for each in received.updates] == [4]


def test_a_tally_is_not_changed_through_its_state():
    tally = Tally(bytes_up=3)
    state = tally.state_dict()
    again = Tally.from_state(state)
    with again.phase("broadcast"):
        pass
    assert again.bytes_up == 3
    assert again.seconds["broadcast"] > 0
    assert tally.seconds["broadcast"] == state["seconds"]["broadcast"] == 0


def test_rows_and_a_running_sum_hold_the_same():
    start, ranks = torch.tensor([1.0, 1.0]), Ranks()
    rule = FedAvgCallback()
    stores = [make_store(rule, FederationOptions(storage=s), start, 2, ranks, summed=False) for s in ("device", "auto")]
    assert [type(store) for store in stores] == [RowStore, RunningSum]
    records = [record(0, unnormalized_weight=1.0), record(1, unnormalized_weight=3.0)]
    for store in stores:
        store.commit(update(0, (4.0, 0.0)), 1.0)
        store.slot().copy_(torch.tensor([0.0, 8.0]))
        store.commit(ClientUpdate(1, 10, 5, 0, store.slot()), 3.0)
        # 1 + (1 * 4 + 3 * 0) / 4, and 1 + (1 * 0 + 3 * 8) / 4.
        mixed = store.vectors(start, records).weighted_sum(torch.tensor([0.25, 0.75], dtype=torch.float64))
        assert mixed.tolist() == [2.0, 7.0]


@pytest.mark.parametrize(
    ("storage", "summed", "size", "kind"),
    [
        ("host", False, 1, RowStore),
        ("host", True, 1, RunningSum),
        ("auto", False, 2, OrderedSum),
        ("device", False, 2, RowStore),
    ],
)
def test_the_store_that_is_made(storage, summed, size, kind):
    options = FederationOptions(storage=storage, reduction="ordered")
    store = make_store(FedAvgCallback(), options, torch.zeros(3), 2, Ranks(0, size), summed=summed)
    assert type(store) is kind


def test_a_round_that_fails_is_undone_with_every_owner_of_a_state():
    rule = ScaffoldCallback()
    options = {"buffers": "local", "optimizer_state": "kept", "client_eval": False}
    runner = trainer(rounds=1, rule=rule, callbacks=[ErasureChannel(0.0, fallback="reuse_update")], **options)
    runner.fit(Classifier(norm=True), loader())
    federation = runner.fit_loop.federation
    (channel,) = federation.uplink
    (objective,) = rule.objectives
    before = federation.run_state.snapshot(federation.engine)
    mean = {name: value.clone() for name, value in objective.mean.items()}
    clients = set(before.entries["optimizers"])
    assert clients == set(federation.buffers.local.of_clients) == set(channel.state_dict()["received"])

    federation.engine.optimizer_states = {}
    federation.buffers.local.of_clients[0] = {}
    channel.reset()
    objective.reset()
    rule.state = {"spoiled": 1}
    federation.server.install(federation.server.parameters() + 1)
    federation.run_state.restore(federation.engine, before)

    assert set(federation.engine.optimizer_states) == set(channel.state_dict()["received"]) == clients
    assert federation.buffers.local.of_clients[0]
    assert objective.mean.keys() == mean.keys()
    assert all(torch.equal(objective.mean[name], value) for name, value in mean.items())
    assert "spoiled" not in rule.state
    parameters = list(federation.host.module.parameters())
    assert torch.equal(federation.layout.read(parameters), before.parameters)
