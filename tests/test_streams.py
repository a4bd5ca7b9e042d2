import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedhaw.extending import stream
from lightning_fedhaw.streams import seed_of

parts = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 5)), max_size=4)


def test_known_answers():
    # Written down once: a stream's numbers must never change between versions or machines.
    assert seed_of(0, "cohort", 3) == 8765938557636752968
    assert seed_of(0) != seed_of(1)
    assert 0 <= seed_of(0, "client", 1) < 2**63


@given(parts, parts)
def test_different_names_give_different_seeds(a, b):
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (seed_of(0, *a) == seed_of(0, *b)) == same


def test_paths_are_not_concatenated():
    assert seed_of(0, "ab", "c") != seed_of(0, "a", "bc")
    assert seed_of(0, 1, 23) != seed_of(0, 12, 3)
    assert seed_of(0, 1) != seed_of(0, "1")


def test_streams_leave_the_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=stream(5, "x"))
    assert torch.equal(before, torch.get_rng_state())


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="strings and integers"):
        stream(0, 1.5)
