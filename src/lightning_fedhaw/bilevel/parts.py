"""Upper parts that a module may have: class logits, weight decays by layer, and weights of samples.

Each is a submodule with parameters, whose name is given to a bilevel rule as ``upper=``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_fedhaw import arguments


class ClassLogits(nn.Module):
    """Scale and shift the logits of each class in the training loss, which the upper loss tunes for rare classes.

    ``logits * sigmoid(scale) + shift``, with scales and shifts from zero as in FedNest's code: every logit is halved at
    the beginning. Compute validation and predictions without it.

    G. R. Kini, O. Paraskevas, S. Oymak, C. Thrampoulidis: Label-Imbalanced and Group-Sensitive Classification under
    Overparameterization. NeurIPS 2021.

    Args:
        num_classes: The number of classes.

    Example:
        >>> ClassLogits(3)(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        count = arguments.integer("num_classes", num_classes, minimum=2)
        self.scale = nn.Parameter(torch.zeros(count))
        self.shift = nn.Parameter(torch.zeros(count))

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits of the training loss; both ``[..., classes]``."""
        return logits * torch.sigmoid(self.scale) + self.shift


class LayerDecay(nn.Module):
    """One weight decay for each parameter tensor of a model, to be added to the training loss.

    The decays are learned by their logarithms, so they stay above zero.

    Args:
        parameters: The tensors that decay, or a module, all of whose parameters do. They stay parameters of
            their own module.
        initial: The decay before the first step.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> decay = LayerDecay(model, initial=1e-3)
        >>> decay(model.parameters()).shape
        torch.Size([])
    """

    def __init__(self, parameters: nn.Module | Iterable[Tensor], initial: float = 1e-4) -> None:
        super().__init__()
        start = arguments.number("initial", initial, above=0)
        count = len(_tensors(parameters))
        if count == 0:
            raise arguments.invalid("parameters", "a module with parameters, or tensors", parameters)
        self.log_decay = nn.Parameter(torch.full((count,), start).log())

    def forward(self, parameters: nn.Module | Iterable[Tensor]) -> Tensor:
        """Return half of the sum of the decays times the squared norms of the tensors, a scalar.

        Args:
            parameters: The same module or tensors as in the constructor, in the same order.

        Raises:
            ValueError: If they are of another number.
        """
        tensors = _tensors(parameters)
        if len(tensors) != len(self.log_decay):
            raise ValueError(
                f"`LayerDecay` was made for {len(self.log_decay)} tensors and is called with {len(tensors)}. Give it"
                " the same module or tensors in both places."
            )
        norms = torch.stack([tensor.square().sum() for tensor in tensors])
        return self.log_decay.exp() @ norms.to(self.log_decay) / 2


class SampleWeights(nn.Module):
    """One weight for each training sample, by which the upper loss finds samples that are worth less: data cleaning.

    A weight is ``2 sigmoid(logit)``, 1 at the beginning. The logits never leave the client of their sample.

    Args:
        num_samples: The number of samples of the whole training data set.

    Example:
        >>> weights = SampleWeights(100)
        >>> weights(torch.tensor([3, 7]))
        tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    is_client_placed = True

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(arguments.integer("num_samples", num_samples, minimum=1)))

    def forward(self, index: Tensor) -> Tensor:
        """Return the weights of samples by their numbers in the data set, both ``[batch]``."""
        return 2 * torch.sigmoid(self.logits[index])


def _tensors(parameters: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """List the tensors that decay."""
    if isinstance(parameters, nn.Module):
        # All of them: an upper variable among them is frozen during a run, and the number must stay.
        return list(parameters.parameters())
    return list(parameters)
