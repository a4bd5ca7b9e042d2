"""Lets `pytorch_lightning` be another name of `lightning.pytorch`, for projects that import the former.

Lightning is published under two names: `lightning` (with `lightning.pytorch` and `lightning.fabric`), and
`pytorch_lightning` (with `lightning_fabric`). They are two copies of the same code, so their classes differ: a
`Trainer` of one refuses a `LightningModule` of the other. `import alias` before the first import of `pytorch_lightning`
makes every import of it, submodules included, give the modules of `lightning.pytorch`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


class _OtherName(MetaPathFinder, Loader):
    """Finds `pytorch_lightning.x` by importing `lightning.pytorch.x`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package not in NAMES:
            return None
        original = NAMES[package] + ("." + rest if rest else "")
        return ModuleSpec(name, self, origin=original, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        # The import system writes the alias's spec into the module; `exec_module` puts the module's own back.
        self._own = {**getattr(self, "_own", {}), spec.name: module.__spec__}
        return module

    def exec_module(self, module: ModuleType) -> None:
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = self._own.pop(alias.name)


def install() -> None:
    """Make the other names known.

    Raises:
        ImportError: If `pytorch_lightning` was imported already, and classes of it may be in use.
    """
    loaded = sys.modules.get("pytorch_lightning")
    if loaded is not None and loaded is not sys.modules.get("lightning.pytorch"):
        raise ImportError("`pytorch_lightning` was imported before its alias. Import the alias first.")
    sys.meta_path.insert(0, _OtherName())


install()
