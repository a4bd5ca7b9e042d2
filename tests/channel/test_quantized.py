"""Few bits: the two quantizers, and bits that flip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from channel_contexts import generator, prepared, received
from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import BitFlipChannel, QuantizationChannel
from lightning_fedhaw.channel.bitflip import flip, flips
from lightning_fedhaw.channel.quantized import from_codes, qsgd, to_codes

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = arrays("float32", st.integers(1, 40), elements=numbers).map(torch.from_numpy)
quickly = settings(max_examples=60, deadline=None)


def test_the_check_numbers_of_uniform_quantization():
    codes, low, step = to_codes(torch.tensor([-1.0, 0.2, 0.6]), bits=2)
    assert codes.tolist() == [0, 2, 3]
    assert from_codes(codes, low, step).tolist() == pytest.approx([-1, 0.06666667, 0.6])


def test_the_check_numbers_of_qsgd():
    v = torch.tensor([0.3, -0.4], dtype=torch.float64)
    draws = torch.stack([qsgd(v, 4, generator(i)) for i in range(4000)])
    for entry, (below, above, share) in enumerate(((0.25, 0.375, 0.4), (-0.375, -0.5, 0.2))):
        is_above = (draws[:, entry] - above).abs() < 1e-12
        assert (is_above | ((draws[:, entry] - below).abs() < 1e-12)).all()
        assert abs(is_above.double().mean() - share) < 4.5 * (share * (1 - share) / 4000) ** 0.5
    squared = (draws - v).square().sum(1)
    assert abs(squared.mean() - 0.00625) < 4.5 * squared.std() / 4000**0.5
    assert 0.00625 <= min(2 / 16, 2**0.5 / 4) * 0.25 == 0.03125


@quickly
@given(vectors, st.integers(1, 16))
def test_uniform_codes_fit_their_bits_and_are_near(v, bits):
    for g in (None, generator()):
        codes, low, step = to_codes(v, bits, g)
        assert codes.min() >= 0
        assert codes.max() < 2**bits
        error = (from_codes(codes, low, step) - v).abs().max()
        slack = 1e-5 * v.abs().max() + 1e-37
        assert error <= step * (0.5 if g is None else 1.0) + slack


@quickly
@given(vectors, st.integers(1, 100))
def test_qsgd_keeps_signs_and_is_within_a_level(v, levels):
    q = qsgd(v, levels, generator())
    assert torch.isfinite(q).all()
    assert (q * v >= 0).all()
    norm = v.double().norm()
    assert ((q - v).double().abs() <= norm / levels * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_numbers_stay_what_they_are(value):
    v = torch.full((5,), value)
    for bits in (1, 8):
        assert torch.equal(received(prepared(QuantizationChannel(bits, "nearest"), 5), v)[0], v)
        assert torch.equal(received(prepared(QuantizationChannel(bits), 5), v)[0], v)
    assert torch.equal(qsgd(torch.zeros(5), 4, generator()), torch.zeros(5))


@pytest.mark.parametrize("scheme", ["stochastic", "qsgd"])
@pytest.mark.parametrize("bits", [2, 4])
def test_random_rounding_is_right_on_average_and_varies_as_it_should(scheme, bits):
    v = torch.randn(30, generator=generator(1), dtype=torch.float64)
    draws = received(prepared(QuantizationChannel(bits, scheme), 30), v, rounds=4000)
    if scheme == "qsgd":
        step = v.norm() / (2 ** (bits - 1) - 1)
        rest = (v.abs() / step).frac()
    else:
        step = (v.max() - v.min()) / (2**bits - 1)
        rest = ((v - v.min()) / step).frac()
    variance = step**2 * rest * (1 - rest)
    assert ((draws.mean(0) - v).abs() <= 5 * (variance / 4000).sqrt() + 1e-9).all()
    # In all the entries; those that are nearly certain have a rare event's spread.
    assert (draws - v).square().sum(1).mean() == pytest.approx(float(variance.sum()), rel=0.05)


def test_each_layer_has_its_own_range():
    channel = QuantizationChannel(2, "nearest", per="layer")
    trainer(rounds=1, callbacks=[channel]).fit(Classifier(), loader())
    message = torch.cat([torch.linspace(-3, 3, 56), torch.linspace(0, 1e-3, 27)])
    sent = channel.transmit(message, round_idx=0, client=0, seed=0)
    first, second = (sent[block].unique() for block in channel.blocks)
    assert first.tolist() == pytest.approx([-3, -1, 1, 3])
    assert second.tolist() == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])


# ---------------------------------------------------------------------- bit flips


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.7])
def test_flips_are_a_bernoulli_process(rate):
    count, times = 2000, 100
    found = [flips(count, rate, generator(i)) for i in range(times)]
    for positions in found:
        assert (positions.diff() > 0).all()
        assert ((positions >= 0) & (positions < count)).all()
    share = sum(map(len, found)) / (count * times)
    assert abs(share - rate) < 4.5 * (rate * (1 - rate) / (count * times)) ** 0.5
    halves = sum(int((p < count // 2).sum()) for p in found) / sum(map(len, found))
    assert abs(halves - 0.5) < 4.5 * 0.5 / sum(map(len, found)) ** 0.5


@pytest.mark.parametrize(("rate", "expected"), [(0.0, []), (1.0, [0, 1, 2])])
def test_no_flips_and_nothing_but_flips(rate, expected):
    assert flips(3, rate, generator()).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bit_of_a_word_can_flip_and_flips_back(dtype):
    message = torch.randn(500, generator=generator(), dtype=dtype)
    words = message.view(torch.int32 if dtype == torch.float32 else torch.int64)
    bits = 8 * words.element_size()
    assert torch.equal(flip(words, bits, 1.0, generator()), ~words)
    once = flip(words, bits, 0.3, generator(1))
    assert torch.equal(flip(once, bits, 0.3, generator(1)), words)
    changed = torch.stack([((once ^ words) >> bit) & 1 for bit in range(bits)]).double().mean(1)
    assert ((changed - 0.3).abs() < 5 * (0.21 / 500) ** 0.5).all()
    sent = received(prepared(BitFlipChannel(0.01), 500), message)[0]
    assert sent.dtype == dtype


def test_flipped_codes_stay_in_range():
    message = torch.linspace(-1, 2, 200)
    sent = received(prepared(BitFlipChannel(0.5, bits=4), 200), message, rounds=50)
    assert sent.min() >= -1
    assert sent.max() <= 2 + 1e-5
    assert len(sent.unique()) == 16
    # Codes with every bit a fair coin are uniform.
    assert abs(float(sent.mean()) - 0.5) < 5 * float(sent.std()) / 10_000**0.5


class Sends(Classifier):
    """Every number of every update is 1.5, which is one bit from NaN."""

    def training_step(self, batch, batch_idx):
        return -1.5 * sum(p.sum() for p in self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore:Client . returned non-finite parameters")
def test_an_exponent_that_breaks_is_a_client_that_diverged():
    runner, module = train(Sends(), rounds=10, local_steps=1, callbacks=[BitFlipChannel(0.005)], client_eval=False)
    share = 1 - 0.995**83
    broken = runner.federation_summary["nonfinite_updates"]
    assert abs(broken / 40 - share) < 4 * (share * (1 - share) / 40) ** 0.5
    assert runner.federation_summary["clients_per_round"] == (40 - broken) / 10
    assert torch.isfinite(flat(module)).all()


def test_it_is_said_what_spoiled_a_message():
    with pytest.warns(UserWarning, match=r"Client . returned .* in round 0 \(they were finite when it sent them\)"):
        train(Sends(), rounds=1, local_steps=1, callbacks=[BitFlipChannel(0.002)], client_eval=False, seed=2)
    with (
        pytest.warns(UserWarning, match="Client . returned"),
        pytest.raises(FloatingPointError, match="Or `BitFlipChannel` spoiled what they sent"),
    ):
        train(Sends(), rounds=1, local_steps=1, callbacks=[BitFlipChannel(0.1)], client_eval=False)
