"""What every rule promises, asked of every rule. A new rule is one new row."""

import copy
import io
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from federations import Classifier, flat, loader, samples, trainer
from lightning_fedhaw import (
    AggITDCallback,
    CoordinateMedianCallback,
    FedAdagradCallback,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FedAWACallback,
    FedBECallback,
    FedDFCallback,
    FedDynCallback,
    FederatedCallback,
    FederatedDataModule,
    FedExPCallback,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedLWSCallback,
    FedNestCallback,
    FedNovaCallback,
    FedOptCallback,
    FedVGCallback,
    FedYogiCallback,
    GeometricMedianCallback,
    IndexPartitioner,
    KrumCallback,
    LearnedClientRateCallback,
    LearnedWeightingCallback,
    MultiKrumCallback,
    Probe,
    PublishedFedHAWCallback,
    QFedAvgCallback,
    ScaffoldCallback,
    ServerFineTuningCallback,
    SimFBOCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.extending import Channel, ClientUpdate, ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.distributed import SpreadVectors
from resuming import COMBINATIONS, check_resume, rotated

P = 7


def logits(module, batch):
    return module.net(batch[0])


THE_COHORT = Probe("cohort")
"""A probe of the round's own clients: what is lost or drawn for a round is so for its probe."""

FEW = {"server_epochs": 4, "lr": 0.05}
by_steps = partial(PublishedFedHAWCallback, lr_gamma=0.01, lr_lambda=0.1, normalize_by="lr*steps")
RULES = {
    "FedAvg": FedAvgCallback,
    "FedAvg uniform": lambda: FedAvgCallback(weighting="uniform"),
    "FedAvg by batches": lambda: FedAvgCallback(weighting="batches"),
    "FedAvg by own weights": lambda: FedAvgCallback(weights=lambda update: float(update.num_steps)),
    "q-FedAvg": QFedAvgCallback,
    "FedDyn": FedDynCallback,
    "SCAFFOLD": ScaffoldCallback,
    "FedOpt on SCAFFOLD": lambda: FedOptCallback(rule=ScaffoldCallback(), lr=0.9),
    "FedHAW": FedHAWCallback,
    "FedHAW all learned": lambda: FedHAWCallback(lr_gamma=2.0, lr_lambda=1.0),
    "FedHAW published by steps": by_steps,
    "FedHAW published exact": lambda: PublishedFedHAWCallback(lr_gamma=1e-4, lr_lambda=1e-3, jacobian="exact"),
    "FedHAW published with a probe": lambda: by_steps(probe=Probe("cohort", form="sequential")),
    "FedHAW published": lambda: PublishedFedHAWCallback(lr_gamma=1e-4, lr_lambda=1e-3),
    "FedHAW published plain": lambda: by_steps(pseudo_gradient="plain"),
    "FedHAW published Adam": lambda: by_steps(hyper_optimizer=torch.optim.Adam),
    "FedHAW published bounded": lambda: by_steps(scale_bounds=(0.99, 1.01)),
    "FedHAW published on host": lambda: by_steps(memory="host"),
    "FedHAW bounded": lambda: FedHAWCallback(scale_bounds=(0.99, 1.01), step_bounds=(1.0, 2.0)),
    "FedHAW Adam": lambda: FedHAWCallback(lr_lambda=0.3, hyper_optimizer=torch.optim.Adam),
    "FedHAW on host": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, memory="host"),
    "FedOpt": FedOptCallback,
    "FedOpt AdamW": lambda: FedOptCallback(partial(torch.optim.AdamW, weight_decay=0.01), lr=0.05),
    "FedOpt scheduled": lambda: FedOptCallback(
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        lr_scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 2]),
    ),
    "FedOpt that learns": lambda: FedOptCallback(torch.optim.AdamW, lr=0.05, learn=("lr", "beta1"), probe=THE_COHORT),
    "FedAvgM that learns": lambda: FedAvgMCallback(
        learn=("lr", "momentum"), hyper_optimizer=torch.optim.Adam, probe=THE_COHORT
    ),
    "learned weighting": lambda: LearnedWeightingCallback(probe=THE_COHORT),
    "learned weighting by sigmoid": lambda: LearnedWeightingCallback(
        0.5, link="sigmoid", bounds=(0.1, 0.9), probe=THE_COHORT
    ),
    "learned client rate": lambda: LearnedClientRateCallback(probe=THE_COHORT),
    "FedOpt on FedAdp": lambda: FedOptCallback(torch.optim.Adagrad, lr=0.1, rule=FedAdpCallback()),
    "FedOpt on FedHAW": lambda: FedOptCallback(rule=FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1), lr=0.9),
    "FedAvgM": FedAvgMCallback,
    "FedAvgM on median": lambda: FedAvgMCallback(rule=CoordinateMedianCallback()),
    "FedAdagrad": lambda: FedAdagradCallback(beta1=0.5),
    "FedAdam": FedAdamCallback,
    "FedYogi": FedYogiCallback,
    "FedAdp": FedAdpCallback,
    "FedAdp of the code": lambda: FedAdpCallback(smooth_by="rounds", smooth_substitutes=True),
    "FedExP": FedExPCallback,
    "FedExP uniform": lambda: FedExPCallback(eps=0.0, weighting="uniform"),
    "FedAWA": FedAWACallback,
    "FedAWA in several steps": lambda: FedAWACallback(0.1, server_epochs=3, optimizer=torch.optim.SGD),
    "FedVG": FedVGCallback,
    "FedVG with examples": lambda: FedVGCallback(order=2.0, examples=0.5),
    "FedLWS": FedLWSCallback,
    "FedLWS unbounded": lambda: FedLWSCallback(beta=0.1, tau_min=0.0, tau_max=float("inf")),
    "FedNova": FedNovaCallback,
    "FedNova proximal": lambda: FedNovaCallback(momentum=0.5, proximal=0.1, tau_eff="steps"),
    "median": CoordinateMedianCallback,
    "trimmed mean": lambda: TrimmedMeanCallback(num_byzantine=1),
    "Krum": lambda: KrumCallback(num_byzantine=0),
    "Multi-Krum": lambda: MultiKrumCallback(num_byzantine=0, keep=2),
    "geometric median": GeometricMedianCallback,
    "FedLAW": lambda: FedLAWCallback(**FEW),
    "FedLAW scale": lambda: FedLAWCallback("scale", **FEW),
    "FedLAW weights": lambda: FedLAWCallback("weights", **FEW),
    "FedLAW in stages": lambda: FedLAWCallback("in_stages", server_epochs=16),
    "FedLAW in stages, weights first": lambda: FedLAWCallback("in_stages", first_stage="weights", server_epochs=16),
    "FedLAW quadratic": lambda: FedLAWCallback(base="quadratic", weighting="uniform", **FEW),
    "FedHyper": FedHyperCallback,
    "FedHyper uniform": lambda: FedHyperCallback(weighting="uniform", alpha_bounds=(0.2, 5.0)),
    "FedHyper by cosine": lambda: FedHyperCallback(normalize_by="norms", hyper_lr=0.1),
    "FedHyper G+SL": lambda: FedHyperCallback("G+SL"),
    "FedHyper G+CL": lambda: FedHyperCallback("G+CL", normalize_by="norms", hyper_lr=0.1),
    "Server fine-tuning": lambda: ServerFineTuningCallback(**FEW),
    "FedDF": lambda: FedDFCallback(logits=logits, **FEW),
    "FedBE": lambda: FedBECallback(logits=logits, samples=2, ensemble="probabilities", **FEW),
}
half = {"lower_lr": 0.1, "upper_lr": 0.5}
BILEVEL = {
    "AggITD": lambda: AggITDCallback("net.0", lower_rounds=2, **half),
    "AggITD sum, SVRG": lambda: AggITDCallback("net.0", lower_rounds=1, q="sum", lower="svrg", **half),
    "FedNest": lambda: FedNestCallback("net.*.weight", terms=1, upper_steps=2, **half),
    "FedNest SGD": lambda: FedNestCallback("net.0", variant="FedNest_SGD", lower_rounds=2, terms=1, **half),
    "LFedNest": lambda: FedNestCallback("net.0", variant="LFedNest", upper_optimizer=torch.optim.Adam, **half),
    "SimFBO": lambda: SimFBOCallback("net.0", single_loop_steps=2, radius=5.0, **half),
}
"""Rules that need upper variables, and what clients answer: they take part in whole federations only."""
IN_FEDERATIONS = {**RULES, **BILEVEL}
UNIFORM = {"FedAvg uniform", "FedHyper uniform", "SCAFFOLD"}
FIRST_ROUND_IS_FEDAVG = {
    *("FedAvg", "FedAvg by batches", *UNIFORM, "FedOpt", "FedAvgM", "FedAvgM that learns", "learned weighting"),
    "learned client rate",
    *(name for name in RULES if name.startswith(("FedHAW", "FedHyper"))),
}
NEEDS_CLIENTS = {"trimmed mean": 3, "Krum": 3, "Multi-Krum": 3}
NEUTRAL = {
    "FedAvg": (FedAvgCallback, FedAvgCallback),
    "FedHAW without steps": (
        lambda: FedHAWCallback(lr_gamma=0.0, lr_step=0.0, momentum=0.0, damping=math.inf),
        FedAvgCallback,
    ),
    "FedHAW published without steps": (
        lambda: PublishedFedHAWCallback(lr_gamma=0.0, lr_lambda=0.0),
        FedAvgCallback,
    ),
    "FedHAW published exact without steps": (
        lambda: PublishedFedHAWCallback(lr_gamma=0.0, lr_lambda=0.0, jacobian="exact"),
        FedAvgCallback,
    ),
    "FedOpt": (FedOptCallback, FedAvgCallback),
    "FedOpt on a rule": (lambda: FedOptCallback(rule=FedAvgCallback("uniform")), lambda: FedAvgCallback("uniform")),
    "FedAvgM without momentum": (lambda: FedAvgMCallback(momentum=0.0), FedAvgCallback),
    "learned weighting by examples": (LearnedWeightingCallback, FedAvgCallback),
    "learned weighting, uniform": (lambda: LearnedWeightingCallback(0.0), lambda: FedAvgCallback("uniform")),
    "learned client rate that is not stepped": (
        lambda: LearnedClientRateCallback(hyper_lr=0.0),
        FedAvgCallback,
    ),
    "FedOpt that learns nothing new": (lambda: FedOptCallback(learn=("lr",)), FedAvgCallback),
    "FedAdp without angles": (lambda: FedAdpCallback(gompertz=0.0), FedAvgCallback),
    "FedAWA without steps": (lambda: FedAWACallback(server_epochs=0), FedAvgCallback),
    "FedVG by examples alone": (lambda: FedVGCallback(examples=1.0), FedAvgCallback),
    "FedLWS without shrinking": (lambda: FedLWSCallback(beta=0.0, tau_min=0.0), FedAvgCallback),
    "trimmed mean of all": (lambda: TrimmedMeanCallback(0), lambda: FedAvgCallback("uniform")),
    "Multi-Krum of all": (lambda: MultiKrumCallback(0, keep=3), lambda: FedAvgCallback("uniform")),
    "FedLAW without steps": (lambda: FedLAWCallback(server_epochs=0), FedAvgCallback),
    "FedLAW that learns nothing": (lambda: FedLAWCallback("nothing"), FedAvgCallback),
    "FedHyper within bounds of 1": (lambda: FedHyperCallback(alpha_bounds=(1.0, 1.0)), FedAvgCallback),
    "FedHyper without steps": (lambda: FedHyperCallback(hyper_lr=0.0), FedAvgCallback),
    "Server fine-tuning without steps": (lambda: ServerFineTuningCallback(0), FedAvgCallback),
    "FedDF without steps": (lambda: FedDFCallback(0), FedAvgCallback),
    "FedBE without steps": (lambda: FedBECallback(0), FedAvgCallback),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
every_name = pytest.mark.parametrize("name", RULES)
in_federations = pytest.mark.parametrize("name", IN_FEDERATIONS)


class Server:
    layout = ParameterLayout.of(nn.Linear(P - 1, 1))
    seed = 0
    proxy_dataset = range(6)

    def loss(self, vector: Tensor, batch, batch_idx=0) -> Tensor:
        return vector.square().sum()

    def proxy_batch(self, index: Tensor) -> Tensor:
        return index

    def predict(self, vector: Tensor, batch, function=None, *, buffers=None, training=False) -> Tensor:
        return vector * (1 + batch[:, None])

    def mixed_buffers(self, clients, weights):
        return {}


def cohort(round_idx: int, start: Tensor, clients=(0, 1, 2), order=None, dtype=torch.float32) -> Cohort:
    """Each client's update depends on its number and the round alone."""
    clients = list(clients if order is None else [clients[i] for i in order])
    rows = [torch.randn(P, generator=torch.Generator().manual_seed(10 * round_idx + k)) for k in clients]
    return Cohort(
        round=round_idx,
        clients=torch.tensor(clients),
        num_examples=torch.tensor([10 * (k + 1) for k in clients]),
        num_steps=torch.tensor([k + 2 for k in clients]),
        received=torch.ones(len(clients), dtype=torch.bool),
        start=start,
        vectors=ClientVectors(0.1 * torch.stack(rows).to(dtype), start),
        learning_rates=(0.1, 0.1),
        num_batches=torch.tensor([k + 1 for k in clients]),
        initial_losses=torch.tensor([0.5 * (k + 1) for k in clients], dtype=torch.float64),
        rate_tangents=ClientVectors(torch.stack(rows).to(dtype), torch.zeros_like(start)).displacements,
    )


def play(rule, rounds=3, dtype=torch.float32, num_clients=3, **kwargs):
    start = torch.linspace(-1, 1, P, dtype=dtype)
    state = rule.init(start, torch.tensor([10 * (k + 1) for k in range(num_clients)]))
    steps = []
    for t in range(rounds):
        step = rule.step(cohort(t, start, dtype=dtype, **kwargs), state, Server())
        start, state = step.parameters, step.state
        steps.append(step)
    return steps


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_device_and_weights(make, dtype):
    for step in play(make(), dtype=dtype):
        assert step.parameters.shape == (P,)
        assert step.parameters.dtype == dtype
        assert step.parameters.device.type == "cpu"
        assert step.weights.dtype == torch.float64
        assert float(step.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert (step.weights >= 0).all()
        assert all(isinstance(value, float) for value in step.metrics.values())


@every_rule
def test_inputs_are_untouched(make):
    rule = make()
    start = torch.linspace(-1, 1, P)
    state = rule.init(start, torch.tensor([10, 20, 30]))
    state = rule.step(cohort(0, start), state, Server()).state
    given = cohort(1, start)
    before, old = copy.deepcopy((given.start, given.vectors.matrix, given.clients)), copy.deepcopy(state)
    rule.step(given, state, Server())
    for a, b in zip(before, (given.start, given.vectors.matrix, given.clients), strict=True):
        assert torch.equal(a, b)
    assert_same(old, state)


def assert_same(a, b):
    """States are equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, ClientVectors):
        assert_same(a.matrix, b.matrix)
        assert_same(a.start, b.start)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@every_rule
def test_the_order_of_clients_does_not_matter(make):
    straight, turned = play(make()), play(make(), order=(2, 0, 1))
    assert torch.allclose(straight[-1].parameters, turned[-1].parameters, atol=1e-6)
    assert torch.allclose(straight[-1].weights[torch.tensor([2, 0, 1])], turned[-1].weights, atol=1e-9)


@every_name
def test_one_client_alone_gets_all_the_weight(name):
    if name in NEEDS_CLIENTS:
        with pytest.raises(ValueError, match=r"`num_byzantine`=\d needs at least \d clients a round .* has 1\. Raise"):
            play(RULES[name](), clients=(1,))
        return
    for step in play(RULES[name](), clients=(1,)):
        assert step.weights.tolist() == [1.0]
        assert torch.isfinite(step.parameters).all()


@every_name
def test_clients_may_come_and_go(name):
    rule, start = RULES[name](), torch.linspace(-1, 1, P)
    state = rule.init(start, torch.tensor([10, 20, 30, 40]))
    cohorts = [(0, 1), (3,), (1, 2, 3), (0,)] if name not in NEEDS_CLIENTS else [(0, 1, 2), (1, 2, 3), (0, 1, 3)]
    for t, clients in enumerate(cohorts):
        step = rule.step(cohort(t, start, clients), state, Server())
        start, state = step.parameters, step.state
        assert len(step.weights) == len(clients)
        assert torch.isfinite(start).all()


@every_rule
def test_state_survives_a_weights_only_checkpoint(make):
    rule, start = make(), torch.linspace(-1, 1, P)
    state = rule.init(start, torch.tensor([10, 20, 30]))
    for t in range(2):
        state = rule.step(cohort(t, start), state, Server()).state
    rule.state = state
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    again = make()
    again.load_state_dict(torch.load(file, weights_only=True))
    a, b = (r.step(cohort(2, start), r.state, Server()) for r in (rule, again))
    assert torch.equal(a.parameters, b.parameters)
    assert a.metrics == b.metrics


@pytest.mark.parametrize(("make", "average"), NEUTRAL.values(), ids=NEUTRAL.keys())
def test_the_neutral_setting_is_fedavg(make, average):
    for step, reference in zip(play(make()), play(average()), strict=True):
        assert torch.allclose(step.parameters, reference.parameters, atol=1e-6)
        assert torch.allclose(step.weights, reference.weights, atol=1e-12)


@every_name
def test_the_first_round_is_an_average_where_the_rule_says_so(name):
    (step,) = play(RULES[name](), rounds=1)
    (reference,) = play(FedAvgCallback("uniform" if name in UNIFORM else "examples"), rounds=1)
    is_average = torch.allclose(step.parameters, reference.parameters, atol=1e-6)
    assert is_average == (name in FIRST_ROUND_IS_FEDAVG)


@every_rule
def test_a_declared_raw_weight_gives_the_same_as_the_vectors(make):
    rule = make()
    if rule.unnormalized_weight is None:
        with pytest.raises(RuntimeError, match="not kept, but it then asked for"):
            accumulated(rule)
        return
    assert torch.allclose(accumulated(rule).parameters, play(rule, rounds=1)[0].parameters, atol=1e-6)


def accumulated(rule):
    start = torch.linspace(-1, 1, P)
    given = cohort(0, start)
    weigh = rule.unnormalized_weight or (lambda update: float(update.num_examples))
    rows = zip(given.clients, given.num_examples, given.num_steps, given.vectors.matrix, strict=True)
    updates = [ClientUpdate(int(k), int(n), int(s), 0, row, num_batches=int(k) + 1) for k, n, s, row in rows]
    raw = torch.tensor([weigh(update) for update in updates], dtype=torch.float64)
    total = (raw[:, None] * given.vectors.matrix.double()).sum(0).float()
    summed = replace(given, vectors=AccumulatedVectors(total, raw, start, type(rule).__name__))
    return rule.step(summed, rule.init(start, torch.tensor([10, 20, 30])), Server())


# ---------------------------------------------------------------------- rows that are spread over processes


def all_rules(ranks=None):
    """Three rounds of every rule; the last one's parameters, weights, metrics, and state as a checkpoint has it."""
    ends = {}
    for name, make in RULES.items():
        rule, start = make(), torch.linspace(-1, 1, P)
        rule.state = rule.init(start, torch.tensor([10, 20, 30, 40]))
        for t in range(3):
            given = cohort(t, start, clients=(0, 1, 3))
            if ranks is not None:
                owners = [(t + slot) % ranks.size for slot in range(3)]
                mine = [slot for slot, owner in enumerate(owners) if owner == ranks.rank]
                rows = SpreadVectors(given.vectors.matrix[mine], start, owners, ranks, ordered=True)
                given = replace(given, vectors=rows)
            step = rule.step(given, rule.state, Server())
            start, rule.state = step.parameters, step.state
        ends[name] = (start, step.weights, dict(step.metrics), rule.state_dict())
    return ends


def tensors(tree):
    """The tensors in a state, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for value in (tree.values() if isinstance(tree, dict) else ()) for leaf in tensors(value)]


def work(rank, size, store, path):
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    torch.save(all_rules(Ranks(rank, size)), f"{path}{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_rows_on_several_processes_give_what_one_gives(tmp_path):
    arguments = (2, str(tmp_path / "store"), str(tmp_path / "end"))
    torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="fork")
    one = all_rules()
    for rank in range(2):
        other = torch.load(tmp_path / f"end{rank}")
        for name, (parameters, weights, metrics, state) in one.items():
            assert torch.allclose(other[name][0], parameters, rtol=1e-6, atol=1e-7), name
            assert torch.allclose(other[name][1], weights, rtol=1e-6), name
            assert other[name][2] == pytest.approx(metrics, rel=1e-5), name
            if rank == 0:  # which writes checkpoints
                torch.testing.assert_close(tensors(other[name][3]), tensors(state), rtol=1e-5, atol=1e-7, msg=name)


# ---------------------------------------------------------------------- real federations


def needs_proxy(rule):
    return hasattr(rule, "server_epochs") or isinstance(rule, FedVGCallback)


def data_for(rule):
    if needs_proxy(rule):
        return FederatedDataModule(samples(150), batch_size=8, proxy=30)
    return loader()


def federation(rule, **options):
    """A trainer with what the rule needs."""
    if rule.needs_held_out_data:
        options["client_val_fraction"] = 0.2
    return trainer(rule=rule, **{"client_eval": False, **options})


@in_federations
def test_the_vectorized_engine_gives_what_the_sequential_one_gives(name):
    ends = []
    for engine in ("sequential", "vectorized"):
        module, rule = Classifier(), IN_FEDERATIONS[name]()
        federation(rule, engine=engine).fit(module, data_for(rule))
        ends.append(flat(module))
    # FedBE's samples spread by the root of a difference of nearly equal numbers, and Adam steps on what comes of it.
    assert torch.allclose(*ends, rtol=1e-4, atol=2e-3 if name == "FedBE" else 1e-5)


class Loses(Channel):
    """Loses client 2 in all rounds but the first."""

    def outage(self, round_idx, clients, seed):
        return torch.tensor([round_idx > 0 and client == 2 for client in clients])


class WithoutTwo:
    """Draws everybody in the first round, and all but client 2 afterwards."""

    def sample(self, round_idx, *, num_clients, sizes, seed):
        return [client for client in range(num_clients) if round_idx == 0 or client != 2]


@in_federations
def test_a_client_that_is_absent_equals_one_that_does_not_arrive(name):
    ends = []
    for options in ({"callbacks": [Loses(fallback="discard")]}, {"sampler": WithoutTwo()}):
        module, rule = Classifier(), IN_FEDERATIONS[name]()
        federation(rule, **options).fit(module, data_for(rule))
        ends.append(flat(module))
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- clients that fail


OWN = [range(30 * k, 30 * k + 30) for k in range(4)]


def with_a_broken_client():
    """Client 1's samples are NaN, and so is what it trains; the server's own are sound."""
    x, y = (tensor.clone() for tensor in samples().tensors)
    x[OWN[1]] = float("nan")
    return FederatedDataModule(TensorDataset(x, y), partitioner=IndexPartitioner(OWN), batch_size=8, proxy=samples(30))


class WithoutOne:
    def sample(self, round_idx, *, num_clients, sizes, seed):
        return [client for client in range(num_clients) if client != 1]


@pytest.mark.filterwarnings("ignore:Client 1 answered the probe")
@in_federations
def test_a_nan_is_reported_and_never_averaged_in(name):
    ends, broken = [], {"num_clients": None, "alpha": None}
    for options in ({}, {"sampler": WithoutOne()}):
        module, rule = Classifier(), IN_FEDERATIONS[name]()
        told = pytest.warns(UserWarning, match=r"lient 1 .*in round \d .*was left out of the aggregation")
        with nullcontext() if options else told:
            runner = federation(rule, rounds=2, **broken, **options)
            runner.fit(module, with_a_broken_client())
        summary = runner.federation_summary
        excluded = summary["nonfinite_updates"] + summary.get("nonfinite_answers", 0)
        assert excluded == (0 if options else 2)
        ends.append(flat(module))
    assert torch.isfinite(ends[0]).all()
    assert torch.equal(*ends)


class Silence(Channel):
    """Loses everybody in round 1."""

    def outage(self, round_idx, clients, seed):
        return torch.full((len(clients),), round_idx == 1)


class Spoils(Channel):
    """What arrives in round 1 is NaN."""

    def transmit(self, message, *, round_idx, client, seed):
        return message * float("nan") if round_idx == 1 else message


class Diary(FederatedCallback):
    """Keeps model and rule state after every round."""

    def __init__(self, rule):
        self.rule, self.pages = rule, []

    def on_round_end(self, trainer, pl_module, report):
        self.pages.append((flat(pl_module), copy.deepcopy(self.rule.state)))


@pytest.mark.filterwarnings("ignore:No finite answer of the probe was received in round 1")
@in_federations
def test_with_a_cohort_that_changes_a_round_in_which_all_clients_are_lost_loses_nothing(name):
    module, rule = Classifier(), IN_FEDERATIONS[name]()
    diary = Diary(rule)
    changing = NEEDS_CLIENTS.get(name, 2)
    runner = federation(rule, rounds=4, clients_per_round=changing, callbacks=[Silence(), diary])
    with pytest.warns(
        UserWarning, match="No client update was received in round 1: the global model and the rule's state stay"
    ):
        runner.fit(module, data_for(rule))
    (first, before), (second, after), (third, _), (last, _) = diary.pages
    assert torch.equal(first, second)
    assert_same(before, after)
    assert not torch.equal(second, third), "the next round goes on"
    assert torch.isfinite(last).all()
    assert (last - flat(Classifier())).abs().max() > 1e-2
    assert runner.federation_summary["rounds"] == 4


@pytest.mark.filterwarnings("ignore:Client . returned non-finite", "ignore:The answer of client")
@in_federations
def test_a_round_in_which_all_clients_return_nan_ends_the_run_and_loses_nothing(name):
    module, rule = Classifier(), IN_FEDERATIONS[name]()
    diary = Diary(rule)
    told = r"Every client of round 1 returned non-finite values, .* \(.*lient 0 .* Lower the"
    with pytest.raises(FloatingPointError, match=told):
        federation(rule, rounds=3, callbacks=[Spoils(), diary]).fit(module, data_for(rule))
    ((parameters, state),) = diary.pages
    assert torch.equal(flat(module), parameters)
    assert_same(rule.state, state)


# ---------------------------------------------------------------------- runs that are stopped and resumed


READERS = ("SCAFFOLD", "FedNova", "FedHyper G+CL", "FedHAW published by steps")
"""Rules that read the clients' optimizers."""


@pytest.mark.parametrize(
    ("name", "engine", "precision"),
    sorted({*rotated(IN_FEDERATIONS), *((name, *combination) for name in READERS for combination in COMBINATIONS)}),
)
def test_a_run_that_is_resumed_gives_the_bits_of_one_that_was_not(name, engine, precision):
    data = loader(60)
    options = {}
    if name in BILEVEL:
        options["client_val_fraction"] = 0.2
    if needs_proxy(IN_FEDERATIONS[name]()):
        data = FederatedDataModule(samples(70), batch_size=8, proxy=10)
    check_resume(lambda: [IN_FEDERATIONS[name]()], data, engine=engine, precision=precision, **options)
