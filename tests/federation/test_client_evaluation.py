"""Metrics of clients: measured as a validation measures, without a trace, and told apart."""

import warnings
from argparse import Namespace
from collections import Counter, defaultdict, deque
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from federations import QUIET, Classifier, train, val_loader
from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FederatedTrainer, IndexPartitioner
from lightning_fedhaw.clients import evaluation, module_snapshot
from lightning_fedhaw.clients.evaluation import ClientMetrics
from lightning_fedhaw.clients.vectorized import fingerprint
from lightning_fedhaw.federation.client_statistics import client_statistics
from lightning_fedhaw.report.history import find_history
from lightning_fedhaw.report.plotting import mean_and_deviation

PARTS = [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
VALUES = torch.tensor([1.0, 3, 2, 2, 5, 0, 4, 4, 8])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1])


class Silent(pl.LightningModule):
    """A module with one weight that never moves, on samples ``(value, label)``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].sum() * 0

    def validation_step(self, batch, batch_idx):
        self.log("value", batch[0].mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def evaluated(module, data=None, val=None, entry=1, parts=PARTS, **kwargs):
    """The trainer of a run over one round, with the three clients of ``PARTS``."""
    split = IndexPartitioner(parts)
    options = {**QUIET, "num_sanity_val_steps": 0, **kwargs}
    if entry == 1:
        runner = FederatedTrainer(rounds=1, partitioner=split, callbacks=[FedAvgCallback()], **options)
    else:
        runner = pl.Trainer(max_epochs=1, callbacks=[FedAvgCallback(partitioner=split)], **options)
    runner.fit(module, data or DataLoader(TensorDataset(VALUES, LABELS), batch_size=2), val)
    return runner


def metrics_of(*args, **kwargs):
    return evaluated(*args, **kwargs).federation_summary["client_metrics"]


# ---------------------------------------------------------------------- as a validation runs

CALLS = []


class Watched(Silent):
    def note(self, name):
        stages = (self.trainer.validating, self.trainer.training, self.trainer.sanity_checking, self.training)
        CALLS.append((name, *stages))

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.note("eval")

    def on_validation_start(self):
        self.note("start")

    def on_validation_epoch_start(self):
        self.note("epoch start")

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.note("transfer")
        return batch

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.note("batch start")

    def validation_step(self, batch, batch_idx):
        self.note("step")
        self.logger.experiment.add_image("one for each validation", batch[0])
        return {"of": batch_idx}

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert outputs == {"of": batch_idx}
        self.note("batch end")

    def on_validation_epoch_end(self):
        self.note("epoch end")

    def on_validation_end(self):
        self.note("end")


class NoPictures(pl.loggers.logger.DummyLogger):
    """Fails when it is given a picture."""

    @property
    def experiment(self):
        return self

    def add_image(self, *_):
        raise AssertionError


@pytest.mark.parametrize("entry", [1, 2])
def test_each_client_is_validated_with_the_stage_and_the_hooks_of_a_stock_validation(entry):
    module = Watched()
    runner = evaluated(module, entry=entry, logger=NoPictures(), limit_val_batches=0)
    assert runner.federation_summary["client_metrics"] == {}
    for hook in ("transfer", "batch start"):
        assert not any(call[0] == hook and call[1] for call in CALLS[:2]), "local training is no validation"
    calls = [call for call in CALLS if call[1]]
    CALLS.clear()
    assert {call[1:] for call in calls} == {(True, False, False, False)}
    batch = ["transfer", "batch start", "step", "batch end"]
    expected = []
    for batches in (1, 2, 2):
        expected += ["eval", "start", "epoch start", *batch * batches, "epoch end", "end"]
    assert [call[0] for call in calls] == expected
    assert module.training


def test_a_module_without_a_validation_step_is_evaluated_by_its_training_step():
    class Trained(Silent):
        validation_step = pl.LightningModule.validation_step

        def training_step(self, batch, batch_idx):
            self.log("is_validating", float(self.trainer.validating and not self.training))
            return super().training_step(batch, batch_idx)

    assert metrics_of(Trained())["is_validating"]["mean"] == 1


class Collecting(Silent):
    """Logs a mean that it computes itself, at the end."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.a = torchmetrics.SumMetric()
        self.b = torchmetrics.SumMetric()
        self.total = self.a + self.b
        self.collection = torchmetrics.MetricCollection(
            {"max": torchmetrics.MaxMetric(), "min": torchmetrics.MinMetric()}
        )

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch[0])
        self.a.update(batch[0])
        self.b.update(10 * batch[0])
        self.collection.update(batch[0])
        self.log("largest", batch[0].max(), on_step=False, reduce_fx="max")
        self.log_dict({"total": self.total, "a": self.a, "b": self.b})

    def on_validation_epoch_end(self):
        self.log("mean_at_end", torch.cat(self.seen).mean())
        self.log_dict(self.collection.compute())
        # Neither the list nor the collection is cleared: that is no business of the next client.


def test_what_is_logged_at_the_end_and_a_sum_of_metrics_count_for_each_client():
    runner = evaluated(Collecting())
    clients = find_history(runner.callbacks).clients
    assert clients["mean_at_end"] == [2, 3, 4]
    assert clients["largest"] == clients["max"] == [3, 5, 8]
    assert clients["min"] == [1, 2, 0]
    assert clients["a"] == [4, 9, 16]
    assert clients["b"] == [40, 90, 160]
    assert clients["total"] == [44, 99, 176]


def test_on_several_processes_each_client_is_evaluated_alone():
    class Late(Silent):
        def validation_step(self, batch, batch_idx):
            self.last = batch[0][-1]

        def on_validation_epoch_end(self):
            metric = torchmetrics.MeanMetric()
            metric.update(self.last)
            # It would wait for all processes, which do not have the same number of clients.
            self.log("last", metric.compute())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        runner = evaluated(Late(), devices=2, strategy="federated_notebook")
    assert runner.federation_summary["client_metrics"]["last"]["mean"] == pytest.approx((3 + 5 + 8) / 3)


# ---------------------------------------------------------------------- without a trace


class Meter:
    """An object of the user's."""

    def __init__(self):
        self.total = 0
        self.history = [[]]


class Marked(Classifier):
    """Changes attributes of every kind in its validation."""

    on_the_class: ClassVar = []

    def __init__(self):
        super().__init__()
        self.nested = {"outer": {"inner": [torch.zeros(1)]}}
        self.lists = defaultdict(list)
        self.deque = deque(maxlen=100)
        self.counter = Counter()
        self.array = np.zeros(2)
        self.tensor = torch.zeros(2)
        self.number = 0
        self.meter = Meter()
        self.hidden = [torchmetrics.SumMetric()]
        self.net[0].calls = {"count": 0}
        self.register_buffer("steps", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        size = len(batch[0])
        self.nested["outer"]["inner"][0] += size
        self.nested["outer"]["inner"].append(size)
        self.lists[batch_idx].append(size)
        self.deque.append(size)
        self.counter[size] += 1
        self.array += size
        self.tensor += size
        self.number += size
        self.meter.total += size
        self.meter.history[0].append(size)
        self.hidden[0].update(size)
        self.net[0].calls["count"] += 1
        self.steps = self.steps + size
        self.on_the_class.append(size)
        self.added = self.number

    @property
    def marks(self):
        values = (self.nested, dict(self.lists), self.deque, self.counter, self.array, self.tensor, self.number)
        hidden = (vars(self.meter), self.hidden[0].sum_value, self.hidden[0]._update_count, self.net[0].calls)
        accuracy = (self.accuracy._update_count, self.accuracy.sync_on_compute, self.accuracy.tp)
        modes = [layer.training for layer in self.modules()]
        return repr((values, hidden, self.steps, self.on_the_class, self.added, accuracy, modes))


def test_an_evaluation_leaves_the_module_as_it_was():
    marks = []
    for client_eval in (False, True):
        Marked.on_the_class.clear()
        runner, module = train(Marked(), val=val_loader(), rounds=1, client_eval=client_eval)
        assert bool(runner.federation_summary["client_metrics"]) is client_eval
        marks.append(module.marks)
    assert marks[0] == marks[1]
    assert "'inner': [tensor([120.]), 32, 28, 32, 28]" in marks[0], "of the sanity check and of one validation"


def test_what_cannot_be_put_back_is_named(monkeypatch):
    for module in (fingerprint, module_snapshot):
        monkeypatch.setattr(module, "MAX_BYTES", 100)

    class Foreign(Silent):
        def __init__(self):
            super().__init__()
            self.settings = Namespace(calls=0)
            self.untouched = Namespace(calls=0)
            self.bank = torch.zeros(100)
            self.large_array = np.zeros(100)

        def validation_step(self, batch, batch_idx):
            self.settings.calls += 1
            self.bank[0] += 1
            self.large_array[1] += 1
            super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"has changed self\.settings, self\.bank, self\.large_array, which cannot"):
        runner = evaluated(Foreign())
    assert find_history(runner.callbacks).clients["value"] == pytest.approx([2, 3, 4])


# ---------------------------------------------------------------------- undefined values


class Undefined(Silent):
    def __init__(self):
        super().__init__()
        self.auroc = torchmetrics.AUROC("binary")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.auroc.update(x / 10, y)
        self.log("auc", self.auroc)
        self.log("mean_of_ones", x[y == 1].mean())
        self.log("nothing", torch.tensor(torch.nan))
        if len(x) > 2:
            self.log("of_many", x.mean())
        warnings.warn("a warning of the user's", stacklevel=1)


def test_undefined_values_are_left_out_and_counted(capsys):
    data = DataLoader(TensorDataset(VALUES, LABELS), batch_size=4)
    with pytest.warns(UserWarning, match="of the user's") as caught:
        runner = evaluated(Undefined(), data)
    assert [str(warning.message) for warning in caught].count("a warning of the user's") == 1
    metrics = runner.federation_summary["client_metrics"]
    # The first client has no label 1; client 1 has 2 | 2, 5 and client 2 has 4 | 0, 4, 8, where a tie counts a half.
    assert metrics["auc"]["undefined"] == 1
    assert metrics["auc"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert metrics["auc"]["weighted_mean"] == pytest.approx((3 * 0.75 + 4 * 0.5) / 7)
    assert metrics["mean_of_ones"]["mean"] == pytest.approx((3.5 + 4) / 2)
    assert metrics["mean_of_ones"]["std"] == pytest.approx(0.5 / 2**0.5)
    assert metrics["of_many"]["undefined"] == 1
    assert metrics["nothing"] == {"undefined": 3}
    clients = find_history(runner.callbacks).clients
    assert clients["auc"] == pytest.approx([torch.nan, 0.75, 0.5], nan_ok=True)
    assert "nothing" not in clients
    table = capsys.readouterr().out
    assert " auc: 1 of 3 clients undefined\n" in table
    assert "nan" not in table


def test_the_statistics_are_told_apart():
    values = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    sizes = torch.tensor([10, 20, 1000, 70])
    metrics = ClientMetrics({"acc": values, "val_loss": values}, {}, sizes)
    statistics = client_statistics(metrics, {"acc": torch.tensor(4.5)})
    assert statistics["acc"] == {
        "validation": 4.5,
        "mean": 3.0,
        "weighted_mean": pytest.approx(4.7),  # (10 * 1 + 20 * 2 + 70 * 6) / 100
        "std": pytest.approx(7**0.5),  # ((1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2) / (3 - 1)
        "worst_decile": pytest.approx(1.2),
        "best_decile": pytest.approx(5.2),
        "gap": 5.0,
        "undefined": 1,
    }
    assert statistics["val_loss"]["worst_decile"] == pytest.approx(5.2)
    assert "validation" not in statistics["val_loss"]
    one = client_statistics(ClientMetrics({"acc": values[:1]}, {}, sizes[:1]), {})
    assert one["acc"] == {
        "mean": 1,
        "weighted_mean": 1,
        "worst_decile": 1,
        "best_decile": 1,
        "gap": 0,
        "undefined": 0,
    }


def test_the_deviation_over_runs_is_that_of_a_sample():
    mean, deviation = mean_and_deviation(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]))
    assert mean.tolist() == [2, 2]
    assert deviation[0] == pytest.approx(2**0.5)
    assert deviation[1].isnan()


# ---------------------------------------------------------------------- how samples are read


class Images(Dataset):
    """The samples of ``VALUES`` through a transform, as torchvision's data sets have one."""

    def __init__(self, transform=None, part=range(9)):
        self.transform = transform
        self.part = list(part)
        self.targets = LABELS[self.part]

    def __len__(self):
        return len(self.part)

    def __getitem__(self, index):
        value = VALUES[self.part[index]]
        if self.transform is not None:
            value = self.transform(value)
        return value, LABELS[self.part[index]]


def hundredfold(value):
    return 100 * value


@pytest.mark.parametrize("entry", [1, 2])
def test_samples_for_evaluation_are_read_without_the_training_transform(entry):
    datamodule = FederatedDataModule(Images(hundredfold), batch_size=2, train_eval=Images())
    runner = evaluated(Silent(), datamodule, entry=entry)
    assert find_history(runner.callbacks).clients["value"] == pytest.approx([2, 3, 4])
    assert runner.federation_summary["clients_measured_on"] == "training data, as `train_eval` reads it"
    for data in (Images(hundredfold), torch.utils.data.Subset(Images(hundredfold), range(9))):
        runner = evaluated(Silent(), DataLoader(data, batch_size=2), entry=entry)
        assert find_history(runner.callbacks).clients["value"] == pytest.approx([200, 300, 400])
        assert runner.federation_summary["clients_measured_on"] == "training data, through the training transform"
    runner = evaluated(Silent(), entry=entry)
    assert runner.federation_summary["clients_measured_on"] == "training data"


def test_samples_for_evaluation_have_the_form_of_the_training_data():
    lists = [[Images(transform, part) for part in PARTS] for transform in (hundredfold, None)]
    runner = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **QUIET)
    runner.fit(Silent(), FederatedDataModule(lists[0], batch_size=2, train_eval=lists[1]))
    assert find_history(runner.callbacks).clients["value"] == pytest.approx([2, 3, 4])

    cut = FederatedDataModule(Images(hundredfold), num_clients=1, batch_size=9, proxy=2, train_eval=Images(), seed=3)
    rest = torch.tensor([value for value, _ in cut.train_dataset])
    assert [100 * value for value, _ in cut.train_eval_dataset] == rest.tolist()

    with pytest.raises(ValueError, match=r"`train_eval` must have the 9 samples of `train`, .* got 4"):
        FederatedDataModule(Images(), train_eval=Images(part=PARTS[2]))
    with pytest.raises(ValueError, match=r"as many samples \(\[2, 3, 4\]\), got \[2, 3\]"):
        FederatedDataModule(lists[0], train_eval=lists[1][:2])
    with pytest.raises(TypeError, match="`train_eval` must be a map-style data set"):
        FederatedDataModule(Images(), train_eval=3)


def doubled(batch):
    values, labels = default_collate(batch)
    return 2 * values, labels


def test_batches_for_evaluation_are_made_as_validation_makes_them():
    data = DataLoader(TensorDataset(VALUES, LABELS), batch_size=2, collate_fn=doubled)
    val = DataLoader(TensorDataset(VALUES, LABELS), batch_size=9)
    runner = evaluated(Silent(), data, val)
    assert find_history(runner.callbacks).clients["value"] == pytest.approx([2, 3, 4])
    assert runner.federation_summary["client_metrics"]["value"]["validation"] == pytest.approx(29 / 9)
    assert runner.federation_summary["clients_measured_on"] == "training data"
    runner = evaluated(Silent(), data)
    assert find_history(runner.callbacks).clients["value"] == pytest.approx([4, 6, 8])
    assert runner.federation_summary["clients_measured_on"].endswith("through the training loader's `collate_fn`")


def test_clients_that_are_measured_on_a_part_count_with_all_their_samples(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_CAP", 2)
    metrics = metrics_of(Silent())
    runner = evaluated(Silent())
    values = torch.tensor(find_history(runner.callbacks).clients["value"])
    weighted = values @ torch.tensor([2.0, 3, 4]) / 9
    assert metrics["value"]["weighted_mean"] == pytest.approx(float(weighted))
