"""The validation of one client after another, with the stage and the hooks of a stock validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_fedhaw.module_calls import num_step_arguments


class ClientValidation:
    """The :class:`~lightning_fedhaw.clients.steps.Validation` of a trainer.

    The module's hooks are called for every client. Those of callbacks are not: they save, stop and draw once for each
    validation of the global model. A module without ``validation_step`` is evaluated by its ``training_step``, without
    hooks.

    Args:
        trainer: The trainer around the module.
        transfer: Moves a batch to the device.
        train_step: Calls ``training_step``, as ``train_step(data, batch_idx)``.
        logging_to: Returns a context in which the trainer's loggers are replaced by the given one.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        transfer: Callable[[Any], Any],
        train_step: Callable[[Any, int], object],
        logging_to: Callable[[object], AbstractContextManager[None]],
    ) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.transfer = transfer
        self.train_step = train_step
        self.logging_to = logging_to
        self.has_validation = is_overridden("validation_step", self.module)

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any] | None:
        """The function by which the first validation loader makes batches of samples."""
        loader = self._loader
        if loader is None:
            return None
        collate_fn: Callable[[list[Any]], Any] = loader.collate_fn
        return collate_fn

    @property
    def batch_size(self) -> int | None:
        """The batch size of the first validation loader; ``None`` if there is none, or it has no fixed one."""
        loader = self._loader
        if loader is None:
            return None
        return loader.batch_size

    @property
    def _loader(self) -> DataLoader[Any] | None:
        """The first validation loader that makes batches of samples."""
        combined_loader = self.trainer.fit_loop.epoch_loop.val_loop._combined_loader
        if not self.has_validation or combined_loader is None:
            return None
        for loader in combined_loader.flattened:
            # Without a batch sampler a loader's data set makes the batches.
            if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
                return loader
        return None

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Let ``trainer.validating`` be true inside the context, and what is logged be lost."""
        state = self.trainer.state
        stage = state.stage
        state.stage = RunningStage.VALIDATING
        # Not for every batch, because to inspect three functions takes as long as a small step.
        self._count_arguments()
        try:
            # What a module draws for one validation would be drawn once for every client.
            with self.logging_to(DummyLogger()):
                yield
        finally:
            state.stage = stage

    def _count_arguments(self) -> None:
        """Count the arguments that the step and the hooks around it take."""
        if not self.has_validation:
            return
        module = self.module
        self._step_takes = num_step_arguments(module.validation_step)
        self._start_takes = num_step_arguments(module.on_validation_batch_start)
        # The first argument of this hook is the output of the step.
        self._end_takes = num_step_arguments(partial(module.on_validation_batch_end, None))

    def start(self) -> None:
        """Put the module into evaluation mode, and call the hooks at the start of a validation."""
        if not self.has_validation:
            self.module.eval()
            return
        self.module.on_validation_model_eval()
        self.module.on_validation_start()
        self.module.on_validation_epoch_start()

    def step(self, data: Any, batch_idx: int) -> None:
        """Move a batch to the device and run it through ``validation_step``, between its hooks."""
        module = self.module
        data = self.transfer(data)
        if not self.has_validation:
            self.train_step(data, batch_idx)
            return
        # The last number is that of the loader.
        arguments = (data, batch_idx, 0)
        module.on_validation_batch_start(*arguments[: self._start_takes])
        with self.trainer.precision_plugin.val_step_context():
            output = module.validation_step(*arguments[: self._step_takes])
        module.on_validation_batch_end(output, *arguments[: self._end_takes])

    def epoch_end(self) -> None:
        """Call the hook in which a module logs what it has collected."""
        if self.has_validation:
            self.module.on_validation_epoch_end()

    def end(self) -> None:
        """Call the hook at the end of a validation."""
        if self.has_validation:
            self.module.on_validation_end()
