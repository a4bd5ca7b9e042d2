"""Clients that the data itself names: LEAF's JSON form, and rows with a column of clients."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import cross_entropy

from federations import Classifier, trainer
from lightning_fedhaw import DirichletPartitioner, FedAvgCallback
from lightning_fedhaw.data import LeafDataModule, RowsDataModule
from lightning_fedhaw.data.leaf import LETTERS


def write(path, user_data):
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = [len(samples["y"]) for samples in user_data.values()]
    path.write_text(json.dumps({"users": list(user_data), "num_samples": sizes, "user_data": user_data}))


def images(count, label):
    return {"x": [[0.25 * pixel for pixel in range(4)]] * count, "y": [label] * count}


def test_femnist_has_images_and_each_user_its_test_data():
    write(Path("data/train/b.json"), {"third": images(4, 2)})
    write(Path("data/train/a.json"), {"first": images(3, 0), "second": images(5, 1)})
    write(Path("data/test/a.json"), {"second": images(1, 1), "third": images(2, 2), "first": images(1, 0)})
    data = LeafDataModule("data", shape=(1, 2, 2), batch_size=2)
    assert data.users == ("first", "second", "third")
    assert data.partition().sizes.tolist() == [3, 5, 4]
    (x, y) = next(iter(data.train_dataloader()))
    assert (tuple(x.shape), x.dtype, y.dtype) == ((2, 1, 2, 2), torch.float32, torch.int64)
    assert x.flatten(1)[0].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert [len(dataset) for dataset in data.evaluation_sets(3)] == [1, 1, 2]
    few = LeafDataModule("data", max_clients=2, min_samples=4)
    assert few.users == ("second", "third")


def test_shakespeare_has_characters_and_test_data_of_other_users():
    text = "To be, or"
    windows = {"x": [text[i : i + 5] for i in range(4)], "y": [text[i + 5] for i in range(4)]}
    write(Path("train/all.json"), {"HAMLET": windows})
    write(Path("test/all.json"), {"GHOST": windows})
    data = LeafDataModule(".")
    (x, y) = data.train_dataset[0]
    assert "".join(LETTERS[number] for number in x) == "To be"
    assert LETTERS[y] == ","
    assert len(LETTERS) == 80
    assert len(data.val_dataloader().dataset) == 4
    with pytest.raises(ValueError, match="'HAMLET' .* has the character 'T', which is not among `letters`"):
        LeafDataModule(".", letters="abc")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no file of LEAF .*It must hold `users`"),
        ('{"users": ["a"], "user_data": {"a": {"x": [[1.0]], "y": []}}}', "user 'a' has 1 inputs and 0 targets"),
        ('{"users": [], "user_data": {}}', "No user in .* has at least `min_samples`=1 samples"),
    ],
)
def test_what_is_no_leaf_is_refused(content, said):
    with pytest.raises(FileNotFoundError, match=r"There is no JSON file in 'train'. `root` is the folder that holds"):
        LeafDataModule(".")
    Path("train").mkdir()
    Path("train/a.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        LeafDataModule(".")


ROWS = [{"who": "abc"[i % 3], "x": [float(i % 7), float(i % 5)], "y": i % 2, "note": "n"} for i in range(60)]


class OfRows(Classifier):
    """Reads batches that are dictionaries."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"x", "y"}
        return cross_entropy(self.net(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch["x"]), batch["y"]))


def test_rows_train_a_client_for_each_value_of_a_column():
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = RowsDataModule("rows.jsonl", client="who", label="y", columns=["x", "y"], val=ROWS[:10], batch_size=5)
    assert data.clients == ("a", "b", "c")
    module = OfRows()
    runner = trainer(rounds=1, rule=FedAvgCallback(), num_clients=None, alpha=None)
    runner.fit(module, data)
    assert runner.federation_summary["clients"] == 3
    assert "val_loss" in runner.federation_summary["client_metrics"]
    skewed = RowsDataModule(ROWS, label="y", num_clients=3, partitioner=DirichletPartitioner(10.0))
    assert skewed.clients == ()
    assert skewed.partition().sizes.sum() == 60


class Saved(list):
    """As a data set of Hugging Face: columns by name, rows by number."""

    column_names = ("who", "x", "y")

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self]
        return super().__getitem__(key)


def test_a_folder_of_hugging_face_has_parts(monkeypatch):
    Path("saved").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="'saved' is read by Hugging Face's datasets, .*pip install datasets"):
        RowsDataModule("saved")
    datasets = ModuleType("datasets")
    datasets.load_from_disk = lambda path: {"train": Saved(ROWS), "validation": Saved(ROWS[:6])}
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    data = RowsDataModule("saved", client="who")
    assert data.clients == ("a", "b", "c")
    assert set(next(iter(data.val_dataloader()))) == {"x", "y"}
    assert len(data.val_dataloader().dataset) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"client": "whom"}, r"`client` must be a column of the rows \(who, x, y, note\), got 'whom'"),
        ({"columns": ["z"]}, "`columns` must be one of 'who', 'x', 'y', 'note', got 'z'"),
        ({"client": "who", "partitioner": DirichletPartitioner(1.0)}, "Give `client` or `partitioner`, not both"),
    ],
)
def test_wrong_columns_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        RowsDataModule(ROWS, **arguments)
