"""Every mistake gets one sentence that names the argument, what is allowed, what came and the remedy."""

from functools import partial

import pytest
import torch
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, samples, trainer
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedOptCallback,
    IIDPartitioner,
    KrumCallback,
    MultiKrumCallback,
    OverTheAirChannel,
    PublishedFedHAWCallback,
    ServerFineTuningCallback,
)
from lightning_fedhaw.data import FullParticipationSampler, balanced_subset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 0}, "`num_clients` must be a whole number of at least 1, got 0"),
        ({"num_clients": 2.5}, "`num_clients` must be a whole number"),
        ({"alpha": -0.1}, "`alpha` must be a finite number above 0, got -0.1. 0.1 is strong label skew"),
        ({"alpha": float("nan")}, "`alpha` must be a finite number above 0, got nan"),
        ({"alpha": 0.1, "partitioner": IIDPartitioner()}, "Give `alpha` or `partitioner`, not both"),
        (
            {"partitioner": "iid"},
            "`partitioner` must be an instance of `lightning_fedhaw.data.Partitioner`, .* got 'iid'",
        ),
        ({"clients_per_round": 5, "num_clients": 4}, "`clients_per_round` must be at most `num_clients`=4, got 5"),
        ({"clients_per_round": 0}, "`clients_per_round` must be a whole number of at least 1"),
        ({"clients_per_round": 1.5}, r"a share of all clients in \(0, 1\], got 1.5"),
        (
            {"clients_per_round": 2, "sampler": FullParticipationSampler()},
            "Give `clients_per_round` or `sampler`, not both",
        ),
        ({"sampler": 3}, "`sampler` must be an instance of `lightning_fedhaw.data.CohortSampler`, .* got 3"),
        ({"sampler": FullParticipationSampler}, "`sampler` must be .* got the class FullParticipationSampler"),
        ({"local_epochs": 1, "local_steps": 1}, "Give `local_epochs` or `local_steps`, not both"),
        ({"local_epochs": 0}, "`local_epochs` must be a whole number of at least 1"),
        ({"local_steps": -1}, "`local_steps` must be a whole number of at least 1"),
        ({"optimizer_state": "stale"}, "`optimizer_state` must be one of 'fresh', 'kept', got 'stale'"),
        ({"buffers": "sum"}, "`buffers` must be one of 'average', 'keep', 'local', 'recalibrate', got 'sum'"),
        ({"on_nonfinite": "ignore"}, "`on_nonfinite` must be one of 'exclude', 'raise'"),
        ({"empty_round": "stop"}, "`empty_round` must be one of"),
        ({"storage": "disk"}, "`storage` must be one of"),
        ({"storage_dtype": torch.int8}, "`storage_dtype` must be one of torch.float16, .* got torch.int8"),
        ({"client_val_fraction": 1.0}, r"`client_val_fraction` must be a number in \[0, 1\), got 1.0. 0.1 holds out"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0"),
    ],
)
@pytest.mark.parametrize("door", [1, 2])
def test_federation_arguments(arguments, message, door):
    with pytest.raises((ValueError, TypeError), match=message):
        if door == 1:
            FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **arguments, **QUIET)
        else:
            FedHAWCallback(**arguments)


def test_rounds():
    with pytest.raises(ValueError, match="`rounds` must say how many communication rounds"):
        FederatedTrainer(callbacks=[FedAvgCallback()], **QUIET)
    with pytest.raises(ValueError, match="`rounds`=3 and `max_epochs`=4 mean the same and differ"):
        FederatedTrainer(rounds=3, max_epochs=4, callbacks=[FedAvgCallback()], **QUIET)
    with pytest.raises(ValueError, match="`rounds` must be a whole number"):
        FederatedTrainer(rounds=2.5, callbacks=[FedAvgCallback()], **QUIET)
    assert FederatedTrainer(max_epochs=4, callbacks=[FedAvgCallback()], **QUIET).max_epochs == 4


def test_exactly_one_rule():
    with pytest.raises(ValueError, match="exactly one aggregation rule .* got none. Add one, such as `FedHAWCallback"):
        FederatedTrainer(rounds=1, **QUIET).fit(Classifier(), loader())
    with pytest.raises(ValueError, match=r"got 2 \(FedAvgCallback, FedHAWCallback\). Remove all but one"):
        trainer(callbacks=[FedHAWCallback()]).fit(Classifier(), loader())


def test_a_rule_may_come_from_the_module():
    class Brings(Classifier):
        def configure_callbacks(self):
            return [FedAvgCallback()]

    runner = FederatedTrainer(rounds=1, num_clients=3, **QUIET)
    runner.fit(Brings(), loader())
    assert runner.federation_summary["rule"] == "FedAvgCallback"


def test_fewer_samples_than_clients():
    with pytest.raises(ValueError, match=r"num_clients.*30.*20|20.*30"):
        trainer(num_clients=30, alpha=None).fit(Classifier(), DataLoader(samples(20), batch_size=2, shuffle=True))


def test_more_clients_a_round_than_the_data_module_has():
    runner = FederatedTrainer(rounds=1, clients_per_round=5, callbacks=[FedAvgCallback()], **QUIET)
    with pytest.raises(ValueError, match="`clients_per_round` must be at most `num_clients`=3, got 5"):
        runner.fit(Classifier(), FederatedDataModule(samples(), num_clients=3))


def test_nothing_to_train():
    module = Classifier()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`model` \(Classifier\) has no trainable parameter"):
        trainer().fit(module, loader())


def test_a_changed_set_of_trainable_parameters():
    class Unfreezes(Classifier):
        def on_train_epoch_end(self):
            self.net[0].requires_grad_(False)

    with pytest.raises(RuntimeError, match=r"changed during `fit` .*net\.0\.bias"):
        trainer().fit(Unfreezes(), loader())


def test_a_frozen_part_never_travels():
    module = Classifier()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    runner = trainer()
    runner.fit(module, loader())
    assert runner.federation_summary["parameters"] == 27
    assert torch.equal(before, module.net[0].weight)


def test_training_step_must_give_a_loss():
    class Forgets(Classifier):
        def training_step(self, batch, batch_idx):
            return {"lose": 1}

    with pytest.raises(
        TypeError, match="`training_step` must return a loss tensor, a dict with the key 'loss', or None"
    ):
        trainer().fit(Forgets(), loader())


def test_unknown_arguments_are_lightnings_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'roundz'"):
        FederatedTrainer(rounds=1, roundz=2)


# ---------------------------------------------------------------------- rules


def fit(rule, module, proxy=None, rounds=3):
    runner = trainer(rounds=rounds, rule=rule)
    runner.fit(module, FederatedDataModule(samples(), batch_size=8, proxy=proxy))
    return runner


@pytest.mark.parametrize(
    ("proxy", "error", "message"),
    [
        (None, ValueError, "`FedLAWCallback` works with data of the server's own, and there is none: give `Federated"),
        (0, ValueError, "`proxy` must be a whole number of at least 1, got 0"),
        (
            0.1,
            TypeError,
            "`proxy` must be a data set with a length, or a whole number of training samples .* got float",
        ),
        (500, ValueError, "`proxy`=500 cannot be cut from 120 training samples, .* take fewer in all. Or give a data"),
    ],
)
@pytest.mark.parametrize("make", [FedLAWCallback, lambda: FedOptCallback(rule=FedLAWCallback())], ids=["law", "opt"])
def test_proxy_data(make, proxy, error, message):
    module = Classifier()
    with pytest.raises(error, match=message):
        fit(make(), module, proxy)
    assert torch.equal(flat(module), flat(Classifier()))


@pytest.mark.parametrize("argument", ["train", "proxy"])
def test_data_without_a_sample(argument):
    data = {"train": samples(), argument: TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))}
    with pytest.raises(ValueError, match=f"`{argument}` must have at least one sample, got a TensorDataset without"):
        FederatedDataModule(**data)
    with pytest.raises(ValueError, match="`labels` must be those of at least one sample, got none"):
        balanced_subset(torch.zeros(0, dtype=torch.int64), 10)


def test_the_rule_within_a_rule_is_named_where_it_needs_single_updates():
    with pytest.raises(ValueError, match="gives the server only the sum of the updates, and KrumCallback needs each"):
        runner = trainer(
            rule=FedOptCallback(rule=FedOptCallback(rule=KrumCallback())), callbacks=[OverTheAirChannel(9.0)]
        )
        runner.fit(Classifier(), loader())


def test_more_clients_to_keep_than_there_are():
    with pytest.raises(
        ValueError,
        match="`num_byzantine`=0 with `keep`=9 needs at least 9 clients a round .* has 4. .* or lower .* `keep`",
    ):
        fit(MultiKrumCallback(0, keep=9), Classifier())


READY = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedOptCallback(READY), "`optimizer` must make .* got a ready-made SGD"),
        (
            lambda: FedLAWCallback(optimizer=READY),
            "`optimizer` must make .* got a ready-made SGD",
        ),
        (lambda: ServerFineTuningCallback(optimizer=READY), "`optimizer` must make .* got a ready-made SGD"),
        (lambda: FedHAWCallback(hyper_optimizer=READY), "`hyper_optimizer` must make .* got a ready-made SGD"),
        (
            lambda: FedLAWCallback(scheduler=StepLR(READY, 1)),
            "`scheduler` must make a schedule from the optimizer.* got a ready-made StepLR",
        ),
        (
            lambda: FedOptCallback(LBFGS),
            r"`optimizer` must .* given gradient: .*`partial\(torch.* got LBFGS .*`closure`",
        ),
        (lambda: FedHAWCallback(hyper_optimizer=LBFGS), "`hyper_optimizer` must make .* got LBFGS .*`closure`"),
        (lambda: FedOptCallback(lr_scheduler=StepLR), r"`lr_scheduler` .*`partial\(StepLR, .* got StepLR .*step_size"),
        (
            lambda: FedOptCallback(lr_scheduler=ReduceLROnPlateau),
            "`lr_scheduler` must .*ReduceLROnPlateau.step needs `metrics`",
        ),
        (lambda: FedLAWCallback(scheduler=StepLR), "`scheduler` must make a schedule .* got StepLR .*step_size"),
        (lambda: FedOptCallback(partial(torch.optim.SGD, momentun=0.9)), "`optimizer` must make .* 'momentun'"),
        (lambda: ServerFineTuningCallback(optimizer="adam"), "`optimizer` must make .* got 'adam'"),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made_or_is_ready_made(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message", "rounds"),
    [
        (
            PublishedFedHAWCallback(lr_gamma=1e3),
            r"step of round 1 would make gamma \d+, and the scale .* refused: .* Lower `lr_gamma` \(1000.0\)",
            2,
        ),
        (
            FedLAWCallback("scale", lr=50.0, server_epochs=1),
            r"FedLAW's descent of round 0 ended with the scale .* was refused: the round is .* Lower `lr` \(50",
            1,
        ),
    ],
    ids=["FedHAW", "FedLAW"],
)
def test_a_scale_that_reaches_zero_or_overflows_is_refused_and_the_round_is_fedavgs(rule, message, rounds):
    module, averaged = Classifier(), Classifier()
    with pytest.warns(UserWarning, match=message):
        fit(rule, module, proxy=30, rounds=rounds)
    fit(FedAvgCallback(), averaged, proxy=30, rounds=rounds)
    assert torch.allclose(flat(module), flat(averaged), atol=1e-6)


ENDLESS = {"hyper_lr": 1e20, "alpha_bounds": (1e-8, 1e30), "beta_bounds": (1e-8, 1e30)}


def test_fedhypers_rate_without_bounds_ends_the_run_with_the_model_before():
    module, before = Classifier(), Classifier()
    with pytest.raises(FloatingPointError, match=r"were not installed: .* FedHyper: `alpha_bounds=\(0.2, 5.0\)`"):
        fit(FedHyperCallback(**ENDLESS), module, rounds=4)
    assert torch.isfinite(flat(module)).all()
    assert not torch.equal(flat(module), flat(before))


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_fedhypers_local_rate_without_bounds_says_what_to_do():
    with pytest.raises(FloatingPointError, match=r"Every client of round 2 .* FedHyper learns rates .* `beta_bounds`"):
        fit(FedHyperCallback("G+SL", **ENDLESS), Classifier(), rounds=4)
