"""Stragglers and availability."""

from contextlib import suppress
from math import cos, erf, log, pi

import numpy as np
import pytest
import torch

from channel_contexts import prepared
from federations import flat, train
from lightning_fedhaw import AvailabilityChannel, StragglerChannel

CLIENTS = list(range(10))


def shares(channel, rounds, **kwargs):
    """How often each of ten clients is lost."""
    prepared(channel, **kwargs)
    return torch.stack([channel.outage(t, CLIENTS, 0) for t in range(rounds)]).double()


def test_times_are_log_normal_and_grow_with_the_samples():
    channel = prepared(StragglerChannel(1.0, 0.01, spread=0.5))
    seconds = torch.stack([channel.seconds(t, CLIENTS, 0) for t in range(400)])
    logs = (seconds / (0.1 * torch.arange(1, 11))).log()
    assert abs(logs.mean()) < 4.5 * 0.5 / 4000**0.5
    assert abs(logs.std() / 0.5 - 1) < 4.5 / 8000**0.5
    assert (logs.mean(0).abs() < 4.5 * 0.5 / 20).all(), "nobody is slow for ever"


def test_clients_have_speeds():
    channel = prepared(StragglerChannel(1.0, 0.01, spread=0.0, client_spread=1.0), num_clients=300)
    everybody = list(range(300))
    first, later = (channel.seconds(t, everybody, 0) for t in (0, 9))
    assert torch.equal(first, later)
    logs = (first / (0.1 * torch.arange(1, 301))).log()
    assert abs(logs.mean()) < 4.5 / 300**0.5
    assert abs(logs.std() - 1) < 4.5 / 600**0.5


def test_who_is_late():
    lost = shares(StragglerChannel(0.5, 0.01, spread=0.5), 400)
    for k in CLIENTS:
        z = log(0.5 / (0.1 * (k + 1))) / 0.5
        late = 0.5 * (1 - erf(z / 2**0.5))
        assert abs(float(lost[:, k].mean()) - late) < 4.5 * (late * (1 - late) / 400) ** 0.5 + 1e-9


def test_a_day_has_its_rhythm():
    phases = [k / 10 for k in CLIENTS]
    lost = shares(AvailabilityChannel(mean=0.5, amplitude=0.6, period=20, phases=phases), 2000)
    by_hour = 1 - lost.view(100, 20, 10).mean(0)
    expected = torch.tensor(
        [[min(1, max(0, 0.5 + 0.6 * cos(2 * pi * (t / 20 - phase)))) for phase in phases] for t in range(20)]
    )
    assert ((by_hour - expected).abs() <= 5 * (expected * (1 - expected) / 100).sqrt() + 1e-9).all()


def test_phases_are_drawn_once():
    channel = prepared(AvailabilityChannel(period=10), num_clients=200)
    everybody = list(range(200))
    at = [channel.probability(t, everybody, 0) for t in (0, 5, 10)]
    assert torch.allclose(at[0], at[2])
    assert torch.allclose(at[0] + at[1], torch.ones(200).double(), atol=1e-9)
    assert at[0].min() < 0.15
    assert at[0].max() > 0.85


def test_a_damaged_trace_is_named(tmp_path):
    """At whichever byte the file is cut off, and wherever a bit of its header is flipped."""
    path = tmp_path / "trace.npy"
    np.save(path, np.ones((3, 4)))
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 9):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"`trace`: '.*trace.npy' is no table of numbers, or damaged: "):
            AvailabilityChannel(path)
    for place in range(128):
        damaged = bytearray(whole)
        damaged[place] ^= 8
        path.write_bytes(damaged)
        # Some bits are part of blanks, or of an order of the same ones.
        with suppress(ValueError):
            assert AvailabilityChannel(path).trace.sum() == 12
    np.savez(tmp_path / "several.npz", a=np.ones(2))
    (tmp_path / "words.txt").write_text("a b")
    (tmp_path / "ragged.txt").write_text("1 0\n1")
    for name in ("several.npz", "words.txt", "ragged.txt"):
        with pytest.raises(ValueError, match=f"`trace`: '.*{name}' is no table of numbers"):
            AvailabilityChannel(tmp_path / name)
    (tmp_path / "empty.txt").touch()
    for wrong in (torch.tensor(2), [], [1, 0]):
        with pytest.raises(ValueError, match="`trace` must be a table"):
            AvailabilityChannel(wrong)
    with pytest.raises(ValueError, match="`trace` must be a table"):
        AvailabilityChannel(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="`trace`: there is no file 'none.npy'"):
        AvailabilityChannel("none.npy")


TRACE = [[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "npy", "csv", "blanks"])
def test_a_trace_says_who_is_there_and_begins_anew(kind, tmp_path):
    trace = {"list": TRACE, "array": np.array(TRACE, bool), "tensor": torch.tensor(TRACE)}.get(kind)
    if kind == "npy":
        np.save(trace := tmp_path / "trace.npy", np.array(TRACE))
    if kind in ("csv", "blanks"):
        mark = "," if kind == "csv" else " "
        (trace := tmp_path / "trace.txt").write_text("\n".join(mark.join(map(str, row)) for row in TRACE))
        trace = str(trace)
    runner, module = train(rounds=5, callbacks=[AvailabilityChannel(trace)])
    assert runner.federation_summary["lost_messages"] == 1 + 2 + 0 + 1 + 2

    class Cohort:
        def sample(self, round_idx, *, num_clients, sizes, seed):
            return [client for client in range(4) if TRACE[round_idx % 3][client]]

    _, drawn = train(rounds=5, sampler=Cohort())
    assert torch.equal(flat(module), flat(drawn)), "not there is as good as not drawn"
