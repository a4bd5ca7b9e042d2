"""What a module finds in ``trainer.federation_client`` while many clients train at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.clients.vectorized.errors import ASKS_FOR_CLIENT, NotVectorizableError


class ManyClients:
    """A stand-in for the number of the client at work, of which there is no single one: any use of it is an error."""

    def _refuse(self, *_: object) -> NoReturn:
        raise NotVectorizableError(ASKS_FOR_CLIENT)

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    # `isinstance` asks for it, where it is not the class itself.
    __class__ = property(_refuse)

    __bool__ = __int__ = __index__ = __float__ = __complex__ = __hash__ = __str__ = __repr__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rshift__ = __invert__ = _refuse


@contextmanager
def many_clients(host: Host) -> Iterator[None]:
    """Let the module ask in vain whose turn it is."""
    host.client = ManyClients()
    try:
        yield
    finally:
        host.client = None
