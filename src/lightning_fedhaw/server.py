"""The global model: its flat parameters, its buffers, and a loss that is differentiable in any flat vector.

The user's module holds the global model between rounds, and other models for a while: a client's during its local
training, and any parameters during a call. The server's own copy says which numbers are the global model's.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_fedhaw.data.labels import find_labels
from lightning_fedhaw.data.tensors import tensors_of
from lightning_fedhaw.isolation import evaluation_mode, isolated_randomness, substituted_tensors
from lightning_fedhaw.module_calls import forward, training_step, without_side_effects
from lightning_fedhaw.rule import Batch, PredictionFunction
from lightning_fedhaw.vectors.kernels import all_finite
from lightning_fedhaw.vectors.layout import ParameterLayout, own_memory


@dataclass(frozen=True)
class ModuleChanges:
    """The changes of the global model that the user's code has made in the module between two rounds.

    Attributes:
        names: The parameters and buffers that were changed.
        parameters: ``[P]``, with the changes.
        buffers: The buffers by name, with the changes.
    """

    names: Sequence[str]
    parameters: Tensor
    buffers: Mapping[str, Tensor]


class Server:
    """The global parameters and buffers, and the user's module that they are written into.

    Args:
        module: The user's LightningModule; it stores the global model between rounds.
        layout: The place of each trainable parameter in the flat vector.
        proxy_dataset: The server's own data, for rules that need some.
        seed: The federation's seed, for rules that draw random numbers.
        collate_fn: Makes a batch from a list of proxy samples.
        prepare: Converts a batch to the precision and moves it to the device.
        context: Gives the context of a training step in the trainer's precision.

    Attributes:
        buffers: The global model's buffers that training may change, by name.
        local_parameters: The global model's values of the parameters that stay with the clients, by name: those that
            the module had when the federation was built.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        proxy_dataset: Any = None,
        *,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Batch] = default_collate,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.module = module
        self.proxy_dataset = proxy_dataset
        self.layout = layout
        self.seed = seed
        self._collate_fn = collate_fn
        self._prepare = prepare
        self._context = context
        self._proxy_tensors: tuple[Tensor, ...] | None = None
        if collate_fn is default_collate:
            # Indexing whole tensors gives the batch that the default collation makes of single samples, only faster.
            self._proxy_tensors = tensors_of(proxy_dataset)
        self._vector = layout.read(layout.tensors(module))  # [P]
        # Clients' buffers are written into the module in place.
        own_memory(module)
        self.buffers = {name: buffer.detach().clone() for name, buffer in layout.tracked_buffers(module).items()}
        self.local_parameters = {name: value.detach().clone() for name, value in layout.local_tensors(module).items()}

    def parameters(self) -> Tensor:
        """Return the global parameters ``[P]``. Read only: a rule returns new ones instead of changing these."""
        return self._vector

    @torch.no_grad()
    def install(self, parameters: Tensor, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Make these the global parameters and buffers, and write both into the module.

        Args:
            parameters: ``[P]``.
            buffers: The new buffers by name; ``None`` keeps the present ones.

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
            # A new dictionary: the undo of a round holds the old one.
            self.buffers = {name: buffers[name].detach().clone() for name in self.buffers}
        self.write(self._vector, self.buffers)

    def put_back(self, parameters: Tensor, buffers: dict[str, Tensor]) -> None:
        """Restore earlier global parameters ``[P]`` and buffers, after a round that failed."""
        self._vector = parameters
        self.buffers = buffers
        self.write(parameters, buffers)

    @torch.no_grad()
    def write(self, parameters: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Write parameters ``[P]`` and buffers into the module without making them the server's.

        Local parameters get the global model's values.
        """
        # By name, because this also runs when a fit is interrupted, with other parameters trainable at the moment.
        module_parameters = dict(self.module.named_parameters())
        self.layout.write(parameters, [module_parameters[name] for name in self.layout.names])
        for name, value in self.local_parameters.items():
            module_parameters[name].copy_(value)
        module_buffers: dict[str, Tensor] = dict(self.module.named_buffers())
        for name in self.layout.frozen_parameters:
            module_buffers[name] = module_parameters[name]
        for name, value in buffers.items():
            if name in module_buffers and module_buffers[name].shape == value.shape:
                module_buffers[name].copy_(value)
            else:  # an interrupted step has left something else under this name
                owner, _, attribute = name.rpartition(".")
                setattr(self.module.get_submodule(owner), attribute, value.clone())

    @torch.no_grad()
    def write_server_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write the values of parameters that only the server changes into the module, by name."""
        for name, value in values.items():
            self.module.get_parameter(name).copy_(value)

    def move(self, device: torch.device) -> None:
        """Move parameters and buffers to another device; the module stays where it is."""
        self._vector = self._vector.to(device)
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        self.local_parameters = {name: value.to(device) for name, value in self.local_parameters.items()}

    def mixed_buffers(self, clients: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
        """Return the buffers of a model that is a weighted mean of the clients' models, by :func:`averaged_buffers`.

        Args:
            clients: The K clients' buffers after training; empty where clients send none.
            weights: ``[K]``, summing to one.
        """
        if len(clients) == 0:
            return dict(self.buffers)
        return averaged_buffers(self.buffers, clients, weights)

    # ------------------------------------------------------------------ what the user's code has changed in the module

    @torch.no_grad()
    def changes_in_module(self) -> ModuleChanges:
        """Return the model that is in the module, and which tensors are not what the server has written there.

        The vector may have more digits than the module's types hold. Where a parameter is still what the vector was
        rounded to, the vector's digits stay.
        """
        written = {**self.layout.views(self.layout.rounded(self._vector)), **self.buffers}
        in_module = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        changed = []
        for name in _changed(in_module, written):
            # A parameter of another shape has no place in the vector.
            if name in self.buffers or in_module[name].shape == written[name].shape:
                changed.append(name)
        if not changed:
            return ModuleChanges(changed, self._vector, self.buffers)
        # Copies, because the rule and the undo of a round may hold the old ones.
        parameters = self._vector.clone()
        buffers = dict(self.buffers)
        targets = self.layout.views(parameters)
        for name in changed:
            present = in_module[name].detach()
            if name in buffers:
                buffers[name] = present.clone()
            else:
                present = present.to(parameters)
                targets[name].copy_(torch.where(present == written[name], targets[name], present))
        return ModuleChanges(changed, parameters, buffers)

    def adopt(self, changes: ModuleChanges) -> None:
        """Make the model that :meth:`changes_in_module` has found in the module the global one."""
        if changes.names:
            self._vector = changes.parameters
            self.buffers = dict(changes.buffers)

    @torch.no_grad()
    def changed_server_parameters(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the present values of those parameters that are not what :meth:`write_server_parameters` wrote.

        As in :meth:`changes_in_module`, digits that the module's types do not hold stay where nothing was changed.

        Args:
            values: What was written, by name.
        """
        in_module = {name: self.module.get_parameter(name) for name in values}
        written = {name: value.to(in_module[name].dtype) for name, value in values.items()}
        changed: dict[str, Tensor] = {}
        for name in _changed(in_module, written):
            present = in_module[name].detach()
            changed[name] = torch.where(present == written[name], values[name], present.to(values[name]))
        return changed

    # ------------------------------------------------------------------ the module at other parameters

    def loss(
        self,
        vector: Tensor,
        batch: Batch,
        batch_idx: int = 0,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        local_parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the module's training loss at any parameters, differentiable with respect to them.

        The module itself does not change: buffers that the step changes are copies, and metrics do not count it.

        Args:
            vector: ``[P]``.
            batch: A batch as the module's ``training_step`` takes it.
            batch_idx: Its second argument, where it has one.
            buffers: Buffers to use instead of the module's, by name.
            local_parameters: The values of a client that has its own, by name; the global model's by default.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``training_step`` returns no loss.
        """
        output = self.call(training_step, vector, batch, batch_idx, buffers=buffers, local_parameters=local_parameters)
        loss = output
        if isinstance(output, Mapping):
            loss = output.get("loss")
        if not isinstance(loss, Tensor):
            raise ValueError("`training_step` must return a loss, or a dict with the key 'loss', got no loss.")
        return loss

    def predict(
        self,
        vector: Tensor,
        batch: Batch,
        function: PredictionFunction | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        training: bool = False,
    ) -> Tensor:
        """Return the module's predictions at any parameters, differentiable with respect to them.

        The module itself does not change.

        Args:
            vector: ``[P]``.
            batch: A batch as the module's ``training_step`` takes it.
            function: ``function(module, batch)`` returns the predictions. Default: the module's ``forward`` of the
                batch, of its first element where it is a tuple or a list.
            buffers: Buffers to use instead of the module's, by name.
            training: Whether the module is in the modes in which clients train it, so that frozen layers that are in
                evaluation mode stay in it; otherwise the whole module is in evaluation mode.

        Returns:
            ``[batch, ...]``.

        Raises:
            TypeError: If the predictions are not a tensor.
        """
        mode: AbstractContextManager[object] = nullcontext()
        if not training:
            mode = evaluation_mode(self.module)
        with mode:
            predictions = self.call(function or forward, vector, batch, buffers=buffers)
        if not isinstance(predictions, Tensor):
            raise TypeError(f"predictions must be a tensor [batch, ...], got {type(predictions).__name__}")
        return predictions

    def call(
        self,
        function: Callable[..., Any],
        vector: Tensor,
        *arguments: Any,
        buffers: Mapping[str, Tensor] | None = None,
        local_parameters: Mapping[str, Tensor] | None = None,
        log: Callable[..., None] | None = None,
    ) -> Any:
        """Return ``function(module, *arguments)`` with other parameters ``[P]`` and buffers in the module.

        Args:
            function: Called with the module.
            vector: ``[P]``.
            arguments: Its further arguments.
            buffers: Buffers to use instead of the module's, by name.
            local_parameters: Values of parameters that are not in the vector, by name; by default those of the global
                model that stay with the clients.
            log: Called instead of the module's ``log``; by default nothing is.
        """
        substitutes = buffers or {}
        # All tensors that the function finds in the module: nothing that it does to them reaches the module's own.
        state: dict[str, Tensor] = {}
        views = self.layout.views(vector)
        for (name, view), dtype in zip(views.items(), self.layout.dtypes, strict=True):
            state[name] = view.to(dtype)
        # Named explicitly, because the module may hold those of the client that trained last.
        for name, value in (local_parameters or self.local_parameters).items():
            state[name] = value.to(vector.device)
        module_buffers = {**dict(self.module.named_buffers()), **self.layout.tracked_buffers(self.module)}
        for name, module_buffer in module_buffers.items():
            buffer = substitutes.get(name, module_buffer)
            # A copy: a training step changes BatchNorm statistics in place.
            state[name] = buffer.detach().to(vector.device, copy=True)
        for name in self.layout.frozen_parameters:
            # A step that moves a teacher may assign it again, which a module allows to a parameter only.
            state[name] = nn.Parameter(state[name], requires_grad=False)
        with (
            self._context(),
            without_side_effects(self.module, log),
            substituted_tensors(self.module, state),
        ):
            return function(self.module, *arguments)

    # ------------------------------------------------------------------ data of the server's own

    def proxy_batch(self, index: Tensor) -> Batch:
        """Return the proxy samples with these indices, as a batch on the model's device.

        Args:
            index: ``[batch]`` int64.
        """
        return self._prepare(self._collated(index))

    def prepare(self, batch: Batch) -> Batch:
        """Convert a batch to the precision, and move it to the model's device."""
        return self._prepare(batch)

    def _collated(self, index: Tensor) -> Batch:
        if self._proxy_tensors is not None:
            return [tensor[index.to(tensor.device)] for tensor in self._proxy_tensors]
        return self._collate_fn([self.proxy_dataset[i] for i in index.tolist()])

    def check_proxy(self, rule: str, attempt: Callable[[Tensor, Batch], object]) -> None:
        """Refuse proxy data that a rule cannot work with, before the first round.

        Args:
            rule: The rule's name, for the message.
            attempt: The rule's use of parameters ``[P]`` and a batch. It is tried once, on the CPU, on the samples with
                the smallest and the largest label.

        Raises:
            ValueError: If there is no proxy data, if it is empty, or if the attempt fails.
        """
        remedy = "give `FederatedDataModule(..., proxy=...)` a data set, or a number of training samples to set aside"
        if self.proxy_dataset is None:
            raise ValueError(f"`{rule}` works with data of the server's own, and there is none: {remedy}.")
        if len(self.proxy_dataset) == 0:
            raise ValueError(f"`{rule}` works with data of the server's own, and `proxy` is empty: {remedy}.")
        if self.local_parameters:
            rank_zero_warn(
                f"`{rule}` computes with the global model on the server's data, and the global model has the initial"
                f" values of the local parameters ({', '.join(list(self.local_parameters)[:5])}), not those that"
                " clients train."
            )
        labels = find_labels(self.proxy_dataset)
        index = torch.tensor([0, len(self.proxy_dataset) - 1])
        label_range = ""
        if labels is not None:
            index = torch.tensor([int(labels.argmin()), int(labels.argmax())])
            label_range = f" (with labels from {int(labels.min())} to {int(labels.max())})"
        # On the CPU, because on a GPU a label without an output aborts the process instead of raising an error.
        cpu = torch.device("cpu")
        try:
            with isolated_randomness(self._vector.device), torch.no_grad():
                attempt(self._vector.to(cpu), move_data_to_device(self.proxy_batch(index), cpu))
        except Exception as error:  # the attempt runs the user's module, which may raise anything
            # Of a model on another device only an IndexError is conclusive (a label without an output): anything else
            # may come from a tensor of the module that stayed on that device.
            if self._vector.device != cpu and not isinstance(error, IndexError):
                return
            first_line = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"`{rule}` cannot use the data given as `proxy`{label_range}: {first_line} ({type(error).__name__})."
                " Proxy samples must look like training samples, and the model must have an output for each of their"
                " labels."
            ) from error


@torch.no_grad()
def averaged_buffers(
    server: Mapping[str, Tensor], clients: Iterable[Mapping[str, Tensor]], weights: Tensor
) -> dict[str, Tensor]:
    """Return the buffers of the new global model under the policy ``"average"``.

    Floating-point buffers move by the weighted mean of the clients' changes, so a buffer that no client changes stays
    bit-identical; they are never multiplied by a rule's scale. Integer buffers (step counters) take the maximum.

    Args:
        server: The buffers that were broadcast.
        clients: The K clients' buffers after training; one that is absent did not change.
        weights: ``[K]``, summing to one.
    """
    client_buffers = list(clients)
    averages: dict[str, Tensor] = {}
    for name, start in server.items():
        stack = torch.stack([buffers.get(name, start).to(start.device) for buffers in client_buffers])  # [K, *shape]
        if start.is_floating_point() or start.is_complex():
            # Small changes of a half-precision buffer would be lost in its own dtype.
            dtype = torch.promote_types(start.dtype, torch.float32)
            # An infinity that no client changes (a mask) is no change, and not the NaN of infinity minus infinity.
            changes = torch.where(stack == start, 0, stack.to(dtype) - start.to(dtype))  # [K, *shape]
            change = torch.tensordot(weights.to(start.device, dtype), changes, dims=1)  # [*shape]
            averages[name] = (start.to(dtype) + change).to(start.dtype)
        elif start.dtype == torch.bool:
            averages[name] = stack.any(0)
        else:
            averages[name] = stack.amax(0)
    return averages


def _changed(present: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are not what was written.

    Args:
        present: The tensors of the module.
        written: What the server wrote. A tensor that is no longer in the module is not listed.
    """
    names = [name for name in written if name in present]
    if any(not present[name].is_cpu for name in names):
        # One answer for all of them: on other devices every answer is waited for.
        flags = [_equal(written[name], present[name]).logical_not().any() for name in names]
        names = [name for name, flag in zip(names, torch.stack(flags).tolist(), strict=True) if flag]
    different = []
    for name in names:
        tensor = written[name]
        other = present[name].to(tensor)
        if not torch.equal(tensor, other) and not _equal(tensor, other).all():
            different.append(name)
    return different


def _equal(tensor: Tensor, other: Tensor) -> Tensor:
    """Return where two tensors hold the same number, NaN included; nowhere if their shapes differ."""
    if tensor.shape != other.shape:
        return torch.zeros((), dtype=torch.bool)
    other = other.to(tensor)
    # NaN is the number that differs from itself.
    return tensor.eq(other) | (tensor.ne(tensor) & other.ne(other))
