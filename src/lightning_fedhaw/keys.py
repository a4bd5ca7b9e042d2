"""Names that are addresses: of random streams, of states in a checkpoint, of what a resumed run must share with it.

The name of a class would do until the class is renamed: then its draws would change, and its checkpoints could not be
resumed. So each class has a key beside its name, which stays.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Callback

from lightning_fedhaw.arguments import NamedArguments


class KeyedCallback(NamedArguments, Callback):
    """A callback that is addressed by the key of its class.

    A class that does not set ``key`` in its body is addressed by its own name, and never by the key of the class it
    was made from: two channels with one key would draw the same numbers.

    Example:
        >>> class Echo(KeyedCallback):
        ...     key = "Echo"
        >>> class Reverberation(Echo):  # the same channel under a better name
        ...     key = "Echo"
        >>> class Delay(Echo):  # another channel
        ...     pass
        >>> Reverberation().state_key, Delay().state_key
        ('Echo', 'Delay')
    """

    key: ClassVar[str]
    """What the class is called in random streams and checkpoints, whatever its name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A class that is made inside of a function or another class is told apart by where it was made.
        key = vars(cls).get("key", cls.__qualname__)
        if not isinstance(key, str) or not key or "/" in key:
            raise TypeError(
                f"`key` of the class `{cls.__name__}` must be a text without a slash, got {key!r}. It names the class"
                f' in random streams and checkpoints: write `key = "{cls.__name__}"`, or leave it out.'
            )
        cls.key = key

    @property
    def state_key(self) -> str:
        """What Lightning keeps the state of the callback under."""
        return type(self).key
