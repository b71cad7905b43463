from __future__ import annotations

import gc
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any

import pytest
from support import (
    SOON,
    UNIT,
    Blocked,
    Gate,
    Made,
    Running,
    load,
    preload_threads,
    table_of,
    together,
    using,
)

from lazycache import _operation
from lazycache.cache import DataCache
from lazycache.errors import BudgetExceededError, BudgetExceededWarning, LoadCycleError
from lazycache.readers.base import checkpoint


class Loop:
    """Somebody who consumes a stream of preloads."""


@pytest.fixture
def cache() -> DataCache:
    return DataCache(6 * UNIT)


def ahead(cache: DataCache, loop: Loop, *keys: Made, npreload: int = 1) -> Any:
    stream = cache.preloading(loop, npreload)
    stream.expect(keys)
    stream.want(keys)
    return stream


def fail() -> None:
    raise ValueError("bad header")


# What the first versions of the algorithm got wrong


def test_those_who_joined_the_other_reads_of_a_request_that_fails_go_on(cache: DataCache) -> None:
    gate = Gate()

    def stop_and_fail() -> None:
        gate()
        fail()

    bad, good = Made("bad", during=stop_and_fail), Made("good")
    behind = Gate()
    good.during = behind
    blocked = Blocked(cache)

    def ask() -> None:
        with using(cache, bad, good):
            pytest.fail("it did not raise")

    first = Running(ask)
    gate.reached()
    behind.reached()  # a pool thread reads the second
    joiners = [Running(load, cache, good) for _ in range(6)]
    blocked.wait_for(*joiners)
    gate.open()
    behind.open()
    assert isinstance(first.error(), ValueError)
    assert all(joiner.result() == 0 for joiner in joiners)
    assert good.loads == 1


def test_a_victim_that_is_about_to_be_free_is_waited_for(cache: DataCache) -> None:
    dropping = Gate()

    class Slow:
        def __init__(self) -> None:
            self.data = bytearray(5 * UNIT)

        def __del__(self) -> None:
            dropping()

    cache.load(Made("slow", make=Slow, announced=5 * UNIT + 500))
    blocked = Blocked(cache)
    # Nobody else does anything that would count as help but the thread that frees.
    shrinking = Running(setattr, cache, "budget", 5 * UNIT)
    dropping.reached()
    waiting = Running(load, cache, Made("b", 2 * UNIT))
    blocked.wait_for(waiting)
    assert not waiting.done
    dropping.open()
    shrinking.result()
    waiting.result()
    assert cache.stats().overcommits == 0


class Late:
    """A queue that has what it was given, and hands it over only when the gate opens."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.real: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put, self.empty = self.real.put, self.real.empty

    def get(self, timeout: float) -> Any:
        outcome = self.real.get(timeout=timeout)
        self.gate()
        return outcome


def test_who_waits_for_a_load_can_run_as_soon_as_it_is_there(cache: DataCache) -> None:
    # A joiner that counted as blocked until it woke would make the third request believe that
    # nobody is left who will release. Its waking is held up here, after the load has landed.
    table = table_of(cache)
    reading, waking = Gate(), Gate()
    shared = Made("shared", 3 * UNIT, during=reading)
    join = table.pool.join
    blocked = Blocked(cache)
    owner = Running(load, cache, shared)
    reading.reached()

    def join_late(flight: Any, use: Any) -> Any:
        joiner = join(flight, use)
        joiner.outcome = Late(waking)  # type: ignore[assignment]
        return joiner

    table.pool.join = join_late  # type: ignore[method-assign]
    joining = Running(load, cache, shared)
    blocked.wait_for(joining)
    table.pool.join = join  # type: ignore[method-assign]
    reading.open()
    owner.result()
    waking.reached()
    asking = Running(load, cache, Made("more", 4 * UNIT))
    blocked.wait_for(asking)  # it waits for the joiner, and does not go over the budget
    waking.open()
    joining.result()
    asking.result()
    assert cache.stats().overcommits == 0


# One against the other


def test_what_is_pinned_while_another_makes_room_stays(cache: DataCache) -> None:
    keys = [Made(str(i), fill=i) for i in range(6)]
    for key in keys:
        cache.load(key)
    pinned, more = Gate(), Made("more", 5 * UNIT)

    def hold() -> int:
        with using(cache, keys[0]) as [value]:
            pinned()
            return int(value[0])

    holding = Running(hold)
    pinned.reached()
    cache.load(more)
    assert cache.lookup(keys[0]) is not None
    pinned.open()
    assert holding.result() == 0
    assert keys[0].loads == 1


def test_evicting_and_pinning_the_same_files_never_hands_out_less(cache: DataCache) -> None:
    keys = [Made(str(i), 2 * UNIT, fill=i) for i in range(6)]

    def ask(number: int) -> None:
        for turn in range(60):
            key = keys[(number * 7 + turn) % 6]
            with using(cache, key) as values:
                assert values[0][0] == key.fill == values[0][-1]
                values.clear()  # what is held outside its operation can't be freed

    together(3, ask)
    assert cache.stats().overcommits == 0
    assert cache.stats().peak_bytes <= 6 * UNIT


def test_releasing_during_a_load_leaves_it_to_those_who_asked(cache: DataCache) -> None:
    gate = Gate()
    key = Made("a", during=gate)
    loading = Running(load, cache, key)
    gate.reached()
    cache.release(key)
    gate.open()
    assert loading.result() == 0
    assert key.loads == 1


class Dying:
    """Data whose death takes as long as a test wants."""

    def __init__(self, dying: Gate) -> None:
        self.dying = dying
        self.data = bytearray(UNIT)

    def __del__(self) -> None:
        self.dying()


@pytest.mark.parametrize("leave", ["release", "clear", "budget"])
def test_what_is_asked_for_while_it_is_on_its_way_out_is_charged_once_and_whole(
    cache: DataCache, leave: str
) -> None:
    dying = Gate()
    key = Made("a", make=lambda: Dying(dying))
    cache.load(key)
    charged = cache.used
    ways = {"release": (cache.release, key), "clear": (cache.clear,)}
    leaving = Running(*ways.get(leave, (setattr, cache, "budget", 0)))
    dying.reached()
    cache.budget = 6 * UNIT
    again = cache.load(key)  # Python lets it live on
    assert key.loads == 1
    dying.open()
    leaving.result()
    assert cache.load(key) is again
    assert len(again.data) == UNIT
    assert cache.used == charged


def test_closing_during_a_load_lets_it_end(cache: DataCache) -> None:
    gate = Gate()
    key = Made("a", during=gate)
    loading = Running(load, cache, key)
    gate.reached()
    cache.close()
    gate.open()
    assert loading.result() == 0
    assert cache.used == 0


def test_a_budget_that_shrinks_under_a_waiting_request_is_the_one_that_holds(
    cache: DataCache,
) -> None:
    gate, blocked = Gate(), Blocked(cache)

    def hold() -> None:
        with using(cache, Made("held", 4 * UNIT)):
            gate()

    holding = Running(hold)
    gate.reached()
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    cache.budget = 5 * UNIT
    blocked.wait_for(asking)
    gate.open()
    holding.result()
    asking.result()
    assert cache.stats().overcommits == 0
    assert cache.used <= 5 * UNIT


def test_a_budget_that_grows_lets_a_waiting_request_go_on(cache: DataCache) -> None:
    gate, blocked = Gate(), Blocked(cache)

    def hold() -> None:
        with using(cache, Made("held", 4 * UNIT)):
            gate()

    holding = Running(hold)
    gate.reached()
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    cache.budget = 8 * UNIT
    asking.result()
    gate.open()
    holding.result()
    assert cache.stats().overcommits == 0
    assert cache.stats().waits == 1


def test_a_budget_that_shrinks_during_a_load_lets_it_end_and_then_holds(cache: DataCache) -> None:
    gate = Gate()
    key = Made("a", 4 * UNIT, fill=3, during=gate)
    loading = Running(load, cache, key)
    gate.reached()
    cache.budget = 3 * UNIT
    gate.open()
    assert loading.result() == 3
    assert cache.used <= 3 * UNIT
    assert cache.stats().overcommits == 0


def test_a_load_that_takes_less_than_announced_gives_the_rest_to_who_waits(
    cache: DataCache,
) -> None:
    reading, held, blocked = Gate(), Gate(), Blocked(cache)
    small = Made("small", announced=5 * UNIT, during=reading)

    def hold() -> None:
        with using(cache, small):
            held()

    holding = Running(hold)
    reading.reached()
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    reading.open()
    held.reached()
    asking.result()  # the first isn't over yet
    held.open()
    holding.result()
    assert cache.stats().overcommits == 0


def test_what_an_operation_unpins_goes_to_who_waits_before_it_is_over(cache: DataCache) -> None:
    pinned, unpinned, blocked = Gate(), Gate(), Blocked(cache)
    key = Made("a", 4 * UNIT)

    def work() -> None:
        with cache.operation("in steps", workspace=0, room=0) as operation:
            operation.pin([key])
            pinned()
            operation.unpin([key])
            unpinned()

    working = Running(work)
    pinned.reached()
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    pinned.open()
    unpinned.reached()
    asking.result()
    unpinned.open()
    working.result()
    assert cache.stats().overcommits == 0


def test_a_load_that_takes_more_than_announced_is_charged_for_who_waits(cache: DataCache) -> None:
    reading, held, blocked = Gate(), Gate(), Blocked(cache)
    large = Made("large", 5 * UNIT, announced=3 * UNIT, during=reading)

    def hold() -> None:
        with using(cache, large):
            held()

    holding = Running(hold)
    reading.reached()
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    reading.open()
    held.reached()
    assert not asking.done
    held.open()
    holding.result()
    asking.result()
    assert cache.stats().overcommits == 0
    assert cache.stats().peak_bytes <= 6 * UNIT


def test_a_strict_request_waits_for_an_operation_and_not_for_a_user() -> None:
    cache = DataCache(4 * UNIT, strict=True)
    gate, blocked = Gate(), Blocked(cache)

    def work() -> None:
        with using(cache, Made("held", 3 * UNIT)):
            gate()

    working = Running(work)
    gate.reached()
    asking = Running(load, cache, Made("asked", 2 * UNIT))
    blocked.wait_for(asking)
    gate.open()
    working.result()
    assert asking.result() == 0
    pinned_key = Made("pinned", 3 * UNIT)
    with cache.pinned(pinned_key) as pin:
        pin.pin([pinned_key])
        with pytest.raises(BudgetExceededError, match=r"pinned\(\)"):
            Running(load, cache, Made("more", 2 * UNIT)).result()


def test_requests_that_wait_go_on_first_come_first_served(cache: DataCache) -> None:
    gate, blocked = Gate(), Blocked(cache)
    order: list[int] = []

    def hold() -> None:
        with cache.operation("first", workspace=6 * UNIT, room=0):
            gate()

    def ask(number: int) -> None:
        with cache.operation("another", workspace=6 * UNIT, room=0):
            order.append(number)

    holding = Running(hold)
    gate.reached()
    asking = []
    for number in range(5):
        asking.append(Running(ask, number))
        blocked.wait_for(asking[-1])
    gate.open()
    for thread in (holding, *asking):
        thread.result()
    assert order == [0, 1, 2, 3, 4]
    assert cache.stats().overcommits == 0


def test_operations_that_all_want_more_than_is_left_do_not_wait_for_ever(
    cache: DataCache,
) -> None:
    barrier = threading.Barrier(2, timeout=10)

    def ask(number: int) -> None:
        with cache.operation("hold and wait", workspace=0, room=0) as operation:
            operation.pin([Made(f"first {number}", 3 * UNIT)])
            barrier.wait()
            operation.pin([Made(f"second {number}", 2 * UNIT)])

    with pytest.warns(BudgetExceededWarning):
        together(2, ask)
    assert 1 <= cache.stats().overcommits <= 2


def test_operations_that_could_not_both_end_are_not_admitted_together(cache: DataCache) -> None:
    admitted, blocked = Gate(), Blocked(cache)

    def work(name: str, during: Callable[[], None]) -> None:
        with cache.operation(name, workspace=2 * UNIT, room=3 * UNIT) as operation:
            during()
            operation.pin([Made(name, 3 * UNIT)])

    first = Running(work, "first", admitted)
    admitted.reached()
    second = Running(work, "second", lambda: None)
    # There is room for both workspaces, but then for the operands of neither.
    blocked.wait_for(second)
    admitted.open()
    first.result()
    second.result()
    assert cache.stats().overcommits == 0


def test_no_wait_lasts_longer_than_the_limit(cache: DataCache) -> None:
    table_of(cache).wait_limit = 0.05
    gate = Gate()

    def hold() -> None:
        with using(cache, Made("held", 4 * UNIT)):
            gate()  # an operation that never lets go

    holding = Running(hold)
    gate.reached()
    with pytest.warns(BudgetExceededWarning):
        cache.load(Made("asked", 4 * UNIT))
    gate.open()
    holding.result()


def test_an_owner_that_dies_during_a_request_for_it_is_read_again(cache: DataCache) -> None:
    key = Made("a", fill=3)
    view = cache.load(key)[1:]
    cache.release(key)
    table = table_of(cache)
    resurrect = table.resurrect

    def die_first(wanted: Any) -> Any:
        nonlocal view
        view = None  # the last reference goes in the locked section itself
        return resurrect(wanted)

    table.resurrect = die_first  # type: ignore[method-assign]
    assert cache.load(key)[0] == 3
    assert key.loads == 2
    assert cache.used == UNIT


@pytest.mark.parametrize("when", ["before", "while it waits", "while it reads the rest"])
def test_what_dies_at_any_step_of_a_request_for_it_is_right_all_the_same(
    cache: DataCache, when: str
) -> None:
    reading, working, blocked = Gate(), Gate(), Blocked(cache)
    key, rest = Made("a", fill=3), Made("rest", 4 * UNIT, during=reading)
    view = cache.load(key)[1:]
    cache.release(key)

    def hold() -> None:
        with cache.operation("another", workspace=4 * UNIT, room=0):
            working()

    def ask() -> list[int]:
        with using(cache, key, rest) as values:
            return [int(value[0]) for value in values]

    if when == "before":
        del view
    holding = Running(hold)
    working.reached()
    asking = Running(ask)
    blocked.wait_for(asking)
    if when == "while it waits":
        del view
    working.open()
    reading.reached()
    if when == "while it reads the rest":
        del view
    reading.open()
    assert asking.result() == [3, 0]
    holding.result()
    assert key.loads == (2 if when == "before" else 1)
    assert cache.stats().overcommits == 0
    assert cache.used == 5 * UNIT


def test_what_dies_after_the_admission_of_who_plans_to_use_it_is_gone(cache: DataCache) -> None:
    key = Made("a")
    view = cache.load(key)[1:]
    cache.budget = 0
    with cache.operation("later", workspace=0, room=0, order=[key]):
        del view
        assert cache.used == 0


def test_an_operation_that_is_dropped_gives_way_to_who_waits(cache: DataCache) -> None:
    blocked = Blocked(cache)
    dropped = cache.operation("dropped", workspace=4 * UNIT, room=0).__enter__()
    dropped.pin([Made("pinned")])
    asking = Running(load, cache, Made("asked", 4 * UNIT))
    blocked.wait_for(asking)
    del dropped
    asking.result()
    assert cache.stats().overcommits == 0


def test_a_memory_address_that_is_used_again_is_another_owner(cache: DataCache) -> None:
    for turn in range(50):
        key = Made(f"a {turn}", fill=turn)
        view = cache.load(key)[1:]
        with table_of(cache).lock:
            del view  # its death is not noticed yet
        cache.clear()
    assert cache.used == 0


def test_objects_may_die_inside_a_locked_section(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(4)]
    views: list[Any] = [cache.load(key)[1:] for key in keys]
    cache.clear()
    assert cache.used == 4 * UNIT
    table = table_of(cache)

    def work(after: Any) -> None:
        while views:
            view: Any = [views.pop()]
            view.append(view)
        del view
        gc.collect()

    table.section(work)
    assert cache.used == 0


def test_readers_in_a_circle_through_three_threads_get_an_error(cache: DataCache) -> None:
    barrier = threading.Barrier(3, timeout=10)
    keys = [Made(name) for name in "abc"]

    def asks_for(other: Made) -> Callable[[], Any]:
        def ask() -> Any:
            barrier.wait()
            return cache.load(other)

        return ask

    for key, other in zip(keys, [*keys[1:], keys[0]], strict=True):
        key.during = asks_for(other)
    errors = [running.error() for running in [Running(load, cache, key) for key in keys]]
    assert any(isinstance(error, LoadCycleError) for error in errors)
    assert all(error is not None for error in errors)


# Preloading


@pytest.mark.parametrize(
    "wait",
    [
        lambda future: wait([future]),
        lambda future: list(as_completed([future])),
        lambda future: future.exception(),
    ],
    ids=["wait", "as_completed", "exception"],
)
def test_a_reader_that_waits_for_an_executor_to_ask_for_its_own_data_gets_an_error(
    cache: DataCache, wait: Callable[[Any], object]
) -> None:
    key = Made("a")
    errors: list[BaseException | None] = []

    def ask() -> None:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(load, cache, key)
            wait(future)
            errors.append(future.exception())

    key.during = ask
    assert load(cache, key) == 0
    assert isinstance(errors[0], LoadCycleError)


def test_looking_for_circles_keeps_nothing_of_others_alive(cache: DataCache) -> None:
    gate, looked = Gate(), threading.Event()
    slow = Made("slow", during=gate)
    with ThreadPoolExecutor(1) as pool:

        class Data:
            pass

        def task(data: Data) -> Data:
            looked.wait(SOON)
            return Data()

        data = Data()
        alive = weakref.ref(data)
        future = pool.submit(task, data)
        reading = Running(load, cache, slow)
        gate.reached()
        waiting = Running(load, cache, slow)
        with pytest.MonkeyPatch.context() as patch:
            seen = threading.Event()
            look = _operation.waits_for

            def tell(*args: Any) -> bool:
                try:
                    return look(*args)
                finally:
                    seen.set()

            patch.setattr(_operation, "waits_for", tell)
            assert seen.wait(SOON)
        looked.set()
        result = weakref.ref(future.result())
        gate.open()
        assert reading.result() == waiting.result() == 0
        del data, future
        pool.submit(int).result()
        gc.collect()
        assert alive() is None
        assert result() is None


def test_what_a_loop_wants_is_loaded_ahead_of_it(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(3)]
    loop = Loop()
    gates = [Gate() for _ in keys]
    for key, gate in zip(keys, gates, strict=True):
        key.during = gate
    stream = ahead(cache, loop, *keys, npreload=3)
    for gate in gates:
        gate.reached()
    assert all(cache.loading(key) for key in keys)
    for gate in gates:
        gate.open()
    for key in keys:
        cache.load(key)
        stream.done([key])
    stream.close()
    assert not preload_threads()
    assert cache.stats().preloads == 3
    assert [key.loads for key in keys] == [1, 1, 1]


def test_loading_ahead_never_takes_what_is_wanted_sooner(cache: DataCache) -> None:
    keys = [Made(str(i), 2 * UNIT) for i in range(10)]
    loop = Loop()
    stream = ahead(cache, loop, *keys, npreload=10)
    for key in keys:
        cache.load(key)
        stream.done([key])
    stream.close()
    assert [key.loads for key in keys] == [1] * 10
    assert cache.stats().overcommits == 0
    assert cache.stats().peak_bytes <= 6 * UNIT


def test_a_demand_cancels_a_preload_that_nobody_asked_for(cache: DataCache) -> None:
    began, goes_on = Gate(), Gate()

    def in_steps() -> None:
        began()
        goes_on()
        checkpoint()

    unwanted = Made("unwanted", 4 * UNIT, during=in_steps)
    loop = Loop()
    stream = ahead(cache, loop, unwanted)
    began.reached()
    began.open()
    goes_on.reached()
    blocked = Blocked(cache)
    demand = Running(load, cache, Made("wanted", 5 * UNIT))
    blocked.wait_for(demand)
    assert table_of(cache).flights[unwanted].cancelled
    goes_on.open()
    assert demand.result() == 0
    assert cache.lookup(unwanted) is None
    assert cache.stats().overcommits == 0
    stream.close()


def test_a_preload_that_a_demand_has_joined_is_not_cancelled(cache: DataCache) -> None:
    gate = Gate()

    def in_steps() -> None:
        gate()
        checkpoint()

    key = Made("joined", 4 * UNIT, during=in_steps)
    loop = Loop()
    stream = ahead(cache, loop, key)
    gate.reached()
    blocked = Blocked(cache)
    joining = Running(load, cache, key)
    blocked.wait_for(joining)
    other = Running(load, cache, Made("other", 5 * UNIT))
    blocked.wait_for(other)
    stream.close()  # and not by the end of the loop either
    gate.open()
    assert joining.result() == 0
    assert other.result() == 0
    assert key.loads == 1
    assert cache.stats().overcommits == 0


def test_a_demand_reads_a_queued_preload_itself(
    cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "1")
    first, second = Made("first"), Made("second")
    gate = Gate()
    readers: list[int] = []
    first.during = gate
    second.during = lambda: readers.append(threading.get_ident())
    loop = Loop()
    with using(cache, Made("more"), Made("and more")):
        stream = ahead(cache, loop, first, second, npreload=2)
        gate.reached()
        # Only one thread preloads: it is at the gate, and a demand need not wait for it.
        assert cache.load(second) is not None
    assert readers == [threading.get_ident()]
    gate.open()
    stream.close()
    assert second.loads == 1
    assert cache.stats().preloads == 1


def test_a_preload_of_what_a_demand_reads_already_reads_nothing(cache: DataCache) -> None:
    gate = Gate()
    key = Made("a", during=gate)
    loading = Running(load, cache, key)
    gate.reached()
    stream = ahead(cache, Loop(), key)
    assert not table_of(cache).flights[key].prefetch
    gate.open()
    loading.result()
    stream.close()
    assert key.loads == 1
    assert cache.stats().preloads == 0


def test_a_demand_for_what_was_preloaded_reads_nothing(cache: DataCache) -> None:
    key, loop = Made("a"), Loop()
    landed = threading.Event()
    cache.subscribe(lambda event: landed.set())
    stream = ahead(cache, loop, key)
    assert landed.wait(SOON)
    cache.load(key)
    stream.close()
    assert key.loads == 1
    assert cache.lookup(key) is not None
    assert cache.stats().hits == 2
    assert cache.stats().misses == 0


@pytest.mark.parametrize("stops", [True, False], ids=["that stops", "that goes on"])
def test_a_demand_for_a_preload_that_is_cancelled_but_still_read(
    cache: DataCache, stops: bool
) -> None:
    gate, blocked = Gate(), Blocked(cache)

    def in_steps() -> None:
        gate()
        if stops:
            checkpoint()

    key, loop = Made("a", fill=3, during=in_steps), Loop()
    stream = ahead(cache, loop, key)
    gate.reached()
    table = table_of(cache)
    table.section(lambda after: table.close_stream(stream._stream, after))
    assert table.flights[key].cancelled
    asking = Running(load, cache, key)
    blocked.wait_for(asking)
    gate.open()
    assert asking.result() == 3
    assert key.loads == (2 if stops else 1)
    assert cache.lookup(key) is not None


@pytest.mark.parametrize("when", ["queued", "read", "landed"])
def test_who_consumes_a_stream_may_die_at_any_step_of_a_preload(
    cache: DataCache, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "1")
    busy, reading, landed = Gate(), Gate(), threading.Event()

    def in_steps() -> None:
        reading()
        checkpoint()

    key, loop, other = Made("a", during=in_steps), Loop(), Loop()
    cache.subscribe(lambda event: landed.set() if event.name == "a" else None)
    blocker = ahead(cache, other, Made("blocker", during=busy))
    busy.reached()
    stream = ahead(cache, loop, key)
    if when != "queued":
        busy.open()
        reading.reached()
    if when == "landed":
        reading.open()
        assert landed.wait(SOON)
    del loop, stream
    # What follows is the next thing that anybody does.
    assert cache.held() is not None
    assert not any(flight.key is key for flight in table_of(cache).pool.queue)
    reading.open()
    busy.open()
    blocker.close()
    table_of(cache).pool.join_threads(SOON)
    assert cache.lookup(key) is None
    assert cache.used == 0
    assert key.loads == (when != "queued")


def test_a_preload_that_fails_tells_who_asks_for_it(cache: DataCache) -> None:
    gate = Gate()

    def stop_and_fail() -> None:
        gate()
        fail()

    key = Made("bad", during=stop_and_fail)
    loop = Loop()
    stream = ahead(cache, loop, key)
    gate.reached()
    blocked = Blocked(cache)
    asking = Running(load, cache, key)
    blocked.wait_for(asking)
    gate.open()
    assert isinstance(asking.error(), ValueError)
    stream.close()
    assert cache.used == 0


def test_a_loop_that_is_forgotten_costs_nobody_anything(cache: DataCache) -> None:
    loop = Loop()
    keys = [Made(str(i), 2 * UNIT) for i in range(5)]
    done = threading.Event()
    cache.subscribe(lambda event: done.set() if event.name == "1" else None)
    stream = ahead(cache, loop, *keys, npreload=2)
    assert done.wait(10)
    del loop, stream
    cache.load(Made("wanted", 6 * UNIT))
    assert cache.stats().overcommits == 0
    assert cache.used == 6 * UNIT
    assert not table_of(cache).streams
    assert not table_of(cache).schedules


def test_closing_a_loop_gives_back_what_was_not_used(cache: DataCache) -> None:
    loop = Loop()
    used, unused = Made("used"), Made("unused")
    loaded = threading.Semaphore(0)
    cache.subscribe(lambda event: loaded.release())
    stream = ahead(cache, loop, used, unused, npreload=2)
    assert loaded.acquire(timeout=10)
    assert loaded.acquire(timeout=10)
    assert not stream.asked([unused])
    cache.load(used)
    assert stream.asked([used])
    stream.close()
    assert cache.lookup(unused) is None
    assert cache.lookup(used) is not None
    stream.close()


def test_closing_a_loop_stops_its_readers_between_steps(cache: DataCache) -> None:
    gate = Gate()
    finished: list[bool] = []

    def in_steps() -> None:
        gate()
        checkpoint()
        finished.append(True)

    loop = Loop()
    stream = ahead(cache, loop, Made("a", during=in_steps), Made("b"), npreload=1)
    gate.reached()
    table_of(cache).section(lambda after: table_of(cache).close_stream(stream._stream, after))
    gate.open()
    table_of(cache).pool.join_threads(10)
    assert not finished
    assert not preload_threads()
    assert cache.used == 0


def test_two_loops_are_served_in_turn(cache: DataCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "1")
    gate, begun = Gate(), threading.Semaphore(0)
    order: list[str] = []

    def key(name: str) -> Made:
        def note() -> None:
            order.append(name)
            begun.release()

        return Made(name, during=note)

    loops = [Loop(), Loop()]
    blocker = ahead(cache, loops[0], Made("blocker", during=gate))
    gate.reached()
    streams = [ahead(cache, loops[i], *(key(f"{'ab'[i]}{n}") for n in range(2))) for i in (0, 1)]
    gate.open()
    for _ in range(4):
        assert begun.acquire(timeout=10)
    blocker.close()
    for stream in streams:
        stream.close()
    assert sorted(order[:2]) == ["a0", "b0"]


def test_what_is_held_outside_is_not_evicted_and_taken_back_for_ever() -> None:
    # One stream has it evicted for what it wants sooner, which frees nothing; were it taken back
    # for the other, it would be the next victim again, and threads in step would never get on.
    cache = DataCache(2 * UNIT)
    loaded: queue.SimpleQueue[str] = queue.SimpleQueue()
    cache.subscribe(lambda event: loaded.put(event.name) if event.kind == "load" else None)
    held = cache.load(Made("held"))
    sooner, later = Made("sooner"), Made("later")
    loops = [Loop(), Loop()]
    streams = [cache.preloading(loop, 1) for loop in loops]
    streams[1].expect([Made("in between"), later])
    streams[1].want([later])
    assert [loaded.get(timeout=SOON) for _ in range(2)] == ["held", "later"]
    view = cache.lookup(later)[1:]
    streams[0].expect([sooner])
    streams[0].want([sooner])
    for _ in range(20):
        assert sum(holder.nbytes for holder in cache.held()) == 2 * UNIT
    assert cache.stats().evictions <= 2
    del held, view
    cache.held()
    # Once it is dead it is wanted again.
    assert {loaded.get(timeout=SOON) for _ in range(2)} == {"sooner", "later"}
    for stream in streams:
        stream.close()


# Processes


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked child that does ``work``: 0 if it returns, 1 if it raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_during_loads_waits_and_sections_leaves_the_child_a_cache_that_works(
    cache: DataCache,
) -> None:
    cached = Made("cached", fill=5)
    cache.load(cached)
    gate, pinned, blocked = Gate(), Gate(), Blocked(cache)
    reading = Made("reading", 2 * UNIT, fill=6, during=gate)

    def hold() -> None:
        with using(cache, Made("held", 2 * UNIT)):
            pinned()

    threads = [Running(load, cache, reading), Running(hold)]
    gate.reached()
    pinned.reached()
    waiting = Running(load, cache, Made("waiting", 5 * UNIT))
    blocked.wait_for(waiting)

    def work() -> None:
        cache.check()
        table = table_of(cache)
        assert not table.flights
        assert not table.uses
        assert not table.blocked
        assert cache.used <= 3 * UNIT
        reading.during = None
        assert cache.load(reading)[0] == 6
        assert cache.load(Made("large", 6 * UNIT)) is not None
        assert cache.stats().overcommits == 0
        loop = Loop()
        stream = ahead(cache, loop, Made("ahead"))
        stream.close()
        cache.check()

    assert in_child(work) == 0
    gate.open()
    pinned.open()
    for thread in (*threads, waiting):
        thread.result()
    cache.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_reader_that_forks_can_go_on_in_the_child(cache: DataCache) -> None:
    codes: list[int] = []
    second = Made("second", fill=2)
    gate = Gate()

    def read_second() -> None:
        if threading.get_ident() != main:
            gate()  # in the parent a pool thread reads it; the child has none

    def fork() -> None:
        gate.reached()
        codes.append(os.fork())
        gate.open()

    first = Made("first", fill=1, during=fork)
    second.during = read_second
    main = threading.get_ident()
    with using(cache, first, second) as values:
        if codes[0] == 0:
            right = [value[0] for value in values] == [1, 2]
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(codes[0], 0)[1]) == 0


class Announcing:
    """The lock of a table, which tells when somebody asks for it with a limit, as forks do."""

    def __init__(self, lock: Any, asked: Gate) -> None:
        self.lock = lock
        self.asked = asked
        self.release, self._is_owned = lock.release, lock._is_owned

    def acquire(self, timeout: float) -> bool:
        self.asked.open()
        return bool(self.lock.acquire(timeout=timeout))

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_waits_for_the_end_of_a_section(cache: DataCache) -> None:
    cache.load(Made("cached"))
    table, section = table_of(cache), Gate()

    def half(after: Any) -> None:
        table.root.used += UNIT
        section()
        table.root.used -= UNIT

    changing = Running(table.section, half)
    section.reached()
    table.lock = Announcing(table.lock, section)  # type: ignore[assignment]

    def work() -> None:
        assert not table.torn
        cache.check()
        assert cache.load(Made("asked", 4 * UNIT)) is not None

    assert in_child(work) == 0
    changing.result()
