from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from federations import QUIET, Classifier
from lightning_fedhaw import FedAvgCallback, FederatedTrainer
from lightning_fedhaw.data.labels import find_classes, find_labels

X = torch.zeros(4, 2)
Y = torch.tensor([2, 0, 1, 1])


class Samples(Dataset):
    """Samples as given; counts how many are read."""

    def __init__(self, samples, **attributes):
        self.samples, self.read = samples, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.read += 1
        return self.samples[index]


def pairs(labels):
    return [(torch.zeros(2), label) for label in labels]


@pytest.mark.parametrize(
    "given",
    [Y, Y[:, None], Y.numpy(), Y.int(), Y.tolist(), tuple(Y), lambda dataset: Y, [*"cabb"], np.array([*"cabb"])],
)
def test_given_labels(given):
    found = find_labels(Samples([None] * 4), given)
    assert found.dtype == torch.int64
    assert found.equal(Y)


def test_a_callable_gets_the_dataset():
    assert find_labels(Samples([3, 4, 5, 6]), lambda dataset: dataset.samples).tolist() == [3, 4, 5, 6]


def test_given_labels_come_first():
    assert find_labels(TensorDataset(X, Y), [7, 7, 7, 8]).tolist() == [7, 7, 7, 8]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ([1, 2, 3], ValueError, r"`labels` must have one entry per sample \(4\), got 3"),
        (torch.zeros(4, 2).long(), ValueError, r"`labels` must have one entry per sample \(4\), got shape \[4, 2\]"),
        (torch.rand(4), TypeError, "`labels` must be integers or strings, got dtype float32"),
        ([[1], [2, 3], [4], [5]], ValueError, r"one entry per sample \(4\), got shape \[4\]"),
        ([1, "a", None, 2], TypeError, "`labels` must be integers or strings, got dtype object"),
    ],
)
def test_wrong_labels(given, error, match):
    with pytest.raises(error, match=match):
        find_labels(TensorDataset(X, Y), given)


@pytest.mark.parametrize("labels", [Y, Y[:, None], Y.to(torch.uint8)])
def test_tensor_dataset(labels):
    assert find_labels(TensorDataset(X, labels)).equal(Y)


@pytest.mark.parametrize("tensors", [(X,), (X, X), (X, torch.rand(4)), (X, torch.zeros(4, 3).long())])
def test_tensor_dataset_without_labels(tensors):
    assert find_labels(TensorDataset(*tensors)) is None


class Column:
    """A column as those of pandas: a class of its own, which NumPy can convert."""

    def __init__(self, values, dtype):
        self.array = np.array(values, dtype=dtype)

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize(
    "values",
    [
        *(Y, Y[:, None], Y.numpy(), Y.tolist(), tuple(Y.tolist()), list(Y), [np.int64(y) for y in Y.tolist()]),
        *(Column(Y.tolist(), "int64"), Column(Y.tolist(), "object")),
    ],
)
def test_attributes_are_used_without_reading(name, values):
    dataset = Samples(pairs([9, 9, 9, 9]), **{name: values})
    assert find_labels(dataset).equal(Y)
    assert dataset.read == 0


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        [[1], [2, 3], [4], [5]],
        [torch.zeros(1), torch.zeros(2), torch.zeros(3), torch.zeros(4)],
        [{"box": 1}] * 4,
        torch.rand(4),
        torch.rand(4).bfloat16(),
        "abcd",
        [f"mask_{number}.png" for number in range(4)],
        ["a", "a", "b", None],
        lambda: Y,
    ],
)
def test_attributes_that_are_not_labels_are_passed_over(values):
    assert find_labels(Samples(pairs(Y.tolist()), targets=values)).equal(Y)
    assert find_labels(Samples(pairs([9] * 4), targets=values, labels=Y)).equal(Y)


def test_unwraps_subsets_and_concatenations():
    inner = ConcatDataset([Subset(TensorDataset(X, Y), [3, 0]), Samples(pairs([9] * 4), targets=Y)])
    assert find_labels(inner).tolist() == [1, 2, 2, 0, 1, 1]
    assert find_labels(Subset(inner, [5, 1])).tolist() == [1, 2]
    assert find_labels(Subset(inner, torch.tensor([5, 1]))).tolist() == [1, 2]


def test_reads_only_the_subset():
    dataset = Samples(pairs([5, 6, 7, 8]))
    assert find_labels(Subset(dataset, [2, 0])).tolist() == [7, 5]
    assert dataset.read == 2
    mixed = ConcatDataset([TensorDataset(X, Y), dataset])
    assert find_labels(mixed).tolist() == [2, 0, 1, 1, 5, 6, 7, 8]


@pytest.mark.parametrize("label", [int, torch.tensor, np.int64, lambda y: torch.tensor(y, dtype=torch.uint8), np.array])
def test_reads_the_second_item_of_every_sample(label):
    dataset = Samples(pairs([label(y) for y in Y.tolist()]))
    assert find_labels(dataset).equal(Y)
    assert dataset.read == 4


@pytest.mark.parametrize(
    "samples",
    [
        pairs([0.5, 1.0]),
        pairs([torch.zeros(1).long()] * 2),
        pairs(["a", "b"]),
        pairs([None, None]),
        [torch.zeros(2)] * 2,
        [(torch.zeros(2),)] * 2,
        [{"x": 0, "y": 1}] * 2,
        pairs([(torch.tensor(1), torch.randn(4))] * 2),
        pairs([(torch.randn(2), None)] * 2),
        pairs([[[1, 2, 3], [4, 5]]] * 2),
        pairs([(1, [1.0, 2.0])] * 2),
        pairs([{"boxes": torch.zeros(3, 4)}] * 2),
        pairs([torch.tensor(1.0, dtype=torch.bfloat16)] * 2),
        [[]] * 2,
    ],
)
def test_none_after_the_first_sample(samples):
    dataset = Samples(samples)
    assert find_labels(dataset) is None
    assert dataset.read == 1


def test_none_when_a_later_sample_has_no_label():
    assert find_labels(Samples(pairs([1, 2, 0.5]))) is None


def test_nothing_to_read():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(pairs([1, 2]))

    assert find_labels(Samples([])) is None
    assert find_labels(Stream()) is None


def test_reading_leaves_the_random_state_alone():
    class Augmented(Samples):
        def __getitem__(self, index):
            return torch.rand(2), self.samples[index]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert find_labels(Augmented([1, 2])).tolist() == [1, 2]
    assert torch.get_rng_state().equal(before)


WORDS = ["dog", "cat", "dog", "cat", "emu", "emu"]


@pytest.mark.parametrize("values", [WORDS, tuple(WORDS), np.array(WORDS), Column(WORDS, "object")])
def test_stored_strings_are_classes_with_names(values):
    for name in ("targets", "labels"):
        dataset = Samples(pairs([9] * 6), **{name: values})
        classes = find_classes(dataset)
        assert classes.labels.tolist() == [1, 0, 1, 0, 2, 2]
        assert classes.names == ("cat", "dog", "emu")
        assert dataset.read == 0
    assert find_classes(Samples([None] * 6), values).names == ("cat", "dog", "emu")
    assert find_classes(Samples([None] * 6), [1, 0, 1, 0, 2, 2]).names is None


def test_a_name_has_one_number_in_all_members():
    first = Samples(pairs([9] * 4), targets=["cat", "cat", "dog", "dog"])
    second = Samples(pairs([9] * 4), targets=["ant", "ant", "dog", "dog"])
    joined = ConcatDataset([first, second])
    assert find_classes(joined).names == ("ant", "cat", "dog")
    assert find_labels(joined).tolist() == [1, 1, 2, 2, 0, 0, 2, 2]
    assert find_labels(Subset(joined, [7, 4, 3])).tolist() == [1, 0, 1]
    # Names in one member and numbers in the other are not one set of classes: the samples are read.
    assert find_labels(ConcatDataset([first, Samples(pairs([9] * 2), targets=[0, 1])])).tolist() == [9] * 6


def first_items(rows):
    inputs = torch.stack([inputs for inputs, _ in rows])
    return inputs, torch.zeros(len(rows), dtype=torch.int64)


@pytest.mark.parametrize("second", [(torch.tensor(1), torch.randn(4)), (torch.randn(2), None), [[1, 2, 3], [4, 5]]])
@pytest.mark.parametrize("entry_point", [1, 2])
def test_without_class_numbers_the_split_is_iid_and_the_log_says_so(second, entry_point, caplog):
    def fit(**options):
        rule = FedAvgCallback(**options) if entry_point == 2 else FedAvgCallback()
        quiet = {**QUIET, "callbacks": [rule]}
        runner = (
            pl.Trainer(max_epochs=1, **quiet) if entry_point == 2 else FederatedTrainer(rounds=1, **options, **quiet)
        )
        dataset = Samples([(torch.randn(6), second)] * 40)
        runner.fit(Classifier(), DataLoader(dataset, batch_size=4, collate_fn=first_items))
        return runner.fit_loop.federation.data

    assert fit(num_clients=4, client_eval=False).num_examples.tolist() == [10] * 4
    assert "an IID split, since no labels were found in the data set" in caplog.text
    with pytest.raises(ValueError, match="`labels` must be given for DirichletPartitioner.* give `labels=`, one entry"):
        fit(num_clients=4, alpha=0.5)
    assert fit(num_clients=4, alpha=50.0, labels=[0, 1] * 20, client_eval=False).num_clients == 4
