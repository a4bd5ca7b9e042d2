"""Processes for a federation: Lightning starts them, and nothing is synchronized behind the round's back."""

from __future__ import annotations

import io
import os
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedhaw import arguments
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors.layout import own_memory

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
        """Join the other processes."""
        if self.threads_per_worker is not None:
            torch.set_num_threads(self.threads_per_worker)
        super().setup_environment()

    def configure_ddp(self) -> None:
        """Start everybody from process 0's model; wrap nothing."""
        share_model(self)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = _Launcher(self, start_method=self._start_method)  # type: ignore[arg-type]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the strategy known to trainers by its names."""
        for name, (start_method, what) in _START_METHODS.items():
            strategy_registry.register(
                name, cls, description=f"Clients spread over processes; {what}.", start_method=start_method
            )


class _Launcher(_MultiProcessingLauncher):
    """Brings home what a run leaves in the trainer and its callbacks, too."""

    _states: bytes = b""

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # asked of all processes
        file = io.BytesIO()
        torch.save(states, file)
        self._states = file.getvalue()
        return super()._collect_rank_zero_results(trainer, results)

    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        summary = getattr(trainer, "federation_summary", {})
        return {**super().get_extra_results(trainer), "federation_summary": summary, "callback_states": self._states}

    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        trainer.federation_summary = extra.pop("federation_summary")
        # Any callback's state, written by the process that this one started. Into host memory: with a CUDA context of
        # its own, a notebook could not fork again.
        states = torch.load(io.BytesIO(extra.pop("callback_states")), map_location="cpu", weights_only=False)
        for callback in trainer.callbacks:
            if states.get(callback.state_key):
                callback.load_state_dict(states[callback.state_key])
        super().update_main_process_results(trainer, extra)


def share_model(strategy: Any) -> None:
    """Give every process the model of process 0, and leave it as it is: nothing is wrapped around it."""
    own_memory(strategy.model)
    Ranks.of_group(strategy.root_device).share_model(strategy.model)


def never_wrap(strategy: DDPStrategy) -> None:
    """Keep a stock strategy from wrapping the model: its gradient synchronization would mix the clients."""
    strategy.configure_ddp = partial(share_model, strategy)  # type: ignore[method-assign]


def check_world_size(processes: int) -> None:
    """Warn where a launcher has started more processes than the trainer knows of: each would play a run of its own."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > processes:
        rank_zero_warn(
            f"WORLD_SIZE={started}, as `torchrun` sets it, and the trainer was told of {processes}: each process plays"
            f" the whole run, and all write the same files. Set `devices` (times `num_nodes`) to {started}."
        )


def default_strategy(accelerator: Any, devices: Any, num_nodes: int) -> str:
    """The name of the strategy for a trainer that was not given one."""
    from lightning.fabric.utilities.imports import _IS_INTERACTIVE

    if isinstance(devices, str) and devices.strip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if devices in ("auto", -1):
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if on_gpu else 1
    several = num_nodes > 1 or (len(devices) if isinstance(devices, (list, tuple)) else devices) > 1
    if not several:
        return "auto"
    return "federated_notebook" if _IS_INTERACTIVE else "federated"


for _name in _START_METHODS:
    if _name not in StrategyRegistry:
        FederatedStrategy.register_strategies(StrategyRegistry)
        break
