"""The evaluation of clients after rounds: what it logs, and that nothing else depends on it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, flat, loader, samples, trainer, val_loader
from lightning_fedhaw import ErasureChannel, FedAvgCallback, FederatedTrainer, FedHAWCallback, IndexPartitioner
from lightning_fedhaw.clients.evaluation import ClientMetrics
from lightning_fedhaw.federation.client_statistics import spread_of, values_of_clients
from lightning_fedhaw.plotting import RunHistory, draw_client_curves, draw_spread, main, read_run
from resuming import assert_same, check_resume

STATISTICS = ("best_decile", "gap", "mean", "std", "weighted_mean", "worst_decile")


def run(rounds: int = 4, callbacks: Any = (), module: Any = None, **options: Any) -> tuple[pl.Trainer, RunHistory]:
    """Fit a federation with dropout, normalization and a metric object, and return its history too."""
    history = RunHistory()
    torch.manual_seed(1)
    runner = trainer(rounds, FedHAWCallback(), [history, *callbacks], **options)
    runner.fit(module or Classifier(norm=True, dropout=0.3), loader(), val_loader())
    return runner, history


def spread_names(history: RunHistory) -> list[str]:
    return [name for name in history.names if "/clients_" in name]


def test_the_numbers_of_a_round_are_those_of_its_model_on_the_clients():
    runner, history = run(client_eval_every_n_rounds=2)
    names = [f"{metric}/clients_{statistic}" for metric in ("val_acc", "val_loss") for statistic in STATISTICS]
    assert spread_names(history) == names
    at_end = runner.federation_summary["client_metrics"]
    for metric in ("val_acc", "val_loss"):
        for statistic in STATISTICS:
            curve = history.curve(f"{metric}/clients_{statistic}")
            assert [value != value for value in curve] == [True, False, True, False]
            assert curve[-1] == pytest.approx(at_end[metric][statistic], abs=1e-6)
    assert 0 < history.curve("val_acc/clients_gap")[1] < 1
    assert "val_acc/clients_mean" not in runner.federation_summary["metrics"]


def test_statistics_by_hand():
    values = torch.tensor([0.5, torch.nan, 1.0])
    sizes = torch.tensor([30, 1000, 10])
    spread = spread_of(ClientMetrics({"acc": values, "loss": values}, {}, sizes))
    assert spread["acc/clients_mean"] == 0.75
    assert spread["acc/clients_weighted_mean"] == 0.625  # (30 * 0.5 + 10 * 1) / 40
    assert spread["acc/clients_std"] == pytest.approx(0.125**0.5)
    assert spread["acc/clients_worst_decile"] == pytest.approx(0.55)
    assert spread["acc/clients_best_decile"] == pytest.approx(0.95)
    assert spread["loss/clients_worst_decile"] == pytest.approx(0.95)
    assert spread["acc/clients_gap"] == 0.5
    assert spread["acc/clients_undefined"] == 1
    assert "acc/clients_undefined" not in spread_of(ClientMetrics({"acc": values[:1]}, {}, sizes[:1]))


class Draws(Classifier):
    """Draws in its validation, counts its calls, and has a buffer that evaluation changes."""

    def __init__(self) -> None:
        super().__init__(norm=True, dropout=0.3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # The metric object is in the middle of an epoch when the clients are evaluated.
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        self.seen += len(batch[0])
        torch.rand(3)
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{}, {"optimizer_state": "kept", "buffers": "local"}], ids=["", "kept"])
def test_a_run_is_bit_identical_with_it(options):
    ends = []
    for every in (None, 1):
        module = Draws()
        runner, history = run(
            3, module=module, engine="sequential", client_eval_every_n_rounds=every, client_eval=False, **options
        )
        rows = []
        for row in history.metrics:
            rows.append({name: value for name, value in row.items() if "/clients_" not in name})
        ends.append(
            {
                "model": flat(module),
                "random": torch.get_rng_state(),
                "calls": module.calls,
                "rows": rows,
                "tally": {**runner.fit_loop.federation.tally.state_dict(), "seconds": None},
            }
        )
    assert_same(*ends)


def test_the_vectorized_engine_and_a_stock_trainer_have_the_same_numbers():
    _, sequential = run(2, module=Classifier(), engine="sequential", client_eval_every_n_rounds=1)
    _, vectorized = run(2, module=Classifier(), engine="vectorized", client_eval_every_n_rounds=1)
    stock = RunHistory()
    rule = FedHAWCallback(num_clients=4, alpha=10.0, engine="sequential", client_eval_every_n_rounds=1)
    pl.Trainer(max_epochs=2, callbacks=[rule, stock], **QUIET).fit(Classifier(), loader(), val_loader())
    assert stock.metrics == sequential.metrics
    assert len(spread_names(vectorized)) == 12
    for name in spread_names(vectorized):
        assert vectorized.curve(name) == pytest.approx(sequential.curve(name), abs=1e-4)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_resumed_run_has_the_numbers_of_all_rounds(engine):
    callbacks = lambda: [FedAvgCallback(), ErasureChannel(0.3)]  # noqa: E731
    check_resume(callbacks, loader(), client_eval_every_n_rounds=2, engine=engine, precision="32-true")


def test_its_loader_is_the_validations_from_the_first_round_on():
    # The first validation is after the second round, and only its loader scales the samples.
    def scaled(items):
        x, y = torch.utils.data.default_collate(items)
        return x * 100, y

    class Mean(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("size", batch[0].abs().mean())

    history = RunHistory()
    runner = trainer(2, None, [history], client_eval_every_n_rounds=1, check_val_every_n_epoch=2)
    runner.fit(Mean(), loader(), DataLoader(samples(20), batch_size=5, collate_fn=scaled))
    first, second = history.curve("size/clients_mean")
    assert first == second > 50


class Fails(Classifier):
    """Its validation fails once, on a client's data in the second round."""

    def __init__(self) -> None:
        super().__init__(norm=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.federation_client == 2 and self.trainer.global_step == 1 and not FAILED:
            FAILED.append(1)
            raise RuntimeError("a bad batch")
        super().validation_step(batch, batch_idx)


FAILED: list[int] = []


def test_a_round_whose_evaluation_fails_is_undone():
    FAILED.append(1)
    straight = Fails()
    _, expected = run(3, module=straight, client_eval_every_n_rounds=1)
    FAILED.clear()
    module = Fails()
    history = RunHistory()
    torch.manual_seed(1)
    keeps = ModelCheckpoint("kept", save_last=True)
    runner = trainer(3, FedHAWCallback(), [history, keeps], client_eval_every_n_rounds=1, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="a bad batch") as caught:
        runner.fit(module, loader(), val_loader())
    assert "evaluated on their own data" in "".join(getattr(caught.value, "__notes__", caught.value.args))
    assert len(history.metrics) == 1
    assert runner.fit_loop.federation.tally.received == 4
    resumed = RunHistory()
    runner = trainer(3, FedHAWCallback(), [resumed, keeps], client_eval_every_n_rounds=1, enable_checkpointing=True)
    runner.fit(module, loader(), val_loader(), ckpt_path=keeps.last_model_path)
    assert torch.equal(flat(module), flat(straight))
    assert resumed.metrics == expected.metrics


def test_two_processes_have_the_numbers_of_one():
    histories = []
    for place in ({}, {"devices": 2, "strategy": "federated_notebook"}):
        _, history = run(
            2,
            module=Classifier(norm=True),
            reduction="ordered",
            local_parameters="net.4.*",
            client_eval_every_n_rounds=1,
            **place,
        )
        histories.append(history.metrics)
    assert histories[0] == histories[1]
    assert "val_acc/clients_worst_decile" in histories[0][0]


def test_local_parameters_are_those_of_each_client():
    runner, history = run(2, local_parameters="net.4.*", client_eval_every_n_rounds=1)
    mean = runner.federation_summary["client_metrics"]["val_loss"]["mean"]
    assert history.curve("val_loss/clients_mean")[1] == pytest.approx(mean, abs=1e-6)


def test_callbacks_can_monitor_it_and_loggers_have_it_in_its_rounds_only():
    monitor = "val_acc/clients_worst_decile"
    stopping = EarlyStopping(monitor, mode="max", patience=1, strict=False, min_delta=2.0)
    best = ModelCheckpoint("best", "{epoch}", monitor=monitor, mode="max", every_n_epochs=2)
    options = {"logger": CSVLogger("logs"), "enable_checkpointing": True}
    runner, _ = run(8, [stopping, best], client_eval_every_n_rounds=2, **options)
    # The first number is in round 2, and no later one is larger by 2.
    assert runner.global_step == 3
    assert best.best_model_path.endswith("epoch=1.ckpt")
    curve = read_run("logs").curve(monitor)
    assert [value != value for value in curve] == [True, False, True]


def test_what_cannot_be_evaluated_is_refused():
    class Manual(Classifier):
        validation_step = pl.LightningModule.validation_step

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="module has none; with manual optimization"):
        trainer(1, None, client_eval_every_n_rounds=1).fit(Manual(), loader())

    class Mute(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"the module has logged none on their data. Call `self.log`"):
        trainer(1, None, client_eval_every_n_rounds=1).fit(Mute(), loader(), val_loader())
    with pytest.raises(ValueError, match="client_eval_every_n_rounds"):
        FederatedTrainer(client_eval_every_n_rounds=0)


def test_a_development_run_leaves_it_out():
    runner, history = run(2, client_eval_every_n_rounds=1, fast_dev_run=True)
    assert runner.global_step == 2
    assert not spread_names(history)


def test_pictures(capsys):
    split = IndexPartitioner([list(range(40)), list(range(40, 45)), list(range(45, 120))])
    options = {"partitioner": split, "num_clients": None, "alpha": None, "client_eval_every_n_rounds": 2}
    runner, history = run(6, **options)
    figure = draw_spread({"FedHAW": [history], "again": [history, history]}, "val_acc", "pictures/spread.pdf")
    values, deviations = figure.axes
    assert values.get_ylabel() == deviations.get_ylabel().removeprefix("standard deviation of ") == "val_acc"
    mean = values.get_lines()[0]
    assert mean.get_xdata().tolist() == [2, 4, 6]
    assert mean.get_ydata().tolist() == pytest.approx(history.curve("val_acc/clients_mean")[1::2])
    assert len(values.collections) == 2
    with pytest.raises(ValueError, match=r"`client_eval_every_n_rounds` \(`val_acc`, `val_loss`\), got 'f1'"):
        draw_spread({"FedHAW": [history]}, "f1")
    runner.save_checkpoint("run.ckpt")
    # Not the log, which has no value of a single client after a round.
    paths = [path.name for path in main(["FedHAW=run.ckpt", "--output", "drawn"])]
    assert paths[0] == "val_acc.png"
    assert {"val_acc_over_clients.png", "val_loss_over_clients.png", "FedHAW_val_acc_of_each_client.png"} <= set(paths)
    capsys.readouterr()


def test_each_client_over_rounds():
    """Each metric of each client in the last measured round is what the summary's table has of the same model."""
    runner, history = run(4, client_eval_every_n_rounds=2)
    curves = history.client_curves("val_loss")
    assert curves.isnan().all(1).tolist() == [True, False, True, False]
    assert curves[-1].tolist() == pytest.approx(history.clients["val_loss"], abs=1e-6)
    assert curves[1].mean().item() == pytest.approx(history.curve("val_loss/clients_mean")[1])

    axes = draw_client_curves(history, "val_loss", "pictures/clients.pdf").axes[0]
    worst = int(curves[-1].argmax())
    last = axes.get_lines()[-1]
    assert last.get_label() == f"client {worst}  ({history.sizes[worst]:,})"
    assert last.get_xdata().tolist() == [2, 4]
    assert last.get_ydata().tolist() == curves[1::2, worst].tolist()
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(curves[1::2].max().item())
    assert len(draw_client_curves(history, "val_acc", clients=[3, 0]).axes[0].get_lines()) == 4 + 1 + 2

    runner.save_checkpoint("run.ckpt")
    assert torch.equal(read_run("run.ckpt").client_curves("val_loss")[1::2], curves[1::2])


def test_curves_of_clients_that_are_not_there():
    history = RunHistory()
    history.metrics = [{}]
    with pytest.raises(ValueError, match=r"each client's value, with `client_eval_every_n_rounds` \(none\), got 'f1'"):
        draw_client_curves(history, "f1")
    history.sizes = [1, 2]
    history.tables = {"f1/of_clients": {0: torch.ones(2)}}
    with pytest.raises(ValueError, match="`clients` must be a whole number from 0 to 1, got 2"):
        draw_client_curves(history, "f1", clients=[2])
    many = ClientMetrics({"f1": torch.zeros(1001)}, {}, torch.ones(1001))
    assert values_of_clients(many) == {}
