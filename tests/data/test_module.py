import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset, Subset

from federations import QUIET, Classifier, samples
from lightning_fedhaw import (
    DirichletPartitioner,
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    IIDPartitioner,
    IndexPartitioner,
)
from lightning_fedhaw.data import LabelSwapPartitioner, Partition
from lightning_fedhaw.data.class_histogram import class_histogram
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.labels import ClassLabels
from lightning_fedhaw.data.loader_settings import LoaderSettings


def fit(data, **kwargs):
    runner = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **{**QUIET, **kwargs})
    runner.fit(Classifier(), data)
    return runner


def test_a_list_has_one_client_per_data_set():
    parts = [samples(20), samples(30, seed=1), Subset(samples(40, seed=2), range(25))]
    data = FederatedDataModule(parts, batch_size=8)
    runner = fit(data)
    assert runner.fit_loop.federation.data.num_examples.tolist() == [20, 30, 25]
    assert runner.fit_loop.federation.data.is_sliced
    with pytest.raises(ValueError, match="`num_clients`=2 contradicts `train`, a list of 3"):
        FederatedDataModule(parts, num_clients=2)
    with pytest.raises(ValueError, match="one data set per client, got an empty list"):
        FederatedDataModule([])
    with pytest.raises(ValueError, match=r"`partitioner` must be None .* got IIDPartitioner\(\)"):
        FederatedDataModule(parts, partitioner=IIDPartitioner())


def test_a_client_without_data_is_named():
    with pytest.raises(ValueError, match=r"client.*1"):
        fit(FederatedDataModule([samples(20), Subset(samples(20), [])]))


def test_the_proxy_set_is_balanced_and_no_longer_trained_on():
    data = FederatedDataModule(samples(300), num_clients=3, proxy=30, batch_size=8)
    labels = torch.tensor([int(data.proxy_dataset[i][1]) for i in range(len(data.proxy_dataset))])
    assert labels.bincount().tolist() == [10, 10, 10]
    chosen, rest = set(data.proxy_dataset.indices), set(data.train_dataset.indices)
    assert len(chosen) == 30
    assert chosen | rest == set(range(300))
    assert not chosen & rest
    assert int(fit(data).fit_loop.federation.data.num_examples.sum()) == 270
    given = samples(12, seed=5)
    assert FederatedDataModule(samples(), proxy=given).proxy_dataset is given


def test_preview(tmp_path):
    data = FederatedDataModule(samples(200), num_clients=4, partitioner=DirichletPartitioner(0.3), seed=2)
    text = data.preview(tmp_path / "clients.png")
    assert (tmp_path / "clients.png").stat().st_size > 5000
    for size in data.partition().sizes.tolist():
        assert str(size) in text
    runner = fit(data, seed=2)
    assert runner.fit_loop.federation.data.partition.fingerprint() == data.partition().fingerprint()


@pytest.mark.parametrize(
    ("labels", "columns", "counts"),
    [
        ([-1, 0, 1, 1], ["-1", "0", "1"], [[6, 6, 12], [6, 6, 12]]),
        ([7, 250_000_000, 900_000_123, 7], ["7", "250000000", "900000123"], [[12, 6, 6], [12, 6, 6]]),
        (["b", "a", "c", "c"], ["a", "b", "c"], [[6, 6, 12], [6, 6, 12]]),
        ([2, 0, 0, 2], ["0", "1", "2"], [[12, 0, 12], [12, 0, 12]]),
    ],
)
def test_preview_of_labels_of_any_kind(labels, columns, counts, tmp_path):
    class Rows(torch.utils.data.Dataset):
        targets = labels * 12

        def __len__(self):
            return 48

        def __getitem__(self, index):
            return torch.zeros(6), self.targets[index]

    partitioner = IndexPartitioner([range(24), range(24, 48)])
    data = FederatedDataModule(Rows(), partitioner=partitioner)
    header, *rows, _ = data.preview(tmp_path / "clients.png").splitlines()
    assert header.split() == ["client", "samples", *columns]
    assert [[int(cell) for cell in row.split()[2:]] for row in rows] == counts
    assert (tmp_path / "clients.png").stat().st_size > 5000
    named = data.preview(class_names=["x", "y", "z"]).splitlines()[0]
    assert named.split() == ["client", "samples", "x", "y", "z"]


def test_preview_of_labels_that_are_no_classes_has_the_sizes():
    numbers = torch.arange(2400) * 1_000_003
    data = FederatedDataModule(torch.utils.data.TensorDataset(torch.zeros(2400, 1), numbers), num_clients=2)
    data.partitioner = IIDPartitioner()
    assert data.preview().splitlines()[0].split() == ["client", "samples", "any"]


def test_swapped_labels_of_any_kind_are_counted():
    labels = torch.tensor([-1, -1, -1, 5] * 6)
    partition = Partition((torch.arange(12), torch.arange(12, 24)), label_swaps={1: (-1, 5)})
    counts, names = class_histogram(partition, ClassLabels(labels))
    assert names == ("-1", "5")
    assert counts.tolist() == [[9, 3], [3, 9]]
    # A class that only the swap knows has a column, too.
    partition = Partition((torch.arange(12), torch.arange(12, 24)), label_swaps={1: (0, 1)})
    counts, names = class_histogram(partition, ClassLabels(torch.zeros(24, dtype=torch.int64), ("cat",)))
    assert names == ("cat", "1")
    assert counts.tolist() == [[12, 0], [0, 12]]


def test_the_proxy_set_of_named_classes():
    dataset = Subset(samples(300), range(300))
    names = [["a", "b", "c"][label] for label in samples(300).tensors[1].tolist()]
    data = FederatedDataModule(dataset, num_clients=3, proxy=30, labels=names)
    assert data.preview().splitlines()[0].split() == ["client", "samples", "a", "b", "c"]
    assert data.partition().sizes.sum() == 270


def test_evaluation_data_is_optional_and_may_be_a_loader():
    data = FederatedDataModule(samples(), batch_size=8, val=DataLoader(samples(9), batch_size=3), test=samples(10))
    assert len(data.val_dataloader()) == 3
    assert len(data.test_dataloader()) == 2
    runner = fit(data)
    assert "val_acc" in runner.callback_metrics
    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        pl.Trainer(max_epochs=1, **QUIET).fit(Classifier(), FederatedDataModule(samples()))


@pytest.mark.parametrize("sent", [lambda d: pickle.loads(pickle.dumps(d)), copy.deepcopy], ids=["pickled", "copied"])
def test_what_other_processes_are_sent_has_the_same_loaders(sent):
    names = ("val_dataloader", "test_dataloader", "predict_dataloader")
    for given in ({}, {"val": samples(10)}, {"test": samples(10)}):
        data = FederatedDataModule(samples(), num_clients=2, **given)
        there = sent(data)
        shown = [is_overridden(name, there, pl.LightningDataModule) for name in names]
        assert shown == [is_overridden(name, data, pl.LightningDataModule) for name in names]
        assert shown == ["val" in given, "test" in given, "test" in given]


def test_the_data_modules_number_must_agree_with_the_trainers():
    data = FederatedDataModule(samples(), num_clients=3)
    assert fit(data, num_clients=3).federation_summary["clients"] == 3
    with pytest.raises(ValueError, match="`num_clients` is given to both"):
        fit(data, num_clients=4)
    with pytest.raises(ValueError, match="`alpha`=0.5 is given in addition to the data module's `partitioner`"):
        fit(FederatedDataModule(samples(), partitioner=IIDPartitioner()), alpha=0.5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples(10))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), batch_size=2), "map-style data set"),
        ({"a": DataLoader(samples()), "b": DataLoader(samples())}, "must be one DataLoader, got dict of several"),
        ([DataLoader(samples()), DataLoader(samples())], "must be one DataLoader, got list of several"),
        (DataLoader(samples(), batch_sampler=[[0, 1], [2, 3]]), "custom `batch_sampler` list"),
        (DataLoader(samples(), batch_size=None), "`batch_size=None` and a data set whose items are whole batches"),
        (samples(), "must be a `torch.utils.data.DataLoader`, got TensorDataset"),
    ],
)
def test_loaders_that_cannot_be_dealt_are_refused_by_name(loader, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(loader)


def test_a_loaders_settings_are_kept():
    def init(worker):
        return None

    loader = DataLoader(
        samples(), batch_size=7, shuffle=False, drop_last=True, num_workers=1, worker_init_fn=init, prefetch_factor=3
    )
    settings = LoaderSettings.of(loader)
    assert (settings.batch_size, settings.shuffle, settings.drop_last) == (7, False, True)
    assert (settings.num_workers, settings.worker_init_fn, settings.prefetch_factor) == (1, init, 3)


def test_drop_last_must_leave_every_client_a_batch():
    loader = DataLoader(samples(40), batch_size=16, drop_last=True, shuffle=True)
    with pytest.raises(ValueError, match=r"`drop_last=True` leaves clients \[0, 1, 2, 3\] without a batch"):
        fit(loader, num_clients=4, partitioner=IIDPartitioner())


def test_swapped_labels_reach_the_swapped_clients_alone():
    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.inner = samples(60)
            self.targets = self.inner.tensors[1]

        def __len__(self):
            return 60

        def __getitem__(self, i):
            return self.inner[i][0], int(self.inner[i][1])

    swap = LabelSwapPartitioner(IIDPartitioner(), fraction=0.5, labels=(0, 2))
    settings = LoaderSettings(batch_size=100, shuffle=False)
    labels = samples(60).tensors[1]
    partition = swap.partition(4, num_samples=60, labels=labels, seed=1)
    assert len(partition.label_swaps) == 2
    for dataset in (samples(60), Rows()):
        data = ClientData(dataset, partition, settings, seed=1)
        for client in range(4):
            (batch,) = data.batches(client, 0, epochs=1)
            own = labels[partition.indices[client]]
            expected = 2 - own if client in partition.label_swaps else own  # 0 <-> 2, and 1 stays
            assert torch.equal(batch.data[1], expected)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_clients": 0}])
def test_constructor_arguments(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be a whole number of at least 1"):
        FederatedDataModule(samples(), **arguments)


def test_train_must_be_map_style():
    with pytest.raises(TypeError, match="`train` must be a map-style data set"):
        FederatedDataModule(Stream())
