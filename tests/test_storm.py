"""Eight threads do everything at once for some seconds, in a budget that is always too small."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from support import SOON, UNIT, Made, Running, preload_threads, table_of

from lazycache.cache import DataCache
from lazycache.errors import CacheClosedError
from lazycache.source import Handle, Result
from lazycache.stats import CacheStats

SECONDS = 3.0
THREADS = 8
KEYS = 50


class BadFileError(Exception):
    pass


class Loop:
    pass


def fail() -> None:
    raise BadFileError("bad header")


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns every 10 µs: more interleavings in the same time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Storm:
    def __init__(self, budgets: list[int]) -> None:
        self.budgets = budgets
        self.cache = DataCache(6 * UNIT)
        self.keys = [
            Made(str(i), UNIT, fill=i, during=fail if i % 17 == 16 else None) for i in range(KEYS)
        ]
        self.done: Counter[str] = Counter()
        self.counting = threading.Lock()
        self.end = time.monotonic() + SECONDS

    def run(self, seed: int) -> None:
        dice = random.Random(seed)
        acts = [self.ask] * 8 + [self.work] * 6 + [self.loop, self.scope, self.tidy]
        while time.monotonic() < self.end:
            act = dice.choice(acts)
            act(dice, self.cache)
            with self.counting:
                self.done[act.__name__] += 1

    def some(self, dice: random.Random, count: int) -> list[Made]:
        return dice.sample(self.keys, count)

    def ask(self, dice: random.Random, cache: DataCache) -> None:
        """One file, handed out to nobody."""
        [key] = self.some(dice, 1)
        self.pin(cache, [key], 0)

    def work(self, dice: random.Random, cache: DataCache) -> None:
        """An operation that says what it needs: at most 3 of the 6 units."""
        keys = self.some(dice, 2)
        self.pin(cache, keys, UNIT if dice.random() < 0.3 else 0)

    def pin(self, cache: DataCache, keys: list[Made], workspace: int) -> None:
        try:
            with cache.operation(
                "a storm", workspace=workspace, room=len(keys) * UNIT, order=keys
            ) as operation:
                values = operation.pin(keys)
                for key, value in zip(keys, values, strict=True):
                    assert value[0] == value[-1] == key.fill
                del value
                values.clear()
                if workspace:
                    result = Result("a result")
                    operation.keep(result, np.zeros(UNIT, np.uint8), 1.0)
                    del result
                operation.unpin(keys)
        except BadFileError:
            assert any(key.during is fail for key in keys)
            return
        assert not any(key.during is fail for key in keys)

    def loop(self, dice: random.Random, cache: DataCache) -> None:
        """A loop with loads ahead of it, which may end early, or be forgotten."""
        keys = self.some(dice, 6)
        loop = Loop()
        ahead = cache.preloading(loop, dice.randint(1, 4))
        ahead.expect(keys)
        ahead.want(keys)
        for key in keys[: dice.choice([2, 6])]:
            self.pin(cache, [key], 0)
            ahead.done([key])
        if dice.random() < 0.7:
            ahead.close()

    def scope(self, dice: random.Random, cache: DataCache) -> None:
        """A share of the budget, large enough for what is done in it."""
        with DataCache(4 * UNIT) as inner:
            for _ in range(3):
                try:
                    dice.choice([self.ask, self.work])(dice, inner)
                except CacheClosedError:
                    pytest.fail("an open scope is closed")

    def tidy(self, dice: random.Random, cache: DataCache) -> None:
        what = dice.random()
        if what < 0.3:
            cache.clear()
        elif what < 0.6:
            cache.budget = dice.choice(self.budgets) * UNIT
        elif what < 0.8:
            cache.release(dice.choice(self.keys))
        else:
            key = dice.choice(self.keys)
            handle = Handle(key, 1)
            self.pin(cache, [key], 0)
            cache.used_up(handle, 1)
        assert cache.used >= 0
        assert cache.stats().loads >= 0


@pytest.mark.usefixtures("fast_switching")
def test_a_storm_of_threads_never_exceeds_a_budget_in_which_the_largest_need_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = rage(Storm([6]), monkeypatch)
    assert stats.overcommits == 0
    assert stats.peak_bytes <= 6 * UNIT


# What was admitted to a larger budget may not fit the smaller one: that is no fault.
@pytest.mark.filterwarnings("ignore::lazycache.errors.BudgetExceededWarning")
@pytest.mark.usefixtures("fast_switching")
def test_a_storm_goes_on_while_the_budget_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = rage(Storm([6, 8, 20]), monkeypatch)
    assert stats.overcommits <= stats.misses // 100
    assert stats.peak_bytes <= 24 * UNIT


def rage(storm: Storm, monkeypatch: pytest.MonkeyPatch) -> CacheStats:
    """Run a storm and look at what it left."""
    # Scopes in threads are opened inside this cache.
    monkeypatch.setattr("lazycache.cache.get_cache", lambda: storm.cache)
    threads = [Running(storm.run, seed) for seed in range(THREADS)]
    errors = [thread.error() for thread in threads]
    assert errors == [None] * THREADS
    cache, table = storm.cache, table_of(storm.cache)
    table.pool.join_threads(10)
    cache.check()
    stats = cache.stats()
    assert not table.uses
    assert not table.flights
    assert not table.schedules
    for thread in preload_threads():
        thread.join(SOON)
    assert not preload_threads()
    cache.clear()
    assert cache.used == 0
    # It was a storm: everything that can happen did, many times.
    assert stats.evictions > 500
    assert stats.hits > 100
    assert stats.waits > 20
    assert stats.load_failures > 20
    assert stats.misses > stats.loads - stats.preloads  # some joined the loads of others
    assert min(storm.done[act] for act in ("ask", "work", "loop", "scope", "tidy")) >= 10
    return stats
