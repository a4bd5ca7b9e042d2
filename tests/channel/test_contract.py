"""What every channel promises, asked of every channel. A new channel is one new row in each table."""

import io
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from channel_contexts import prepared
from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    AvailabilityChannel,
    AWGNChannel,
    BitFlipChannel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FadingChannel,
    FedAdpCallback,
    FedAvgCallback,
    FederatedCallback,
    FedHAWCallback,
    FedHyperCallback,
    GilbertElliott,
    OverTheAirChannel,
    PacketLossChannel,
    QuantizationChannel,
    SparsificationChannel,
    StragglerChannel,
)
from lightning_fedhaw.channel import AggregateChannel
from lightning_fedhaw.extending import Channel
from resuming import check_resume, rotated

pytestmark = pytest.mark.filterwarnings("ignore:No client update was received in round")

INF = float("inf")
IDLE = {
    "erasure": lambda: ErasureChannel(0.0),
    "erasure, rates": lambda: ErasureChannel([0.0] * 4, fallback="reuse_update"),
    "erasure, drawn": lambda: ErasureChannel(max_probability=0.0),
    "erasure, legacy": lambda: ErasureChannel(max_probability=0.0, legacy_seed=23),
    "bursts": lambda: ErasureChannel(burst=GilbertElliott(0.0, 0.5)),
    "erasure down": lambda: ErasureChannel(0.0, link="downlink", fallback="reuse_model"),
    "AWGN": lambda: AWGNChannel(INF),
    "AWGN down": lambda: AWGNChannel(INF, link="downlink", per="layer"),
    "noise floor": lambda: AWGNChannel(noise_std=0.0),
    "Rayleigh": lambda: FadingChannel(INF),
    "Rician, coded": lambda: FadingChannel(INF, k_factor=3.0, rate=2.0),
    "inversion": lambda: FadingChannel(INF, inversion=True),
    "quantized": lambda: QuantizationChannel(32),
    "quantized down": lambda: QuantizationChannel(32, "qsgd", link="downlink"),
    "top-k": lambda: SparsificationChannel(1.0),
    "random-k": lambda: SparsificationChannel(1.0, "random", error_feedback=False),
    "bit flips": lambda: BitFlipChannel(0.0),
    "flipped codes": lambda: BitFlipChannel(0.0, bits=8),
    "packets": lambda: PacketLossChannel(0.0, 64),
    "packets, last": lambda: PacketLossChannel(0.0, 64, lost="last", retries=1),
    "packets down": lambda: PacketLossChannel(0.0, 64, link="downlink"),
    "deadline": lambda: StragglerChannel(INF, 1.0),
    "availability": lambda: AvailabilityChannel(mean=1.0, amplitude=0.0),
    "trace": lambda: AvailabilityChannel([[1, 1, 1, 1]]),
    "over the air": lambda: OverTheAirChannel(INF, truncation=0.0),
    "privacy": lambda: DifferentialPrivacyChannel(INF, 0.0, delta=None),
}
ACTIVE = {
    "erasure": lambda: ErasureChannel(0.3),
    "erasure, rates": lambda: ErasureChannel([0.5, 0.0, 0.0, 0.3], fallback="reuse_update"),
    "erasure, drawn": lambda: ErasureChannel(max_probability=0.9, fallback="reuse_model"),
    "erasure, legacy": lambda: ErasureChannel(max_probability=0.9, legacy_seed=23, fallback="discard"),
    "bursts": lambda: ErasureChannel(burst=GilbertElliott(0.3, 0.5)),
    "erasure down": lambda: ErasureChannel(0.3, link="downlink", fallback="reuse_model"),
    "AWGN": lambda: AWGNChannel(10.0),
    "AWGN down": lambda: AWGNChannel(20.0, link="downlink", per="layer"),
    "noise floor": lambda: AWGNChannel(noise_std=0.01),
    "Rayleigh": lambda: FadingChannel(10.0, block=2),
    "Rician, coded": lambda: FadingChannel(5.0, k_factor=1.0, rate=2.0, fallback="discard"),
    "inversion": lambda: FadingChannel(10.0, inversion=True, truncation=0.3, per="layer"),
    "stochastic": lambda: QuantizationChannel(4),
    "nearest": lambda: QuantizationChannel(4, "nearest", per="layer"),
    "QSGD": lambda: QuantizationChannel(4, "qsgd"),
    "quantized down": lambda: QuantizationChannel(6, link="downlink"),
    "top-k": lambda: SparsificationChannel(0.1),
    "random-k": lambda: SparsificationChannel(0.2, "random", error_feedback=False, per="layer"),
    "random-k, feedback": lambda: SparsificationChannel(0.2, "random"),
    "bit flips": lambda: BitFlipChannel(1e-4),
    "flipped codes": lambda: BitFlipChannel(0.02, bits=8),
    "packets": lambda: PacketLossChannel(0.4, 64),
    "packets, last": lambda: PacketLossChannel(0.6, 64, lost="last", retries=1),
    "packets down": lambda: PacketLossChannel(0.3, 64, link="downlink"),
    "deadline": lambda: StragglerChannel(45.0, 1.0, spread=0.5, client_spread=0.2),
    "availability": lambda: AvailabilityChannel(),
    "trace": lambda: AvailabilityChannel([[1, 0, 1, 1], [1, 1, 1, 0]]),
    "over the air": lambda: OverTheAirChannel(20.0, truncation=0.3),
    "privacy": lambda: DifferentialPrivacyChannel(0.5, 0.05, delta=None),
}
RULES = {
    "FedAvg": lambda: FedAvgCallback("uniform"),
    "FedHyper": lambda: FedHyperCallback(weighting="uniform"),
    "FedHAW": lambda: FedHAWCallback(lr_lambda=0.3),
    "FedAdp": FedAdpCallback,
}
every_channel = pytest.mark.parametrize("make", ACTIVE.values(), ids=ACTIVE.keys())


def uniform():
    return FedAvgCallback("uniform")


def end(*channels, rule=uniform, **kwargs):
    return flat(train(rule=rule(), callbacks=channels, client_eval=False, **{"rounds": 3, **kwargs})[1])


@cache
def sequential_end(name):
    """The model after three rounds with an active channel."""
    return end(ACTIVE[name](), engine="sequential")


@pytest.fixture(scope="module")
def without():
    """The model after three rounds without a channel, by rule and engine."""
    torch.set_num_threads(1)
    return {
        (name, engine): end(rule=rule, engine=engine)
        for name, rule in RULES.items()
        for engine in ("sequential", "vectorized")
    }


def rules_of(channel, number):
    """FedAvg, and another rule in turn; one that needs sums alone where the channel gives no more."""
    names = list(RULES)[1:]
    if isinstance(channel, AggregateChannel):
        names = [name for name in names if RULES[name]().unnormalized_weight is not None]
    return ["FedAvg", names[number % len(names)]]


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize(("number", "make"), list(enumerate(IDLE.values())), ids=IDLE.keys())
def test_a_channel_that_does_nothing_is_none_to_the_bit(number, make, engine, without):
    for name in rules_of(make(), number):
        assert torch.equal(end(make(), rule=RULES[name], engine=engine), without[name, engine]), name


@pytest.mark.parametrize("name", ACTIVE)
def test_it_does_something_and_the_same_in_both_engines(name, without):
    first, make = sequential_end(name), ACTIVE[name]
    assert torch.isfinite(first).all()
    assert not torch.equal(first, without["FedAvg", "sequential"])
    # Draws are the same; a rounding that falls to the other side is a step of a quantizer.
    tolerance = 1e-5 if not isinstance(make(), (QuantizationChannel, BitFlipChannel)) else 0.1
    assert torch.allclose(first, end(make(), engine="vectorized"), atol=tolerance)
    assert not torch.equal(first, end(make(), engine="sequential", seed=1))


@pytest.mark.parametrize("name", ACTIVE)
def test_messages_are_not_changed_in_place(name):
    channel = prepared(ACTIVE[name](), 83, num_clients=4)
    message = torch.randn(83)
    before = message.clone()
    channel.transmit(message, round_idx=3, client=1, seed=0)
    assert torch.equal(message, before)


class Notes(FederatedCallback):
    """Who came, what each of them trained on in which order, and where they started from."""

    def __init__(self):
        super().__init__()
        self.cohorts, self.batches, self.first = [], {}, None

    def on_round_start(self, trainer, pl_module, round_idx, clients):
        self.cohorts.append(clients)
        self.first = flat(pl_module) if round_idx == 0 else self.first
        self.open = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.open.append(batch[0].sum().item())

    def on_client_end(self, trainer, pl_module, update):
        self.batches[len(self.cohorts), update.client], self.open = self.open, []


@cache
def notes(name=None):
    """Who took part with an active channel, or without one."""
    observed = Notes()
    train(
        rule=uniform(),
        callbacks=[observed] if name is None else [ACTIVE[name](), observed],
        client_eval=False,
        rounds=4,
        num_clients=4,
        clients_per_round=3,
        engine="sequential",
    )
    return observed


@pytest.mark.parametrize("name", ACTIVE)
def test_it_changes_neither_cohorts_nor_batches_nor_the_first_model(name):
    plain, other = notes(), notes(name)
    assert other.cohorts == plain.cohorts
    assert torch.equal(other.first, plain.first)
    assert other.batches
    assert other.batches == {key: plain.batches[key] for key in other.batches}


@pytest.mark.parametrize(("name", "engine", "precision"), rotated(ACTIVE))
def test_a_run_that_is_resumed_gives_the_bits_of_one_that_was_not(name, engine, precision):
    check_resume(lambda: [uniform(), ACTIVE[name]()], loader(60), engine=engine, precision=precision)


@pytest.mark.parametrize("name", ACTIVE)
def test_state_survives_a_weights_only_checkpoint_and_is_forgotten_by_a_new_run(name):
    channel = ACTIVE[name]()
    assert torch.equal(end(channel, engine="sequential"), sequential_end(name)), "the same each time"
    file = io.BytesIO()
    torch.save(channel.state_dict(), file)
    file.seek(0)
    ACTIVE[name]().load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(end(channel, engine="sequential"), sequential_end(name))


@every_channel
def test_it_composes_with_others(make):
    noise = AWGNChannel(20.0, name="more")
    channels = [noise, make(), ErasureChannel(0.2, name="more", fallback="discard")]
    assert torch.isfinite(end(*channels)).all()
    assert not torch.equal(end(*channels), end(*channels[1:]))


@every_channel
def test_nobody_may_be_left_when_it_is_asked(make):
    deaf = ErasureChannel(1.0, link="downlink", name="deaf")
    assert torch.equal(end(deaf, make(), rounds=2), flat(Classifier()))


def test_a_channel_that_cannot_be_heard_is_none(without):
    for channel in (AWGNChannel(1e5), FadingChannel(1e5), FadingChannel(1e5, rate=2.0), OverTheAirChannel(1e5, 0.0)):
        assert torch.equal(end(channel), without["FedAvg", "sequential"])


def test_what_was_heard_last_is_kept_in_host_memory_and_shared():
    down = ErasureChannel(0.0, link="downlink", fallback="reuse_model")
    up = ErasureChannel(0.0, fallback="reuse_update")
    end(down, up, rounds=1)
    models, updates = ([kept["vector"] for kept in each.state_dict()["received"].values()] for each in (down, up))
    assert len({model.data_ptr() for model in models}) == 1, "one broadcast is kept once"
    assert len({update.data_ptr() for update in updates}) == 4


def test_numpys_numbers_are_numbers():
    for number in (np.float32(0.5), np.float64(0.5)):
        assert ErasureChannel(number).probability == 0.5
        for channel in (SparsificationChannel(number), PacketLossChannel(number), BitFlipChannel(number)):
            held = {type(v) for v in vars(channel).values()}
            assert not any(issubclass(kind, np.generic) for kind in held - {float}), "a checkpoint may hold it"
    assert QuantizationChannel(np.int64(4)).bits == 4
    assert AWGNChannel(np.int64(3)).snr_db == 3.0


def test_every_public_channel_is_in_the_tables():
    import lightning_fedhaw.channel as room

    public = {kind for name in room.__all__ if isinstance(kind := getattr(room, name), type)}
    bases = {Channel, AggregateChannel, room.BlockChannel}
    for table in (IDLE, ACTIVE):
        assert {type(make()) for make in table.values()} == {k for k in public if issubclass(k, Channel)} - bases


# ---------------------------------------------------------------------- numbers near the smallest and the largest

LENGTH = 8
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
"""The smallest number above zero: subnormal, with one bit."""
SIZED = {"noise floor", "bit flips", "privacy"}
"""Channels with a number of their own, in units of a parameter or of its words."""

every_size = settings(max_examples=15, deadline=None)
floats = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True, width=32)


def transmitted(name, message):
    return prepared(ACTIVE[name](), LENGTH, num_clients=4).transmit(message, round_idx=1, client=2, seed=3)


@pytest.mark.parametrize("name", ACTIVE)
@every_size
@given(
    st.lists(st.integers(-1000, 1000), min_size=LENGTH, max_size=LENGTH),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
)
@example([1, 0, 0, 0, 0, 0, 0, 0], 0.0, torch.float32)
@example([1000, -1000, 999, -1, 0, 0, 1, 7], 1.0, torch.float32)
@example([1000, -777, 1, 0, 0, 3, 0, 0], 0.0, torch.float64)
@example([1000, -1000, 999, -1, 0, 0, 1, 7], 1.0, torch.float64)
def test_a_channel_without_units_does_the_same_to_messages_of_any_size(name, numbers, height, dtype):
    """A message times a power of two is received as what is received of it, times that power."""
    message = torch.tensor(numbers, dtype=dtype)
    least = math.log2(SMALLEST[dtype])
    most = math.log2(torch.finfo(dtype).max) - 10
    exponent = round(least + height * (most - least))
    # Whole numbers below 1024 are exact at every size, in two steps that no power leaves the range in.
    moved = message * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    before = moved.clone()
    received = transmitted(name, moved)
    assert torch.equal(moved, before)
    assert received.dtype == dtype
    if name not in SIZED:
        usual = transmitted(name, message)
        expected = usual * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
        rounding = 2 * SMALLEST[dtype] + 4 * torch.finfo(dtype).eps * expected.abs()
        is_near = (received - expected).abs() <= rounding
        assert (is_near | (received == expected)).all()


@pytest.mark.parametrize("name", ACTIVE)
@every_size
@given(arrays("float32", LENGTH, elements=floats).map(torch.from_numpy))
@example(torch.full((LENGTH,), 1.4013e-45))
@example(torch.tensor([3.4028234e38, -3.4028234e38] * (LENGTH // 2)))
@example(torch.tensor([3.4028234e38, 1.4013e-45, 0.0, -0.0, 1.0, -1e-40, 1e30, -3.4028234e38]))
def test_no_finite_message_makes_nan_or_an_error(name, message):
    received = transmitted(name, message)
    if name != "bit flips":  # an exponent of ones is what such a link is about
        assert not received.isnan().any()
    if float(message.abs().max()) < 2.0**100:
        assert torch.isfinite(received).all() or name == "bit flips"


# ---------------------------------------------------------------------- bytes

P = 83
UP = {
    "nothing": ((), 4 * P),
    "4 bits": ([QuantizationChannel(4)], (4 * P + 64 + 7) // 8),
    "4 bits, by layer": ([QuantizationChannel(4, per="layer")], (4 * P + 128 + 7) // 8),
    "QSGD": ([QuantizationChannel(4, "qsgd")], (4 * P + 32 + 7) // 8),
    "top tenth": ([SparsificationChannel(0.1)], (9 * 32 + 63 + 7) // 8),
    "top half": ([SparsificationChannel(0.5)], (42 * 32 + P + 7) // 8),
    "random tenth": ([SparsificationChannel(0.1, "random")], (9 * 32 + 64 + 7) // 8),
    "sparse, then 4 bits": ([SparsificationChannel(0.1), QuantizationChannel(4)], (9 * 4 + 63 + 64 + 7) // 8),
    "noise": ([AWGNChannel(90.0)], 4 * P + 4),
    "packets": ([PacketLossChannel(0.0, 100)], 4 * P + 4 * 40),
    "4 bits in packets": ([QuantizationChannel(4), PacketLossChannel(0.0, 20, header_bytes=8)], 50 + 3 * 8),
    "codes": ([BitFlipChannel(1e-6, bits=8)], P + 8),
}


@pytest.mark.parametrize(("channels", "expected"), UP.values(), ids=UP.keys())
def test_bytes_are_those_of_what_is_sent(channels, expected):
    runner, _ = train(rounds=2, callbacks=channels)
    assert runner.federation_summary["bytes_up"] == 2 * 4 * expected
    assert runner.federation_summary["bytes_down"] == 2 * 4 * 4 * P
    assert runner.callback_metrics["bytes_up"] == 4 * expected


def test_bytes_of_the_way_down():
    runner, _ = train(
        rounds=2, callbacks=[QuantizationChannel(8, link="downlink"), ErasureChannel(0.5, link="downlink")]
    )
    summary = runner.federation_summary
    assert summary["bytes_down"] == 2 * 4 * (P + 8)
    assert summary["bytes_up"] == 4 * P * (8 - summary["lost_messages"])
    assert 0 < summary["lost_messages"] < 8


def test_bytes_of_retransmissions():
    channel = PacketLossChannel(0.5, 100, header_bytes=0, retries=30)
    runner, module = train(rounds=20, callbacks=[channel])
    packets = 4 * 20 * 4
    sent = (runner.federation_summary["bytes_up"] - 80 * 4 * P) / 100 + packets
    # Sendings of a packet are geometric: mean 2, variance 2.
    assert sent / packets == pytest.approx(2, abs=4 * (2 / packets) ** 0.5)
    assert torch.equal(flat(module), flat(train(rounds=20)[1])), "nothing is lost in the end"


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ErasureChannel(1.2), "`probability` must be a number in .0, 1., or one per client, got 1.2"),
        (lambda: ErasureChannel([0.1, -0.2]), r"`probability` must be .* got \[0.1, -0.2\]"),
        (lambda: ErasureChannel(float("nan")), "`probability` must be .* got nan"),
        (lambda: ErasureChannel("half"), "`probability` must be a number in .0, 1., or one per client, got 'half'"),
        (lambda: ErasureChannel(True), "`probability` must be a number in .0, 1., or one per client, got True"),
        (lambda: ErasureChannel([0.1, True]), r"`probability` must be .* got \[0.1, True\]"),
        (lambda: ErasureChannel([[0.1]]), r"`probability` must be .* got \[\[0.1\]\]"),
        (
            lambda: ErasureChannel(burst=(0.1, 0.5)),
            r"`burst` must be an instance of `GilbertElliott`.* got \(0.1, 0.5\)",
        ),
        (lambda: ErasureChannel(0.1, name=2), "`name` must be a string, got 2"),
        (lambda: ErasureChannel(), "Give exactly one of `probability`, `max_probability` and `burst`, got none"),
        (lambda: ErasureChannel(0.1, max_probability=0.2), "got `probability` and `max_probability`"),
        (lambda: ErasureChannel(max_probability=2), r"`max_probability` must be a number in \[0, 1\], got 2"),
        (lambda: ErasureChannel(0.1, legacy_seed=23), "`legacy_seed` repeats the authors' draws of rates"),
        (lambda: GilbertElliott(0.5, -1), r"`leave` must be a number in \[0, 1\], got -1"),
        (lambda: GilbertElliott(0, 0), "`enter` and `leave` must not both be 0"),
        (lambda: AWGNChannel(), "Give either `snr_db` or `noise_std`, got None and None"),
        (lambda: AWGNChannel("loud"), "`snr_db` must be a number of at least -200, got 'loud'"),
        (lambda: AWGNChannel(float("nan")), "`snr_db` must be a number"),
        (lambda: AWGNChannel(noise_std=-1.0), "`noise_std` must be a finite number of at least 0, got -1.0"),
        (lambda: AWGNChannel(3.0, per="tensor"), "`per` must be one of 'update', 'layer', got 'tensor'"),
        (lambda: FadingChannel(3.0, k_factor=-1), "`k_factor` must be a number of at least 0"),
        (lambda: FadingChannel(3.0, block=0), "`block` must be a whole number of at least 1"),
        (lambda: FadingChannel(3.0, rate=1.0, inversion=True), "Give `rate` or `inversion=True`, not both"),
        (lambda: FadingChannel(3.0, truncation=0.1), "`truncation`=0.1 bounds the power of inversion"),
        (lambda: QuantizationChannel(0), "`bits` must be a whole number from 1 to 16, or 32 to change nothing, got 0"),
        (lambda: QuantizationChannel(17), "`bits` must be a whole number from 1 to 16"),
        (lambda: QuantizationChannel(2.0), "`bits` must be a whole number from 1 to 16"),
        (lambda: QuantizationChannel(1, "qsgd"), '`bits` must be at least 2 with `scheme="qsgd"`'),
        (lambda: QuantizationChannel(2, "up"), "`scheme` must be one of 'stochastic', 'nearest', 'qsgd', got 'up'"),
        (lambda: SparsificationChannel(0), r"`fraction` must be a number in \(0, 1\], got 0. 0.01 sends"),
        (lambda: SparsificationChannel(1.5), r"`fraction` must be a number in \(0, 1\], got 1.5"),
        (lambda: SparsificationChannel(0.5, "best"), "`choice` must be one of 'top', 'random', got 'best'"),
        (lambda: BitFlipChannel(-0.1), r"`rate` must be a number in \[0, 1\], got -0.1"),
        (lambda: BitFlipChannel(0.1, bits=0), "`bits` must be a whole number from 1 to 16"),
        (lambda: PacketLossChannel(2), r"`probability` must be a number in \[0, 1\], got 2"),
        (lambda: PacketLossChannel(0.1, 0), "`packet_bytes` must be a whole number of at least 8"),
        (lambda: PacketLossChannel(0.1, lost="gone"), "`lost` must be one of 'zero', 'last', got 'gone'"),
        (
            lambda: PacketLossChannel(0.1, lost="zero", link="downlink"),
            "`lost` must be 'last' on the downlink, got 'zero'",
        ),
        (lambda: PacketLossChannel(0.1, retries=-1), "`retries` must be a whole number of at least 0"),
        (lambda: StragglerChannel(-1, 1), "`deadline` must be a number of at least 0, got -1"),
        (lambda: StragglerChannel(1, 1, spread=-1), r"`spread` must be a number in \[0, 100\], got -1"),
        (lambda: StragglerChannel(1, 1, spread=float("inf")), r"`spread` must be a number in \[0, 100\], got inf"),
        (
            lambda: AvailabilityChannel(phases=[float("nan")]),
            r"`phases` must be numbers in \[0, 1\], one per client, got \[nan\]",
        ),
        (lambda: AvailabilityChannel([[0, 1], [1]]), r"`trace` must be a table \[rounds, clients\]"),
        (lambda: AvailabilityChannel(mean=1.1), r"`mean` must be a number in \[0, 1\]"),
        (lambda: AvailabilityChannel([0, 1]), r"`trace` must be a table \[rounds, clients\] .* got the shape \[2\]"),
        (lambda: AvailabilityChannel([[0, 3]]), "with values from 0 to 3"),
        (lambda: OverTheAirChannel(3.0, truncation=-1), "`truncation` must be a finite number of at least 0"),
        (
            lambda: OverTheAirChannel(3.0, fallback="again"),
            "`fallback` must be one of 'zero_update', .* got 'again'. The channel is on the uplink",
        ),
        (lambda: DifferentialPrivacyChannel(0, 1), "`clip` must be a number above 0, got 0"),
        (lambda: DifferentialPrivacyChannel(float("inf"), 1.0), "`clip`, which must be finite then, got inf"),
        (
            lambda: DifferentialPrivacyChannel(1, float("inf")),
            "`noise_multiplier` must be a finite number of at least 0, got inf",
        ),
        (lambda: DifferentialPrivacyChannel(1, -1), "`noise_multiplier` must be a finite number of at least 0, got -1"),
        (lambda: DifferentialPrivacyChannel(1, 1, delta=2), r"`delta` must be a number in \[0, 1\], got 2"),
        (lambda: Channel(link="sideways"), "`link` must be one of 'uplink', 'downlink', got 'sideways'"),
    ],
)
def test_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (lambda: ErasureChannel([]), r"must be a number or one per client \[4\], got the shape \[0\]"),
        (lambda: ErasureChannel([0.1, 0.2]), r"must be a number or one per client \[4\], got the shape \[2\]"),
        (lambda: AvailabilityChannel([[1, 1]]), "`trace` must have a column for each of 4 clients, got 2"),
        (lambda: AvailabilityChannel(phases=[0.0]), r"`phases` must be one number per client \[4\], got \[1\]"),
    ],
)
def test_of_another_federation(channel, message):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[channel()]).fit(Classifier(), loader())


def test_two_of_a_kind_need_names():
    with pytest.raises(ValueError, match='two `ErasureChannel` on the uplink with no name, .* name="second"'):
        trainer(callbacks=[ErasureChannel(0.1), ErasureChannel(0.2)])
    trainer(callbacks=[ErasureChannel(0.1), ErasureChannel(0.2, name="b"), ErasureChannel(0.1, link="downlink")])


@pytest.mark.parametrize(
    "make", [lambda: OverTheAirChannel(10.0), lambda: DifferentialPrivacyChannel(1.0, 1.0, delta=None)]
)
def test_sums_need_a_rule_that_needs_sums(make):
    own = type(make()).__name__
    with pytest.raises(
        ValueError, match=f"`{own}` gives the server only the sum .* and FedHAWCallback needs each client's"
    ):
        trainer(rule=FedHAWCallback(lr_lambda=0.3), callbacks=[make()]).fit(Classifier(), loader())
    reuse = ErasureChannel(0.1, fallback="reuse_update")
    with pytest.raises(ValueError, match='`ErasureChannel` with fallback="reuse_update" reuses single updates'):
        trainer(rule=uniform(), callbacks=[reuse, make()]).fit(Classifier(), loader())
