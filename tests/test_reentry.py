"""Finalizers, callbacks and signal handlers that use a cache in the middle of its locked sections.

Python runs them anywhere: where the garbage collector happens to start, where the last reference
goes, where a signal comes. Here they run at each line of the sections in turn, called by a trace
function. What they ask is answered at once, what they change is changed at the end of the section,
and what would have to be read is an error; nothing ever waits, and the cache stays whole.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support import UNIT, Made, load, table_of, together
from test_interrupts import CORE, MORE, SMALL, Loop, World, firsts, hit, look

import lazycache as lc
from lazycache.cache import DataCache, get_cache, set_budget
from lazycache.errors import BudgetExceededWarning, CacheBusyError
from lazycache.proxy import LazyReadData
from lazycache.source import Key

pytestmark = pytest.mark.timeout(20)

ROOT = Path(lc.__file__).parent.parent


# How code comes to run in the middle of other code


class Finalized:
    """Calls what it is given when it is collected; part of a cycle."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.itself = self

    def __del__(self) -> None:
        self.act()


def by_the_collector(act: Callable[[], object]) -> None:
    Finalized(act)
    gc.collect(0)


def by_a_weak_reference(act: Callable[[], object]) -> None:
    target = Loop()
    reference = weakref.ref(target, lambda _: act())
    del target
    assert reference() is None


def by_a_generator(act: Callable[[], object]) -> None:
    def suspended() -> Iterator[None]:
        try:
            yield
        finally:
            act()

    generator = suspended()
    next(generator)
    del generator


def by_a_signal(act: Callable[[], object]) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: act() and None)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


WAYS = [by_the_collector, by_a_weak_reference, by_a_generator, by_a_signal]


class Interruption:
    """Lets ``act`` run at the ``number``-th line that a scenario runs in a section."""

    def __init__(
        self, world: World, number: int, act: Callable[[], object], then: Callable[[], object]
    ) -> None:
        self.world = world
        self.table = table_of(world.cache)
        self.number = number
        self.act = act
        self.then = then
        self.places: list[tuple[str, int]] = []
        self.error: BaseException | None = None

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in CORE:
            return None
        try:
            if event == "return" and frame.f_code.co_name in ("section", "lookup"):
                if len(self.places) >= self.number > 0 and not self.table.inside():
                    self.number = 0
                    self.then()
            elif event == "line" and self.table.inside():
                self.places.append((frame.f_code.co_filename, frame.f_lineno))
                if len(self.places) == self.number:
                    WAYS[self.number % len(WAYS)](self.caught)
        except BaseException as error:
            self.error = error
        return self.trace

    def caught(self) -> None:
        # Those who call finalizers only print what these raise.
        try:
            self.act()
        except BaseException as error:
            self.error = error

    def run(self, scenario: Callable[[World], None]) -> None:
        outer = sys.gettrace()
        gc.disable()
        sys.settrace(self.trace)
        try:
            scenario(self.world)
        finally:
            sys.settrace(outer)
            gc.enable()
        self.world.end()
        if self.error is not None:
            raise self.error


def at_each_line(
    scenario: Callable[[World], None],
    act: Callable[[World], object],
    then: Callable[[World], object] = lambda world: None,
    after: Callable[[World], object] = look,
    most: int = 60,
) -> None:
    """Run ``act`` at each line of the scenario's sections (or at ``most`` of them).

    ``then`` is called at the end of that section, and ``after`` in the end.
    """
    plain = Interruption(World(), 0, lambda: None, lambda: None)
    plain.run(scenario)
    numbers = list(firsts(plain.places).values())
    for number in random.Random(len(numbers)).sample(numbers, min(most, len(numbers))):
        world = World()
        interruption = Interruption(
            world, number, lambda world=world: act(world), lambda world=world: then(world)
        )
        try:
            interruption.run(scenario)
            after(world)
        except BaseException as error:
            file, line = plain.places[number - 1]
            way = WAYS[number % len(WAYS)].__name__
            error.add_note(f"{way} at {Path(file).name}:{line}")
            raise


SCENARIOS = [scenario for scenario in [*SMALL, *MORE] if scenario.__name__ != "hit"]
every_scenario = pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda scenario: scenario.__name__
)


@every_scenario
def test_what_is_asked_in_a_section_is_answered(scenario: Callable[[World], None]) -> None:
    def ask(world: World) -> None:
        cache = world.cache
        assert cache.used >= 0
        assert cache.headroom >= 0
        assert cache.stats().loads >= 6
        assert "DataCache of" in repr(cache)
        assert cache.budget > 0
        assert not cache.closed
        assert all(holder.nbytes for holder in cache.held())
        for number, key in enumerate(world.keys):
            cache.holds(key)
            cache.loading(key)
            value = cache.lookup(key)
            assert value is None or value[0] == number

    at_each_line(scenario, ask)


@every_scenario
def test_data_that_must_be_read_in_a_section_are_an_error(
    scenario: Callable[[World], None],
) -> None:
    def ask(world: World) -> None:
        key = Made("not there")
        with pytest.raises(CacheBusyError, match="finalizer or signal handler"):
            world.cache.load(key)
        with (
            pytest.raises(CacheBusyError),
            world.cache.operation("an operation", workspace=1, room=0),
        ):
            pytest.fail("it was admitted")
        assert key.loads == 0

    at_each_line(scenario, ask, most=40)


@every_scenario
def test_what_is_changed_in_a_section_is_changed_at_its_end(
    scenario: Callable[[World], None],
) -> None:
    told: list[object] = []

    def change(world: World) -> None:
        told.clear()
        cache = world.cache
        if not cache.closed:
            cache.subscribe(told.append)()
            cache.release(world.keys[1])
            cache.clear()
            cache.budget = 7 * UNIT
            cache.adopt(np.zeros(UNIT, np.uint8), "made in a finalizer")

    def changed(world: World) -> None:
        assert not table_of(world.cache).postponed
        assert world.cache.budget == 7 * UNIT
        assert world.cache._in is not None
        assert told.append not in world.cache._in.subscribers

    at_each_line(scenario, change, changed, most=40)


@every_scenario
def test_scopes_and_loops_that_end_in_a_section_end_with_it(
    scenario: Callable[[World], None],
) -> None:
    def work(world: World) -> None:
        inner = DataCache(2 * UNIT)
        inner._bind(world.cache)
        loop = Loop()
        ahead = inner.preloading(loop, 1)
        ahead.expect(world.keys[1:3])
        ends = [ahead.close, inner.close, inner.close]
        world.finals = ends  # type: ignore[attr-defined]
        world.inner = inner  # type: ignore[attr-defined]
        scenario(world)

    def end(world: World) -> None:
        if (inner := getattr(world, "inner", None)) is not None:
            for one in world.finals:  # type: ignore[attr-defined]
                one()
            inner.__exit__()

    def ended(world: World) -> None:
        inner = getattr(world, "inner", None)
        if inner is not None:
            assert inner.closed
            assert inner._in not in table_of(world.cache).root.tree()

    def left(world: World) -> None:
        world.inner.close()  # type: ignore[attr-defined]
        look(world)

    at_each_line(work, end, ended, left, most=30)


def test_a_hit_ends_what_came_in_the_middle_of_it() -> None:
    """A look-up takes the lock as well, but is no section."""

    def change(world: World) -> None:
        world.cache.budget = 2 * UNIT

    def changed(world: World) -> None:
        assert not table_of(world.cache).postponed
        assert world.cache.budget == 2 * UNIT

    at_each_line(hit, change, changed)


# What Python does by itself


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """The garbage collector runs at nearly every allocation."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("eager_collector")
@pytest.mark.parametrize("threads", [1, 4])
def test_finalizers_may_use_the_cache_wherever_they_run(threads: int) -> None:
    cache = DataCache(6 * UNIT)
    keys = [Made(str(i), fill=i) for i in range(12)]
    errors: list[BaseException] = []
    refused: list[CacheBusyError] = []

    def finalizer(dice: random.Random) -> Callable[[], object]:
        key = dice.choice(keys)

        def ask() -> None:
            value = cache.lookup(key)
            assert value is None or value[0] == key.fill

        def demand() -> None:
            try:
                assert load(cache, key) == key.fill
            except CacheBusyError as error:
                refused.append(error.with_traceback(None))

        def scope() -> None:
            try:
                with DataCache(2 * UNIT) as inner:
                    inner.load(key)
            except CacheBusyError as error:
                refused.append(error.with_traceback(None))

        act = dice.choice([ask, demand, scope, cache.stats, cache.held, lambda: cache.release(key)])

        def run() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)

        return run

    def work(number: int) -> None:
        dice = random.Random(number)
        for _ in range(150):
            Finalized(finalizer(dice))
            with cache.operation("a test", workspace=dice.choice([0, UNIT]), room=0) as operation:
                wanted = dice.sample(keys, 1)
                assert [value[0] for value in operation.pin(wanted)] == [k.fill for k in wanted]
            if dice.random() < 0.1:
                cache.clear()

    together(threads, work)
    gc.collect()
    assert not errors
    cache.check()
    cache.clear()
    assert cache.used == 0


class Option:
    """An option of a reader, which uses the cache when nobody wants it any more."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def test_the_options_of_a_reader_may_use_the_cache_when_they_die(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(UNIT, np.uint8))
    cache = DataCache(4 * UNIT)
    inside: list[bool] = []

    def act() -> None:
        inside.append(table_of(cache).inside())
        assert cache.used >= 0
        assert cache.held() is not None
        cache.release(Key("another"))

    def read(path: str, option: Option) -> Any:
        return np.load(path)

    for _ in range(3):
        proxy = LazyReadData(tmp_path / "a.npy", reader=read, cache=cache, option=Option(act))
        assert proxy.data.sum() == 0
        del proxy
        cache.clear()
    gc.collect()
    assert len(inside) == 3
    cache.check()
    assert cache.used == 0


def test_a_generator_in_a_scope_that_is_collected_in_a_section_ends_its_scope() -> None:
    set_budget(10 * UNIT)
    outer = get_cache()
    scopes: list[DataCache] = []

    def suspended() -> Iterator[None]:
        with DataCache(4 * UNIT) as scope:
            scopes.append(scope)
            scope.load(Made("inside"))
            yield

    def cycle() -> None:
        generator = suspended()
        next(generator)
        loop = Loop()
        loop.parts = [generator, loop]  # type: ignore[attr-defined]

    gc.disable()
    cycle()
    assert get_cache() is scopes[0]

    def work(after: object) -> None:
        gc.collect()
        assert not scopes[0].closed

    table_of(outer).section(work)
    gc.enable()
    assert scopes[0].closed
    assert get_cache() is outer
    assert outer.used == 0
    outer.check()


def test_a_cache_may_die_in_a_section_of_its_own_and_of_another() -> None:
    one, other = DataCache(4 * UNIT), DataCache(4 * UNIT)
    tables = [table_of(one), table_of(other)]
    key = Made("a")
    dying = [other]
    other.load(key)
    one.load(key)
    del other
    tables[0].section(lambda after: dying.clear())
    assert tables[1].root.closed
    assert tables[1].root.used == 0
    dying.append(one)
    del one
    tables[0].section(lambda after: dying.clear())
    assert tables[0].root.closed
    assert tables[0].root.used == 0


def test_who_is_told_that_data_died_may_load_others() -> None:
    """Data are dropped outside the lock."""
    cache = DataCache(2 * UNIT)
    keys = [Made(str(i), fill=i) for i in range(4)]
    loaded: list[int] = []
    first = cache.load(keys[0])
    reference = weakref.ref(first.base, lambda _: loaded.append(load(cache, keys[3])))
    del first
    cache.load(keys[1])
    cache.load(keys[2])
    assert reference() is None
    assert loaded == [3]
    assert cache.used == 2 * UNIT
    cache.check()


def test_a_subscriber_may_load_and_close() -> None:
    cache = DataCache(4 * UNIT)
    other = Made("other", fill=7)
    seen: list[int] = []

    def told(event: Any) -> None:
        if event.name == "a" and not seen:
            seen.append(load(cache, other))

    cache.subscribe(told)
    cache.load(Made("a"))
    assert seen == [7]
    cache.subscribe(lambda event: cache.close())
    cache.load(Made("b"))
    assert cache.closed
    assert cache.used == 0


# Two locks


def script(text: str) -> str:
    """What a program prints; it is killed when it hangs."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", text],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_caches_whose_finalizers_use_each_other_go_on() -> None:
    """Each thread is in a section of one cache and changes something in the other."""
    told = script(
        """
import threading
from support import Made, table_of, together
from lazycache.cache import DataCache

caches = [DataCache(4000), DataCache(4000)]
key = Made("a")
for cache in caches:
    cache.load(key)
both = threading.Barrier(2)

def run(number):
    def work(after):
        both.wait(10)
        other = caches[1 - number]
        other.stats(), other.used, other.held(), other.lookup(key), other.release(key)
    table_of(caches[number]).section(work)

together(2, run)
for cache in caches:
    cache.check()
print([cache.used for cache in caches])
"""
    )
    assert told == "[0, 0]"


def test_a_finalizer_that_runs_while_a_cache_is_made_may_use_another() -> None:
    """That one is in a section, in which a scope begins."""
    told = script(
        """
import threading
from support import Made, Running, table_of
from lazycache import cache as caches
from lazycache.cache import DataCache

first = DataCache(4000)
key = Made("a")
first.load(key)
ready, scoped = threading.Event(), threading.Event()
real = caches.Table

class Slow(real):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ready.set()
        assert scoped.wait(10)
        first.release(key)  # a finalizer, in whose place this stands

def scope():
    table = table_of(first)
    section = table.section
    table.section = lambda work: section(lambda after: (scoped.set(), work(after)))
    assert ready.wait(10)
    DataCache(2000)._bind(first)

running = Running(scope)
caches.Table = Slow
DataCache(1000)._bind()
running.result()
first.check()
print(first.used)
"""
    )
    assert told == "0"


def test_a_finalizer_that_runs_while_its_thread_waits_for_memory_goes_before_it() -> None:
    # The collection that a short request asks for runs it: behind the ticket of its own thread it
    # would wait for ever.
    cache = DataCache(2 * UNIT, strict=False)
    found: list[int] = []

    class Asks:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            found.append(load(cache, Made("second", fill=2)))

    held = cache.load(Made("held", 2 * UNIT))
    gc.disable()
    try:
        Asks()
        with pytest.warns(BudgetExceededWarning):
            assert load(cache, Made("first", fill=1)) == 1
    finally:
        gc.enable()
    assert found == [2]
    del held
    cache.check()
