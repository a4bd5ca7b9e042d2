"""The curvature of the global model in real federations."""

import logging
from math import isnan

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from federations import Classifier, samples, train, trainer, val_loader
from lightning_fedhaw.diagnostics import Curvature
from lightning_fedhaw.plotting import RunHistory
from observed import proxied

SMALL = {"every_n_rounds": 1, "steps": 6, "trace_samples": 0}


class Counting(Classifier):
    """Counts its steps, draws in evaluation mode, and differs between the modes."""

    def __init__(self):
        super().__init__(norm=True, dropout=0.3)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step((batch[0] + 0.01 * torch.rand_like(batch[0]), batch[1]), batch_idx)


@pytest.mark.parametrize("source", ["validation", "proxy"])
def test_it_is_the_hessian_of_the_model_after_the_round(source):
    run = RunHistory()
    module = Classifier().double()
    curvature = Curvature(1, data=source, samples=1000, batch_size=17, steps=90, trace_samples=30)
    trainer(1, None, [curvature, run], precision="64-true").fit(module, proxied())
    x, y = {"validation": samples(60, seed=1), "proxy": samples(24, seed=5)}[source].tensors
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()

    def loss(flat):
        first, bias, second, other = flat.split([48, 8, 24, 3])
        hidden = torch.relu(x.double() @ first.view(8, 6).T + bias)
        return cross_entropy(hidden @ second.view(3, 8).T + other, y)

    exact = torch.linalg.eigvalsh(hessian(loss, vector)).flip(0)
    row = run.metrics[0]
    for number in range(5):
        assert row[f"diagnostics/curvature/eigenvalue_{number + 1}"] == pytest.approx(exact[number].item(), rel=1e-6)
    assert row["diagnostics/curvature/ratio"] == pytest.approx((exact[0] / exact[4]).item(), rel=1e-5)
    assert row["diagnostics/curvature/residual"] < 1e-6
    error = row["diagnostics/curvature/trace_error"]
    assert abs(row["diagnostics/curvature/trace"] - exact.sum().item()) < 5 * error


def test_it_leaves_no_trace_in_the_module():
    modules = []
    for callbacks in ([], [Curvature(**SMALL)]):
        module = Counting()
        train(module, val=val_loader(), rounds=2, callbacks=callbacks)
        modules.append(module)
    plain, observed = modules
    assert plain.steps == observed.steps > 0
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, observed.state_dict()[name]), name


def test_the_cost_is_said_before_the_first_round(caplog):
    with caplog.at_level(logging.INFO):
        train(val=val_loader(), rounds=1, callbacks=[Curvature(3, steps=7, trace_samples=2)])
    lines = [record.getMessage() for record in caplog.records if "Curvature:" in record.getMessage()]
    assert len(lines) == 1
    assert "after every 3 rounds 9 products with the Hessian on 60 samples, about 18 gradient passes" in lines[0]


def test_validation_that_comes_later_is_found():
    run = RunHistory()
    callbacks = [Curvature(**SMALL), run]
    train(val=val_loader(), rounds=2, callbacks=callbacks, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    assert not isnan(run.curve("diagnostics/curvature/eigenvalue_1")[0])
    assert [isnan(value) for value in run.curve("val_loss")] == [True, False]


class Stream(IterableDataset):
    def __iter__(self):
        yield from samples(20)


@pytest.mark.parametrize("val", [None, DataLoader(Stream(), batch_size=8)])
def test_no_validation_data(val):
    with pytest.raises(ValueError, match="`Curvature` needs validation data, and there is none: .* `data='proxy'`"):
        train(val=val, callbacks=[Curvature(**SMALL)])


def test_no_proxy_data():
    with pytest.raises(ValueError, match="`Curvature` needs proxy data, and there is none: .* `data='validation'`"):
        train(callbacks=[Curvature(data="proxy")])


class FirstDerivative(torch.autograd.Function):
    """A hand-written kernel without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Kernel(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(FirstDerivative.apply(self.net(batch[0])), batch[1])


class Linear(Classifier):
    """A loss whose gradient does not depend on the parameters."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.parameters())


@pytest.mark.parametrize("kind", [Kernel, Linear])
def test_no_second_derivative(kind):
    sentence = "`Curvature` needs the second derivative of the loss, and the module has none: .* remove `Curvature`"
    with pytest.raises(ValueError, match=sentence):
        train(kind(), val=val_loader(), callbacks=[Curvature(**SMALL)])


class Attention(Classifier):
    def training_step(self, batch, batch_idx):
        x = batch[0][:, None, :, None]
        attended = nn.functional.scaled_dot_product_attention(x, x, x)[:, 0, :, 0]
        return cross_entropy(self.net(attended), batch[1])


def test_fused_attention_has_curvature():
    run = RunHistory()
    train(Attention(), val=val_loader(), rounds=1, callbacks=[Curvature(**SMALL), run])
    assert not isnan(run.metrics[0]["diagnostics/curvature/eigenvalue_1"])


def test_samples_that_do_not_fit():
    val = DataLoader(samples(20, features=5), batch_size=8)
    with pytest.raises(ValueError, match="`Curvature` cannot compute the training loss on the validation data: mat1"):
        train(val=val, callbacks=[Curvature(**SMALL)], num_sanity_val_steps=0)


def test_half_precision():
    with pytest.raises(ValueError, match="`Curvature` needs derivatives in full precision, and `precision` is 'bf16"):
        train(val=val_loader(), callbacks=[Curvature(**SMALL)], precision="bf16-mixed")
