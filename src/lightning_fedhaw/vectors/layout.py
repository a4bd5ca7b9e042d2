"""The flat view of a model: one vector ``[P]`` on one side, named tensors on the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterLayout:
    """The position of each trainable parameter in the flat vector ``[P]``, and the buffers that are sent with it.

    Only trainable parameters are exchanged between server and clients, in ``named_parameters()`` order. A frozen
    backbone is left out, and if it is in evaluation mode, so are its buffers. Frozen tensors that a step moves all the
    same (a momentum teacher) are exchanged as buffers are, if a pattern names them. Local parameters, which are trained
    and stay with their clients, have no place in the vector either. The flat vector is in at least float32, so a model
    in ``bf16-true`` has a float32 vector on the server and small updates are not lost.

    Attributes:
        names: Parameter names.
        shapes: Parameter shapes, in the order of ``names``.
        dtypes: Parameter dtypes as they are in the model, in the order of ``names``.
        dtype: Dtype of the flat vector.
        buffers: Names of the buffers that training may change, and of frozen tensors that are exchanged like them.
        frozen_parameters: Those of ``buffers`` that are frozen parameters.
        local: Names of the local parameters.

    Example:
        >>> layout = ParameterLayout.of(nn.Linear(2, 3))
        >>> layout.names, layout.numel
        (('weight', 'bias'), 9)
        >>> layout.views(torch.arange(9.0))["bias"]
        tensor([6., 7., 8.])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    buffers: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(shape.numel() for shape in self.shapes))

    @classmethod
    def of(cls, module: nn.Module, patterns: Iterable[str] = (), local: Collection[str] = ()) -> ParameterLayout:
        """Make the layout of a module's trainable parameters.

        Args:
            module: The module.
            patterns: Patterns of names. Frozen tensors that one of them matches are exchanged as buffers are.
            local: Names of the parameters that stay with their clients.

        Raises:
            ValueError: If the module has no trainable parameter, or one that is not a floating-point tensor.
        """
        named = trainable(module)
        _check_trainable(module, named)
        names: list[str] = []
        local_names: list[str] = []
        shapes: list[torch.Size] = []
        dtypes: list[torch.dtype] = []
        # Float32 at least, for sums over clients of parameters in half precision.
        dtype = torch.float32
        for name, parameter in named.items():
            if name in local:
                local_names.append(name)
                continue
            names.append(name)
            shapes.append(parameter.shape)
            dtypes.append(parameter.dtype)
            dtype = torch.promote_types(dtype, parameter.dtype)
        buffers = [*_tracked_buffers(module)]
        frozen_parameters: list[str] = []
        for name, tensor in _matching(_frozen(module, {*named, *buffers}), patterns).items():
            buffers.append(name)
            if isinstance(tensor, nn.Parameter):
                frozen_parameters.append(name)
        return cls(
            names=tuple(names),
            shapes=tuple(shapes),
            dtypes=tuple(dtypes),
            dtype=dtype,
            buffers=tuple(buffers),
            frozen_parameters=tuple(frozen_parameters),
            local=tuple(local_names),
        )

    @classmethod
    def of_tensors(cls, named: Mapping[str, Tensor]) -> ParameterLayout:
        """Make the layout of named tensors, in their order."""
        dtype = torch.float32
        for tensor in named.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(
            names=tuple(named),
            shapes=tuple(tensor.shape for tensor in named.values()),
            dtypes=tuple(tensor.dtype for tensor in named.values()),
            dtype=dtype,
        )

    @property
    def numel(self) -> int:
        """P, the number of trainable parameters."""
        return sum(self.sizes)

    @property
    def is_exact(self) -> bool:
        """Whether all parameters have the dtype of the flat vector, so that the model holds the vector exactly."""
        return all(dtype == self.dtype for dtype in self.dtypes)

    @property
    def message_bytes(self) -> int:
        """The size of one model in a message, in bytes, in the model's own dtypes."""
        return sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return named tensors that share memory (and the autograd graph) with a flat vector.

        Args:
            vector: ``[..., P]``; leading axes are kept, so a stack of clients gives a stack of each parameter.
        """
        leading = vector.shape[:-1]
        views = {}
        pieces = torch.split(vector, list(self.sizes), dim=-1)
        for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True):
            views[name] = piece.reshape((*leading, *shape))
        return views

    def tensors(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the module's trainable parameters in the layout's order, without the local ones.

        Raises:
            RuntimeError: If the set of trainable parameters is no longer the one this layout was made from.
        """
        return self.trained_tensors(module)[: len(self.names)]

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of all parameters that clients train: those of the vector, then the local ones."""
        return self.names + self.local

    def trained_tensors(self, module: nn.Module) -> list[nn.Parameter]:
        """Return all parameters that clients train, in the order of :attr:`trained`.

        Raises:
            RuntimeError: If the set of trainable parameters is no longer the one this layout was made from.
        """
        named = trainable(module)
        if named.keys() != set(self.trained):
            removed = sorted(set(self.trained) - set(named))
            added = sorted(set(named) - set(self.trained))
            raise RuntimeError(
                "The set of trainable parameters changed during `fit`"
                f" (no longer trainable: {removed[:5] or 'none'}; newly trainable: {added[:5] or 'none'}), but clients"
                " and server must exchange the same parameters. Freeze and unfreeze before `fit`, or call `fit` again"
                " afterwards."
            )
        return [named[name] for name in self.trained]

    def with_local(self, module: nn.Module) -> ParameterLayout:
        """Return the layout of all that clients train: the local parameters follow the others in its vector."""
        if not self.local:
            return self
        shapes = list(self.shapes)
        dtypes = list(self.dtypes)
        dtype = self.dtype
        for parameter in self.local_tensors(module).values():
            shapes.append(parameter.shape)
            dtypes.append(parameter.dtype)
            dtype = torch.promote_types(dtype, parameter.dtype)
        return replace(self, names=self.trained, shapes=tuple(shapes), dtypes=tuple(dtypes), dtype=dtype, local=())

    def local_tensors(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the module's local parameters by name."""
        if not self.local:
            return {}
        named = dict(module.named_parameters())
        return {name: named[name] for name in self.local}

    def tracked_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's tensors that are exchanged as buffers, in the layout's order."""
        named = dict(module.named_buffers())
        for name in self.frozen_parameters:
            named[name] = module.get_parameter(name)
        return {name: named[name] for name in self.buffers}

    def frozen_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's frozen tensors: the parameters and buffers that are not part of the layout."""
        return _frozen(module, {*self.trained, *self.buffers})

    @torch.no_grad()
    def read(
        self, parameters: Sequence[Tensor], out: Tensor | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Copy parameters into a flat vector ``[P]``.

        Args:
            parameters: The tensors to copy, in the layout's order, as :meth:`tensors` returns them.
            out: A vector to write into; a new one by default.
            device: The device of a new vector; that of the parameters by default.
        """
        if out is None:
            out = torch.empty(self.numel, dtype=self.dtype, device=device or parameters[0].device)
        torch._foreach_copy_(list(self.views(out).values()), list(parameters))
        return out

    @torch.no_grad()
    def write(self, vector: Tensor, parameters: Sequence[Tensor]) -> None:
        """Copy a flat vector ``[P]`` into parameters, cast to their dtypes."""
        torch._foreach_copy_(list(parameters), list(self.views(vector.detach()).values()))

    def rounded(self, vector: Tensor) -> Tensor:
        """Round a vector to the model's dtypes, as a model does that stores it."""
        if self.is_exact:
            return vector
        rounded = torch.empty_like(vector)
        for target, source, dtype in zip(
            self.views(rounded).values(), self.views(vector).values(), self.dtypes, strict=True
        ):
            target.copy_(source.to(dtype))
        return rounded

    def expand(self, values: Iterable[float], device: torch.device | None = None) -> Tensor:
        """Repeat one number per parameter tensor for each of its elements.

        Returns:
            A scalar ``[]`` when all numbers are equal, else a vector ``[P]``.
        """
        numbers = list(values)
        if len(set(numbers)) == 1:
            return torch.tensor(numbers[0], dtype=self.dtype, device=device)
        per_tensor = torch.tensor(numbers, dtype=self.dtype, device=device)
        return per_tensor.repeat_interleave(torch.tensor(self.sizes, device=device))

    def groups(self) -> dict[str, list[slice]]:
        """Return slices of the flat vector by the module that owns the parameters (a layer's weight and bias)."""
        slices: dict[str, list[slice]] = {}
        begin = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            slices.setdefault(name.rpartition(".")[0], []).append(slice(begin, begin + size))
            begin += size
        return slices


def trainable(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the module's trainable parameters by name; tied parameters once."""
    parameters = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameters[name] = parameter
    return parameters


def _check_trainable(module: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse trainable parameters that cannot be exchanged.

    Args:
        module: The module, for the message.
        named: Its trainable parameters by name.
    """
    if not named:
        raise ValueError(
            f"`model` ({type(module).__name__}) has no trainable parameter, so there is nothing a federation could"
            " learn. Set `requires_grad=True` on the parameters that should be trained."
        )
    for name, parameter in named.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Parameter `{name}` of a lazy module has no shape yet, so the size of messages is unknown. Run one"
                " batch through the model before `fit`, for example in `configure_model`."
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"Trainable parameters must be real floating-point tensors; `{name}` is {parameter.dtype}."
                " Freeze it, or keep it as a buffer."
            )


def _tracked_buffers(module: nn.Module) -> Mapping[str, Tensor]:
    """Return all buffers except those of modules that are in evaluation mode and hold nothing trainable."""
    # Their statistics do not move in training, as those of a pretrained backbone that is only read.
    frozen = set()
    for submodule in module.modules():
        if not submodule.training and not trainable(submodule):
            frozen |= set(map(id, submodule.buffers(recurse=False)))
    tracked = {}
    for name, buffer in module.named_buffers():
        if id(buffer) not in frozen:
            tracked[name] = buffer
    return tracked


def _frozen(module: nn.Module, exchanged: set[str]) -> dict[str, Tensor]:
    """Return the parameters and buffers that are not among the exchanged ones."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    frozen = {}
    for name, tensor in named.items():
        # Inference tensors cannot be changed in training.
        if name not in exchanged and not tensor.is_inference():
            frozen[name] = tensor
    return frozen


def _matching(named: Mapping[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors whose name one of the patterns matches."""
    wanted = list(patterns)
    matching = {}
    for name, tensor in named.items():
        if any(fnmatchcase(name, pattern) for pattern in wanted):
            matching[name] = tensor
    return matching


@torch.no_grad()
def own_memory(module: nn.Module) -> None:
    """Give every buffer whose elements share memory (``expand``) memory of its own: the others cannot be written."""
    for buffer in module.buffers():
        if _is_expanded(buffer) and not buffer.is_inference():
            buffer.data = buffer.clone(memory_format=torch.contiguous_format)


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether elements along some axis share memory: their distance, the stride, is 0."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
