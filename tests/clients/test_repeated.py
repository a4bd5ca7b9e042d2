"""Recorded calls that are repeated, and calls that clients with shorter batches share."""

import time
from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from engines import assert_equal_engines, play
from federations import Classifier, flat
from lightning_fedhaw import FederatedCallback, FedProx
from lightning_fedhaw.clients.vectorized import batched, compiled, repeated
from lightning_fedhaw.clients.vectorized.calls import Sharing, worth_sharing
from lightning_fedhaw.clients.vectorized.program import program_of
from lightning_fedhaw.clients.vectorized.recording import DifferenceError, Pattern, Recording
from lightning_fedhaw.data import IndexPartitioner

SIZES = [18, 19, 22, 8, 16, 5]


def unequal(batch_size=8, **options):
    """Clients whose last batches have 2, 3, 6, 8 and 5 samples."""
    generator = torch.Generator().manual_seed(0)
    count = sum(SIZES)
    data = TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)
    ends = list(accumulate(SIZES, initial=0))
    indices = [list(range(begin, end)) for begin, end in pairwise(ends)]
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=options.pop("drop_last", False))
    split = {"num_clients": None, "alpha": None, "partitioner": IndexPartitioner(indices)}
    return {"data": loader, **split, **options}


class Logs(Classifier):
    """Logs the share of right answers in addition, as many modules do."""

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        loss = cross_entropy(scores, batch[1])
        self.log("loss", loss, batch_size=len(batch[1]))
        self.log("right", (scores.argmax(1) == batch[1]).float().mean(), on_epoch=True)
        return loss


class Annealed(Classifier):
    """Its loss has a number that a callback sets, and one of the trainer's."""

    factor = 1.0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, 0) * self.factor
        return loss + 0.1 * self.trainer.current_epoch * self.net[0].weight.square().sum()


class Anneal(FederatedCallback):
    def on_round_start(self, trainer, pl_module, *_):
        pl_module.factor = 1.0 / (1 + trainer.global_step)


class CountsSteps(Classifier):
    """BatchNorm with its running statistics, and a frozen tensor that is a number."""

    def __init__(self):
        super().__init__(norm=True)
        self.temperature = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0) / self.temperature


@pytest.fixture
def made(monkeypatch):
    """The numbers of samples of the calls that the step itself makes."""
    lengths = []
    gradients = batched.BatchedStep.gradients

    def counted(self, trained, inputs):
        lengths.append(inputs.batch[0].shape[1])
        return gradients(self, trained, inputs)

    monkeypatch.setattr(batched.BatchedStep, "gradients", counted)
    return lengths


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Logs, {"local_epochs": 3}),
        (CountsSteps, {"local_epochs": 3, "drop_last": True, "batch_size": 4}),
        (lambda: Classifier(lambda p: torch.optim.Adam(p, lr=0.01)), {"callbacks": [FedProx(0.1)], "local_epochs": 2}),
        (Annealed, {"callbacks": [Anneal()], "rounds": 3, "local_epochs": 4}),
    ],
    ids=["logs", "BatchNorm", "Adam and FedProx", "annealed"],
)
def test_repeated_calls_give_the_same_bits(module, options, made, monkeypatch):
    options = unequal(**options)
    _, first, watch = play("vectorized", module, **options)
    repeating = len(made)
    made.clear()
    monkeypatch.setattr(repeated.RepeatedStep, "is_off", True, raising=False)
    monkeypatch.setattr(repeated.RepeatedStep, "__init__", lambda self: None)
    monkeypatch.setattr(repeated.RepeatedStep, "begin", lambda self, step: setattr(self, "step", step))
    _, second, other_watch = play("vectorized", module, **options)
    assert repeating < len(made), "some calls were repeated"
    assert torch.equal(flat(first), flat(second))
    for (update, vector), (other, other_vector) in zip(watch.updates, other_watch.updates, strict=True):
        assert torch.equal(vector, other_vector)
        assert update.logged == other.logged


def test_a_round_is_compared_with_those_before_it(made):
    play("vectorized", Logs, **unequal(rounds=3, local_epochs=4))
    # In a pass: a call with full batches, and two that shorter ones share. Both kinds are recorded twice in the first
    # round, and once in each other round.
    assert len(made) == 2 * 2 + 2 * 2


def test_a_program_that_fails_is_replaced_by_the_step(monkeypatch):
    def failing(pattern):
        def program(rows, inputs):
            raise RuntimeError("no such operation")

        return program

    _, expected, _ = play("vectorized", Logs, **unequal(local_epochs=3))
    monkeypatch.setattr(repeated, "program_of", failing)
    _, module, watch = play("vectorized", Logs, **unequal(local_epochs=3))
    # Without shared calls, which are proven for programs that can be compared only.
    assert torch.allclose(flat(module), flat(expected), rtol=1e-5, atol=1e-6)
    assert len(watch.updates) == 12


def test_steps_with_hooks_or_random_numbers_are_not_recorded():
    hooked = Classifier()
    hooked.net[0].register_forward_hook(lambda layer, inputs, output: output * 2)
    for module in (hooked, Classifier(dropout=0.5)):
        runner, _, _ = play("vectorized", lambda module=module: module, rounds=1)
        assert runner.fit_loop.federation.engine.repeated is None


# ---------------------------------------------------------------------- recordings


def record(function, *inputs):
    recording = Recording(len(inputs[0]), inputs)
    with recording:
        recording.finish(function(*inputs))
    return recording


def stack(rows):
    return torch.randn(rows, 4, 3, generator=torch.Generator().manual_seed(rows))


def test_one_program_serves_any_number_of_rows():
    def function(x):
        x = x.reshape(-1, 3) - torch.tensor([1.0, 2.0, 3.0])
        low, high = x.view(-1, 4, 3).split([1, 3], 1)
        total = torch.zeros(len(high))
        total += high.sum((1, 2))
        return {"total": total, "low": [low.expand(-1, 2, 3).amax(2), None]}

    pattern = Pattern(record(function, stack(2)))
    assert pattern.rows == 2
    pattern.confirm(record(function, stack(5)))
    assert pattern.rows is None
    program = program_of(pattern)
    for rows in (3, 7, 3):
        result, expected = program(rows, [stack(rows)]), function(stack(rows))
        assert torch.equal(result["total"], expected["total"])
        assert torch.equal(result["low"][0], expected["low"][0])


def test_another_number_or_tensor_is_another_program():
    pattern = Pattern(record(lambda x: x * 2.0, stack(2)))
    for function in (lambda x: x * 3.0, lambda x: x + 2.0, lambda x: (x * 2.0).neg(), lambda x: x * torch.tensor(2.0)):
        with pytest.raises(DifferenceError):
            pattern.confirm(record(function, stack(2)))
    pattern = Pattern(record(lambda x: x * torch.tensor(2.0), stack(2)))
    with pytest.raises(DifferenceError):
        pattern.confirm(record(lambda x: x * torch.tensor(3.0), stack(2)))
    # The number of rows enters in another way than as a factor.
    pattern = Pattern(record(lambda x: x[1 : len(x) - 1], stack(4)))
    with pytest.raises(DifferenceError):
        pattern.confirm(record(lambda x: x[1 : len(x) - 1], stack(7)))


def test_a_number_that_python_sees_cannot_be_repeated():
    assert record(lambda x: x.clone().bernoulli_(0.5, generator=torch.Generator()), stack(2)).obstacle is not None
    assert record(lambda x: x * x.sum().item(), stack(2)).obstacle is not None
    assert record(lambda x: x.clone().transpose_(0, 1), stack(2)).obstacle is not None


# ---------------------------------------------------------------------- shared calls


class Variant(Classifier):
    """A step whose kind the test chooses."""

    def __init__(self, kind):
        super().__init__(norm=kind == "BatchNorm")
        self.kind = kind

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        if self.kind == "sum":
            return cross_entropy(scores, y, reduction="sum")
        if self.kind == "squares":
            return mse_loss(scores, nn.functional.one_hot(y, 3).float())
        if self.kind == "mean of weights":
            return cross_entropy(scores, y) + self.net[0].weight.mean()
        if self.kind == "ignored classes":
            return cross_entropy(scores, y, ignore_index=2, label_smoothing=0.1)
        if self.kind == "short ones count double" and len(x) == 2:
            return 2 * cross_entropy(scores, y)
        if self.kind == "logs lengths":
            self.log("length", float(len(x)))
        return torch.mean(nn.functional.cross_entropy(scores, y, reduction="none"))


@pytest.mark.parametrize("kind", ["own mean", "squares", "ignored classes"])
def test_means_over_samples_share_calls(kind, made):
    runner, _, _ = assert_equal_engines(lambda: Variant(kind), **unequal(rounds=1))
    assert runner.fit_loop.federation.engine.facts.sharing == Sharing(8, frozenset({2, 3, 5, 6}))
    assert made == [8, 8, 8]


@pytest.mark.parametrize("kind", ["sum", "BatchNorm", "short ones count double", "logs lengths", "mean of weights"])
def test_other_steps_do_not(kind):
    runner, _, _ = assert_equal_engines(lambda: Variant(kind), **unequal(rounds=1))
    assert runner.fit_loop.federation.engine.facts.sharing == Sharing()


class Centers(Classifier):
    """From the second round on its loss is no mean over samples, because of an attribute or of the trainer."""

    centers = False

    def __init__(self, by_epoch):
        super().__init__()
        self.by_epoch = by_epoch

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        if self.centers or (self.by_epoch and self.trainer.current_epoch):
            scores = scores - scores.mean(0, keepdim=True)
        return cross_entropy(scores, batch[1])


class Center(FederatedCallback):
    def on_round_start(self, trainer, pl_module, *_):
        if trainer.global_step:
            pl_module.centers = True


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_step_that_changes_later_no_longer_shares_calls(by_epoch):
    options = unequal(callbacks=[] if by_epoch else [Center()])
    runner, _, _ = assert_equal_engines(lambda: Centers(by_epoch), **options)
    assert runner.fit_loop.federation.engine.facts.sharing == Sharing()


def test_long_padding_is_not_worth_a_call():
    assert worth_sharing(10, 3, rows=5, parameters=610)
    assert not worth_sharing(64, 3, rows=1, parameters=118_282)


# ---------------------------------------------------------------------- compiled


def test_graphs_that_are_slower_are_given_up(monkeypatch):
    call = compiled._Graph.__call__

    def slow(self, inputs):
        time.sleep(0.2)
        return call(self, inputs)

    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.setattr(compiled._Graph, "__call__", slow)
    monkeypatch.setattr(compiled, "ENOUGH_SAMPLES", 2)
    with pytest.warns(UserWarning, match=r"no effect from now on: a call takes \d+\.\d\d ms with a graph and"):
        _, module, _ = play("vectorized", Logs, **unequal(rounds=3, local_epochs=2, compile_clients=True))
    _, expected, _ = play("vectorized", Logs, **unequal(rounds=3, local_epochs=2))
    assert torch.allclose(flat(module), flat(expected), rtol=1e-5, atol=1e-6)
