"""The strategy for several processes: Lightning starts them, and only the round exchanges anything between them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw import arguments
from lightning_fedhaw.adapter.stopping import handle_as_before, waiting_for_processes
from lightning_fedhaw.adapter.trainer_attributes import callbacks_of, publish_summary
from lightning_fedhaw.keys import check_has_rule
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors.layout import own_memory

Value = TypeVar("Value")

_START_METHODS = {
    "federated": ("popen", "starts the script once more for every further process"),
    "federated_spawn": ("spawn", "starts processes from `fit`; what they need must be picklable"),
    "federated_notebook": ("fork", "forks processes from `fit`, for notebooks"),
}


class FederatedStrategy(DDPStrategy):
    """Clients spread over processes, GPUs and machines.

    Lightning's own launchers start the processes (or ``torchrun`` does), each holds the module, and none is wrapped:
    gradients stay with the client they belong to.

    Args:
        threads_per_worker: Threads that a process computes with. Default: the cores, shared evenly.
        kwargs: The arguments of ``lightning.pytorch.strategies.DDPStrategy``, such as ``timeout`` or
            ``process_group_backend``.

    Raises:
        ValueError: If ``threads_per_worker`` is not a whole number of at least 1.
    """

    strategy_name = "federated"

    def __init__(self, *args: Any, threads_per_worker: int | None = None, **kwargs: Any) -> None:
        threads = arguments.optional(arguments.integer, "threads_per_worker", threads_per_worker, minimum=1)
        super().__init__(*args, **kwargs)
        self.threads_per_worker = threads

    def setup_environment(self) -> None:
        """Set the number of threads and join the other processes."""
        if self.threads_per_worker is not None:
            torch.set_num_threads(self.threads_per_worker)
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Refuse to train without rounds: every process would train a model of its own, and never synchronize it."""
        if trainer.state.fn == "fit":
            check_has_rule(type(self).__name__, callbacks_of(trainer))
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Start all processes from the model of process 0, without a wrapper around it."""
        share_model(self)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes, and explain the error if one of them has ended."""
        with Ranks.of_group(self.root_device).communication():
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Value, src: int = 0) -> Value:
        """Return the object of one process on all of them, and explain the error if one of them has ended."""
        with Ranks.of_group(self.root_device).communication():
            return super().broadcast(obj, src)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, unless this process has only waited for those of a run that has failed.

        Its module is as it was before the run, and the file may be one that the run has left (`OnExceptionCheckpoint`).
        """
        if isinstance(self._launcher, _Launcher) and self._launcher.has_failed:
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = _Launcher(self, start_method=self._start_method)  # type: ignore[arg-type]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy under its names, one for each way to start processes."""
        for name, (start_method, description) in _START_METHODS.items():
            strategy_registry.register(
                name, cls, description=f"Clients spread over processes; {description}.", start_method=start_method
            )


class _Launcher(_MultiProcessingLauncher):
    """A launcher that also returns the run summary and the states of callbacks to the process that called ``fit``."""

    _states: bytes = b""
    has_failed = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run a function in processes, to which this one passes on the signals that it gets."""
        self.has_failed = True
        with waiting_for_processes(self):
            results = super().launch(function, *args, trainer=trainer, **kwargs)
        self.has_failed = False
        return results

    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        self.has_failed = False
        handle_as_before()
        super()._wrapping_function(*args, **kwargs)

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        # On all processes, because a callback may gather its state from all of them.
        states = {callback.state_key: callback.state_dict() for callback in callbacks_of(trainer)}
        file = io.BytesIO()
        torch.save(states, file)
        self._states = file.getvalue()
        return super()._collect_rank_zero_results(trainer, results)

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        results = super().get_extra_results(trainer)
        # A trainer without a rule has no summary.
        results["federation_summary"] = getattr(trainer, "federation_summary", {})
        results["callback_states"] = self._states
        return results

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        publish_summary(trainer, extra.pop("federation_summary"))
        # Not with `weights_only`: a callback's state may be anything, and a process that this one started wrote it.
        # Into host memory: with a CUDA context of its own, a notebook could not fork again.
        states = torch.load(io.BytesIO(extra.pop("callback_states")), map_location="cpu", weights_only=False)
        for callback in callbacks_of(trainer):
            if states.get(callback.state_key):
                callback.load_state_dict(states[callback.state_key])
        super().update_main_process_results(trainer, extra)


def share_model(strategy: DDPStrategy) -> None:
    """Give every process the model of process 0, without a wrapper around it."""
    assert strategy.model is not None
    own_memory(strategy.model)
    Ranks.of_group(strategy.root_device).share_model(strategy.model)


def never_wrap(strategy: DDPStrategy) -> None:
    """Keep a stock strategy from wrapping the model: its gradient synchronization would mix the clients."""
    strategy.configure_ddp = partial(share_model, strategy)  # type: ignore[method-assign]


def explain_lost_contact(strategy: DDPStrategy) -> None:
    """Explain the errors in a stock strategy's communication if another process has ended."""
    if "barrier" in vars(strategy):
        # In an earlier `fit`.
        return
    strategy.barrier = partial(_explained, strategy, strategy.barrier)  # type: ignore[method-assign]
    strategy.broadcast = partial(_explained, strategy, strategy.broadcast)  # type: ignore[method-assign]


def _explained(strategy: DDPStrategy, communicate: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    with Ranks.of_group(strategy.root_device).communication():
        return communicate(*args, **kwargs)


def check_world_size(processes: int) -> None:
    """Warn where a launcher has started more processes than the trainer uses: each would run a federation of its own.

    Args:
        processes: The processes of the trainer: devices times nodes.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > processes:
        rank_zero_warn(
            f"WORLD_SIZE={started}, as `torchrun` sets it, and the trainer is set to {processes}: each process runs"
            f" the whole federation, and all write the same files. Set `devices` (times `num_nodes`) to {started}."
        )


def default_strategy(accelerator: str | Accelerator, devices: int | str | Sequence[int], num_nodes: int) -> str:
    """Return the name of the strategy for a trainer that was given none.

    Args:
        accelerator: The trainer's argument, or its default ``"auto"``.
        devices: The trainer's argument, or its default ``"auto"``.
        num_nodes: The trainer's argument, or its default 1.
    """
    if num_nodes <= 1 and _num_devices(accelerator, devices) <= 1:
        return "auto"
    if _IS_INTERACTIVE:
        return "federated_notebook"
    return "federated"


def _num_devices(accelerator: str | Accelerator, devices: int | str | Sequence[int]) -> int:
    """Count the devices of a trainer's argument, which may be a number, a list, either as text, or ``"auto"``."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part])
    if isinstance(devices, str) and devices.strip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            return torch.cuda.device_count()
        return 1
    if isinstance(devices, int):
        return devices
    # Lightning refuses what is none of these, and says what it takes.
    return 1


for _name in _START_METHODS:
    if _name not in StrategyRegistry:
        FederatedStrategy.register_strategies(StrategyRegistry)
        break
