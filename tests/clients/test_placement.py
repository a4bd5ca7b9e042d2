"""Where training data lies, and how parameters and inputs are laid out while clients train."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import IndexPartitioner

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
    class Fails(Images):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(module, DataLoader(images(), batch_size=8), rounds=1, channels_last=True)
    assert module.seen == {(True, True)}
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


@pytest.mark.parametrize("choice", ["auto", "model", "cpu"])
def test_on_a_cpu_data_stays_where_it_is(choice):
    runner, module = train(data_device=choice)
    data = runner.fit_loop.federation.data
    assert data.device == torch.device("cpu")
    assert data._tensors[0].data_ptr() == data.dataset.tensors[0].data_ptr()
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["auto", "model", "cpu"])
def test_on_a_gpu_data_is_moved_once_and_steps_do_not_wait(choice):
    device = torch.device("cuda", 0)

    class Impatient(Classifier):
        """Between a client's first step and its last, which is short, waiting for the device is an error."""

        def training_step(self, batch, batch_idx):
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
    assert runner.fit_loop.federation.data.device == (torch.device("cpu") if choice == "cpu" else device)
    assert torch.allclose(flat(module).cpu(), flat(train(**data)[1]), atol=1e-4)
