"""The trial of the vectorized engine: what it takes for the user's step, and what it compares."""

import gc
import itertools
import random
import sys
import threading

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, dropout
from torch.utils.data import DataLoader, TensorDataset

from federations import Classifier, flat, samples, trainer
from lightning_fedhaw.clients import choice
from lightning_fedhaw.clients.vectorized.engine import VectorizedEngine
from lightning_fedhaw.data import IIDPartitioner


def engine_of(module, data=None, **kwargs):
    """The engine of a short run that asks for the vectorized one."""
    split = {"num_clients": 2, "alpha": None, "partitioner": IIDPartitioner()}
    options = {**split, "limit_train_batches": 2, "client_eval": False, **kwargs}
    runner = trainer(engine="vectorized", **{"rounds": 1, **options})
    runner.fit(module, data or DataLoader(samples(32), batch_size=8))
    return runner.fit_loop.federation.engine


def line_of(mark):
    """The line of this file that a comment marks."""
    with open(__file__) as file:
        (number,) = [n for n, text in enumerate(file, 1) if text.rstrip().endswith(f"# {mark}")]
    return f"test_trial.py:{number})"


# ---------------------------------------------------------------------- what runs by itself


class Counts(Classifier):
    def __init__(self, collects=False):
        super().__init__()
        self.steps = 0
        self.collects = collects

    def training_step(self, batch, batch_idx):
        if self.collects:
            gc.collect()
        self.steps += 1  # counts
        return super().training_step(batch, batch_idx)


class Collects(Classifier):
    """A step without side effects, apart from what a collection runs."""

    collections = 0

    def training_step(self, batch, batch_idx):
        gc.collect()
        return super().training_step(batch, batch_idx)


@pytest.fixture
def collector_calls():
    """A callback of the garbage collector that changes what the trial looks at, at every collection."""
    calls = []

    def callback(phase, info):
        calls.append(phase)
        Collects.collections += 1

    threshold = gc.get_threshold()
    gc.set_threshold(50, 1000, 1000)
    gc.callbacks.append(callback)
    yield calls
    gc.callbacks.remove(callback)
    gc.set_threshold(*threshold)


@pytest.mark.parametrize("collects", [False, True], ids=["by itself", "forced"])
def test_a_callback_of_the_collector_is_not_blamed(collects, collector_calls):
    with pytest.raises(ValueError, match="changes `self.steps`") as caught:
        engine_of(Counts(collects))
    assert line_of("counts") in str(caught.value)
    assert collector_calls, "the callback was called outside of the trial"


def test_a_callback_of_the_collector_is_no_side_effect(collector_calls):
    assert isinstance(engine_of(Collects()), VectorizedEngine)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_finalizer_of_old_garbage_is_no_side_effect():
    class Garbage:
        def __del__(self):
            Collects.collections += 1

    gc.disable()
    try:
        garbage = Garbage()
        garbage.itself = garbage
        del garbage
        before = Collects.collections
        engine = engine_of(Collects())
    finally:
        gc.enable()
    assert isinstance(engine, VectorizedEngine)
    gc.collect()
    assert Collects.collections > before, "it was there, and was finalized after the run"


def test_other_threads_and_tracers_are_not_blamed():
    stop = threading.Event()

    def works():
        while not stop.wait(1e-4):
            sum(range(100))

    def traces(frame, event, argument):
        return traces

    thread = threading.Thread(target=works)
    before = sys.gettrace()
    thread.start()
    sys.settrace(traces)
    try:
        with pytest.raises(ValueError, match="changes `self.steps`") as caught:
            engine_of(Counts())
        assert sys.gettrace() is traces
    finally:
        sys.settrace(before)
        stop.set()
        thread.join()
    assert line_of("counts") in str(caught.value)


# ---------------------------------------------------------------------- what is compared


class Images(Classifier):
    """Any network on small pictures."""

    def __init__(self, net):
        super().__init__(classes=10)
        self.net = net

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


def pictures(count=16, size=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(10, (count,), generator=generator)), batch_size=4)


def resnet():
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def vit():
    return timm.create_model("test_vit", num_classes=10, img_size=16, drop_rate=0.1, attn_drop_rate=0.1)


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(144, 10),
    )


@pytest.mark.parametrize(
    ("net", "size", "precision"),
    [
        (resnet, 4, "32-true"),
        (vit, 16, "32-true"),
        (vit, 16, "bf16-mixed"),
        (cnn, 8, "32-true"),
        (cnn, 8, "bf16-mixed"),
    ],
)
def test_networks_without_side_effects_are_accepted(net, size, precision):
    torch.manual_seed(0)
    engine = engine_of(Images(net()), pictures(size=size), precision=precision)
    assert isinstance(engine, VectorizedEngine)
    assert engine.facts.is_compared


class Wrong(torch.autograd.Function):
    """The identity, whose gradient is wrong by a share in a batched call, and in no other."""

    share = 0.01

    @staticmethod
    def forward(value, share):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.share = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + ctx.share), None

    @staticmethod
    def vmap(info, in_dims, value, share):
        return Wrong.apply(value, Wrong.share), in_dims[0]


class IsWrong(Classifier):
    """A linear layer whose gradient is wrong; around it what makes comparing hard."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.net = nn.Linear(6, 3)
        self.square = torch.eye(6)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        if self.kind == "dropout":
            inputs = dropout(inputs, 0.3)
        if self.kind == "noise":
            inputs = inputs + torch.randn_like(inputs)
        if self.kind == "float32 only":
            inputs = inputs @ self.square
        weight = Wrong.apply(self.net.weight, 0.0)
        return cross_entropy(nn.functional.linear(inputs, weight, self.net.bias), labels)


@pytest.mark.parametrize("kind", ["plain", "dropout", "noise", "float32 only", "bf16-mixed"])
def test_a_gradient_that_is_wrong_by_a_hundredth_is_refused(kind, monkeypatch):
    precision = kind if kind == "bf16-mixed" else "32-true"
    with pytest.raises(ValueError, match="gives another value of the gradient of `net.weight` for two clients at once"):
        engine_of(IsWrong(kind), precision=precision)
    monkeypatch.setattr(Wrong, "share", 0.0)
    engine = engine_of(IsWrong(kind), precision=precision)
    assert engine.facts.is_compared
    assert engine.facts.draws_dropout is (kind == "dropout")
    assert engine.facts.draws_other is (kind == "noise")


class Coarse(Images):
    """Rounds the inputs of one client alone to ten bits, as a GPU's TF32 does, and not those of batched clients."""

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        if inputs.dtype == torch.float32 and not torch._C._functorch.is_batchedtensor(self.net[0].weight):
            mantissa, exponent = torch.frexp(inputs)
            inputs = torch.ldexp((mantissa * 1024).round() / 1024, exponent)
        hidden = conv2d(inputs, self.net[0].weight, self.net[0].bias)
        return cross_entropy(self.net[1:](hidden), labels)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_only_one_engine_does_is_no_other_value(seed):
    torch.manual_seed(seed)
    module = Coarse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)))
    assert isinstance(engine_of(module, pictures()), VectorizedEngine)


class FixedSize(Classifier):
    """A step that takes batches of eight only."""

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        halves = inputs.reshape(2, 8, 6)
        return super().training_step([halves.flatten(0, 1), labels], batch_idx)


def test_a_step_that_takes_full_batches_only_is_compared():
    loader = DataLoader(samples(64), batch_size=16, drop_last=True)
    assert engine_of(FixedSize(), loader).facts.is_compared


class DrawsByModel(Classifier):
    """Draws from a distribution whose mean depends on the model."""

    def training_step(self, batch, batch_idx):
        noise = torch.normal(self.net(batch[0]).detach(), 1.0).mean()
        return super().training_step(batch, batch_idx) + 0.1 * noise


def test_a_step_that_cannot_be_compared_is_named(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        engine = engine_of(DrawsByModel())
    assert not engine.facts.is_compared
    assert "not compared with one client alone" in caplog.text


# ---------------------------------------------------------------------- what a step may reach

COUNTER = [0]
GENERATOR = np.random.default_rng(0)


def adds_to_counter():
    COUNTER[0] += 1  # global


class Slots:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class SideEffect(Classifier):
    """A step that does something beside its loss."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.array = np.zeros(3)
        self.random = np.random.default_rng(0)
        self.python = random.Random(0)
        self.numbers = itertools.count()
        self.slots = Slots()
        self.hidden = [nn.Linear(2, 2)]

    def training_step(self, batch, batch_idx):
        kind = self.kind
        if kind == "array":
            self.array += 1  # array
        if kind == "NumPy generator":
            self.random.normal()  # NumPy generator
        if kind == "Python generator":
            self.python.random()  # Python generator
        if kind == "count":
            next(self.numbers)  # count
        if kind == "slots":
            self.slots.count += 1  # slots
        if kind == "hidden module":
            with torch.no_grad():
                self.hidden[0].weight.mul_(0.9)  # hidden module
        if kind == "global":
            adds_to_counter()
        if kind == "global generator":
            GENERATOR.normal()  # global generator
        if kind == "second batch" and batch_idx > 0:
            self.array += 1  # second batch
        if kind == "logger":
            self.logger.log_metrics({"here": 1.0})
        if kind == "later" and self.current_epoch == 1:
            self.array = self.array + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "kind",
    [
        "array",
        "NumPy generator",
        "Python generator",
        "count",
        "slots",
        "hidden module",
        "global",
        "global generator",
        "second batch",
    ],
)
def test_what_a_step_leaves_behind_is_found_and_put_back(kind):
    module = SideEffect(kind)
    weight = module.hidden[0].weight.detach().clone()
    states = [module.random.bit_generator.state, GENERATOR.bit_generator.state, module.python.getstate()]
    with pytest.raises(ValueError, match="without side effects") as caught:
        engine_of(module)
    assert line_of(kind) in str(caught.value)
    assert module.array.tolist() == [0.0, 0.0, 0.0]
    assert states == [module.random.bit_generator.state, GENERATOR.bit_generator.state, module.python.getstate()]
    assert module.slots.count == 0
    assert COUNTER == [0]
    assert torch.equal(module.hidden[0].weight, weight)


def test_a_logger_is_not_called_once_for_all(tmp_path):
    with pytest.raises(ValueError, match=r"calls the logger itself \(`log_metrics`\)"):
        engine_of(SideEffect("logger"), logger=CSVLogger(tmp_path))


def test_what_a_step_does_in_a_later_round_only_is_found_too():
    with pytest.raises(RuntimeError, match="changes `self.array`"):
        engine_of(SideEffect("later"), rounds=2)


class Holds(Classifier):
    """Tensors that cannot be written to."""

    def __init__(self, file):
        super().__init__()
        np.save(file, np.ones(6, dtype=np.float32))
        self.mapped = torch.from_numpy(np.load(file, mmap_mode="r"))
        self.expanded = torch.ones(1).expand(6)
        self.prior = torch.distributions.Normal(torch.zeros(1), torch.ones(6))
        with torch.inference_mode():
            self.inference = torch.ones(6)

    def training_step(self, batch, batch_idx):
        shift = self.mapped + self.expanded + self.prior.mean + self.inference.clone()
        return super().training_step([batch[0] + shift, batch[1]], batch_idx)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_what_no_step_touches_is_not_written_to(tmp_path):
    assert isinstance(engine_of(Holds(tmp_path / "array.npy")), VectorizedEngine)


class Penalized(Classifier):
    """Penalties that batching makes hard: parameters that are asked whether they train, gradients within the step."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.kind == "trainable":
            return loss + 1e-2 * sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        inputs = batch[0]
        slope = torch.func.grad(lambda x: self.net(x).square().sum())(inputs)
        return loss + 1e-2 * slope.square().mean()


@pytest.mark.parametrize("kind", ["trainable", "slope"])
def test_penalties_are_batched_as_they_are(kind):
    torch.manual_seed(0)
    modules = [Penalized(kind), Penalized(kind)]
    engine_of(modules[0])
    runner = trainer(
        rounds=1, engine="sequential", num_clients=2, alpha=None, partitioner=IIDPartitioner(), limit_train_batches=2
    )
    runner.fit(modules[1], DataLoader(samples(32), batch_size=8))
    assert torch.allclose(flat(modules[0]), flat(modules[1]), atol=1e-6)


class LooksUpLater(Classifier):
    """An embedding with `padding_idx` from the second round on."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, padding_idx=0)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) + self.table.weight.square().mean()
        if self.current_epoch:
            loss = loss + self.table((batch[0][:, 0] > 0).long()).square().mean()
        return loss


def test_what_batching_gets_wrong_is_refused_in_any_round():
    with pytest.raises(RuntimeError, match="looks up an embedding with `padding_idx`"):
        engine_of(LooksUpLater(), rounds=2)


class NotFinite(Classifier):
    """A loss that is no number where a client's model is away from its start."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.net[0].weight * 0 - 1).sqrt().sum() * 0


@pytest.mark.filterwarnings("ignore:Client . returned non-finite parameters")
def test_a_value_that_is_not_finite_proves_nothing(caplog, monkeypatch):
    monkeypatch.setattr(choice, "slower", lambda *_: None)
    runner = trainer(rounds=1, engine="auto", on_nonfinite="exclude", client_eval=False)
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.raises(FloatingPointError, match="diverged"):
        runner.fit(NotFinite(), DataLoader(samples(32), batch_size=8))
    assert "cannot be compared with one client alone" in caplog.text
