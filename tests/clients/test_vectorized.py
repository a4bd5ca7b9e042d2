"""The vectorized engine against the sequential one: the same updates, however clients are batched."""

import inspect
import random
import shutil
from dataclasses import replace
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.data import DataLoader, TensorDataset

from engines import assert_equal_engines, play
from federations import Classifier, flat, samples, trainer
from lightning_fedhaw import FedDynCallback, FedHAWCallback, FedProx, ScaffoldCallback
from lightning_fedhaw.clients import choice
from lightning_fedhaw.clients.vectorized import engine as vectorized
from lightning_fedhaw.clients.vectorized.chunk import Chunk
from lightning_fedhaw.clients.vectorized.tracing import reads_index
from lightning_fedhaw.data import FixedSequenceSampler, IIDPartitioner, IndexPartitioner
from lightning_fedhaw.extending import ClientObjective
from lightning_fedhaw.objectives import FedDynObjective, ScaffoldObjective

optim = torch.optim


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "SGD nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD maximize": lambda p: optim.SGD(p, lr=0.01, maximize=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01, t0=2),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_every_optimizer_in_double_precision(name, state):
    assert_equal_engines(
        lambda: Classifier(OPTIMIZERS[name]),
        tolerance=1e-12,
        dtype=torch.float64,
        local_epochs=2,
        optimizer_state=state,
    )


@every_optimizer
def test_every_optimizer_in_single_precision(name):
    assert_equal_engines(lambda: Classifier(OPTIMIZERS[name]), tolerance=5e-6 if name != "Rprop" else 1e-3)


class Groups(Classifier):
    def configure_optimizers(self):
        first, last = self.net[0].parameters(), self.net[-1].parameters()
        return optim.Adam([{"params": first, "lr": 0.02}, {"params": last, "weight_decay": 0.1}], lr=0.01)


class HalfTrained(Classifier):
    """A frozen layer, and a trainable one that no optimizer has."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.requires_grad_(False)

    def configure_optimizers(self):
        return optim.SGD([self.net[0].weight, *self.net[-1].parameters()], lr=0.1, momentum=0.9)


class Tied(Classifier):
    def __init__(self):
        super().__init__(hidden=6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.net[0].weight
        self.net.insert(2, self.again)


class Replaces(Classifier):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))

    def training_step(self, batch, batch_idx):
        self.seen = 0.9 * self.seen + 0.1 * torch.nn.functional.one_hot(batch[1], 3).float().mean(0)
        self.count += 1
        return super().training_step(batch, batch_idx) + self.seen.sum() * self.net[0].bias.sum()


class LooksAtIndex(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            self.log("second", loss, reduce_fx="max", on_epoch=True)
        return None if batch_idx == 2 else loss * (1 + batch_idx)


class LogsMuch(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, 0)
        self.log_dict({"sum": loss.detach(), "low": -loss}, reduce_fx="sum")
        self.log("number", 3.0, batch_size=7)
        self.log("min", loss, reduce_fx="min")
        return {"loss": loss, "extra": 1}


class Regularized(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * sum(p.square().sum() for p in self.parameters())


class Proximal(ClientObjective):
    """Remembers where its client ended."""

    def init_client(self, start):
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def penalty(self, parameters, start, state):
        return sum((0.5 * (p - start[n]) ** 2 + p * state[n]).sum() for n, p in parameters.items())

    def end_client(self, state, start, end, num_steps):
        return {name: state[name] + 0.1 * num_steps * (end[name] - start[name]) for name in state}


IID = {"alpha": None, "partitioner": IIDPartitioner()}
CASES = {
    "plain": (None, {}),
    "one client": (None, {"num_clients": 1, "alpha": None}),
    "batches of one": (None, {"batch_size": 1}),
    "a batch is a client": (None, {"batch_size": 200}),
    "in order": (None, {"data": DataLoader(samples(130), batch_size=8)}),
    "without last batches": (None, {"data": DataLoader(samples(130), 8, drop_last=True), "alpha": 100.0}),
    "three epochs": (None, {"local_epochs": 3}),
    "steps": (None, {"local_steps": 7}),
    "one step": (None, {"local_steps": 1}),
    "limit": (None, {"limit_train_batches": 2, "local_epochs": 2}),
    "share": (None, {"limit_train_batches": 0.5}),
    "steps with a limit": (None, {"limit_train_batches": 2, "local_steps": 5}),
    "clip by norm": (lambda: Classifier(OPTIMIZERS["Adam"]), {"gradient_clip_val": 0.5}),
    "clip by value": (None, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "groups": (Groups, {"local_epochs": 2}),
    "half trained": (HalfTrained, {}),
    "tied": (Tied, {}),
    "dropout": (lambda: Classifier(dropout=0.5), {"local_epochs": 2}),
    "batch norm": (
        lambda: Classifier(norm=True),
        {"data": DataLoader(samples(132), 8), **IID, "local_epochs": 2},
    ),
    "local buffers": (
        lambda: Classifier(norm=True, dropout=0.2),
        {"data": DataLoader(samples(132), 8), **IID, "buffers": "local"},
    ),
    "replaced buffers": (Replaces, {"buffers": {"seen": "average"}}),
    "looks at the index": (LooksAtIndex, {"local_epochs": 2}),
    "looks at the index, steps": (LooksAtIndex, {"local_steps": 7}),
    "logs much": (LogsMuch, {}),
    "regularized": (Regularized, {}),
    "objective": (None, {"callbacks": [Proximal()], "rounds": 3}),
    "objectives": (Groups, {"callbacks": [Proximal(), FedProx(0.3), FedDynObjective(0.1)], "rounds": 3}),
    "FedDyn": (lambda: Classifier(OPTIMIZERS["Adam"]), {"rule": FedDynCallback(regularization=0.5), "rounds": 3}),
    "FedDyn norm": (None, {"callbacks": [FedDynObjective(0.5, penalty="norm")], "rounds": 3}),
    "SCAFFOLD": (HalfTrained, {"rule": ScaffoldCallback("I"), "rounds": 3, "clients_per_round": 4}),
    "SCAFFOLD II": (lambda: Classifier(OPTIMIZERS["SGD nesterov"]), {"rule": ScaffoldCallback(), "rounds": 3}),
    "SCAFFOLD with FedProx": (
        None,
        {"callbacks": [ScaffoldObjective(), FedProx(0.3)], "rounds": 3, "gradient_clip_val": 0.5},
    ),
    "FedHAW": (None, {"rule": FedHAWCallback(), "rounds": 3, "clients_per_round": 4}),
    "bf16-mixed": (None, {"precision": "bf16-mixed", "tolerance": 0.05}),
    "bf16-true": (None, {"precision": "bf16-true", "tolerance": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:No client made an optimizer step")
def test_both_engines_give_the_same_updates(name):
    module, kwargs = CASES[name]
    assert_equal_engines(module, **kwargs)


def test_clients_that_take_labels_for_each_other():
    class Swapping(IIDPartitioner):
        def partition(self, *args, **kwargs):
            return replace(super().partition(*args, **kwargs), label_swaps={1: (0, 2), 4: (1, 2)})

    _, module, _ = assert_equal_engines(alpha=None, partitioner=Swapping())
    _, other, _ = play("sequential", alpha=None, partitioner=IIDPartitioner())
    assert not torch.allclose(flat(module), flat(other), atol=1e-3)


def test_any_chunk_gives_the_same_numbers():
    whole, module, _ = play("vectorized", lambda: Classifier(dropout=0.3))
    engine = whole.fit_loop.federation.engine
    assert engine.chunk > 6
    for at_once in (1, 2, 4):
        memory = at_once * engine.facts.bytes_per_client
        runner, other, _ = play("vectorized", lambda: Classifier(dropout=0.3), chunk_memory=memory)
        assert runner.fit_loop.federation.engine.chunk == at_once
        assert torch.allclose(flat(module), flat(other), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_same_to_the_last_bit_and_engines_share_checkpoints():
    def fit(engine, rounds, ckpt_path=None):
        runner = trainer(rounds=rounds, engine=engine, optimizer_state="kept", num_clients=5, clients_per_round=3)
        module = Classifier(OPTIMIZERS["NAdam"], dropout=0.2)
        runner.fit(module, DataLoader(samples(130), batch_size=8), ckpt_path=ckpt_path)
        return runner, module

    _, straight = fit("vectorized", 4)
    for engine, bits in (("vectorized", True), ("sequential", False)):
        half, _ = fit(engine, 2)
        half.save_checkpoint("half.ckpt")
        _, resumed = fit("vectorized", 4, "half.ckpt")
        assert torch.equal(flat(straight), flat(resumed)) or not bits
        assert torch.allclose(flat(straight), flat(resumed), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* clients at once do not fit")
def test_memory_that_is_not_there_halves_the_chunk(monkeypatch):
    _, module, _ = play("vectorized")
    make, tried = Chunk._make, []

    def fails(self, call):
        tried.append(len(self.tasks))
        if len(self.tasks) > 2 and len(tried) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return make(self, call)

    monkeypatch.setattr(Chunk, "_make", fails)
    with pytest.warns(UserWarning, match="clients at once do not fit into memory; they are trained again, 3 at a time"):
        runner, other, _ = play("vectorized")
    assert runner.fit_loop.federation.engine.chunk == 2
    assert torch.allclose(flat(module), flat(other), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* clients at once do not fit")
def test_a_single_client_that_does_not_fit_is_an_error(monkeypatch):
    def fails(self, call):
        raise MemoryError

    monkeypatch.setattr(Chunk, "_make", fails)
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="do not fit"):
        play("vectorized")


# ---------------------------------------------------------------------- what cannot be vectorized


class Branches(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss > 0 else -loss  # stops


class Appends(Classifier):
    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())  # stops
        return loss


class Counts(Classifier):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1  # stops
        return super().training_step(batch, batch_idx)


def one():
    return 1


class CountsByHelp(Classifier):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps = self.steps + one()  # stops
        return super().training_step(batch, batch_idx)


class Measures(Classifier):
    def training_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])  # stops
        return super().training_step(batch, batch_idx)


class LogsMetric(Classifier):
    def training_step(self, batch, batch_idx):
        self.log("accuracy", self.accuracy)  # stops
        return super().training_step(batch, batch_idx)


class Draws(Classifier):
    def training_step(self, batch, batch_idx):
        factor = random.random()  # stops
        return super().training_step(batch, batch_idx) * factor


class DrawsNumPy(Classifier):
    def training_step(self, batch, batch_idx):
        factor = np.random.rand()  # stops
        return super().training_step(batch, batch_idx) * factor


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):  # stops
        self.optimizers().zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        self.optimizers().step()


class Hooked(Classifier):
    def on_after_backward(self):  # stops
        pass


class Transfers(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):  # stops
        return batch


class Watching(pl.Callback):
    def on_train_batch_end(self, *args):  # stops
        pass


class Norms(optim.SGD):
    """Scales the step by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(p.grad / total, alpha=0.1)


def stops(kind):
    """The line marked in the source of a class, as errors name it."""
    lines, first = inspect.getsourcelines(kind)
    (line,) = [first + i for i, text in enumerate(lines) if "# stops" in text]
    return f"test_vectorized.py:{line})"


class Clamps(Classifier):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.3, 0.3)
        return super().training_step(batch, batch_idx)


class Looks(Classifier):
    def __init__(self, **option):
        super().__init__()
        self.table = nn.Embedding(11, 3, **option or {"padding_idx": 0})

    def training_step(self, batch, batch_idx):
        looked = self.table((batch[0][:, 0].abs() * 3).long().clamp(1, 9))  # stops
        return super().training_step(batch, batch_idx) + looked.square().mean()


class Anneals(Classifier):
    class Factor:
        calls = 0

        def __call__(self):
            self.calls += 1  # stops
            return 1 + self.calls / 1000

    def __init__(self):
        super().__init__()
        self.factor = self.Factor()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor()


class CountsForAll(Classifier):
    count = 0

    def training_step(self, batch, batch_idx):
        type(self).count += 1  # stops
        return super().training_step(batch, batch_idx) * (1 + self.count / 1000)


class OwnGenerator(Classifier):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def training_step(self, batch, batch_idx):
        noise = torch.randn(batch[0].shape, generator=self.generator)  # stops
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


class HoldsParameters(Classifier):
    class Penalty:
        def __init__(self, parameters):
            self.parameters = list(parameters)

        def __call__(self):
            return sum(p.square().sum() for p in self.parameters)

    def __init__(self):
        super().__init__()
        self.penalty = self.Penalty(self.parameters())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * self.penalty()


class SetsRate(Classifier):
    def training_step(self, batch, batch_idx):
        self.optimizers().param_groups[0]["lr"] *= 0.9  # stops
        return super().training_step(batch, batch_idx)


REFUSED = {
    "clamped parameters": (Clamps, {}, "changes the parameter `net.0.weight` itself", None),
    "padding": (Looks, {}, "looks up an embedding with `padding_idx`", Looks),
    "bounded norms": (lambda: Looks(max_norm=1.0), {}, "changes the parameter `table.weight` itself", None),
    "an object's counter": (Anneals, {}, "changes `self.factor`", Anneals),
    "a class's counter": (CountsForAll, {}, "changes `self.count`", CountsForAll),
    "a generator": (OwnGenerator, {}, "changes `self.generator`", OwnGenerator),
    "an object that holds parameters": (HoldsParameters, {}, "reaches the parameter `net.0.weight` through", None),
    "a rate": (SetsRate, {}, "changes settings of the optimizer", SetsRate),
    "control flow": (Branches, {}, "needs the value of a tensor in Python", Branches),
    "a list": (Appends, {}, "changes `self.losses`", Appends),
    "a counter": (Counts, {}, "changes `self.steps`", Counts),
    "a counter by a function": (CountsByHelp, {}, "changes `self.steps`", CountsByHelp),
    "torchmetrics": (Measures, {}, "updates the torchmetrics object `self.accuracy`", Measures),
    "torchmetrics, logged": (LogsMetric, {}, "logs the torchmetrics object `accuracy`", LogsMetric),
    "random": (Draws, {}, "draws from NumPy's or Python's random numbers", Draws),
    "NumPy": (DrawsNumPy, {}, "draws from NumPy's or Python's random numbers", DrawsNumPy),
    "manual": (Manual, {}, "optimizes manually", Manual),
    "a hook": (Hooked, {}, "is surrounded by the hook `on_after_backward`", Hooked),
    "a transfer hook": (Transfers, {}, "is surrounded by the hook `on_after_batch_transfer`", Transfers),
    "a callback": (Classifier, {"callbacks": [Watching()]}, "callback hook `on_train_batch_end`", Watching),
    "accumulation": (Classifier, {"accumulate_grad_batches": 2}, "accumulates gradients", None),
    "LBFGS": (lambda: Classifier(optim.LBFGS), {}, "the optimizer `LBFGS` cannot be stepped on gradients alone", None),
    "Adafactor": (lambda: Classifier(getattr(optim, "Adafactor", Norms)), {}, "is not element-wise", None),
    "norms": (lambda: Classifier(lambda p: Norms(p, lr=0.1)), {}, "the optimizer `Norms` is not element-wise", None),
    "other data": (
        Classifier,
        {"data": DataLoader(list(zip(*samples(60).tensors, strict=True)), batch_size=8), "alpha": None},
        "the data set list is not tensors in memory",
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_vectorized_is_refused_by_its_line(name, monkeypatch, caplog):
    module, kwargs, why, where = REFUSED[name]
    with pytest.raises(
        ValueError, match='`engine="vectorized"` needs a `training_step` without side effects'
    ) as caught:
        play("vectorized", module, **kwargs)
    assert why in str(caught.value)
    assert 'Use `engine="sequential"`' in str(caught.value)
    if where is not None:
        assert stops(where) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a list", "torchmetrics", "a counter", "control flow", "an object's counter", "a rate"]
)
def test_auto_falls_back_and_nothing_of_the_trial_is_left(name, monkeypatch, caplog):
    monkeypatch.setattr(choice, "slower", lambda *_: None)
    kind = REFUSED[name][0]
    auto, module, _ = play("auto", kind)
    _, other, _ = play("sequential", kind)
    assert torch.equal(flat(module), flat(other))
    for attribute in ("losses", "steps"):
        a, b = getattr(module, attribute, []), getattr(other, attribute, [])
        assert a == b if isinstance(a, (int, float)) else len(a) == len(b)
    assert not isinstance(auto.fit_loop.federation.engine, vectorized.VectorizedEngine)


def test_the_trial_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(choice, "slower", lambda *_: None)
    states = []

    class Module(Classifier):
        def on_train_epoch_start(self):
            states.append((flat(self), torch.get_rng_state(), random.random(), np.random.rand(), self.training))

    for engine in ("auto", "sequential"):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        play(engine, lambda: Module(norm=True), rounds=1, data=DataLoader(samples(132), 8), **IID)
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class BranchesLater(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 1 and loss > 0:
            return 2 * loss
        return loss


def test_a_run_continues_sequentially_where_a_step_turns_out_to_have_side_effects(monkeypatch):
    monkeypatch.setattr(choice, "slower", lambda *_: None)
    kwargs = {"optimizer_state": "kept", "rounds": 3}
    with pytest.warns(UserWarning, match="in round 1 `training_step` needs the value of a tensor"):
        _, module, _ = play("auto", lambda: BranchesLater(OPTIMIZERS["Adam"]), **kwargs)
    _, other, _ = play("sequential", lambda: BranchesLater(OPTIMIZERS["Adam"]), **kwargs)
    assert torch.allclose(flat(module), flat(other), atol=1e-6)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        play("vectorized", BranchesLater)


class SetsRateLater(Classifier):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            self.optimizers().param_groups[0]["lr"] = 0.5
        return super().training_step(batch, batch_idx)


def test_settings_that_change_in_a_later_round_stop_the_engine():
    with pytest.raises(RuntimeError, match="changes settings of the optimizer"):
        play("vectorized", SetsRateLater)


class Frozen(Classifier):
    """A parameter that is frozen, one that is not always used, and a gradient that is expanded."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net[0].weight.requires_grad_(False)
        self.extra = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.extra.sum() * (batch_idx % 2)


@every_optimizer
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_frozen_and_unused_parameters_and_expanded_gradients(name, algorithm):
    assert_equal_engines(
        lambda: Frozen(OPTIMIZERS[name]),
        tolerance=1e-12,
        dtype=torch.float64,
        optimizer_state="kept",
        gradient_clip_val=0.1,
        gradient_clip_algorithm=algorithm,
    )


def test_a_bound_below_zero_does_not_clip_in_either_engine():
    assert_equal_engines(gradient_clip_val=-1.0)


class Last(ClientObjective):
    """Keeps what it is given, without a copy."""

    def init_client(self, start):
        return dict(start)

    def penalty(self, parameters, start, state):
        return 0.05 * sum((p - state[n]).square().sum(tuple(range(-start[n].ndim, 0))) for n, p in parameters.items())

    def end_client(self, state, start, end, num_steps):
        return dict(end)


def test_an_objective_may_keep_what_it_is_given():
    assert_equal_engines(callbacks=[Last()], rounds=3)


def test_auto_says_its_choice_and_why():
    runner, _, _ = play("sequential", rounds=1)
    engine = runner.fit_loop.federation.engine

    def said(cohort, asked="auto", **given):
        given = {"chunk_memory": None, "compile_clients": False, **given}
        return choice.choose(engine, asked, cohort=cohort, **given)[1]

    assert (
        said(2)
        == "Engine: sequential, because it would train 2 clients at a time, and a batched step is faster from 10 on."
    )
    assert said(100) == "Engine: vectorized, 100 of 100 clients at a time."
    assert said(2, "vectorized") == "Engine: vectorized, 2 of 2 clients at a time, as requested."
    assert said(100, "sequential") == "Engine: sequential, as requested."
    assert "1 client at a time on each of 3 processes, and a batched step is faster" in said(1, processes=3)
    assert said(100, processes=3) == "Engine: vectorized, 100 of 100 clients at a time on each of 3 processes."
    assert said(2, compile_clients=True).endswith("from 10 on; `compile_clients=True` has no effect on it.")
    assert "sequential, because 0 clients at a time fit into `chunk_memory`=1, and a" in said(100, chunk_memory=1)
    assert "more than `chunk_memory`=1." in said(100, "vectorized", chunk_memory=1)


def test_what_happens_to_be_free_does_not_choose_the_engine(monkeypatch):
    runner, _, _ = play("sequential", rounds=1)
    monkeypatch.setattr(choice, "free_memory", lambda device: 4)
    engine, said = choice.choose(
        runner.fit_loop.federation.engine, "auto", cohort=100, chunk_memory=None, compile_clients=False
    )
    assert isinstance(engine, vectorized.VectorizedEngine)
    assert said.startswith("Engine: vectorized, 1 of 100 clients at a time")


@pytest.mark.parametrize(
    ("step", "uses"),
    [
        (lambda batch, batch_idx: batch, False),
        (lambda batch, batch_idx: batch * batch_idx, True),
        (lambda batch, batch_idx: [batch_idx for _ in batch], True),
        (lambda batch, *rest: batch, True),
        (lambda batch: batch, False),
    ],
)
def test_whether_a_step_looks_at_the_index(step, uses):
    assert reads_index(step) is uses


def test_other_randomness_differs_between_clients_and_is_said():
    class Noisy(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)

    runner, module, _ = play("vectorized", Noisy)
    assert runner.fit_loop.federation.engine.facts.draws_other
    _, again, _ = play("vectorized", Noisy)
    assert torch.equal(flat(module), flat(again))


def test_dropout_is_told_from_other_randomness():
    class Drops(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step([dropout(batch[0], 0.3), batch[1]], batch_idx)

    runner, _, _ = assert_equal_engines(Drops)
    facts = runner.fit_loop.federation.engine.facts
    assert facts.draws_dropout
    assert not facts.draws_other


# ---------------------------------------------------------------------- compiled


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_give_the_same_updates(caplog):
    data = DataLoader(TensorDataset(*samples(64).tensors), batch_size=8)
    kwargs = {"num_clients": 4, **IID, "data": data, "rounds": 3}
    runner, module, _ = play("vectorized", LogsMuch, compile_clients=True, **kwargs)
    compiled = runner.fit_loop.federation.engine.compiled
    assert compiled is not None
    assert not compiled.is_off
    assert len(compiled._graphs) == 1
    other, plain, _ = play("sequential", LogsMuch, **kwargs)
    assert torch.allclose(flat(module), flat(plain), atol=1e-5)
    for name in ("train_loss", "sum", "low", "number", "min"):
        assert float(runner.callback_metrics[name]) == pytest.approx(float(other.callback_metrics[name]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader'")
def test_without_a_compiler_the_step_runs_as_it_is(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="`compile_clients=True` has no effect from now on: nothing could be compiled"):
        _, module, _ = play("vectorized", compile_clients=True)
    _, other, _ = play("vectorized")
    assert torch.equal(flat(module), flat(other))


def test_torchmetrics_in_validation_do_not_matter():
    assert isinstance(Classifier().accuracy, torchmetrics.Metric)
    assert_equal_engines()


class Mixed(Classifier):
    """Changes its batch in place, has a buffer that counts, and logs by the length of the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        self.seen += 1
        loss = super().training_step(batch, 0)
        self.log("full" if len(batch[0]) == 8 else "short", loss)
        return loss


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_step_may_do_what_an_eager_one_may():
    kwargs = {"data": DataLoader(samples(60), 8), "rounds": 3, "dtype": torch.float64, **IID}
    other, *_ = assert_equal_engines(Mixed, tolerance=1e-12, compile_clients=True, **kwargs)
    compiled = other.fit_loop.federation.engine.compiled
    assert len(compiled._graphs) == 2
    assert not compiled.is_off


class ByEpoch(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0) * (1 + self.current_epoch)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_number_of_an_earlier_round_is_noticed_behind_a_new_shape():
    # The last round begins with batches of 17 clients, which is new, and goes on with shorter ones of 16, which is not.
    ends = torch.tensor([12] * 16 + [8] * 4).cumsum(0).tolist()
    kwargs = {
        "data": DataLoader(samples(ends[-1]), 8),
        "partitioner": IndexPartitioner([list(range(a, b)) for a, b in pairwise([0, *ends])]),
        "sampler": FixedSequenceSampler([list(range(20)), list(range(20)), list(range(17))]),
        "num_clients": 20,
        "alpha": None,
        "rounds": 3,
    }
    with pytest.warns(UserWarning, match="the compiled step gives other numbers than the step itself"):
        assert_equal_engines(ByEpoch, compile_clients=True, **kwargs)
