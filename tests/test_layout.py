import pytest
import torch
from torch import nn

from lightning_fedhaw.extending import ParameterLayout


def test_read_write_views_round_trip():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    layout = ParameterLayout.of(module)
    vector = torch.arange(13.0)
    layout.write(vector, layout.tensors(module))
    assert module[0].weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert module[1].bias.tolist() == [12]
    assert torch.equal(layout.read(layout.tensors(module)), vector)
    layout.views(vector)["0.bias"].zero_()
    assert vector[6:9].tolist() == [0, 0, 0], "views share memory with the vector"


def test_views_of_a_stack_keep_the_leading_axis_and_the_graph():
    layout = ParameterLayout.of(nn.Linear(2, 3))
    stack = torch.randn(4, 9, requires_grad=True)
    views = layout.views(stack)
    assert views["weight"].shape == (4, 3, 2)
    views["bias"].sum().backward()
    assert stack.grad.sum() == 12


def test_frozen_and_tied_parameters_do_not_travel_twice():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    layout = ParameterLayout.of(module)
    assert layout.names == ("a.weight", "b.bias")
    assert layout.numel == 12


def test_low_precision_models_have_a_float32_vector():
    module = nn.Linear(2, 2).bfloat16()
    layout = ParameterLayout.of(module)
    assert layout.dtype == torch.float32
    assert not layout.is_exact
    assert layout.message_bytes == 12
    vector = torch.full((6,), 1.0001)
    assert torch.equal(layout.rounded(vector), torch.ones(6))
    assert ParameterLayout.of(nn.Linear(2, 2).double()).dtype == torch.float64


def test_expand_gives_a_number_or_a_vector():
    layout = ParameterLayout.of(nn.Linear(2, 2))
    assert layout.expand([0.5, 0.5]).shape == ()
    assert layout.expand([0.5, 0.1]).tolist() == pytest.approx([0.5] * 4 + [0.1] * 2)


def test_groups_by_owning_module():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    assert layout.groups() == {"0": [slice(0, 6), slice(6, 9)], "1": [slice(9, 12), slice(12, 13)]}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterLayout.of(nn.Linear(2, 2).requires_grad_(False))


def test_complex_parameters_are_refused_by_name():
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="`w` is torch.complex64"):
        ParameterLayout.of(module)


def test_a_changed_set_of_trainable_parameters_is_an_error():
    module = nn.Linear(2, 2)
    layout = ParameterLayout.of(module)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"changed during `fit`.*\['bias'\]"):
        layout.tensors(module)
