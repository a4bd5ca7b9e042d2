"""Sparse updates, and what clients hold back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from channel_contexts import generator, prepared, received
from federations import Classifier, loader, train, trainer
from lightning_fedhaw import (
    AWGNChannel,
    BitFlipChannel,
    ErasureChannel,
    FadingChannel,
    FedAvgCallback,
    FederatedCallback,
    QuantizationChannel,
    SparsificationChannel,
)
from lightning_fedhaw.channel import MessageSize
from lightning_fedhaw.channel.sparsified import number_kept, sparsify

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = arrays("float32", st.integers(1, 40), elements=numbers).map(torch.from_numpy)


@settings(max_examples=60, deadline=None)
@given(vectors, st.floats(1e-3, 1.0), st.booleans())
def test_so_many_numbers_are_sent_and_they_are_the_largest(v, fraction, top):
    count = number_kept(fraction, len(v))
    assert count == max(1, min(len(v), count))
    assert 0 <= count - fraction * len(v) < 1 + 1e-6
    sent = sparsify(v, count, None if top else generator())
    assert sent.count_nonzero() <= count
    assert torch.equal(sent[sent != 0], v[sent != 0])
    if top:
        left = v[sent == 0].abs()
        assert not left.numel() or not sent.any() or left.max() <= sent[sent != 0].abs().min()


def test_number_kept():
    assert [number_kept(f, 1000) for f in (1e-9, 0.1, 0.3, 0.7, 1.0)] == [1, 100, 300, 700, 1000]


def test_random_numbers_are_right_on_average_without_feedback():
    v = torch.randn(20, generator=generator(2), dtype=torch.float64)
    channel = prepared(SparsificationChannel(0.25, "random", error_feedback=False), 20)
    draws = received(channel, v, rounds=4000)
    assert (draws.count_nonzero(1) == 5).all()
    assert ((draws.mean(0) - v).abs() < 5 * v.abs() * (3 / 4000) ** 0.5).all()
    assert channel.state_dict()["held"] == {}


def test_nothing_is_lost_of_what_is_held_back():
    for choice in ("top", "random"):
        channel = prepared(SparsificationChannel(0.3, choice), 10)
        messages, sent = torch.randn(30, 10, generator=generator(4), dtype=torch.float64), torch.zeros(10).double()
        for t, message in enumerate(messages):
            got = channel.transmit(message, round_idx=t, client=3, seed=0)
            channel.remember(3, torch.zeros(10), got, 1)
            sent += got
        held = channel.state_dict()["held"]
        assert list(held) == [3]
        assert torch.allclose(sent + held[3], messages.sum(0)), "sent and held add up to everything"


def test_each_layer_sends_its_own_share():
    channel = SparsificationChannel(0.1, per="layer")
    trainer(rounds=1, callbacks=[channel]).fit(Classifier(), loader())
    message = torch.cat([torch.full((56,), 100.0), torch.full((27,), 0.01)])
    sent = channel.transmit(message, round_idx=0, client=9, seed=0)
    assert [int(sent[block].count_nonzero()) for block in channel.blocks] == [6, 3]


@pytest.mark.parametrize("per", ["update", "layer"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **per: AWGNChannel(10.0, **per),
        lambda **per: FadingChannel(10.0, **per),
        lambda **per: QuantizationChannel(4, **per),
        lambda **per: QuantizationChannel(4, "nearest", **per),
        lambda **per: QuantizationChannel(4, "qsgd", **per),
        lambda per: AWGNChannel(noise_std=0.1),
        lambda per: BitFlipChannel(0.05, bits=8),
        lambda per: BitFlipChannel(0.01),
    ],
)
def test_channels_behind_change_what_is_sent_and_nothing_else(make, per):
    """Half of the numbers are sent, of which the smallest is far from zero."""
    first, second = SparsificationChannel(0.5), make(per=per)
    trainer(rounds=1, callbacks=[first, second]).fit(Classifier(), loader())
    message = torch.cat([torch.full((41,), 0.001), torch.linspace(1.0, 2.0, 42)])[torch.randperm(83)]
    sent = first.transmit(message, round_idx=0, client=9, seed=0)
    got = second.transmit(sent, round_idx=0, client=9, seed=0)
    assert not got[sent == 0].any()
    assert not torch.equal(got, sent)
    if isinstance(second, QuantizationChannel) and second.scheme != "qsgd":
        assert (got - sent).abs().max() <= 1 / 15 + 1e-6, "the range is that of what is sent"
    nothing = torch.zeros(83)
    assert torch.equal(second.transmit(nothing, round_idx=0, client=9, seed=0), nothing)


def test_noise_behind_has_the_power_of_what_is_sent():
    sparse, noise = prepared(SparsificationChannel(0.1), 20_000), AWGNChannel(10.0)
    prepared(noise, 20_000, size=sparse.encode(MessageSize(20_000, 32)))
    sent = sparse.transmit(torch.randn(20_000, generator=generator()), round_idx=0, client=0, seed=0)
    error = noise.transmit(sent, round_idx=0, client=0, seed=0) - sent
    assert int(error.count_nonzero()) == 2000
    assert float(error.square().sum() / sent.square().sum()) == pytest.approx(0.1, abs=4.5 * 0.1 * (2 / 2000) ** 0.5)


def test_what_was_left_out_is_not_counted_again():
    tenth, half = prepared(SparsificationChannel(0.1), 1000), prepared(SparsificationChannel(0.5), 1000)
    assert half.encode(tenth.encode(MessageSize(1000, 32))).values == 100


class Held(FederatedCallback):
    """What every client holds back after each round."""

    def __init__(self, channel):
        super().__init__()
        self.channel, self.rounds = channel, []

    def on_round_end(self, trainer, pl_module, report):
        held = self.channel.state_dict()["held"]
        self.rounds.append({client: tensor.clone() for client, tensor in held.items()})


class BreaksOnce(Classifier):
    """Client 1 diverges in round 1."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.current_epoch == 1 and self.trainer.federation_client == 1 else loss


class Spoils(AWGNChannel):
    """Makes client 2's message infinite in round 1, after it was made sparse."""

    def transmit(self, message, *, round_idx, client, seed):
        return message * float("inf") if (round_idx, client) == (1, 2) else message


@pytest.mark.filterwarnings("ignore:Client . returned non-finite parameters")
def test_a_client_that_fails_keeps_what_it_held_and_who_never_came_holds_nothing():
    channel = SparsificationChannel(0.2)
    held = Held(channel)
    lost = ErasureChannel([0.0, 0.0, 0.0, 1.0])
    train(BreaksOnce(), rounds=3, callbacks=[channel, Spoils(0.0), lost, held], engine="sequential")
    assert [set(each) for each in held.rounds] == [{0, 1, 2}] * 3
    for client, is_moved in ((0, True), (1, False), (2, False)):
        assert torch.equal(held.rounds[0][client], held.rounds[1][client]) != is_moved
        assert not torch.equal(held.rounds[1][client], held.rounds[2][client])
        assert held.rounds[0][client].device.type == "cpu"


def test_feedback_brings_a_sparse_run_near_the_full_one():
    def loss(*channels):
        runner, _ = train(rounds=15, rule=FedAvgCallback(), callbacks=channels)
        return float(runner.callback_metrics["train_loss"])

    full, fed, plain = (
        loss(),
        loss(SparsificationChannel(0.05)),
        loss(SparsificationChannel(0.05, error_feedback=False)),
    )
    assert full < fed < plain
