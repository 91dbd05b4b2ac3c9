"""Enters the method into PEFT's mappings as soon as PEFT is there, without importing it.

`import peft_onelayer` takes milliseconds this way, where PEFT brings torch and transformers with it, and commands that
only read files need neither.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def register() -> None:
    """Register the method now if PEFT has been imported, else when it is."""
    if "peft" in sys.modules:
        importlib.import_module("peft_onelayer.tuner")
    else:
        sys.meta_path.insert(0, _WhenPeftIsImported())


class _WhenPeftIsImported(importlib.abc.MetaPathFinder):
    """Finds `peft` as it would be found anyway, with a loader that registers the method afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if nobody had been here
        self.loader.exec_module(module)
        importlib.import_module("peft_onelayer.tuner")
