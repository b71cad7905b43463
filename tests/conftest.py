from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
from hypothesis import settings
from support import SOON, preload_threads

from lazycache import cache as caches
from lazycache._integrity import check

# Machines that run tests are shared and slow: how long one example takes says nothing.
settings.register_profile("lazycache", deadline=None)
settings.load_profile("lazycache")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storm-seconds", type=float, default=4.0, help="how long each storm of threads lasts"
    )


@pytest.fixture(autouse=True)
def whole_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test every cache is whole, nothing is under way, and the global one is new."""
    for name in ("LAZYCACHE_BUDGET", "LAZYCACHE_STRICT", "LAZYCACHE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    caches._scope.set(None)
    tables = list(caches._tables)
    if tables:
        _look_at(tables)
    if caches._global is not None:
        caches._global.close()
        caches._global = None
    caches._tables.clear()


def _look_at(tables: list[caches.Table]) -> None:
    deadline = time.monotonic() + SOON
    for thread in preload_threads():
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not preload_threads()
    if any(table.uses or table.flights for table in tables):
        gc.collect()  # a test's own frames may be part of a cycle
    for table in tables:
        check(table)
        assert not table.uses
        assert not table.flights
        assert not table.blocked
        assert table.first() is None
        assert not table.torn
