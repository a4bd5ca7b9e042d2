"""Keys of classes, which address their random streams and their states in checkpoints.

The name of a class is not used for this: if the class were renamed, its draws would change and its checkpoints could
not be resumed. Therefore each class has a key in addition to its name, and the key never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch import Callback

from lightning_fedhaw.argument_names import NamedArguments


class KeyedCallback(NamedArguments, Callback):
    """A callback that is addressed by the key of its class.

    The key of a class that does not set ``key`` in its body is its own name. It is never inherited, because two
    channels with the same key would draw the same numbers.

    Example:
        >>> class Echo(KeyedCallback):
        ...     key = "Echo"
        >>> class Reverberation(Echo):  # the same channel under a new name
        ...     key = "Echo"
        >>> class Delay(Echo):  # a different channel
        ...     pass
        >>> Reverberation().state_key, Delay().state_key
        ('Echo', 'Delay')
    """

    key: ClassVar[str]
    """The name of the class in random streams and checkpoints."""

    is_rule: ClassVar[bool] = False
    """Whether the callback makes a stock trainer run rounds; the others need one that does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The qualified name, because classes defined in different functions or classes may have the same name.
        key = vars(cls).get("key", cls.__qualname__)
        if not isinstance(key, str) or not key or "/" in key:
            raise TypeError(
                f"`key` of the class `{cls.__name__}` must be a text without a slash, got {key!r}. It names the class"
                f' in random streams and checkpoints: write `key = "{cls.__name__}"`, or leave it out.'
            )
        cls.key = key

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that would train centrally and ignore the callback."""
        if stage == "fit":
            check_has_rule(type(self).__name__, trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def state_key(self) -> str:
        """The key under which Lightning keeps the state of the callback in a checkpoint."""
        return type(self).key


def check_has_rule(name: str, callbacks: Sequence[Callback]) -> None:
    """Refuse a part of a federation in a trainer without an aggregation rule.

    Without a rule, a stock trainer trains on all data at once and the part has no effect.

    Args:
        name: The class of the part.
        callbacks: All callbacks of its trainer.

    Raises:
        ValueError: Naming the part and the remedy.
    """
    if not any(isinstance(callback, KeyedCallback) and callback.is_rule for callback in callbacks):
        raise ValueError(
            f"`{name}` has an effect in federated training only, and `callbacks` has no aggregation rule, so the"
            " trainer would train on all data at once. Add a rule, such as `FedAvgCallback()`, or remove"
            f" `{name}`."
        )
