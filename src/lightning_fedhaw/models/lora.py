"""Low-rank adapters on linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_fedhaw.models.messages import listed


class LoRALinear(nn.Linear):
    """A linear layer whose weights are frozen, with a trainable change of low rank added to them.

    ``y = W x + b + (alpha / rank) B A x`` with ``A [rank, in]`` initialized as a linear layer's weights are and ``B
    [out, rank]`` zero, so that at first nothing changes (E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685, equation 3). The layer's own parameters keep their names.

    Args:
        base: The layer; its parameters are used as they are, and frozen.
        rank: Rank of the change.
        alpha: Scale of the change, times the rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        # On the meta device, without memory, because weight and bias are replaced by those of the base.
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        # The initialization of `nn.Linear`, whose constant this is.
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
        model_name: The name of the model, for errors.

    Raises:
        ValueError: If no layer matches, or the model does not call a layer that matches.
    """
    linear_layers: dict[str, nn.Linear] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            linear_layers[name] = module
    matching_names = []
    for name in linear_layers:
        if any(fnmatch(name, target) for target in targets):
            matching_names.append(name)
    if not matching_names:
        linear_names = "it has none"
        if linear_layers:
            linear_names = f"its linear layers are called like {listed(list(linear_layers)[-3:], 'and')}"
        raise ValueError(
            f"`lora_rank`={rank}: no linear layer of {model_name!r} matches `lora_targets`={list(targets)};"
            f" {linear_names}. Take a transformer, or name other layers."
        )
    for name in matching_names:
        owner = backbone.get_submodule(name.rpartition(".")[0])
        # Attention with a bias of its own for queries takes the weights out of the layer.
        if name.endswith("qkv") and getattr(owner, "q_bias", None) is not None:
            raise ValueError(
                f"`lora_rank`={rank}: {model_name!r} uses the weights of {name!r} without calling the layer, so an"
                ' adapter would have no effect. Name other layers, such as `lora_targets=["*attn.proj"]`.'
            )
        _replace(backbone, name, LoRALinear(linear_layers[name], rank, alpha))


def merge(backbone: nn.Module) -> None:
    """Fold all adapters of a backbone into the weights that they adapt."""
    # A list, because modules are replaced while it is iterated over.
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoRALinear):
            _replace(backbone, name, layer.merged())


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a model under the dotted name of another one."""
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)
