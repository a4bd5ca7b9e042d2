"""A probe: a second cohort that is asked for loss and gradient of the global model, and what came of it.

Shapes: C clients have answered, P trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_fedhaw import argument_names, arguments

ProbeSource = Literal["training", "validation", "cohort", "proxy"]
ProbeForm = Literal["parallel", "sequential"]
ProbeWeighting = Literal["examples", "uniform"]


class Probe(argument_names.NamedArguments):
    """A second cohort, whose mean loss and gradient tell a rule in which direction to change what it learns.

    Args:
        source: Whose data. ``"training"``: clients that are drawn afresh in every round, on their training data.
            ``"validation"``: clients that are drawn afresh, on their held-out data (``client_val_fraction``,
            ``client_val``, or one evaluation set for each client). ``"cohort"``: the clients of the round, on their
            training data. ``"proxy"``: the server's own data, which nobody sends.
        num_clients: How many clients are drawn. Default: as many as the round has, or all that have such data.
        form: ``"parallel"``: the probe answers in the same communication round as the cohort, at the model that is
            broadcast, so what is learned is one round late. ``"sequential"``: it answers at the new model, in a
            communication round of its own.
        weighting: Whether answers are weighted by ``"examples"``, or equally (``"uniform"``).
        batch_size: Samples of a batch at most, for clients with tensors in memory. Default: up to 1024, which is
            faster, where that is tried to give the gradient of training's batches up to rounding (without batch
            statistics and dropout); else that of training.

    Raises:
        ValueError: If an argument is not one of the allowed values.

    Example:
        >>> Probe("validation", num_clients=20, form="sequential").source
        'validation'
    """

    def __init__(
        self,
        source: ProbeSource = "training",
        num_clients: int | None = None,
        form: ProbeForm = "parallel",
        weighting: ProbeWeighting = "examples",
        batch_size: int | None = None,
    ) -> None:
        self.source: ProbeSource = arguments.choice("source", source, ProbeSource)
        self.num_clients = arguments.optional(arguments.integer, "num_clients", num_clients, minimum=1)
        self.form: ProbeForm = arguments.choice("form", form, ProbeForm)
        self.weighting: ProbeWeighting = arguments.choice("weighting", weighting, ProbeWeighting)
        self.batch_size = arguments.optional(arguments.integer, "batch_size", batch_size, minimum=1)
        if self.num_clients is not None and self.source in ("cohort", "proxy"):
            raise ValueError(
                f"`num_clients`={self.num_clients} is for clients that are drawn, and `source`={self.source!r} draws"
                ' none. Leave it out, or use `source="training"` or `source="validation"`.'
            )

    def __repr__(self) -> str:
        settings = [repr(self.source)]
        if self.num_clients is not None:
            settings.append(f"num_clients={self.num_clients}")
        settings.append(f"form={self.form!r}")
        return f"Probe({', '.join(settings)})"


@dataclass(frozen=True)
class ProbeResult:
    """The answers of a probe, as the server received them.

    Attributes:
        round: The number of the round in which it answered.
        model: ``[P]``, the global parameters at which it was asked.
        loss: The weighted mean of the clients' losses.
        gradient: ``[P]``, the weighted mean of their gradients.
        clients: ``[C]`` int64, the clients that answered; empty for the server's own data.
        weights: ``[C]`` float64, their weights, summing to one.
    """

    round: int
    model: Tensor
    loss: float
    gradient: Tensor
    clients: Tensor
    weights: Tensor
