"""Noise, fading and sums over the air: moments against theory, with tolerances from the number of draws."""

from math import exp, log10

import pytest
import torch

from channel_contexts import generator, prepared, received
from federations import Classifier, flat, loader, samples, train, trainer
from lightning_fedhaw import (
    AWGNChannel,
    FadingChannel,
    FedAvgCallback,
    FederatedCallback,
    FederatedDataModule,
    IndexPartitioner,
    OverTheAirChannel,
)
from lightning_fedhaw.channel.awgn import add_noise, noise_std, rms
from lightning_fedhaw.channel.fading import power_gain
from lightning_fedhaw.channel.overtheair import receiver_noise

CLIENTS = list(range(500))


def variance_is(noise, expected, sigmas=4.5):
    """Whether normal noise has a variance: the sample's has a relative deviation of sqrt(2 / n)."""
    n = noise.numel()
    assert abs(noise.double().square().mean() / expected - 1) < sigmas * (2 / n) ** 0.5
    assert abs(noise.double().mean()) < sigmas * (expected / n) ** 0.5


def test_the_check_numbers():
    message = torch.tensor([3.0, 4.0])
    assert rms(message) ** 2 == pytest.approx(12.5)
    assert noise_std(rms(message), 10.0) ** 2 == pytest.approx(1.25)
    noise = received(prepared(AWGNChannel(10.0), 2), message, rounds=4000) - message
    variance_is(noise, 1.25)
    squared = noise.double().square().sum(1)  # expected 2.5, variance 2 * 2 * 1.25^2
    assert abs(squared.mean() - 2.5) < 4.5 * (4 * 1.25**2 / 4000) ** 0.5


def test_noise_is_white_and_everybodys_own():
    channel, message = prepared(AWGNChannel(0.0), 8), torch.ones(8)
    noise = received(channel, message, rounds=4000) - 1
    assert (torch.corrcoef(noise.T) - torch.eye(8)).abs().max() < 5 / 4000**0.5
    assert not torch.equal(noise[0], received(channel, message, client=1)[0] - 1)
    assert not torch.equal(noise[0], received(channel, message, seed=1)[0] - 1)


def test_power_per_update_and_per_layer():
    runner = trainer(rounds=1, callbacks=[by_layer := AWGNChannel(10.0, per="layer")])
    runner.fit(Classifier(), loader())
    first, second = by_layer.blocks
    assert (first, second) == (slice(0, 56), slice(56, 83))
    message = torch.cat([torch.full((56,), 100.0), torch.full((27,), 0.01)])
    noise = received(by_layer, message, rounds=300) - message
    variance_is(noise[:, first], 100.0**2 / 10)
    variance_is(noise[:, second], 0.01**2 / 10)
    noise = received(prepared(AWGNChannel(10.0), 83), message, rounds=300) - message
    variance_is(noise[:, second], (56 * 100.0**2 + 27 * 0.01**2) / 83 / 10)


def test_a_message_of_zeros_has_no_power_and_a_noise_floor_does_not_ask():
    zeros = torch.zeros(8)
    assert torch.equal(received(prepared(AWGNChannel(10.0)), zeros)[0], zeros)
    variance_is(received(prepared(AWGNChannel(noise_std=0.3)), zeros, rounds=3000), 0.09)
    assert add_noise(zeros, 0.0, generator()) is zeros
    assert prepared(AWGNChannel(3.0)).transmit(zeros.double(), round_idx=0, client=0, seed=0).dtype == torch.float64


def test_the_noise_of_an_average_is_the_sum_of_squared_weights():
    """Everything else equal, FedAvg's noise per entry is sum p_k^2 sigma_k^2."""
    sizes = [10, 20, 30]
    split = IndexPartitioner([list(range(0, 10)), list(range(10, 30)), list(range(30, 60))])

    class Ones(Classifier):
        def training_step(self, batch, batch_idx):
            return -sum(p.sum() for p in self.net.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    ends = []
    for channels in ([], [AWGNChannel(0.0)]):
        module = Ones(hidden=400)
        data = FederatedDataModule(samples(60), batch_size=30, partitioner=split)
        trainer(rounds=1, callbacks=channels, num_clients=None, alpha=None, client_eval=False).fit(module, data)
        ends.append(flat(module))
    variance_is(ends[1] - ends[0], sum((n / 60) ** 2 for n in sizes))


# ---------------------------------------------------------------------- fading


@pytest.mark.parametrize("k_factor", [0.0, 3.0, float("inf")])
def test_gains_have_the_moments_of_their_distribution(k_factor):
    gains = torch.tensor([power_gain(k_factor, generator(i)) for i in range(4000)], dtype=torch.float64)
    # |h|^2 of a Rician channel: mean 1, variance (1 + 2 K) / (1 + K)^2.
    variance = 0.0 if k_factor == float("inf") else (1 + 2 * k_factor) / (1 + k_factor) ** 2
    assert abs(gains.mean() - 1) <= 4.5 * (variance / 4000) ** 0.5
    assert gains.var() == pytest.approx(variance, rel=0.2, abs=1e-12)
    if k_factor == 0:
        assert abs((gains < 0.1).double().mean() - (1 - exp(-0.1))) < 4.5 * (0.095 * 0.905 / 4000) ** 0.5


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 0.09516258), (2.0, 0.25918178)])
def test_outage_at_a_rate(rate, expected):
    assert 1 - exp(-(2**rate - 1) / 10) == pytest.approx(expected, abs=1e-8)
    channel = prepared(FadingChannel(10.0, rate=rate), num_clients=500)
    lost = torch.cat([channel.outage(t, CLIENTS, 0) for t in range(8)])
    assert abs(lost.double().mean() - expected) < 4.5 * (expected * (1 - expected) / 4000) ** 0.5
    message = torch.ones(8)
    assert channel.transmit(message, round_idx=0, client=0, seed=0) is message, "what is decoded is without a fault"


def test_truncation():
    assert exp(-0.1) == pytest.approx(0.90483742, abs=1e-8)
    for channel in (FadingChannel(10.0, inversion=True, truncation=0.1), OverTheAirChannel(10.0, truncation=0.1)):
        lost = torch.cat([prepared(channel, num_clients=500).outage(t, CLIENTS, 0) for t in range(8)])
        assert abs((~lost).double().mean() - 0.90483742) < 4.5 * (0.0861 / 4000) ** 0.5


def test_a_coherent_receiver_has_the_noise_of_its_gain_and_inversion_that_of_the_mean():
    message = torch.full((2000,), 2.0)
    coherent = prepared(FadingChannel(10.0), 2000)
    for t in range(3):
        gain = coherent.gain(t, 5, 0)
        noise = coherent.transmit(message, round_idx=t, client=5, seed=0) - message
        variance_is(noise, 4 / 10 ** ((10 + 10 * log10(gain)) / 10))
    inverted = prepared(FadingChannel(10.0, inversion=True), 2000)
    variance_is(received(inverted, message, rounds=3) - message, 0.4)


def test_a_block_is_so_many_rounds():
    channel = FadingChannel(10.0, block=3)
    gains = [channel.gain(t, 1, 0) for t in range(9)]
    assert [len(set(gains[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(gains)) == 3
    assert channel.gain(0, 2, 0) != gains[0]


# ---------------------------------------------------------------------- over the air


def test_receiver_noise():
    weights, sizes, gains = (torch.tensor(v, dtype=torch.float64) for v in ([1, 3], [2, 1], [4, 0.25]))
    # The second needs 3 * 1 / 0.5 = 6 of amplitude, the first 1 * 2 / 2 = 1.
    assert receiver_noise(weights, sizes, gains, 20.0) == pytest.approx(0.6)


class Sizes(FederatedCallback):
    """Root mean squares of the updates of a round."""

    def on_round_start(self, trainer, pl_module, round_idx, clients):
        self.rms = {}

    def on_client_end(self, trainer, pl_module, update):
        self.rms[update.client] = rms(update.displacement)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_sum_has_the_noise_of_the_weakest_link(weighting):
    channel, sizes = OverTheAirChannel(10.0, truncation=0.0), Sizes()
    options = {"rounds": 1, "client_eval": False}
    module = Classifier(hidden=300)
    _, noisy = train(module, rule=FedAvgCallback(weighting), callbacks=[channel, sizes], **options)
    _, clean = train(Classifier(hidden=300), rule=FedAvgCallback(weighting), **options)
    gains = channel._gains(0, [0, 1, 2, 3], 0)
    counts = noisy.trainer.fit_loop.federation.data.num_examples.double()
    shares = counts / counts.sum() if weighting == "examples" else torch.full((4,), 0.25).double()
    strongest = max(shares[k] * sizes.rms[k] / gains[k].sqrt() for k in range(4))
    variance_is(flat(noisy) - flat(clean), float(strongest) ** 2 / 10)


def test_who_is_silent_has_no_weight():
    channel = OverTheAirChannel(float("inf"), truncation=0.7)
    silent = channel.outage(0, [0, 1, 2, 3], 0)
    assert 0 < silent.sum() < 4

    class Cohort:
        def sample(self, round_idx, *, num_clients, sizes, seed):
            return [k for k in range(4) if not silent[k]]

    options = {"rounds": 1, "client_eval": False}
    _, air = train(callbacks=[channel], **options)
    _, others = train(sampler=Cohort(), **options)
    assert torch.equal(flat(air), flat(others))
    _, kept = train(callbacks=[OverTheAirChannel(float("inf"), 0.7, fallback="zero_update")], **options)
    assert not torch.equal(flat(air), flat(kept))


def test_nothing_is_kept_of_single_updates_wherever_vectors_are_stored():
    ends = [train(callbacks=[OverTheAirChannel(10.0)], storage=storage)[1] for storage in ("auto", "device")]
    assert torch.equal(*map(flat, ends))
