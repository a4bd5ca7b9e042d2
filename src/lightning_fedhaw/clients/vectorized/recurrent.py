"""Recurrent layers, computed from operations that can be batched.

The kernels behind :class:`torch.nn.LSTM`, :class:`torch.nn.GRU` and :class:`torch.nn.RNN` cannot be batched over
clients with different weights. These functions take the arguments of the kernels and return what they return; values
differ by rounding only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""The hidden state ``[batch, hidden]``, and for an LSTM its cell state."""


class CellWeights(NamedTuple):
    """The weights of one layer and direction.

    Attributes:
        inputs: ``[gates, features]``.
        hidden: ``[gates, hidden]``.
        input_bias: ``[gates]``.
        hidden_bias: ``[gates]``.
        projection: ``[projected, hidden]``, of an LSTM with projections.
    """

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


Cell = Callable[[Tensor, State, CellWeights], State]
"""A step in time, from the products of the inputs ``[batch, gates]``, the state before and the weights."""

Dropout = Callable[[Tensor, float, bool], Tensor]
"""``F.dropout``, or its replacement: from the values, the probability and whether the layer is in training mode."""


def lstm_cell(products: Tensor, state: State, weights: CellWeights) -> State:
    """Take a step of an LSTM, with projections (arXiv:1402.1128) where there is a weight for them."""
    hidden, cell = state
    gates = products + linear(hidden, weights.hidden, weights.hidden_bias)
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, -1)
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    hidden = output_gate.sigmoid() * cell.tanh()
    if weights.projection is not None:
        hidden = linear(hidden, weights.projection)
    return hidden, cell


def gru_cell(products: Tensor, state: State, weights: CellWeights) -> State:
    """Take a step of a GRU, whose reset gate acts after the matrix product, as cuDNN's does."""
    (hidden,) = state
    recurrent = linear(hidden, weights.hidden, weights.hidden_bias)
    reset_input, update_input, candidate_input = products.chunk(3, -1)
    reset_recurrent, update_recurrent, candidate_recurrent = recurrent.chunk(3, -1)
    reset = (reset_input + reset_recurrent).sigmoid()
    update = (update_input + update_recurrent).sigmoid()
    candidate = (candidate_input + reset * candidate_recurrent).tanh()
    return (candidate + update * (hidden - candidate),)


def tanh_cell(products: Tensor, state: State, weights: CellWeights) -> State:
    """Take a step of an Elman network with the hyperbolic tangent."""
    return (_elman(products, state, weights).tanh(),)


def relu_cell(products: Tensor, state: State, weights: CellWeights) -> State:
    """Take a step of an Elman network with ReLU."""
    return (_elman(products, state, weights).relu(),)


def _elman(products: Tensor, state: State, weights: CellWeights) -> Tensor:
    """Return the sum that the activation of an Elman network is applied to."""
    return products + linear(state[0], weights.hidden, weights.hidden_bias)


CELLS: dict[Any, Cell] = {
    torch.lstm: lstm_cell,
    torch.gru: gru_cell,
    torch.rnn_tanh: tanh_cell,
    torch.rnn_relu: relu_cell,
}
"""The cell of each of torch's kernels."""


def run_layers(
    cell: Cell,
    dropout: Dropout,
    inputs: Tensor,
    initial: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    p: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Run stacked recurrent layers over a sequence; the arguments after ``dropout`` are those of ``torch.lstm``.

    Args:
        cell: The step in time.
        dropout: Drops outputs between layers.
        inputs: ``[time, batch, features]``, or ``[batch, time, features]`` with ``batch_first``.
        initial: The initial state, ``[layers x directions, batch, hidden]`` each.
        weights: The weights of every layer and direction, one after the other.
        has_biases: Whether two biases are among them.
        num_layers: The number of layers.
        p: The probability of dropout between layers.
        training: Whether outputs are dropped.
        bidirectional: Whether a second cell reads the sequence backward.
        batch_first: Whether the batch is the first axis.

    Returns:
        The outputs in the layout of the inputs, and the final states in that of the initial ones.
    """
    initial_states = (initial,) if isinstance(initial, Tensor) else tuple(initial)
    cells = _cell_weights(weights, has_biases, num_layers * (1 + bidirectional))
    values = inputs.transpose(0, 1) if batch_first else inputs
    final_states: list[State] = []
    for layer in range(num_layers):
        if layer:
            values = dropout(values, p, training)
        outputs = []
        for is_reversed in (False, True)[: 1 + bidirectional]:
            index = len(final_states)
            state = tuple(initial_state[index] for initial_state in initial_states)
            output, state = _run_cell(cell, values, state, cells[index], is_reversed)
            outputs.append(output)
            final_states.append(state)
        values = torch.cat(outputs, -1)
    if batch_first:
        values = values.transpose(0, 1)
    return values, *map(torch.stack, zip(*final_states, strict=True))


def _cell_weights(weights: Sequence[Tensor], has_biases: bool, num_cells: int) -> list[CellWeights]:
    """Name the weights of every layer and direction, which torch passes one after the other."""
    count = len(weights) // num_cells
    cells = []
    for first in range(0, len(weights), count):
        inputs, hidden, *further = weights[first : first + count]
        biases: list[Tensor | None] = [None, None]
        if has_biases:
            biases = [*further[:2]]
            further = further[2:]
        # What remains is the projection, if the layer has one.
        cells.append(CellWeights(inputs, hidden, *biases, *further))
    return cells


def _run_cell(
    cell: Cell, values: Tensor, state: State, weights: CellWeights, is_reversed: bool
) -> tuple[Tensor, State]:
    """Run one cell over a sequence ``[time, batch, features]``, and return its outputs and its last state."""
    # The inputs of all times in one product: only the hidden state has to wait for the step before.
    products = list(linear(values, weights.inputs, weights.input_bias).unbind(0))
    if is_reversed:
        products.reverse()
    outputs = []
    for product in products:
        state = cell(product, state, weights)
        outputs.append(state[0])
    if is_reversed:
        outputs.reverse()
    return torch.stack(outputs), state


@contextmanager
def following_parameters(layers: Sequence[nn.RNNBase]) -> Iterator[None]:
    """Let recurrent layers compute with the tensors that are in their dicts of parameters inside the context.

    They hold their weights in a list as well, which they compute with, and references to find out that it is old. They
    would renew both by themselves, but for good, and would look for the memory of batched tensors, which have none.
    """
    saved = [(layer._flat_weights, layer._flat_weight_refs) for layer in layers]
    for layer in layers:
        weights = [getattr(layer, name) for name in layer._flat_weights_names]
        layer.__dict__["_flat_weights"] = weights
        layer.__dict__["_flat_weight_refs"] = [weakref.ref(weight) for weight in weights]
    try:
        yield
    finally:
        for layer, (weights, references) in zip(layers, saved, strict=True):
            layer.__dict__["_flat_weights"] = weights
            layer.__dict__["_flat_weight_refs"] = references
