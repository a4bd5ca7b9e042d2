"""The kinds of buffers that PyTorch's own layers have, and those that are computed from the new global model.

An average is right for running statistics only. The vectors of a spectral norm are directions that belong to a weight,
and the range that an observer of quantization has seen is a minimum and a maximum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

STATISTICS = ("running_mean", "running_var")
"""The names of running statistics in normalization layers."""

MAX_ITERATIONS = 1000
"""Power iterations for one weight at most."""

TOLERANCE = 1e-6
"""The relative change of the singular value in ten iterations at which they end."""


class DerivedBuffers(ABC):
    """Buffers of one layer that follow from its other tensors.

    Attributes:
        names: The names of the buffers.
    """

    names: tuple[str, ...]

    @abstractmethod
    def derive(self, *, are_clients_own: bool) -> None:
        """Compute the buffers in the module from the tensors that are in it.

        Args:
            are_clients_own: Whether the buffers in the module are those of the one client whose model is in it.
        """


class SpectralVectors(DerivedBuffers):
    """The two vectors that a spectral norm divides a weight by.

    Args:
        left: The name of the left singular vector.
        right: The name of the right singular vector.
    """

    def __init__(self, left: str, right: str) -> None:
        self.names = (left, right)

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight as a matrix ``[m, n]``, the left vector ``[m]`` and the right one ``[n]``."""

    def derive(self, *, are_clients_own: bool) -> None:
        """Repeat the power iteration until the gain of the layer is one."""
        # The vectors of a single client have followed its weight already, and a stock run keeps them.
        if are_clients_own:
            return
        matrix, left, right = self.tensors()
        end_left, end_right = _singular_vectors(matrix, right)
        left.copy_(end_left)
        right.copy_(end_right)


class ParametrizedSpectralNorm(SpectralVectors):
    """The spectral norm of ``torch.nn.utils.parametrizations``.

    Args:
        path: The name of the list of parametrizations in the module.
        parametrizations: The list, for one tensor.
        position: The place of the spectral norm in it.
    """

    def __init__(self, path: str, parametrizations: ParametrizationList, position: int) -> None:
        super().__init__(f"{path}.{position}._u", f"{path}.{position}._v")
        self.parametrizations = parametrizations
        self.position = position

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight after the parametrizations that come before, and the vectors."""
        parametrizations: Any = self.parametrizations
        if parametrizations.is_tensor:
            originals = [parametrizations.original]
        else:
            originals = [getattr(parametrizations, f"original{i}") for i in range(parametrizations.ntensors)]
        for earlier in list(parametrizations)[: self.position]:
            originals = [earlier(*originals)]
        norm = parametrizations[self.position]
        return norm._reshape_weight_to_matrix(originals[0]), norm._u, norm._v


class HookedSpectralNorm(SpectralVectors):
    """The older spectral norm of ``torch.nn.utils``, a hook that computes the weight before each forward pass.

    Args:
        path: The name of the layer in the module, with a dot at its end unless it is empty.
        layer: The layer.
        hook: Its hook.
    """

    def __init__(self, path: str, layer: nn.Module, hook: SpectralNorm) -> None:
        super().__init__(f"{path}{hook.name}_u", f"{path}{hook.name}_v")
        self.layer = layer
        self.hook = hook

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight and the vectors."""
        weight, left, right = (getattr(self.layer, f"{self.hook.name}_{name}") for name in ("orig", "u", "v"))
        return self.hook.reshape_weight_to_matrix(weight), left, right

    def derive(self, *, are_clients_own: bool) -> None:
        """Compute the vectors, and the weight, which is an attribute that the last client has left."""
        super().derive(are_clients_own=are_clients_own)
        weight = self.hook.compute_weight(self.layer, do_power_iteration=False)
        setattr(self.layer, self.hook.name, weight.detach())


class QuantizationScale(DerivedBuffers):
    """The scale and zero point of a fake quantization, which follow from the range of its observer.

    Args:
        path: The name of the layer in the module, with a dot at its end unless it is empty.
        layer: The layer.
    """

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.names = (f"{path}scale", f"{path}zero_point")
        self.layer: Any = layer

    def derive(self, *, are_clients_own: bool) -> None:
        """Compute both from the range, unless nothing was observed yet."""
        minimum = getattr(self.layer.activation_post_process, "min_val", None)
        if are_clients_own or minimum is None or not minimum.numel() or not torch.isfinite(minimum).all():
            return
        scale, zero_point = self.layer.calculate_qparams()
        self.layer.scale.copy_(scale.reshape(self.layer.scale.shape))
        self.layer.zero_point.copy_(zero_point.reshape(self.layer.zero_point.shape))


class BufferKinds:
    """The kinds of a module's buffers.

    Args:
        module: The user's module.
        buffers: Its buffers that training may change, by name.

    Attributes:
        derived: The layers with buffers that follow from other tensors.
        derived_names: The names of these buffers.
        minima: The names of buffers that hold the minimum of what was seen.
        maxima: The names of buffers that hold the maximum.
        statistics: The names of running statistics.
        unknown: The names of floating-point buffers of no known kind.
    """

    def __init__(self, module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        self.derived: list[DerivedBuffers] = []
        self.derived_names: set[str] = set()
        for derived in _derived_buffers(module):
            if set(derived.names) <= buffers.keys():
                self.derived.append(derived)
                self.derived_names.update(derived.names)
        self.minima: set[str] = set()
        self.maxima: set[str] = set()
        for path, layer in module.named_modules():
            if _is_observer(layer):
                prefix = f"{path}." if path else ""
                self.minima.add(f"{prefix}min_val")
                self.maxima.add(f"{prefix}max_val")
        # An observer's range may be a buffer that training does not change.
        self.minima &= buffers.keys()
        self.maxima &= buffers.keys()
        self.statistics = {name for name in buffers if name.rpartition(".")[2] in STATISTICS}
        known = self.derived_names | self.minima | self.maxima | self.statistics
        self.unknown = []
        for name, buffer in buffers.items():
            if name not in known and (buffer.is_floating_point() or buffer.is_complex()):
                self.unknown.append(name)

    @property
    def ranges(self) -> Collection[str]:
        """The names of minima and maxima."""
        return self.minima | self.maxima


def _derived_buffers(module: nn.Module) -> Sequence[DerivedBuffers]:
    """List the layers with buffers that follow from other tensors, in the module's order."""
    derived: list[DerivedBuffers] = []
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(layer, ParametrizationList):
            for position, parametrization in enumerate(layer):
                if isinstance(parametrization, _SpectralNorm):
                    derived.append(ParametrizedSpectralNorm(path, layer, position))
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                derived.append(HookedSpectralNorm(prefix, layer, hook))
        if hasattr(layer, "activation_post_process") and hasattr(layer, "calculate_qparams"):
            derived.append(QuantizationScale(prefix, layer))
    return derived


def _is_observer(layer: nn.Module) -> bool:
    """Return whether a layer is an observer of quantization; by name, because the import takes time."""
    kinds = type(layer).__mro__
    return any(kind.__name__ == "ObserverBase" and kind.__module__.startswith("torch.") for kind in kinds)


def _singular_vectors(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the vectors of the largest singular value by power iteration.

    Args:
        matrix: ``[m, n]``.
        right: ``[n]``, where the iteration begins.

    Returns:
        The left vector ``[m]`` and the right one ``[n]``.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    matrix = matrix.to(dtype)
    right = normalize(right.to(dtype), dim=0)
    if not right.any() or not torch.isfinite(right.abs().sum()):
        right = normalize(torch.ones_like(right), dim=0)
    previous = 0.0
    left = right
    for iteration in range(1, MAX_ITERATIONS + 1):
        left = normalize(matrix @ right, dim=0)
        product = matrix.mH @ left
        right = normalize(product, dim=0)
        if iteration % 10 == 0:
            value = float(torch.linalg.vector_norm(product))
            if abs(value - previous) <= TOLERANCE * value:
                break
            previous = value
    return left, right
