"""Numbers that a rule learns by the gradient of its probe, one step of a hyper-optimizer a round; no rule itself.

K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation. arXiv:2301.07806, Algorithms 1 and 2.

With ``x`` [P], the model that a rule's last step made with the numbers ``a``, and ``G`` [P], the gradient of the
probe's loss at ``x``, the derivative of the loss in a number is ``dL/da = <G, dx/da>``. It is that of the last step
alone: what entered this step is a constant.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer, optimizer_step
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.probe import ProbeResult
from lightning_fedhaw.rule import ServerView, State
from lightning_fedhaw.vectors.kernels import dot

LinkName = Literal["identity", "exp", "sigmoid", "softplus"]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Link:
    """A smooth, increasing function from the number that is stepped to the number that is used.

    Attributes:
        value: The function, on tensors ``[]``.
        slope: Its derivative.
        inverse: Its inverse.
        low: Its values are above this.
        high: Its values are below this.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    low: float
    high: float


def _sigmoid_slope(raw: Tensor) -> Tensor:
    return torch.sigmoid(raw) * torch.sigmoid(-raw)


def _softplus_inverse(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


LINKS: dict[LinkName, Link] = {
    "identity": Link(torch.clone, torch.ones_like, torch.clone, -inf, inf),
    "exp": Link(torch.exp, torch.exp, torch.log, 0.0, inf),
    "sigmoid": Link(torch.sigmoid, _sigmoid_slope, torch.logit, 0.0, 1.0),
    "softplus": Link(torch.nn.functional.softplus, torch.sigmoid, _softplus_inverse, 0.0, inf),
}


class Learned:
    """Numbers that are learned together, by one hyper-optimizer.

    A rule keeps two entries of its state for it: ``learned``, of :meth:`init`, and ``tangents``, the derivative of its
    last step in each number, ``[P]`` by name.

    Args:
        starts: The numbers before the first round, by name.
        hyper_optimizer: Makes the optimizer of all of them from ``(parameters, lr=...)``.
        hyper_lr: Its learning rate.
        bounds: The smallest and largest value of each number, by name.
        links: The link of each number, by name; the identity where none is given.
        domains: The bounds where none are given.

    Raises:
        ValueError: If a number starts outside of its bounds or of its link's values, or a name is unknown.
        TypeError: If ``hyper_optimizer`` makes no optimizer that steps on a given gradient.
    """

    def __init__(
        self,
        starts: Mapping[str, float],
        *,
        hyper_optimizer: OptimizerFactory,
        hyper_lr: float,
        bounds: Mapping[str, Bounds] | None = None,
        links: Mapping[str, LinkName] | None = None,
        domains: Mapping[str, Bounds] | None = None,
    ) -> None:
        self.starts = dict(starts)
        self.hyper_lr = arguments.number("hyper_lr", hyper_lr, minimum=0)
        self._hyper_kind = type(check_optimizer("hyper_optimizer", hyper_optimizer, self.hyper_lr)).__name__
        self.hyper_optimizer = hyper_optimizer
        self.bounds: dict[str, Bounds] = dict(domains or {})
        for name, given in _by_name("bounds", bounds, starts).items():
            self.bounds[name] = _checked_bounds(given)
        self.links: dict[str, LinkName] = dict.fromkeys(starts, "identity")
        for name, link in _by_name("links", links, starts).items():
            self.links[name] = arguments.choice("links", link, LinkName)
        for name, start in starts.items():
            self._check_start(name, start)

    def _check_start(self, name: str, start: float) -> None:
        """Refuse a start that bounds or link do not allow."""
        low, high = self.bounds.get(name, (-inf, inf))
        if not low <= start <= high:
            raise ValueError(
                f"`{name}` is learned within the bounds {low:g} to {high:g}, and starts at {start:g}. Start it between"
                f' them, or widen them by `bounds={{"{name}": (low, high)}}`.'
            )
        link = LINKS[self.links[name]]
        if not link.low < start < link.high:
            raise ValueError(
                f"`{name}` starts at {start:g}, and the values of the link {self.links[name]!r} are above"
                f" {link.low:g} and below {link.high:g}. Start it between them, or use another link."
            )

    @property
    def resume_key(self) -> str:
        """The settings that the state depends on; rates and bounds may change."""
        links = ", ".join(f"{name} by {link}" for name, link in self.links.items())
        return f"hyper_optimizer={self._hyper_kind}, {links}"

    def init(self) -> State:
        """Return the numbers before the first round, as their links' inverses ``[]`` in float64."""
        raw = {}
        for name, start in self.starts.items():
            # Float64: steps of a small rate would be lost in the rounding of a float32 number.
            raw[name] = LINKS[self.links[name]].inverse(torch.tensor(start, dtype=torch.float64))
        return {"raw": raw, "memory": {}}

    def values(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers, by name.

        Args:
            state: The entry ``learned`` of a rule's state; before the first round it may be empty.
        """
        raw = state.get("raw", self.init()["raw"])
        return {name: float(self._value(name, raw[name])) for name in self.starts}

    def _value(self, name: str, raw: Tensor) -> Tensor:
        """Return the number of a raw one, both ``[]``; exactly the start as long as it was not stepped."""
        low, high = self.bounds.get(name, (-inf, inf))
        return LINKS[self.links[name]].value(raw).clamp(low, high)

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers for the log."""
        return {f"learned/{name}": value for name, value in self.values(state).items()}

    def learn_from(self, probe: ProbeResult, state: State) -> tuple[State, dict[str, float]]:
        """Step the numbers by the gradient at the model that the rule's last step has made.

        Args:
            probe: The answers of the probe.
            state: The rule's whole state. Not changed.

        Returns:
            The rule's new state, and numbers for the log. Nothing happens before the first step, or where no step was
            made since the last call: a derivative is used once.
        """
        if "tangents" not in state:
            return state, {}
        slopes = {}
        for name, tangent in state["tangents"].items():
            slopes[name] = dot(probe.gradient, tangent.to(probe.gradient)).cpu().double()  # []
        learned, metrics = self._step(state["learned"], slopes, probe.round)
        new_state = {**state, "learned": learned}
        del new_state["tangents"]
        return new_state, metrics

    def _step(
        self, state: Mapping[str, Any], slopes: Mapping[str, Tensor], round_idx: int
    ) -> tuple[State, dict[str, float]]:
        """Take one step of the hyper-optimizer along ``dL/da`` ``[]`` of each number."""
        values = [state["raw"][name] for name in self.starts]
        gradients = []
        for name, value in zip(self.starts, values, strict=True):
            gradients.append(slopes[name] * LINKS[self.links[name]].slope(value))
        stepped, memory = optimizer_step(self.hyper_optimizer, self.hyper_lr, values, gradients, state["memory"])
        raw = {}
        for name, value in zip(self.starts, stepped, strict=True):
            raw[name] = self._bounded(name, value)
        metrics = {f"hypergradient/{name}": slope.item() for name, slope in slopes.items()}
        unusable = [name for name in raw if not torch.isfinite(raw[name] + slopes[name])]
        if unusable:
            rank_zero_warn(
                f"The hypergradient step of round {round_idx} would make {', '.join(unusable)} not finite, and was"
                f" refused: what is learned stays as it was. Lower `hyper_lr` ({self.hyper_lr:g}), or set bounds."
            )
            return dict(state), {**dict.fromkeys(metrics, 0.0), "hyper_steps_refused": 1.0}
        return {"raw": raw, "memory": memory}, metrics

    def _bounded(self, name: str, raw: Tensor) -> Tensor:
        """Keep a raw number ``[]`` within the bounds of its value."""
        low, high = self.bounds.get(name, (-inf, inf))
        inverse = LINKS[self.links[name]].inverse
        link = LINKS[self.links[name]]
        smallest = inverse(torch.tensor(max(low, link.low), dtype=torch.float64))
        largest = inverse(torch.tensor(min(high, link.high), dtype=torch.float64))
        return raw.clamp(smallest, largest)


class LearningRule(AggregationRule):
    """A rule that learns numbers of its own by a probe.

    A subclass makes the object below, and its :meth:`step` leaves the derivatives of the new model in the state, as
    ``tangents``.

    Attributes:
        learned: The learned numbers.
    """

    learned: Learned

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return the numbers before the first round."""
        return {"learned": self.learned.init()}

    def learn_from(self, probe: ProbeResult, state: State, server: ServerView) -> tuple[State, Mapping[str, float]]:
        """Step the numbers."""
        return self.learned.learn_from(probe, state)

    def describe(self) -> str:
        """Return the rule and its settings, for the start-up block."""
        return repr_settings(self, probe=repr(self.probe))

    @property
    def resume_key(self) -> str:
        """The settings that the state depends on."""
        return f"{type(self).key}({self.learned.resume_key})"

    def summary(self) -> dict[str, float]:
        """Return the numbers."""
        values = self.learned.values(self.state.get("learned", {}))
        return {f"learned_{name}": value for name, value in values.items()}


def _by_name(argument: str, given: Mapping[str, Any] | None, starts: Mapping[str, float]) -> Mapping[str, Any]:
    """Return a mapping by name, all of whose names are learned; an empty one for ``None``."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise arguments.invalid(argument, 'a mapping by the name of what is learned, such as {"lr": ...}', given)
    for name in given:
        if name not in starts:
            raise ValueError(f"`{argument}` names {name!r}, and what is learned is {', '.join(starts) or 'nothing'}.")
    return given


def _checked_bounds(bounds: Bounds) -> Bounds:
    """Return a smallest and a largest number."""
    allowed = "a smallest and a larger number for each name, such as (0.01, 10.0)"
    if isinstance(bounds, (str, bytes)) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise arguments.invalid("bounds", allowed, bounds)
    low = arguments.number("bounds", bounds[0], infinite=True)
    high = arguments.number("bounds", bounds[1], infinite=True)
    if not low < high:
        raise arguments.invalid("bounds", allowed, bounds)
    return low, high
