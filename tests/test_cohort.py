import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedhaw.extending import ClientVectors
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.kernels import CPU, RUN, accumulate, dot


def vectors(k=3, p=5, seed=0, dtype=torch.float64, start=True):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(k, p, generator=g, dtype=dtype)
    return ClientVectors(matrix, torch.randn(p, generator=g, dtype=dtype) if start else None)


def test_verbs_by_hand():
    v = ClientVectors(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([10.0, 20.0]))  # rows (11, 20), (10, 22)
    assert v.weighted_sum(torch.tensor([0.25, 0.75])).tolist() == [10.25, 21.5]
    assert v.inner(torch.tensor([1.0, -1.0])).tolist() == [-9.0, -12.0]
    assert v.gram().tolist() == [[521.0, 550.0], [550.0, 584.0]]
    assert v.gather().tolist() == [[11.0, 20.0], [10.0, 22.0]]
    assert v.norms().tolist() == pytest.approx([521**0.5, 584**0.5])
    assert v.displacements.norms().tolist() == [1.0, 2.0]
    assert v.distances(torch.tensor([11.0, 20.0])).tolist() == pytest.approx([0.0, 5**0.5])
    assert v.norms({"a": [slice(0, 1)], "b": [slice(1, 2)]}).tolist() == [[11.0, 10.0], [20.0, 22.0]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_the_two_verbs_are_each_others_transposes(k, p, seed, start):
    v = vectors(k, p, seed, start=start)
    g = torch.Generator().manual_seed(seed + 1)
    s, x = torch.randn(k, generator=g, dtype=torch.float64), torch.randn(p, generator=g, dtype=torch.float64)
    assert torch.allclose(v.weighted_sum(s) @ x, s @ v.inner(x), atol=1e-10)


def test_gradients_flow_through_both_verbs():
    v = vectors()
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    vector = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(v.weighted_sum, (weights,))
    assert torch.autograd.gradcheck(v.inner, (vector,))
    assert torch.autograd.gradgradcheck(lambda w: v.weighted_sum(w).square().sum(), (weights,))


def test_a_loss_of_the_mix_gives_the_weights_their_gradient():
    v = vectors(dtype=torch.float32)
    weights = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    v.weighted_sum(weights).square().sum().backward()
    expected = 2 * v.gather() @ (weights.detach() @ v.gather())
    assert torch.allclose(weights.grad, expected, rtol=1e-5)


def test_sums_over_blocks_equal_the_whole():
    p = 2 * CPU.columns + 17
    v = ClientVectors(torch.randn(3, p), torch.randn(p))
    x = torch.randn(p)
    exact = v.gather().double() @ x.double()
    assert torch.allclose(v.inner(x), exact, rtol=1e-5, atol=1e-2)
    assert torch.allclose(dot(x, x), x.double() @ x.double(), rtol=1e-5)
    assert torch.allclose(v.gram(), v.gather().double() @ v.gather().double().T, rtol=1e-4)


def test_bfloat16_storage_is_rounded_displacements_not_rounded_models():
    start = torch.full((100,), 1000.0)
    matrix = torch.randn(4, 100)
    kept = ClientVectors(matrix.bfloat16(), start)
    mix = kept.weighted_sum(torch.full((4,), 0.25))
    assert mix.dtype == torch.float32
    assert (mix - (start + matrix.mean(0))).abs().max() < 2e-2, "rounded models would be off by up to 4"


def test_weights_that_sum_to_one_leave_the_start_alone():
    start = torch.randn(1000)
    v = ClientVectors(torch.zeros(3, 1000), start)
    assert torch.equal(v.weighted_sum(torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)), start)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"`weights` must have the shape \[3\]"):
        vectors().weighted_sum(torch.ones(2))
    with pytest.raises(ValueError, match=r"`vector` must have the shape \[5\]"):
        vectors().inner(torch.ones(4))
    with pytest.raises(ValueError, match="`matrix`"):
        ClientVectors(torch.ones(3))


def test_accumulated_vectors_know_one_mix_only():
    dense = vectors()
    raw = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    summed = AccumulatedVectors(raw @ dense.matrix, raw, dense.start, "SomeRule")
    weights = raw / raw.sum()
    assert torch.allclose(summed.weighted_sum(weights), dense.weighted_sum(weights), atol=1e-12)
    assert torch.allclose(summed.weighted_sum(0.9 * weights), dense.weighted_sum(0.9 * weights), atol=1e-12)
    assert torch.allclose(summed.weights, weights)
    with pytest.raises(
        RuntimeError, match=r"`SomeRule` declares `unnormalized_weight`.*weighted sum with weights other"
    ):
        summed.weighted_sum(torch.tensor([0.5, 0.25, 0.25]))
    with pytest.raises(
        RuntimeError, match=r"`SomeRule` declares `unnormalized_weight`.* the derivative of a weighted sum"
    ):
        summed.weighted_sum(weights.clone().requires_grad_())
    verbs = {
        "to": lambda v: v.to(torch.device("cpu")),
        "inner": lambda v: v.inner(torch.ones(5)),
        "gram": lambda v: v.gram(),
        "norms": lambda v: v.displacements.norms(),
        "distances": lambda v: v.distances(None),
        "gather": lambda v: v.gather(),
        "map_columns": lambda v: v.map_columns(lambda rows: rows.amax(0)),
        "matrix": lambda v: v.matrix,
    }
    assert set(verbs) >= CohortVectors.__abstractmethods__ - {"__len__", "displacements", "weighted_sum"}
    for verb, use in verbs.items():
        use(dense)
        with pytest.raises(
            RuntimeError, match=f"`SomeRule` declares `unnormalized_weight`.* asked for `{verb}`.* set `storage"
        ):
            use(summed)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 7),
    st.integers(1, 5 * RUN),
    st.integers(0, 20),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.data(),
)
def test_each_number_depends_on_its_own_row_or_column_alone(k, p, shift, seed, dtype, data):
    """To the last bit: whatever the other rows, the partition of the columns, and the place in memory."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(k, p + shift, generator=g).to(dtype)
    moved, matrix = wide[:, shift:], wide[:, shift:].clone()
    whole, shifted = ClientVectors(matrix), ClientVectors(moved)
    x = torch.randn(p, generator=g)
    weights = torch.rand(k, generator=g, dtype=torch.float64)

    mix = whole.weighted_sum(weights)
    assert torch.equal(mix, shifted.weighted_sum(weights))
    cut = data.draw(st.integers(0, p))
    parts = [ClientVectors(part).weighted_sum(weights) for part in (matrix[:, :cut], matrix[:, cut:])]
    assert torch.equal(mix, torch.cat(parts))
    one_by_one = torch.zeros_like(mix)
    for row, weight in zip(matrix, weights.tolist(), strict=True):
        one_by_one.add_(row, alpha=weight)
    assert torch.equal(mix, one_by_one)
    first = data.draw(st.integers(0, k))
    two_calls = accumulate(torch.zeros_like(mix), moved[:first], weights[:first].tolist())
    assert torch.equal(mix, accumulate(two_calls, matrix[first:], weights[first:].tolist()))

    rows = data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=k))
    some = ClientVectors(moved[rows])
    for verb in (lambda v: v.inner(x), lambda v: v.norms(), lambda v: v.distances(x)):
        assert torch.equal(verb(whole), verb(shifted))
        assert torch.equal(verb(whole)[rows], verb(some))
        assert verb(whole).dtype == torch.float64


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_hold_where_vectors_have_many_blocks(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = 2 * CPU.columns + 3 * RUN + 77
        matrix, x = torch.randn(5, p), torch.randn(p)
        weights = torch.rand(5, dtype=torch.float64)
        whole = ClientVectors(matrix)
        mix = whole.weighted_sum(weights)
        for cut in (CPU.columns, CPU.columns + 1, 12345):
            parts = [ClientVectors(part).weighted_sum(weights) for part in (matrix[:, :cut], matrix[:, cut:])]
            assert torch.equal(mix, torch.cat(parts))
        for rows in ([0], [3, 1], [4, 2, 0, 1]):
            assert torch.equal(whole.inner(x)[rows], ClientVectors(matrix[rows]).inner(x))
            assert torch.equal(whole.norms()[rows], ClientVectors(matrix[rows]).norms())
    finally:
        torch.set_num_threads(before)


def test_vectors_survive_a_checkpoint_without_the_rows_of_nobody():
    v = vectors(k=5)
    some = ClientVectors(v.matrix[:2], v.start)
    state = some.state_dict()
    assert ClientVectors.is_state(state)
    assert not ClientVectors.is_state({"matrix": v.matrix})
    assert state["matrix"].untyped_storage().nbytes() == 2 * 5 * 8
    again = ClientVectors.from_state(state)
    assert torch.equal(again.gather(), v.gather()[:2])
    assert v.state_dict()["matrix"] is v.matrix, "a copy of the whole would be a third matrix"
    assert v.to(torch.device("cpu")) is v


def test_vectors_of_another_precision_than_the_model():
    start = torch.randn(3000, dtype=torch.float64)
    kept = ClientVectors(torch.randn(3, 3000), start)
    full = ClientVectors(kept.matrix.double(), start)
    for verb in (lambda v: v.norms(), lambda v: v.gram(), lambda v: v.gather(), lambda v: v.distances(start)):
        assert torch.allclose(verb(kept), verb(full), rtol=1e-12)
        assert verb(kept).dtype == torch.float64
