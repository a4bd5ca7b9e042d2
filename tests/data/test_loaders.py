"""Training loaders as users have them: samplers that say something, and classes that work on batches."""

from __future__ import annotations

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from federations import QUIET, Classifier, flat, momentum, samples
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    IIDPartitioner,
    IndexPartitioner,
)
from lightning_fedhaw.data import LabelSwapPartitioner, Partition
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.hold_out import HoldOut
from lightning_fedhaw.data.loader_settings import LoaderSettings

X = torch.arange(12.0)[:, None]
ROWS = TensorDataset(X, torch.arange(12) % 2)
PARTITION = Partition((torch.arange(4), torch.arange(4, 12)))  # four samples, and eight


def assigned(loader, seed=0, partition=PARTITION, held_out=0.0):
    part = HoldOut(held_out) if held_out else None
    return ClientData(loader.dataset, partition, LoaderSettings.of(loader), seed=seed, held_out=part)


def drawn(data, client, round_idx=0, **work):
    """The numbers of the samples that a client sees, batch by batch."""
    work = work or {"epochs": 1}
    return [batch.data[0][:, 0].long().tolist() for batch in data.batches(client, round_idx, **work)]


def seen(data, client, round_idx=0, **work):
    """The numbers of the samples that a client sees."""
    return list(chain.from_iterable(drawn(data, client, round_idx, **work)))


def fitted(loader, engine="sequential", rounds=2, num_clients=4, optimizer=None, **kwargs):
    """The global model after a few rounds of four IID clients."""
    kwargs = {"partitioner": IIDPartitioner(), "client_eval": False, **kwargs}
    runner = FederatedTrainer(
        rounds=rounds, num_clients=num_clients, engine=engine, callbacks=[FedAvgCallback()], **QUIET, **kwargs
    )
    module = Classifier(optimizer)
    runner.fit(module, loader)
    return flat(module)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------------


def weighted(weights, num_samples, replacement=True, batch_size=3):
    sampler = WeightedRandomSampler(weights, num_samples, replacement)
    return DataLoader(ROWS, batch_size=batch_size, sampler=sampler)


@pytest.mark.parametrize(("num_samples", "draws"), [(12, (4, 8)), (24, (8, 16)), (6, (2, 4)), (1, (1, 1))])
def test_weighted_draws_are_of_a_clients_own_samples_and_its_share_of_their_number(num_samples, draws):
    data = assigned(weighted([1.0, 0.0] * 6, num_samples))
    for client, count in enumerate(draws):
        batches = drawn(data, client)
        numbers = list(chain.from_iterable(batches))
        assert len(numbers) == count == data.samples_per_pass(client)
        assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
        assert set(numbers) <= set(PARTITION.indices[client].tolist())
        assert all(number % 2 == 0 for number in numbers)  # the odd ones have the weight 0
        assert data.batches_per_pass(count) == len(batches)


def test_weights_are_probabilities_within_a_client():
    # Client 0 has weights 1, 1, 3, 3 and client 1 only one that is not 0.
    data = assigned(weighted([1.0, 1.0, 3.0, 3.0, 5.0, *[0.0] * 7], 12_000, batch_size=4000))
    (numbers,) = drawn(data, 0)
    shares = torch.tensor(numbers).bincount() / 4000
    assert torch.allclose(shares, torch.tensor([1, 1, 3, 3]) / 8, atol=0.03)
    assert set(seen(data, 1)) == {4}


def test_draws_come_from_the_clients_named_stream():
    loader = weighted([1.0] * 12, 12)
    data = assigned(loader)
    torch.manual_seed(1)
    first = drawn(data, 1, epochs=2)
    torch.manual_seed(2)
    assert drawn(assigned(loader), 1, epochs=2) == first
    assert first[:3] != first[3:]  # the second pass draws again
    assert drawn(data, 1, round_idx=1, epochs=2) != first
    assert drawn(assigned(loader, seed=5), 1, epochs=2) != first


def test_steps_are_counted_over_passes_of_draws():
    data = assigned(weighted([1.0] * 12, 6))
    assert [len(batch) for batch in drawn(data, 1, num_batches=5)] == [3, 1, 3, 1, 3]


def test_without_replacement_no_sample_comes_twice_and_none_of_weight_zero():
    data = assigned(weighted([1.0, 0.0, 2.0, 1.0] * 3, 12, replacement=False))
    for client, count in enumerate((3, 6)):
        numbers = seen(data, client)
        assert len(numbers) == len(set(numbers)) == count
        assert all(number % 4 != 1 for number in numbers)


def test_a_client_without_positive_weights_is_named():
    with pytest.raises(
        ValueError, match=r"0 for all samples of clients \[0\], which could draw nothing. Give positive"
    ):
        assigned(weighted([0.0] * 4 + [1.0] * 8, 12))


def test_random_sampler_with_replacement_or_another_number():
    twice = assigned(DataLoader(ROWS, batch_size=16, sampler=RandomSampler(ROWS, replacement=True, num_samples=24)))
    (numbers,) = drawn(twice, 1)
    assert len(numbers) == 16
    assert len(set(numbers)) < 8 + 1
    assert set(numbers) <= set(range(4, 12))
    fewer = assigned(DataLoader(ROWS, batch_size=16, sampler=RandomSampler(ROWS, num_samples=6)))
    assert [len(set(drawn(fewer, client)[0])) for client in (0, 1)] == [2, 4]
    more = assigned(DataLoader(ROWS, batch_size=16, sampler=RandomSampler(ROWS, num_samples=18)))
    (numbers,) = drawn(more, 0)
    assert len(numbers) == 6
    assert set(numbers) == set(range(4))  # one shuffle, and half of another


def test_held_out_samples_are_not_drawn():
    data = assigned(weighted([1.0] * 12, 120), held_out=0.25)
    assert data.samples_per_pass(1) == 60
    assert set(seen(data, 1)) == set(data.train_indices[1].tolist())


def test_processes_with_other_weights_are_noticed():
    first = assigned(weighted([1.0] * 12, 12)).sample_hash()
    assert assigned(weighted([1.0] * 12, 12)).sample_hash() == first
    assert assigned(weighted([1.0] * 11 + [2.0], 12)).sample_hash() != first


def unequal(batch_size=8):
    dataset = samples()
    weights = torch.tensor([1.0, 5.0, 2.0])[dataset.tensors[1]]
    return DataLoader(dataset, batch_size=batch_size, sampler=WeightedRandomSampler(weights, 120))


def test_both_engines_draw_alike():
    sequential = fitted(unequal())
    assert torch.allclose(fitted(unequal(), "vectorized"), sequential, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fitted(DataLoader(samples(), 8, shuffle=True)), sequential, rtol=1e-3)


def test_both_entry_points_draw_alike():
    module = Classifier()
    rule = FedAvgCallback(num_clients=4, partitioner=IIDPartitioner(), engine="sequential", client_eval=False)
    pl.Trainer(max_epochs=2, callbacks=[rule], **QUIET).fit(module, unequal())
    assert torch.equal(flat(module), fitted(unequal()))


class OnlyConstructor(WeightedRandomSampler):
    def __init__(self, labels):
        super().__init__(1.0 / labels.bincount()[labels], len(labels))


def test_a_sampler_that_changes_only_the_constructor_is_torchs_own():
    labels = torch.tensor([0] * 9 + [1] * 3)
    settings = LoaderSettings.of(DataLoader(ROWS, sampler=OnlyConstructor(labels)))
    assert settings.draws.weights.tolist() == pytest.approx([1 / 9] * 9 + [1 / 3] * 3)


class Balanced(Sampler):
    def __iter__(self):
        return iter([0, 1])

    def __len__(self):
        return 2


class Overridden(RandomSampler):
    def __iter__(self):
        return iter([0, 1])


class Batches(BatchSampler):
    def __iter__(self):
        return iter([[0, 1]])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(ROWS, sampler=Balanced()), "custom sampler Balanced, which .* `WeightedRandomSampler"),
        (DataLoader(ROWS, sampler=Overridden(ROWS)), "custom sampler Overridden, which .* `WeightedRandomSampler"),
        (DataLoader(ROWS, sampler=range(12)), "custom sampler range"),
        (DataLoader(ROWS, batch_sampler=BatchSampler(Balanced(), 2, False)), "custom sampler Balanced"),
        (DataLoader(ROWS, batch_sampler=Batches(Balanced(), 2, False)), "custom `batch_sampler` Batches"),
        (weighted([1.0] * 5, 5), r"one entry per sample \(12\), got 5"),
        (weighted([1.0] * 11 + [-1.0], 5), "finite and not negative, got values from -1.0 to 1.0"),
        (DataLoader(ROWS, sampler=RandomSampler(range(13))), "a sampler over 13 samples and a data set of 12"),
    ],
)
def test_samplers_that_cannot_act_within_a_client_are_refused_by_name(loader, message):
    with pytest.raises(ValueError, match=message):
        LoaderSettings.of(loader)


# ---------------------------------------------------------------------------------------------------------------------
# Shuffles, subsets and batches in other words
# ---------------------------------------------------------------------------------------------------------------------


class InBulk(Dataset):
    """Takes lists of indices only."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, indices):
        rows = torch.tensor([int(index) for index in indices])
        return tuple(tensor[rows] for tensor in self.dataset.tensors)


def in_batches(dataset, **kwargs):
    return BatchSampler(RandomSampler(dataset, **kwargs), 8, drop_last=True)


def test_the_same_batches_in_other_words_train_the_same_model():
    dataset = samples()
    generator = torch.Generator().manual_seed(3)
    loaders = [
        DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True),
        DataLoader(dataset, batch_size=8, sampler=RandomSampler(dataset, generator=generator), drop_last=True),
        DataLoader(dataset, batch_sampler=in_batches(dataset)),
        DataLoader(dataset, batch_size=None, sampler=in_batches(dataset)),
        DataLoader(InBulk(dataset), batch_size=None, sampler=in_batches(dataset)),
    ]
    models = [fitted(loader) for loader in loaders]
    for model in models[1:]:
        assert torch.equal(model, models[0])


def test_bulk_fetching_of_tensors_is_slicing():
    settings = LoaderSettings.of(DataLoader(ROWS, batch_size=None, sampler=in_batches(ROWS)))
    assert (settings.batch_size, settings.shuffle, settings.drop_last, settings.bulk) == (8, True, True, True)
    assert assigned(
        DataLoader(ROWS, batch_size=None, sampler=BatchSampler(SequentialSampler(ROWS), 3, False))
    ).is_sliced


def test_labels_are_read_in_bulk():
    loader = DataLoader(InBulk(samples()), batch_size=None, sampler=in_batches(samples()))
    runner = FederatedTrainer(rounds=1, num_clients=3, alpha=0.1, callbacks=[FedAvgCallback()], **QUIET)
    runner.fit(Classifier(), loader)
    data = runner.fit_loop.federation.data
    assert data.labels.equal(samples().tensors[1])


def test_swapped_labels_in_bulk():
    class Arrays(InBulk):
        def __getitem__(self, indices):
            x, y = super().__getitem__(indices)
            return x, y.numpy()

    labels = ROWS.tensors[1]
    swap = LabelSwapPartitioner(IIDPartitioner(), fraction=0.5, labels=(0, 1))
    partition = swap.partition(2, num_samples=12, labels=labels, seed=1)
    for dataset in (InBulk(ROWS), Arrays(ROWS)):
        loader = DataLoader(dataset, batch_size=None, sampler=BatchSampler(SequentialSampler(ROWS), 6, False))
        data = assigned(loader, partition=partition)
        for client in (0, 1):
            (batch,) = data.batches(client, 0, epochs=1)
            expected = labels[partition.indices[client]]
            if client in partition.label_swaps:
                expected = 1 - expected
            assert torch.equal(batch.data[1], expected)


@pytest.mark.parametrize("labels", [None, samples().tensors[1], samples().tensors[1].tolist()])
def test_a_sampler_of_a_subset_is_that_subset_shuffled(labels):
    dataset = samples()
    indices = list(range(10, 90))
    options = {"partitioner": None, "alpha": 0.5}
    subset = DataLoader(Subset(dataset, indices), batch_size=8, shuffle=True)
    sampler = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(indices))
    assert torch.equal(fitted(sampler, labels=labels, **options), fitted(subset, **options))


def test_a_sampler_over_the_first_samples_leaves_the_others_out():
    dataset = samples()
    loader = DataLoader(dataset, batch_size=8, sampler=SequentialSampler(range(60)))
    expected = DataLoader(Subset(dataset, range(60)), batch_size=8)
    assert torch.equal(fitted(loader), fitted(expected))


def test_a_list_of_samples_and_a_sampler_of_a_subset_are_ambiguous():
    loader = DataLoader(ROWS, sampler=SubsetRandomSampler(range(8)))
    with pytest.raises(ValueError, match=r"lists the samples of each client, and the loader's SubsetRandomSampler"):
        fitted(loader, partitioner=IndexPartitioner([[0, 1], [2, 3]]), num_clients=2)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders that work in `__iter__`
# ---------------------------------------------------------------------------------------------------------------------


class Halved(DataLoader):
    """Works on batches."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 2, y


class Renamed(DataLoader):
    """Changes only the constructor."""

    def __init__(self, dataset, size):
        super().__init__(dataset, batch_size=size, shuffle=True)


def halves():
    inputs, labels = samples().tensors
    return TensorDataset(inputs / 2, labels)


def test_a_loader_that_works_on_batches_is_used_as_it_is():
    expected = fitted(DataLoader(halves(), batch_size=8, shuffle=True))
    assert torch.equal(fitted(Halved(samples(), batch_size=8, shuffle=True)), expected)
    assert torch.equal(
        fitted(Halved(samples(), batch_sampler=BatchSampler(RandomSampler(samples()), 8, False))), expected
    )
    bulk = Halved(InBulk(samples()), batch_size=None, sampler=BatchSampler(RandomSampler(samples()), 8, False))
    assert torch.equal(fitted(bulk), expected)
    module = Classifier()
    rule = FedAvgCallback(num_clients=4, partitioner=IIDPartitioner(), client_eval=False)
    pl.Trainer(max_epochs=2, callbacks=[rule], **QUIET).fit(module, Halved(samples(), batch_size=8, shuffle=True))
    assert torch.equal(flat(module), expected)


def test_steps_and_limits_reach_a_loader_that_works_on_batches():
    options = {"local_steps": 5, "limit_train_batches": 2}
    expected = fitted(DataLoader(halves(), batch_size=8, shuffle=True), **options)
    assert torch.equal(fitted(Halved(samples(), batch_size=8, shuffle=True), **options), expected)


def test_workers_of_a_loader_that_works_on_batches():
    loader = Halved(ROWS, batch_size=3, num_workers=1, persistent_workers=True)
    assert drawn(assigned(loader), 0) == [[0, 0, 1], [1]]  # 0, 1, 2, 3 in halves


def test_clients_are_evaluated_through_the_loader_that_trains_them():
    data = assigned(Halved(ROWS, batch_size=8))
    (batch,) = data.evaluation_batches(1, at_most=100)
    assert torch.equal(batch.data[0], X[4:] / 2)


def test_the_loader_of_a_client_has_the_clients_data_set():
    class Paired(DataLoader):
        def __iter__(self):
            partner = self.dataset[len(self.dataset) - 1][0]
            for x, _ in super().__iter__():
                yield [x + 100 * partner, len(self), len(self.dataset)]

    data = assigned(Paired(ROWS, batch_size=3))
    first, second = data.batches(0, 0, epochs=1)
    assert first.data[0][:, 0].tolist() == [300, 301, 302]  # the client's last sample is 3
    assert (first.data[1:], second.last) == ([2, 4], True)


def test_the_batched_engine_refuses_such_a_loader():
    with pytest.raises(ValueError, match=r"not tensors in memory .* and a plain `DataLoader`"):
        fitted(Halved(samples(), batch_size=8), engine="vectorized")


def test_a_loader_that_changes_only_the_constructor_is_a_plain_one():
    assert torch.equal(fitted(Renamed(samples(), 8)), fitted(DataLoader(samples(), batch_size=8, shuffle=True)))
    assert LoaderSettings.of(Renamed(samples(), 8)).template is None


class Own(DataLoader):
    """Draws from everything by itself."""

    def __iter__(self):
        return iter([[torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)]] * 15)


class Fewer(DataLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number != 1:
                yield batch


class More(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield batch


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Own, r"`Own.__iter__` does not take its batches from `DataLoader.__iter__`"),
        (Fewer, r"`Fewer.__iter__` must give one batch for each .*, got 3 of 4"),
        (More, r"`More.__iter__` must give one batch for each .*, got more of 4"),
    ],
)
def test_loaders_whose_batches_cannot_be_a_clients_are_refused_by_name(kind, message):
    with pytest.raises(ValueError, match=message):
        fitted(kind(samples(), batch_size=8), rounds=1)


def test_state_that_a_loader_would_lose_is_named():
    class Counted(DataLoader):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    with pytest.warns(UserWarning, match=r"`Counted.__iter__` sets `passes` of the loader"):
        fitted(Counted(samples(), batch_size=60), rounds=1, num_clients=1)


# ---------------------------------------------------------------------------------------------------------------------
# Together with the rest
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unequal, lambda: Halved(samples(), batch_size=8, shuffle=True)], ids=["drawn", "own"])
def test_resumed_runs_draw_what_uninterrupted_ones_draw(make, tmp_path):
    options = {"optimizer": momentum, "optimizer_state": "kept"}
    expected = fitted(make(), rounds=3, **options)
    module = Classifier(momentum)
    federation = {"num_clients": 4, "partitioner": IIDPartitioner(), "optimizer_state": "kept", "client_eval": False}

    def runner(rounds):
        return FederatedTrainer(
            rounds=rounds, engine="sequential", callbacks=[FedAvgCallback()], **{**QUIET, **federation}
        )

    first = runner(2)
    first.fit(module, make())
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Classifier(momentum)
    runner(3).fit(resumed, make(), ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(flat(resumed), expected)


class Inner(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


def test_a_data_module_around_one_with_weights():
    assert torch.equal(fitted(FederatedDataModule(Inner(unequal()))), fitted(unequal()))
    assert torch.equal(fitted(FederatedDataModule(Inner(unequal()), batch_size=4)), fitted(unequal(batch_size=4)))
    data = FederatedDataModule(Inner(unequal()), proxy=30)
    settings = LoaderSettings.of(data.train_dataloader())
    labels = samples().tensors[1][torch.tensor(data.train_dataset.indices)]
    assert settings.draws.weights.tolist() == torch.tensor([1.0, 5.0, 2.0])[labels].tolist()
    assert (settings.draws.num_samples, settings.batch_size) == (90, 8)


def test_a_data_module_around_one_with_a_subset():
    loader = DataLoader(samples(), batch_size=8, sampler=SubsetRandomSampler(range(80)))
    data = FederatedDataModule(Inner(loader), num_clients=4, partitioner=IIDPartitioner())
    assert data.partition().sizes.sum() == 80
    assert torch.equal(fitted(data, num_clients=None, partitioner=None), fitted(loader))
    assert data.partition().sizes.sum() == 80


def test_a_data_module_around_one_with_a_loader_of_its_own():
    loader = Halved(samples(), batch_size=8, shuffle=True)
    assert torch.equal(fitted(FederatedDataModule(Inner(loader))), fitted(loader))
    for options in ({"batch_size": 4}, {"proxy": 30}):
        with pytest.raises(ValueError, match=r"would need another training loader, and the data module's Halved"):
            _ = FederatedDataModule(Inner(loader), **options).train_dataset
