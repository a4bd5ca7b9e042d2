"""What every rule promises, asked of every rule. A new rule is one new row."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from federations import Classifier, flat, loader, samples, trainer
from lightning_fedhaw import (
    ClientVectors,
    Cohort,
    FedAvgCallback,
    FedBECallback,
    FedDFCallback,
    FederatedDataModule,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    ParameterLayout,
    ServerFineTuningCallback,
)
from lightning_fedhaw.cohort import AccumulatedVectors

P = 7


def logits(module, batch):
    return module.net(batch[0])


FEW = {"server_epochs": 4, "lr": 0.05}
RULES = {
    "FedAvg": FedAvgCallback,
    "FedAvg uniform": lambda: FedAvgCallback(weighting="uniform"),
    "FedHAW": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1),
    "FedHAW exact": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, jacobian="exact"),
    "FedHAW by lr": lambda: FedHAWCallback(lr_gamma=1e-4, lr_lambda=1e-3, normalise_by="lr"),
    "FedHAW plain": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, pseudo_gradient="plain"),
    "FedHAW Adam": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, hyper_optimizer=torch.optim.Adam),
    "FedHAW bounded": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, scale_bounds=(0.99, 1.01)),
    "FedHAW on host": lambda: FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1, memory="host"),
    "FedLAW": lambda: FedLAWCallback(**FEW),
    "FedLAW scale": lambda: FedLAWCallback("scale", **FEW),
    "FedLAW weights": lambda: FedLAWCallback("weights", **FEW),
    "FedLAW in stages": lambda: FedLAWCallback("in_stages", server_epochs=16),
    "FedLAW in stages, weights first": lambda: FedLAWCallback("in_stages", first_stage="weights", server_epochs=16),
    "FedLAW quadratic": lambda: FedLAWCallback(base="quadratic", weighting="uniform", **FEW),
    "FedHyper": FedHyperCallback,
    "FedHyper uniform": lambda: FedHyperCallback(weighting="uniform", alpha_bounds=(0.2, 5.0)),
    "FedHyper by cosine": lambda: FedHyperCallback(normalise="cos", hyper_lr=0.1),
    "FedHyper G+SL": lambda: FedHyperCallback("G+SL"),
    "FedHyper G+CL": lambda: FedHyperCallback("G+CL", normalise="cos", hyper_lr=0.1),
    "Server fine-tuning": lambda: ServerFineTuningCallback(**FEW),
    "FedDF": lambda: FedDFCallback(logits=logits, **FEW),
    "FedBE": lambda: FedBECallback(logits=logits, samples=2, ensemble="probabilities", **FEW),
}
NEUTRAL = {
    "FedAvg": FedAvgCallback,
    "FedHAW without steps": lambda: FedHAWCallback(lr_gamma=0.0, lr_lambda=0.0),
    "FedHAW exact without steps": lambda: FedHAWCallback(lr_gamma=0.0, lr_lambda=0.0, jacobian="exact"),
    "FedLAW without steps": lambda: FedLAWCallback(server_epochs=0),
    "FedLAW that learns nothing": lambda: FedLAWCallback("nothing"),
    "FedHyper within bounds of 1": lambda: FedHyperCallback(alpha_bounds=(1.0, 1.0)),
    "FedHyper without steps": lambda: FedHyperCallback(hyper_lr=0.0),
    "Server fine-tuning without steps": lambda: ServerFineTuningCallback(0),
    "FedDF without steps": lambda: FedDFCallback(0),
    "FedBE without steps": lambda: FedBECallback(0),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())


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


def cohort(round_: int, start: Tensor, clients=(0, 1, 2), order=None, dtype=torch.float32) -> Cohort:
    """Each client's update depends on its number and the round alone."""
    clients = list(clients if order is None else [clients[i] for i in order])
    rows = [torch.randn(P, generator=torch.Generator().manual_seed(10 * round_ + k)) for k in clients]
    return Cohort(
        round=round_,
        clients=torch.tensor(clients),
        num_examples=torch.tensor([10 * (k + 1) for k in clients]),
        num_steps=torch.tensor([k + 2 for k in clients]),
        heard=torch.ones(len(clients), dtype=torch.bool),
        start=start,
        vectors=ClientVectors(0.1 * torch.stack(rows).to(dtype), start),
        learning_rates=(0.1, 0.1),
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
    assert old.keys() == state.keys()
    for key, value in old.items():
        if isinstance(value, ClientVectors):
            assert torch.equal(value.matrix, state[key].matrix)
            assert torch.equal(value.start, state[key].start)
        else:
            assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]


@every_rule
def test_the_order_of_clients_does_not_matter(make):
    straight, turned = play(make()), play(make(), order=(2, 0, 1))
    assert torch.allclose(straight[-1].parameters, turned[-1].parameters, atol=1e-6)
    assert torch.allclose(straight[-1].weights[torch.tensor([2, 0, 1])], turned[-1].weights, atol=1e-9)


@every_rule
def test_one_client_alone_gets_all_the_weight(make):
    for step in play(make(), clients=(1,)):
        assert step.weights.tolist() == [1.0]
        assert torch.isfinite(step.parameters).all()


@every_rule
def test_clients_may_come_and_go(make):
    rule, start = make(), torch.linspace(-1, 1, P)
    state = rule.init(start, torch.tensor([10, 20, 30, 40]))
    for t, clients in enumerate([(0, 1), (3,), (1, 2, 3), (0,)]):
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


@pytest.mark.parametrize("make", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_the_neutral_setting_is_fedavg(make):
    for step, reference in zip(play(make()), play(FedAvgCallback()), strict=True):
        assert torch.allclose(step.parameters, reference.parameters, atol=1e-6)
        assert torch.allclose(step.weights, reference.weights, atol=1e-12)


@every_rule
def test_the_first_round_is_an_average(make):
    rule = make()
    if getattr(rule, "server_epochs", 0):
        pytest.skip("learns in the first round")
    (step,) = play(rule, rounds=1)
    weighting = getattr(rule, "weighting", "examples")
    (reference,) = play(FedAvgCallback(weighting=weighting), rounds=1)
    assert torch.allclose(step.parameters, reference.parameters, atol=1e-6)


@every_rule
def test_a_declared_raw_weight_gives_the_same_as_the_vectors(make):
    rule = make()
    if rule.raw_weight is None:
        with pytest.raises((TypeError, RuntimeError)):
            accumulated(rule)
        return
    assert torch.allclose(accumulated(rule).parameters, play(rule, rounds=1)[0].parameters, atol=1e-6)


def accumulated(rule):
    from dataclasses import replace

    start = torch.linspace(-1, 1, P)
    given = cohort(0, start)
    raw = given.num_examples.double() if getattr(rule, "weighting", "") != "uniform" else torch.ones(3).double()
    total = (raw[:, None] * given.vectors.matrix.double()).sum(0).float()
    summed = replace(given, vectors=AccumulatedVectors(total, raw, start, type(rule).__name__))
    return rule.step(summed, rule.init(start, torch.tensor([10, 20, 30])), Server())


@every_rule
def test_in_a_federation_with_a_cohort_that_changes(make):
    module, rule = Classifier(), make()
    runner = trainer(rounds=4, rule=rule, clients_per_round=2)
    data = FederatedDataModule(samples(150), batch_size=8, proxy=30) if hasattr(rule, "server_epochs") else loader()
    runner.fit(module, data)
    assert torch.isfinite(flat(module)).all()
    assert (flat(module) - flat(Classifier())).abs().max() > 1e-2
    assert runner.federation_summary["rounds"] == 4
