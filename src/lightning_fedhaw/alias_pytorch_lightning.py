"""Make ``pytorch_lightning`` another name of ``lightning.pytorch``, for projects that import the former.

Lightning is published twice: as ``lightning`` (with ``lightning.pytorch`` and ``lightning.fabric``) and as
``pytorch_lightning`` (with ``lightning_fabric``). These are two copies of the same code with different classes, so the
``Trainer`` of one refuses a ``LightningModule`` of the other, and a rule of this package needs a ``Trainer`` of
``lightning.pytorch``. After ::

    import lightning_fedhaw.alias_pytorch_lightning  # before the first import of pytorch_lightning

every import of ``pytorch_lightning`` or one of its submodules, also inside of other packages, gives the module of
``lightning.pytorch``. No other code is changed. It is an import of its own, and not a part of ``import
lightning_fedhaw``, because it decides for the whole process.

Raises:
    ImportError: If ``pytorch_lightning`` was imported before, because its classes may be in use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ORIGINALS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""The package behind each alias."""


class _AliasFinder(MetaPathFinder, Loader):
    """Import ``lightning.pytorch.x`` where ``pytorch_lightning.x`` is asked for."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = name.partition(".")
        if package not in ORIGINALS:
            return None
        original = ORIGINALS[package]
        if submodule:
            original = f"{original}.{submodule}"
        return ModuleSpec(name, self, origin=original, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        # The import system writes the alias's spec into the module that it is given; `exec_module` restores its own.
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = self._specs.pop(alias.name)


def _install() -> None:
    for alias, original in ORIGINALS.items():
        loaded = sys.modules.get(alias)
        if loaded is not None and loaded is not sys.modules.get(original):
            raise ImportError(
                f"`{alias}` was imported before `lightning_fedhaw.alias_pytorch_lightning`, so its classes may be in"
                " use already. Import the alias first, at the top of the program."
            )
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())


_install()
