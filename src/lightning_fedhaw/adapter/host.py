"""What the engines need of a trainer: the module, its optimizers, its precision, its hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fedhaw.adapter.client_pass import client_pass
from lightning_fedhaw.clients.steps import BatchProgress, is_plain_sgd
from lightning_fedhaw.clients.vectorized.snapshot import names_in_step
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import step_arguments
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
_PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)
# What the trainer says of the batches of the client at work.
_CLIENT_NAMES = {"is_last_batch", "num_training_batches"}
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TrainerHost:
    """The :class:`~lightning_fedhaw.clients.steps.Host` of a federation in a trainer, resolved once per run.

    Args:
        trainer: The trainer.
        data_device: Where training data in memory is kept; ``None`` where it is fetched sample by sample.
    """

    def __init__(self, trainer: Any, data_device: torch.device | None = None) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.strategy = trainer.strategy
        self.device: torch.device = trainer.strategy.root_device
        self.optimizers: Sequence[torch.optim.Optimizer] = trainer.strategy.optimizers
        self.callbacks = [c for c in trainer.callbacks if not isinstance(c, Rule)]
        self.precision = trainer.strategy.precision_plugin
        self.scaler = getattr(self.precision, "scaler", None)
        self._is_plain = type(self.precision) is Precision
        self._hooks = {name: self._users(name) for name in (*_BATCH_HOOKS, "on_before_zero_grad")}
        self._module_hooks = {name for name in _STEP_HOOKS if is_overridden(name, self.module)}
        converts = type(self.precision).convert_input is not Precision.convert_input
        is_there = self.device.type == "cpu" or data_device == self.device
        self._moves_nothing = is_there and not converts and not self._transfers
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "`training_step(self, dataloader_iter)` is not supported in federated training: clients are"
                " given batches. Write `training_step(self, batch, batch_idx)`."
            )
        own = {id(p) for p in self.module.parameters()}
        if any(id(p) not in own for o in self.optimizers for group in o.param_groups for p in group["params"]):
            raise ValueError(
                "`configure_optimizers` returned an optimizer over parameters that are not the module's own, so they"
                " would be trained by all clients together. Register them in the module."
            )
        self._takes_index = len(step_arguments(self.module.training_step, None, 0)) > 1
        self.has_validation = is_overridden("validation_step", self.module)

    def _users(self, name: str) -> list[Callable[..., Any]]:
        return [getattr(c, name) for c in self.callbacks if hook_owner(c, name) == "user"]

    @property
    def _transfers(self) -> bool:
        sources = [self.module, self.trainer.datamodule]
        return any(is_overridden(name, s) for name in _TRANSFER_HOOKS for s in sources if s is not None)

    @property
    def accumulate(self) -> int:
        """Batches behind one optimizer step."""
        return int(self.trainer.accumulate_grad_batches)

    @property
    def round(self) -> int:
        """The round that is being played."""
        return int(self.trainer.global_step)

    @property
    def can_evaluate(self) -> bool:
        """Whether a client's data can be run through the module without training on it."""
        return self.has_validation or bool(self.module.automatic_optimization)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step needs no optimizer object, precision plugin or hook."""
        return (
            self._is_plain
            and len(self.optimizers) == 1
            and self.accumulate == 1
            and not self.trainer.gradient_clip_val
            and not self._module_hooks
            and not any(self._users(name) for name in _STEP_HOOKS if hasattr(pl.Callback, name))
            and (type(self.strategy) is SingleDeviceStrategy or isinstance(self.strategy, DDPStrategy))
            and is_plain_sgd(self.optimizers[0], [p for p in self.module.parameters() if p.requires_grad])
        )

    @property
    def clipping(self) -> tuple[float, str] | None:
        """The bound of gradient clipping, and ``"norm"`` or ``"value"``; ``None`` without."""
        bound, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        return (float(bound), str(getattr(algorithm, "value", algorithm or "norm"))) if bound and bound > 0 else None

    @property
    def obstacle(self) -> str | None:
        """What in trainer or module keeps a step from being a function of its tensors; ``None`` if nothing."""
        module = self.module
        if not module.automatic_optimization:
            return f"optimizes manually{_place(module.training_step)}"
        for name in sorted(self._module_hooks):
            return f"is surrounded by the hook `{name}`{_place(getattr(module, name))}"
        for name in (*_BATCH_HOOKS, *_STEP_HOOKS):
            for hook in self._users(name) if hasattr(pl.Callback, name) else ():
                return f"is surrounded by the callback hook `{name}`{_place(hook)}"
        for name in _TRANSFER_HOOKS:
            for source in (module, self.trainer.datamodule):
                if source is not None and is_overridden(name, source):
                    return f"is surrounded by the hook `{name}`{_place(getattr(source, name))}"
        if len(self.optimizers) != 1:
            return f"has {len(self.optimizers)} optimizers"
        optimizer = self.optimizers[0]
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"has hooks on the optimizer {type(optimizer).__name__}"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
            return "has hooks on its parameters' gradients"
        if any(m._backward_hooks or m._backward_pre_hooks for m in module.modules()):
            return "has backward hooks on its layers"
        if self.accumulate != 1:
            return f"accumulates gradients (`accumulate_grad_batches={self.accumulate}`)"
        for name in sorted(_CLIENT_NAMES & names_in_step(module)):
            return f"asks for `{name}`, which differs from client to client{_place(module.training_step)}"
        if self.scaler is not None or type(self.precision) not in _PRECISIONS:
            return f"trains in the precision {self.trainer.precision} ({type(self.precision).__name__})"
        return None

    def prepare(self, data: Any) -> Any:
        """Convert a batch to the precision and move it to the device, through the module's transfer hooks."""
        if self._moves_nothing:
            return data
        data = self.precision.convert_input(data)
        data = self.module._on_before_batch_transfer(data, dataloader_idx=0)
        return self.strategy.batch_to_device(data, dataloader_idx=0)

    def arguments(self, data: Any, batch_idx: int) -> tuple[Any, ...]:
        """The arguments of ``training_step``, whose ``batch_idx`` is optional."""
        return (data, batch_idx) if self._takes_index else (data,)

    def on_batch_start(self, data: Any, batch_idx: int) -> bool:
        """Call the hooks before a local step; true if the module asks to skip the rest of the pass."""
        for hook in self._hooks["on_train_batch_start"]:
            hook(self.trainer, self.module, data, batch_idx)
        return "on_train_batch_start" in self._module_hooks and self.module.on_train_batch_start(data, batch_idx) == -1

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
        """The learning rate of each parameter tensor in the layout's order, as scheduled for this round.

        Raises:
            ValueError: If a trainable parameter has no optimizer, or more than one.
        """
        rates: dict[Tensor, list[float]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates.setdefault(parameter, []).append(float(group["lr"]))
        found = []
        for name, parameter in zip(layout.names, layout.tensors(self.module), strict=True):
            own = rates.get(parameter, [])
            if len(own) != 1:
                raise ValueError(
                    f"The rule divides by the local learning rate, and the trainable parameter `{name}` is in"
                    f" {len(own)} optimizers instead of exactly one. Give it one in `configure_optimizers`, freeze it,"
                    " or give the rate as `learning_rate=`."
                )
            found.append(own[0])
        return tuple(found)

    def forward(self, data: Any, batch_idx: int) -> Any:
        """Call ``training_step`` in the trainer's precision, without hooks or optimizers."""
        # The module itself and not `strategy.training_step`, which may go through a wrapper around it.
        step, arguments = self.module.training_step, self.arguments(data, batch_idx)
        if self._is_plain:  # whose context does nothing
            return step(*arguments)
        with self.precision.train_step_context():
            return step(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Form the gradients of a loss, through the precision plugin and the hooks around it."""
        self.strategy.backward(loss, self.optimizers[0])

    def step_context(self) -> AbstractContextManager[Any]:
        """The context of a training step in the precision that is computed in at the moment."""
        context: AbstractContextManager[Any] = self.strategy.precision_plugin.train_step_context()
        return context

    @contextmanager
    def computing_in(self, precision: Precision) -> Iterator[None]:
        """Compute in another precision for a while."""
        own = self.strategy.precision_plugin
        self.strategy.precision_plugin = precision
        try:
            yield
        finally:
            self.strategy.precision_plugin = own

    @contextmanager
    def logging_to(self, logger: Any) -> Iterator[None]:
        """Let another logger stand instead of the trainer's for a while."""
        own = self.trainer.loggers
        self.trainer.loggers = [logger for _ in own]
        try:
            yield
        finally:
            self.trainer.loggers = own

    def evaluate(self, data: Any, batch_idx: int) -> Any:
        """Call ``validation_step``; ``training_step`` where there is none."""
        if not self.has_validation:
            return self.forward(data, batch_idx)
        with self.precision.val_step_context():
            return self.module.validation_step(*step_arguments(self.module.validation_step, data, batch_idx))

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
        """The states of learning-rate schedules that the module can step itself."""
        return [dict(scheduler.state_dict()) for scheduler in self._schedulers]

    def load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Put such states back."""
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict(dict(state))


def _schedulers_in(value: Any) -> list[Any]:
    """The learning-rate schedules in an attribute: the value itself, or those in a list or dict."""
    values = [value]
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, (list, tuple)):
        values = list(value)
    return [value for value in values if isinstance(value, (LRScheduler, ReduceLROnPlateau))]


def _place(function: Callable[..., Any]) -> str:
    """Where a function of the user's is written, in brackets."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def hook_owner(callback: Any, name: str) -> str | None:
    """Who overrides a callback's hook: ``"lightning"``, the ``"user"``, or nobody."""
    if name in vars(callback):
        return "user"
    defined = getattr(type(callback), name)
    if defined is getattr(pl.Callback, name):
        return None
    return "lightning" if defined.__module__.startswith(("lightning.", "lightning_fedhaw.")) else "user"
