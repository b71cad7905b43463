from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import UNIT, Blocked, Gate, Made, Running, table_of, together, using

from lazycache import cache as caches
from lazycache._buffers import owner_of
from lazycache.cache import DataCache, get_cache, set_budget
from lazycache.errors import (
    BudgetExceededError,
    BudgetExceededWarning,
    CacheClosedError,
    FileChangedError,
    FileChangedWarning,
    LoadCycleError,
    ReadError,
    SizeError,
)
from lazycache.source import Handle, Result, file_key
from lazycache.stats import CacheStats, Event


@pytest.fixture
def cache() -> DataCache:
    return DataCache(6 * UNIT)


def strict(units: float) -> DataCache:
    return DataCache(int(units * UNIT), strict=True)


def bytes_of(fill: int, nbytes: int = UNIT) -> np.ndarray:
    return np.full(nbytes, fill, np.uint8)


# Loading


def test_a_file_is_read_once_and_then_found(cache: DataCache) -> None:
    key = Made("a", fill=7)
    assert cache.lookup(key) is None
    first = cache.load(key)
    assert np.array_equal(first, bytes_of(7))
    assert cache.load(key) is first
    assert cache.lookup(key) is first
    assert key.loads == 1
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.loads, stats.load_failures) == (1, 2, 1, 0)
    assert (stats.loaded_bytes, stats.hit_rate) == (UNIT, 2 / 3)


def test_sixteen_threads_on_four_files_read_four_times(cache: DataCache) -> None:
    keys = [Made(str(i), fill=i) for i in range(4)]

    def ask(number: int) -> None:
        for turn in range(20):
            key = keys[(number + turn) % 4]
            assert np.array_equal(cache.load(key), bytes_of(key.fill))

    together(16, ask)
    assert [key.loads for key in keys] == [1, 1, 1, 1]
    assert cache.stats().loads == 4


def test_four_files_are_read_at_once_by_four_threads(cache: DataCache) -> None:
    barrier = threading.Barrier(4, timeout=10)
    keys = [Made(str(i), fill=i, during=barrier.wait) for i in range(4)]
    values = together(4, lambda i: cache.load(keys[i]))
    assert [value[0] for value in values] == [0, 1, 2, 3]


def test_several_files_of_one_request_are_read_at_once(
    cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "3")
    barrier = threading.Barrier(3, timeout=10)
    keys = [Made(str(i), fill=i, during=barrier.wait) for i in range(3)]
    with using(cache, *keys) as values:
        assert [value[0] for value in values] == [0, 1, 2]


def test_a_load_is_charged_before_it_begins_and_settled_after(cache: DataCache) -> None:
    seen = []
    key = Made("a", peak=3 * UNIT, during=lambda: seen.append((cache.used, cache.held())))
    cache.load(key)
    [(used, [holder])] = seen
    assert used == 3 * UNIT
    assert (holder.name, holder.nbytes, holder.reason) == ("a", 3 * UNIT, "reading")
    assert cache.used == UNIT
    assert cache.stats().peak_bytes == 3 * UNIT


def test_an_error_reaches_everyone_who_asked_and_is_not_kept(cache: DataCache) -> None:
    gate = Gate()

    def fail() -> None:
        gate()
        raise OSError(5, "the disk is gone")

    key = Made("broken.nii", during=fail)
    blocked = Blocked(cache)
    reader = Running(cache.load, key)
    gate.reached()
    joiners = [Running(cache.load, key) for _ in range(4)]
    blocked.wait_for(*joiners)
    gate.open()
    errors = [thread.error() for thread in (reader, *joiners)]
    assert all(type(error) is OSError for error in errors)
    assert len({id(error) for error in errors}) == 5  # each with a traceback of its own
    for error in errors:
        assert "the disk is gone" in str(error)
        assert any("broken.nii" in note for note in error.__notes__)
    assert key.loads == 1
    assert cache.used == 0
    assert cache.stats().load_failures == 1
    key.during = None
    assert cache.load(key) is not None
    assert key.loads == 2


def test_an_error_that_cannot_be_copied_reaches_everyone_too(cache: DataCache) -> None:
    class StrangeError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("strange")

    gate = Gate()

    def fail() -> None:
        gate()
        raise StrangeError(1, 2)

    key = Made("a", during=fail)
    blocked = Blocked(cache)
    first = Running(cache.load, key)
    gate.reached()
    second = Running(cache.load, key)
    blocked.wait_for(second)
    gate.open()
    assert isinstance(first.error(), StrangeError)
    assert isinstance(second.error(), StrangeError)


def test_one_failing_file_of_several_leaves_none_pinned(cache: DataCache) -> None:
    good = [Made("a"), Made("c")]

    def fail() -> None:
        raise ValueError("bad header")

    bad = Made("b", during=fail)
    with (
        cache.operation("a test", workspace=0, room=0) as operation,
        pytest.raises(ValueError, match="bad header"),
    ):
        operation.pin([good[0], bad, good[1]])
    assert {holder.reason for holder in cache.held()} <= {"cached", "reading"}
    with using(cache, *good):
        cache.check()


def test_a_failure_leaves_nothing_that_only_the_garbage_collector_would_free(
    cache: DataCache,
) -> None:
    class Thing:
        pass

    def fail() -> None:
        raise ValueError("bad header")

    broken, large = Made("a", during=fail), Made("b", 7 * UNIT)
    things: list[weakref.ref[Thing]] = []

    def ask(of: DataCache, key: Made) -> None:
        thing = Thing()
        things.append(weakref.ref(thing))
        of.load(key)

    gc.disable()
    try:
        for of, key in ((cache, broken), (strict(6), large)):
            try:
                ask(of, key)
            except (ValueError, BudgetExceededError):
                pass
            else:
                pytest.fail("it did not raise")
        assert [thing() for thing in things] == [None, None]
    finally:
        gc.enable()


def test_a_reader_that_asks_for_its_own_file_gets_an_error(cache: DataCache) -> None:
    key = Made("a.nii")
    key.during = lambda: cache.load(key)
    with pytest.raises(LoadCycleError, match=re.escape("a.nii")):
        cache.load(key)
    assert cache.used == 0
    key.during = None
    assert cache.load(key) is not None


def test_readers_that_ask_for_each_other_in_a_circle_get_an_error(cache: DataCache) -> None:
    barrier = threading.Barrier(2, timeout=10)
    a, b = Made("a"), Made("b")

    def ask_for(other: Made) -> Any:
        barrier.wait()
        return cache.load(other)

    a.during = lambda: ask_for(b)
    b.during = lambda: ask_for(a)
    errors = [thread.error() for thread in (Running(cache.load, a), Running(cache.load, b))]
    assert any(isinstance(error, LoadCycleError) for error in errors)
    assert all(error is not None for error in errors)
    assert cache.used == 0


def test_a_reader_may_use_the_cache_for_other_files(cache: DataCache) -> None:
    source = Made("source", fill=3)
    derived = Made("derived")
    derived.make = lambda: cache.load(source) * 2
    assert cache.load(derived)[0] == 6
    assert cache.used == 2 * UNIT


def test_a_reader_that_returns_nothing_is_an_error_that_names_it(
    cache: DataCache, tmp_path: Path
) -> None:
    path = tmp_path / "a.odd"
    path.write_bytes(b"x")
    key = file_key(path, reader=lambda filename: None)
    with pytest.raises(ReadError, match=r"a\.odd.*None"):
        cache.load(key)
    assert cache.used == 0


def test_a_reader_that_announced_too_little_is_charged_in_full_and_logged(
    cache: DataCache, caplog: pytest.LogCaptureFixture
) -> None:
    others = [Made(f"other {i}") for i in range(5)]
    for other in others:
        cache.load(other)
    with caplog.at_level(logging.WARNING, "lazycache"):
        cache.load(Made("liar.nii", 4 * UNIT, announced=UNIT))
    assert cache.used <= cache.budget
    assert cache.lookup(others[-1]) is not None
    assert "liar.nii" in caplog.text
    assert "'Made'" in caplog.text


def test_a_reader_that_announced_too_much_is_settled_to_the_truth(cache: DataCache) -> None:
    cache.load(Made("liar", UNIT, announced=5 * UNIT))
    assert cache.used == UNIT


def test_the_log_of_a_lying_reader_is_written_without_the_lock(cache: DataCache) -> None:
    class Asking(logging.Handler):
        found: list[Any] = []  # noqa: RUF012 - one handler, one test

        def emit(self, record: logging.LogRecord) -> None:
            self.found.append(cache.held())

    handler = Asking()
    logging.getLogger("lazycache").addHandler(handler)
    try:
        cache.load(Made("liar", 2 * UNIT, announced=UNIT))
    finally:
        logging.getLogger("lazycache").removeHandler(handler)
    assert len(handler.found) == 1


# Memory


def test_the_least_recently_used_goes_first(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(7)]
    for key in keys[:6]:
        cache.load(key)
    cache.load(keys[0])
    cache.load(keys[6])
    assert [cache.lookup(key) is None for key in keys] == [False, True] + [False] * 5
    assert cache.stats().evictions == 1
    assert cache.stats().evicted_bytes == UNIT


def test_what_no_proxy_refers_to_goes_before_what_one_does(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(7)]
    handle = Handle(keys[0])
    for key in keys:
        cache.load(key)
    assert cache.lookup(keys[0]) is not None
    assert cache.lookup(keys[1]) is None
    del handle
    assert cache.used == 6 * UNIT  # takes note of the death
    cache.load(keys[1])
    cache.load(Made("more", 5 * UNIT))
    assert cache.lookup(keys[0]) is None


def test_data_go_at_once_when_every_proxy_used_up_its_operations(cache: DataCache) -> None:
    key = Made("a")
    once, twice = Handle(key, 1), Handle(key, 2)
    cache.load(key)
    cache.used_up(once, 1)
    cache.used_up(twice, 1)
    assert cache.lookup(key) is not None
    cache.used_up(twice, 1)
    assert cache.lookup(key) is None
    assert cache.used == 0
    assert cache.stats().releases == 1
    cache.load(key)  # loaded again: the counts begin anew
    assert (once.left, twice.left) == (1, 2)
    assert cache.lookup(key) is not None


def test_data_go_when_the_last_proxy_that_still_wanted_them_dies(cache: DataCache) -> None:
    key = Made("a")
    used_up, wanting = Handle(key, 1), Handle(key)
    cache.load(key)
    cache.used_up(used_up, 1)
    assert cache.used == UNIT
    del wanting
    assert cache.used == 0


def test_what_is_pinned_is_never_a_victim(cache: DataCache) -> None:
    pinned = Made("pinned", fill=9)
    with using(cache, pinned) as [value]:
        for i in range(20):
            cache.load(Made(str(i)))
        assert cache.lookup(pinned) is value
    assert cache.stats().overcommits == 0


def test_what_is_held_outside_stays_charged_and_comes_back_without_a_read(
    cache: DataCache,
) -> None:
    key = Made("a", 4 * UNIT, fill=5)
    piece = cache.load(key)[10:20]
    cache.load(Made("b", 2 * UNIT))
    cache.load(Made("c", 2 * UNIT))
    assert cache.lookup(key) is None
    assert cache.used == 6 * UNIT  # "b" really went
    assert cache.stats().evictions == 2
    assert {(h.name, h.reason) for h in cache.held()} == {("a", "held outside"), ("c", "cached")}
    again = cache.load(key)
    assert owner_of(again) is owner_of(piece)
    assert np.array_equal(again, bytes_of(5, 4 * UNIT))
    assert not again.flags.writeable
    assert key.loads == 1


def test_bytes_come_back_when_the_last_view_dies(cache: DataCache) -> None:
    key = Made("a", 4 * UNIT)
    view = cache.load(key)[::2]
    cache.release(key)
    assert cache.used == 4 * UNIT
    del view
    assert cache.used == 0
    assert not cache.holds(key)


def test_a_value_of_several_arrays_that_is_taken_back_can_be_evicted_again() -> None:
    class Several:
        def __init__(self) -> None:
            self.parts = [np.zeros(2 * UNIT, np.uint8), np.zeros(UNIT, np.uint8)]

    cache = DataCache(6 * UNIT, strict=True)
    key = Made("several", 4 * UNIT, make=Several)
    value = cache.load(key)
    cache.release(key)
    assert cache.load(key) is value
    del value
    cache.load(Made("another", 5 * UNIT))
    assert (key.loads, cache.used) == (1, 5 * UNIT)


def test_a_value_without_weak_references_counts_as_free_when_it_is_dropped(
    cache: DataCache,
) -> None:
    key = Made("a", make=lambda: (b"x" * UNIT,), announced=2 * UNIT)
    held = cache.load(key)
    nbytes = cache.used
    assert nbytes > UNIT
    cache.clear()
    assert cache.used == 0
    assert cache.stats().untracked_bytes == nbytes
    assert cache.load(key) == held
    assert key.loads == 2


def test_a_smaller_budget_evicts_at_once(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(6)]
    for key in keys:
        cache.load(key)
    cache.budget = 2 * UNIT
    assert cache.used == 2 * UNIT
    assert [cache.lookup(key) is not None for key in keys] == [False] * 4 + [True] * 2
    cache.budget = "1 MiB"
    assert cache.budget == 1 << 20


@pytest.mark.parametrize("budget", ["4 bananas", "-1GiB", "0.8x", "", -5, 1.5, None])
def test_a_budget_that_is_none_is_refused_and_changes_nothing(
    cache: DataCache, budget: Any
) -> None:
    with pytest.raises(SizeError):
        cache.budget = budget
    assert cache.budget == 6 * UNIT
    with pytest.raises(SizeError):
        DataCache(budget)


def test_too_much_at_once_is_counted_each_time_and_warned_of_once(cache: DataCache) -> None:
    with pytest.warns(BudgetExceededWarning, match=r"reading a.*5\.86 KiB"):
        cache.load(Made("a", 7 * UNIT))
    cache.load(Made("b", 8 * UNIT))
    assert cache.stats().overcommits == 2
    assert cache.stats().peak_bytes == 8 * UNIT


def test_a_warning_that_is_an_error_leaves_the_cache_whole(cache: DataCache) -> None:
    key = Made("a", 7 * UNIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BudgetExceededWarning):
            cache.load(key)
    cache.check()
    assert cache.load(key) is not None


def test_a_strict_cache_says_what_is_held_before_it_reads() -> None:
    cache = strict(20)
    held = cache.load(Made("held.nii", 3 * UNIT))[:2]
    cache.clear()
    constant = cache.adopt(bytes_of(1, 2 * UNIT), "constant")
    result = Result("sum")
    wanted = Made("wanted.nii", 9 * UNIT)
    small = Made("small.nii", 500)
    pinned = Made("pinned.nii", 5 * UNIT)
    with (
        cache.operation("adding", workspace=4500, room=0) as operation,
        cache.pinned(pinned) as pin,
        cache.pinned(small) as small_pin,
    ):
        pin.pin([pinned])
        small_pin.pin([small])
        operation.keep(result, bytes_of(2, UNIT), cost=float("inf"))
        with pytest.raises(BudgetExceededError) as caught:
            cache.load(wanted)
    assert isinstance(caught.value, MemoryError)
    message = str(caught.value)
    assert "reading wanted.nii needs 8.79 KiB" in message
    told = [text for text in re.split(r"Held are |; |\. Set", message) if text.endswith(")")]
    assert told == [
        "pinned.nii: 4.88 KiB (pinned())",
        "adding: 3.42 KiB (operation)",
        "held.nii: 2.93 KiB (held outside)",
        "constant: 1.95 KiB (memory)",
        "sum: 1000 B (result)",
    ]
    assert wanted.loads == 0
    assert cache.stats().overcommits == 0
    del held, constant


def test_an_operation_in_a_strict_cache_is_refused_before_it_reads_anything() -> None:
    cache = strict(4)
    keys = [Made("a", 2 * UNIT), Made("b", 2 * UNIT)]
    with (
        pytest.raises(BudgetExceededError, match="adding needs"),
        cache.operation("adding", workspace=UNIT, room=4 * UNIT, order=keys),
    ):
        pytest.fail("it was admitted")
    assert [key.loads for key in keys] == [0, 0]
    assert cache.used == 0


def test_operands_that_users_pinned_take_no_more_room() -> None:
    cache = strict(6)
    key = Made("a", 4 * UNIT)
    with cache.pinned(key) as first, cache.pinned(key) as second:
        first.pin([key])
        second.pin([key])
        with cache.operation("mean", workspace=UNIT, room=4 * UNIT, order=[key]) as operation:
            operation.pin([key])
        with cache.operation("other", workspace=0, room=2 * UNIT) as operation:
            operation.pin([Made("b", 2 * UNIT)])


def test_operands_that_are_held_outside_take_no_more_room() -> None:
    cache = strict(6)
    key = Made("a", 4 * UNIT)
    view = cache.load(key)[1:]
    cache.release(key)
    with cache.operation("mean", workspace=UNIT, room=4 * UNIT, order=[key]) as operation:
        operation.pin([key])
    assert key.loads == 1
    del view


def test_a_held_operand_that_must_be_evicted_for_the_workspace_ends_the_search(
    cache: DataCache,
) -> None:
    key = Made("a", 4 * UNIT)
    view = cache.load(key)[1:]
    with (
        pytest.warns(BudgetExceededWarning),
        cache.operation("mean", workspace=3 * UNIT, room=4 * UNIT, order=[key]) as operation,
    ):
        operation.pin([key])
    assert key.loads == 1
    assert cache.stats().evictions <= 2
    del view


def test_what_users_hold_is_never_waited_for(cache: DataCache) -> None:
    held = [cache.load(Made(f"held {i}"))[1:] for i in range(6)]
    with pytest.warns(BudgetExceededWarning):
        Running(cache.load, Made("a")).result()
    assert cache.stats().overcommits == 1
    del held


def test_garbage_is_collected_before_the_budget_is_exceeded(cache: DataCache) -> None:
    cycle: list[Any] = [cache.load(Made("a", 6 * UNIT))[1:]]
    cycle.append(cycle)
    del cycle
    cache.load(Made("b", 6 * UNIT))
    assert cache.stats().overcommits == 0
    assert cache.used == 6 * UNIT


def test_a_value_that_dies_slowly_is_waited_for(cache: DataCache) -> None:
    gate = Gate()

    class Slow:
        def __init__(self) -> None:
            self.data = bytes_of(0, 5 * UNIT)

        def __del__(self) -> None:
            gate()

    cache.load(Made("slow", make=Slow, announced=5 * UNIT + 500))
    blocked = Blocked(cache)
    freeing = Running(cache.clear)
    gate.reached()
    waiting = Running(cache.load, Made("b", 2 * UNIT))
    blocked.wait_for(waiting)
    gate.open()
    freeing.result()
    waiting.result()
    assert cache.stats().overcommits == 0
    assert cache.stats().waits >= 1


def test_what_was_dropped_leaves_no_trace_in_the_bookkeeping(cache: DataCache) -> None:
    key = Made("a")
    handle = Handle(key, 1)
    for _ in range(200):
        cache.load(key)
        cache.used_up(handle, 1)
    table = table_of(cache)
    assert len(table.garbage) <= 2
    view = cache.load(key)[1:]
    for _ in range(200):
        cache.release(key)
        cache.load(key)
    assert len(next(iter(table.accounts.owners.values())).ghosts) <= 1
    assert key.watchers.count(table.dead) == 1
    del view


def test_headroom_is_what_a_load_could_take(cache: DataCache) -> None:
    assert cache.headroom == 6 * UNIT
    cache.load(Made("a", 2 * UNIT))
    assert cache.headroom == 4 * UNIT
    with DataCache("1 TiB") as rich:
        assert rich.headroom < 1 << 40  # no more than the machine has


def test_what_is_held_outside_is_no_victim_to_stop_at(cache: DataCache) -> None:
    held = cache.load(Made("held", 3 * UNIT))[1:]
    for i in range(3):
        cache.load(Made(str(i)))
    constant = cache.adopt(bytes_of(1), "mask")
    assert cache.used == 6 * UNIT
    cache.budget = 5 * UNIT
    assert cache.used == 5 * UNIT
    assert cache.stats().overcommits == 0
    with pytest.warns(BudgetExceededWarning, match="mask"):
        another = cache.adopt(bytes_of(1, 2 * UNIT), "mask")
    assert cache.used == 6 * UNIT
    assert cache.stats().overcommits == 1
    del held, constant, another


def test_evicting_for_a_scope_spares_what_encloses_it(cache: DataCache) -> None:
    inner = DataCache(2 * UNIT)
    inner._bind(cache)
    for i in range(4):
        cache.load(Made(f"outer {i}"))
    for i in range(2):
        inner.load(Made(f"inner {i}"))
    constant = inner.adopt(bytes_of(1), "mask")
    assert (inner.used, cache.used) == (2 * UNIT, 6 * UNIT)
    assert cache.stats().evictions == 1
    del constant


# Operations and results


def test_the_use_that_is_farthest_away_goes_first(cache: DataCache) -> None:
    keys = [Made(str(i), 2 * UNIT) for i in range(4)]
    handles = [Handle(key) for key in keys]
    order = [keys[i] for i in (0, 1, 2, 0, 1, 3, 0, 1, 2)]
    with cache.operation("passes", workspace=0, room=2 * UNIT, order=order) as operation:
        for key in order:
            operation.pin([key])
            operation.unpin([key])
    # Least recently used would have read 0 and 1 three times each.
    assert sum(key.loads for key in keys) == 5
    del handles


def test_a_second_pass_knows_of_what_the_first_one_left(cache: DataCache) -> None:
    keys = [Made(str(i)) for i in range(8)]
    handles = [Handle(key) for key in keys]
    for _ in range(3):
        with cache.operation("a pass", workspace=0, room=UNIT, order=keys) as operation:
            for key in keys:
                operation.pin([key])
                operation.unpin([key])
    assert sum(key.loads for key in keys) < 8 + 2 * 6
    del handles


def test_a_request_that_has_to_begin_again_uses_up_no_planned_use(cache: DataCache) -> None:
    a, b = Made("a"), Made("b", 3 * UNIT)
    for i in range(4):
        cache.load(Made(f"other {i}"))
    cache.load(a)
    with cache.operation("a test", workspace=0, room=0, order=[a, a]) as operation:
        operation.pin([a, b])  # evicts first
        assert cache.stats().evictions > 0
        use = operation._use
        assert use.schedule is not None
        first = use.schedule.next_use(a)
        operation.unpin([a, b])
        assert use.schedule.next_use(a) == (first or 0) + 1


def test_a_header_that_cannot_be_read_leaves_what_was_found_evictable(cache: DataCache) -> None:
    class Unreadable(Made):
        def estimate(self) -> tuple[int, int]:
            raise ReadError("bad.nii: no header")

    held_key = Made("a")
    held = cache.load(held_key)[1:]
    cache.release(held_key)
    with (
        cache.operation("a test", workspace=0, room=0) as operation,
        pytest.raises(ReadError),
    ):
        operation.pin([held_key, Unreadable("bad.nii")])
    cache.check()
    del held


def test_pins_are_counted(cache: DataCache) -> None:
    key = Made("a", 6 * UNIT)
    with cache.operation("a test", workspace=0, room=0) as operation:
        first, second = operation.pin([key, key])
        assert first is second
        operation.pin([key])
        operation.unpin([key])
        cache.clear()
        assert cache.lookup(key) is first
        operation.unpin([key])
        cache.clear()
        assert cache.lookup(key) is None


def test_a_result_is_charged_until_it_dies_and_read_only(cache: DataCache) -> None:
    result = Result("sum")
    with cache.operation("adding", workspace=3 * UNIT, room=0) as operation:
        assert cache.used == 3 * UNIT
        value = operation.keep(result, bytes_of(4, 2 * UNIT), cost=1)
        assert cache.used == 3 * UNIT
    assert cache.used == 2 * UNIT
    assert result.value is value
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        value.flags.writeable = True
    del value, result
    assert cache.used == 0


def test_results_go_after_every_file_the_cheapest_first(cache: DataCache) -> None:
    results = {cost: Result(f"cost {cost}") for cost in (2.0, 1.0, 3.0, float("inf"))}
    with cache.operation("adding", workspace=4 * UNIT, room=0) as operation:
        for cost, result in results.items():
            operation.keep(result, bytes_of(0), cost)
    files = [Made("a"), Made("b")]
    for key in files:
        cache.load(key)
    told: list[str] = []
    cache.subscribe(lambda event: told.append(event.name) if event.kind == "evict" else None)
    cache.budget = 0
    assert told == ["a", "b", "cost 1.0", "cost 2.0", "cost 3.0"]
    assert [result.value is None for result in results.values()] == [True, True, True, False]
    assert cache.used == UNIT


def test_a_result_that_was_evicted_but_is_held_is_handed_back(cache: DataCache) -> None:
    result = Result("sum")
    with cache.operation("adding", workspace=UNIT, room=0) as operation:
        piece = operation.keep(result, bytes_of(4), cost=1)[5:7]
    cache.clear()
    assert cache.used == UNIT
    assert np.array_equal(result.value, bytes_of(4))
    del piece
    assert result.value is None
    assert cache.used == 0


def test_data_made_in_memory_are_charged_until_they_die(cache: DataCache) -> None:
    data = [cache.load(Made(str(i))) is None for i in range(6)]
    assert not any(data)
    constant = cache.adopt(bytes_of(1, 2 * UNIT), "mask")
    assert cache.used == 6 * UNIT
    assert not constant.flags.writeable
    cache.clear()
    assert cache.used == 2 * UNIT
    with pytest.warns(BudgetExceededWarning, match="mask"):
        more = cache.adopt(bytes_of(1, 5 * UNIT), "mask 2")
    assert cache.adopt(5, "a number") == 5
    del constant, more
    assert cache.used == 0


# Files that change


def save(path: Path, fill: int, size: int = UNIT) -> None:
    """Write anew, with a time that differs."""
    np.save(path, bytes_of(fill, size))
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + fill * 1_000_000))


def test_a_file_that_changed_is_warned_of_and_read_again(cache: DataCache, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    save(path, 1)
    key = file_key(path)
    old = cache.load(key)
    cache.verify([key])
    assert cache.lookup(key) is old
    save(path, 2)
    with pytest.warns(FileChangedWarning, match=r"a\.npy"):
        cache.verify([key])
    assert cache.lookup(key) is None
    assert cache.load(key)[0] == 2
    assert old[0] == 1


def test_a_changed_file_in_use_stays_for_its_user_and_is_read_anew_for_others(
    cache: DataCache, tmp_path: Path
) -> None:
    path = tmp_path / "a.npy"
    save(path, 1)
    key = file_key(path)
    with cache.operation("a plan", workspace=0, room=0) as operation:
        [old] = operation.pin([key])
        save(path, 2)
        with pytest.warns(FileChangedWarning):
            cache.verify([key])
        assert Running(cache.load, key).result()[0] == 2
        operation.pin([key])
        operation.unpin([key])
        assert old[0] == 1
        cache.check()
    del old
    cache.check()
    assert cache.lookup(key)[0] == 2
    handle = Handle(key, 1)
    cache.used_up(handle, 1)  # the new entry still hears of its handles
    assert cache.used == 0


def test_a_file_that_changes_between_its_header_and_its_data_is_an_error(
    cache: DataCache, tmp_path: Path
) -> None:
    path = tmp_path / "a.npy"
    save(path, 1)
    key = file_key(path)
    with cache.operation("a plan", workspace=0, room=UNIT, order=[key]) as operation:
        save(path, 2)
        with pytest.raises(FileChangedError, match=r"a\.npy"):
            operation.pin([key])
    assert cache.load(key)[0] == 2


def test_a_file_that_changes_while_it_is_read_is_an_error(cache: DataCache, tmp_path: Path) -> None:
    path = tmp_path / "a.odd"
    path.write_bytes(b"first")

    def read(filename: str) -> Any:
        data = np.frombuffer(Path(filename).read_bytes(), np.uint8).copy()
        Path(filename).write_bytes(b"second time")
        return data

    with pytest.raises(FileChangedError, match=r"a\.odd"):
        cache.load(file_key(path, reader=read))
    assert cache.used == 0


# Events, signals, closing


def test_an_error_in_a_subscriber_is_logged(
    cache: DataCache, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("a bad guest")

    told: list[str] = []
    cache.subscribe(fail)
    cache.subscribe(lambda event: told.append(event.kind))
    with caplog.at_level(logging.ERROR, "lazycache"):
        assert cache.load(Made("a")) is not None
    assert "a bad guest" in caplog.text
    assert told == ["load"]


def test_events_tell_what_happened_and_may_call_back_in(cache: DataCache) -> None:
    told: list[tuple[str, str, int]] = []
    used: list[int] = []

    def listen(event: Event) -> None:
        told.append((event.kind, event.name, event.nbytes))
        used.append(cache.used)
        cache.held()

    unsubscribe = cache.subscribe(listen)
    key = Made("a", 4 * UNIT)
    cache.load(key)
    cache.load(Made("b", 3 * UNIT))
    cache.release(key)
    with using(cache, key):
        cache.release(key)  # in use: nothing happens
    unsubscribe()
    unsubscribe()
    cache.clear()
    assert told == [
        ("load", "a", 4 * UNIT),
        ("evict", "a", 4 * UNIT),
        ("load", "b", 3 * UNIT),
        ("evict", "b", 3 * UNIT),
        ("load", "a", 4 * UNIT),
    ]
    assert len(used) == len(told)


def test_a_signal_handler_inside_a_section_may_ask_for_stats(cache: DataCache) -> None:
    view = cache.load(Made("a"))[1:]
    cache.clear()
    answers: list[tuple[CacheStats, int, str]] = []

    def handler(number: int, frame: Any) -> None:
        answers.append((cache.stats(), cache.used, repr(cache)))

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with table_of(cache).lock:
            del view  # the news of its death wait to be read
            signal.raise_signal(signal.SIGUSR1)
            assert len(answers) == 1
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert answers[0][0].loads == 1
    assert cache.used == 0


def test_a_closed_cache_gives_back_what_it_cached_and_refuses(cache: DataCache) -> None:
    key = Made("a", 2 * UNIT)
    view = cache.load(key)[1:]
    cache.load(Made("b"))
    with using(cache, other := Made("c")):
        cache.close()
        assert cache.closed
        assert cache.used == 3 * UNIT
    assert cache.lookup(other) is None
    assert cache.used == 2 * UNIT
    cache.close()
    with pytest.raises(CacheClosedError):
        cache.load(key)
    with pytest.raises(CacheClosedError), cache:
        pass
    del view
    assert cache.used == 0


def test_stats_can_be_subtracted(cache: DataCache) -> None:
    assert DataCache(1).stats() == CacheStats()
    cache.load(Made("a"))
    before = cache.stats()
    cache.load(Made("b", 2 * UNIT))
    during = cache.stats() - before
    assert (during.loads, during.loaded_bytes, during.peak_bytes) == (1, 2 * UNIT, 3 * UNIT)


def test_the_global_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYCACHE_BUDGET", "3 MiB")
    monkeypatch.setenv("LAZYCACHE_STRICT", "yes")
    cache = get_cache()
    assert (cache.budget, cache.strict) == (3 << 20, True)
    set_budget("5 MiB")
    assert get_cache() is cache
    assert cache.budget == 5 << 20
    with cache:  # closes it: a new one takes its place
        assert get_cache() is cache
    assert get_cache() is not cache
    assert get_cache() is caches._global


def test_a_cache_nobody_used_says_so() -> None:
    cache = DataCache("2 MiB")
    assert repr(cache) == "<DataCache of 2 MiB, 0 B used>"
    assert cache.lookup(Made("a")) is None
    assert not cache.holds(Made("a"))
    assert not cache.loading(Made("a"))


def test_loading_is_true_during_a_load_only(cache: DataCache) -> None:
    key = Made("a")
    seen: list[bool] = []
    key.during = lambda: seen.append(cache.loading(key))
    cache.load(key)
    assert seen == [True]
    assert not cache.loading(key)
    assert cache.holds(key)


def test_a_cache_that_is_dropped_gives_its_data_back_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        cache = DataCache(6 * UNIT)
        key = Made("a")
        seen = weakref.ref(owner_of(cache.load(key)))
        del cache
        assert seen() is None
    finally:
        gc.enable()


def test_what_is_asked_for_after_its_last_planned_use_is_no_first_victim() -> None:
    cache = DataCache(3 * UNIT)
    keys = [Made(str(number)) for number in range(5)]
    handles = [Handle(key) for key in keys]
    with cache.operation("a plan", workspace=0, room=UNIT, order=keys[:2]) as operation:
        for key in keys[:2]:
            operation.pin([key])
            operation.unpin([key])
    cache.load(keys[2])
    cache.load(keys[0])
    cache.load(keys[3])
    cache.load(keys[4])
    assert [key.name for key in keys if cache.holds(key)] == ["0", "3", "4"]
    assert keys[0].loads == 1
    assert handles
