"""Updates in packets: how many, what is lost, and what stands in its place."""

import pytest
import torch

from channel_contexts import prepared, received
from federations import flat, train
from lightning_fedhaw import PacketLossChannel, QuantizationChannel


def test_packets_hold_what_fits():
    channel = prepared(PacketLossChannel(0.5, 16), 10)
    assert channel.packets == 3, "40 bytes in packets of 16"
    sent = received(channel, torch.arange(1.0, 11.0), rounds=60)
    whole = torch.arange(10) * 3 // 10
    for row in sent:
        for packet in range(3):
            part = row[whole == packet]
            assert (part == 0).all() or torch.equal(part, torch.arange(1.0, 11.0)[whole == packet])
    assert len({tuple(row.tolist()) for row in sent}) == 8, "every pattern of losses"


@pytest.mark.parametrize(("retries", "expected"), [(0, 0.4), (1, 0.16), (2, 0.064)])
def test_packets_are_lost_as_often_as_they_should(retries, expected):
    channel = prepared(PacketLossChannel(0.4, 8, retries=retries), 100)
    tries, lost = zip(*(channel.sendings(round_idx=t, client=0, seed=0) for t in range(100)), strict=True)
    lost, tries = torch.cat(lost).double(), torch.cat(tries).double()
    assert abs(lost.mean() - expected) < 4.5 * (expected * (1 - expected) / 5000) ** 0.5
    mean = sum(0.4**i for i in range(retries + 1))
    assert abs(tries.mean() - mean) < 4.5 * max(float(tries.std()), 1e-3) / 5000**0.5
    assert tries.max() == 1 + retries


def test_the_last_numbers_that_were_heard_stand_in():
    channel = prepared(PacketLossChannel(0.5, 8, lost="last"), 20)
    first, second = torch.full((20,), 1.0), torch.full((20,), 2.0)
    got = channel.transmit(first, round_idx=0, client=4, seed=0)
    assert set(got.tolist()) == {0.0, 1.0}, "nothing was received before"
    channel.remember(4, torch.zeros(20), got, 3)
    again = channel.transmit(second, round_idx=1, client=4, seed=0)
    lost = again != 2
    assert lost.any()
    assert torch.equal(again[lost], got[lost])
    other = channel.transmit(second, round_idx=1, client=5, seed=0)
    assert set(other.tolist()) == {0.0, 2.0}, "another client's are its own"


def test_a_model_with_gaps_is_the_last_one_that_was_heard():
    options = {"rounds": 6, "client_eval": False}
    _, module = train(callbacks=[PacketLossChannel(0.5, 32, link="downlink")], **options)
    assert torch.isfinite(flat(module)).all()
    _, silent = train(callbacks=[PacketLossChannel(1.0, 32, link="downlink")], **options)
    assert not torch.equal(flat(module), flat(silent))


def test_quantized_updates_need_fewer_packets():
    _, packed = train(callbacks=[QuantizationChannel(8), channel := PacketLossChannel(0.1, 20)])
    assert channel.packets == -(-(83 + 8) // 20)
    assert torch.isfinite(flat(packed)).all()
