from __future__ import annotations

import hashlib
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedhaw.data import (
    DirichletPartitioner,
    HybridDirichletPartitioner,
    IIDPartitioner,
    IndexPartitioner,
    LabelSwapPartitioner,
    LongTailPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    QuantitySkewPartitioner,
    ShardPartitioner,
    balanced_subset,
    subset_by_class,
)
from lightning_fedhaw.data.partitioners.counts import largest_remainder
from lightning_fedhaw.data.partitioners.dirichlet import (
    balanced_counts,
    clientwise_counts,
    hybrid_counts,
    unbalanced_counts,
)
from lightning_fedhaw.data.partitioners.partition import swap_labels
from lightning_fedhaw.data.partitioners.skewed import long_tail_counts

N, K = 1200, 6
LABELS = torch.arange(N) % 8 * 3  # eight classes of 150, numbered 0, 3, .., 21

RANDOM = {
    "iid": IIDPartitioner(),
    "balanced": DirichletPartitioner(0.3),
    "balanced, tiny alpha": DirichletPartitioner(1e-3, max_tries=2000),
    "unbalanced": DirichletPartitioner(0.3, "unbalanced"),
    "client": DirichletPartitioner(0.1, "client"),
    "client, given sizes": DirichletPartitioner(0.1, "client", sizes=[500, 300, 100, 50, 20, 10]),
    "client, underflowing alpha": DirichletPartitioner(5e-324, "client"),
    "hybrid": HybridDirichletPartitioner(),
    "shards": ShardPartitioner(),
    "shards, given size": ShardPartitioner(3, shard_size=7),
    "quantity, lognormal": QuantitySkewPartitioner(),
    "quantity, dirichlet": QuantitySkewPartitioner(alpha=1.0),
    "long tail": LongTailPartitioner(10, DirichletPartitioner(0.5, "unbalanced")),
    "long tail of shards": LongTailPartitioner(5.0, ShardPartitioner(2)),
    "swap": LabelSwapPartitioner(IIDPartitioner(), 0.5),
    "swap, per client": LabelSwapPartitioner(DirichletPartitioner(0.3), 1.0, per_client=True),
}
FIXED = {
    "keys": NaturalIdPartitioner([f"speaker {i % 7 % K}" for i in range(N)]),
    "indices": IndexPartitioner([range(k, N - 5, K) for k in range(K)]),
}
DROPPED = {
    "client, given sizes": N - 980,
    "shards, given size": N - K * 3 * 7,
    "long tail": N - int(long_tail_counts([150] * 8, 10).sum()),
    "indices": 5,
}


def split(scheme: Partitioner, seed: int = 0, labels: torch.Tensor = LABELS, num_clients: int | None = K) -> Partition:
    return scheme.partition(num_clients, num_samples=len(labels), labels=labels, seed=seed)


# What every scheme promises


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_contract(name):
    scheme = (RANDOM | FIXED)[name]
    partition = split(scheme)
    used = torch.cat(partition.indices)
    assert all(own.dtype == torch.int64 and bool((own.diff() > 0).all()) for own in partition.indices)
    assert len(set(used.tolist())) == len(used) == N - partition.dropped
    assert used.min() >= 0
    assert used.max() < N
    assert partition.sizes.tolist() == [len(own) for own in partition.indices]
    assert len(partition.sizes) == K
    assert partition.sizes.min() > 0
    if name != "long tail of shards":
        assert partition.dropped == DROPPED.get(name, 0)
    assert split(scheme).fingerprint() == partition.fingerprint()


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_gives_another_partition(name):
    assert split(RANDOM[name], seed=1).fingerprint() != split(RANDOM[name]).fingerprint()


@pytest.mark.parametrize("name", FIXED)
def test_a_given_partition_does_not_depend_on_the_seed(name):
    assert split(FIXED[name], seed=1).fingerprint() == split(FIXED[name]).fingerprint()


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_class_totals_are_preserved(name):
    partition = split((RANDOM | FIXED)[name])
    unswapped = Partition(partition.indices, partition.dropped).histogram(LABELS)
    assert unswapped.sum(1).equal(partition.sizes)
    assert partition.histogram(LABELS).sum(1).equal(partition.sizes)
    totals = torch.bincount(LABELS)
    if partition.dropped:
        assert (unswapped.sum(0) <= totals).all()
    else:
        assert unswapped.sum(0).equal(totals)


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_global_random_state_is_neither_used_nor_moved(name):
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    fingerprint = split((RANDOM | FIXED)[name]).fingerprint()
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.get_rng_state().equal(before[1])
    np.random.seed(2)
    torch.manual_seed(2)
    assert split((RANDOM | FIXED)[name]).fingerprint() == fingerprint


@pytest.mark.parametrize("name", [n for n in RANDOM if not RANDOM[n].needs_labels])
def test_schemes_that_need_no_labels_ignore_them(name):
    with_labels, without = split(RANDOM[name]), RANDOM[name].partition(K, num_samples=N)
    assert with_labels.fingerprint() == without.fingerprint()
    assert RANDOM[name].partition(K, num_samples=N, labels=torch.rand(N)).fingerprint() == without.fingerprint()


@pytest.mark.parametrize("name", [n for n in RANDOM if n not in ("client, given sizes", "hybrid")])
def test_one_client_gets_everything_that_is_not_dropped(name):
    partition = split(RANDOM[name], num_clients=1)
    assert len(partition.indices[0]) + partition.dropped == N


@pytest.mark.parametrize("name", [n for n in RANDOM if not {"tail", "swap", "tiny"} & set(n.replace(",", "").split())])
def test_data_of_one_class(name):
    partition = split(RANDOM[name], labels=torch.full((N,), 4))
    assert partition.histogram(torch.full((N,), 4))[:, 4].equal(partition.sizes)


@settings(deadline=None, max_examples=40)
@given(
    num_clients=st.integers(1, 12),
    labels=st.lists(st.integers(0, 4), min_size=24, max_size=80),
    alpha=st.sampled_from([0.5, 1.0, 100.0]),
    kind=st.sampled_from(["balanced", "unbalanced", "client"]),
    seed=st.integers(0, 2**40),
)
def test_dirichlet_splits_any_data(num_clients, labels, alpha, kind, seed):
    scheme = DirichletPartitioner(alpha, kind, max_tries=50, on_infeasible="move")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        partition = split(scheme, seed, torch.tensor(labels), num_clients)
    assert sorted(torch.cat(partition.indices).tolist()) == list(range(len(labels)))


# Counts


def test_largest_remainder_by_hand():
    assert largest_remainder((0.15, 0.35, 0.5), 7).tolist() == [1, 2, 4]
    assert largest_remainder(np.ones(40), 60).tolist() == [2] * 20 + [1] * 20  # the first of equals
    assert largest_remainder((0.0, 2.0), 3).tolist() == [0, 3]
    assert largest_remainder((0.29, 0.71), 100).tolist() == [29, 71]  # 0.29 * 100 is 28.999..


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda f: sum(f) > 1e-300),
    st.integers(0, 10**7),
)
def test_largest_remainder_sums_and_stays_near_the_shares(fractions, total):
    counts = largest_remainder(fractions, total)
    exact = np.array(fractions) / sum(fractions) * total
    assert counts.sum() == total
    assert counts.min() >= 0
    assert (np.abs(counts - exact) < 1 + 1e-6).all()


def test_long_tail_by_hand():
    ten = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
    assert long_tail_counts([5000] * 10, 10).tolist() == ten
    assert sum(ten) == 20431
    five = [5000, 4181, 3496, 2924, 2445, 2044, 1709, 1429, 1195, 1000]
    assert long_tail_counts([5000] * 10, 5).tolist() == five
    assert long_tail_counts([20] * 10, 10).tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert long_tail_counts([30, 50], 1).tolist() == [30, 50]
    assert long_tail_counts([49, 49], 49).tolist() == [49, 1]  # 49 * (1 / 49) is 0.99..
    assert long_tail_counts([30], 10).tolist() == [30]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=8),
    num_clients=st.integers(1, 9),
    alpha=st.sampled_from([5e-324, 1e-300, 1e-3, 0.1, 1.0, 1e6, 1.7e308]),
    seed=st.integers(0, 1000),
)
def test_count_tables_share_out_every_class_at_any_alpha(sizes, num_clients, alpha, seed):
    rng, sizes = np.random.default_rng(seed), np.array(sizes)
    tables = [f(rng, sizes, num_clients, alpha) for f in (balanced_counts, unbalanced_counts)]
    tables.append(hybrid_counts(rng, sizes, 2 * num_clients, alpha, 0.1))
    wanted = largest_remainder(rng.random(num_clients) + 0.1, int(sizes.sum()))
    tables.append(clientwise_counts(rng, sizes, wanted, alpha))
    assert tables[-1].sum(1).tolist() == wanted.tolist()
    for table in tables:
        assert table.min() >= 0
        assert table.sum(0).tolist() == sizes.tolist()


def test_a_huge_alpha_is_even_and_a_tiny_one_a_corner():
    sizes = np.array([600] * 5)
    for alpha in (1e6, 1.7e308):
        even = unbalanced_counts(np.random.default_rng(0), sizes, 6, alpha)
        assert abs(even - 100).max() <= 1
    corner = unbalanced_counts(np.random.default_rng(0), sizes, 6, 5e-324)
    assert ((corner == 600).sum(0) == 1).all()


def test_balanced_gives_a_full_client_no_more():
    for seed in range(50):
        counts = balanced_counts(np.random.default_rng(seed), np.array([100] * 10), 5, 0.1)
        held = counts.cumsum(1) - counts  # [K, C], before each class
        assert counts[held >= 200].max(initial=0) <= 1  # the last client may get the sample that rounding leaves
    # The cap is looked at before a class is added: the last class may lift a client above it.
    assert balanced_counts(np.random.default_rng(0), np.array([10, 100]), 2, 1e-9).sum(1).max() >= 100


def test_dirichlet_moments():
    # A share from Dir(alpha 1_K) has mean 1/K and variance (K-1) / (K^2 (K alpha + 1)): 0.2 and 0.16 / 2 = 0.08.
    shares = unbalanced_counts(np.random.default_rng(0), np.full(20000, 10**6), 5, 0.2)[0] / 10**6
    assert shares.mean() == pytest.approx(0.2, abs=0.01)
    assert shares.var() == pytest.approx(0.08, abs=0.003)


def test_clientwise_serves_requests_for_a_scarce_class_in_random_order():
    # Both clients want class 0 alone (alpha tiny, one class): it has 10 samples for 20 requests. With two classes the
    # unserved requests go to class 1.
    served = []
    for seed in range(300):
        counts = clientwise_counts(np.random.default_rng(seed), np.array([10, 10]), np.array([10, 10]), 5e-324)
        assert counts.sum(0).tolist() == counts.sum(1).tolist() == [10, 10]
        served.append(counts[0, 0])
    assert np.mean(served) == pytest.approx(5, abs=0.6)
    assert {0, 10} <= set(served)
    assert len(set(served)) > 4


def test_hybrid_halves():
    counts = hybrid_counts(np.random.default_rng(0), np.array([10000] * 10), 20, 10.0, 0.1)
    per_client = counts / counts.sum(1, keepdims=True)
    largest = per_client.max(1)
    assert largest[:10].max() < 0.3 < largest[10:].min()
    # Half the mass of a class, give or take Beta(100, 100)'s sd of 0.035.
    assert counts[:10].sum(0) / 10000 == pytest.approx(np.full(10, 0.5), abs=0.15)


# Schemes


def test_iid_is_equal():
    assert sorted(IIDPartitioner().partition(7, num_samples=24).sizes.tolist()) == [3, 3, 3, 3, 4, 4, 4]


def test_smaller_alpha_is_more_skewed():
    def share_of_largest_class(alpha, kind):
        histogram = split(DirichletPartitioner(alpha, kind)).histogram(LABELS).double()
        return (histogram.max(1).values / histogram.sum(1)).mean()

    for kind in ("balanced", "unbalanced", "client"):
        strong, mild, none = (share_of_largest_class(alpha, kind) for alpha in (0.1, 1.0, 100.0))
        assert strong > mild + 0.05
        assert mild > none + 0.05


@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
def test_min_size_is_reached(kind):
    assert split(DirichletPartitioner(0.5, kind)).sizes.min() >= 10
    assert split(DirichletPartitioner(0.5, kind, min_size=80)).sizes.min() >= 80
    assert split(HybridDirichletPartitioner(min_size=80)).sizes.min() >= 80
    assert split(QuantitySkewPartitioner(min_size=80)).sizes.min() >= 80


def test_infeasible_split_raises_or_moves():
    labels = torch.arange(400) % 2  # two classes that go to one client each
    with pytest.raises(ValueError, match=r"in 5 tries no draw gave each of 20 clients at least 10 \(`min_size`\)"):
        split(DirichletPartitioner(1e-9, "unbalanced", max_tries=5), 0, labels, 20)
    scheme = DirichletPartitioner(1e-9, "unbalanced", max_tries=5, on_infeasible="move")
    with pytest.warns(UserWarning, match="`min_size`=10 samples; samples were moved") as caught:
        partition = split(scheme, 0, labels, 20)
    assert caught[0].filename == __file__  # it points at the caller, not into the package
    assert partition.sizes.min() == 10
    assert partition.histogram(labels).sum(0).tolist() == [200, 200]


def test_moving_can_fill_everyone_exactly():
    scheme = DirichletPartitioner(1e-9, "unbalanced", min_size=5, max_tries=1, on_infeasible="move")
    with pytest.warns(UserWarning, match="min_size"):
        assert split(scheme, 0, torch.arange(50) % 3, 10).sizes.tolist() == [5] * 10


def test_client_kind_gives_the_sizes():
    sizes = [500, 300, 100, 50, 20, 10]
    assert split(RANDOM["client, given sizes"]).sizes.tolist() == sizes
    assert split(DirichletPartitioner(0.1, "client", sizes=torch.tensor(sizes))).sizes.tolist() == sizes
    both = QuantitySkewPartitioner(1.5).sizes(K, N)
    assert split(DirichletPartitioner(0.1, "client", sizes=both)).sizes.tolist() == both


def test_shards_of_mnist():
    labels = torch.arange(60000) % 10
    partition = split(ShardPartitioner(2, shard_size=300), 3, labels, 100)
    assert partition.sizes.tolist() == [600] * 100
    assert partition.dropped == 0
    # 6000 per class are twenty whole shards, so that no client sees more than two classes.
    assert set((partition.histogram(labels) > 0).sum(1).tolist()) == {1, 2}
    assert partition.fingerprint() == split(ShardPartitioner(2), 3, labels, 100).fingerprint()


def test_shards_are_shuffled_within_a_class():
    partition = split(ShardPartitioner(1), 0, torch.zeros(100, dtype=torch.int64), 2)
    assert partition.indices[0].tolist() not in (list(range(50)), list(range(50, 100)))


def test_quantity_skew_grows_with_sigma():
    equal = QuantitySkewPartitioner(0.0).sizes(K, N + 1)
    assert sorted(equal) == [200] * 5 + [201]
    spread = [np.std(QuantitySkewPartitioner(sigma, min_size=1).sizes(50, 10**5)) for sigma in (0.1, 0.5, 1.0)]
    assert spread == sorted(spread)
    # The logarithm of the sizes has standard deviation sigma.
    assert np.std(np.log(QuantitySkewPartitioner(0.5).sizes(2000, 10**8))) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="`min_size`"):  # and a huge one overflows nothing
        QuantitySkewPartitioner(1e300, max_tries=2).sizes(K, N)


def test_long_tail_cuts_classes_then_splits():
    partition = split(LongTailPartitioner(10, IIDPartitioner()))
    per_class = partition.histogram(LABELS).sum(0)[::3]
    assert per_class.tolist() == long_tail_counts([150] * 8, 10).tolist()
    kept_twice = split(LongTailPartitioner(1, ShardPartitioner(2, shard_size=90)))
    assert kept_twice.dropped == N - K * 2 * 90
    assert len(split(LongTailPartitioner(2, LabelSwapPartitioner(IIDPartitioner(), 0.5))).label_swaps) == 3


def test_label_swap_leaves_the_split_and_swaps_a_share_of_the_clients():
    base = DirichletPartitioner(0.3)
    for fraction, many in ((0.0, 0), (0.25, 2), (0.5, 3), (0.75, 5), (1.0, 6)):  # halves are rounded up
        swapped = split(LabelSwapPartitioner(base, fraction))
        assert Partition(swapped.indices).fingerprint() == split(base).fingerprint()
        assert len(swapped.label_swaps) == many
        assert len(set(swapped.label_swaps.values())) == min(many, 1)
    pairs = split(LabelSwapPartitioner(base, 1.0, per_client=True)).label_swaps
    assert list(pairs) == list(range(K))
    assert len(set(pairs.values())) > 1
    assert all(a != b and a in LABELS and b in LABELS for a, b in pairs.values())
    assert set(split(LabelSwapPartitioner(base, 1.0, (3, 21))).label_swaps.values()) == {(3, 21)}


def test_label_swap_is_an_involution():
    once = swap_labels(LABELS, (3, 21))
    assert once.equal(torch.tensor([{3: 21, 21: 3}.get(v, v) for v in LABELS.tolist()]))
    assert swap_labels(once, (3, 21)).equal(LABELS)
    assert once.dtype == LABELS.dtype


def test_histogram_applies_the_swap_to_the_swapped_client_alone():
    labels = torch.tensor([0, 1, 1, 2, 0, 1])
    indices = (torch.tensor([2, 0, 1]), torch.tensor([3, 4, 5]))
    assert Partition(indices).histogram(labels).tolist() == [[1, 2, 0], [1, 1, 1]]
    swapped = Partition(indices, label_swaps={0: (0, 2)})
    assert swapped.histogram(labels, num_classes=4).tolist() == [[0, 2, 1, 0], [1, 1, 1, 0]]
    with pytest.raises(ValueError, match=r"`labels` must lie in 0 \.\. 1, got values from 0 to 2"):
        swapped.histogram(labels, num_classes=2)
    with pytest.raises(ValueError, match="`labels` must lie in"):
        swapped.histogram(labels - 1)


@pytest.mark.parametrize("as_", [list, np.array, lambda keys: (key for key in keys)])
def test_keys_in_order_of_first_appearance(as_):
    scheme = NaturalIdPartitioner(as_(["b", "a", "b", "c", "a"]))
    assert scheme.names == ("b", "a", "c")
    assert scheme.num_clients == 3
    partition = scheme.partition(None, num_samples=5)
    assert [own.tolist() for own in partition.indices] == [[0, 2], [1, 4], [3]]


def test_integer_tensor_keys():
    assert NaturalIdPartitioner(torch.tensor([7, 7, 2])).names == (7, 2)


def test_indices_are_sorted_and_the_rest_is_dropped():
    partition = IndexPartitioner([[4, 1], torch.tensor([3]), np.array([0])]).partition(None, num_samples=6)
    assert [own.tolist() for own in partition.indices] == [[1, 4], [3], [0]]
    assert partition.dropped == 2


def test_a_swap_takes_the_number_of_clients_from_its_base():
    scheme = LabelSwapPartitioner(FIXED["keys"], 0.5)
    assert scheme.num_clients == K
    assert len(split(scheme, num_clients=None).indices) == K


def test_partitioners_compare_and_print_by_value():
    assert DirichletPartitioner(0.1) == DirichletPartitioner(0.1) != DirichletPartitioner(0.2)
    assert repr(LabelSwapPartitioner(IIDPartitioner(), 0.5)).startswith(
        "LabelSwapPartitioner(base=IIDPartitioner(), fraction=0.5"
    )


# Fingerprints


def test_fingerprint_is_a_hash_of_sizes_indices_and_swaps_alone():
    partition = Partition((torch.tensor([4, 1]), torch.tensor([0])), dropped=2, label_swaps={1: (3, 7)})
    text = struct.pack("<QqqQq", 2, 1, 4, 1, 0) + b"[(1, 3, 7)]"
    assert partition.fingerprint() == hashlib.blake2b(text, digest_size=8).hexdigest()


def test_fingerprint_tells_partitions_apart():
    a, b, c = torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1])
    different = [Partition((a, b)), Partition((b, a)), Partition((c,)), Partition((a, b), label_swaps={0: (0, 1)})]
    different.append(Partition((a, b), label_swaps={1: (0, 1)}))
    assert len({partition.fingerprint() for partition in different}) == len(different)
    assert Partition((torch.tensor([1, 0]),)).fingerprint() == Partition((c,)).fingerprint()


# Subsets


def test_balanced_subset_is_balanced_and_disjoint():
    chosen, rest = balanced_subset(LABELS, 43, seed=5)  # five of each of eight classes, three short of 43
    assert torch.bincount(LABELS[chosen])[::3].tolist() == [5] * 8
    assert torch.cat([chosen, rest]).sort().values.equal(torch.arange(N))
    assert (chosen.diff() > 0).all()
    assert (rest.diff() > 0).all()
    assert not balanced_subset(LABELS, 43, seed=6)[0].equal(chosen)
    assert balanced_subset(LABELS, 43, seed=5)[0].equal(chosen)


def test_long_tailed_subset():
    labels = torch.arange(1000) % 10
    chosen, rest = subset_by_class(labels, long_tail_counts([20] * 10, 10), seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert len(chosen) + len(rest) == 1000
    everything, nothing = subset_by_class(labels, [100] * 10)
    assert len(everything) == 1000
    assert len(nothing) == 0


# Errors


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        *[(lambda a=a: DirichletPartitioner(a), ValueError, "`alpha`") for a in (0, -1.0, float("nan"), True)],
        (lambda: DirichletPartitioner(1.0, "other"), ValueError, "`kind` must be one of 'balanced', 'unbalanced', 'cl"),
        (lambda: DirichletPartitioner(1.0, min_size=0), ValueError, "`min_size`"),
        (lambda: DirichletPartitioner(1.0, max_tries=0), ValueError, "`max_tries`"),
        (lambda: DirichletPartitioner(1.0, on_infeasible="x"), ValueError, "`on_infeasible` must be one of 'raise'"),
        (lambda: DirichletPartitioner(1.0, sizes=[1]), ValueError, '`sizes` must be None for kind="balanced"'),
        (lambda: DirichletPartitioner(1.0, "client", sizes=[3, 0]), ValueError, "`sizes` must be whole"),
        (lambda: DirichletPartitioner(1.0, "client", min_size=3), ValueError, "`min_size` must be None.* `sizes`"),
        (lambda: HybridDirichletPartitioner(0.0), ValueError, "`alpha_balanced`"),
        (lambda: HybridDirichletPartitioner(1.0, float("inf")), ValueError, "`alpha_skewed`"),
        (lambda: HybridDirichletPartitioner(min_size=0), ValueError, "`min_size`"),
        (lambda: HybridDirichletPartitioner(max_tries=0), ValueError, "`max_tries`"),
        (lambda: ShardPartitioner(0), ValueError, "`shards_per_client`"),
        (lambda: ShardPartitioner(2, 0), ValueError, "`shard_size`"),
        (lambda: QuantitySkewPartitioner(-1.0), ValueError, "`sigma` must be a finite number of at least 0"),
        (lambda: QuantitySkewPartitioner(alpha=0.0), ValueError, "`alpha`"),
        (lambda: QuantitySkewPartitioner(1.0, 1.0), ValueError, "Give `sigma` or `alpha`, not both"),
        (lambda: QuantitySkewPartitioner(min_size=0), ValueError, "`min_size`"),
        (lambda: QuantitySkewPartitioner(max_tries=0), ValueError, "`max_tries`"),
        (lambda: QuantitySkewPartitioner().sizes(0, 5), ValueError, "`num_clients`"),
        (lambda: QuantitySkewPartitioner().sizes(6, 5), ValueError, "`num_samples`"),
        (lambda: LongTailPartitioner(0.5, IIDPartitioner()), ValueError, "`rho` must be a finite number of at least 1"),
        (lambda: LongTailPartitioner(2, "iid"), TypeError, "`base` must be an instance of `Partitioner`"),
        (lambda: LongTailPartitioner(2, FIXED["keys"]), ValueError, "`base` must .* got NaturalIdPartitioner"),
        (lambda: LabelSwapPartitioner(None, 0.5), TypeError, "`base` must be an instance of `Partitioner`"),
        (
            lambda: LabelSwapPartitioner(IIDPartitioner(), 1.5),
            ValueError,
            r"`fraction` must be a number in \[0, 1\], got 1.5",
        ),
        (lambda: LabelSwapPartitioner(IIDPartitioner(), 0.5, (1, 1)), ValueError, "`labels` must be two different"),
        (lambda: LabelSwapPartitioner(IIDPartitioner(), 0.5, (1, 2, 3)), ValueError, "`labels` must be two different"),
        (
            lambda: LabelSwapPartitioner(IIDPartitioner(), 0.5, (1, 2), True),
            ValueError,
            "`labels` must be None with `per_client`",
        ),
        (lambda: NaturalIdPartitioner([]), ValueError, "`keys` must have one entry per sample, got none"),
        (lambda: NaturalIdPartitioner(["a", None]), ValueError, "`keys` .* got None for sample 1"),
        (lambda: NaturalIdPartitioner([1.0, float("nan")]), ValueError, "`keys` .* got nan for sample 1"),
        (
            lambda: NaturalIdPartitioner(torch.zeros(3, 2)),
            TypeError,
            "`keys` must be one number.* got list for sample 0",
        ),
        (lambda: IndexPartitioner([]), ValueError, "`indices` must be one list .* got no client"),
        (lambda: IndexPartitioner([[1], [0.5]]), ValueError, "`indices` must be lists of whole .* of client 1"),
        (lambda: largest_remainder([-1, 2], 3), ValueError, "`fractions`"),
        (lambda: largest_remainder([0, 0], 3), ValueError, "`fractions`"),
        (lambda: largest_remainder([float("nan")], 3), ValueError, "`fractions`"),
        (lambda: largest_remainder([1], -3), ValueError, "`total`"),
        (lambda: long_tail_counts([5], 0.9), ValueError, "`rho`"),
        (lambda: balanced_subset(LABELS, 7), ValueError, "`total` must be at least one sample for each of 8 classes"),
        (lambda: balanced_subset(LABELS, 8 * 151), ValueError, "`counts` .* got 151 for class 0, which has 150"),
        (lambda: balanced_subset(LABELS.float(), 8), TypeError, "`labels` must be integers"),
        (lambda: subset_by_class(LABELS, [1, 2]), ValueError, "`counts` must be 8 whole"),
        (lambda: subset_by_class(LABELS, [-1] * 8), ValueError, "`counts` must be 8 whole"),
    ],
)
def test_refused_on_construction(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("scheme", "given", "error", "match"),
    [
        (IIDPartitioner(), {"num_clients": 0}, ValueError, "`num_clients` must be a whole number"),
        (IIDPartitioner(), {"num_clients": None}, ValueError, "`num_clients` must be given for IID.* got None"),
        (IIDPartitioner(), {"num_samples": 0}, ValueError, "`num_samples`"),
        (
            IIDPartitioner(),
            {"num_samples": 5, "labels": None},
            ValueError,
            "`num_clients` must be at most .*, 5, got 6",
        ),
        (IIDPartitioner(), {"labels": LABELS[1:]}, ValueError, r"`labels` must have one .* \(1200\), got 1199"),
        (IIDPartitioner(), {"seed": 0.5}, TypeError, "got 0.5"),
        (RANDOM["balanced"], {"labels": None}, ValueError, "`labels` must be given for Dirichlet.*IIDPartitioner"),
        (RANDOM["balanced"], {"labels": LABELS.float()}, TypeError, "`labels` must be integers .* got torch.float32"),
        (RANDOM["balanced"], {"labels": LABELS[:, None]}, TypeError, r"`labels` .* of shape \[1200, 1\]"),
        (DirichletPartitioner(1.0, min_size=201), {}, ValueError, "`min_size` must be at most the mean .* 200 "),
        (RANDOM["client, given sizes"], {"num_clients": 5}, ValueError, "`sizes` must be 5 numbers"),
        (DirichletPartitioner(1.0, "client", sizes=[201] * 6), {}, ValueError, "`sizes` .* 1200.* got 6 of sum 1206"),
        (RANDOM["hybrid"], {"num_clients": 3}, ValueError, "`num_clients` must be even .* got 3"),
        (ShardPartitioner(2, shard_size=101), {}, ValueError, "`shard_size` .* 12 shards .* got 101"),
        (ShardPartitioner(201), {}, ValueError, "`shards_per_client` .* got 201"),
        (LongTailPartitioner(1000, IIDPartitioner()), {}, ValueError, "`rho` .* got 1000, which leaves class 18 none"),
        (
            LabelSwapPartitioner(IIDPartitioner(), 0.5, (0, 1)),
            {},
            ValueError,
            r"`labels` must be two that occur .* got \(0, 1\)",
        ),
        (
            LabelSwapPartitioner(IIDPartitioner(), 0.5),
            {"labels": LABELS * 0},
            ValueError,
            "`labels` must be two that occur",
        ),
        (LabelSwapPartitioner(RANDOM["swap"], 0.5), {}, ValueError, "`base` must not swap labels itself"),
        (
            FIXED["keys"],
            {"num_clients": 5},
            ValueError,
            "`num_clients` must be 6, which NaturalIdPartitioner determines",
        ),
        (FIXED["keys"], {"num_samples": 9, "labels": None}, ValueError, r"`keys` must have one entry per sample \(9\)"),
        (IndexPartitioner([[0], [1, 0]]), {"num_clients": 2}, ValueError, "`indices` .* got sample 0 2 times"),
        (IndexPartitioner([[0], [1200]]), {"num_clients": 2}, ValueError, r"`indices` .* 0 \.\. 1199, got 0 to 1200"),
        (IndexPartitioner([[0], [-1]]), {"num_clients": 2}, ValueError, "`indices` .* got -1 to 0"),
        (IndexPartitioner([[0], [], []]), {"num_clients": 3}, ValueError, r"`indices` .* client\(s\) 1, 2; use fewer"),
    ],
)
def test_refused_on_partition(scheme, given, error, match):
    arguments = {"num_clients": K, "num_samples": N, "labels": LABELS} | given
    with pytest.raises(error, match=match):
        scheme.partition(arguments.pop("num_clients"), **arguments)


class Returns(Partitioner):
    """A user's scheme, here one that may be wrong."""

    def __init__(self, partition):
        self.result = partition

    def split(self, num_clients, labels, seed):
        return self.result


def test_a_users_scheme_is_checked():
    halves = tuple(torch.arange(4).chunk(2))
    assert Returns(Partition(halves)).partition(2, num_samples=4).sizes.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"`indices` of a partition by Returns .* per client \(3\), got 2"):
        Returns(Partition(halves)).partition(3, num_samples=4)
    with pytest.raises(ValueError, match=r"`indices` and `dropped` .* all 5 samples, got 4 used and 0 dropped"):
        Returns(Partition(halves)).partition(2, num_samples=5)


def test_a_scheme_without_split_is_refused_when_it_is_made():
    class Misspelled(Partitioner):
        def _split(self, num_clients, labels, seed):
            return Partition.from_owners(labels % num_clients, num_clients)

    with pytest.raises(TypeError, match="abstract method '?split"):
        Misspelled()
