"""The trainer as the engines see it: the module, its optimizers, its precision, its hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fedhaw.adapter.client_pass import client_pass
from lightning_fedhaw.adapter.client_validation import ClientValidation
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, client_of, datamodule_of, publish_client
from lightning_fedhaw.clients.steps import BatchProgress, is_plain_sgd, trainable_among
from lightning_fedhaw.clients.vectorized.snapshot import names_in_step
from lightning_fedhaw.module_calls import step_arguments
from lightning_fedhaw.ranks import REQUESTS
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.layout import ParameterLayout

_BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")
_STEP_HOOKS = (
    *_BATCH_HOOKS,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
)
# The module has some of these hooks alone.
_CALLBACK_STEP_HOOKS = tuple(filter(partial(hasattr, pl.Callback), _STEP_HOOKS))
_PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)
# What the trainer says of the batches of the client at work.
_CLIENT_NAMES = {"is_last_batch", "num_training_batches"}
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TrainerHost:
    """The :class:`~lightning_fedhaw.clients.steps.Host` of a federation in a trainer, resolved once per run.

    Hooks are looked up when it is created, and not at every local step.

    Args:
        trainer: The trainer.
        data_device: Where training data in memory is kept; ``None`` where it is read sample by sample.
        nonfinite_buffers: Names of buffers that were NaN or infinite when ``fit`` was called.

    Raises:
        ValueError: If ``training_step`` reads its own batches, or an optimizer has parameters that are not the
            module's.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        data_device: torch.device | None = None,
        nonfinite_buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.trainer = trainer
        self._signals = trainer._signal_connector
        self.nonfinite_buffers = nonfinite_buffers
        self.module = trainer.lightning_module
        self.strategy = trainer.strategy
        self.device = trainer.strategy.root_device
        self.optimizers: Sequence[torch.optim.Optimizer] = trainer.strategy.optimizers
        # A rule's hooks belong to the round and not to a local step.
        self.callbacks: list[pl.Callback] = []
        for callback in callbacks_of(trainer):
            if not isinstance(callback, Rule):
                self.callbacks.append(callback)
        self.precision = trainer.strategy.precision_plugin
        self.scaler: torch.amp.GradScaler | None = getattr(self.precision, "scaler", None)
        self._is_plain = type(self.precision) is Precision
        self._hooks = {name: self._user_hooks(name) for name in (*_BATCH_HOOKS, "on_before_zero_grad")}
        self._module_hooks = {name for name in _STEP_HOOKS if is_overridden(name, self.module)}
        converts_input = type(self.precision).convert_input is not Precision.convert_input
        is_on_device = self.device.type == "cpu" or data_device == self.device
        self._moves_nothing = is_on_device and not converts_input and self._transfer_hook() is None
        self._check_training_step()
        self._check_optimizers()
        self._takes_index = len(step_arguments(self.module.training_step, None, 0)) > 1

    def _check_training_step(self) -> None:
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "`training_step(self, dataloader_iter)` is not supported in federated training: clients are"
                " given batches. Write `training_step(self, batch, batch_idx)`."
            )

    def _check_optimizers(self) -> None:
        # By identity: the comparison of two tensors would compare their elements.
        parameters = {id(parameter) for parameter in self.module.parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in parameters:
                        raise ValueError(
                            "`configure_optimizers` returned an optimizer over parameters that are not the module's"
                            " own, so they would be trained by all clients together. Register them in the module."
                        )

    def _user_hooks(self, name: str) -> list[Callable[..., Any]]:
        """Return the methods of callbacks, other than Lightning's and this package's own, that override a hook."""
        hooks = []
        for callback in self.callbacks:
            if hook_owner(callback, name) == "user":
                hooks.append(getattr(callback, name))
        return hooks

    def _transfer_hook(self) -> tuple[str, Callable[..., Any]] | None:
        """Return the first overridden hook around the transfer of a batch to the device, with its name."""
        datamodule = datamodule_of(self.trainer)
        for name in _TRANSFER_HOOKS:
            if is_overridden(name, self.module):
                return name, getattr(self.module, name)
            if datamodule is not None and is_overridden(name, datamodule):
                return name, getattr(datamodule, name)
        return None

    @property
    def client(self) -> object:
        """The client at work, as the module finds it in ``trainer.federation_client``."""
        return client_of(self.trainer)

    @client.setter
    def client(self, client: object) -> None:
        publish_client(self.trainer, client)

    @property
    def accumulate(self) -> int:
        """Batches of one optimizer step."""
        return int(self.trainer.accumulate_grad_batches)

    @property
    def round(self) -> int:
        """The number of the round that is running."""
        return int(self.trainer.global_step)

    @property
    def can_evaluate(self) -> bool:
        """Whether a client's data can be run through the module without training on it."""
        return is_overridden("validation_step", self.module) or bool(self.module.automatic_optimization)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step needs no optimizer object, precision plugin or hook."""
        if not self._is_plain or len(self.optimizers) != 1 or self.accumulate != 1 or self.trainer.gradient_clip_val:
            return False
        if self._module_hooks or any(self._user_hooks(name) for name in _CALLBACK_STEP_HOOKS):
            return False
        # Other strategies may wrap the module or the optimizer.
        if type(self.strategy) is not SingleDeviceStrategy and not isinstance(self.strategy, DDPStrategy):
            return False
        return is_plain_sgd(self.optimizers[0], trainable_among(self.module.parameters()))

    @property
    def clipping(self) -> tuple[float, str] | None:
        """The bound of gradient clipping, and ``"norm"`` or ``"value"``; ``None`` without."""
        bound = self.trainer.gradient_clip_val
        if not bound or bound <= 0:
            return None
        algorithm = self.trainer.gradient_clip_algorithm
        if algorithm is None:
            return float(bound), "norm"
        return float(bound), str(algorithm.value)

    @property
    def obstacle(self) -> str | None:
        """The first property of trainer or module that keeps many clients' steps from being one batched call.

        A phrase that follows the name of the step; ``None`` if there is no such property.
        """
        if not self.module.automatic_optimization:
            return f"optimizes manually{_place(self.module.training_step)}"
        return (
            self._hook_obstacle()
            or self._optimizer_obstacle()
            or self._batch_number_obstacle()
            or self._precision_obstacle()
        )

    def _hook_obstacle(self) -> str | None:
        if self._module_hooks:
            name = min(self._module_hooks)
            return f"is surrounded by the hook `{name}`{_place(getattr(self.module, name))}"
        for name in _CALLBACK_STEP_HOOKS:
            for hook in self._user_hooks(name):
                return f"is surrounded by the callback hook `{name}`{_place(hook)}"
        transfer_hook = self._transfer_hook()
        if transfer_hook is not None:
            name, hook = transfer_hook
            return f"is surrounded by the hook `{name}`{_place(hook)}"
        return None

    def _optimizer_obstacle(self) -> str | None:
        if len(self.optimizers) != 1:
            return f"has {len(self.optimizers)} optimizers"
        optimizer = self.optimizers[0]
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"has hooks on the optimizer {type(optimizer).__name__}"
        for parameter in self.module.parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "has hooks on its parameters' gradients"
        for layer in self.module.modules():
            if layer._backward_hooks or layer._backward_pre_hooks:
                return "has backward hooks on its layers"
        if self.accumulate != 1:
            return f"accumulates gradients (`accumulate_grad_batches={self.accumulate}`)"
        return None

    def _batch_number_obstacle(self) -> str | None:
        for name in sorted(_CLIENT_NAMES & names_in_step(self.module)):
            return f"asks for `{name}`, which differs from client to client{_place(self.module.training_step)}"
        return None

    def _precision_obstacle(self) -> str | None:
        if self.scaler is not None or type(self.precision) not in _PRECISIONS:
            return f"trains in the precision {self.trainer.precision} ({type(self.precision).__name__})"
        return None

    def prepare(self, data: Any) -> Any:
        """Convert a batch to the precision and move it to the device, through the module's transfer hooks."""
        if self._moves_nothing:
            return data
        return self.transfer(data)

    def transfer(self, data: Any) -> Any:
        """Convert a batch to the precision and move it, wherever it is."""
        data = self.precision.convert_input(data)
        data = self.module._on_before_batch_transfer(data, dataloader_idx=0)
        return self.strategy.batch_to_device(data, dataloader_idx=0)

    def arguments(self, data: Any, batch_idx: int) -> tuple[Any, ...]:
        """Return the arguments of ``training_step``, whose ``batch_idx`` is optional."""
        if self._takes_index:
            return (data, batch_idx)
        return (data,)

    def stop_if_asked(self) -> None:
        """Interrupt the round, if this process was asked to end, or one of several processes for a checkpoint.

        Raises:
            SIGTERMException: After SIGTERM.
            KeyboardInterrupt: After Ctrl+C, with several processes.
            CheckpointRequested: If a checkpoint was asked for, with several processes.
        """
        if self._signals.received_sigterm:
            raise SIGTERMException
        REQUESTS.raise_if_any()

    def on_batch_start(self, data: Any, batch_idx: int) -> bool:
        """Call the hooks before a local step; return whether the module asks to skip the rest of the pass."""
        for hook in self._hooks["on_train_batch_start"]:
            hook(self.trainer, self.module, data, batch_idx)
        if "on_train_batch_start" not in self._module_hooks:
            return False
        return self.module.on_train_batch_start(data, batch_idx) == -1

    def on_batch_end(self, outputs: Any, data: Any, batch_idx: int) -> None:
        """Call the hooks after a local step."""
        for hook in self._hooks["on_train_batch_end"]:
            hook(self.trainer, self.module, outputs, data, batch_idx)
        if "on_train_batch_end" in self._module_hooks:
            self.module.on_train_batch_end(outputs, data, batch_idx)

    def before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Call the hooks before gradients are cleared."""
        for hook in self._hooks["on_before_zero_grad"]:
            hook(self.trainer, self.module, optimizer)
        if "on_before_zero_grad" in self._module_hooks:
            self.module.on_before_zero_grad(optimizer)

    def learning_rates(self, layout: ParameterLayout) -> tuple[float, ...]:
        """Return the learning rate of each parameter tensor in the layout's order, as scheduled for this round.

        Raises:
            ValueError: If a trainable parameter has no optimizer, or more than one.
        """
        rates: dict[Tensor, list[float]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates.setdefault(parameter, []).append(float(group["lr"]))
        learning_rates = []
        for name, parameter in zip(layout.names, layout.tensors(self.module), strict=True):
            rates_of_parameter = rates.get(parameter, [])
            if len(rates_of_parameter) != 1:
                raise ValueError(
                    f"The rule divides by the local learning rate, and the trainable parameter `{name}` is in"
                    f" {len(rates_of_parameter)} optimizers instead of exactly one. Give it one in"
                    " `configure_optimizers`, freeze it, or give the rate as `learning_rate=`."
                )
            learning_rates.append(rates_of_parameter[0])
        return tuple(learning_rates)

    def forward(self, data: Any, batch_idx: int) -> Any:
        """Call ``training_step`` in the trainer's precision, without hooks or optimizers."""
        arguments = self.arguments(data, batch_idx)
        # The module itself and not `strategy.training_step`, which may go through a wrapper around it.
        if self._is_plain:
            # The context of plain precision does nothing, and entering it takes time at every step.
            return self.module.training_step(*arguments)
        with self.precision.train_step_context():
            return self.module.training_step(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, through the precision plugin and the hooks around it."""
        self.strategy.backward(loss, self.optimizers[0])

    def step_context(self) -> AbstractContextManager[Any]:
        """Return the context of a training step in the present precision, which :meth:`computing_in` changes."""
        return self.strategy.precision_plugin.train_step_context()

    @contextmanager
    def computing_in(self, precision: Precision) -> Iterator[None]:
        """Compute in another precision inside of the context."""
        original = self.strategy.precision_plugin
        self.strategy.precision_plugin = precision
        try:
            yield
        finally:
            self.strategy.precision_plugin = original

    @contextmanager
    def logging_to(self, logger: object) -> Iterator[None]:
        """Replace each of the trainer's loggers by another one inside of the context."""
        originals = self.trainer.loggers
        # As many as there were: a step may ask how many loggers there are, or for the first.
        self.trainer.loggers = [cast(Logger, logger) for _ in originals]
        try:
            yield
        finally:
            self.trainer.loggers = originals

    @property
    def validation(self) -> ClientValidation:
        """The validation of clients one by one."""
        transfer = self.transfer
        if self.device.type == "cpu":
            # Elsewhere, data for evaluation may lie in other memory than those of training.
            transfer = self.prepare
        return ClientValidation(self.trainer, transfer, self.forward, self.logging_to)

    def client_pass(self, num_batches: int) -> AbstractContextManager[BatchProgress]:
        """Let the trainer's numbers of batches be those of one client inside the context."""
        return client_pass(self.trainer, num_batches)

    @cached_property
    def _schedulers(self) -> list[Any]:
        """The learning-rate schedules that the module can step itself, in a fixed order.

        Looked up when the first client trains: by then every hook that makes one has been called.
        """
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for submodule in self.module.modules():
            for value in vars(submodule).values():
                schedulers += _schedulers_in(value)
        return list({id(scheduler): scheduler for scheduler in schedulers}.values())

    def schedules(self) -> list[dict[str, Any]]:
        """Return the states of learning-rate schedules that the module can step itself."""
        return [dict(scheduler.state_dict()) for scheduler in self._schedulers]

    def load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Restore the states that :meth:`schedules` returned."""
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict(dict(state))


def _schedulers_in(value: Any) -> list[Any]:
    """List the learning-rate schedules in an attribute: the value itself, or those in a list or dict."""
    values = [value]
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, (list, tuple)):
        values = list(value)
    schedulers = []
    for value in values:
        if isinstance(value, (LRScheduler, ReduceLROnPlateau)):
            schedulers.append(value)
    return schedulers


def _place(function: Callable[..., Any]) -> str:
    """Return file and line of a function of the user's, in brackets."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    return f" ({code.co_filename}:{code.co_firstlineno})"


def hook_owner(callback: pl.Callback, name: str) -> Literal["lightning", "user"] | None:
    """Return who overrides a hook of a callback.

    Args:
        callback: The callback.
        name: The name of the hook.

    Returns:
        ``"lightning"`` for a callback of Lightning's or of this package, ``"user"`` for any other; ``None`` if the hook
        is not overridden.
    """
    # A function that was assigned to this very object.
    if name in vars(callback):
        return "user"
    method = getattr(type(callback), name)
    if method is getattr(pl.Callback, name):
        return None
    # A function that `exec` has made may be of no module.
    if (method.__module__ or "").startswith(("lightning.", "lightning_fedhaw.")):
        return "lightning"
    return "user"
