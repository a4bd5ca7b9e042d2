"""Held-out parts, data sets of the clients' own, and clients that are too small."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, samples
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    HoldOut,
    IndexPartitioner,
)
from lightning_fedhaw.data.partitioners import Partition
from lightning_fedhaw.data.small_clients import only

CLIENTS = [torch.arange(10), torch.arange(10, 30), torch.arange(30, 31)]


def sizes(held_out):
    return [len(samples) for samples in held_out]


def test_a_fraction_a_number_and_one_that_stays():
    assert sizes(HoldOut(0.25).hold_out(CLIENTS, seed=0)) == [2, 5, 0]
    assert sizes(HoldOut(samples=12).hold_out(CLIENTS, seed=0)) == [9, 12, 0]
    first = HoldOut(samples=3).hold_out(CLIENTS, seed=0)
    assert [held.tolist() for held in HoldOut(samples=3).hold_out(CLIENTS, seed=0)] == [held.tolist() for held in first]
    assert [held.tolist() for held in HoldOut(samples=3).hold_out(CLIENTS, seed=1)] != [held.tolist() for held in first]
    assert all(torch.isin(held, own).all() for held, own in zip(first, CLIENTS, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_held_out_in_their_proportions(seed):
    # Of the first client 6, 3 and 1 samples, of which 5 are held out: 3, 1 or 2, and 0 or 1.
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] + [0] * 4 + [1] * 16 + [0])
    held = HoldOut(0.5, stratify=True).hold_out(CLIENTS, seed=seed, labels=labels)
    counts = [torch.bincount(labels[samples], minlength=3).tolist() for samples in held]
    assert counts[0][0] == 3
    assert counts[0][1] in (1, 2)
    assert sum(counts[0]) == 5
    assert counts[1] == [2, 8, 0]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_at_any_client(seed):
    # Group 2 belongs to both clients.
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2] + [2, 2] + [3] * 6 + [4] * 6 + [5] * 6)
    held = HoldOut(0.3, groups=groups).hold_out(CLIENTS[:2], seed=seed)
    inside = {int(group) for chosen in held for group in groups[chosen]}
    outside = set()
    for own, chosen in zip(CLIENTS, held, strict=False):
        outside |= {int(group) for group in groups[own[~torch.isin(own, chosen)]]}
    assert not inside & outside
    assert inside | outside == set(range(6))
    assert len(held[0]) >= 3
    assert len(held[1]) >= 6


def test_a_client_of_one_group_holds_out_nothing_and_that_is_said():
    def patients(dataset):
        return ["a"] * len(dataset)

    with pytest.warns(UserWarning, match=r"Clients \[0, 1\] hold out nothing"):
        held = HoldOut(0.3, groups=patients).hold_out(CLIENTS[:2], seed=0, dataset=TensorDataset(torch.zeros(30)))
    assert sizes(held) == [0, 0]


def test_given_samples():
    held = HoldOut(indices={1: [12, 11]}).hold_out(CLIENTS, seed=0)
    assert [samples.tolist() for samples in held] == [[], [11, 12], []]
    with pytest.raises(ValueError, match=r"`indices` must name the client's own samples, got \[11\] for client 0"):
        HoldOut(indices=[[11]]).hold_out(CLIENTS, seed=0)
    with pytest.raises(ValueError, match="`indices` must leave each client data to train on, got all .* client 2"):
        HoldOut(indices={2: [30]}).hold_out(CLIENTS, seed=0)
    with pytest.raises(ValueError, match=r"`indices` must name clients of 0 to 2, got \[7\]"):
        HoldOut(indices={7: [30]}).hold_out(CLIENTS, seed=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "one of `fraction`, `samples` and `indices`, got none"),
        ({"fraction": 0.1, "samples": 3}, "got fraction and samples"),
        ({"fraction": 0.1, "stratify": True, "groups": [1]}, "Give `stratify` or `groups`, not both"),
        ({"indices": [[1]], "stratify": True}, "leave `stratify` and `groups` out"),
        ({"fraction": 0.1, "groups": "ab"}, "`groups` must be one group per sample, or a function"),
    ],
)
def test_contradictions(arguments, said):
    with pytest.raises(ValueError, match=said):
        HoldOut(**arguments)


def test_what_does_not_fit_the_data():
    with pytest.raises(ValueError, match=r"`groups` must have one entry per sample \(30\), got 3"):
        HoldOut(0.1, groups=[1, 2, 3]).hold_out(CLIENTS, seed=0, dataset=TensorDataset(torch.zeros(30)))
    with pytest.raises(ValueError, match="`stratify=True` needs integer labels"):
        HoldOut(0.1, stratify=True).hold_out(CLIENTS, seed=0)
    with pytest.raises(ValueError, match="Give `client_val` or `client_val_fraction`, not both"):
        FederatedTrainer(rounds=1, client_val=HoldOut(0.1), client_val_fraction=0.1, **QUIET)


# ---------------------------------------------------------------------- in a federation


TRAINED = {}
EVALUATED = {}


class Noting(Classifier):
    """Notes which samples it is given, outside of the module, whose attributes an evaluation restores."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        TRAINED.clear()
        EVALUATED.clear()

    def training_step(self, batch, batch_idx):
        TRAINED.setdefault(self.trainer.federation_client, set()).update(batch[0][:, 0].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        EVALUATED.setdefault(self.trainer.federation_client, []).extend(batch[0][:, 0].tolist())
        super().validation_step(batch, batch_idx)


PARTS = IndexPartitioner([range(16), range(16, 40), range(40, 60)])


def play(data, door=1, module=None, **options):
    module = module or Noting()
    if door == 1:
        runner = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], num_sanity_val_steps=0, **options, **QUIET)
    else:
        runner = pl.Trainer(max_epochs=1, callbacks=[FedAvgCallback(**options)], num_sanity_val_steps=0, **QUIET)
    runner.fit(module, data)
    return runner, module


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_what_is_held_out_is_not_trained_on_and_is_what_clients_are_evaluated_on(door):
    dataset = samples(60)
    data = DataLoader(dataset, batch_size=8)
    runner, _ = play(data, door, partitioner=PARTS, client_val=HoldOut(samples=4, stratify=True))
    for client in range(3):
        assert len(EVALUATED[client]) == 4
        assert not TRAINED[client] & set(EVALUATED[client])
    assert runner.federation_summary["clients_measured_on"] == "held-out data"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_fraction_is_short_for_a_hold_out():
    data = DataLoader(samples(60), batch_size=8)
    vectors = []
    for option in ({"client_val_fraction": 0.3}, {"client_val": HoldOut(0.3)}):
        vectors.append(flat(play(data, partitioner=PARTS, **option)[1]))
    assert torch.equal(*vectors)


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_clients_have_data_sets_of_their_own(name, door):
    sets = [samples(count, seed=seed) for count, seed in ((5, 7), (3, 8), (9, 9))]
    train = [samples(count, seed=count) for count in (16, 24, 20)]
    module_data = FederatedDataModule(train, batch_size=8, drop_last=True, **{name: sets})
    runner, _ = play(module_data, door)
    for client, own in enumerate(sets):
        assert EVALUATED[client] == own.tensors[0][:, 0].tolist()
        held_out = runner.federation_clients.held_out_set(client)
        assert [float(x[0]) for x, _ in held_out] == own.tensors[0][:, 0].tolist()
    everything = [value for own in sets for value in own.tensors[0][:, 0].tolist()]
    if name == "val":
        assert EVALUATED[None] == everything
    loaders = module_data.val_dataloader() if name == "val" else module_data.test_dataloader()
    assert isinstance(loaders.dataset, ConcatDataset)
    assert runner.federation_summary["clients_measured_on"] == "held-out data"


def test_there_is_one_data_set_for_each_client():
    with pytest.raises(ValueError, match="`val` must be .* one data set for each of the 2 clients, got 1"):
        FederatedDataModule([samples(8), samples(8)], val=[samples(8)])
    with pytest.raises(ValueError, match="with samples per client, got TensorDataset for client 1"):
        FederatedDataModule(samples(8), test=[samples(8), TensorDataset(torch.zeros(0))])
    with pytest.raises(ValueError, match="`test` must be .* one data set for each of the 3 clients, got 2"):
        play(FederatedDataModule(samples(60), test=[samples(8), samples(8)], partitioner=PARTS))
    loaders = [DataLoader(samples(8)), DataLoader(samples(8))]
    assert FederatedDataModule(samples(60), num_clients=3, val=loaders).val_dataloader() is loaders


# ---------------------------------------------------------------------- clients that are too small


def test_the_clients_that_stay_are_numbered_anew():
    partition = Partition(tuple(CLIENTS), dropped=2, label_swaps={0: (1, 2), 2: (0, 1)})
    kept = only(partition, [1, 2])
    assert kept.sizes.tolist() == [20, 1]
    assert kept.label_swaps == {1: (0, 1)}
    assert kept.dropped == 12
    assert only(partition, [0, 1, 2]) is partition


@pytest.mark.parametrize("door", [1, 2])
def test_small_clients_are_left_out_and_that_is_said(door):
    sets = [samples(3, seed=seed) for seed in range(4)]
    data = FederatedDataModule([samples(n, seed=n) for n in (1, 16, 7, 20)], val=sets, batch_size=8, drop_last=True)
    with pytest.warns(UserWarning, match=r"leaves out 2 of 4 clients, \[0, 2\], with 8 samples. .* numbered 0 to 1"):
        play(data, door, module=Noting(norm=True), min_client_samples=8, local_epochs=[1, 0.5])
    assert sorted(TRAINED) == [0, 1]
    assert len(TRAINED[0]) == 16
    assert len(TRAINED[1]) == 8
    assert EVALUATED[1] == sets[3].tensors[0][:, 0].tolist()
    assert data.partition().sizes.tolist() == [16, 20]


def test_none_that_is_large_enough():
    with pytest.raises(ValueError, match="`min_client_samples`=99 leaves no client: the largest has 24 samples"):
        play(DataLoader(samples(60)), partitioner=PARTS, min_client_samples=99)


@pytest.mark.parametrize("held_out", [{}, {"client_val_fraction": 0.5}])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:`min_client_samples`")
def test_the_advice_of_both_errors_leads_out(held_out):
    parts = IndexPartitioner([[0], range(1, 10), range(10, 60)])

    def fit(**options):
        data = FederatedDataModule(samples(60), partitioner=parts, batch_size=8, drop_last=options.pop("drop", False))
        return play(data, module=Noting(norm=True), **held_out, **options)

    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        fit()
    assert "`drop_last=True`, together with `min_client_samples=8`" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="leaves clients") as refused:
        fit(drop=True)
    minimum = int(str(refused.value).split("min_client_samples=")[1].split("`")[0])
    assert minimum == (2 if not held_out else 10)
    fit(drop=True, min_client_samples=minimum)
    assert len(TRAINED) == (2 if not held_out else 1)
