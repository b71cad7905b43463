from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from support import UNIT, Blocked, Gate, Made, Running, table_of, using

from lazycache.cache import DataCache, cache_for, get_cache, set_budget
from lazycache.errors import BudgetExceededError, BudgetExceededWarning, CacheClosedError
from lazycache.source import Result


@pytest.fixture
def outer() -> DataCache:
    """The global cache, of 10 units."""
    set_budget(10 * UNIT)
    return get_cache()


def test_a_scope_is_current_in_its_block_and_gives_back_its_data(outer: DataCache) -> None:
    key = Made("a", 2 * UNIT)
    with DataCache(4 * UNIT) as scope:
        assert get_cache() is scope
        get_cache().load(key)
        assert (scope.used, outer.used) == (2 * UNIT, 2 * UNIT)
    assert get_cache() is outer
    assert outer.used == 0
    assert outer.lookup(key) is None
    assert scope.closed
    assert (scope.stats().loads, outer.stats().loads) == (1, 1)


def test_a_scope_opens_once(outer: DataCache) -> None:
    with DataCache(UNIT) as scope, pytest.raises(CacheClosedError), scope:
        pass
    assert get_cache() is outer
    with pytest.raises(CacheClosedError), scope:
        pass


def test_a_scope_evicts_its_own_data_for_its_own_budget(outer: DataCache) -> None:
    kept = Made("kept")
    outer.load(kept)
    with DataCache(2 * UNIT) as scope:
        for i in range(5):
            scope.load(Made(str(i)))
        assert scope.used == 2 * UNIT
        assert outer.used == 3 * UNIT
        assert outer.lookup(kept) is not None
    assert outer.stats().overcommits == 0


def test_a_scope_never_adds_memory_to_what_encloses_it(outer: DataCache) -> None:
    outer.budget = 3 * UNIT
    with DataCache(100 * UNIT) as scope:
        for i in range(6):
            scope.load(Made(str(i)))
            assert outer.used <= 3 * UNIT
        assert scope.stats().evictions == 3


def test_the_outer_budget_takes_victims_from_any_scope_inside(outer: DataCache) -> None:
    outer.budget = 3 * UNIT
    mine = Made("mine")
    outer.load(mine)
    with DataCache(2 * UNIT) as scope:
        scope.load(Made("a"))
        scope.load(Made("b"))
        outer.load(Made("c"))
        assert outer.used == 3 * UNIT
        assert outer.lookup(mine) is None  # the least recently used of all
        outer.budget = 0
        assert (outer.used, scope.used) == (0, 0)


def test_a_strict_level_anywhere_around_refuses(outer: DataCache) -> None:
    with DataCache(2 * UNIT, strict=True), DataCache(8 * UNIT) as inner:
        with pytest.raises(BudgetExceededError, match=r"1\.95 KiB"):
            inner.load(Made("a", 3 * UNIT))
        assert outer.used == 0


def test_sibling_scopes_share_one_read(outer: DataCache) -> None:
    key = Made("a")
    gate = Gate()
    key.during = gate
    ready = threading.Barrier(3, timeout=10)
    blocked = Blocked(outer)

    def ask() -> int:
        with DataCache(4 * UNIT) as scope:
            value = scope.load(key)
            ready.wait()
            return int(value[0])

    first = Running(ask)
    gate.reached()
    second = Running(ask)
    blocked.wait_for(second)
    gate.open()
    ready.wait()
    assert [first.result(), second.result()] == [0, 0]
    assert key.loads == 1
    assert outer.used == 0


def test_what_one_scope_cached_is_a_hit_for_another(outer: DataCache) -> None:
    key = Made("a")
    with DataCache(4 * UNIT) as first:
        first.load(key)
        with DataCache(4 * UNIT) as second:
            second.load(key)
            assert (first.used, second.used) == (UNIT, 0)
            assert second.stats().hits == 1
        assert first.lookup(key) is not None
    assert key.loads == 1


def test_what_is_held_in_use_or_computed_moves_to_the_enclosing_scope(outer: DataCache) -> None:
    held_key, pinned_key = Made("held"), Made("pinned", 2 * UNIT)
    result = Result("sum")
    scope = DataCache(8 * UNIT)
    with scope, outer.operation("a plan", workspace=0, room=0) as plan:
        held = scope.load(held_key)[1:]
        scope.load(pinned_key)
        plan.pin([pinned_key])
        with scope.operation("adding", workspace=UNIT, room=0) as operation:
            operation.keep(result, np.ones(UNIT, np.uint8), cost=1)
        scope.close()
        assert outer.used == 4 * UNIT
        assert scope.used == 0
        outer.check()
        assert {(h.name, h.reason) for h in outer.held()} == {
            ("held", "held outside"),
            ("pinned", "operation"),
            ("sum", "result"),
        }
    assert outer.lookup(pinned_key) is not None  # not in use any more, cached by the outer one
    outer.clear()  # the computed result has moved too: it may go
    assert result.value is None
    assert outer.used == UNIT
    assert outer.load(held_key) is not None
    assert held_key.loads == 1
    del held


def test_a_scope_that_closes_in_the_middle_leaves_those_inside_open(outer: DataCache) -> None:
    middle, inner = DataCache(6 * UNIT), DataCache(3 * UNIT)
    with middle, inner:
        inner.load(Made("a"))
        middle.close()
        assert get_cache() is inner
        assert (inner.used, outer.used) == (UNIT, UNIT)
        inner.load(Made("b"))
        outer.check()
    assert get_cache() is outer
    assert outer.used == 0


def in_scope(key: Made, budget: int) -> Iterator[DataCache]:
    with DataCache(budget) as scope:
        get_cache().load(key)
        yield scope
        get_cache().load(key)
        yield scope


def test_generators_suspended_in_scopes_may_end_in_any_order(outer: DataCache) -> None:
    keys = [Made("a"), Made("b", 2 * UNIT), Made("c", 3 * UNIT)]
    suspended = [in_scope(key, 8 * UNIT) for key in keys]
    scopes = [next(generator) for generator in suspended]
    assert outer.used == 6 * UNIT
    suspended[0].close()
    assert scopes[0].closed
    assert outer.used == 5 * UNIT
    outer.check()
    assert next(suspended[1]) is scopes[1]
    suspended[2].close()
    assert outer.used == 2 * UNIT
    suspended[1].close()
    assert outer.used == 0
    assert get_cache() is outer
    outer.check()


def test_a_forgotten_generator_closes_its_scope(outer: DataCache) -> None:
    generator = in_scope(Made("a"), 4 * UNIT)
    next(generator)
    del generator
    assert outer.used == 0
    assert get_cache() is outer


def test_a_generator_may_end_in_another_context(outer: DataCache) -> None:
    generator = in_scope(Made("a"), 4 * UNIT)
    next(generator)
    contextvars.Context().run(generator.close)
    assert get_cache() is outer
    assert outer.used == 0


def test_threads_have_scopes_of_their_own(outer: DataCache) -> None:
    with DataCache(2 * UNIT) as scope:
        assert Running(get_cache).result() is outer
        assert Running(contextvars.copy_context().run, get_cache).result() is scope


def test_to_thread_keeps_the_scope(outer: DataCache) -> None:
    async def ask(budget: int) -> tuple[int, int]:
        with DataCache(budget * UNIT) as scope:
            await asyncio.to_thread(lambda: get_cache().load(Made(str(budget), budget * UNIT)))
            assert get_cache() is scope
            return scope.used, scope.budget

    async def main() -> list[tuple[int, int]]:
        return list(await asyncio.gather(*(ask(n) for n in (1, 2, 3))))

    assert asyncio.run(main()) == [(n * UNIT, n * UNIT) for n in (1, 2, 3)]
    assert outer.used == 0


def test_loads_ahead_run_in_the_context_of_who_iterates(outer: DataCache) -> None:
    seen: list[DataCache] = []
    done = threading.Event()

    def look() -> None:
        seen.append(get_cache())
        done.set()

    class Loop:
        pass

    loop = Loop()
    with DataCache(4 * UNIT) as scope:
        ahead = scope.preloading(loop, 1)
        key = Made("a", during=look)
        ahead.expect([key])
        ahead.want([key])
        assert done.wait(10)
        ahead.close()
    assert seen == [scope]


def test_a_load_under_way_is_charged_to_the_enclosing_scope_at_close(outer: DataCache) -> None:
    gate = Gate()
    key = Made("a", 2 * UNIT, during=gate)
    scope = DataCache(4 * UNIT)
    with scope:
        loading = Running(contextvars.copy_context().run, scope.load, key)
        gate.reached()
    assert (scope.used, outer.used) == (0, 2 * UNIT)
    gate.open()
    assert loading.result() is not None
    assert outer.used == 2 * UNIT
    outer.check()


def test_a_request_that_waits_in_a_scope_goes_on_around_it_when_it_closes(
    outer: DataCache,
) -> None:
    scope = DataCache(2 * UNIT, strict=True)
    first, second = Made("a", 2 * UNIT), Made("b", 2 * UNIT)
    gate = Gate()

    def hold() -> None:
        with using(scope, first):
            gate()

    def ask() -> int:
        with scope.operation("waiting", workspace=0, room=0) as operation:
            admitted()
            return len(operation.pin([second])[0])

    admitted = Gate()
    with scope:
        blocked = Blocked(scope)
        asking = Running(ask)
        admitted.reached()
        holding = Running(hold)
        gate.reached()
        admitted.open()
        blocked.wait_for(asking)
    assert asking.result() == 2 * UNIT  # the first is still held: only the outer one has room
    gate.open()
    holding.result()
    assert outer.stats().overcommits == 0


def test_a_request_that_waits_to_begin_in_a_scope_is_told_that_it_closed(
    outer: DataCache,
) -> None:
    scope = DataCache(2 * UNIT)
    gate = Gate()

    def hold() -> None:
        with scope.operation("first", workspace=2 * UNIT, room=0):
            gate()

    def ask() -> None:
        with scope.operation("second", workspace=UNIT, room=0):
            pytest.fail("it was admitted")

    with scope:
        blocked = Blocked(scope)
        holding = Running(hold)
        gate.reached()
        asking = Running(ask)
        blocked.wait_for(asking)
    gate.open()
    holding.result()
    assert isinstance(asking.error(), CacheClosedError)


def test_where_the_data_of_a_proxy_go(outer: DataCache) -> None:
    alone = DataCache(UNIT)
    with DataCache(UNIT) as made_in:
        reference = weakref.ref(made_in)
        with DataCache(UNIT) as used_in:
            assert cache_for(alone, reference) is alone
            assert cache_for(None, reference) is used_in
        context = contextvars.Context()
        assert context.run(cache_for, None, reference) is made_in
        assert context.run(cache_for, None, None) is outer
    assert cache_for(None, reference) is outer
    del made_in, used_in
    assert cache_for(None, reference) is outer


def test_a_cache_that_is_never_entered_stands_alone(outer: DataCache) -> None:
    alone = DataCache(4 * UNIT)
    alone.load(Made("a"))
    assert (alone.used, outer.used) == (UNIT, 0)
    assert table_of(alone) is not table_of(outer)


def test_the_outer_budget_is_exceeded_once_however_deep(outer: DataCache) -> None:
    outer.budget = 2 * UNIT
    with (
        DataCache(9 * UNIT),
        DataCache(9 * UNIT) as inner,
        pytest.warns(BudgetExceededWarning, match="1.95 KiB"),
    ):
        inner.load(Made("a", 3 * UNIT))
    assert outer.stats().overcommits == 1
    assert inner.stats().overcommits == 0
