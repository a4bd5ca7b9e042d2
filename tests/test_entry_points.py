"""Two entry points, one federation."""

import logging

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, samples, trainer, val_loader
from lightning_fedhaw import (
    ErasureChannel,
    FedAvgCallback,
    FederatedCallback,
    FederatedDataModule,
    FederatedStrategy,
    FederatedTrainer,
    FedHAWCallback,
    FedProx,
    RoundProgressBar,
    RunHistory,
)

FEDERATION = {"num_clients": 5, "alpha": 0.5, "clients_per_round": 3, "local_epochs": 2, "seed": 4}


class WithLoader(Classifier):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return val_loader()


class Module(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return val_loader()


def fit(door: int, data: str, rule=FedHAWCallback, optimizer=None):
    module = WithLoader(optimizer) if data == "module" else Classifier(optimizer)
    if door == 1:
        runner = FederatedTrainer(rounds=4, callbacks=[rule()], **FEDERATION, **QUIET)
    else:
        runner = pl.Trainer(max_epochs=4, callbacks=[rule(**FEDERATION)], **QUIET)
    arguments = {"loader": (loader(), val_loader()), "datamodule": (Module(),), "module": ()}[data]
    runner.fit(module, *arguments)
    return runner, module


@pytest.mark.parametrize("data", ["loader", "datamodule", "module"])
@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.Adam(p, lr=1e-2)], ids=["sgd", "adam"])
def test_the_two_doors_are_bit_identical(data, optimizer):
    (first, a), (second, b) = fit(1, data, optimizer=optimizer), fit(2, data, optimizer=optimizer)
    assert (flat(a) - flat(Classifier())).abs().max() > 0.01
    assert torch.equal(flat(a), flat(b))
    rules = [next(c for c in t.callbacks if isinstance(c, FedHAWCallback)) for t in (first, second)]
    assert torch.equal(rules[0].state["lambda_"], rules[1].state["lambda_"])
    assert torch.equal(rules[0].state["gamma"], rules[1].state["gamma"])
    assert float(rules[0].state["gamma"]) != 0
    for name, value in first.callback_metrics.items():
        assert torch.equal(value, second.callback_metrics[name]), name
    assert first.global_step == second.global_step == first.current_epoch == 4


def test_the_three_ways_to_give_data_are_bit_identical():
    models = [flat(fit(2, data)[1]) for data in ("loader", "datamodule", "module")]
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])


def test_a_data_module_trains_both_ways():
    data = FederatedDataModule(samples(), num_clients=5, batch_size=8, val=samples(60, seed=1))
    runner = FederatedTrainer(rounds=2, callbacks=[FedAvgCallback()], **QUIET)
    runner.fit(Classifier(), data)
    assert runner.federation_summary["clients"] == 5
    assert "val_acc" in runner.callback_metrics

    def central(*source):
        pl.seed_everything(7, verbose=False)
        module = Classifier()
        pl.Trainer(max_epochs=2, **QUIET).fit(module, *source)
        return flat(module)

    plain = (DataLoader(samples(), batch_size=8, shuffle=True), DataLoader(samples(60, seed=1), batch_size=8))
    assert torch.equal(central(data), central(*plain))


def test_federated_data_module_equals_the_loader_it_replaces():
    module, other = Classifier(), Classifier()
    trainer(seed=3).fit(module, loader(), val_loader())
    data = FederatedDataModule(samples(), batch_size=8, val=samples(60, seed=1))
    trainer(seed=3).fit(other, data)
    assert torch.equal(flat(module), flat(other))


def test_wrapping_an_existing_data_module_keeps_its_loaders():
    module, other = Classifier(), Classifier()
    trainer(seed=3).fit(module, Module())
    runner = trainer(seed=3)
    runner.fit(other, FederatedDataModule(Module()))
    assert torch.equal(flat(module), flat(other))
    assert "val_acc" in runner.callback_metrics


def test_no_argument_at_all_works_and_says_what_it_assumed(caplog):
    with caplog.at_level(logging.INFO):
        pl.Trainer(max_epochs=2, callbacks=[FedHAWCallback()], **QUIET).fit(Classifier(), loader(400))
    (line,) = [r.message for r in caplog.records if r.message.startswith("Federation:")]
    for said in ("10 clients", "all clients participate", "one local epoch", "batch size 8", "lr_step=0.5"):
        assert said in line


def test_without_labels_the_split_is_iid_and_an_explicit_alpha_is_an_error(caplog):
    class Regressor(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        validation_step = None

    data = DataLoader(TensorDataset(torch.randn(100, 6)), batch_size=8, shuffle=True)
    with caplog.at_level(logging.INFO):
        pl.Trainer(max_epochs=1, callbacks=[FedHAWCallback(client_eval=False)], **QUIET).fit(Regressor(), data)
    assert any("IID split, since no labels were found in the data set" in r.message for r in caplog.records)
    with pytest.raises(ValueError, match="labels"):
        pl.Trainer(max_epochs=1, callbacks=[FedHAWCallback(alpha=0.1)], **QUIET).fit(Regressor(), data)


def test_an_infeasible_default_split_lowers_the_number_of_clients_and_an_explicit_one_is_an_error(caplog):
    with caplog.at_level(logging.INFO):
        pl.Trainer(max_epochs=1, callbacks=[FedHAWCallback()], **QUIET).fit(Classifier(), loader(6, batch_size=2))
    assert any("the split is infeasible for 10" in r.message for r in caplog.records)
    with pytest.raises(ValueError, match="num_clients"):
        pl.Trainer(max_epochs=1, callbacks=[FedHAWCallback(num_clients=10)], **QUIET).fit(
            Classifier(), loader(6, batch_size=2)
        )


def test_a_second_fit_goes_on():
    straight, module = trainer(rounds=4, rule=FedHAWCallback()), Classifier()
    straight.fit(module, loader())
    twice, other = trainer(rounds=2, rule=FedHAWCallback()), Classifier()
    twice.fit(other, loader())
    twice.fit_loop.max_epochs = 4
    twice.fit(other, loader())
    assert twice.global_step == 4
    assert torch.equal(flat(module), flat(other))


def test_a_rule_that_served_another_run_starts_anew():
    rule = FedHAWCallback()
    models = []
    for _ in range(2):
        module = Classifier()
        trainer(rule=rule).fit(module, loader())
        models.append(flat(module))
    assert torch.equal(*models)


def test_the_global_random_state_is_the_users():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer().fit(Classifier(dropout=0.5), loader())  # a validation loader would draw, as in any Lightning run
    assert torch.equal(torch.rand(3), expected)


def test_seed_everything_is_the_default_seed():
    def run(**kwargs):
        module = Classifier()
        trainer(**kwargs).fit(module, loader())
        return flat(module)

    pl.seed_everything(11, verbose=False)
    everything = run()
    assert torch.equal(everything, run(seed=11))
    assert not torch.equal(everything, run(seed=12))


def test_pytorch_lightning_objects_get_one_clear_sentence():
    class Other(pytorch_lightning.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(TypeError, match="`pytorch_lightning.LightningModule`; the two packages do not mix"):
        trainer().fit(Other(), loader())
    with pytest.raises(TypeError, match="needs a `lightning.pytorch.Trainer`, got pytorch_lightning"):
        FedHAWCallback().setup(pytorch_lightning.Trainer(**QUIET), None, "fit")


class Watcher(FederatedCallback):
    """Watches rounds."""


@pytest.mark.parametrize(
    "make",
    [ErasureChannel, FedProx, Watcher, RoundProgressBar, RunHistory],
    ids=lambda make: make.__name__,
)
def test_a_part_of_a_federation_needs_a_rule(make):
    """A stock trainer would train on all data at once and never call it."""
    without = {**QUIET, "enable_progress_bar": make is RoundProgressBar}
    part = make() if make is not ErasureChannel else make(0.5)
    with pytest.raises(ValueError, match=f"`{make.__name__}` has an effect in federated training only.*Add a rule"):
        pl.Trainer(max_epochs=1, callbacks=[part], **without).fit(Classifier(), loader())
    pl.Trainer(max_epochs=1, callbacks=[part], **without).validate(Classifier(), val_loader(), verbose=False)


def test_a_strategy_without_synchronization_needs_a_rule():
    trainer = pl.Trainer(max_epochs=1, strategy=FederatedStrategy(), devices=1, **QUIET)
    try:
        with pytest.raises(ValueError, match="`FederatedStrategy` has an effect in federated training only"):
            trainer.fit(Classifier(), loader())
    finally:
        torch.distributed.destroy_process_group()


class Composed(Classifier):
    """Logs a metric that is the sum of two others, and these."""

    def __init__(self):
        super().__init__()
        self.left, self.right = torchmetrics.SumMetric(), torchmetrics.SumMetric()
        self.total = self.left + self.right

    def training_step(self, batch, batch_idx):
        self.total.update(len(batch[0]))
        self.log_dict({"total": self.total, "left": self.left, "right": self.right}, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_a_metric_composed_of_others_is_read_before_they_are_reset():
    trainer = pl.Trainer(max_epochs=2, callbacks=[FedAvgCallback(num_clients=3)], **QUIET)
    trainer.fit(Composed(), loader(120))
    logged = {name: float(trainer.callback_metrics[name]) for name in ("total", "left", "right")}
    assert logged == {"total": 240.0, "left": 120.0, "right": 120.0}, "of the last round alone"


def test_trainer_and_rule_must_agree():
    runner = FederatedTrainer(rounds=1, num_clients=4, callbacks=[FedAvgCallback(num_clients=5)], **QUIET)
    with pytest.raises(
        ValueError, match=r"`num_clients` is given to both the trainer \(4\) and the rule callback \(5\)"
    ):
        runner.fit(Classifier(), loader())
    runner = FederatedTrainer(
        rounds=1, num_clients=4, callbacks=[FedAvgCallback(local_epochs=2, num_clients=4)], **QUIET
    )
    runner.fit(Classifier(), loader())
    assert runner.fit_loop.options.local_epochs == 2


@pytest.mark.parametrize("door", [1, 2])
def test_callbacks_are_given_the_federation_and_the_options_in_force(door):
    class Sees(FederatedCallback):
        def __init__(self):
            self.seen = []

        def on_federation_start(self, trainer, pl_module, federation):
            self.seen.append((trainer.global_step, federation.data.num_clients, trainer.federation_options.num_clients))
            assert federation is trainer.fit_loop.federation
            assert trainer.federation_options.optimizer_state == "kept"

        def on_round_start(self, trainer, pl_module, round_idx, clients):
            self.seen.append(round_idx)

    sees, rule = Sees(), FedAvgCallback(num_clients=3, optimizer_state="kept")
    if door == 1:
        runner = FederatedTrainer(rounds=1, callbacks=[rule, sees], **QUIET)
        assert runner.federation_options.num_clients is None
    else:
        runner = pl.Trainer(max_epochs=1, callbacks=[rule, sees], **QUIET)
    module = Classifier()
    runner.fit(module, loader())
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    assert sees.seen == [(0, 3, 3), 0, (1, 3, 3), 1]
