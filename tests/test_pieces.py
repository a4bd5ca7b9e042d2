"""The server's algebra in the pieces of an accelerator, on the CPU: the same numbers, few launches, one transfer."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedhaw.aggregation.fedadp import angles
from lightning_fedhaw.aggregation.robust import geometric_median_weights, krum_scores
from lightning_fedhaw.extending import ClientVectors
from lightning_fedhaw.vectors import client_vectors, kernels
from lightning_fedhaw.vectors.kernels import ACCELERATOR, CPU, RUN, dot, pieces_for

K = 10
GROUPS = {"first": [slice(0, 100), slice(5000, 9000)], "second": [slice(100, 5000)]}
VERBS = {
    "norms": lambda v, x: v.norms(),
    "norms of layers": lambda v, x: v.norms(GROUPS),
    "distances": lambda v, x: v.distances(x),
    "inner": lambda v, x: v.inner(x),
    "gram": lambda v, x: v.gram(),
    "weighted sum": lambda v, x: v.weighted_sum(torch.linspace(0.1, 1, len(v), dtype=torch.float64)),
    "columns": lambda v, x: v.map_columns(lambda rows: rows.amax(0)),
    "dot": lambda v, x: dot(v.matrix[0].to(x), x),
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


def vectors(p, dtype=torch.float32, start=True, rows=K):
    g = torch.Generator().manual_seed(p)
    matrix = torch.randn(rows, p, generator=g, dtype=torch.float64)
    origin = torch.randn(p, generator=g, dtype=torch.float64)
    x = torch.randn(p, generator=g, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return ClientVectors(matrix.to(dtype), origin.to(wide) if start else None), x.to(wide)


@pytest.fixture
def accelerate(monkeypatch):
    """Go through vectors as on an accelerator whose pieces are this large."""

    def use(elements=ACCELERATOR.elements):
        pieces = replace(ACCELERATOR, columns=elements, elements=elements)
        for module in (kernels, client_vectors):
            monkeypatch.setattr(module, "pieces_for", lambda device: pieces)
        return pieces

    return use


class Launches(TorchDispatchMode):
    """Counts what a device would have to run: operations that are neither views nor mere memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and "empty" not in name and name != "aten::detach":
            self.count += 1
        return func(*args, **(kwargs or {}))


class Transfers(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    WAITS = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.WAITS
        return func(*args, **(kwargs or {}))


def test_the_cpu_has_the_pieces_it_always_had_and_every_other_device_large_ones():
    assert pieces_for(torch.device("cpu")) is CPU
    assert (CPU.columns, CPU.elements, CPU.rows, CPU.dtype) == (2**18, 2**19, 8, None)
    assert [CPU.width(rows) for rows in (1, 2, 3, 8, 10**6)] == [2**18, 2**18, 170 * RUN, 64 * RUN, RUN]
    for name in ("cuda", "cuda:1", "xpu"):
        assert pieces_for(torch.device(name)) is ACCELERATOR
    # 256 MiB of float64, however many rows are summed at a time.
    for rows in (1, 10, 1000, ACCELERATOR.rows):
        assert 8 * rows * ACCELERATOR.width(rows) <= 256 * 2**20


@every_verb
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-5)], ids=str
)
def test_numbers_are_those_of_the_cpu(verb, start, dtype, rtol, accelerate):
    v, x = vectors(30 * RUN + 77, dtype, start)
    expected = verb(v, x)
    for elements in (4 * K * RUN, ACCELERATOR.elements):
        accelerate(elements)
        found = verb(v, x)
        assert found.dtype == expected.dtype
        # Sums whose terms cancel are as near as the lengths of the vectors allow; the float32 sums are the CPU's.
        assert torch.allclose(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_what_rules_make_of_it_is_the_same(accelerate):
    v, _ = vectors(5 * RUN + 3, start=False)
    shares = torch.full((K,), 1 / K, dtype=torch.float64)
    results = []
    for pieces in (CPU, ACCELERATOR):
        if pieces is ACCELERATOR:
            accelerate()
        median, _ = geometric_median_weights(v, shares, 1e-6, 1e-6, 20)
        results.append((angles(v, shares), krum_scores(v, 1), median))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


def test_gradients_flow_through_both_verbs(accelerate):
    accelerate()
    v, _ = vectors(40, torch.float64)
    weights = torch.rand(K, dtype=torch.float64, requires_grad=True)
    vector = torch.rand(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(v.weighted_sum, (weights,))
    assert torch.autograd.gradcheck(v.inner, (vector,))


def counted(verb, v, x):
    with Launches() as launches, Transfers() as transfers:
        verb(v, x)
    return launches.count, transfers.count


PER_PIECE = {"norms": 3, "distances": 5, "inner": 3, "gram": 3, "weighted sum": 1, "columns": 3, "dot": 3}


@pytest.mark.parametrize("name", PER_PIECE)
def test_launches_are_a_few_for_each_large_piece(name, accelerate):
    """Against the number of pieces; 10 x 86 million numbers have 26 of an accelerator's."""
    verb, runs = VERBS[name], 4
    rows = 1 if name == "dot" else K
    accelerate(rows * runs * RUN)

    def launches(pieces):
        v, x = vectors(pieces * runs * RUN, start=False, rows=rows)
        return counted(verb, v, x)[0]

    few, many = launches(2), launches(12)
    assert many - few <= PER_PIECE[name] * 10
    assert few <= 2 * PER_PIECE[name] + 5
    accelerate(12 * rows * runs * RUN)
    assert launches(12) < few, "one piece"


@every_verb
def test_a_verb_waits_for_the_device_once(verb, accelerate):
    accelerate(4 * K * RUN)
    for start in (True, False):
        v, x = vectors(30 * RUN + 77, start=start)
        moved = v.displacements if verb is VERBS["weighted sum"] else v
        _, waits = counted(verb, moved, x)
        assert waits <= 1


def test_the_weights_of_a_sum_are_the_hosts_and_their_vectors_are_not_asked(accelerate):
    accelerate(4 * K * RUN)
    v, x = vectors(30 * RUN, start=False)
    assert counted(VERBS["weighted sum"], v, x)[1] == 0


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 1e37])
def test_float32_vectors_of_any_size_have_norms_and_angles(size):
    """Their squares are no numbers of float32."""
    v, x = vectors(3 * RUN + 5, start=False, rows=4)
    usual, sized = v.matrix.double() * size, ClientVectors(v.matrix * size)
    assert torch.allclose(sized.norms(), usual.norm(dim=1), rtol=1e-5)
    assert torch.allclose(sized.inner(x * size), usual @ (x.double() * size), rtol=1e-5, atol=size**2 * 1e-2)
    assert torch.allclose(sized.gram(), usual @ usual.T, rtol=1e-5, atol=size**2 * 1e-2)
    assert torch.allclose(dot(sized.matrix[0], sized.matrix[0]), usual[0] @ usual[0], rtol=1e-5)
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.allclose(angles(sized, shares), angles(v, shares), rtol=1e-4)


@pytest.mark.parametrize("wild", [1e25, 3e38])
def test_a_huge_vector_leaves_the_others_their_bits_and_robust_rules_their_choice(wild):
    v, x = vectors(2 * RUN, start=False, rows=7)
    spoilt = v.matrix.clone()
    spoilt[3] = wild
    with_it, others = ClientVectors(spoilt), [0, 1, 2, 4, 5, 6]
    for verb in (lambda v: v.norms(), lambda v: v.inner(x), lambda v: v.distances(x)):
        assert torch.isfinite(verb(with_it)).all()
        assert torch.equal(verb(with_it)[others], verb(v)[others])
    assert int(krum_scores(with_it, 2).argmax()) == 3
    weights, _ = geometric_median_weights(with_it, torch.full((7,), 1 / 7, dtype=torch.float64), 1e-6, 1e-6, 20)
    assert float(weights[3]) < 1e-6


def test_a_vector_of_zeros_has_no_length():
    v = ClientVectors(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert v.norms().tolist() == [0, 5]
    assert v.gram().tolist() == [[0, 0], [0, 25]]
    assert ClientVectors(torch.zeros(2, 2)).gram().tolist() == [[0, 0], [0, 0]]
