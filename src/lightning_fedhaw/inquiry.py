"""An inquiry: vectors that a rule asks the clients of a round for, in addition to their updates or instead of them.

Shapes: P trainable parameters, U parameters that only the server changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_fedhaw.vectors.layout import ParameterLayout


@dataclass(frozen=True)
class UpperGradients:
    """A client's upper loss, and its gradients.

    Attributes:
        loss: The mean over the client's held-out samples.
        lower: ``[P]``, the gradient in the lower variables.
        upper: ``[U]``, the gradient in the upper variables.
    """

    loss: float
    lower: Tensor
    upper: Tensor


class LocalProblem(Protocol):
    """The two losses of one client, as functions of lower and upper variables, with exact derivatives.

    The lower loss ``g`` is that of ``training_step``, a mean over the client's training samples, plus what the weight
    decay of the clients' optimizer adds to it. The upper loss ``f`` is a mean over its held-out samples. Lower
    variables ``y`` are the trainable parameters, upper variables ``x`` those that only the server changes.
    """

    @property
    def lower(self) -> Tensor:
        """``[P]``, the lower variables at which derivatives are taken."""

    @property
    def upper(self) -> Tensor:
        """``[U]``, the upper variables at which derivatives are taken."""

    def at(self, lower: Tensor, upper: Tensor) -> LocalProblem:
        """Return the client's problem at other lower ``[P]`` and upper variables ``[U]``."""

    def lower_gradient(self) -> Tensor:
        """Return the gradient ``[P]`` of the lower loss in the lower variables."""

    def upper_gradients(self) -> UpperGradients:
        """Return the upper loss and its gradients."""

    def products(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second derivatives of the lower loss times a vector ``[P]``.

        Returns:
            ``H v`` ``[P]`` with the Hessian in the lower variables, and ``J v`` ``[U]`` with the mixed derivatives.
        """

    def hessian_product(self, vector: Tensor) -> Tensor:
        """Return ``H v`` ``[P]`` alone, which is cheaper."""

    def mixed_product(self, vector: Tensor) -> Tensor:
        """Return ``J v`` ``[U]`` alone, which is cheaper."""

    def batches(self) -> Iterator[LocalProblem]:
        """Yield the problem whose lower loss is that of one batch, for each batch of a round's local training."""


Answer = Mapping[str, Tensor | float]
"""What a client answers: vectors that are sent through the channels, and numbers, by name."""


@dataclass(frozen=True)
class Inquiry:
    """Vectors that a rule asks the clients of a round for.

    Each client that has received the round's model, and whose update arrives, computes an answer at that model. The
    server receives the weighted mean of the answers, with the weights of the updates.

    Attributes:
        name: The name in random streams and messages.
        answer: Computes one client's answer from its problem and from the vectors that it was sent.
        vectors: The layout of each vector of an answer, by name. All else in an answer are numbers.
        placed: The layout of each vector of an answer that stays with the clients, by name. It is not sent, and the
            sum over clients is returned: each client fills the rows of its own samples, by their numbers.
        sent: The vectors that are sent with the model, by name, each with its layout.
        replaces_training: Whether clients answer instead of training: the round has no updates.
        products: How many products with second derivatives an answer takes, for the count.
    """

    name: str
    answer: Callable[[LocalProblem, Mapping[str, Tensor]], Answer]
    vectors: Mapping[str, ParameterLayout]
    sent: Mapping[str, tuple[Tensor, ParameterLayout]] = field(default_factory=dict)
    placed: Mapping[str, ParameterLayout] = field(default_factory=dict)
    replaces_training: bool = False
    products: int = 0


@dataclass(frozen=True)
class Answers:
    """The answers to an inquiry, as the server received them.

    Attributes:
        vectors: The weighted means of the clients' vectors, by name, and the sums of those that stay with them.
        numbers: The weighted means of the clients' numbers, by name.
        count: The number of clients that answered.
        rows: For each vector that stays with the clients a bool vector of its shape: the rows of those that answered.
    """

    vectors: Mapping[str, Tensor]
    numbers: Mapping[str, float]
    count: int
    rows: Mapping[str, Tensor] = field(default_factory=dict)
