"""Loops over more data than fit: rounds, pairs, sums that grow. What is read is counted.

The optimum for a given order of uses is Belady's: what is used again last goes first. It knows the
future; a loop doesn't know whether it will be begun again.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import pickle
import queue
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import SOON, Blocked, Gate, Running

import lazycache as lc
from lazycache import DataCache, LazyReadData, PreloadIterator, PreloadList
from lazycache.readers import Probe

UNIT = 1 << 14


class Numbered:
    """A reader of files that aren't there: the data of "7" are all 7, of as many units as told."""

    name = "numbered"
    converts = False

    def __init__(self, units: Callable[[int], int] = lambda number: 1) -> None:
        self.units = units
        self.at: dict[int, Callable[[], Any]] = {}
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def can_read(self, path: str) -> bool:
        return True

    def probe(self, path: str) -> Probe:
        nbytes = self.units(number_of(path)) * UNIT
        return Probe("numbered", (nbytes,), np.dtype(np.uint8), nbytes, nbytes, (), order="C")

    def read(self, path: str) -> NDArray[Any]:
        number = number_of(path)
        self.told.put(number)
        if number in self.at:
            self.at[number]()
        return np.full(self.units(number) * UNIT, number % 256, np.uint8)


def number_of(path: str | None) -> int:
    return int(os.path.basename(str(path)))


def make(count: int, reader: Numbered | None = None, start: int = 0) -> list[LazyReadData]:
    reader = reader or Numbered()
    return [LazyReadData(f"/{number}", reader=reader) for number in range(start, start + count)]


def optimum(trace: Sequence[Hashable], room: int, units: Callable[[Any], int] | None = None) -> int:
    """How many reads the uses in ``trace`` take where ``room`` units fit, if the future is known.

    Of equal sizes the least; of others, what the same rule makes of them.
    """
    weigh = units or (lambda key: 1)
    following: dict[Hashable, float] = {}
    again = [math.inf] * len(trace)
    for position in reversed(range(len(trace))):
        again[position] = following.get(trace[position], math.inf)
        following[trace[position]] = position
    present: dict[Hashable, float] = {}
    reads = 0
    for position, key in enumerate(trace):
        if key not in present:
            reads += 1
            while sum(map(weigh, present)) + weigh(key) > room:
                del present[max(present, key=lambda other: present[other])]
        present[key] = again[position]
    return reads


class Used:
    """Uses the data of proxies and notes in what order."""

    def __init__(self) -> None:
        self.trace: list[int] = []

    def __call__(self, proxy: LazyReadData) -> None:
        number = number_of(proxy.filename)
        assert proxy.data[0] == number % 256
        self.trace.append(number)


def reads_of(
    loops: Callable[[Used], Any], room: int, units: Callable[[int], int] | None = None
) -> tuple[int, int]:
    """What ``loops`` read where ``room`` units fit, and the optimum for its order."""
    with DataCache(room * UNIT, strict=True) as cache:
        used = Used()
        loops(used)
        stats = cache.stats()
        assert stats.peak_bytes <= cache.budget
        return stats.loads, optimum(used.trace, room, units)


# Rounds


@pytest.mark.parametrize("npreload", [0, 1, 2, 4])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("count", "room"), [(20, 16), (40, 32), (100, 80), (50, 45), (40, 20), (100, 50)]
)
def test_rounds_read_what_the_optimum_reads(
    count: int, room: int, kept: bool, npreload: int
) -> None:
    volumes = make(count)
    one = PreloadList(volumes, npreload)

    def loops(use: Used) -> None:
        for _ in range(5):
            for volume in one if kept else PreloadList(volumes, npreload):
                use(volume)

    reads, least = reads_of(loops, room)
    assert reads - count <= 1.05 * (least - count)


@pytest.mark.parametrize(("count", "room"), [(10, 8), (12, 9), (10, 5), (40, 8), (20, 2)])
def test_rounds_without_preloading_are_the_optimum_at_any_size(count: int, room: int) -> None:
    def loops(use: Used) -> None:
        for _ in range(5):
            for volume in PreloadIterator(volumes, npreload=0):
                use(volume)

    volumes = make(count)
    reads, least = reads_of(loops, room)
    assert reads == least


@pytest.mark.parametrize("npreload", [0, 2, 4])
@pytest.mark.parametrize(("count", "room"), [(20, 4), (40, 8), (20, 2), (5, 2)])
def test_with_little_room_a_round_reads_no_file_twice(count: int, room: int, npreload: int) -> None:
    volumes = PreloadList(make(count), npreload)
    with DataCache(room * UNIT, strict=True) as cache:
        for _ in range(5):
            before = cache.stats().loads
            for volume in volumes:
                volume.data
            assert cache.stats().loads - before <= count


def test_many_rounds_stay_near_the_optimum() -> None:
    def loops(use: Used) -> None:
        for _ in range(40):
            for volume in volumes:
                use(volume)

    volumes = PreloadList(make(50), npreload=2)
    reads, least = reads_of(loops, 40)
    assert reads <= 1.05 * least


@pytest.mark.parametrize("npreload", [0, 2, 8])
@pytest.mark.parametrize("factor", [7, 11, 13])
def test_rounds_over_files_of_unequal_sizes(factor: int, npreload: int) -> None:
    def units(number: int) -> int:
        return 1 + number * factor % 5

    def loops(use: Used) -> None:
        for _ in range(5):
            for volume in volumes:
                use(volume)

    volumes = PreloadList(make(40, Numbered(units)), npreload)
    room = sum(map(units, range(40))) * 4 // 5
    reads, rule = reads_of(loops, room, units)
    assert reads - 40 <= 1.05 * (rule - 40) + 1


def backwards(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    for _ in range(5):
        for volume in reversed(PreloadList(volumes, npreload)):
            use(volume)


def to_and_fro(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    there = PreloadList(volumes, npreload)
    for number in range(5):
        for volume in reversed(there) if number % 2 else there:
            use(volume)


def with_breaks(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    for number in range(6):
        for at, volume in enumerate(PreloadList(volumes, npreload)):
            use(volume)
            if number % 2 and at == 15:
                break


def in_step(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    left, right = PreloadList(volumes[:20], npreload), PreloadList(volumes[20:], npreload)
    for _ in range(5):
        for one, other in zip(left, right, strict=True):
            use(one)
            use(other)


def as_tuples(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    together = PreloadList(zip(volumes[:20], volumes[20:], strict=True), npreload)
    for _ in range(5):
        for one, other in together:
            use(one)
            use(other)


def with_others_in_between(volumes: list[LazyReadData], npreload: int, use: Used) -> None:
    for _ in range(5):
        for at, volume in enumerate(PreloadList(volumes[:36], npreload)):
            use(volume)
            if at % 9 == 0:
                use(volumes[36 + at // 9])


@pytest.mark.parametrize("npreload", [0, 2, 8])
@pytest.mark.parametrize(
    "rounds", [backwards, to_and_fro, with_breaks, in_step, as_tuples, with_others_in_between]
)
def test_rounds_of_other_kinds_read_what_the_optimum_reads(
    rounds: Callable[[list[LazyReadData], int, Used], None], npreload: int
) -> None:
    volumes = make(40)
    reads, least = reads_of(lambda use: rounds(volumes, npreload, use), 32)
    assert reads <= 1.05 * least


@pytest.mark.parametrize("npreload", [0, 2])
def test_an_inner_loop_keeps_from_round_to_round_what_fits(npreload: int) -> None:
    def loops(use: Used) -> None:
        for one in PreloadList(outer, npreload):
            use(one)
            for other in PreloadList(inner, npreload):
                use(other)

    outer, inner = make(10), make(30, start=10)
    reads, least = reads_of(loops, 24)
    assert reads <= 1.25 * least  # LRU: 310


@pytest.mark.parametrize("npreload", [0, 2])
def test_what_an_earlier_loop_left_makes_room_for_the_rounds_of_another(npreload: int) -> None:
    def loops(use: Used) -> None:
        for volume in PreloadList(once, npreload):
            use(volume)
        for _ in range(5):
            for volume in PreloadList(often, npreload):
                use(volume)

    once, often = make(20), make(20, start=20)
    reads, least = reads_of(loops, 16)
    assert reads <= 1.05 * least


@pytest.mark.parametrize("npreload", [0, 2])
def test_what_was_in_use_before_a_loop_outlasts_it(npreload: int) -> None:
    volumes, mask = make(20), make(1, start=100)[0]
    with DataCache(8 * UNIT) as cache:
        mask.data
        for _ in range(3):
            for volume in PreloadList(volumes, npreload):
                volume.data
        assert mask.loaded()
        # A demand elsewhere takes the place of what the loop has passed, at once.
        others = make(7, start=200)
        for other in others:
            other.data
        assert mask.loaded()
        assert all(other.loaded() for other in others)
        assert cache.stats().overcommits == 0


@pytest.mark.parametrize("npreload", [1, 2, 4, 8])
@pytest.mark.parametrize("room", [3, 6])
def test_what_a_loop_computes_costs_at_most_what_was_ahead_at_first(
    room: int, npreload: int
) -> None:
    volumes = PreloadList(make(40), npreload)
    with DataCache(room * UNIT, strict=True) as cache:
        for volume in volumes:
            assert (volume + np.uint8(1)).data[0] == number_of(volume.filename) + 1
        assert cache.stats().loads <= 40 + min(room, npreload)
    with DataCache((8 + room) * UNIT, strict=True) as cache:
        for volume in volumes:  # with a temporary of eight units
            assert (volume * 1.5).data[0] == number_of(volume.filename) * 1.5
        assert cache.stats().loads <= 40 + 8 + npreload
        # Loads go on running ahead, into what the loop leaves.
        assert cache.stats().preloads >= 30


# The order that comes


@pytest.mark.parametrize("npreload", [0, 3])
def test_in_any_order_a_loop_begins_with_what_is_in_memory(npreload: int) -> None:
    volumes = PreloadList(make(20), npreload, order="any")
    with DataCache(16 * UNIT) as cache:
        for number in range(5):
            before = cache.stats().loads
            there = {id(volume) for volume in list.__iter__(volumes) if volume.loaded()}
            assert len(there) == (16 if number else 0)
            seen = []
            for volume in volumes:
                if len(seen) < len(there):
                    assert id(volume) in there
                volume.data
                seen.append(volume)
            assert sorted(map(id, seen)) == sorted(id(v) for v in list.__iter__(volumes))
            assert cache.stats().loads - before == (4 if number else 20)


def test_any_order_keeps_the_order_of_those_in_memory_and_of_the_rest() -> None:
    volumes = make(8)
    with DataCache(8 * UNIT):
        for number in (6, 1, 3):
            volumes[number].data
        order = [number_of(v.filename) for v in PreloadIterator(iter(volumes), 2, order="any")]
        assert order == [1, 3, 6, 0, 2, 4, 5, 7]


def test_the_order_goes_along_with_slices_copies_and_pickles() -> None:
    volumes = PreloadList(["a", "b", "c"], npreload=2, order="any")
    for made in (
        volumes[1:], volumes.copy(), copy.copy(volumes), volumes * 2, PreloadList(volumes),
        pickle.loads(pickle.dumps(volumes)),
    ):  # fmt: skip
        assert (made.npreload, made.order) == (2, "any")
    assert PreloadList(volumes, order="given").order == "given"
    assert list(reversed(volumes)) == ["c", "b", "a"]
    assert "order='any'" in repr(volumes)
    with pytest.raises(ValueError, match='write "given" or "any"'):
        PreloadList([], order="random")  # type: ignore[arg-type]


# Pairs


def least_for_pairs(count: int, room: int) -> int:
    """A lower bound: the first reads fill the room; each later one can make room - 1 new pairs."""
    if room >= count:
        return count
    left = math.comb(count, 2) - math.comb(room, 2)
    return room + -(-left // (room - 1))


def fewest_for_pairs(count: int, room: int) -> int:
    """The least reads for all pairs, found by trying everything; for few volumes."""
    bit = {
        frozenset(pair): 1 << n for n, pair in enumerate(itertools.combinations(range(count), 2))
    }

    def among(present: frozenset[int]) -> int:
        return sum(bit[frozenset(pair)] for pair in itertools.combinations(present, 2))

    everything = among(frozenset(range(count)))
    start = frozenset(range(room))
    states = {start: {among(start)}}
    for reads in itertools.count(room):
        if any(everything in met for met in states.values()):
            return reads
        after: dict[frozenset[int], set[int]] = {}
        for present, mets in states.items():
            for gone in present:
                for new in set(range(count)) - present:
                    there = present - {gone} | {new}
                    more = among(there)
                    after.setdefault(there, set()).update(met | more for met in mets)
        states = {there: _most(mets) for there, mets in after.items()}
    raise AssertionError


def _most(mets: set[int]) -> set[int]:
    kept: list[int] = []
    for met in sorted(mets, key=int.bit_count, reverse=True):
        if not any(met | other == other for other in kept):
            kept.append(met)
    return set(kept)


def walk_pairs(
    count: int, room: int, npreload: int | None, others: int = 0
) -> tuple[int, list[tuple[int, int]]]:
    """How many reads a walk over all pairs takes, and the pairs in their order."""
    volumes, more = make(count), make(others, start=1000)
    with DataCache(room * UNIT, strict=True) as cache:
        walk = lc.pairs(volumes, more or None, npreload=npreload)
        assert cache.stats().loads == 0
        seen = []
        for a, b in walk:
            assert a.data[0] == number_of(a.filename) % 256
            assert b.data[0] == number_of(b.filename) % 256
            seen.append((number_of(a.filename), number_of(b.filename)))
        assert len(walk) == len(seen)
        assert cache.stats().peak_bytes <= cache.budget
        return cache.stats().loads, seen


@pytest.mark.parametrize("npreload", [None, 0, 2])
@pytest.mark.parametrize(("count", "room"), [(200, 20), (120, 8), (60, 4), (30, 2), (40, 40)])
def test_all_pairs_read_within_a_tenth_of_the_least(
    count: int, room: int, npreload: int | None
) -> None:
    reads, seen = walk_pairs(count, room, npreload)
    assert sorted(seen) == list(itertools.combinations(range(count), 2))
    assert reads <= 1.1 * least_for_pairs(count, room)


@pytest.mark.parametrize(("count", "room"), [(5, 3), (6, 3), (6, 4), (7, 4), (7, 5)])
def test_few_pairs_take_one_read_more_than_the_least_at_most(count: int, room: int) -> None:
    fewest = fewest_for_pairs(count, room)
    assert least_for_pairs(count, room) <= fewest <= walk_pairs(count, room, 0)[0] <= fewest + 1


@st.composite
def volumes_of_sizes(draw: Any) -> tuple[list[int], list[int], int, int | None]:
    """Sizes in units of some volumes, and of others; how much room there is, and npreload."""
    sizes = st.lists(st.integers(1, 5), max_size=12)
    some, others = draw(sizes), draw(st.just([]) | sizes)
    least = 2 * max(some + others, default=1)
    room = draw(st.integers(least, max(least, sum(some + others)) + 1))
    return some, others, room, draw(st.sampled_from([None, 0, 1, 5]))


def test_all_pairs_come_once_with_their_values(storm: Any) -> None:
    @storm(volumes_of_sizes(), st.booleans(), share=0.3)
    def check(case: tuple[list[int], list[int], int, int | None], repeated: bool) -> None:
        some, others, room, npreload = case
        sizes = some + others
        all_of_them = make(len(sizes), Numbered(lambda number: sizes[number]))
        volumes, more = all_of_them[: len(some)], all_of_them[len(some) :]
        if repeated and volumes:
            volumes.append(volumes[0])
        expected: list[tuple[Any, Any]]
        if others:
            expected = list(itertools.product(volumes, more))
        else:
            expected = list(itertools.combinations(volumes, 2))
        with DataCache(room * UNIT, strict=True) as cache:
            walk = lc.pairs(volumes, more or None, npreload=npreload)
            seen = []
            for a, b in walk:
                for one in (a, b):
                    number = number_of(one.filename)
                    assert one.data.tobytes() == bytes([number]) * (sizes[number] * UNIT)
                seen.append((id(a), id(b)))
            assert Counter(seen) == Counter((id(a), id(b)) for a, b in expected)
            assert cache.stats().peak_bytes <= cache.budget
            assert cache.stats().loads <= 2 * len(expected)


def test_rounds_in_any_order_give_each_item_once_a_round(storm: Any) -> None:
    orders = st.sampled_from(["given", "any"])
    kinds = st.lists(st.sampled_from(["one", "pair", "named", "number"]), max_size=14)
    preloads = st.sampled_from([0, 1, 2, 8])

    @storm(kinds, orders, preloads, st.integers(2, 20), st.integers(1, 4), share=0.3)
    def check(kinds: list[str], order: Any, npreload: int, room: int, rounds: int) -> None:
        sizes = [1 + number % 2 for number in range(len(kinds) + 1)]
        volumes = make(len(sizes), Numbered(lambda number: sizes[number]))
        items: list[Any] = []
        for at, kind in enumerate(kinds):
            one, other = volumes[at], volumes[(at * 3 + 1) % len(volumes)]
            items.append(
                {"one": one, "pair": (one, other), "named": {"a": one, "b": other}, "number": at}[
                    kind
                ]
            )
        with DataCache(max(room, 4) * UNIT, strict=True) as cache:
            loop = PreloadList(items, npreload, order)
            for _ in range(rounds):
                before, seen = cache.stats(), []
                there = [cache.holds(volume._node.key) for volume in volumes]  # type: ignore[union-attr]
                for item in loop:
                    proxies = item.values() if isinstance(item, dict) else item
                    proxies = (proxies,) if isinstance(item, LazyReadData) else proxies
                    for one in proxies if not isinstance(item, int) else ():
                        number = number_of(one.filename)
                        assert one.data.tobytes() == bytes([number]) * (sizes[number] * UNIT)
                    seen.append(id(item))
                assert Counter(seen) == Counter(map(id, items))
                if order == "given":
                    assert seen == [id(item) for item in items]
                elif all(kind == "one" for kind in kinds):
                    first = [at for at in range(len(items)) if there[at]]
                    assert seen[: len(first)] == [id(items[at]) for at in first]
                stats = cache.stats()
                assert stats.peak_bytes <= cache.budget
                assert stats.overcommits == 0
                assert (stats - before).loads <= 2 * len(items)


def test_a_place_is_left_for_the_next_volume_where_that_costs_little() -> None:
    with_it, _ = walk_pairs(100, 30, None)
    without, _ = walk_pairs(100, 30, 0)
    assert without < with_it <= 1.05 * without
    for room, npreload, held in ((30, None, 28), (30, 0, 29), (20, None, 19)):
        with DataCache(room * UNIT):
            walk = lc.pairs(make(100), npreload=npreload)
            last = [number_of(b.filename) for _, b in list.__iter__(walk)].index(99)
            block = itertools.takewhile(lambda pair: number_of(pair[1].filename) == 99,
                                        list.__getitem__(walk, slice(last, None)))  # fmt: skip
            assert len(list(block)) == held


def test_pairs_of_two_lists_hold_blocks_of_the_one_for_which_that_reads_less() -> None:
    for count, others in ((100, 60), (60, 100)):
        reads, seen = walk_pairs(count, 20, None, others)
        assert sorted(seen) == list(itertools.product(range(count), range(1000, 1000 + others)))
        # In blocks of 19, the end of one round being the beginning of the next.
        held = min(60 + 100 * 4 - 3, 100 + 60 * 6 - 5)
        assert reads <= 1.1 * held
    assert walk_pairs(10, 12, None, 50)[0] == 60


def test_blocks_of_pairs_go_by_the_sizes_of_the_files() -> None:
    reader = Numbered(lambda number: 1 if number % 2 else 3)
    volumes = make(40, reader)
    with DataCache(20 * UNIT, strict=True) as cache:
        seen = [
            (number_of(a.filename), number_of(b.filename))
            for a, b in lc.pairs(volumes)
            if a.data is not None and b.data is not None
        ]
        assert sorted(seen) == list(itertools.combinations(range(40), 2))
        # Ten of the 40 fit on average, and one of the large ones: blocks of eight or so.
        assert cache.stats().loads <= 40 * 5 / 2 + 40


def test_pairs_of_what_cannot_be_read_raise_where_they_come() -> None:
    volumes = make(5)
    volumes[3] = LazyReadData("/nowhere/3.npy")
    with DataCache(10 * UNIT):
        seen = 0
        for a, b in lc.pairs(volumes):
            if volumes[3] in PreloadList([a, b]):
                with pytest.raises(FileNotFoundError, match=r"3\.npy"):
                    (a.data, b.data)
            else:
                assert a.data[0] < b.data[0]
                seen += 1
        assert seen == 6


def test_pairs_of_few_or_no_volumes() -> None:
    assert list(lc.pairs([])) == []
    assert list(lc.pairs(make(1))) == []
    assert list(lc.pairs([], make(2))) == []
    assert len(lc.pairs(PreloadList(make(3)), PreloadList(make(2)))) == 6
    assert list(lc.pairs(iter("abc"))) == [("a", "b"), ("a", "c"), ("b", "c")]


# A sum that grows


@pytest.fixture
def tight() -> Iterator[DataCache]:
    with DataCache(4 * UNIT, strict=True) as cache:
        yield cache


@pytest.mark.parametrize("inplace", [True, False])
def test_a_growing_sum_reads_each_file_once(tight: DataCache, inplace: bool) -> None:
    volumes = make(20)
    total = volumes[0]
    for number, volume in enumerate(volumes[1:], 1):
        if inplace:
            total += volume
        else:
            total = total + volume
        assert total.data[0] == sum(range(number + 1)) % 256
    assert tight.stats().loads == 20
    assert tight.stats().overcommits == 0


def test_a_growing_sum_over_a_preload_list_reads_hardly_more(tight: DataCache) -> None:
    volumes = PreloadList(make(20), npreload=2)
    total = volumes[0]
    for volume in volumes[1:]:
        total = total + volume
        total.data
    assert total.data[0] == sum(range(20)) % 256
    assert tight.stats().loads <= 22


def test_a_sum_that_grows_by_several_steps_goes_on_from_its_last_value(tight: DataCache) -> None:
    volumes = make(21)
    total = volumes[0]
    for at in range(1, 21, 4):
        for volume in volumes[at : at + 4]:
            total = total + volume
        total.data
    assert tight.stats().loads == 21
    assert tight.used <= 4 * UNIT


def test_what_an_expression_was_made_from_goes_once_it_is_computed() -> None:
    volumes = make(3)
    with DataCache(20 * UNIT) as cache:
        first = volumes[0] + volumes[1]
        first.data
        seen = weakref.ref(first._result)
        second = first * 2
        third = second + volumes[2]
        del first, second
        assert seen() is not None
        assert any(holder.reason == "result" for holder in cache.held())
        third.data
        assert seen() is None
        assert cache.used == 4 * UNIT


@pytest.mark.parametrize("end", ["forgotten", "released", "computed together"])
def test_values_that_are_no_longer_needed_go(end: str) -> None:
    volumes = make(2)
    with DataCache(20 * UNIT):
        first = volumes[0] + volumes[1]
        first.data
        seen = weakref.ref(first._result)
        second = first * 2
        del first
        assert seen() is not None
        if end == "forgotten":
            del second
        elif end == "released":
            second.data
            second.release()
        else:
            lc.compute(second, volumes[0])
        assert seen() is None


def test_a_value_that_was_evicted_meanwhile_is_computed_again() -> None:
    volumes = make(4)
    with DataCache(20 * UNIT) as cache:
        total = volumes[0] + volumes[1]
        total.data
        total = total + volumes[2]
        cache.clear()
        assert cache.used == 0
        assert total.data[0] == 3
        assert cache.stats().loads == 5


def test_copies_and_pickles_of_what_grows_are_as_before(tight: DataCache) -> None:
    volumes = make(3)
    total = volumes[0] + volumes[1]
    total.data
    total = total + volumes[2]
    twin = copy.copy(total)
    del total
    assert twin.data[0] == 3
    assert tight.stats().loads == 3
    node = pickle.dumps(lc.LazyReadData(np.arange(3)) + 1)
    assert len(node) < 2000


def test_a_chain_over_computed_values_ends_without_recursion() -> None:
    volumes = make(2)
    gc.disable()
    try:
        with DataCache(400 * UNIT) as cache:
            first = volumes[0] + volumes[1]
            first.data
            seen = weakref.ref(first._result)
            total = first
            for _ in range(100_000):
                total = total + first
            del first
            assert seen() is not None
            del total
            assert seen() is None
            assert cache.used == 2 * UNIT
    finally:
        gc.enable()


@given(st.data())
@settings(max_examples=30)
def test_growing_expressions_have_the_values_of_numpy(data: st.DataObject) -> None:
    volumes = make(4)
    with DataCache(12 * UNIT):
        proxies: list[Any] = list(volumes)
        arrays: list[Any] = [np.full(UNIT, number, np.uint8) for number in range(4)]
        for _ in range(data.draw(st.integers(1, 12))):
            i, j = (data.draw(st.integers(0, len(proxies) - 1)) for _ in range(2))
            kind = data.draw(st.sampled_from(["new", "replace", "inplace", "compute", "drop"]))
            if kind == "new":
                proxies.append(proxies[i] ^ proxies[j])
                arrays.append(arrays[i] ^ arrays[j])
            elif kind == "replace":
                proxies[i] = proxies[i] | proxies[j]
                arrays[i] = arrays[i] | arrays[j]
            elif kind == "inplace":
                proxies[i] ^= proxies[j]
                arrays[i] = arrays[i] ^ arrays[j]
            elif kind == "compute":
                assert np.array_equal(proxies[i].data, arrays[i])
            elif len(proxies) > 1:
                del proxies[i], arrays[i]
        for proxy, array in zip(proxies, arrays, strict=True):
            assert np.array_equal(proxy.data, array)


# Threads


def test_two_threads_share_the_loads_of_expressions_over_the_same_files() -> None:
    reader = Numbered()
    gate = reader.at[0] = Gate()
    volumes = make(6, reader)
    cache = DataCache(100 * UNIT)
    here = [LazyReadData(volume, cache=cache) for volume in volumes]
    total, mean = sum(here), lc.mean(here)
    blocked = Blocked(cache)
    one = Running(lambda: total.data)
    gate.reached()
    other = Running(lambda: mean.data)
    blocked.wait_for(other)
    gate.open()
    assert one.result()[0] == 15
    assert other.result()[0] == 2.5
    assert cache.stats().loads == 6
    assert sorted(reader.told.get(timeout=SOON) for _ in range(6)) == [*range(6)]
    cache.close()
