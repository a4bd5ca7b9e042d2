"""Erasures: rates, bursts, the authors' draws, and what takes a lost message's place."""

import warnings

import numpy as np
import pytest
import torch

from channel_contexts import generator, prepared
from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import AvailabilityChannel, ErasureChannel, FedHAWCallback, GilbertElliott, IndexPartitioner
from lightning_fedhaw.channel.erasure import is_bad, legacy_draws

CLIENTS = list(range(10))
ROUNDS = 200


def losses(channel, rounds=ROUNDS, num_clients=10, seed=0):
    """``[rounds, clients]`` bool."""
    prepared(channel, num_clients=num_clients)
    return torch.stack([channel.outage(t, list(range(num_clients)), seed) for t in range(rounds)])


RATES = {
    0.2: [0.1035, 0.1894, 0.1531, 0.0565, 0.0442, 0.1372, 0.0334, 0.0785, 0.1236, 0.0824],
    0.5: [0.2586, 0.4735, 0.3827, 0.1412, 0.1105, 0.3431, 0.0836, 0.1962, 0.3090, 0.2060],
    0.8: [0.4138, 0.7576, 0.6124, 0.2259, 0.1768, 0.5490, 0.1337, 0.3140, 0.4944, 0.3295],
}
FAILURES = {
    0.2: [22, 32, 40, 12, 12, 35, 8, 10, 21, 17],
    0.5: [50, 95, 82, 26, 27, 73, 16, 38, 56, 48],
    0.8: [80, 148, 117, 42, 43, 119, 29, 64, 98, 81],
}


@pytest.mark.parametrize("most", RATES)
def test_the_authors_draws(most):
    before = np.random.get_state()[1].copy()
    channel = ErasureChannel(max_probability=most, legacy_seed=23)
    lost = losses(channel)
    assert torch.allclose(channel.rates(CLIENTS, 0), torch.tensor(RATES[most]).double(), atol=5e-5)
    assert lost.sum(0).tolist() == FAILURES[most]
    assert not lost.all(1).any(), "no round has all ten in error"
    assert (np.random.get_state()[1] == before).all()
    # A cohort sees its own clients' failures, in whatever round comes first.
    assert channel.outage(150, [7, 2], 0).tolist() == lost[150, [7, 2]].tolist()


def test_the_authors_draws_are_rows_of_one_matrix():
    old = np.random.RandomState(5)
    rates = old.rand(4) * 0.6
    flags = old.rand(30, 4) < rates
    for t in (0, 7, 29):
        mine = legacy_draws(5, 4, 0.6, t)
        assert mine[0].tolist() == rates.tolist()
        assert mine[1].tolist() == flags[t].tolist()


def within(share, expected, count, sigmas=4.5):
    """Whether a share of ``count`` independent events is as expected."""
    return abs(float(share) - expected) <= sigmas * (expected * (1 - expected) / count) ** 0.5 + 1e-12


def test_independent_erasures_come_as_often_as_they_should():
    lost = losses(ErasureChannel([k / 9 for k in range(10)]))
    for k in CLIENTS:
        assert within(lost[:, k].double().mean(), k / 9, ROUNDS)
    # Consecutive rounds and different clients have nothing to do with each other.
    lost = losses(ErasureChannel(0.5)).double() - 0.5
    assert abs(float((lost[1:] * lost[:-1]).mean())) < 4.5 * 0.25 / (199 * 10) ** 0.5
    assert abs(float((lost[:, 1:] * lost[:, :-1]).mean())) < 4.5 * 0.25 / (200 * 9) ** 0.5


def test_rates_drawn_up_to_a_maximum_belong_to_the_run():
    channel = ErasureChannel(max_probability=0.4)
    lost = losses(channel, 100, num_clients=200, seed=1)
    everybody = list(range(200))
    rates = channel.rates(everybody, 1)
    assert rates.max() <= 0.4
    assert abs(float(rates.mean()) - 0.2) < 4.5 * 0.4 / (12 * 200) ** 0.5
    assert abs(float(rates.var()) - 0.4**2 / 12) < 0.3 * 0.4**2 / 12
    assert torch.corrcoef(torch.stack([lost.double().mean(0), rates]))[0, 1] > 0.9
    assert not torch.equal(rates, channel.rates(everybody, 2))


def test_bursts_have_the_lengths_and_the_share_of_their_chain():
    burst = GilbertElliott(enter=0.1, leave=0.25, loss_good=0.0, loss_bad=1.0)
    lost = losses(ErasureChannel(burst=burst), 300, num_clients=20).double()
    share, memory = 0.1 / 0.35, 1 - 0.35
    assert burst.share_bad == burst.rate == pytest.approx(share)
    effective = 6000 * (1 - memory) / (1 + memory)
    assert within(lost.mean(), share, effective)
    assert within(lost[0].mean(), share, 20), "it starts in the long run"
    stays = (lost[1:] * lost[:-1]).sum() / lost[:-1].sum()
    assert within(stays, 0.75, float(lost[:-1].sum()))
    enters = ((1 - lost[:-1]) * lost[1:]).sum() / (1 - lost[:-1]).sum()
    assert within(enters, 0.1, float((1 - lost[:-1]).sum()))


def test_a_burst_needs_no_memory_of_the_rounds_before():
    for enter, leave in ((0.1, 0.25), (0.9, 0.95), (0.02, 0.01), (1.0, 1.0), (0.0, 0.5), (0.5, 0.0)):
        link = GilbertElliott(enter, leave)
        numbers = torch.rand(200, generator=generator(3), dtype=torch.float64).tolist()
        state = numbers[0] < link.share_bad
        for t in range(200):
            if t:
                state = numbers[t] < (1 - leave if state else enter)
            assert is_bad(link, t, numbers.__getitem__) == state


def test_looking_back_ends_where_the_past_is_forgotten():
    asked = []

    def number(past):
        asked.append(past)
        return float(torch.rand((), generator=generator(past)))

    for t in range(500, 600):
        is_bad(GilbertElliott(0.1, 0.25), t, number)
    # A step forgets with probability 0.1 + 0.25.
    assert len(asked) / 100 < 2 / 0.35


def test_losses_within_a_state():
    lost = losses(ErasureChannel(burst=GilbertElliott(0.5, 0.5, loss_good=0.1, loss_bad=0.7)), 300).double()
    assert within(lost.mean(), 0.4, 3000)


# ---------------------------------------------------------------------- in a federation


def test_a_rounds_losses_are_those_of_the_channel():
    channel = ErasureChannel(0.5)
    runner, _ = train(rounds=6, callbacks=[channel])
    lost = sum(int(channel.outage(t, [0, 1, 2, 3], 0).sum()) for t in range(6))
    assert runner.federation_summary["lost_messages"] == lost
    assert runner.federation_summary["clients_per_round"] == (24 - lost) / 6


def test_a_federation_that_is_hardly_there_finishes(capsys):
    """p = 0.9, one client always dead, one always NaN, ten rounds of total loss, 200 rounds."""

    class OneIsBroken(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if (batch[0] > 5).any() else loss

    data = loader(200)
    data.dataset.tensors[0][:20] = 9.0  # client 0's
    split = IndexPartitioner([list(range(20 * k, 20 * k + 20)) for k in range(10)])
    trace = torch.ones(200, 10)
    trace[100:110] = 0
    rule = FedHAWCallback(lr_gamma=1e-4)
    channels = [ErasureChannel([0.9] * 9 + [1.0]), AvailabilityChannel(trace, name="burst")]
    module = OneIsBroken()
    runner = trainer(rounds=200, rule=rule, callbacks=channels, num_clients=10, alpha=None, partitioner=split)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, data)
    summary, told = runner.federation_summary, [str(w.message) for w in caught]
    assert summary["rounds"] == 200
    assert torch.isfinite(flat(module)).all()
    assert not torch.equal(flat(module), flat(Classifier()))
    lost = torch.stack([channels[0].outage(t, CLIENTS, 0) for t in range(200)])
    lost[100:110] = True
    assert summary["lost_messages"] == lost.sum()
    assert summary["nonfinite_updates"] == (~lost[:, 0]).sum() > 0
    assert summary["clients_per_round"] * 200 == (~lost[:, 1:]).sum()
    silent = [t for t in range(200) if lost[t, 1:].all()]
    assert set(range(100, 110)) < set(silent)
    assert summary["skipped_rounds"] == len(silent)
    # Of what happens again and again, the 1st, the 10th and the 100th time are in the log.
    empty = [m for m in told if "No client update was received in round" in m]
    assert [int(m.split(" in round ")[1].split(":")[0]) for m in empty] == silent[:1] + silent[9:10] + silent[99:100]
    assert "That was the case 10 times so far; the next warning comes at 100." in empty[1]
    assert sum("Client 0 returned non-finite" in m for m in told) == len(str(summary["nonfinite_updates"]))
    table = capsys.readouterr().out
    assert f"{lost.sum()} lost messages" in table
    assert f"{len(silent)} skipped rounds" in table


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_a_run_in_which_everybody_fails_still_ends():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(FloatingPointError, match="Every client of round 0 returned non-finite"):
        trainer(callbacks=[ErasureChannel([0.0, 0.0, 0.0, 1.0])]).fit(Broken(), loader())
