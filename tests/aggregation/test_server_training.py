"""Server fine-tuning, FedDF and FedBE: hand-worked numbers, federations, and what they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from federations import Classifier, flat, loader, samples, train, trainer
from lightning_fedhaw import (
    FedAvgCallback,
    FedBECallback,
    FedDFCallback,
    FederatedDataModule,
    FedHAWCallback,
    FedLAWCallback,
    ServerFineTuningCallback,
)
from lightning_fedhaw.aggregation.fedbe import _sampled_model, swag
from lightning_fedhaw.aggregation.proxy import batches
from lightning_fedhaw.aggregation.servertraining import divergence, ensemble
from lightning_fedhaw.extending import ParameterLayout
from lightning_fedhaw.server import Server


class Model(Classifier):
    """With a forward."""

    def forward(self, x):
        return self.net(x)


RULES = {
    "fine-tuning": partial(ServerFineTuningCallback, 5),
    "FedDF": partial(FedDFCallback, 5),
    "FedBE": partial(FedBECallback, 5),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())


def tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def fit(rule, module=None, proxy=30, rounds=3, **kwargs):
    module = module or Model()
    runner = trainer(rounds=rounds, rule=rule, **kwargs)
    runner.fit(module, FederatedDataModule(samples(150), batch_size=8, proxy=proxy))
    return runner, module


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("kind", "teacher", "loss"),
    [
        ("logits", [0.54654939, 0.33149896, 0.12195165], 0.06618835),
        ("probabilities", [0.52786815, 0.34515604, 0.12697581], 0.05503825),
    ],
)
def test_the_teacher_and_the_divergence(kind, teacher, loss):
    taught = ensemble([tensor([[2.0, 0.0, -1.0]]), tensor([[0.0, 1.0, 0.0]])], kind)
    student = tensor([[0.5, 0.5, 0.0]]).requires_grad_()
    found = divergence(student, taught)
    assert taught[0].tolist() == pytest.approx(teacher, abs=1e-8)
    assert found.item() == pytest.approx(loss, abs=1e-8)
    if kind == "logits":
        found.backward()
        assert student.grad[0].tolist() == pytest.approx([-0.16289766, 0.05215277, 0.11074489], abs=1e-8)


def test_the_divergence_is_a_mean_over_samples():
    student, teacher = torch.randn(5, 3), torch.softmax(torch.randn(5, 3), -1)
    each = [divergence(student[i : i + 1], teacher[i : i + 1]) for i in range(5)]
    assert torch.allclose(divergence(student, teacher), torch.stack(each).mean())


def test_a_sample_of_a_tensor():
    moved = tensor([[3.0, 4.0], [1.0, 0.0]])
    assert swag(moved, tensor([0.0, 0.0])).tolist() == pytest.approx([2.4, 1.2])
    assert swag(moved, tensor([1.0, -1.0])).tolist() == pytest.approx([2.46, 1.08])
    assert swag(tensor([[3.0, 4.0], [0.0, 0.0]]), tensor([0.0, 0.0])) is None
    # All clients agree: the variance is at its floor.
    assert swag(tensor([[1.0, 0.0], [1.0, 0.0]]), tensor([1.0, 0.0]))[0].item() == pytest.approx(1 + 0.1 * 1e-5**0.5)


def test_fedbe_takes_a_parameter_without_dimensions():
    """Four clients moved it by 1: the sample moves by 1 + 0.1 sqrt(1e-5) e."""

    class Scaled(Model):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.net(x) * self.temperature

    layout = ParameterLayout.of(Scaled())
    start = torch.zeros(layout.numel)
    noise = torch.full((layout.numel,), 2.0)
    drawn = layout.views(_sampled_model(start, start, torch.ones(4, layout.numel), noise, layout))["temperature"]
    assert drawn.shape == ()
    assert drawn.item() == pytest.approx(1 + 0.1 * 1e-5**0.5 * 2)
    data = FederatedDataModule(samples(), proxy=samples(20, seed=2), batch_size=8)
    runner, module = train(Scaled(), data, rounds=1, rule=FedBECallback(2))
    assert runner.global_step == 1
    assert module.temperature.item() != 1


def test_batches_are_as_equal_as_can_be_and_drawn_by_name():
    class View:
        seed, proxy_dataset = 0, range(9)

        def proxy_batch(self, index):
            return index * 10

    view = View()
    plain = list(batches(view, 4))
    assert [len(index) for index, _ in plain] == [3, 3, 3]
    assert torch.cat([index for index, _ in plain]).tolist() == list(range(9))
    assert all(torch.equal(batch, index * 10) for index, batch in plain)
    drawn = [torch.cat([i for i, _ in batches(view, 4, "epoch", e)]).tolist() for e in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(9))


# ---------------------------------------------------------------------- predictions of any model


def test_predictions_of_other_parameters_and_buffers():
    module = Model(norm=True, dropout=0.5)
    layout = ParameterLayout.of(module)
    server = Server(module, layout)
    x, y = samples(10).tensors
    vector = (server.parameters() + 0.1).requires_grad_()
    buffers = {name: b + 1 for name, b in module.named_buffers() if b.is_floating_point()}
    module.net[2].training = False
    modes = [m.training for m in module.modules()]
    found = server.predict(vector, [x, y], buffers=buffers)
    assert [m.training for m in module.modules()] == modes
    assert all((b == server.buffers[n]).all() for n, b in module.named_buffers())

    other = Model(norm=True, dropout=0.5).eval()
    layout.write(vector, layout.tensors(other))
    for name, value in buffers.items():
        other.get_buffer(name).copy_(value)
    assert torch.equal(found, other(x))
    found.sum().backward()
    assert vector.grad.abs().sum() > 0
    assert torch.equal(server.predict(vector, [x, y], lambda m, batch: m.net(batch[0]), buffers=buffers), found)
    assert not torch.equal(server.predict(vector, [x, y], buffers=buffers, training=True), found)
    with pytest.raises(TypeError, match="predictions must be a tensor"):
        server.predict(vector, [x, y], lambda m, batch: (1, 2))


class FrozenBackbone(Model):
    """A backbone as pretrained ones are used: without gradients, in evaluation mode, with statistics of other data."""

    def __init__(self):
        super().__init__(norm=True, dropout=0.2)
        self.net[:2].requires_grad_(False).eval()
        self.net[1].running_mean.fill_(3.0)
        self.seen = []
        for layer in (self.net[1], self.net[3]):
            layer.register_forward_pre_hook(lambda layer, _: self.seen.append((type(layer).__name__, layer.training)))


@pytest.mark.parametrize(
    "make",
    [*RULES.values(), partial(FedLAWCallback, server_epochs=2), FedHAWCallback],
    ids=[*RULES.keys(), "FedLAW", "FedHAW"],
)
@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_frozen_layers_stay_in_the_mode_in_which_they_were(make, buffers):
    module = FrozenBackbone()
    modes = [layer.training for layer in module.modules()]
    fit(make(), module, rounds=2, buffers=buffers, engine="sequential")
    assert ("BatchNorm1d", True) not in module.seen
    assert {("BatchNorm1d", False), ("Dropout", True)} <= set(module.seen)
    assert torch.equal(module.net[1].running_mean, torch.full((8,), 3.0))
    assert [layer.training for layer in module.modules()] == modes


def test_what_a_training_step_logs_and_counts_goes_nowhere():
    class Counting(Model):
        def training_step(self, batch, batch_idx):
            self.log_dict({"a": 1.0})
            self.accuracy.update(self.net(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    module = Counting()
    server = Server(module, ParameterLayout.of(module))
    server.loss(server.parameters(), list(samples(10).tensors))
    assert module.accuracy.tp.sum() == 0
    assert not module.accuracy.update_called
    assert "log" not in vars(module)


# ---------------------------------------------------------------------- federations


@every_rule
def test_training_lowers_the_loss_and_changes_the_model(make):
    rule = make(batch_size=16)
    runner, module = fit(rule, Model(norm=True, dropout=0.2))
    metrics = runner.callback_metrics
    assert float(metrics["proxy_loss_after"]) < float(metrics["proxy_loss_before"])
    plain = fit(FedAvgCallback(), Model(norm=True, dropout=0.2))[1]
    assert not torch.equal(flat(module), flat(plain))
    assert torch.equal(flat(module), flat(fit(make(batch_size=16), Model(norm=True, dropout=0.2))[1]))


@every_rule
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_in_other_precisions(make, precision):
    runner, module = fit(make(), Model(norm=True), rounds=1, precision=precision)
    assert torch.isfinite(flat(module)).all()
    assert float(runner.callback_metrics["proxy_loss_after"]) > 0


def test_manual_optimization_has_no_loss_to_train_on():
    class Manual(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="with `automatic_optimization=False`, `training_step` has no loss"):
        fit(ServerFineTuningCallback(), Manual())


def test_fine_tuning_by_hand():
    rule = ServerFineTuningCallback(3, optimizer=torch.optim.SGD, lr=0.1, batch_size=64)
    ours = fit(rule, rounds=1)[1]
    theirs, data = fit(FedAvgCallback(), rounds=1)[1], FederatedDataModule(samples(150), batch_size=8, proxy=30)
    x, y = map(torch.stack, zip(*data.proxy_dataset, strict=True))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    assert torch.allclose(flat(ours), flat(theirs), atol=1e-6)


def test_distillation_by_hand():
    """Teachers are the clients' models, each with its own buffers, in evaluation mode."""
    kept = []

    class Keep(FedDFCallback):
        def step(self, cohort, state, server):
            kept.append((cohort, server))
            return super().step(cohort, state, server)

    rule = Keep(4, optimizer=torch.optim.SGD, lr=0.1, batch_size=64)
    ours = fit(rule, Model(norm=True), rounds=1)[1]
    (cohort, server), theirs = kept[0], fit(FedAvgCallback(), Model(norm=True), rounds=1)[1]
    x = torch.stack([sample[0] for sample in server.proxy_dataset])
    layout, logits = server.layout, []
    for row, buffers in zip(cohort.vectors.gather(), cohort.buffers, strict=True):
        teacher = Model(norm=True).eval()
        layout.write(row, layout.tensors(teacher))
        for name, value in buffers.items():
            teacher.get_buffer(name).copy_(value)
        logits.append(teacher(x))
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    target = torch.softmax(torch.stack(logits).mean(0), -1).detach()
    buffers = {n: b.clone() for n, b in theirs.named_buffers()}
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    theirs.train()
    for _ in range(4):
        optimizer.zero_grad()
        divergence(theirs(x), target).backward()
        optimizer.step()
    for name, value in buffers.items():
        theirs.get_buffer(name).copy_(value)
    assert torch.allclose(flat(ours), flat(theirs), atol=1e-5)


def test_the_bayesian_ensemble_has_average_clients_and_samples():
    kept = []

    class Keep(FedBECallback):
        def teachers(self, cohort, weights, average, server):
            found = list(super().teachers(cohort, weights, average, server))
            kept.append((cohort, average, found))
            return found

    fit(Keep(2, samples=2), rounds=1)
    cohort, average, found = kept[0]
    assert len(found) == 1 + len(cohort) + 2
    assert torch.equal(found[0][0], average)
    assert torch.allclose(torch.stack([vector for vector, _ in found[1:-2]]), cohort.vectors.gather())
    first, second = found[-2][0], found[-1][0]
    assert not torch.equal(first, second)
    # A sample is about as far from the start as the clients are.
    lengths = cohort.vectors.displacements.norms()
    assert 0.2 * lengths.min() < (first - cohort.start).norm() < 1.5 * lengths.max()


def test_a_tensor_that_a_client_did_not_change_is_the_averages():
    class Still(Model):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.ones(3))

    _, module = fit(FedBECallback(2), Still())
    assert torch.isfinite(flat(module)).all()


def test_labels_are_not_needed_for_distillation():
    x = samples(30, seed=7).tensors[0]
    fit(FedDFCallback(3), proxy=TensorDataset(x), rounds=1)
    fit(FedDFCallback(3, logits=lambda module, batch: module.net(batch[0])), Classifier(), rounds=1)


def test_a_descent_that_diverges_is_refused():
    with pytest.warns(UserWarning, match="ServerFineTuningCallback's training on the server diverged in round 0"):
        ours = fit(ServerFineTuningCallback(3, optimizer=torch.optim.SGD, lr=1e38), rounds=1)
    assert torch.equal(flat(ours[1]), flat(fit(FedAvgCallback(), rounds=1)[1]))
    assert float(ours[0].callback_metrics["server_steps_refused"]) == 1


NO_LABELS = TensorDataset(samples(30).tensors[0], torch.full((30,), -100))
NO_NUMBERS = TensorDataset(torch.full((30, 6), torch.nan), samples(30).tensors[1])


@pytest.mark.parametrize(
    ("make", "proxy", "message"),
    [
        (
            RULES["fine-tuning"],
            NO_LABELS,
            r"ServerFineTuningCallback's .* no finite loss .*nan\) in round 0 .* refused",
        ),
        (
            partial(FedLAWCallback, server_epochs=5),
            NO_LABELS,
            "FedLAW's descent of round 0 .* loss before: nan.* refused",
        ),
        (RULES["FedDF"], NO_NUMBERS, r"FedDFCallback's .* no finite loss .*nan\) in round 0 .* refused"),
        (RULES["FedBE"], NO_NUMBERS, r"FedBECallback's .* no finite loss .*nan\) in round 0 .* refused"),
    ],
)
def test_a_proxy_loss_that_is_no_number_is_reported_and_the_round_is_fedavgs(make, proxy, message):
    with pytest.warns(UserWarning, match=message) as caught:
        runner, module = fit(make(), proxy=proxy, rounds=1)
    assert len([w for w in caught if "refused" in str(w.message)]) == 1
    assert torch.allclose(flat(module), flat(fit(FedAvgCallback(), proxy=proxy, rounds=1)[1]), atol=1e-6)
    assert float(runner.callback_metrics["server_steps_refused"]) == 1


@every_rule
def test_data_that_is_missing_empty_or_does_not_fit_is_refused_before_the_first_round(make):
    module = Model()
    before = flat(module)
    with pytest.raises(ValueError, match="works with data of the server's own, and there is none"):
        train(module, loader(), rule=make())
    with pytest.raises(ValueError, match="`proxy` must have at least one sample"):
        fit(make(), module, proxy=Subset(samples(9), []))
    with pytest.raises(ValueError, match="cannot use the data given as `proxy`"):
        fit(make(), module, proxy=TensorDataset(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)))
    assert torch.equal(flat(module), before)


def test_fine_tuning_refuses_unknown_labels():
    unknown = TensorDataset(torch.zeros(3, 6), torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match=r"\(with labels from 0 to 7\): Target 7 is out of bounds"):
        fit(ServerFineTuningCallback(), proxy=unknown)


@pytest.mark.parametrize("make", [FedDFCallback, FedBECallback])
def test_a_module_without_forward_is_refused(make):
    with pytest.raises(
        ValueError, match="needs the model's logits, and Classifier has no `forward`. Define it, or give"
    ):
        fit(make(), Classifier())


@every_rule
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="`weighting` must be one of 'examples', 'uniform', got 'steps'"):
        make(weighting="steps")
    with pytest.raises(ValueError, match="`lr` must be a finite number above 0, got -1"):
        make(lr=-1)
    with pytest.raises(TypeError, match="`optimizer` must make an optimizer"):
        make(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    if make is not RULES["fine-tuning"]:
        with pytest.raises(ValueError, match="`ensemble` must be one of 'logits', 'probabilities', got 'votes'"):
            make(ensemble="votes")
