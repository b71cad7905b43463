from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SOON, UNIT, Blocked, Gate, Made, Running, load, table_of, using

import lazycache as lc
from lazycache._buffers import owner_of
from lazycache._records import Scope
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


# Generators, tasks and threads


class Cycle:
    """Something that only the garbage collector ends."""

    def __init__(self, part: object) -> None:
        self.part = part
        self.itself = self


@pytest.mark.parametrize("seed", range(6))
def test_suspended_generators_close_in_any_order_and_anywhere(outer: DataCache, seed: int) -> None:
    dice = random.Random(seed)
    keys = [Made(str(i)) for i in range(6)]
    suspended = [in_scope(key, 8 * UNIT) for key in keys]
    scopes = [next(generator) for generator in suspended]
    order = dice.sample(range(6), 6)
    for left, number in zip(range(5, -1, -1), order, strict=True):
        generator = suspended[number]
        suspended[number] = iter(())
        how = dice.choice(["close", "context", "thread", "collector", "error"])
        if how == "close":
            generator.close()  # type: ignore[attr-defined]
        elif how == "context":
            contextvars.Context().run(generator.close)  # type: ignore[attr-defined]
        elif how == "thread":
            Running(generator.close).result()  # type: ignore[attr-defined]
        elif how == "error":
            with pytest.raises(KeyError):
                generator.throw(KeyError)  # type: ignore[attr-defined]
        else:
            Cycle(generator)
            del generator
            gc.collect()
        assert scopes[number].closed
        assert outer.used == left * UNIT
        innermost = [i for i in range(6) if not scopes[i].closed]
        assert get_cache() is (scopes[innermost[-1]] if innermost else outer)
        outer.check()


def test_a_generator_that_is_suspended_at_the_end_of_the_process_ends_quietly() -> None:
    text = """
from support import Made
from lazycache.cache import DataCache, get_cache

def suspended():
    with DataCache(4000) as cache:
        cache.load(Made("a"))
        yield

generators = [suspended() for _ in range(3)]
for generator in generators:
    next(generator)
kept = get_cache().load(Made("b"))
print(get_cache().used)
"""
    root = Path(lc.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2000\n", "")


def test_tasks_that_take_turns_have_scopes_of_their_own(outer: DataCache) -> None:
    async def work(number: int) -> None:
        with DataCache(3 * UNIT) as scope:
            for step in range(5):
                assert get_cache() is scope
                load(get_cache(), Made(f"{number}.{step}", fill=step))
                await asyncio.sleep(0)
                with DataCache(2 * UNIT) as inner:
                    await asyncio.sleep(0)
                    assert get_cache() is inner
                assert scope.used <= 3 * UNIT
        assert get_cache() is outer

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(4)))

    asyncio.run(main())
    outer.check()
    assert outer.used == 0
    assert len(table_of(outer).root.tree()) == 1


def test_cancelled_tasks_close_their_scopes(outer: DataCache) -> None:
    scopes: list[DataCache] = []

    async def work() -> None:
        with DataCache(2 * UNIT) as scope:
            load(scope, Made("a"))
            await asyncio.to_thread(load, get_cache(), Made("b"))
            scopes.append(scope)
            await asyncio.Event().wait()

    async def fail() -> None:
        while len(scopes) < 3:
            await asyncio.sleep(0)
        assert all(scope.used == 2 * UNIT for scope in scopes)
        raise KeyError("one fails")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(work())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        asyncio.run(main())
    assert [scope.closed for scope in scopes] == [True] * 3
    assert outer.used == 0
    outer.check()


def test_an_async_generator_may_be_suspended_in_a_scope(outer: DataCache) -> None:
    async def suspended(number: int) -> AsyncIterator[DataCache]:
        with DataCache(4 * UNIT) as scope:
            load(scope, Made(str(number)))
            yield scope
            yield scope

    async def main() -> list[DataCache]:
        first, second, third = (suspended(number) for number in range(3))
        scopes = [await anext(one) for one in (first, second, third)]
        assert outer.used == 3 * UNIT
        await first.aclose()  # type: ignore[attr-defined]
        assert outer.used == 2 * UNIT
        assert await anext(second) is scopes[1]
        Cycle(second)
        del second
        return scopes  # the loop ends the third

    scopes = asyncio.run(main())
    gc.collect()
    assert [scope.closed for scope in scopes] == [True] * 3
    assert get_cache() is outer
    assert outer.used == 0
    outer.check()


def test_threads_take_a_scope_along_only_in_a_copied_context(outer: DataCache) -> None:
    with DataCache(4 * UNIT) as scope, ThreadPoolExecutor(2) as pool:
        assert pool.submit(get_cache).result(SOON) is outer
        context = contextvars.copy_context()
        assert pool.submit(context.run, get_cache).result(SOON) is scope
    # The copy outlives the block: who runs in it goes on in the scope around.
    assert context.run(get_cache) is outer
    with context.run(DataCache, UNIT) as another:
        assert context.run(get_cache) is outer
        assert another is get_cache()


# Proxies


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "a.npy", np.ones(UNIT, np.uint8))
    return tmp_path / "a.npy"


def test_a_proxy_outlives_the_scope_that_it_was_made_in(outer: DataCache, file: Path) -> None:
    with DataCache(4 * UNIT) as scope:
        proxy = lc.load(file)
        assert proxy.data.sum() == UNIT
        assert scope.used == UNIT
    assert outer.used == 0
    assert not proxy.loaded()
    assert proxy.data.sum() == UNIT
    assert outer.used == UNIT
    with DataCache(4 * UNIT) as another:
        total = (proxy + 1).data
        assert another.stats().hits == 1
        assert another.used > 0
    assert total.sum() == 2 * UNIT
    outer.check()


def test_a_proxy_of_a_closed_explicit_cache_says_so(file: Path) -> None:
    cache = DataCache(4 * UNIT)
    proxy = lc.load(file, cache=cache)
    assert proxy.data.sum() == UNIT
    cache.close()
    with pytest.raises(CacheClosedError, match="without cache="):
        proxy.data
    assert not proxy.loaded()
    assert cache.used == 0


def test_an_explicit_cache_is_used_whatever_scope_is_open(outer: DataCache, file: Path) -> None:
    alone = DataCache(4 * UNIT)
    proxy = lc.load(file, cache=alone)
    with DataCache(4 * UNIT) as scope:
        assert (proxy * 2).data.sum() == 2 * UNIT
        assert proxy.data.sum() == UNIT
    assert (alone.used, scope.used, outer.used) == (UNIT, 0, 0)


# Closing while others are at work


def test_siblings_that_ask_one_after_the_other_read_once(outer: DataCache) -> None:
    key = Made("a")
    with DataCache(4 * UNIT) as first:
        load(first, key)
        second = Running(lambda: load_in_a_scope(key))
        assert second.result() == 0
    assert key.loads == 1
    assert outer.used == 0


def load_in_a_scope(key: Made) -> int:
    with DataCache(4 * UNIT) as scope:
        return load(scope, key)


def test_a_scope_may_close_while_another_waits_for_its_load(outer: DataCache) -> None:
    gate = Gate()
    key = Made("a", during=gate, fill=5)
    scope = DataCache(4 * UNIT)
    blocked = Blocked(outer)
    with scope:
        loading = Running(contextvars.copy_context().run, load, scope, key)
        gate.reached()
        joining = Running(load_in_a_scope, key)
        blocked.wait_for(joining)
    assert (scope.used, outer.used) == (0, UNIT)
    outer.check()
    gate.open()
    assert (loading.result(), joining.result()) == (5, 5)
    assert key.loads == 1
    outer.check()
    outer.clear()
    assert outer.used == 0


def test_a_scope_may_close_while_its_loads_run_ahead(outer: DataCache) -> None:
    gate = Gate()
    keys = [Made("a", during=gate), Made("b")]
    loop = Cycle(None)
    with DataCache(4 * UNIT) as scope:
        ahead = scope.preloading(loop, 1)
        ahead.expect(keys)
        ahead.want(keys)
        gate.reached()
    assert scope.used == 0
    gate.open()
    table_of(outer).pool.join_threads(SOON)
    outer.check()
    assert outer.used == 0
    ahead.done(keys)  # the loop may not have noticed
    ahead.want(keys)
    ahead.close()
    assert outer.used == 0
    assert not table_of(outer).streams


def test_an_error_at_the_end_of_a_block_leaves_it_all_the_same(outer: DataCache) -> None:
    def fail() -> None:
        raise KeyError

    middle, inner = DataCache(4 * UNIT), DataCache(4 * UNIT)
    with middle, pytest.raises(KeyError), inner:
        inner.load(Made("bad", during=fail))
    assert (middle.closed, inner.closed) == (True, True)
    assert get_cache() is outer
    assert outer.used == 0
    middle.close()
    inner.close()
    outer.check()


def test_the_global_cache_may_be_entered_and_replaced(outer: DataCache) -> None:
    with outer:
        assert get_cache() is outer
        with DataCache(UNIT) as scope:
            assert get_cache() is scope
    assert outer.closed
    assert get_cache() is not outer
    assert not get_cache().closed


# Any tree of scopes


class Tree:
    """Scopes over one another, in which anything happens, and what must be true after each step."""

    def __init__(self) -> None:
        self.root = DataCache(8 * UNIT)
        self.root._bind()
        self.scopes = [self.root]
        self.keys = [Made(str(i), (1 + i % 3) * UNIT, fill=i) for i in range(8)]
        self.held: list[object] = []
        self.results: list[Result] = []

    def open(self, number: int, size: int) -> None:
        outer = self.some(number)
        scope = DataCache(size * UNIT)
        scope._bind(outer)
        self.scopes.append(scope)

    def some(self, number: int) -> DataCache:
        living = [scope for scope in self.scopes if not scope.closed]
        return living[number % len(living)]

    def stuck(self, level: Scope) -> int:
        """The bytes of ``level`` that no eviction would free."""
        owners = {id(owner_of(view)) for view in self.held}
        charges = [table_of(self.root).accounts.owners[owner].charge for owner in owners]
        return sum(charge.nbytes for charge in charges if level in charge.scope.chain)

    def fits(self, scope: DataCache, nbytes: int) -> bool:
        levels = scope._bind()[1].chain
        return all(self.stuck(level) + nbytes <= level.budget for level in levels)

    def close(self, number: int, _: int) -> None:
        scope = self.some(number)
        if scope is not self.root:
            scope.close()

    def load(self, number: int, size: int) -> None:
        scope, key = self.some(number), self.keys[(number * 5 + size) % 8]
        if self.fits(scope, key.nbytes):
            assert load(scope, key) == key.fill

    def hold(self, number: int, size: int) -> None:
        scope, key = self.some(number), self.keys[(number * 3 + size) % 8]
        if self.fits(scope, key.nbytes):
            self.held.append(scope.load(key)[1:])

    def keep(self, number: int, size: int) -> None:
        scope = self.some(number)
        if self.fits(scope, UNIT):
            with scope.operation("a test", workspace=UNIT, room=0) as operation:
                self.results.append(Result("a result"))
                operation.keep(self.results[-1], np.ones(UNIT, np.uint8), size)

    def let_go(self, number: int, _: int) -> None:
        if self.held:
            del self.held[number % len(self.held)]

    def resize(self, number: int, size: int) -> None:
        scope = self.some(number)
        scope.budget = max(size * UNIT, self.stuck(scope._bind()[1]))

    def clear(self, number: int, _: int) -> None:
        self.some(number).clear()

    def look(self) -> None:
        table = table_of(self.root)
        self.root.check()
        for scope in table.root.tree():
            beneath = [c for c in table.accounts.charges if scope in c.scope.chain]
            assert scope.used == sum(charge.nbytes for charge in beneath)
            assert scope.used <= scope.budget
            assert all(child.parent is scope for child in scope.children)
            own = scope.used - sum(child.used for child in scope.children)
            assert own == sum(c.nbytes for c in table.accounts.charges if c.scope is scope)
        living = {scope._bind()[1] for scope in self.scopes if not scope.closed}
        assert set(table.root.tree()) == living
        assert self.root.stats().overcommits == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "load", "hold", "keep", "let_go", "close", "resize", "clear"]),
        st.integers(0, 7),
        st.integers(1, 6),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS)
def test_a_child_never_adds_memory_to_its_parent(steps: list[tuple[str, int, int]]) -> None:
    tree = Tree()
    for name, number, size in steps:
        getattr(tree, name)(number, size)
        tree.look()
    tree.held.clear()
    tree.results.clear()
    for scope in tree.scopes:  # the root first: those inside stay open
        scope.close()
    assert tree.root.used == 0
