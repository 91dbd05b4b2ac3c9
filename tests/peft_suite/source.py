"""The tests of the installed PEFT, from its source distribution: wheels do not carry them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest

VERSION = importlib.metadata.version("peft")
CACHE = Path(__file__).parents[2] / ".cache" / f"peft-{VERSION}"
PACKAGE = "peft_own_tests"  # not `tests`: nothing is added to sys.path, so no other module can be shadowed


def fetch() -> Path:
    """The folder tests/ of PEFT's source distribution, downloaded by pip once per version.

    Raises:
        RuntimeError: it cannot be had; the message is one line.
    """
    if CACHE.is_dir():
        return CACHE / "tests"
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary=peft", f"--dest={folder}"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, f"peft=={VERSION}"]
        done = subprocess.run(pip, capture_output=True, encoding="utf-8")
        archive = next(Path(folder).glob("peft-*.tar.gz"), None)
        if done.returncode or archive is None:
            reason = (done.stderr.strip() or "no archive").splitlines()[-1]
            raise RuntimeError(f"pip could not get the source distribution of peft {VERSION}, with its tests: {reason}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        unpacked = Path(str(archive).removesuffix(".tar.gz"))
        if not (unpacked / "tests" / "testing_common.py").is_file():
            raise RuntimeError(f"the source distribution of peft {VERSION} has no tests/testing_common.py")
        unpacked.rename(CACHE)
    return CACHE / "tests"


def load(name: str) -> types.ModuleType:
    """A module of PEFT's tests, such as "testing_common"."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        pytest.register_assert_rewrite(PACKAGE)
        sys.modules[PACKAGE] = package
    if importlib.util.find_spec("diffusers"):
        return importlib.import_module(f"{PACKAGE}.{name}")
    # testing_common imports one class of diffusers, for an isinstance() in tests of image models.
    stand_in = types.ModuleType("diffusers")
    stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stand_in
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        del sys.modules["diffusers"]
