"""How an interrupted run resumes: its counters are brought to the last full round.

Lightning resumes in the middle of an epoch. Here an epoch has one batch, the round, and an interrupted round is undone:
so either the round of an epoch is over, or nothing of it is left.
"""

from __future__ import annotations

from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _ProcessedTracker, _Progress


def settle(loop: _FitLoop) -> None:
    """Bring the counters of a loop to the last full round, and decide whether its epoch remains to be finished.

    Args:
        loop: The fit loop, before a run. What is left of an epoch whose round is over (validation, and the hooks at its
            end) makes it a loop that restarts, and any other one begins an epoch.
    """
    _, present = trackers(loop.epoch_progress)
    epochs = present.processed
    is_complete = present.ready == epochs and present.started == epochs
    rounds = loop.epoch_loop.global_step
    if is_complete or rounds not in (epochs, epochs + 1):
        return
    unfinished = rounds - epochs
    _set_complete(loop.epoch_progress, unfinished)
    _set_complete(loop.epoch_loop.batch_progress, 0)
    loop.restarting = bool(unfinished)
    # Otherwise an earlier validation of this trainer would count as that of the round.
    loop.epoch_loop.val_loop._has_run = False


def _set_complete(progress: _Progress, begun: int) -> None:
    """Let everything that was processed be complete, and so many more be begun."""
    for counters in trackers(progress):
        counters.ready = counters.processed + begun
        counters.started = counters.processed + begun
        counters.completed = counters.processed


def trackers(progress: _Progress) -> tuple[_ProcessedTracker, _ProcessedTracker]:
    """Return the counters of all fits and those of the present one, by their own type."""
    total = progress.total
    current = progress.current
    assert isinstance(total, _ProcessedTracker)
    assert isinstance(current, _ProcessedTracker)
    return total, current


def is_validated(loop: _EvaluationLoop) -> bool:
    """Return whether the validation of an interrupted epoch was over, whose counters begin at 0 in every epoch."""
    total, _ = trackers(loop.batch_progress)
    return total.completed > 0 and total.completed == total.ready and loop.batch_progress.is_last_batch
