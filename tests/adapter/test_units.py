"""Numbers that were chosen in batches, in a run that counts rounds."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import lr_scheduler

from federations import QUIET, Classifier, loader
from lightning_fedhaw import FedAvgCallback

ROUNDS = 4


def warmed_up(length):
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / length))


def one_cycle(length):
    return lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=length)


def cosine(length):
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, length)


def in_sequence(length):
    def make(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ConstantLR(optimizer, 1.0, 2)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[length])

    return make


def warnings_of(make_schedule=None, interval="step", callbacks=()):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            if make_schedule is None:
                return optimizer
            return [optimizer], [{"scheduler": make_schedule(optimizer), "interval": interval}]

    trainer = pl.Trainer(max_epochs=ROUNDS, callbacks=[FedAvgCallback(num_clients=2), *callbacks], **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Scheduled(), loader(40))
    return [str(warning.message) for warning in caught if "round" in str(warning.message)]


@pytest.mark.parametrize("make", [one_cycle, cosine, in_sequence], ids=lambda make: make.__name__)
def test_a_schedule_for_batches_is_named_with_both_numbers(make):
    (sentence,) = warnings_of(make(1000))
    assert "is set to 1000 steps, and this run has 4" in sentence


@pytest.mark.parametrize("make", [one_cycle, cosine, in_sequence], ids=lambda make: make.__name__)
def test_a_schedule_that_ends_with_the_run_is_right(make):
    assert warnings_of(make(ROUNDS)) == []


def test_a_schedule_over_epochs_keeps_its_numbers():
    """Twenty epochs were twenty epochs; only a one-cycle schedule is made for steps in any case."""
    assert warnings_of(cosine(20), interval="epoch") == []
    assert len(warnings_of(one_cycle(20), interval="epoch")) == 1


def test_a_warm_up_that_never_ends_is_named():
    """After round 4 of 500 the factor is 4 / 500."""
    (sentence,) = warnings_of(warmed_up(500))
    assert "`LambdaLR` is still warming up when this run ends, at 0.008 times the rate" in sentence
    assert warnings_of(warmed_up(2)) == []


def test_an_average_that_is_longer_than_the_run_is_named():
    """0.999^4 of the average is the initial model."""
    (sentence,) = warnings_of(callbacks=[EMAWeightAveraging()])
    assert "`decay=0.999` averages over about 1000 updates" in sentence
    assert "this run has 4, after which 100% of the average is still the initial model" in sentence
    assert warnings_of(callbacks=[EMAWeightAveraging(decay=0.5)]) == []
