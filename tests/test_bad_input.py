"""Every mistake gets one sentence that names the argument, what is allowed, what came and the remedy."""

import pytest
import torch
from torch.utils.data import DataLoader

from federations import QUIET, Classifier, loader, samples, trainer
from lightning_fedhaw import FedAvgCallback, FederatedTrainer, FedHAWCallback, IIDPartitioner
from lightning_fedhaw.data import EveryoneSampler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 0}, "`num_clients` must be a whole number of at least 1, got 0"),
        ({"num_clients": 2.5}, "`num_clients` must be a whole number"),
        ({"alpha": -0.1}, "`alpha` must be a positive number .* got -0.1"),
        ({"alpha": float("nan")}, "`alpha` must be a positive number"),
        ({"alpha": 0.1, "partitioner": IIDPartitioner()}, "Give `alpha` or `partitioner`, not both"),
        ({"partitioner": "iid"}, "`partitioner` must be a `lightning_fedhaw.data.Partitioner`, got str"),
        ({"clients_per_round": 5, "num_clients": 4}, "`clients_per_round` must be at most `num_clients`=4, got 5"),
        ({"clients_per_round": 0}, "`clients_per_round` must be a whole number of at least 1"),
        ({"clients_per_round": 1.5}, r"a share of all clients in \(0, 1\], got 1.5"),
        ({"clients_per_round": 2, "sampler": EveryoneSampler()}, "Give `clients_per_round` or `sampler`, not both"),
        ({"sampler": 3}, "`sampler` must be a `lightning_fedhaw.data.CohortSampler`, got int"),
        ({"local_epochs": 1, "local_steps": 1}, "Give `local_epochs` or `local_steps`, not both"),
        ({"local_epochs": 0}, "`local_epochs` must be a whole number of at least 1"),
        ({"local_steps": -1}, "`local_steps` must be a whole number of at least 1"),
        ({"optimizer_state": "stale"}, "`optimizer_state` must be one of 'fresh', 'kept', got 'stale'"),
        ({"buffers": "sum"}, "`buffers` must be one of 'average', 'keep', 'local', 'recalibrate', got 'sum'"),
        ({"on_nonfinite": "ignore"}, "`on_nonfinite` must be one of 'exclude', 'raise'"),
        ({"empty_round": "stop"}, "`empty_round` must be one of"),
        ({"storage": "disk"}, "`storage` must be one of"),
        ({"storage_dtype": torch.int8}, "`storage_dtype` must be a floating-point dtype of .* got torch.int8"),
        ({"client_val_fraction": 1.0}, r"`client_val_fraction` must lie in \[0, 1\), got 1.0"),
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
    from lightning_fedhaw import FederatedDataModule

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
