"""AIMS in tests: the stand-in, or with ``--aims real`` the module itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RECORDS = HERE / "data" / "pyaims"
SAMPLES = RECORDS / "samples"
STAND_IN = HERE / "fake_aims"  # on the path, it gives soma.aims


def real_aims() -> Any:
    """The module itself; skips the test, saying why, where it isn't installed."""
    try:
        return importlib.import_module("soma.aims")
    except ImportError as error:
        pytest.skip(f"soma.aims is not installed ({error})")


def new_stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as ``soma.aims``, new, for the length of a test."""
    monkeypatch.syspath_prepend(STAND_IN)
    forget_aims(monkeypatch)
    return importlib.import_module("soma.aims")


def forget_aims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ``soma`` is imported; after the test, what was before it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "soma"]:
        monkeypatch.delitem(sys.modules, name)
