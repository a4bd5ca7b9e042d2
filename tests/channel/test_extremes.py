"""Numbers near the smallest and the largest of their precision: norms, ranges, powers and noise of them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from channel_contexts import generator, prepared
from lightning_fedhaw import AWGNChannel, OverTheAirChannel
from lightning_fedhaw.channel import Arrivals
from lightning_fedhaw.channel.awgn import add_noise, rms
from lightning_fedhaw.channel.privacy import clipped
from lightning_fedhaw.channel.quantized import from_codes, qsgd, through_codes, to_codes
from lightning_fedhaw.channel.scale import ordinary, rescaled

SMALLEST = 2.0**-149
"""The smallest number above zero of float32: subnormal, with one bit."""
quickly = settings(max_examples=60, deadline=None)
floats = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True, width=32)
vectors = arrays("float32", st.integers(1, 12), elements=floats).map(torch.from_numpy)
TINY = torch.tensor([1.4013e-45])
HUGE = torch.tensor([3.4028234e38, -3.4028234e38, 1.0, -1.4013e-45, 0.0, 1e38])


@quickly
@given(vectors, st.integers(1, 16), st.booleans())
@example(TINY, 1, True)
@example(TINY, 16, False)
@example(HUGE, 16, True)
@example(HUGE, 1, False)
@example(torch.tensor([0.0, 1.4013e-45, 2.8026e-45, -1.4013e-45]), 8, True)
def test_uniform_codes_are_within_a_step(vector, bits, at_random):
    received = through_codes(vector, bits, generator() if at_random else None)
    wide = vector.double()
    step = (wide.max() - wide.min()) / (2**bits - 1)
    rounding = 2.0**-20 * wide.abs().max() + SMALLEST
    error = (received.double() - wide).abs()
    assert torch.isfinite(received).all()
    assert (error <= step * (1.0 if at_random else 0.5) + rounding).all()


@quickly
@given(vectors, st.integers(1, 32767))
@example(TINY, 1)
@example(TINY, 100)
@example(torch.full((12,), 1.4013e-45), 32767)
@example(HUGE, 32767)
@example(torch.tensor([3e38, -3e38]), 7)
def test_qsgd_is_within_a_level_and_infinite_only_beyond_all_numbers(vector, levels):
    received = qsgd(vector, levels, generator())
    wide = vector.double()
    level = wide.norm() / levels
    fits = torch.isfinite(received)
    assert (fits | (wide.abs() + level * (1 + 1e-6) > torch.finfo(torch.float32).max)).all()
    assert (received * vector >= 0).all()
    error = (received.double() - wide).abs()[fits]
    assert (error <= level * (1 + 1e-4) + SMALLEST).all()


@quickly
@given(vectors, st.floats(1e-30, 1e30))
@example(HUGE, 1e-3)
@example(torch.full((12,), 3e38), 1e-10)
@example(TINY, 1e-30)
@example(torch.tensor([3.1474e38]), 1e-30)
def test_a_clipped_message_has_the_norm_of_the_bound_and_its_own_direction(vector, bound):
    short = clipped(vector, bound)
    wide = vector.double()
    norm = wide.norm()
    if norm <= bound:
        assert short is vector
    else:
        assert float(short.double().norm()) == pytest.approx(bound, rel=1e-6)
        assert torch.allclose(short.double(), wide * (bound / norm), rtol=1e-6, atol=1e-25 * bound + 1e-44)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1.0, 1e200])
def test_double_precision_has_its_power_where_squares_have_none(size):
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64) * size
    assert rms(vector) == pytest.approx(12.5**0.5 * size, rel=1e-3)
    assert float(clipped(vector, 2 * size).norm() / size) == pytest.approx(2, rel=1e-3) or size != 1.0
    loud = prepared(AWGNChannel(0.0), 2).transmit(vector, round_idx=0, client=0, seed=0)
    assert not torch.equal(loud, vector)


@pytest.mark.parametrize("std", [1e-46, 3e-45, 1e-39, 1e38, 1e39, math.inf])
def test_noise_that_is_no_normal_number_is_added_all_the_same(std):
    vector = torch.tensor([1e-38, -2e-42, 0.0, 3.0])
    noise = torch.randn(4, generator=generator())
    expected = (vector.double() + std * noise.double()).float()
    assert torch.equal(add_noise(vector, std, generator()), expected)


def test_a_sum_over_the_air_has_noise_of_its_senders_size():
    channel = prepared(OverTheAirChannel(10.0, truncation=0.0))
    total = torch.tensor([1.0, 2.0, -3.0, 4.0])

    def received(factor):
        sizes = rms(total * factor) * torch.ones(2, dtype=torch.float64)
        arrivals = Arrivals(0, 0, 2, [0, 1], torch.ones(2, dtype=torch.float64), sizes)
        return channel.superpose(total * factor, arrivals)

    usual = received(1.0)
    assert torch.allclose(received(2.0**-140), usual * 2.0**-140, rtol=0, atol=2**-148)
    assert torch.allclose(received(2.0**110), usual * 2.0**110)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ordinary_messages_are_left_alone_and_others_come_back_to_the_bit(dtype):
    limits = torch.finfo(dtype)
    for value in (1.0, -1.0, 2.0**-5, 0.0):
        vector = torch.tensor([value, 0.0], dtype=dtype)
        same, power = ordinary(vector)
        assert same is vector
        assert power == 1
    assert ordinary(torch.empty(0, dtype=dtype))[1] == 1
    for value in (limits.max, limits.min, limits.smallest_normal, limits.smallest_normal * limits.eps):
        vector = torch.tensor([value], dtype=dtype)
        assert ordinary(vector)[1] != 1
        assert torch.equal(rescaled(torch.clone, vector), vector)


@pytest.mark.parametrize("size", [1e-13, 1e-3, 1.0, 1e13])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_ordinary_messages_have_the_bits_of_the_plain_formulas(size, bits):
    vector = size * torch.randn(500, generator=generator(1))
    codes, low, step = to_codes(vector, bits, generator())
    assert torch.equal(through_codes(vector, bits, generator()), from_codes(codes, low, step))
    norm, levels = float(vector.double().norm()), 2 ** (bits - 1) - 1
    position = vector.abs().div(norm).mul(levels)
    draws = torch.rand(500, generator=generator())
    level = position.floor() + (draws < position - position.floor())
    assert torch.equal(qsgd(vector, levels, generator()), level.mul(norm / levels).copysign(vector))
    received = prepared(AWGNChannel(10.0), 500).transmit(vector, round_idx=0, client=0, seed=0)
    noise = torch.randn(500, generator=prepared(AWGNChannel(10.0), 500).stream(0, 0, 0, "noise"))
    assert torch.equal(received, vector.add(noise, alpha=norm / 500**0.5 * 10**-0.5))
