"""Everyone gets on: loops beside loops, demands beside loads ahead, the large beside the small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SOON, UNIT, Blocked, Gate, Made, Running, preload_threads, together, using

import lazycache as lc
from lazycache import DataCache, LazyReadData, PreloadIterator, PreloadList
from lazycache.readers.base import Probe

VOLUME = 1 << 12


class Told:
    """A reader that tells which thread reads what, in order; ``at`` may stop a file's reading."""

    name = "told"

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.asked: list[int] = []
        self.at: dict[int, Callable[[], Any]] = {}

    def can_read(self, path: str) -> bool:
        return path.endswith(".raw")

    def probe(self, path: str) -> Probe:
        return Probe("raw", (VOLUME,), np.dtype(np.uint8), VOLUME, VOLUME, (path,))

    def read(self, path: str) -> Any:
        number = int(Path(path).stem)
        early = threading.current_thread() in preload_threads()
        (self.ahead if early else self.asked).append(number)
        self.at.get(number, int)()
        return np.full(VOLUME, number, np.uint8)

    def reads(self) -> list[int]:
        return sorted(self.ahead + self.asked)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def volumes(tmp_path: Path, told: Told) -> list[LazyReadData]:
    paths = [tmp_path / f"{number:03}.raw" for number in range(120)]
    for path in paths:
        path.touch()
    return [LazyReadData(path, reader=told) for path in paths]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "2")


def first(volume: LazyReadData) -> int:
    return int(volume.data[0])


def look_at_two_loops(cache: DataCache, told: Told) -> None:
    stats = cache.stats()
    assert stats.overcommits == 0
    # Nothing is read again but what was stopped for the sake of a demand, and what the first loop
    # had ahead when the second began.
    assert sorted(set(told.reads())) == list(range(80))
    assert len(told.reads()) <= 80 + stats.cancelled + 3
    mine = sum(number < 40 for number in told.ahead)
    others = len(told.ahead) - mine
    assert len(told.ahead) > 20
    assert max(mine, others) <= 2 * min(mine, others)


# Loops beside loops


@pytest.mark.parametrize("room", [3, 4, 6, 10])
def test_two_loops_in_step_get_as_many_loads_ahead(
    volumes: list[LazyReadData], told: Told, room: int
) -> None:
    with DataCache(room * VOLUME) as cache:
        left, right = PreloadList(volumes[:40], 3), PreloadList(volumes[40:80], 3)
        for one, other in zip(left, right, strict=True):
            assert first(one) + 40 == first(other)
    look_at_two_loops(cache, told)


@pytest.mark.parametrize("room", [4, 10])
def test_two_threads_in_step_get_as_many_loads_ahead(
    volumes: list[LazyReadData], told: Told, room: int
) -> None:
    barrier = threading.Barrier(2)
    with DataCache(room * VOLUME) as cache:

        def loop(number: int) -> None:
            mine = volumes[40 * number :][:40]
            for volume in PreloadIterator([LazyReadData(v, cache=cache) for v in mine], 3):
                first(volume)
                barrier.wait(SOON)

        together(2, loop)
    look_at_two_loops(cache, told)


def test_nested_loops_read_the_outer_files_once(volumes: list[LazyReadData], told: Told) -> None:
    with DataCache(5 * VOLUME) as cache:
        seen = [
            (first(one), first(other))
            for one in PreloadList(volumes[:6], 2)
            for other in PreloadList(volumes[6:14], 2)
        ]
        assert cache.stats().overcommits == 0
    assert seen == [(one, other) for one in range(6) for other in range(6, 14)]
    assert len([number for number in told.reads() if number < 6]) <= 2 * 6


def test_a_loop_over_the_loop_of_another_thread_ends(volumes: list[LazyReadData]) -> None:
    with DataCache(4 * VOLUME) as cache:
        own = [LazyReadData(volume, cache=cache) for volume in volumes[:60]]
        shared = PreloadIterator(own, 4)
        lock = threading.Lock()

        def take(number: int) -> list[int]:
            seen = []
            while True:
                with lock:
                    volume = next(shared, None)
                if volume is None:
                    return seen
                seen.append(first(volume))

        parts = together(3, take)
        assert sorted(chain(*parts)) == list(range(60))
        assert cache.stats().overcommits == 0


def test_many_threads_each_with_a_loop_of_their_own_all_end(
    volumes: list[LazyReadData], told: Told
) -> None:
    with DataCache(9 * VOLUME) as cache:

        def loop(number: int) -> list[int]:
            mine = [LazyReadData(v, cache=cache) for v in volumes[15 * number :][:15]]
            return [first(volume) for volume in PreloadIterator(mine, 4)]

        assert together(8, loop) == [list(range(15 * n, 15 * n + 15)) for n in range(8)]
        assert cache.stats().overcommits == 0
        assert cache.stats().peak_bytes <= cache.budget


# Loops that nobody goes on with


@pytest.fixture
def half(volumes: list[LazyReadData]) -> Iterator[tuple[DataCache, list[PreloadIterator]]]:
    """Ten loops over half of the files, each of which has taken one step."""
    with DataCache(12 * VOLUME) as cache:
        loops = [PreloadIterator(volumes[6 * n : 6 * n + 6], 3) for n in range(10)]
        for number in range(10):
            first(next(loops[number]))
        yield cache, loops


@pytest.mark.parametrize("npreload", [0, 3])
def test_ten_loops_that_stand_still_cost_another_no_read(
    half: tuple[DataCache, list[PreloadIterator]],
    volumes: list[LazyReadData],
    told: Told,
    npreload: int,
) -> None:
    cache, loops = half
    for volume in PreloadIterator(volumes[60:], npreload):
        first(volume)
    assert told.reads()[-60:] == list(range(60, 120))
    assert cache.stats().overcommits == 0
    assert cache.stats().peak_bytes <= cache.budget
    for number, loop in enumerate(loops):
        assert [first(volume) for volume in loop] == list(range(6 * number + 1, 6 * number + 6))


def test_ten_loops_that_stand_still_leave_all_the_room_to_a_demand(
    half: tuple[DataCache, list[PreloadIterator]], volumes: list[LazyReadData], told: Told
) -> None:
    cache, loops = half
    assert lc.mean(volumes[60:]).data[0] == np.mean(range(60, 120))
    with cache.operation("large", workspace=12 * VOLUME, room=0):
        assert cache.used == 12 * VOLUME
    assert cache.stats().overcommits == 0
    assert told.reads()[-60:] == list(range(60, 120))
    del loops


def test_ten_loops_that_are_dropped_half_way_leave_nothing(
    half: tuple[DataCache, list[PreloadIterator]], volumes: list[LazyReadData], told: Told
) -> None:
    cache, loops = half
    loops.clear()
    for thread in preload_threads():
        thread.join(SOON)
    assert cache.used <= 10 * VOLUME  # what was used
    read = len(told.reads())
    for volume in volumes[60:]:
        first(volume)
    assert len(told.reads()) == read + 60


def test_a_fast_loop_does_not_starve_a_slow_one(volumes: list[LazyReadData], told: Told) -> None:
    with DataCache(8 * VOLUME) as cache:
        slow = PreloadIterator(volumes[:8], 2)
        for number, volume in enumerate(slow):
            assert first(volume) == number
            # Between two of its steps another loop runs from its beginning to its end.
            start = 8 + 10 * number
            for other in PreloadIterator(volumes[start : start + 10], 4):
                first(other)
        assert cache.stats().overcommits == 0
    assert told.reads() == list(range(88))  # nothing that it had ahead was read twice
    assert len([number for number in told.ahead if number < 8]) >= 4


# Demands


def test_a_demand_does_not_wait_behind_the_loads_ahead_of_others(
    volumes: list[LazyReadData], told: Told
) -> None:
    gates = [Gate(), Gate()]
    told.at = {0: gates[0], 1: gates[1]}
    with DataCache(20 * VOLUME), PreloadIterator(volumes[:10], 10):
        for gate in gates:
            gate.reached()
        # All threads that load ahead are held up; neither new files nor queued ones wait for them.
        assert first(volumes[50]) == 50
        assert first(volumes[9]) == 9
        assert {50, 9} <= set(told.asked)
        for gate in gates:
            gate.open()


def test_a_demand_gets_room_before_the_loads_ahead_of_others(
    volumes: list[LazyReadData], told: Told
) -> None:
    with DataCache(4 * VOLUME) as cache, PreloadIterator(volumes[:60], 30):
        for volume in volumes[60:]:
            first(volume)
        assert cache.stats().overcommits == 0
        assert cache.stats().peak_bytes <= cache.budget
    assert [number for number in told.reads() if number >= 60] == list(range(60, 120))


def test_a_large_request_gets_its_turn_in_a_stream_of_small_ones() -> None:
    cache = DataCache(6 * UNIT)
    working, blocked = Gate(), Blocked(cache)
    order: list[str] = []

    def hold() -> None:
        with cache.operation("first", workspace=3 * UNIT, room=0):
            working()

    def small() -> None:
        with cache.operation("small", workspace=UNIT, room=0):
            order.append("small")

    def large() -> None:
        with cache.operation("large", workspace=5 * UNIT, room=0):
            order.append("large")

    holding = Running(hold)
    working.reached()
    waiting = Running(large)
    blocked.wait_for(waiting)
    # Each of them would fit now, and for ever.
    late = [Running(small) for _ in range(6)]
    blocked.wait_for(*late)
    assert order == []
    working.open()
    for thread in (holding, waiting, *late):
        thread.result()
    assert order == ["large"] + ["small"] * 6
    assert cache.stats().overcommits == 0


def test_a_large_request_gets_its_turn_while_threads_ask_for_small_ones_without_end() -> None:
    cache = DataCache(6 * UNIT)
    over = threading.Event()
    keys = [Made(str(number)) for number in range(20)]

    def ask(number: int) -> int:
        count = 0
        while not over.is_set():
            with using(cache, keys[(7 * number + count) % 20]):
                count += 1
        return count

    small = [Running(ask, number) for number in range(4)]
    try:
        for turn in range(20):
            with cache.operation("large", workspace=5 * UNIT, room=UNIT, order=[keys[turn]]):
                pass
    finally:
        over.set()
    assert min(thread.result() for thread in small) > 0
    assert cache.stats().overcommits == 0
    assert cache.stats().peak_bytes <= 6 * UNIT


def test_loads_ahead_wait_for_a_request_that_waits(volumes: list[LazyReadData], told: Told) -> None:
    # What is given back while a demand waits is the demand's, however much is wanted ahead.
    with DataCache(4 * VOLUME) as cache:
        working, blocked = Gate(), Blocked(cache)

        def hold(cache: DataCache = cache) -> None:
            with cache.operation("first", workspace=2 * VOLUME, room=0):
                working()

        def ask(cache: DataCache = cache) -> Sequence[int]:
            with cache.operation("large", workspace=4 * VOLUME, room=0):
                return list(told.ahead)

        holding = Running(hold)
        working.reached()
        waiting = Running(ask)
        blocked.wait_for(waiting)
        with PreloadIterator(volumes[:10], 10):
            working.open()
            holding.result()
            assert waiting.result() == []
        assert cache.stats().overcommits == 0
