"""The base of every aggregation rule: a rule of the round that is a callback, and so an entry point of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.attach import attach
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.rule import Rule


class AggregationRule(Rule, KeyedCallback):
    """How the server turns a cohort into the next global model.

    A rule is a callback: give it to a :class:`~lightning_fedhaw.FederatedTrainer`, or to a stock
    ``lightning.pytorch.Trainer``, which then plays federated rounds with the training data of whatever ``fit`` is
    given.

    A new rule implements :meth:`step`, and :meth:`init` if it keeps state between rounds. Both are pure: state goes
    in, state comes out. State holds tensors, plain Python values, whole
    :class:`~lightning_fedhaw.extending.ClientVectors`, and dictionaries of these; a checkpoint holds vectors as
    tensors, so that it can be read back safely.

    Args:
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`, for a rule in a stock trainer.

    Attributes:
        state: The state after the last round; empty before the first.

    Raises:
        TypeError: If the class lacks :meth:`step`, or an argument is unknown.
    """

    key = "AggregationRule"

    arguments_elsewhere: ClassVar[Mapping[str, str]] = {}
    """Arguments that a user may look for here, and the class that takes them instead."""

    def __init__(self, **federation: Any) -> None:
        super().__init__()
        known = [*arguments.constructor_names(type(self)), *arguments.constructor_names(FederationOptions)]
        arguments.check_names(type(self).__name__, federation, known, self.arguments_elsewhere)
        self.options = FederationOptions(**federation)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make a stock trainer play rounds, and tell any trainer the federation's arguments."""
        if stage == "fit":
            attach(trainer, self.options)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the objectives that come along look at the clients' optimizers."""
        for objective in self.objectives:
            objective.on_fit_start(trainer, pl_module)


def normalized(weights: Tensor) -> Tensor:
    """Weights scaled to sum to one, in float64.

    Raises:
        ZeroDivisionError: If they sum to zero.
    """
    wide = weights.to(torch.float64)
    total = wide.sum()
    if not total > 0:
        raise ZeroDivisionError(f"Aggregation weights must have a positive sum, got {wide.tolist()}.")
    return wide / total


def check_made(name: str, make: Any, what: str, example: str, *arguments: Any, given: str = "", **keywords: Any) -> Any:
    """What a factory makes, be it an optimizer or a schedule: here it is tried before a run depends on it.

    Args:
        name: The argument that is the factory.
        make: Its value.
        what: What it must make.
        example: A ``partial`` that does.
        arguments: What it makes it of.
        given: The argument that ``step`` will be called with, if any.
        keywords: What it makes it of, by name.

    Raises:
        TypeError: If nothing comes of it, or of something whose ``step`` wants more.
    """
    try:
        made = make(*arguments, **keywords)
        for p in inspect.signature(made.step).parameters.values():
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != given:
                raise TypeError(f"{type(made).__name__}.step wants `{p.name}`, which there is not")
    except Exception as error:
        ready = hasattr(make, "state_dict") and not isinstance(make, type)
        got = f"a ready-made {type(make).__name__}" if ready else getattr(make, "__name__", repr(make))
        raise TypeError(
            f"`{name}` must make {what}: give a class or a `functools.partial` of one, such as `partial({example})`,"
            f" got {got} ({error})."
        ) from error
    return made


def check_optimizer(name: str, make: Any, lr: float, given: str = "") -> Any:
    """An optimizer of one number, by :func:`check_made`."""
    what = "an optimizer from parameters and `lr`" + ("" if given else ", one that steps on a given gradient")
    parameter = torch.zeros(1, 1, requires_grad=True)
    return check_made(name, make, what, "torch.optim.SGD, momentum=0.9", [parameter], given=given, lr=lr)


def check_schedule(name: str, make: Any, optimizer: Any) -> None:
    """Refuse what makes no schedule of that optimizer, by :func:`check_made`."""
    if make is not None:
        check_made(name, make, "a schedule from the optimizer", "StepLR, step_size=20", optimizer)
