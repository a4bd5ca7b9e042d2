"""FedLAW: hand-worked numbers on a quadratic loss, schedules, real federations, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from federations import Classifier, flat, samples, trainer
from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FedLAWCallback
from lightning_fedhaw.aggregation.fedlaw import mix, swa_rate, variables
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout

MODELS, TARGET, SIZES = [[1.0, 2.0], [3.0, -1.0]], [2.0, 0.0], [1, 3]
FULL = {"rtol": 0, "atol": 1e-8}


def tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


class Quadratic:
    """The server of a proxy loss 0.5 |w - b|^2."""

    layout = ParameterLayout.of(nn.Linear(1, 1).double())
    seed = 0
    proxy_dataset = range(1)

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.passes = factor, 0

    def proxy_batch(self, index):
        return index

    def loss(self, vector, batch, batch_idx=0):
        self.passes += vector.requires_grad
        return self.factor * 0.5 * (vector - tensor(TARGET)).square().sum()


def make_cohort(models=MODELS, sizes=SIZES) -> Cohort:
    count, start = len(models), tensor([0.5, 0.25])
    return Cohort(
        round=0,
        clients=torch.arange(count),
        num_examples=torch.tensor(sizes),
        num_steps=torch.ones(count, dtype=torch.int64),
        received=torch.ones(count, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(tensor(models) - start, start),
    )


def learned(rule, server=None, **cohort):
    step = rule.step(make_cohort(**cohort), {}, server or Quadratic())
    return step.metrics["scale"], step.weights, step


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("base", "sizes", "loss", "grad_x", "grad_c"),
    [
        ("exponential", SIZES, 0.15625, [-0.328125, 0.328125], 1.3125),
        ("quadratic", [1, 1], 0.125, [1.5 / 2**0.5, -1.5 / 2**0.5], 0.5),
    ],
)
def test_loss_and_gradients_at_the_start(base, sizes, loss, grad_x, grad_c):
    shares = tensor(sizes) / sum(sizes)
    x, x_c = (v.requires_grad_() for v in variables(shares, 1.0, base))
    s, c = mix(x, x_c, base)
    value = Quadratic().loss(make_cohort().vectors.weighted_sum(c * s), None)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.allclose(x.grad, tensor(grad_x), **FULL)
    assert x_c.grad.item() == pytest.approx(grad_c, abs=1e-12)


def test_quadratic_gradients_at_one_half():
    x, x_c = tensor([0.5, 0.5]).requires_grad_(), tensor(1.0).requires_grad_()
    s, c = mix(x, x_c, "quadratic")
    Quadratic().loss(make_cohort().vectors.weighted_sum(c * s), None).backward()
    assert torch.allclose(x.grad, tensor([1.5, -1.5]), **FULL)
    assert x_c.grad.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("epochs", "scale", "shares"),
    [(1, 0.99004983, [0.25376872, 0.74623128]), (100, 0.85372305, [0.32685789, 0.67314211])],
)
def test_both_learned_by_adam(epochs, scale, shares):
    found, weights, step = learned(FedLAWCallback(server_epochs=epochs))
    assert found == pytest.approx(scale, abs=1e-8)
    assert torch.allclose(weights, tensor(shares), **FULL)
    assert torch.allclose(step.parameters, scale * tensor(shares) @ tensor(MODELS), atol=1e-7)
    assert step.metrics["proxy_loss_before"] == pytest.approx(0.15625)
    assert step.metrics["proxy_loss_after"] < 0.15625


def test_optima():
    """Any optimizer will do, and this one is there in a few steps."""
    lbfgs = partial(torch.optim.LBFGS, tolerance_grad=1e-10, tolerance_change=1e-14)
    quick = {"optimizer": lbfgs, "lr": 1.0, "scheduler": None, "server_epochs": 20}
    scale, weights, _ = learned(FedLAWCallback(**quick))
    assert scale == pytest.approx(6 / 7, abs=1e-6)
    assert torch.allclose(weights, tensor([1 / 3, 2 / 3]), atol=1e-6)
    scale, weights, _ = learned(FedLAWCallback("scale", **quick))
    assert scale == pytest.approx(0.79207921, abs=1e-7)
    assert weights.tolist() == pytest.approx([0.25, 0.75])
    scale, weights, _ = learned(FedLAWCallback("weights", **quick))
    assert scale == 1.0
    assert weights[0].item() == pytest.approx(0.38461538, abs=1e-7)


def test_a_fixed_scale_needs_no_server_data():
    scale, weights, step = learned(FedLAWCallback("nothing", scale=0.95), server=object())
    assert scale == pytest.approx(0.95)
    assert torch.allclose(step.parameters, 0.95 * tensor([0.25, 0.75]) @ tensor(MODELS))
    assert weights.tolist() == [0.25, 0.75]


def test_the_schedule_of_the_averaging_stage():
    expected = [0.01, 0.009998, 0.00999, 0.009978, 0.009961, 0.009938, 0.009911, 0.010892, 0.01374, 0.018174]
    expected += [0.023762, 0.029956, 0.03615, 0.041737, 0.046172, 0.049019, 0.05, 0.05]
    assert [round(swa_rate(e, 0.01, 0.05), 6) for e in range(18)] == pytest.approx(expected, abs=1e-6)


def test_the_schedule_is_that_of_torch():
    x = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([x], lr=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    rates = []
    for epoch in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (swa if epoch > 5 else cosine).step()
    assert [swa_rate(e, 0.01, 0.05) for e in range(20)] == pytest.approx(rates, abs=1e-9)


@pytest.mark.parametrize("base", ["exponential", "quadratic"])
@pytest.mark.parametrize("first", ["scale", "weights"])
def test_stages_by_hand(first, base):
    """Once more with torch's own schedules and averages."""
    half, cohort, server = 10, make_cohort(), Quadratic()
    x, x_c = (v.requires_grad_() for v in variables(tensor([0.25, 0.75]), 1.0, base))

    def epoch(optimizer):
        s, c = mix(x, x_c, base)
        optimizer.zero_grad()
        server.loss(cohort.vectors.weighted_sum(c * s), None).backward()
        optimizer.step()

    adam = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999))
    for stage in ("scale", "weights") if first == "scale" else ("weights", "scale"):
        optimizer = adam([x_c if stage == "scale" else x])
        step_lr = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
        seen = []
        for e in range(half):
            if stage == "weights":
                optimizer.param_groups[0]["lr"] = swa_rate(e, 0.01, 0.05)
            epoch(optimizer)
            if stage == "scale":
                step_lr.step()
            elif e > 5:
                seen.append(x.detach().clone())
        if stage == "weights":
            x.data = torch.stack(seen).mean(0)
    s, c = mix(x, x_c, base)
    scale, weights, _ = learned(FedLAWCallback("in_stages", first_stage=first, server_epochs=2 * half, base=base))
    assert scale == pytest.approx(c.item(), abs=1e-12)
    assert torch.allclose(weights, s.detach(), atol=1e-12)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (FedLAWCallback("scale", lr=50.0, server_epochs=1), 1.0),
        (FedLAWCallback("scale", lr=50.0, server_epochs=1), -1.0),
        (FedLAWCallback("scale", base="quadratic", optimizer=torch.optim.SGD, lr=1 / 1.3125 / 2, server_epochs=1), 1.0),
        (FedLAWCallback(server_epochs=2), float("nan")),
    ],
    ids=["vanishes", "overflows", "zero", "not finite"],
)
def test_a_scale_that_leaves_no_model_is_refused(rule, factor):
    if rule.base == "quadratic":  # d/dx_c = 2 x_c <G, u> = 2.625: one step lands on zero
        rule.lr = 1 / (2 * 1.3125)
    with pytest.warns(UserWarning, match="FedLAW's descent of round 0 ended with the scale .* and was refused"):
        scale, weights, step = learned(rule, Quadratic(factor))
    assert scale == 1.0
    assert weights.tolist() == [0.25, 0.75]
    assert step.metrics["server_steps_refused"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"learn": "all"}, "`learn` must be one of 'both', 'scale', 'weights', 'in_stages', 'nothing', got 'all'"),
        ({"base": "cubic"}, "`base` must be one of"),
        ({"weighting": "steps"}, "`weighting` must be one of"),
        ({"first_stage": "both"}, "`first_stage` must be one of"),
        ({"scale": 0.0}, r"`scale` must be a number in \[0.001, 1000\], got 0.0"),
        ({"server_epochs": -1}, "`server_epochs` must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"lr": 0.0}, "`lr` must be a finite number above 0, got 0.0"),
        ({"learn": "in_stages", "server_epochs": 12}, "`server_epochs` must be at least 14 .*, got 12"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        FedLAWCallback(**arguments)


def test_an_optimizer_that_was_already_made_is_refused():
    made = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="`optimizer` must make an optimizer .*, got a ready-made Adam"):
        FedLAWCallback(optimizer=made)


# ---------------------------------------------------------------------- federations


def fit(rule, module=None, proxy=30, rounds=3, **kwargs):
    module = module or Classifier()
    runner = trainer(rounds=rounds, rule=rule, **kwargs)
    runner.fit(module, FederatedDataModule(samples(150), batch_size=8, proxy=proxy))
    return runner, module


def test_it_lowers_the_proxy_loss_of_any_architecture():
    rule = FedLAWCallback(server_epochs=10, batch_size=16)
    runner, _ = fit(rule, Classifier(norm=True, dropout=0.2))
    assert float(runner.callback_metrics["proxy_loss_after"]) < float(runner.callback_metrics["proxy_loss_before"])
    assert runner.federation_summary["scale"] == pytest.approx(float(rule.state["scale"]))


def test_two_runs_are_equal_and_the_order_of_batches_matters():
    # Dropout and the order of the proxy data are drawn by name.
    ends = [flat(fit(FedLAWCallback(server_epochs=3, batch_size=7), Classifier(dropout=0.3))[1]) for _ in range(2)]
    assert torch.equal(*ends)
    other = fit(FedLAWCallback(server_epochs=3, batch_size=7), Classifier(dropout=0.3), seed=5)
    assert not torch.equal(ends[0], flat(other[1]))


def test_training_on_the_server_leaves_the_programs_random_numbers_alone():
    torch.manual_seed(1)
    fit(FedLAWCallback(server_epochs=2), Classifier(dropout=0.3))
    first = torch.rand(3)
    torch.manual_seed(1)
    fit(FedAvgCallback(), Classifier(dropout=0.3))
    assert torch.equal(first, torch.rand(3))


def test_metrics_of_the_clients_do_not_count_proxy_samples():
    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("train_acc", self.accuracy)
            return loss

    ours = fit(FedLAWCallback(server_epochs=3), Counting(), rounds=1)[0].callback_metrics["train_acc"]
    theirs = fit(FedAvgCallback(), Counting(), rounds=1)[0].callback_metrics["train_acc"]
    assert ours == theirs


def test_proxy_data_that_is_missing_empty_or_of_unknown_labels_is_refused_before_the_first_round():
    module = Classifier()
    before = flat(module)
    with pytest.raises(
        ValueError, match="`FedLAWCallback` works with data of the server's own, and there is none: give"
    ):
        fit(FedLAWCallback(), module, proxy=None)
    with pytest.raises(ValueError, match="`proxy` must have at least one sample"):
        fit(FedLAWCallback(), module, proxy=torch.utils.data.Subset(samples(9), []))
    unknown = torch.utils.data.TensorDataset(torch.zeros(4, 6), torch.tensor([0, 1, 3, 2]))
    with pytest.raises(
        ValueError, match=r"cannot use the data given as `proxy` \(with labels from 0 to 3\): Target 3 is"
    ):
        fit(FedLAWCallback(), module, proxy=unknown)
    assert torch.equal(flat(module), before)
    fit(FedLAWCallback("nothing"), module, proxy=None, rounds=1)


def test_data_sets_that_are_not_tensors_in_memory():
    class Items(torch.utils.data.Dataset):
        def __init__(self):
            self.inner = samples(20, seed=4)

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, i):
            return self.inner[i]

    by_item = fit(FedLAWCallback(server_epochs=3, batch_size=8), proxy=Items())
    in_memory = fit(FedLAWCallback(server_epochs=3, batch_size=8), proxy=samples(20, seed=4))
    assert torch.equal(flat(by_item[1]), flat(in_memory[1]))
