"""FedNTD, MOON, and what an objective sees of a batch: numbers by hand, and loops of the papers' formulas."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, flat, samples
from lightning_fedhaw import (
    MOON,
    FedAvgCallback,
    FederatedCallback,
    FederatedTrainer,
    FedNTD,
    FedProx,
    IndexPartitioner,
)
from lightning_fedhaw.extending import ClientObjective, ParameterLayout
from lightning_fedhaw.isolation import substituted_tensors
from lightning_fedhaw.objectives.fedntd import not_true_divergence
from lightning_fedhaw.objectives.moon import contrast
from lightning_fedhaw.server import Server

OWN = [list(range(0, 8)), list(range(8, 20))]
both_engines = pytest.mark.parametrize("engine", ["sequential", "vectorized"])
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


class Net(pl.LightningModule):
    """Keeps statistics, drops nothing, and knows of no federation."""

    def __init__(self, optimizer=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
            self.head = nn.Linear(5, 3)
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.3))
        self.double()

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


DATA = samples(20, dtype=torch.float64)


def fit(*objectives, module=None, rounds=2, callbacks=(), ckpt_path=None, **options):
    module = module or Net()
    options = {**QUIET, "client_eval": False, "partitioner": IndexPartitioner(OWN), **options}
    callbacks = [FedAvgCallback(), *objectives, *callbacks]
    trainer = FederatedTrainer(rounds=rounds, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(DATA, batch_size=4), ckpt_path=ckpt_path)
    return module


def federation(term, rounds=2, module=None, momentum=0.0):
    """The same federation as a plain loop; ``term(model, received, previous, x, y)`` is added to the loss."""
    model = module or Net()
    previous = [None, None]
    for _ in range(rounds):
        received = copy.deepcopy(model).eval()
        ends = []
        for client, own in enumerate(OWN):
            local = copy.deepcopy(received).train()
            optimizer = torch.optim.SGD(local.parameters(), lr=0.3, momentum=momentum)
            for first in range(0, len(own), 4):
                x, y = DATA[own[first : first + 4]]
                optimizer.zero_grad()
                (cross_entropy(local(x), y) + term(local, received, previous[client] or received, x, y)).backward()
                optimizer.step()
            previous[client] = copy.deepcopy(local).eval()
            ends.append(local)
        shares = [len(own) / len(DATA) for own in OWN]
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                values = [end.state_dict()[name].double() for end in ends]
                value.copy_(sum(share * each for share, each in zip(shares, values, strict=True)).round(decimals=12))
    return model


def ntd(local, received, previous, x, y, beta=0.7, tau=2.0):
    """The formula, with the true class masked instead of left out."""
    true = nn.functional.one_hot(y, 3).bool()
    q = (local(x) / tau).masked_fill(true, -1e30).softmax(1)
    with torch.no_grad():
        q_glob = (received(x) / tau).masked_fill(true, -1e30).softmax(1)
    terms = torch.where(true, 0.0, q_glob * (q_glob.clamp(min=1e-300) / q.clamp(min=1e-300)).log())
    return beta * terms.sum(1).mean()


def moon(local, received, previous, x, y, mu=1.5, tau=0.5):
    z = local.encoder(x)
    with torch.no_grad():
        z_glob, z_prev = received.encoder(x), previous.encoder(x)
    s_glob, s_prev = (nn.functional.cosine_similarity(z, other) for other in (z_glob, z_prev))
    return -mu * ((s_glob / tau).exp() / ((s_glob / tau).exp() + (s_prev / tau).exp())).log().mean()


def once(term, local, received, previous, x, y):
    """A term whose forward pass does not update the statistics a second time."""
    statistics = [(submodule, dict(submodule._buffers)) for submodule in local.modules()]
    for submodule, buffers in statistics:
        submodule._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    value = term(local, received, previous, x, y)
    for submodule, buffers in statistics:
        submodule._buffers.update(buffers)
    return value


# ---------------------------------------------------------------------- numbers worked by hand


def test_not_true_divergence_by_hand():
    # Without class 0 the student says 1/4, 3/4 and the teacher 1/2, 1/2: ln(2) / 2 + ln(2/3) / 2 = ln(4/3) / 2.
    logits = torch.tensor([[5.0, 0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-9.0, 1.0, 1.0]], dtype=torch.float64)
    value = not_true_divergence(logits, teacher, torch.tensor([0]), 1.0)
    assert value.item() == pytest.approx(math.log(4 / 3) / 2)
    value.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.25, 0.25]], dtype=torch.float64))
    # At temperature 1/2 the student says 1/10, 9/10: ln(5) / 2 + ln(5/9) / 2 = ln(25/9) / 2.
    assert not_true_divergence(logits, teacher, torch.tensor([0]), 0.5).item() == pytest.approx(math.log(25 / 9) / 2)


def test_the_true_class_may_be_any_and_an_ignored_sample_does_not_count():
    logits = torch.tensor([[0.0, 5.0, math.log(3)], [0.0, math.log(3), 7.0], [9.0, 0.0, 0.0]])
    teacher = torch.tensor([[2.0, -9.0, 2.0], [1.0, 1.0, 3.0], [0.0, 5.0, 0.0]])
    value = not_true_divergence(logits, teacher, torch.tensor([1, 2, -100]), 1.0)
    assert value.item() == pytest.approx(math.log(4 / 3) / 2)
    assert not_true_divergence(logits, teacher, torch.tensor([-1, -1, -1]), 1.0).item() == 0


def test_contrast_by_hand():
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    # Similarities 1, 0 and 0, 1 at temperature 1/2: log(1 + e^-2) and log(1 + e^2).
    value = contrast(z, torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]]), 0.5)
    assert value.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)
    # Without a previous model of its own a client has log 2, and no gradient.
    z.requires_grad_()
    first = contrast(z, z.detach() + 1, z.detach() + 1, 0.5)
    first.backward()
    assert first.item() == pytest.approx(math.log(2))
    assert not z.grad.any()


# ---------------------------------------------------------------------- whole federations


@both_engines
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedntd_is_the_formula(engine, momentum):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.3, momentum=momentum)

    module = fit(FedNTD(beta=0.7, tau=2.0), module=Net(optimizer), engine=engine)
    expected = federation(lambda *inputs: once(ntd, *inputs), momentum=momentum)
    torch.testing.assert_close(flat(module), flat(expected), rtol=0, atol=1e-9)


@both_engines
def test_moon_is_the_formula(engine):
    module = fit(MOON("encoder", mu=1.5), rounds=3, engine=engine)
    expected = federation(lambda *inputs: once(moon, *inputs), rounds=3)
    torch.testing.assert_close(flat(module), flat(expected), rtol=0, atol=1e-9)
    plain = federation(lambda *inputs: 0.0, rounds=3)
    assert (flat(module) - flat(plain)).abs().max() > 1e-3


@both_engines
def test_they_are_added_to_each_other_and_to_other_terms(engine):
    def all_terms(local, received, previous, x, y):
        value = once(ntd, local, received, previous, x, y) + once(moon, local, received, previous, x, y)
        pairs = zip(local.parameters(), received.parameters(), strict=True)
        return value + 0.1 * sum((a - b.detach()).square().sum() for a, b in pairs)

    module = fit(FedNTD(0.7, 2.0), FedProx(0.2), MOON("encoder", 1.5), engine=engine)
    torch.testing.assert_close(flat(module), flat(federation(all_terms)), rtol=0, atol=1e-9)


@both_engines
def test_a_factor_of_zero_changes_no_bit(engine):
    plain = fit(engine=engine)
    for objective in (FedNTD(beta=0.0), MOON("encoder", mu=0.0)):
        assert torch.equal(flat(fit(objective, engine=engine)), flat(plain))


@pytest.mark.parametrize("logits", ["forward", "net", "head"])
def test_whatever_training_step_calls(logits):
    """The logits of one model, by three ways to write it."""

    class Calls(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(self.encoder, self.head)

        def training_step(self, batch, batch_idx):
            z = self(batch[0]) if logits != "net" else self.net(batch[0])
            return cross_entropy(z, batch[1])

    module = fit(FedNTD(0.7, 2.0, logits=logits), module=Calls())
    expected = federation(lambda *inputs: once(ntd, *inputs))
    torch.testing.assert_close(flat(module)[:48], flat(expected)[:48], rtol=0, atol=1e-9)


def test_labels_from_elsewhere():
    class Named(Net):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1] - 1)

    module = Named()
    shifted = TensorDataset(DATA.tensors[0], DATA.tensors[1] + 1)
    rule = FedAvgCallback(partitioner=IndexPartitioner(OWN), client_eval=False)
    callbacks = [rule, FedNTD(0.7, 2.0, targets=lambda batch: batch[1] - 1)]
    pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(module, DataLoader(shifted, batch_size=4))
    expected = federation(lambda *inputs: once(ntd, *inputs))
    torch.testing.assert_close(flat(module), flat(expected), rtol=0, atol=1e-9)


def test_the_other_models_leave_no_mark():
    """A module that counts, keeps what it saw, and logs in its forward pass."""

    class Marked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros((), dtype=torch.float64))
            self.modes = []

        def forward(self, x):
            self.passes += 1
            self.last = super().forward(x)
            self.log("logged", 1.0 if self.training else 100.0)
            return self.last

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert self.last.requires_grad
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.last.requires_grad
            assert self.training

    module = Marked()
    seen = {}

    class Reads(FederatedCallback):
        def on_round_end(self, trainer, pl_module, report):
            seen.update({name: logged.value for name, logged in report.logged.items()})

    options = {"engine": "sequential", "buffers": {"passes": "average"}}
    fit(FedNTD(), MOON("encoder"), module=module, rounds=1, callbacks=[Reads()], **options)
    assert seen["logged"] == 1.0
    # Two and three calls, of weights 8 and 12.
    assert module.passes.item() == pytest.approx((2 * 8 + 3 * 12) / 20)


# ---------------------------------------------------------------------- the previous model of a client


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_a_stopped_run_resumes_with_the_previous_models(buffers, tmp_path):
    options = {"buffers": buffers, "enable_checkpointing": True, "default_root_dir": tmp_path}
    whole = fit(MOON("encoder"), rounds=4, **options)
    first = Net()
    objective = MOON("encoder")
    callbacks = [FedAvgCallback(), objective]
    trainer = FederatedTrainer(
        rounds=2, callbacks=callbacks, partitioner=IndexPartitioner(OWN), client_eval=False, **{**QUIET, **options}
    )
    trainer.fit(first, DataLoader(DATA, batch_size=4))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    # The state of a client: its parameters and buffers, and nothing that was lent to it.
    names = [*dict(first.named_parameters()), *dict(first.named_buffers())]
    assert sorted(objective.state_dict()["clients"][1]) == sorted(names)
    again = fit(MOON("encoder"), rounds=4, ckpt_path=tmp_path / "half.ckpt", **options)
    assert torch.equal(flat(again), flat(whole))


def test_fedntd_keeps_nothing():
    objective = FedNTD()
    fit(objective)
    assert objective.state_dict() == {}
    assert not objective.remembers
    assert MOON("encoder").remembers


class Fails(FederatedCallback):
    """Fails once, after the first client of round 1."""

    def __init__(self):
        self.has_failed = False

    def on_client_end(self, trainer, pl_module, update):
        if trainer.current_epoch == 1 and update.client == 1 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("once")


def test_a_round_that_fails_is_undone():
    objective, module, fails = MOON("encoder"), Net(), Fails()
    trainer = FederatedTrainer(
        rounds=2,
        callbacks=[FedAvgCallback(), objective, fails],
        partitioner=IndexPartitioner(OWN),
        client_eval=False,
        **QUIET,
    )
    with pytest.raises(RuntimeError, match="once"):
        trainer.fit(module, DataLoader(DATA, batch_size=4))
    reference = MOON("encoder")
    fit(reference, rounds=1)
    ours, theirs = objective.state_dict()["clients"], reference.state_dict()["clients"]
    assert ours.keys() == theirs.keys()
    for client, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(ours[client][name], value)


@forks
def test_on_several_processes():
    ends = []
    for place in ({}, {"devices": 2, "strategy": "federated_notebook", "reduction": "ordered"}):
        ends.append(flat(fit(MOON("encoder"), FedNTD(), rounds=3, **place)))
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- an objective of one's own


@both_engines
def test_an_objective_sees_batch_output_and_parameters(engine):
    class Returns(Net):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            return {"loss": cross_entropy(z, batch[1]), "z": z}

    class Shrinks(ClientObjective):
        """A tenth of the mean square of the logits, weighed by the first feature."""

        def loss(self, step, state):
            return 0.1 * (step.output["z"].square().sum(1) * step.batch[0][:, 0].abs()).mean()

    module = fit(Shrinks(), module=Returns(), engine=engine)

    def term(local, received, previous, x, y):
        return 0.1 * (local(x).square().sum(1) * x[:, 0].abs()).mean()

    expected = federation(lambda *inputs: once(term, *inputs))
    torch.testing.assert_close(flat(module), flat(expected), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- what does not fit


class Apart(Net):
    """Calls encoder and head, and not itself."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.encoder(batch[0])), batch[1])


class Twice(Net):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1]) + self(batch[0]).mean()


class Pairs(Net):
    def forward(self, x):
        return super().forward(x), x

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])[0], batch[1])


@pytest.mark.parametrize(
    ("make", "module", "sentence"),
    [
        (lambda: FedNTD(logits="hed"), Net, "the submodule 'hed', and Net has none of that name; did you mean 'head'"),
        (lambda: MOON("zzz"), Net, r"has none of that name\. It has encoder, encoder.0, encoder.1, encoder.2, head"),
        (FedNTD, Apart, r"the module's `forward`, which `training_step` did not call. Call it as `self\(...\)`"),
        (lambda: FedNTD(logits="head"), Apart, "the inputs of the submodule `head` depend on trained parameters"),
        (FedNTD, Twice, "which `training_step` called 2 times"),
        (FedNTD, Pairs, "must be a tensor, got tuple"),
        (
            lambda: FedNTD(targets=lambda batch: batch[0]),
            Net,
            r"labels \[batch\], got \[4, 3\] and \[4, 6\]",
        ),
        (lambda: FedNTD(targets=lambda batch: batch[1] + 0.5), Net, r"and \[4\] \(torch.float32\)"),
    ],
)
def test_what_does_not_fit_is_said(make, module, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(make(), module=module(), engine="sequential")


def test_a_module_without_forward():
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 3).double()

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"`FedNTD` reads the output of the module's `forward`, and Bare has none"):
        fit(FedNTD(), module=Bare())
    assert torch.isfinite(flat(fit(FedNTD(logits="net"), module=Bare()))).all()


def test_a_batch_without_labels():
    class Unlabeled(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    rule = FedAvgCallback(partitioner=IndexPartitioner(OWN), client_eval=False)
    trainer = pl.Trainer(max_epochs=1, callbacks=[rule, FedNTD()], **QUIET)
    with pytest.raises(ValueError, match=r"the batch has no second item that is a tensor. Give `FedNTD\(targets="):
        trainer.fit(Unlabeled(), DataLoader(TensorDataset(DATA.tensors[0]), batch_size=4))


def test_engine_auto_says_why_it_is_sequential(caplog):
    with pytest.raises(ValueError, match="`Twice.training_step` .*which `training_step` called 2 times"):
        fit(FedNTD(), module=Twice(), engine="vectorized")


# ---------------------------------------------------------------------- calls of a module with other tensors


class Tied(pl.LightningModule):
    """Encoder and head have two names, and the head's weight is the encoder's."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.encoder.weight
        self.net = nn.Sequential(self.encoder, self.head)

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()


def test_a_submodule_of_two_names_keeps_its_parameters():
    module = Tied()
    weight = module.encoder.weight
    server = Server(module, ParameterLayout.of(module))
    # With a matrix of ones twice, (1, 1) becomes (4, 4).
    assert server.loss(torch.ones(4), torch.ones(1, 2)).item() == 8
    assert module.encoder.weight is module.head.weight is module.net[0].weight is weight


def test_a_call_that_fails_leaves_the_module_as_it_was():
    module = Tied()
    weight = module.encoder.weight
    with pytest.raises(ZeroDivisionError), substituted_tensors(module, {"encoder.weight": torch.ones(2, 2)}):
        assert module.head.weight is module.net[0].weight
        assert module.head.weight is not weight
        raise ZeroDivisionError
    assert module.encoder.weight is module.head.weight is weight
