"""FedNova: average normalized updates, so that clients with many steps do not pull the model towards their own optimum.

J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization. NeurIPS 2020.

A linear local optimizer ends at ``w_k = w - lr sum_j a_j g_j`` with gradients ``g_j``. With its normalizer
``A_k = sum_j a_j``, which makes a client's update an average gradient for any number of steps::

    w <- w + tau_eff sum_k p_k (w_k - w) / A_k          tau_eff = sum_k p_k A_k, p_k = n_k / sum_j n_j

``A_k`` is the number of steps with plain SGD; momentum makes it larger and a proximal term smaller. A client that made
no step has ``A_k = 0`` and a zero update. It keeps its share ``p_k``, as in FedAvg, and ``tau_eff`` is the mean over
the clients that made steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, common_rate, normalized
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.objectives.local_normalizer import normalizer, sgd_groups
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.rule import RuleOutput, ServerView, State

EffectiveSteps = Literal["normalizer", "steps"]


class FedNovaCallback(AggregationRule):
    """Average the clients' updates per unit of local work, then take a step of their average length.

    With equal numbers of steps it is FedAvg. A client that made no step keeps its share, and its update is zero.

    Args:
        momentum: The momentum of the clients' SGD. ``"auto"``: read from ``configure_optimizers`` when ``fit`` begins,
            which also tells Nesterov momentum.
        proximal: The factor ``mu`` of a proximal term ``mu / 2 |w - start|^2`` that clients add to their loss.
            ``"auto"``: that of the client objectives among the trainer's callbacks, such as ``FedProx(mu)``.
        tau_eff: ``"normalizer"``: ``sum_k p_k A_k``, as published. ``"steps"``: ``sum_k p_k`` times the number of
            steps, as the authors' code does with a proximal term.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values; when ``fit`` begins, if the normalizer of the
            clients' optimizer is not known.
    """

    key = "FedNovaCallback"

    summary_metrics = ("tau_eff",)

    def __init__(
        self,
        *,
        momentum: float | Literal["auto"] = "auto",
        proximal: float | Literal["auto"] = "auto",
        tau_eff: EffectiveSteps = "normalizer",
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.tau_eff: EffectiveSteps = arguments.choice("tau_eff", tau_eff, EffectiveSteps)
        self._reads_momentum = isinstance(momentum, str) and momentum == "auto"
        self._reads_proximal = isinstance(proximal, str) and proximal == "auto"
        self.momentum = 0.0
        self.nesterov = False
        if not self._reads_momentum:
            hint = 'Or "auto", by which it is read from `configure_optimizers`.'
            self.momentum = arguments.number("momentum", momentum, minimum=0, below=1, hint=hint)
        proximal_factor = 0.0
        if not self._reads_proximal:
            hint = 'Or "auto", by which it is that of the client objectives.'
            proximal_factor = arguments.number("proximal", proximal, minimum=0, hint=hint)
        self._set_proximal(proximal_factor)

    def _set_proximal(self, proximal: float) -> None:
        self.proximal = proximal
        self.needs_learning_rates = proximal > 0
        # A proximal term's normalizer needs the round's learning rate, which comes with the cohort: then no weight is
        # known in advance, unless a subclass defines its own.
        vars(self).pop("unnormalized_weight", None)
        has_own_weight = type(self).unnormalized_weight is not FedNovaCallback.unnormalized_weight
        if proximal > 0 and not has_own_weight:
            self.unnormalized_weight = None  # type: ignore[assignment]

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Read the proximal factor of the client objectives, and the momentum of the clients' optimizer."""
        if self._reads_proximal:
            self._set_proximal(local_training.proximal)
        if self._reads_momentum:
            remedy = "say what comes closest: `FedNovaCallback(momentum=0.0)` counts steps"
            groups = sgd_groups(local_training, "FedNova", remedy)
            momenta = {(float(group["momentum"]), bool(group["nesterov"])) for group in groups}
            if len(momenta) > 1:
                raise ValueError(
                    f"FedNova needs one momentum for all parameters, got {sorted(momenta)} (momentum, nesterov). Give"
                    f" all parameter groups the same, or {remedy}."
                )
            self.momentum, self.nesterov = momenta.pop()

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return the factor ``p_k / A_k`` of a client's update before normalization."""
        work = normalizer(update.num_steps, self.momentum, self.nesterov) * update.lr_scale
        return update.example_weight / work if work else 0.0

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the normalized updates, and step along the average."""
        work = self._work(cohort)  # [K]
        weights = self._shares(cohort, work)  # [K]
        has_worked = work > 0  # [K]
        if not (weights[has_worked].sum() > 0):
            return RuleOutput(cohort.start.clone(), state, weights, {"tau_eff": 0.0})
        effective_steps = work  # [K]
        if self.tau_eff == "steps":
            effective_steps = cohort.num_steps * _lr_scales(cohort)
        # The mean over the clients that worked, because one without a step must not shorten the steps of the others.
        tau_eff = (weights * effective_steps).sum() / weights[has_worked].sum()  # []
        mix = torch.where(has_worked, tau_eff * weights / work, 0.0)  # [K]
        # Displacements may be stored in host memory or another dtype than the model, and their sum is then too.
        server_step = cohort.vectors.displacements.weighted_sum(mix)  # [P]
        return RuleOutput(cohort.start + server_step.to(cohort.start), state, weights, {"tau_eff": tau_eff.item()})

    def _shares(self, cohort: Cohort, work: Tensor) -> Tensor:
        """Return the shares ``p_k``, ``[K]``, from the normalizers ``A_k``, ``[K]``."""
        has_worked = work > 0  # [K]
        if self.unnormalized_weight is None or not has_worked.any():
            return normalized(cohort.example_weights)
        by_examples = torch.where(has_worked, cohort.example_weights / work, 0.0)  # [K]
        factors = self.cohort_weights(cohort)  # [K]
        if torch.equal(factors, normalized(by_examples)):
            # Not `factors * work`: a client without a step keeps its share.
            return normalized(cohort.example_weights)
        return normalized(factors * work)

    def _work(self, cohort: Cohort) -> Tensor:
        """Compute the normalizers ``A_k`` of a cohort, ``[K]`` float64."""
        proximal = 0.0
        if self.proximal:
            rate = common_rate(cohort.learning_rates, "FedNova's `proximal`", "leave `proximal` at 0")
            proximal = self.proximal * rate
        normalizers: list[float] = []
        for num_steps in cohort.num_steps.tolist():
            normalizers.append(normalizer(num_steps, self.momentum, self.nesterov, proximal))
        # A client whose learning rates are scaled goes so many times as far with each unit of its work.
        return torch.tensor(normalizers, dtype=torch.float64) * _lr_scales(cohort)


def _lr_scales(cohort: Cohort) -> Tensor:
    """Return each client's own factor on the learning rates, ``[K]`` float64."""
    if cohort.lr_scales is None:
        return torch.ones(len(cohort), dtype=torch.float64)
    return cohort.lr_scales
