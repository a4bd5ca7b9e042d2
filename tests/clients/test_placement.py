"""Where training data and states lie, and how parameters and inputs are laid out while clients train."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import lightning_fedhaw
from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import IndexPartitioner
from lightning_fedhaw.clients import local_buffers
from lightning_fedhaw.clients.optimizer_states import restore_settings, restore_states, settings_of, states_of
from lightning_fedhaw.clients.vectorized import optimizers
from lightning_fedhaw.clients.vectorized.engine import VectorizedEngine
from lightning_fedhaw.clients.vectorized.optimizers import StackedOptimizer

LAST = torch.channels_last


class Images(Classifier):
    """A small convolutional module that writes down the layout of what it is given, and of its own weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)
            )
        self.seen = set()

    def training_step(self, batch, batch_idx):
        self.seen.add(
            (batch[0].is_contiguous(memory_format=LAST), self.net[0].weight.is_contiguous(memory_format=LAST))
        )
        return super().training_step(batch, batch_idx)


class Samples(Dataset):
    """Samples that have to be fetched one by one."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return tuple(t[i] for t in self.tensors)


def images(count=60):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=g)
    return TensorDataset(x, (x.mean((1, 2, 3)) * 8).round().long().clamp(-1, 1) + 1)


KINDS = {
    "in memory": lambda: images(),
    "a part": lambda: Subset(images(90), range(60)),
    "joined": lambda: ConcatDataset([images(30), images(30)]),
    "one by one": lambda: Samples(images().tensors),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_channels_last_changes_the_layout_and_not_the_result(kind, momentum):
    results = []
    for channels_last in (False, True):
        data = KINDS[kind]()
        module = Images(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum))
        start = flat(module)
        train(module, DataLoader(data, batch_size=8, shuffle=True), rounds=2, seed=3, channels_last=channels_last)
        assert module.seen == {(channels_last, channels_last)}
        assert all(p.is_contiguous() for p in module.parameters())
        results.append(flat(module) - start)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
    assert results[0].abs().max() > 1e-2


def test_a_module_that_is_channels_last_stays_so():
    module = Images().to(memory_format=LAST)
    train(module, DataLoader(images(), batch_size=8), rounds=1)
    assert module.net[0].weight.is_contiguous(memory_format=LAST)
    assert not module.net[0].weight.is_contiguous()


def test_a_failed_round_leaves_the_layout_as_it_was():
    layouts = set()  # outside of the module, where an undone round leaves nothing

    class Fails(Images):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            layouts.update(self.seen)
            raise RuntimeError("on purpose")

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(module, DataLoader(images(), batch_size=8), rounds=1, channels_last=True)
    assert layouts == {(True, True)}
    assert module.net[0].weight.is_contiguous()


def test_channels_last_leaves_data_without_four_axes_alone():
    results = []
    for channels_last in (False, True):
        runner, module = train(data=loader(), rounds=2, channels_last=channels_last)
        data = runner.fit_loop.federation.data
        assert data.gather(torch.tensor([3]))[0].equal(data.dataset.tensors[0][3:4])
        results.append(flat(module))
    assert torch.equal(*results)


def test_data_is_laid_out_once_and_back_again():
    runner, _ = train(Images(), DataLoader(images(), batch_size=8), rounds=1, channels_last=True)
    data, index = runner.fit_loop.federation.data, torch.tensor([[4, 2], [0, 9]])
    for channels_last in (True, False):
        data.place(channels_last=channels_last)
        x, y = data.gather(index)
        assert x.equal(data.dataset.tensors[0][index])
        assert y.equal(data.dataset.tensors[1][index])
        assert x[0].is_contiguous(memory_format=LAST) is channels_last
    assert data.dataset.tensors[0].is_contiguous()


def test_data_that_finds_no_room_stays_as_it_was(monkeypatch):
    runner, _ = train(Images(), DataLoader(images(), batch_size=8), rounds=1)
    data, index = runner.fit_loop.federation.data, torch.tensor([4, 2])

    def full(tensor, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "to", full)
        data.place(torch.device("cuda"), channels_last=True)
    assert data.gather(index)[0].equal(data.dataset.tensors[0][index])
    data.place(channels_last=True)
    assert data.gather(index)[0].equal(data.dataset.tensors[0][index])


@pytest.mark.parametrize("choice", ["auto", "model", "cpu"])
def test_on_a_cpu_data_stays_where_it_is(choice):
    runner, module = train(data_device=choice)
    data = runner.fit_loop.federation.data
    assert data.device == torch.device("cpu")
    assert data.samples.tensors[0].data_ptr() == data.dataset.tensors[0].data_ptr()
    assert torch.equal(flat(module), flat(train()[1]))


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match=r"`data_device` must be one of 'auto', 'model', 'cpu', got 'gpu'"):
        trainer(data_device="gpu")


def test_transfer_hooks_are_called_whatever_the_place():
    class Transfers(Classifier):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls.append("before")
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls.append("after")
            return [batch[0] * 2, batch[1]]

        def training_step(self, batch, batch_idx):
            self.calls.append("step")
            return cross_entropy(self.net(batch[0]), batch[1])

    module = Transfers()
    train(module, rounds=1, data_device="model", client_eval=False)
    assert module.calls == ["before", "after", "step"] * (len(module.calls) // 3)
    assert module.calls


def test_data_that_was_placed_is_let_go_at_the_end_of_a_run():
    data = Subset(images(90), range(60))
    runner, _ = train(Images(), DataLoader(data, batch_size=8), rounds=1, channels_last=True)
    own = runner.fit_loop.federation.data
    assert "_tensors" not in vars(own)
    index = torch.tensor([3, 1])
    assert own.gather(index)[0].equal(data.dataset.tensors[0][index]), "and is there again for whoever asks"


# ---------------------------------------------------------------------- states of optimizers


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}])
def test_states_are_given_where_an_optimizer_would_load_them(options):
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.Adam([parameter])
    optimizer.param_groups[0].update(options)
    states = {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    expected = {name: value.device.type for name, value in optimizer.state[parameter].items()}
    restore_states(optimizer, states)
    assert {name: value.device.type for name, value in optimizer.state[parameter].items()} == expected
    assert expected["step"] == ("meta" if {"fused", "capturable"} & options.keys() else "cpu")


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}])
def test_kept_states_on_a_gpu_need_no_number_from_it(options, monkeypatch):
    # Fake tensors know their device and no numbers: a state on the wrong device is an error, and so is any `.item()`.
    kept = {
        index: {"step": torch.tensor(2.0), "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
        for index, shape in enumerate([(3, 4), (4,)])
    }
    monkeypatch.setattr(optimizers, "_key", lambda template: None)  # numbers in host memory are fake here, too
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in [(3, 4), (4,)]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=0.1, **options)
        restore_states(optimizer, kept)
        optimizer.step()
        assert optimizer.state[parameters[0]]["step"].device.type == "cuda"

        stacks = [torch.zeros(5, *parameter.shape, device="cuda") for parameter in parameters]
        gradients = [torch.ones_like(stack) for stack in stacks]
        stacked = StackedOptimizer(optimizer, stacks, frozenset({"exp_avg", "exp_avg_sq"}), [kept] * 5)
        stacked.step(range(5), slice(0, 5), gradients)
        stacked.step(range(3), slice(0, 3), [gradient[:3] for gradient in gradients])
        assert stacked.kinds[0] == stacked.kinds[2] != stacked.kinds[3] == stacked.kinds[4]
        left = [states_of(optimizer), stacked.states(0)]
    for states in left:
        assert {value.device.type for own in states.values() for value in own.values()} == {"cpu"}


class Reads(TorchDispatchMode):
    """Counts the numbers that are read out of single tensors, for each of which a host waits for its GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_stacked_steps_read_no_numbers():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.1), fused=True)
    kept = [
        {
            index: {
                "step": torch.tensor(float(tasks)),
                "exp_avg": torch.ones_like(p),
                "exp_avg_sq": torch.ones_like(p),
            }
            for index, p in enumerate(module.parameters())
        }
        for tasks in (1, 1, 2)
    ]
    stacks = [torch.zeros(3, *p.shape) for p in module.parameters()]
    with Reads() as reads:
        stacked = StackedOptimizer(optimizer, stacks, frozenset({"exp_avg", "exp_avg_sq"}), kept)
        for _ in range(4):
            stacked.step(range(3), slice(0, 3), [torch.ones_like(stack) for stack in stacks])
    assert reads.count == 0
    assert [stacked.states(row)[19]["step"].item() for row in range(3)] == [5, 5, 6]
    assert stacked.kinds[0] == stacked.kinds[1] != stacked.kinds[2]


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_fused_optimizer_keeps_its_states_like_any_other(engine):
    results = []
    for fused in (False, True):
        module = Classifier(lambda p, fused=fused: torch.optim.AdamW(p, lr=0.05, fused=fused))
        start = flat(module)
        options = {"optimizer_state": "kept", "clients_per_round": 2, "rounds": 4, "seed": 2, "engine": engine}
        runner, _ = train(module, **options)
        assert isinstance(runner.fit_loop.federation.engine, VectorizedEngine) is (engine == "vectorized")
        kept = runner.fit_loop.federation.engine.optimizer_states
        results.append((flat(module) - start, {client: kept[client][0][0]["step"].item() for client in kept}))
    (one, steps), (other, same_steps) = results
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert one.abs().max() > 0.05
    assert steps == same_steps
    assert max(steps.values()) > 4, "a client came twice"


def test_a_rate_that_another_process_sent_goes_where_the_rate_is():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    settings = settings_of([optimizer])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="meta")
    restore_settings([optimizer], settings)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"


# ---------------------------------------------------------------------- what is kept in host memory


def test_buffers_that_stay_with_clients_are_in_host_memory(monkeypatch):
    monkeypatch.setattr(local_buffers, "HOST", torch.device("meta"))  # so that it is another place than the device
    runner, _ = train(Classifier(norm=True), rounds=1, buffers="local", client_eval=False)
    buffers = runner.fit_loop.federation.state_dict()["buffers"]
    assert len(buffers) == 4
    for own in buffers.values():
        assert own.keys() == {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
        assert {value.device.type for value in own.values()} == {"meta"}


def test_whatever_is_loaded_says_where_to():
    calls = []
    for path in Path(lightning_fedhaw.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "torch.load" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls.append((path.name, {keyword.arg for keyword in node.keywords}))
    assert calls
    for name, keywords in calls:
        assert {"map_location", "weights_only"} <= keywords, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["auto", "model", "cpu"])
def test_on_a_gpu_data_is_moved_once_and_steps_do_not_wait(choice):
    device = torch.device("cuda", 0)

    places = set()

    class Impatient(Classifier):
        """Between a client's first step and its last, which is short, waiting for the device is an error."""

        def training_step(self, batch, batch_idx):
            places.add(self.trainer.fit_loop.federation.data.device)
            assert batch[0].device == device
            is_last = len(batch[0]) < 8
            torch.cuda.set_sync_debug_mode("default" if is_last or choice == "cpu" else "error")
            return super().training_step(batch, batch_idx)

    try:
        parts = IndexPartitioner([range(0, 50), range(50, 117)])  # whose last batches are short
        data = {"partitioner": parts, "num_clients": 2, "alpha": None, "rounds": 2, "client_eval": False}
        runner, module = train(Impatient(), data_device=choice, **{**data, "accelerator": "gpu", "devices": 1})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert places == {torch.device("cpu") if choice == "cpu" else device}
    assert runner.fit_loop.federation.data.device == torch.device("cpu")
    assert torch.allclose(flat(module).cpu(), flat(train(**data)[1]), atol=1e-4)
