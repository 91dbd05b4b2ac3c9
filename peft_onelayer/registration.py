"""Enters the method into PEFT's mappings as soon as PEFT is imported, without importing it.

`import peft_onelayer` takes milliseconds this way, where PEFT brings torch and transformers with it, and commands that
only read files need neither.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "peft_onelayer.tuner"  # enters itself into PEFT's mappings when it is imported


def register() -> None:
    """Register the method now if PEFT has been imported, else when it is."""
    if sys.modules.get("peft") is None:  # None stands for a module whose import is forbidden
        sys.meta_path.insert(0, _WhenPeftIsImported())
        return
    importlib.import_module("peft")  # waits for a thread that is at it
    importlib.import_module(METHOD)


class _WhenPeftIsImported(importlib.abc.MetaPathFinder):
    """Finds `peft` as the other finders do, with a loader that registers the method afterwards.

    It stays until PEFT has been loaded: libraries also look for a module only to see whether it is installed.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft":
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # the ones before have found nothing
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """A loader that is another one in all but what it does after the module has been loaded."""

    def __init__(self, loader: importlib.abc.Loader, finder: _WhenPeftIsImported) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if nobody had been here
        self.loader.exec_module(module)
        # Else the method is being imported: by what imports PEFT here, or by another thread, which waits for PEFT and
        # registers the method next; to wait for that thread in turn would be a deadlock.
        if METHOD not in sys.modules:
            importlib.import_module(METHOD)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
