"""Large blocks of memory are used again, and never while somebody still looks at them."""

import pytest
import torch

from federations import Classifier, flat, loader, trainer
from lightning_fedhaw import FedHAWCallback, memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1 << 10)
    memory.release()
    yield
    memory.release()


def make(*shape, dtype=torch.float32):
    return memory.empty(*shape, dtype=dtype, device=CPU)


def test_a_block_is_used_again_once_nobody_has_it():
    first = make(10, 100).fill_(1.0)
    address, view = first.data_ptr(), first[3, 50:]
    del first
    second = make(10, 100).fill_(2.0)
    assert second.data_ptr() != address, "a view still has it"
    assert view.tolist() == [1.0] * 50
    del view
    assert make(1000).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_and_dtype(dtype):
    tensor = make(7, 500, dtype=dtype)
    assert tensor.shape == (7, 500)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == 7 * 500 * dtype.itemsize, "a checkpoint would hold the rest as well"
    assert torch.equal(tensor.zero_().requires_grad_().sum(), torch.zeros((), dtype=dtype))


def test_what_does_not_fit_is_given_back():
    del_me = make(10, 1000)
    del del_me
    held = make(1000)
    assert held.untyped_storage().nbytes() == 4000
    assert memory._spare == [], "a vector sits in a matrix's block, or more is held than was ever in use"


def test_a_federation_gives_the_same_with_blocks_used_again(monkeypatch):
    results = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(memory, "LARGE", least)
        module, rule = Classifier(), FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1)
        trainer(rounds=5, rule=rule, clients_per_round=2).fit(module, loader())
        assert memory._spare == [], "the end of a run gives them back"
        results.append((flat(module), rule.state["previous"].gather()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_small_and_released_blocks_are_not_kept():
    del_me = make(4)
    del del_me
    assert memory._spare == []
    del_me = make(1000)
    del del_me
    assert len(memory._spare) == 1
    held = make(2000)
    memory.release()
    del held
    assert memory._spare == [], "after a run, nothing is left behind"
