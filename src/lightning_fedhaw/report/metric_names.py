"""What the names of metrics say: which are results, and how their values are written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor

_SHARES = re.compile(r"acc|recall|precision|f1|error_rate", re.IGNORECASE)
_RATES = re.compile(r"(?:^|[/_.-])(?:lr|learning_rate)(?:$|[/_.-])", re.IGNORECASE)


def is_share(name: str, values: Iterable[float]) -> bool:
    """Return whether a metric is shown in percent: by its name an accuracy or the like, with values from 0 to 1."""
    if not _SHARES.search(name):
        return False
    # Not the reverse comparison: NaN, of a run that diverged early, is neither below nor above.
    return not any(value < 0 or value > 1 for value in values)


def written(name: str, value: float) -> str:
    """Write a value of a metric in four digits, and as a percentage where it is a share."""
    return in_unit(value, is_share(name, [value]))


def in_unit(value: float, is_percentage: bool) -> str:
    """Write a value in four digits, and as a percentage if it is one."""
    if is_percentage:
        return f"{100 * value:.4g}%"
    return f"{value:.4g}"


def names_of_results(names: Iterable[str], internal: Collection[str], callbacks: Iterable[Callback] = ()) -> list[str]:
    """Select the metrics that are results of a run.

    Args:
        names: Everything that callbacks can see.
        internal: Names that the rule and the round log, whose last values alone say little.
        callbacks: The trainer's callbacks: what a ``LearningRateMonitor`` among them logs is a setting, and no result.

    Returns:
        The other metrics, each once: where Lightning has a metric under its own name and under those with the suffixes
        ``_step`` and ``_epoch``, only its own name is used.
    """
    all_names = list(names)
    left_out = set(internal)
    for name in all_names:
        left_out |= {f"{name}_step", f"{name}_epoch"}
    for callback in callbacks:
        if isinstance(callback, LearningRateMonitor):
            for settings in (callback.lrs, callback.last_momentum_values, callback.last_weight_decay_values):
                left_out |= settings.keys()
    results = []
    for name in all_names:
        if name not in left_out and not _RATES.search(name):
            results.append(name)
    return results
