"""A run that has diverged ends, also if most of its messages are lost, and says little until then."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from federations import QUIET, Classifier, flat, loader, trainer
from lightning_fedhaw import ErasureChannel, FedAvgCallback, FederatedCallback
from lightning_fedhaw.extending import Channel
from lightning_fedhaw.federation.repeated import RepeatedWarnings

pytestmark = [
    pytest.mark.filterwarnings("ignore:Client . returned non-finite"),
    pytest.mark.filterwarnings("ignore:No client update was received"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]
FOUR = {"num_clients": 4, "client_eval": False, "seed": 0}
ENDS = r"In 3 rounds in a row, up to round {}, every client whose update was received returned non-finite values, so"


class Arrivals(Channel):
    """Delivers the listed clients of each round, and NaN from those that are negative; client 0 is written as 4."""

    def __init__(self, rounds):
        super().__init__(fallback="discard")
        self.rounds = rounds

    def outage(self, round_idx, clients, seed):
        present = {abs(number) % 4 for number in self.rounds[round_idx]}
        return torch.tensor([client not in present for client in clients])

    def transmit(self, message, *, round_idx, client, seed):
        spoiled = {-number % 4 for number in self.rounds[round_idx] if number < 0}
        return message * torch.nan if client in spoiled else message


def fit(rounds, stock=False, module=None, callbacks=(), ckpt_path=None, **options):
    module = module or Classifier()
    options = {"max_nonfinite_rounds": 3, **FOUR, **options}
    place = {name: options.pop(name) for name in ("devices", "strategy") if name in options}
    if stock:
        rule = FedAvgCallback(alpha=10.0, **options)
        runner = pl.Trainer(
            max_epochs=len(rounds), callbacks=[rule, Arrivals(rounds), *callbacks], **{**QUIET, **place}
        )
    else:
        runner = trainer(len(rounds), FedAvgCallback(), [Arrivals(rounds), *callbacks], **options, **place)
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return runner, module


BAD, LOST, GOOD = [-1], [], [2, 3, 4]


@pytest.mark.parametrize(
    "options",
    [{}, {"stock": True}, {"engine": "vectorized"}, {"devices": 2, "strategy": "federated_notebook"}],
    ids=["ours", "stock", "vectorized", "two processes"],
)
def test_rounds_in_a_row_in_which_all_that_came_was_nan_end_the_run(options):
    module = Classifier()
    # Lost messages neither count nor begin a new count; a good round does.
    rounds = [BAD, BAD, GOOD, BAD, LOST, BAD, LOST, LOST, BAD, GOOD]
    with pytest.raises(Exception, match=ENDS.format(8)):
        fit(rounds, module=module, **options)
    if "devices" not in options:
        _, until_then = fit(rounds[:3], **options)
        assert torch.equal(flat(module), flat(until_then))


def test_a_finite_update_among_them_is_enough():
    runner, _ = fit([BAD, BAD, [-1, 2], BAD, BAD])
    assert runner.federation_summary["skipped_rounds"] == 4


def test_the_count_goes_on_in_a_resumed_run():
    rounds = [GOOD, BAD, BAD, BAD, GOOD]

    def saved(folder):
        checkpoint = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
        return {"callbacks": [checkpoint], "enable_checkpointing": True}

    fit(rounds[:3], **saved("bad"))
    with pytest.raises(FloatingPointError, match=ENDS.format(3)):
        fit(rounds, ckpt_path="bad/last.ckpt", **saved("bad"))
    fit([BAD, GOOD], **saved("good"))
    loops = torch.load("good/last.ckpt", weights_only=True)["loops"]
    assert "nonfinite_rounds" not in str(loops), "a checkpoint has no entry if there is nothing to count"


class Interrupts(FederatedCallback):
    """Fails once, when round 2 is over."""

    has_failed = False

    def on_round_end(self, trainer, pl_module, report):
        if report.round == 2 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("not today")


def test_a_round_that_failed_is_not_counted():
    rounds = [GOOD, BAD, BAD, LOST, GOOD]
    interrupts, module = Interrupts(), Classifier()
    runner = trainer(
        5, FedAvgCallback(), [Arrivals(rounds), interrupts], **{"max_nonfinite_rounds": 3, **FOUR}, alpha=10.0
    )
    with pytest.raises(RuntimeError, match="not today"):
        runner.fit(module, loader())
    # Round 2 is played again: the second bad round in a row, and not the third.
    runner.fit(module, loader())
    assert runner.federation_summary["rounds"] == 5


class Destroys(Channel):
    """One client sends a huge number."""

    def transmit(self, message, *, round_idx, client, seed):
        return torch.full_like(message, 1e30) if client == 0 else message


def test_a_destroyed_run_ends_and_its_log_is_short():
    channels = [ErasureChannel(0.9, fallback="discard"), Destroys()]
    runner = trainer(1000, FedAvgCallback(), channels, num_clients=10, client_eval=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FloatingPointError, match="In 20 rounds in a row, up to round .* so training has diverged"):
            runner.fit(Classifier(), loader())
    assert runner.current_epoch < 100
    assert len(caught) < 20


def test_warnings_are_given_at_powers_of_ten():
    told = RepeatedWarnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(1, 1500):
            told.warn("one", f"Number {number}.")
        told.warn("another", "Other.")
    messages = [str(warning.message) for warning in caught]
    assert [message.split(".")[0] for message in messages] == [
        "Number 1",
        "Number 10",
        "Number 100",
        "Number 1000",
        "Other",
    ]
    assert messages[3] == ("Number 1000. That was the case 1,000 times so far; the next warning comes at 10,000.")
