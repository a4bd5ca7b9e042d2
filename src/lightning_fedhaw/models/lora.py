"""Low-rank adapters on linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_fedhaw.models.messages import listed


class LoRALinear(nn.Linear):
    """A linear layer whose weights are frozen, beside a trainable change of low rank.

    ``y = W x + b + (alpha / rank) B A x`` with ``A [rank, in]`` drawn as a linear layer's weights are and ``B [out,
    rank]`` zero, so that at first nothing changes (E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685, equation 3). The layer's own parameters keep their names.

    Args:
        base: The layer; its parameters are shared, and frozen.
        rank: Rank of the change.
        alpha: Scale of the change, times the rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        # On the meta device, because weight and bias are those of the base.
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return super().forward(input) + self.scale * linear(linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a, requires_grad=False)
        plain.bias = self.bias
        return plain


def adapt(backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str], model_name: str) -> None:
    """Put adapters on the linear layers of a backbone whose names match.

    Args:
        backbone: The model; changed in place.
        rank: Rank of the adapters.
        alpha: Their scale times their rank.
        targets: Patterns (globs) of the layers' names.
        model_name: For errors.

    Raises:
        ValueError: If no layer matches, or the model does not call one that does.
    """
    linears = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    layers = [(name, layer) for name, layer in linears if any(fnmatch(name, target) for target in targets)]
    if not layers:
        there = "it has none"
        if linears:
            there = f"its linear layers are called like {listed([name for name, _ in linears[-3:]], 'and')}"
        raise ValueError(
            f"`lora_rank`={rank}: no linear layer of {model_name!r} matches `lora_targets`={list(targets)}; {there}."
            " Take a transformer, or name other layers."
        )
    for name, layer in layers:
        owner = backbone.get_submodule(name.rpartition(".")[0])
        # Attention with a bias of its own for queries takes the weights out of the layer.
        if name.endswith("qkv") and getattr(owner, "q_bias", None) is not None:
            raise ValueError(
                f"`lora_rank`={rank}: {model_name!r} uses the weights of {name!r} without calling the layer, so an"
                ' adapter would have no effect. Name other layers, such as `lora_targets=["*attn.proj"]`.'
            )
        _replace(backbone, name, LoRALinear(layer, rank, alpha))


def merge(backbone: nn.Module) -> None:
    """Fold all adapters of a backbone into the weights that they adapt."""
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoRALinear):
            _replace(backbone, name, layer.merged())


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)
