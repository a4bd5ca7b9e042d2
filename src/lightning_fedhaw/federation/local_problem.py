"""The two losses of one client as a rule's inquiry sees them, with exact first and second derivatives.

Shapes: P trainable parameters, U parameters that only the server changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.inquiry import UpperGradients
from lightning_fedhaw.isolation import evaluation_mode, twice_differentiable
from lightning_fedhaw.module_calls import step_arguments
from lightning_fedhaw.rule import Batch
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.layout import ParameterLayout

SizedBatch = tuple[Batch, int, int]
"""A batch on the model's device, with its number and its number of samples."""

NO_MIXED_DERIVATIVE = (
    "The loss that `training_step` returns does not depend on the upper variables ({names}) together with the trainable"
    " parameters, so no upper step changes what clients learn. Let `training_step` compute with them, or give `upper=`"
    " the names of parameters that it computes with."
)


class BilevelLosses:
    """Lower and upper loss of a module, differentiable in both kinds of variables.

    Args:
        server: The server, which calls the module with any parameters.
        upper_layout: Where each upper variable lives in a vector ``[U]``.
        upper_loss: The value of ``validation_step`` that is the upper loss; ``None`` for ``upper_step``'s.
    """

    def __init__(self, server: Server, upper_layout: ParameterLayout, upper_loss: str | None) -> None:
        self.server = server
        self.upper_layout = upper_layout
        self.upper_name = upper_loss

    def lower(self, lower: Tensor, upper: Tensor, batch: SizedBatch, own: Mapping[str, Any]) -> Tensor:
        """Return the loss of ``training_step``, a scalar."""
        data, index, _ = batch
        return self.server.loss(lower, data, index, **self._with_upper(upper, own))

    def upper(self, lower: Tensor, upper: Tensor, batch: SizedBatch, own: Mapping[str, Any]) -> Tensor:
        """Return the upper loss, a scalar.

        That of ``validation_step`` is computed in evaluation mode, as Lightning validates; that of ``upper_step`` in
        the modes in which clients train.

        Raises:
            ValueError: If it is not there, or no differentiable number.
        """
        data, index, _ = batch
        if self.upper_name is None:
            loss = self.server.call(_upper_step, lower, data, index, **self._with_upper(upper, own))
            return _checked(loss, "`upper_step` must return")
        logged: dict[str, object] = {}

        def log(name: str, value: object, *_: object, **__: object) -> None:
            logged[name] = value

        with evaluation_mode(self.server.module):
            self.server.call(_validation_step, lower, data, index, log=log, **self._with_upper(upper, own))
        if self.upper_name not in logged:
            names = ", ".join(f"'{name}'" for name in logged) or "nothing"
            raise ValueError(
                f"The upper loss '{self.upper_name}' is not logged by `validation_step`, which logs {names}. Log it"
                f" there (`self.log('{self.upper_name}', loss)`), give `upper_loss=` another name, or implement"
                " `upper_step(batch, batch_idx)` and give `upper_loss=None`."
            )
        return _checked(logged[self.upper_name], f"`validation_step` must log '{self.upper_name}' as")

    def _with_upper(self, upper: Tensor, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a client's own tensors, with the upper variables among those that are not in the vector."""
        values: dict[str, Tensor] = dict(own["local_parameters"])
        for (name, view), dtype in zip(self.upper_layout.views(upper).items(), self.upper_layout.dtypes, strict=True):
            values[name] = view.to(dtype)
        return {**own, "local_parameters": values}


@dataclass(frozen=True)
class ClientProblem:
    """The problem of one client; see :class:`~lightning_fedhaw.inquiry.LocalProblem`.

    Attributes:
        losses: The module's losses.
        lower: ``[P]``, the lower variables at which derivatives are taken.
        upper: ``[U]``, the upper variables at which derivatives are taken.
        own: The client's buffers and own parameters.
        seed: Seeds the draws of the module, by the number of a batch of local training, or 0: every pass of a round
            draws the same, so that upper and lower loss see one dropout mask where their batches have the same size.
        training: Makes one pass over the client's training samples.
        held_out: Makes one pass over its held-out samples.
        local_training: Makes the batches of a round of local training.
        decay: The weight decay of the clients' optimizer, a scalar or ``[P]``, which is a part of the lower problem;
            ``None`` without one.
    """

    losses: BilevelLosses
    lower: Tensor
    upper: Tensor
    own: Mapping[str, Any]
    seed: Callable[[int], None]
    training: Callable[[], Iterable[SizedBatch]]
    held_out: Callable[[], Iterable[SizedBatch]]
    local_training: Callable[[], Iterable[SizedBatch]]
    decay: Tensor | None = None

    def at(self, lower: Tensor, upper: Tensor) -> ClientProblem:
        """Return the client's problem at other variables."""
        return replace(self, lower=lower, upper=upper)

    def lower_gradient(self) -> Tensor:
        """Return the gradient ``[P]`` of the lower loss in the lower variables."""
        lower, upper = self._variables()
        mean = _Mean(lower)
        with self._differentiation():
            for batch in self.training():
                loss = self.losses.lower(lower, upper, batch, self.own)
                mean.add(torch.autograd.grad(loss, (lower,)), batch)
        return self._with_decay(mean.values()[0], self.lower)

    def lower_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients ``[P]`` and ``[U]`` of the module's lower loss in both kinds of variables."""
        pair = self._variables()
        mean = _Mean(*pair)
        with self._differentiation():
            for batch in self.training():
                loss = self.losses.lower(*pair, batch, self.own)
                mean.add(torch.autograd.grad(loss, pair, allow_unused=True), batch)
        lower_slope, upper_slope = mean.values()
        return lower_slope, upper_slope

    def upper_gradients(self) -> UpperGradients:
        """Return the upper loss and its gradients."""
        lower, upper = self._variables()
        mean = _Mean(torch.zeros((), dtype=torch.float64), lower, upper)
        with self._differentiation():
            for batch in self.held_out():
                loss = self.losses.upper(lower, upper, batch, self.own)
                slopes = torch.autograd.grad(loss, (lower, upper), allow_unused=True)
                mean.add((loss.detach(), *slopes), batch)
        loss, lower_slope, upper_slope = mean.values()
        return UpperGradients(float(loss), lower_slope, upper_slope)

    def products(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second derivatives of the lower loss times a vector ``[P]``: ``[P]`` and ``[U]``.

        Raises:
            ValueError: If the lower loss does not depend on both kinds of variables together.
        """
        lower, upper = self._variables()
        hessian_product, mixed_product = self._products(vector, lower, upper, (lower, upper))
        return self._with_decay(hessian_product, vector), mixed_product

    def hessian_product(self, vector: Tensor) -> Tensor:
        """Return the Hessian of the lower loss in the lower variables times a vector, both ``[P]``."""
        lower, upper = self._variables()
        return self._with_decay(self._products(vector, lower, upper, (lower,))[0], vector)

    def mixed_product(self, vector: Tensor) -> Tensor:
        """Return the mixed derivatives ``[U]`` of the lower loss times a vector ``[P]``.

        Raises:
            ValueError: If the lower loss does not depend on both kinds of variables together.
        """
        lower, upper = self._variables()
        return self._products(vector, lower, upper, (upper,))[0]

    def _products(self, vector: Tensor, lower: Tensor, upper: Tensor, variables: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the derivatives of the lower gradient, times a vector ``[P]``, in some of the variables."""
        mean = _Mean(*variables)
        depends_on_upper = False
        with self._differentiation():
            for batch in self.training():
                loss = self.losses.lower(lower, upper, batch, self.own)
                (gradient,) = torch.autograd.grad(loss, lower, create_graph=True)
                slopes: tuple[Tensor | None, ...] = (None,) * len(variables)
                if gradient.requires_grad:
                    slopes = torch.autograd.grad(gradient, variables, vector.to(gradient), allow_unused=True)
                depends_on_upper = depends_on_upper or slopes[-1] is not None
                mean.add(slopes, batch)
        # Some batches may do without them, such as those of one of several domains.
        if variables[-1] is upper and not depends_on_upper:
            names = ", ".join(self.losses.upper_layout.names[:5])
            raise ValueError(NO_MIXED_DERIVATIVE.format(names=names))
        return mean.values()

    def _with_decay(self, derivative: Tensor, vector: Tensor) -> Tensor:
        """Add the derivative of the optimizer's weight decay, which is the decay times a vector ``[P]``."""
        if self.decay is None:
            return derivative
        return derivative + self.decay * vector.to(derivative)

    def batches(self) -> Iterator[ClientProblem]:
        """Yield the problem on each batch of a round of local training."""
        for number, batch in enumerate(self.local_training(), 1):
            # Other draws for each batch, as in ordinary training, and the same ones at other variables.
            yield replace(self, training=partial(tuple, [batch]), seed=partial(_seed_batch, self.seed, number))

    def _variables(self) -> tuple[Tensor, Tensor]:
        """Return copies of both kinds of variables as leaves of a graph."""
        return self.lower.detach().clone().requires_grad_(), self.upper.detach().clone().requires_grad_()

    @contextmanager
    def _differentiation(self) -> Iterator[None]:
        """Compute with the draws of this round, by kernels that have second derivatives."""
        self.seed(0)
        with torch.enable_grad(), twice_differentiable():
            yield


class _Mean:
    """Means over batches, weighted by their numbers of samples.

    Args:
        likes: Tensors of the shapes and dtypes of the means.
    """

    def __init__(self, *likes: Tensor) -> None:
        self._totals = [torch.zeros_like(like) for like in likes]
        self._count = 0

    def add(self, values: Iterable[Tensor | None], batch: SizedBatch) -> None:
        """Add the values of one batch; ``None`` stands for zeros."""
        size = batch[2]
        for total, value in zip(self._totals, values, strict=True):
            if value is not None:
                total.add_(value.to(total), alpha=size)
        self._count += size

    def values(self) -> list[Tensor]:
        """Return the means."""
        return [total.div_(self._count) for total in self._totals]


def _seed_batch(seed: Callable[[int], None], number: int, _: int) -> None:
    seed(number)


def _upper_step(module: Any, batch: Batch, batch_idx: int) -> object:
    return module.upper_step(*step_arguments(module.upper_step, batch, batch_idx)[:2])


def _validation_step(module: Any, batch: Batch, batch_idx: int) -> None:
    module.validation_step(*step_arguments(module.validation_step, batch, batch_idx))


def _checked(loss: object, sentence: str) -> Tensor:
    """Return an upper loss that is a differentiable scalar."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        description = f"{type(loss).__name__}"
        if isinstance(loss, Tensor):
            description = f"a tensor of the shape {list(loss.shape)} that requires gradients: {loss.requires_grad}"
        raise ValueError(
            f"{sentence} a differentiable scalar that depends on the trainable parameters, got {description}. Log the"
            " loss itself, without `detach`, `item` and `torch.no_grad`."
        )
    return loss.reshape(())
