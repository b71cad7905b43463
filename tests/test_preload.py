"""Loops whose loads run ahead: what they promise, and that a `PreloadList` is a list."""

from __future__ import annotations

import copy
import gc
import pickle
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SOON, Gate, Running, preload_threads, table_of

import lazycache as lc
from lazycache import DataCache, LazyReadData, PreloadIterator, PreloadList

UNIT = 1 << 20


class Reads:
    """A reader that counts, and that a test may stop or make fail by the name of the file."""

    name = "reads"
    converts = False

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.order: list[str] = []
        self.at: dict[str, Callable[[], Any]] = {}
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def can_read(self, path: str) -> bool:
        return path.endswith(".raw")

    def probe(self, path: str) -> lc.readers.Probe:
        size = Path(path).stat().st_size
        return lc.readers.Probe("raw", (size,), np.dtype(np.uint8), size, size, (path,), order="C")

    def read(self, path: str) -> Any:
        name = Path(path).name
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.order.append(name)
        self.told.put(name)
        if name in self.at:
            self.at[name]()
        return np.fromfile(path, np.uint8)


@pytest.fixture
def reader() -> Reads:
    return Reads()


@pytest.fixture
def volumes(tmp_path: Path, reader: Reads) -> list[LazyReadData]:
    for number in range(12):
        np.full(UNIT, number, np.uint8).tofile(tmp_path / f"{number:02}.raw")
    return [LazyReadData(path, reader=reader) for path in sorted(tmp_path.glob("*.raw"))]


@pytest.fixture(params=[1, 2, 3, 12])
def cache(request: pytest.FixtureRequest) -> Iterator[DataCache]:
    with DataCache(request.param * UNIT) as cache:
        yield cache


@pytest.fixture
def large() -> Iterator[DataCache]:
    with DataCache(64 * UNIT) as cache:
        yield cache


def first(proxy: LazyReadData) -> int:
    return int(proxy.data[0])


# Loops


@pytest.mark.parametrize("npreload", [0, 1, 3, 100])
@pytest.mark.parametrize("kind", ["list", "generator", "tuples", "dicts", "zip"])
def test_each_file_is_read_once_and_the_budget_holds(
    cache: DataCache, volumes: list[LazyReadData], reader: Reads, npreload: int, kind: str
) -> None:
    iterables: dict[str, Any] = {
        "list": lambda: volumes,
        "generator": lambda: (volume for volume in volumes),
        "tuples": lambda: [(volume, "label") for volume in volumes],
        "dicts": lambda: ({"image": volume, "label": 1} for volume in volumes),
        "zip": lambda: zip(volumes, range(12), strict=True),
    }
    seen = []
    for item in PreloadIterator(iterables[kind](), npreload):
        if not isinstance(item, LazyReadData):
            item = item["image"] if kind == "dicts" else item[0]
        seen.append(first(item))
    assert seen == list(range(12))
    assert set(reader.counts.values()) == {1}
    stats = cache.stats()
    assert stats.overcommits == 0
    assert stats.peak_bytes <= cache.budget
    assert (stats.preloads > 0) == (npreload > 0)
    assert not preload_threads()


def test_loads_run_ahead_in_the_order_of_the_loop(
    large: DataCache, volumes: list[LazyReadData], reader: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", "1")
    with PreloadIterator(volumes, npreload=4):
        ahead = [reader.told.get(timeout=SOON) for _ in range(4)]
    assert ahead == ["00.raw", "01.raw", "02.raw", "03.raw"]


def test_npreload_loads_run_at_once(
    large: DataCache, volumes: list[LazyReadData], reader: Reads
) -> None:
    barrier = threading.Barrier(4)
    for name in ("00.raw", "01.raw", "02.raw", "03.raw"):
        reader.at[name] = lambda: barrier.wait(SOON)
    assert [first(volume) for volume in PreloadIterator(volumes[:4], npreload=4)] == [0, 1, 2, 3]


def test_the_proxies_tell_how_far_they_are(
    large: DataCache, volumes: list[LazyReadData], reader: Reads
) -> None:
    gate = Gate()
    reader.at["00.raw"] = gate
    assert volumes[0].not_started()
    with PreloadIterator(volumes, npreload=1):
        gate.reached()
        assert volumes[0].preloading()
        assert not volumes[0].loaded()
        gate.open()
        assert first(volumes[0]) == 0
        assert volumes[0].loaded()
        assert volumes[0].preloading()
    assert volumes[5].not_started()


def test_a_loop_over_loaded_data_reads_nothing(
    large: DataCache, volumes: list[LazyReadData], reader: Reads
) -> None:
    for volume in PreloadIterator(volumes, npreload=3):
        first(volume)
    for volume in PreloadIterator(volumes, npreload=3):
        first(volume)
    assert set(reader.counts.values()) == {1}


def test_a_repeated_pass_keeps_what_is_used_next(
    volumes: list[LazyReadData], reader: Reads
) -> None:
    with DataCache(8 * UNIT):
        for _ in range(3):
            for volume in PreloadIterator(volumes, npreload=1):
                first(volume)
    # Least recently used would read all 12 in every pass.
    assert sum(reader.counts.values()) < 3 * 12


def test_building_an_expression_over_the_iterator_loads_next_to_nothing(
    large: DataCache, volumes: list[LazyReadData], reader: Reads
) -> None:
    total = sum(PreloadIterator([v * 1.0 for v in volumes], npreload=2))
    begun = sum(reader.counts.values())
    assert begun <= 4
    assert total.data[0] == sum(range(12))


# Failures


@pytest.mark.parametrize("npreload", [0, 1, 4])
def test_a_failing_file_raises_at_its_own_position(
    large: DataCache, volumes: list[LazyReadData], reader: Reads, npreload: int
) -> None:
    def fail() -> None:
        raise ValueError("a scratch on the disk")

    reader.at["03.raw"] = fail
    seen: list[Any] = []
    for volume in PreloadIterator(volumes, npreload):
        if len(seen) == 3:
            with pytest.raises(ValueError, match="scratch") as caught:
                first(volume)
            assert any("03.raw" in note for note in caught.value.__notes__)
            seen.append("failed")
        else:
            seen.append(first(volume))
    assert seen == [0, 1, 2, "failed", *range(4, 12)]
    assert reader.counts["03.raw"] <= 2
    assert large.stats().overcommits == 0


def test_a_missing_file_raises_at_its_own_position(
    large: DataCache, volumes: list[LazyReadData]
) -> None:
    Path(str(volumes[2].filename)).unlink()
    iterator = PreloadIterator(volumes, npreload=3)
    assert [first(next(iterator)) for _ in range(2)] == [0, 1]
    bad = next(iterator)
    with pytest.raises(FileNotFoundError, match=r"02\.raw"):
        first(bad)
    assert [first(volume) for volume in iterator] == [*range(3, 12)]


def test_an_error_of_the_users_generator_comes_after_the_items_before_it(
    large: DataCache, volumes: list[LazyReadData]
) -> None:
    def items() -> Iterator[LazyReadData]:
        yield from volumes[:3]
        raise KeyError("subject 4 is missing")

    iterator = PreloadIterator(items(), npreload=8)
    assert [first(next(iterator)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="subject 4"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


# Ends


@pytest.mark.parametrize("end", ["close", "with", "break", "raise"])
def test_the_end_of_a_loop_gives_back_what_was_not_used(
    large: DataCache, volumes: list[LazyReadData], reader: Reads, end: str
) -> None:
    def ahead() -> None:
        for _ in range(5):
            reader.told.get(timeout=SOON)

    if end == "close":
        iterator = PreloadIterator(volumes, npreload=5)
        ahead()
        iterator.close()
    elif end == "with":
        with PreloadIterator(volumes, npreload=5):
            ahead()
    elif end == "break":
        for _ in PreloadIterator(volumes, npreload=5):
            ahead()
            break
    else:

        def loop() -> None:
            for _ in PreloadIterator(volumes, npreload=5):
                ahead()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            loop()
    for thread in preload_threads():
        thread.join(SOON)
    assert large.used == 0
    assert sum(reader.counts.values()) >= 5


def test_what_was_used_stays_when_the_loop_ends(
    large: DataCache, volumes: list[LazyReadData]
) -> None:
    with PreloadIterator(volumes, npreload=5) as iterator:
        assert first(next(iterator)) == 0
    assert volumes[0].loaded()
    assert large.used == UNIT


def test_a_preload_under_way_stops_at_its_next_checkpoint(
    large: DataCache, volumes: list[LazyReadData], reader: Reads
) -> None:
    from lazycache.readers.base import checkpoint

    gate = Gate()
    stopped = queue.SimpleQueue[bool]()

    def slowly() -> None:
        gate()
        try:
            checkpoint()
        except BaseException:
            stopped.put(True)
            raise
        stopped.put(False)

    reader.at["00.raw"] = slowly
    iterator = PreloadIterator(volumes, npreload=1)
    gate.reached()
    closing = Running(iterator.close)
    table = table_of(large)
    while not all(flight.cancelled for flight in list(table.flights.values())):
        assert not closing.done
    gate.open()
    assert stopped.get(timeout=SOON)
    closing.result()
    assert large.used == 0


def test_an_iterator_is_in_no_reference_cycle(
    large: DataCache, volumes: list[LazyReadData]
) -> None:
    gc.disable()
    try:
        for items in (volumes, (volume for volume in volumes[:2])):
            iterator = PreloadIterator(items, npreload=4)
            first(next(iterator))
            seen = weakref.ref(iterator)
            del iterator
            assert seen() is None
    finally:
        gc.enable()


def test_a_forgotten_iterator_costs_no_demand_anything(
    volumes: list[LazyReadData], reader: Reads
) -> None:
    with DataCache(3 * UNIT) as cache:
        forgotten = PreloadIterator(volumes[:6], npreload=6)
        first(next(forgotten))
        for volume in volumes[6:]:
            first(volume)
        assert cache.stats().overcommits == 0
        assert [reader.counts[f"{number:02}.raw"] for number in range(6, 12)] == [1] * 6
        forgotten.close()


def test_two_loops_in_step_both_get_ahead(volumes: list[LazyReadData], reader: Reads) -> None:
    admitted: dict[bool, int] = {False: 0, True: 0}
    with DataCache(4 * UNIT) as cache:
        cache.subscribe(lambda event: None)
        left = PreloadIterator(volumes[:6], npreload=3)
        right = PreloadIterator(volumes[6:], npreload=3)
        for one, other in zip(left, right, strict=True):
            assert first(one) + 6 == first(other)
        assert cache.stats().overcommits == 0
    for name in reader.order:
        admitted[name >= "06.raw"] += 1
    assert max(admitted.values()) <= 2 * min(admitted.values())


def test_nested_loops_make_progress(volumes: list[LazyReadData]) -> None:
    with DataCache(3 * UNIT) as cache:
        seen = [
            (first(one), first(other))
            for one in PreloadList(volumes[:4], npreload=2)
            for other in PreloadList(volumes[4:8], npreload=2)
        ]
        assert seen == [(one, other) for one in range(4) for other in range(4, 8)]
        assert cache.stats().overcommits == 0


# A list


@pytest.fixture
def quiet(volumes: list[LazyReadData], reader: Reads) -> Iterator[PreloadList]:
    with DataCache(64 * UNIT) as cache:
        yield PreloadList(volumes, npreload=7)
        assert not reader.counts
        assert not table_of(cache).streams


def test_an_empty_preload_list() -> None:
    assert len(PreloadList()) == 0
    assert list(PreloadList()) == []


def test_making_and_taking_apart_starts_nothing(quiet: PreloadList) -> None:
    for made in (
        quiet[2:5], quiet.copy(), copy.copy(quiet), copy.deepcopy(quiet), quiet * 1, 1 * quiet,
        quiet.__add__([]), quiet.__radd__([]), [None] + quiet,  # noqa: RUF005 - the sum is the test
        PreloadList(quiet), PreloadList(PreloadList(quiet)), quiet[::-1],
    ):  # fmt: skip
        assert type(made) is PreloadList
        assert made.npreload == 7
    assert quiet + quiet == quiet * 2
    quiet += quiet
    assert len(quiet) == 24
    quiet.extend(quiet)
    assert len(quiet) == 48
    quiet.insert(0, None)
    assert quiet[0] is None
    del quiet[10:]
    assert len(quiet) == 10
    assert "npreload=7" in repr(quiet)


def test_a_pickle_keeps_the_proxies_and_npreload(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full(4, number))
    with DataCache(UNIT) as cache:
        again = pickle.loads(pickle.dumps(lc.glob(tmp_path / "*.npy", npreload=5)))
        assert cache.stats().loads == 0
        assert again.npreload == 5
        assert [int(proxy.data[0]) for proxy in again] == [0, 1, 2]


def test_proxies_are_found_by_identity(quiet: PreloadList, volumes: list[LazyReadData]) -> None:
    assert volumes[3] in quiet
    assert LazyReadData(volumes[3]) not in quiet
    assert quiet.index(volumes[3]) == 3
    assert quiet.count(volumes[3]) == 1
    assert quiet == volumes
    assert quiet != volumes[1:]
    assert quiet != [*volumes[1:], volumes[0]]
    quiet.remove(volumes[3])
    assert len(quiet) == 11
    with pytest.raises(ValueError, match="not in the list"):
        quiet.index(volumes[3])
    with pytest.raises(ValueError, match="not in the list"):
        quiet.index(volumes[9], 0, 2)


def test_a_loop_over_a_list_sees_what_is_appended_meanwhile(
    large: DataCache, volumes: list[LazyReadData]
) -> None:
    growing = PreloadList(volumes[:2], npreload=1)
    seen = []
    for volume in growing:
        seen.append(first(volume))
        if len(growing) < 5:
            growing.append(volumes[len(growing)])
    assert seen == [0, 1, 2, 3, 4]


def test_reversed_preloads_backwards(large: DataCache, volumes: list[LazyReadData]) -> None:
    assert [first(v) for v in reversed(PreloadList(volumes, npreload=2))] == [*range(11, -1, -1)]
    assert large.stats().preloads > 0


@pytest.mark.parametrize("npreload", [-1, 1.5, "2", True])
def test_a_wrong_npreload_says_what_to_write(npreload: Any) -> None:
    with pytest.raises(ValueError, match="number of items"):
        PreloadList([], npreload=npreload)


# glob


def test_glob_gives_sorted_proxies_and_reads_nothing(
    large: DataCache, volumes: list[LazyReadData], reader: Reads, tmp_path: Path
) -> None:
    found = lc.glob(tmp_path / "*.raw", reader=reader, npreload=3)
    names = [Path(str(found[number].filename)).name for number in range(len(found))]
    assert names == [f"{number:02}.raw" for number in range(12)]
    assert found.npreload == 3
    assert not reader.counts


def test_glob_of_nothing_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*\.nii'.*looked in"):
        lc.glob(tmp_path / "*.nii")
