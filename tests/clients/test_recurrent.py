"""Recurrent layers in the vectorized engine: the numbers of torch's own kernels."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, TensorDataset

from engines import assert_equal_engines, play

LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM, projected, both directions, dropout": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, dropout=0.3),
    "LSTM without biases": lambda: nn.LSTM(3, 4, 2, bias=False, dropout=0.3),
    "GRU": lambda: nn.GRU(3, 4),
    "GRU, both directions": lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    "GRU, dropout": lambda: nn.GRU(3, 4, 3, dropout=0.5, batch_first=True),
    "tanh": lambda: nn.RNN(3, 4, 2, dropout=0.3),
    "ReLU": lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
}


class Sequences(pl.LightningModule):
    """Classifies sequences ``[batch, time, 3]`` by the last output."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer()
        outputs = self.layer.proj_size or self.layer.hidden_size
        self.net = nn.Linear(outputs * (1 + self.layer.bidirectional), 3)

    def encode(self, inputs):
        if self.layer.batch_first:
            return self.layer(inputs)[0][:, -1]
        return self.layer(inputs.transpose(0, 1))[0][-1]

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(self.encode(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def sequences(batch_size=8):
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, 3, generator=draws)
    return DataLoader(TensorDataset(inputs, inputs[:, -1].argmax(-1)), batch_size=batch_size, shuffle=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_both_engines_give_the_same_updates(name):
    assert_equal_engines(lambda: Sequences(LAYERS[name]), data=sequences())


class FromState(Sequences):
    """Starts from a state of its own, and reads the last one."""

    def encode(self, inputs):
        hidden = inputs[:, 0, :1].expand(1, len(inputs), 4).contiguous()
        _, (hidden, cell) = self.layer(inputs, (hidden, 2 * hidden))
        return hidden[-1] + cell[-1]


class OneSequence(Sequences):
    """Calls the layer on sequences that are not batched."""

    def encode(self, inputs):
        return torch.stack([self.layer(sequence)[0][-1] for sequence in inputs])


@pytest.mark.parametrize("module", [FromState, OneSequence])
def test_states_and_sequences_that_are_not_batched(module):
    assert_equal_engines(lambda: module(LAYERS["LSTM"]), data=sequences())


def test_nothing_of_the_batched_calls_is_left_in_the_layer():
    _, module, _ = play("vectorized", lambda: Sequences(LAYERS["GRU"]), data=sequences())
    inputs = torch.ones(2, 5, 3)
    outputs = module.encode(inputs)
    assert torch.equal(copy.deepcopy(module).encode(inputs), outputs)
    outputs.sum().backward()
    assert module.layer.weight_hh_l0.grad.abs().sum() > 0


class Packed(Sequences):
    def encode(self, inputs):
        time_first = inputs.transpose(0, 1).flatten(0, 1)
        return self.layer(PackedSequence(time_first, torch.full((5,), len(inputs))))[1][-1]


def test_packed_sequences_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"packs sequences, whose lengths.*engine=\"sequential\""):
        play("vectorized", lambda: Packed(LAYERS["GRU"]), data=sequences())


@pytest.mark.parametrize(("name", "choice"), [("GRU", "vectorized"), ("LSTM", "sequential")])
def test_auto_takes_the_faster_engine(name, choice):
    runner, _, _ = play(
        "auto", lambda: Sequences(LAYERS[name]), data=sequences(2), num_clients=10, alpha=100.0, min_client_samples=1
    )
    assert type(runner.fit_loop.federation.engine).__name__.lower().startswith(choice)
