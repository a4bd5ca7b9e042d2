"""FedNTD: distillation from the global model over the classes other than the true one, so that clients forget less.

G. Lee, M. Jeong, Y. Shin, S. Bae, S.-Y. Yun: Preservation of the Global Knowledge by Not-True Distillation in Federated
Learning. NeurIPS 2022.

With the logits ``z`` of the local model and ``z_glob`` of the model that the client received::

    f_k(y) + beta KL(q_glob || q)        q = softmax of z / tau over all classes but the true one, q_glob likewise

There is no factor ``tau^2``, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lightning_fedhaw import arguments
from lightning_fedhaw.objectives.base import ClientObjective, ClientState
from lightning_fedhaw.objectives.view import FORWARD, StepView


class FedNTD(ClientObjective):
    """Not-true distillation from the model that the client received, added to the loss of ``training_step``.

    ``training_step`` returns the cross-entropy, and this class adds the rest. It costs one more forward pass per step,
    through the received model in evaluation mode. Samples with a negative label, such as -100, do not count.

    Args:
        beta: The factor of the distillation, at least 0.
        tau: The temperature of both softmaxes, above 0.
        logits: What gives the logits ``[batch, classes]``: ``"forward"``, the module's own call ``self(...)``, or the
            name of a submodule. ``training_step`` has to call it once.
        targets: ``targets(batch)`` returns the true classes ``[batch]``. Default: the second item of the batch.
        name: Distinguishes two objectives of one class in a checkpoint.

    Raises:
        ValueError: If an argument is not one of the allowed values; when ``fit`` begins, if the module has no such
            submodule; in training, if logits and labels do not have these shapes.
        TypeError: If ``targets`` is not callable.
    """

    key = "FedNTD"

    def __init__(
        self,
        beta: float = 1.0,
        tau: float = 1.0,
        *,
        logits: str = FORWARD,
        targets: Callable[[Any], Tensor] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.beta = arguments.number("beta", beta, minimum=0)
        self.tau = arguments.number("tau", tau, above=0)
        self.logits = arguments.text("logits", logits)
        self.targets = arguments.optional(arguments.function, "targets", targets, "targets(batch)")

    @property
    def watched(self) -> Sequence[str]:
        """What gives the logits."""
        return (self.logits,)

    def loss(self, step: StepView, state: ClientState) -> Tensor:
        """Return ``beta KL(q_glob || q)``, the mean over the batch."""
        labels = self._labels_of(step.batch)
        logits = self._checked(step.result(self.logits), labels)
        received_logits = step.result_at_start(self.logits)
        return self.beta * not_true_divergence(logits, received_logits, labels, self.tau)

    def _labels_of(self, batch: Any) -> Tensor:
        if self.targets is not None:
            labels: Tensor = self.targets(batch)
            return labels
        if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
            return batch[1]
        raise ValueError(
            "`FedNTD` needs the true classes, and the batch has no second item that is a tensor. Give"
            " `FedNTD(targets=lambda batch: ...)`."
        )

    @staticmethod
    def _checked(logits: Tensor, labels: Tensor) -> Tensor:
        """Return logits of the right shape.

        Raises:
            ValueError: If logits and labels are not those of a classification with at least two classes.
        """
        are_classes = labels.shape == logits.shape[:1] and not labels.is_floating_point()
        if logits.ndim == 2 and logits.shape[1] >= 2 and are_classes:
            return logits
        raise ValueError(
            "`FedNTD` needs logits [batch, classes] of at least two classes and whole-number labels [batch], got"
            f" {list(logits.shape)} and {list(labels.shape)} ({labels.dtype}). Name what gives the logits by"
            " `FedNTD(logits=...)`, and the labels by `targets=`."
        )


def not_true_divergence(logits: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Return the mean over samples of KL(teacher || student) over the classes other than the true one.

    Args:
        logits: ``[batch, classes]``, the student's.
        teacher: ``[batch, classes]``, the teacher's.
        labels: ``[batch]``, the true classes; samples with a negative one do not count.
        tau: The temperature.

    Returns:
        A scalar.
    """
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)  # [classes - 1]
    # Shifted by one from the true class on, which leaves it out.
    not_true = columns + (columns >= labels[:, None]).long()  # [batch, classes - 1]
    student_log = _log_shares(logits.gather(1, not_true), tau)
    teacher_log = _log_shares(teacher.gather(1, not_true), tau)
    # Not `kl_div`, which has no batched form: many clients at once would warn and be slow.
    divergences = (teacher_log.exp() * (teacher_log - student_log)).sum(1)  # [batch]
    counts = (labels >= 0).to(divergences)  # [batch]
    return (divergences * counts).sum() / counts.sum().clamp(min=1)


def _log_shares(logits: Tensor, tau: float) -> Tensor:
    """Return the logarithm of the softmax at a temperature, in float32 at least."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return log_softmax(logits / tau, 1)
