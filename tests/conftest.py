from __future__ import annotations

import gc
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aims_support import forget_aims, new_stand_in, real_aims
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
    parser.addoption(
        "--aims",
        choices=("stand-in", "real"),
        default="stand-in",
        help="what tests of AIMS run against: the stand-in, or soma.aims where it is installed",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Shells start what runs in the background with it ignored, and so would be processes of tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "aims: uses AIMS; set on every test that asks for it")
    config.addinivalue_line("markers", "real_aims: needs soma.aims itself; else it is skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"aims", "no_aims"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("aims")


@pytest.fixture
def aims(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``soma.aims``: the stand-in, or with ``--aims real`` the module itself."""
    if request.config.getoption("--aims") == "real":
        yield real_aims()
        return
    if request.node.get_closest_marker("real_aims"):
        pytest.skip("needs soma.aims itself: make test-aims")
    yield new_stand_in(monkeypatch)
    forget_aims(monkeypatch)


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, aims: Any) -> Any:
    """The stand-in, for what only it can tell."""
    if request.config.getoption("--aims") == "real":
        pytest.skip("of the stand-in alone")
    return aims


@pytest.fixture
def no_aims(monkeypatch: pytest.MonkeyPatch) -> None:
    """AIMS isn't installed."""
    forget_aims(monkeypatch)
    monkeypatch.setitem(sys.modules, "soma", None)


_aims_outcomes: Counter[str] = Counter()
_skipped_in_error: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if item.get_closest_marker("aims") and (report.when == "call" or report.skipped):
        _aims_outcomes["skipped" if report.skipped else "run"] += 1
        real = item.config.getoption("--aims") == "real"
        if report.skipped and not real and item.get_closest_marker("real_aims") is None:
            _skipped_in_error.append(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped_in_error:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _aims_outcomes:
        real = config.getoption("--aims") == "real"
        against = "soma.aims" if real else "the stand-in of soma.aims"
        run, skipped = _aims_outcomes["run"], _aims_outcomes["skipped"]
        terminalreporter.write_line(f"AIMS: {run} tests ran against {against}, {skipped} skipped")
    for test in _skipped_in_error:
        terminalreporter.write_line(f"AIMS: {test} may not be skipped: mark it real_aims", red=True)


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
