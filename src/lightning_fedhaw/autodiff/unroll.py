"""Programs of many rounds: checkpoints, and a horizon for the derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from lightning_fedhaw import arguments
from lightning_fedhaw.autodiff import tape
from lightning_fedhaw.autodiff.placement import MIXED, TRACE, constant, tensors_in
from lightning_fedhaw.autodiff.primitives import ACCOUNT, ROUND

Round = Callable[[Any, Any, int], Any]


def unroll(
    round_: Round,
    state: Any,
    hyper: Any,
    rounds: int,
    *,
    horizon: int | None = None,
    checkpointed: bool = False,
) -> Any:
    """Run several rounds, such that the result can be differentiated through them.

    Args:
        round_: ``round_(state, hyper, round_idx) -> state``. Whatever it draws must be named by the round's number,
            since a checkpointed round is computed again.
        state: The state before the first round: a tensor at the server, or a container of these.
        hyper: What stays the same in all rounds, such as hyper-parameters; in the same form.
        rounds: How many.
        horizon: Through how many rounds the derivative of a state goes back; all by default. 1 is the one-step
            derivative of hypergradient descent.
        checkpointed: Whether reverse mode keeps only the states between rounds and computes each round again in its
            second pass. Forward and mixed mode keep no tape of the clients, and ignore it.

    Returns:
        The state after the last round.

    Raises:
        ValueError: If ``rounds`` or ``horizon`` is below 1.
        RuntimeError: In the reverse pass, if a checkpointed round depends on differentiated tensors that are neither in
            ``state`` nor in ``hyper``.
    """
    rounds = arguments.integer("rounds", rounds, minimum=1)
    if horizon is not None:
        horizon = arguments.integer("horizon", horizon, minimum=1)
    trace = TRACE.get()
    is_checkpointed = checkpointed and not MIXED.get() and not _has_tangents((state, hyper))
    for round_idx in range(rounds):
        if horizon is not None and round_idx == rounds - horizon:
            state = pytree.tree_map(constant, state)
        if trace is not None and checkpointed:
            with trace.checkpointed_round() as results:
                state = _run(round_, state, hyper, round_idx)
                results += tensors_in(state)
        elif is_checkpointed:
            state = _checkpointed_round(round_, state, hyper, round_idx)
        else:
            state = _run(round_, state, hyper, round_idx)
    return state


def _run(round_: Round, state: Any, hyper: Any, round_idx: int) -> Any:
    token = ROUND.set(round_idx)
    try:
        return round_(state, hyper, round_idx)
    finally:
        ROUND.reset(token)


def _has_tangents(value: Any) -> bool:
    """Whether forward mode is at work on a value."""
    leaves = tensors_in(value)
    return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)  # type: ignore[no-untyped-call]


def _checkpointed_round(round_: Round, state: Any, hyper: Any, round_idx: int) -> Any:
    leaves, structure = pytree.tree_flatten((state, hyper))
    ends = _Ends()
    outputs = _Checkpoint.apply(round_, round_idx, structure, ends, *leaves)
    return pytree.tree_unflatten(list(outputs), ends.structure)


class _Ends:
    """The form of a round's result."""

    structure: Any


class _Checkpoint(torch.autograd.Function):
    """One round whose tape is not kept.

    ``torch.utils.checkpoint`` would compute a round once more for every gradient that its clients take.
    """

    @staticmethod
    def forward(ctx: Any, round_: Round, round_idx: int, structure: Any, ends: _Ends, *leaves: Any) -> tuple[Any, ...]:
        ctx.call = round_, round_idx, structure
        # The backward pass may run in a thread of torch's own.
        ctx.surroundings = copy_context()
        ctx.leaves = leaves
        state, hyper = pytree.tree_unflatten(list(leaves), structure)
        outputs, ends.structure = pytree.tree_flatten(_run(round_, state, hyper, round_idx))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return ctx.surroundings.run(_pull_back, ctx, gradients)  # type: ignore[no-any-return]


def _pull_back(ctx: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """Compute a round again, with a tape, and its derivative."""
    round_, round_idx, structure = ctx.call
    # The first four arguments of `apply` are not tensors.
    are_needed = ctx.needs_input_grad[4:]
    leaves = []
    inputs = []
    for leaf, is_needed in zip(ctx.leaves, are_needed, strict=True):
        if is_needed:
            # On a tape of its own, which ends where this round begins.
            leaf = leaf.detach().requires_grad_()
            inputs.append(leaf)
        leaves.append(leaf)
    state, hyper = pytree.tree_unflatten(leaves, structure)
    with torch.enable_grad(), _also_differentiated(inputs):
        outputs, _ = pytree.tree_flatten(_run(round_, state, hyper, round_idx))
    on_tape = []
    cotangents = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if isinstance(output, Tensor) and output.requires_grad:
            on_tape.append(output)
            cotangents.append(gradient)
    _refuse_others(on_tape, inputs)
    pulled = iter(torch.autograd.grad(on_tape, inputs, cotangents, allow_unused=True))
    answers = []
    for is_needed in are_needed:
        answers.append(next(pulled) if is_needed else None)
    return None, None, None, None, *answers


@contextmanager
def _also_differentiated(inputs: list[Tensor]) -> Iterator[None]:
    """Let the account of the derivative know the leaves of a round that is computed again."""
    account = ACCOUNT.get()
    if account is None:
        yield
        return
    before = account.inputs
    account.inputs = [*before, *inputs]
    try:
        yield
    finally:
        account.inputs = before


def _refuse_others(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    others = tape.leaves(outputs).keys() - {id(value) for value in inputs}
    account = ACCOUNT.get()
    if account is not None:
        # What else has a tape is not differentiated.
        others &= {id(value) for value in account.inputs}
    if others:
        raise RuntimeError(
            "A checkpointed round depends on differentiated tensors that `unroll` does not know, so their derivative"
            " would be lost. Pass them in `hyper=`."
        )
