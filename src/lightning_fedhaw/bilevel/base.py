"""The base of bilevel rules: upper and lower variables, and outer steps of several communication rounds.

Shapes: P lower variables (the trainable parameters), U upper variables.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, configure_model
from lightning_fedhaw.aggregation.base import AggregationRule, Weighting
from lightning_fedhaw.aggregation.factories import OptimizerFactory, optimizer_step
from lightning_fedhaw.bilevel.estimates import (
    corrected_lower_steps,
    corrected_upper_steps,
    hypergradient,
    within,
)
from lightning_fedhaw.bilevel.lower_problem import check_lower_problem, rate_of_lower_step
from lightning_fedhaw.bilevel.rounds import OuterRound, Progress, with_rider
from lightning_fedhaw.bilevel.row_steps import optimizer_of_vectors, step_of_rows
from lightning_fedhaw.bilevel.variables import UpperVariables
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry, LocalProblem
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.layout import ParameterLayout

LowerSteps = Literal["sgd", "svrg"]

EXPLOSION = 1e4
"""How many times its first length a vector of second derivatives may get, before the run ends. A rate that is small
enough shortens it in every round; it grows by the negative curvature of a loss that is not convex."""


class BilevelRule(AggregationRule):
    """A rule that trains lower variables on the clients, and upper variables by the hypergradient of another loss.

    A communication round is an epoch, and an outer step takes the rounds that :meth:`outer_rounds` lists. Lower
    variables are the module's trainable parameters; upper variables are frozen in the module, and only the server
    changes them.

    Args:
        upper: The names of the upper variables: of a submodule, of a parameter, or patterns such as ``"net.0.*"``.
        upper_loss: The value that ``validation_step`` logs and whose mean over held-out samples is the upper loss.
            ``None``: the loss that the module's ``upper_step(batch, batch_idx)`` returns.
        upper_lr: The learning rate of the upper variables.
        upper_optimizer: Makes their optimizer, on the server, from ``(parameters, lr=...)``.
        upper_steps: Local steps on the upper variables, which correct the global hypergradient. More than one takes
            one more round in each outer step.
        lower_lr: The rate of one lower step, by which second derivatives are multiplied. Default: the learning rate of
            the clients' optimizer, which has to be SGD without momentum then.
        clip: The largest norm of the hypergradient, and of the vector that estimates it; ``None`` for no bound.
        weighting: Whether clients are weighted equally (``"uniform"``), as in the papers, or by ``"examples"``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.
    """

    structure: ClassVar[Sequence[str]] = ("upper_steps",)
    """The arguments on which the rounds of an outer step depend."""

    takes_substitutes = False
    needs_held_out_data = True
    prog_bar = ("bilevel/outer_step", "bilevel/upper_loss")
    summary_metrics = ("bilevel/upper_loss",)

    def __init__(
        self,
        upper: str | Sequence[str],
        *,
        upper_loss: str | None = "val_loss",
        upper_lr: float = 0.01,
        upper_optimizer: OptimizerFactory = torch.optim.SGD,
        upper_steps: int = 1,
        lower_lr: float | None = None,
        clip: float | None = None,
        weighting: Weighting = "uniform",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.upper = UpperVariables(upper)
        self.upper_loss = arguments.optional(arguments.text, "upper_loss", upper_loss)
        self.upper_lr = arguments.number("upper_lr", upper_lr, above=0)
        self._optimizer_name = optimizer_of_vectors(upper_optimizer, self.upper_lr)
        self.upper_optimizer = upper_optimizer
        self.upper_steps = arguments.integer("upper_steps", upper_steps, minimum=1)
        self.lower_lr = arguments.optional(arguments.number, "lower_lr", lower_lr, above=0)
        self.clip = arguments.optional(arguments.number, "clip", clip, above=0)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)
        # Their rates are refused where they differ from client to client.
        self.needs_learning_rates = self.lower_lr is None
        self._rate = self.lower_lr or 0.0
        self._has_warned = False

    # ------------------------------------------------------------------ the outer step

    @abstractmethod
    def outer_rounds(self) -> Sequence[OuterRound]:
        """List the communication rounds of one outer step, in their order."""

    @property
    def clients_train(self) -> bool:  # type: ignore[override]
        """Whether clients train lower variables with their optimizer, in some round."""
        return False

    @property
    def rounds_per_outer_step(self) -> int:
        """The communication rounds of one outer step."""
        return len(self.outer_rounds())

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Read the upper variables from the module."""
        return {"upper": self.upper.read().to(start.device), "memory": {}, "position": 0, "outer_step": 0}

    def rate_of(self, state: State) -> float:
        """Return the rate by which second derivatives are multiplied: that of the first round of the outer step.

        A schedule may change the clients' rate from round to round, and all terms of one estimate need the same one.
        """
        if state["position"] == 0:
            return self._rate
        # A checkpoint of an earlier version has none.
        rate: float = state.get("rate", self._rate)
        return rate

    def inquiry(self, state: State, server: ServerView) -> Inquiry | None:
        """Return what the clients of the next round are asked for."""
        return self.outer_rounds()[state["position"]].ask(state, server)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Finish one communication round of an outer step."""
        weights = self.cohort_weights(cohort)  # [K]
        rounds = self.outer_rounds()
        position = state["position"]
        current = rounds[position]
        if cohort.answers is None and current.ask(state, server) is not None:
            # Nobody has answered: the next cohort is asked again, so that no factor of a product is left out.
            return RuleOutput(cohort.start, state, weights, {"bilevel/repeated_rounds": 1.0})
        progress = current.finish(cohort, cohort.answers, state)
        new_state = {**state, **progress.state, "rate": self.rate_of(state), "position": position + 1}
        if new_state["position"] == len(rounds):
            new_state["position"] = 0
            new_state["outer_step"] = state["outer_step"] + 1
        lower = cohort.start if progress.lower is None else progress.lower
        metrics = {"bilevel/outer_step": float(new_state["outer_step"]), **progress.metrics}
        return RuleOutput(lower, new_state, weights, metrics)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization."""
        if self.weighting == "examples":
            return float(update.example_weight)
        return float(update.inverse_probability)

    # ------------------------------------------------------------------ rounds that several rules have

    def lower_rounds_of(self, steps: LowerSteps, rider: OuterRound | None = None) -> list[OuterRound]:
        """List the rounds of one lower update.

        Args:
            steps: ``"sgd"``: clients train as they do without upper variables, in one round. ``"svrg"``: they first
                send full gradients, and then take steps that the mean of these corrects, in a second round.
            rider: What clients send in addition, in the first of these rounds.
        """
        if steps == "sgd":
            return [with_rider(OuterRound(_nothing, self._trained), rider)]
        gradient_round = OuterRound(self._ask_lower_gradient, _keep_lower_gradient)
        step_round = OuterRound(self._ask_corrected_lower_steps, self._corrected_lower)
        return [with_rider(gradient_round, rider), step_round]

    def _trained(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        """Average the clients' lower variables."""
        return Progress(lower=cohort.vectors.weighted_sum(self.cohort_weights(cohort)))

    def _ask_lower_gradient(self, state: State, server: ServerView) -> Inquiry:
        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return {"lower gradient": problem.lower_gradient()}

        return Inquiry("lower gradient", answer, {"lower gradient": server.layout}, replaces_training=True)

    def _ask_corrected_lower_steps(self, state: State, server: ServerView) -> Inquiry:
        rate = self._rate

        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return {"lower steps": corrected_lower_steps(problem, sent["lower gradient"], rate)}

        return Inquiry(
            "lower update",
            answer,
            {"lower steps": server.layout},
            sent={"lower gradient": (state["lower_gradient"], server.layout)},
            replaces_training=True,
        )

    def _corrected_lower(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        return Progress(lower=cohort.start + answers.vectors["lower steps"].to(cohort.start))

    def upper_rounds(self, multiple: float | None) -> list[OuterRound]:
        """List the rounds in which upper variables are changed by a vector that is in the state.

        Args:
            multiple: The factor of the mixed derivatives times the vector, as a multiple of the rate of a lower step;
                ``None`` for no factor.
        """

        def ask(state: State, server: ServerView) -> Inquiry:
            factor = 1.0 if multiple is None else self.rate_of(state) * multiple
            return self._ask_hypergradient(state, server, factor)

        if self.upper_steps == 1:
            return [OuterRound(ask, self._finish_hypergradient)]
        return [
            OuterRound(ask, self._keep_hypergradient),
            OuterRound(self._ask_corrected_upper_steps, self._finish_upper_steps),
        ]

    def _ask_hypergradient(self, state: State, server: ServerView, factor: float) -> Inquiry:
        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            estimate, loss = hypergradient(problem, sent["vector"], factor)
            return self.direction_and_loss(estimate, loss)

        layouts = self.layouts_of_direction()
        return Inquiry(
            "hypergradient",
            answer,
            layouts["vectors"],
            placed=layouts["placed"],
            sent={"vector": (state["vector"], server.layout)},
            replaces_training=True,
            products=1,
        )

    def _finish_hypergradient(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        return self.upper_step(state, self.direction_of(answers), answers.numbers["upper loss"], answers.rows)

    def _keep_hypergradient(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        direction = within(answers.vectors["shared"], self.clip)
        return Progress({"hypergradient": direction, "upper_loss": answers.numbers["upper loss"]})

    def _ask_corrected_upper_steps(self, state: State, server: ServerView) -> Inquiry:
        rate = self.upper_lr
        steps = self.upper_steps

        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return {"upper steps": corrected_upper_steps(problem, sent["hypergradient"], rate, steps)}

        return Inquiry(
            "upper update",
            answer,
            {"upper steps": self.upper.layout},
            sent={"hypergradient": (state["hypergradient"], self.upper.layout)},
            replaces_training=True,
        )

    def _finish_upper_steps(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        return self.upper_step(state, answers.vectors["upper steps"] / -self.upper_lr, state["upper_loss"])

    def layouts_of_direction(self) -> dict[str, dict[str, ParameterLayout]]:
        """Return the layouts of an answer with a direction of the upper variables, as arguments of an inquiry."""
        layouts: dict[str, dict[str, ParameterLayout]] = {"vectors": {}, "placed": {}}
        if self.upper.shared.numel:
            layouts["vectors"]["shared"] = self.upper.shared
        if self.upper.placed.numel:
            layouts["placed"]["placed"] = self.upper.placed
        return layouts

    def direction_and_loss(self, direction: Tensor, loss: float) -> dict[str, Tensor | float]:
        """Return a client's answer: a direction ``[U]``, of which it keeps the rows of its own samples, and a loss."""
        parts = self.upper.split(direction)
        if "placed" in parts:
            # The server does not see it, so each client bounds its own.
            parts["placed"] = within(parts["placed"], self.clip)
        return {**parts, "upper loss": loss}

    def direction_of(self, answers: Answers) -> Tensor:
        """Return the direction ``[U]`` of all upper variables from the answers."""
        parts = [answers.vectors[name] for name in ("shared", "placed") if name in answers.vectors]
        return torch.cat(parts)

    def upper_step(
        self, state: State, direction: Tensor, upper_loss: float, rows: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Progress:
        """Step the upper variables, those that are shared on the server.

        A client's own rows change only if the client has answered: values and memory of the others stay.

        Args:
            state: The state, with the upper variables.
            direction: ``[U]``, the hypergradient or the clients' mean displacement over ``-upper_lr``.
            upper_loss: The upper loss before the step, for the log.
            rows: ``"placed"``: the rows of the clients that have answered, where some upper variables stay with them.

        Raises:
            FloatingPointError: If the upper variables would not be finite.
        """
        gradients = self.upper.split(direction.to(state["upper"]))
        values = self.upper.split(state["upper"])
        memory = dict(state["memory"])
        stepped: list[Tensor] = []
        if "shared" in gradients:
            gradient = within(gradients["shared"], self.clip)
            own = {0: memory[0]} if 0 in memory else {}
            shared, own = optimizer_step(self.upper_optimizer, self.upper_lr, [values["shared"]], [gradient], own)
            stepped += shared
            memory.update(own)
        if "placed" in gradients:
            placed, memory["placed"] = step_of_rows(
                self.upper_optimizer,
                self.upper_lr,
                values["placed"],
                gradients["placed"],
                rows["placed"],
                memory.get("placed", {}),
            )
            stepped.append(placed)
        upper = torch.cat(stepped)
        if not torch.isfinite(upper).all():
            raise FloatingPointError(
                f"The upper variables are not finite after outer step {state['outer_step'] + 1}: the model is the one"
                f" before this round. Lower `upper_lr` ({self.upper_lr:g}), or bound the hypergradient by `clip=`."
            )
        metrics = {
            "bilevel/upper_loss": upper_loss,
            "bilevel/hypergradient_norm": float(torch.linalg.vector_norm(direction)),
        }
        return Progress({"upper": upper, "memory": memory}, metrics=metrics)

    def checked_vector(self, vector: Tensor, first_norm: float) -> Tensor:
        """Clip a vector of second derivatives ``[P]``, and refuse one that explodes.

        Args:
            vector: ``[P]``.
            first_norm: Its norm before it was multiplied.

        Raises:
            FloatingPointError: If it is not finite, or far longer than it was.
        """
        norm = float(torch.linalg.vector_norm(vector))
        if self.clip is not None and norm > self.clip and norm < float("inf"):
            return within(vector, self.clip)
        if norm <= EXPLOSION * max(first_norm, 1e-30):
            return vector
        raise FloatingPointError(
            f"The vector that estimates the hypergradient explodes: its norm grew from {first_norm:.3g} to {norm:.3g}."
            f" The rate by which second derivatives are multiplied ({self._rate:g}) must be below 2 divided by the"
            " largest eigenvalue of the lower loss's Hessian. Lower `lower_lr`, or bound the vector by `clip=`."
        )

    # ------------------------------------------------------------------ around a run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the upper variables, before optimizers are made.

        Raises:
            ValueError: If there are none, or no others; or if they cannot be stepped as the arguments say.
        """
        if stage == "fit":
            if not self.upper.are_in(pl_module):
                configure_model(trainer)
            self.upper.freeze(pl_module)
            self.client_placed = self.upper.placed.names
            if self.upper.placed.numel and self.upper_steps > 1:
                raise ValueError(
                    f"`upper_steps`={self.upper_steps} corrects a direction that the server sends, and"
                    f" `{self.upper.placed.names[0]}` stays with the clients. Use `upper_steps=1`."
                )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without an upper loss, or with an optimizer of the upper variables."""
        super().on_fit_start(trainer, pl_module)
        self.upper.check_optimizers(trainer.optimizers)
        name = type(pl_module).__name__
        if self.upper_loss is None and not callable(getattr(pl_module, "upper_step", None)):
            raise ValueError(
                f"`upper_loss=None` takes the loss of `upper_step`, and {name} has none. Implement"
                " `upper_step(batch, batch_idx)`, or give the name of a value that `validation_step` logs."
            )
        if self.upper_loss is not None and type(pl_module).validation_step is pl.LightningModule.validation_step:
            raise ValueError(
                f"The upper loss '{self.upper_loss}' is logged by `validation_step`, and {name} has none. Implement it,"
                " or implement `upper_step(batch, batch_idx)` and give `upper_loss=None`."
            )
        if not self.clients_train:
            self._refuse_settings_of_training(trainer)
        rounds = trainer.max_epochs
        if rounds is not None and 0 <= rounds < self.rounds_per_outer_step:
            rank_zero_warn(
                f"An outer step of {type(self).__name__} takes {self.rounds_per_outer_step} rounds, and the run has"
                f" {rounds}: the upper variables will not change. Raise the number of rounds."
            )

    def _refuse_settings_of_training(self, trainer: pl.Trainer) -> None:
        """Refuse what is for local training only, where clients do not train."""
        settings: list[str] = []
        objectives = [type(objective).__name__ for objective in find_objectives(callbacks_of(trainer))]
        if objectives:
            settings.append(f"client objectives ({', '.join(objectives)})")
        if trainer.gradient_clip_val:
            settings.append(f"`gradient_clip_val`={trainer.gradient_clip_val}")
        if trainer.accumulate_grad_batches != 1:
            settings.append(f"`accumulate_grad_batches`={trainer.accumulate_grad_batches}")
        if settings:
            raise ValueError(self._no_training(f"{' and '.join(settings)} would change nothing"))

    def check(self, server: ServerView) -> None:
        """Read the dtypes of the upper variables, which the trainer's precision has set by now.

        Raises:
            ValueError: If there are parameters that stay with the clients, and nobody would train them.
        """
        self.upper.update_layout()
        if server.layout.local and not self.clients_train:
            raise ValueError(
                self._no_training("parameters that stay with the clients (`local_parameters`) would never be trained")
            )

    def _no_training(self, consequence: str) -> str:
        return (
            f"In the rounds of {self.describe()} clients answer with gradients and do not train with their optimizer,"
            f' so {consequence}. Use `AggITDCallback(lower="sgd")` or `FedNestCallback(variant="FedNest_SGD")`.'
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the upper variables trainable again."""
        self.upper.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make the upper variables trainable again."""
        self.upper.release()

    def server_parameters(self, state: State) -> Mapping[str, Tensor]:
        """Return the upper variables, by name."""
        if "upper" not in state:
            return {}
        return self.upper.layout.views(state["upper"])

    def with_server_parameters(self, state: State, values: Mapping[str, Tensor]) -> State:
        """Return a state with upper variables that the user's code has changed, such as by a bound."""
        upper = state["upper"].clone()
        views = self.upper.layout.views(upper)
        for name, value in values.items():
            views[name].copy_(value)
        return {**state, "upper": upper}

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Read the rate of a lower step, where it is not given, and refuse optimizers that solve another problem.

        Raises:
            ValueError: If a step of the clients' optimizer is not proportional to the gradient and ``lower_lr`` is not
                given, or if the optimizer maximizes.
        """
        self._has_warned = check_lower_problem(type(self).__name__, local_training.optimizers, self._has_warned)
        if self.lower_lr is None:
            self._rate = rate_of_lower_step(type(self).__name__, local_training.optimizers)

    def describe(self) -> str:
        """Return the rule and its settings, for the start-up block."""
        upper = repr(self.upper)
        if self.upper.layout.numel:
            upper += f" ({self.upper.layout.numel:,} parameters)"
        # The factory may have a rate of its own, in whose place `upper_lr` is.
        return repr_settings(self, upper=upper, upper_optimizer=self._optimizer_name)

    @property
    def resume_key(self) -> str:
        """The settings that a resumed run must share: variables, the optimizer's class, rounds of an outer step."""
        settings = [f"upper={self.upper!r}", f"upper_optimizer={self._optimizer_name}"]
        for name in self.structure:
            settings.append(f"{name}={getattr(self, name)!r}")
        return f"{type(self).key}({', '.join(settings)})"

    def summary(self) -> dict[str, float]:
        """Return the number of finished outer steps."""
        return {"outer_steps": float(self.state.get("outer_step", 0))}


def _nothing(state: State, server: ServerView) -> None:
    """Ask clients for nothing besides their updates."""


def _keep_lower_gradient(cohort: Cohort, answers: Answers | None, state: State) -> Progress:
    assert answers is not None
    return Progress({"lower_gradient": answers.vectors["lower gradient"]})
