"""Readers that come with other packages, by entry point."""

from __future__ import annotations

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lazycache import readers
from lazycache.errors import PluginWarning
from lazycache.readers import reader_for
from lazycache.testing import check_reader

GOOD = '''
import os
import numpy as np
from lazycache import _buffers
from lazycache.errors import ReadError
from lazycache.readers import Probe
from lazycache.readers.base import checkpoint

class DotsReader:
    """One byte a number, the file's size its length, after the mark DOTS."""
    name = "dots"

    def can_read(self, path):
        return path.endswith(".dots")

    def probe(self, path):
        size = os.stat(path).st_size - 4
        with open(path, "rb") as file:
            if file.read(4) != b"DOTS":
                raise ReadError(f"{path}: no dots")
        return Probe("dots", (size,), np.dtype(np.uint8), size, size, (path,))

    def read(self, path):
        probe = self.probe(path)
        checkpoint()
        with open(path, "rb") as file:
            values = np.frombuffer(file.read(), np.uint8)[4:]
        if values.sum() != 45:
            raise ReadError(f"{path}: dots are missing")
        return _buffers.readonly(values.copy())

reader = DotsReader()
'''

ENTRY_POINTS = """
[lazycache.readers]
dots = {module}:DotsReader
instance = {module}:reader
absent = {module}_that_nobody_has:Reader
failing = {module}_failing:Reader
number = {module}:os
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with one good plug-in (twice) and three broken ones."""
    module = "dots_" + tmp_path.name.replace("-", "_")
    site = tmp_path / "site"
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {module}\nVersion: 1.0\n", encoding="utf8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(module=module), encoding="utf8")
    (site / f"{module}.py").write_text(GOOD, encoding="utf8")
    (site / f"{module}_failing.py").write_text("raise RuntimeError('bad day')", encoding="utf8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(readers, "_plugins", None)
    monkeypatch.setattr(readers, "_registered", ())
    yield module
    sys.modules.pop(module, None)


def test_a_plugin_reads_and_broken_ones_are_named_once_and_skipped(
    plugins: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.dots"
    path.write_bytes(b"DOTS" + bytes(range(10)))
    with pytest.warns(PluginWarning) as caught:
        reader = reader_for(str(path))
    texts = sorted(str(warning.message) for warning in caught)
    assert [text.split("'")[1] for text in texts] == ["absent", "failing", "number"]
    assert "RuntimeError: bad day" in texts[1]
    assert reader.name == "dots"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader_for(str(path)) is reader
        assert reader_for("a.npy").name == "numpy"
    check_reader(reader, path, expected=np.arange(10, dtype=np.uint8))


def test_no_plugin_is_imported_before_a_reader_is_needed(plugins: str) -> None:
    assert plugins not in sys.modules
    with pytest.warns(PluginWarning):
        reader_for("a.npy")
    assert plugins in sys.modules


def test_threads_that_ask_first_together_all_see_the_plugins(plugins: str) -> None:
    together = threading.Barrier(4)

    def ask() -> str:
        together.wait(30)
        return reader_for("a.dots").name

    def ask_in_four_threads() -> list[str]:
        with ThreadPoolExecutor(4) as pool:
            return [future.result(30) for future in [pool.submit(ask) for _ in range(4)]]

    with pytest.warns(PluginWarning):
        assert ask_in_four_threads() == ["dots"] * 4


def test_a_plugin_that_asks_for_a_reader_while_it_is_imported_does_not_hang(
    plugins: str, tmp_path: Path
) -> None:
    (tmp_path / "site" / f"{plugins}_failing.py").write_text(
        "from lazycache.readers import reader_for\n"
        "assert reader_for('a.nii').name == 'nibabel'\n"
        "raise RuntimeError('bad day')",
        encoding="utf8",
    )
    with pytest.warns(PluginWarning) as caught:
        assert reader_for("a.dots").name == "dots"
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 3
    assert any("RuntimeError: bad day" in text for text in texts)
