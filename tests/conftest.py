from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from expressions import Library
from hypothesis import HealthCheck, given, settings
from support import SOON, preload_threads

from lazycache import cache as caches
from lazycache._integrity import check

# Machines that run tests are shared and slow: how long one example takes says nothing.
settings.register_profile("lazycache", deadline=None)
settings.load_profile("lazycache")


def pytest_collection_finish() -> None:
    """Tests call the collector very often: it need not go through the tests themselves then."""
    gc.collect()
    gc.freeze()


# How many examples a second of a storm stands for: about as many as a second has.
EXAMPLES = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storm-seconds", type=float, default=4.0, help="how long each storm of threads lasts"
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("leaves"))


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Callable[..., Callable[[Any], None]]:
    """Runs a function on as many examples as --storm-seconds ask for."""
    seconds = request.config.getoption("--storm-seconds")

    def on(*drawn: Any, share: float = 1.0) -> Callable[[Any], None]:
        count = max(5, int(EXAMPLES * share * seconds))
        profile = settings(max_examples=count, suppress_health_check=list(HealthCheck))
        return lambda function: profile(given(*drawn)(function))()

    return on


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
