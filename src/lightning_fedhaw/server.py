"""The global model: its flat parameters, its buffers, and a differentiable loss of any flat vector."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import Parameter
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchmetrics import Metric

from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.tensors import tensors_of
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.vectors.layout import ParameterLayout

Function = Callable[[Any, Any], Tensor]


class Server:
    """Holds the global parameters and buffers, and puts them into the user's module.

    Args:
        module: The user's LightningModule; it stores the global model between rounds.
        layout: Where each trainable parameter lives in the flat vector.
        proxy_dataset: The server's own data, for rules that want some.
        seed: The federation's seed, for rules that draw.
        collate_fn: Makes a batch from a list of proxy samples.
        prepare: Converts a batch to the precision and moves it to the device.
        context: Gives the context of a training step in the trainer's precision.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        proxy_dataset: Any = None,
        *,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        prepare: Callable[[Any], Any] = lambda batch: batch,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.module = module
        self.proxy_dataset = proxy_dataset
        self.layout = layout
        self.seed = seed
        self._collate_fn, self._prepare, self._context = collate_fn, prepare, context
        self._proxy_tensors = tensors_of(proxy_dataset) if collate_fn is default_collate else None
        self._vector = layout.read(layout.tensors(module))
        self.buffers = {name: buffer.detach().clone() for name, buffer in layout.tracked_buffers(module).items()}

    def parameters(self) -> Tensor:
        """The global parameters ``[P]``. Read only: a rule returns new ones instead of changing these."""
        return self._vector

    @torch.no_grad()
    def install(self, parameters: Tensor, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Make these the global parameters ``[P]`` and buffers, and put both into the module.

        Raises:
            ValueError: If the vector has another shape than ``[P]``.
            FloatingPointError: If it holds NaN or infinity; the old parameters stay.
        """
        if parameters.shape != (self.layout.numel,):
            raise ValueError(
                f"A rule must return parameters of the shape [{self.layout.numel}], got {list(parameters.shape)}."
            )
        if not all_finite(parameters):
            raise FloatingPointError(
                "The rule returned non-finite global parameters, which were not installed: the model is the one before"
                " this round. Lower the rule's step sizes, or bound what it learns (FedHAW: `scale_bounds=(0.5, 2.0)`;"
                " FedHyper: `alpha_bounds=(0.2, 5.0)`)."
            )
        self._vector = parameters.detach().to(self._vector)
        if buffers is not None:
            self.buffers = {name: buffers[name].detach().clone() for name in self.buffers}
        self.write(self._vector, self.buffers)

    def put_back(self, parameters: Tensor, buffers: dict[str, Tensor]) -> None:
        """Make parameters and buffers that were the server's before its own again, after a round that failed."""
        self._vector, self.buffers = parameters, buffers
        self.write(parameters, buffers)

    def move(self, device: torch.device) -> None:
        """Keep parameters and buffers on another device, the module where it is."""
        self._vector = self._vector.to(device)
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def write(self, parameters: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Put parameters ``[P]`` and buffers into the module without making them the server's."""
        # By name, whatever is trainable at the moment: this also runs when a fit is interrupted.
        named = dict(self.module.named_parameters())
        self.layout.write(parameters, [named[name] for name in self.layout.names])
        own = dict(self.module.named_buffers())
        for name, value in buffers.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
            else:  # an interrupted step had put something else in its place
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, value.clone())

    def proxy_batch(self, index: Tensor) -> Any:
        """The proxy samples with these numbers, as a batch on the model's device.

        Args:
            index: ``[batch]`` int64.
        """
        return self._prepare(self._collected(index))

    def _collected(self, index: Tensor) -> Any:
        if self._proxy_tensors is not None:
            return [tensor[index.to(tensor.device)] for tensor in self._proxy_tensors]
        return self._collate_fn([self.proxy_dataset[i] for i in index.tolist()])

    def check_proxy(self, rule: str, attempt: Callable[[Tensor, Any], object]) -> None:
        """Refuse proxy data that a rule cannot work with, before the first round.

        Args:
            rule: The rule's name, for the sentence.
            attempt: What the rule will do with parameters ``[P]`` and a batch. It is tried once, on the CPU, on the
                samples with the smallest and the largest label: a label without an output would end a GPU's program.

        Raises:
            ValueError: If there is none, if it is empty, or if the attempt fails.
        """
        remedy = "give `FederatedDataModule(..., proxy=...)` a data set, or a number of training samples to set aside"
        if self.proxy_dataset is None:
            raise ValueError(f"`{rule}` works with data of the server's own, and there is none: {remedy}.")
        count = len(self.proxy_dataset)
        if count == 0:
            raise ValueError(f"`{rule}` works with data of the server's own, and `proxy` is empty: {remedy}.")
        labels = find_labels(self.proxy_dataset)
        index = torch.tensor([0, count - 1] if labels is None else [int(labels.argmin()), int(labels.argmax())])
        cpu = torch.device("cpu")
        try:
            with isolated_randomness(self._vector.device), torch.no_grad():
                attempt(self._vector.to(cpu), move_data_to_device(self.proxy_batch(index), cpu))
        except Exception as error:
            if self._vector.device != cpu and not isinstance(error, IndexError):
                return  # the module may hold tensors that nobody moved
            told = "" if labels is None else f" (with labels from {int(labels.min())} to {int(labels.max())})"
            raise ValueError(
                f"`{rule}` cannot use the data given as `proxy`{told}: {str(error).strip().partition(chr(10))[0]}"
                f" ({type(error).__name__}). Proxy samples must look like training samples, and the model must have an"
                " output for each of their labels."
            ) from error

    def loss(self, vector: Tensor, batch: Any, batch_idx: int = 0) -> Tensor:
        """The module's training loss at any parameters, differentiable with respect to them.

        The module itself is left alone: buffers that the step changes are copies, and metrics do not count it.

        Args:
            vector: ``[P]``.
            batch: What the module's ``training_step`` takes.
            batch_idx: Its second argument, where it has one.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``training_step`` gives no loss.
        """
        output = self._call(_training_step, vector, batch, batch_idx)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError("`training_step` must return a loss, or a dict with the key 'loss', got no loss.")
        return loss

    def predict(
        self,
        vector: Tensor,
        batch: Any,
        function: Function | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        training: bool = False,
    ) -> Tensor:
        """What the module makes of a batch at any parameters, differentiable with respect to them.

        The module itself is left alone.

        Args:
            vector: ``[P]``.
            batch: What the module's ``training_step`` takes.
            function: ``function(module, batch)`` gives the predictions. Default: the module's ``forward`` of the
                batch, of its first element where it is a tuple or a list.
            buffers: Buffers to use in place of the module's, by name.
            training: Whether the module is in training mode.

        Returns:
            ``[batch, ...]``.

        Raises:
            TypeError: If the predictions are not a tensor.
        """
        modes = [(submodule, submodule.training) for submodule in self.module.modules()]
        try:
            self.module.train(training)
            predictions = self._call(function or _forward, vector, batch, buffers=buffers)
        finally:
            for submodule, mode in modes:
                submodule.training = mode
        if not isinstance(predictions, Tensor):
            raise TypeError(f"predictions must be a tensor [batch, ...], got {type(predictions).__name__}")
        return predictions

    def mixed_buffers(self, clients: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
        """The buffers of a model that is a weighted mean of clients' models: those of :func:`averaged_buffers`."""
        return averaged_buffers(self.buffers, clients, weights) if len(clients) else dict(self.buffers)

    def _call(
        self,
        function: Callable[..., Any],
        vector: Tensor,
        *arguments: Any,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """``function(module, *arguments)`` with other parameters and buffers in the module."""
        views = zip(self.layout.views(vector).items(), self.layout.dtypes, strict=True)
        state = {f"module.{name}": view.to(dtype) for (name, view), dtype in views}
        for name, own in self.module.named_buffers():
            state[f"module.{name}"] = (buffers or {}).get(name, own).detach().to(vector.device, copy=True)
        with self._context(), _quiet(self.module):
            return torch.func.functional_call(_Called(self.module, function), state, arguments, tie_weights=True)


class _Called(nn.Module):
    """Lets ``functional_call`` reach any function of a module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.module, *arguments)


def _training_step(module: Any, batch: Any, batch_idx: int) -> Any:
    if not getattr(module, "automatic_optimization", True):
        raise ValueError("with `automatic_optimization=False`, `training_step` has no loss but steps by itself")
    return module.training_step(*step_arguments(module.training_step, batch, batch_idx)[:2])


def _forward(module: Any, batch: Any) -> Any:
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """What is logged goes nowhere, and metrics are as before."""
    own_log = module.__dict__.get("log")
    metrics = [
        (metric, dict(vars(metric)), {name: _copied(getattr(metric, name)) for name in metric._defaults})
        for metric in module.modules()
        if isinstance(metric, Metric)
    ]
    vars(module)["log"] = _ignore
    try:
        yield
    finally:
        if own_log is None:
            del vars(module)["log"]
        else:
            vars(module)["log"] = own_log
        for metric, attributes, states in metrics:
            if metric._update_count != attributes["_update_count"]:
                vars(metric).clear()
                vars(metric).update({**attributes, **states})


def _copied(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else list(state)


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """The arguments of a ``*_step`` method, whose ``batch_idx`` and ``dataloader_idx`` are optional."""
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    named = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if Parameter.VAR_POSITIONAL in kinds:
        named = max(named, 2)
    return (batch, batch_idx, 0)[: max(named, 1)]


@torch.no_grad()
def averaged_buffers(
    server: Mapping[str, Tensor], clients: Iterable[Mapping[str, Tensor]], weights: Tensor
) -> dict[str, Tensor]:
    """Buffers of the new global model under the policy ``"average"``.

    Floating-point buffers move by the weighted mean of the clients' changes, so a buffer that nobody changes stays
    what it is to the last bit; they are never multiplied by a rule's scale. Integer buffers (step counters) take the
    maximum.

    Args:
        server: The buffers that were broadcast.
        clients: The K clients' buffers after training; one that is absent did not change.
        weights: ``[K]``, summing to one.
    """
    rows = list(clients)
    merged: dict[str, Tensor] = {}
    for name, own in server.items():
        stack = torch.stack([row.get(name, own).to(own.device) for row in rows])
        if own.is_floating_point() or own.is_complex():
            wide = torch.promote_types(own.dtype, torch.float32)
            # An infinity that nobody changes (a mask) is no change.
            changes = torch.where(stack == own, 0, stack.to(wide) - own.to(wide))
            change = torch.tensordot(weights.to(own.device, wide), changes, dims=1)
            merged[name] = (own.to(wide) + change).to(own.dtype)
        else:
            merged[name] = stack.amax(0) if own.dtype != torch.bool else stack.any(0)
    return merged


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite, in one read of the tensor where it is."""
    # A finite sum proves it without a temporary; a sum can overflow, though, so the other answer is checked.
    if torch.isfinite(tensor.sum()):
        return True
    return bool(torch.isfinite(tensor).all())


def _ignore(*_: Any, **__: Any) -> None:
    return None
