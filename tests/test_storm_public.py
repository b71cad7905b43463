"""Eight threads use everything that users use, on real files, in a budget that is too small."""

from __future__ import annotations

import _thread
import gc
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from storming import THREADS, Act, Storm, Watch, choose_from, fast_switching
from support import SOON

import lazycache as lc
from lazycache import (
    CacheStats,
    DataCache,
    LazyReadData,
    PreloadIterator,
    PreloadList,
    needs,
    program,
)
from lazycache.testing import FaultyReader

Array = NDArray[Any]

SHAPE = (32, 32, 32)
VOLUME = 4 * 32**3  # as float32
FILES = 50
# What the largest operation needs: its operands, its results, and what reading takes besides.
NEED = 8 * VOLUME
# What users hold: each thread one result or file at a time, and two of them one more.
HOLDERS = 2
HELD = (THREADS + HOLDERS) * VOLUME
BUDGET = NEED + HELD
# Enough for a scope in which one thread computes.
SHARE = NEED + VOLUME
# The same where all goes by blocks, some of it into compressed files.
NEED_BY_BLOCKS = 20 * VOLUME
BUDGET_BY_BLOCKS = NEED_BY_BLOCKS + HELD


class InterruptedRead(BaseException):
    """What Ctrl-C raises in the middle of a read, without being seen as one by pytest."""


class LeavingError(Exception):
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Array]]:
    """Files and what is in them: two thirds float32, and int16 ones of half the size."""
    folder = tmp_path_factory.mktemp("storm")
    random_numbers = np.random.default_rng(0)
    made = []
    for number in range(FILES):
        data: Array = random_numbers.integers(0, 50, SHAPE).astype(np.int16)
        if number % 3:
            data = random_numbers.normal(100, 20, SHAPE).astype(np.float32)
        if number % 5 < 3:
            path = folder / f"{number:02}.npy"
            np.save(path, data)
        else:
            data = np.asfortranarray(data)
            path = folder / f"{number:02}.nii{'.gz' if number % 5 == 4 else ''}"
            nib.save(nib.Nifti1Image(data, np.eye(4)), path)
        made.append((path, data))
    return made


# What is computed, with NumPy in place of lazycache too


def formula(lib: Any, a: Any, b: Any, c: Any) -> Any:
    return (a * 2 + b * c) / np.float32(1.2)


def total(lib: Any, *volumes: Any) -> Any:
    return sum(volumes)


def products(lib: Any, *volumes: Any) -> Any:
    return sum(one * other for one, other in pairwise(volumes))


def chosen(lib: Any, a: Any, b: Any, c: Any) -> Any:
    return lib.where(a > b, lib.clip(c, 80, 120), a)


def compared(lib: Any, a: Any, b: Any, c: Any) -> Any:
    return (a > b) & (b <= c)


def sliced(lib: Any, a: Any, b: Any) -> Any:
    return a[4:20, ::2] - b[4:20, ::2]


def planes(lib: Any, a: Any, b: Any, c: Any) -> Any:
    return a[..., 3] + b[5] * c[:, 7]


def turned(lib: Any, a: Any, b: Any) -> Any:
    return a.T - b


def shared(lib: Any, a: Any, b: Any, c: Any) -> Any:
    both = a + b
    return both * c + both


def viewed(lib: Any, a: Any, b: Any, c: Any) -> Any:
    both = a + b
    view = both.T
    return view - (both * c).T


def along(lib: Any, a: Any, b: Any) -> Any:
    return (a - b).mean(axis=0)


def largest(lib: Any, a: Any, b: Any) -> Any:
    return (a * b).max()


def mean(lib: Any, *volumes: Any) -> Any:
    return lc.mean(volumes) if lib is lc else np.mean(np.stack(volumes), axis=0)


def std(lib: Any, *volumes: Any) -> Any:
    return lc.std(volumes) if lib is lc else np.std(np.stack(volumes), axis=0)


def highest(lib: Any, *volumes: Any) -> Any:
    return lc.max(volumes) if lib is lc else np.max(np.stack(volumes), axis=0)


def middle(lib: Any, *volumes: Any) -> Any:
    return lc.median(volumes) if lib is lc else np.median(np.stack(volumes), axis=0)


def spread(lib: Any, *volumes: Any) -> Any:
    def width(block: Array) -> Array:
        return block.max(0) - block.min(0)

    return lc.map_voxels(width, volumes) if lib is lc else width(np.stack(volumes))


def deviation(lib: Any, a: Any, b: Any) -> Any:
    return (a + b).std(axis=-1)


def product(lib: Any, a: Any, b: Any) -> Any:
    return (a * b).sum()


# The number of operands, at least and at most.
COMPUTED: dict[Callable[..., Any], tuple[int, int]] = {
    formula: (3, 3), total: (2, 6), products: (2, 4), chosen: (3, 3), compared: (3, 3),
    sliced: (2, 2), planes: (3, 3), turned: (2, 2), along: (2, 2), largest: (2, 2),
    shared: (3, 3), viewed: (3, 3), mean: (2, 6), std: (2, 5), highest: (2, 6),
}  # fmt: skip
# Those that take more, and are for blocks.
MORE: dict[Callable[..., Any], tuple[int, int]] = COMPUTED | {
    middle: (2, 2), spread: (2, 2), deviation: (2, 2), product: (2, 2),
}  # fmt: skip

# Those that need little at once: if all waited for room, nothing would be loaded ahead.
LIGHT = (compared, sliced, planes, largest, mean)


def same(value: Any, expected: Any) -> None:
    assert type(value) is type(expected)
    assert value.dtype == expected.dtype
    assert value.shape == expected.shape
    assert value.tobytes() == expected.tobytes()


class Files:
    """What the threads of a storm do with files whose contents are known."""

    computed = COMPUTED
    share = SHARE

    def __init__(self, files: list[tuple[Path, Array]], cache: DataCache) -> None:
        self.cache = cache
        self.budget = cache.budget
        # As float32, so that each is a volume and so is each result.
        self.contents = {path: data.astype(np.float32) for path, data in files}
        self.raw = dict(files)
        self.compressed = [path for path in self.raw if path.suffix == ".gz"]
        self.plain = [path for path in self.raw if path.suffix != ".gz"]
        self.holding = threading.BoundedSemaphore(HOLDERS)
        self.slow = FaultyReader(seconds=0.004, steps=8)
        self.failing = FaultyReader(fail_every=2, when="before")
        self.interrupted = FaultyReader(fail_every=2, error=InterruptedRead)
        self.inner = FaultyReader()  # with no fault: another key for the same file

    def some(self, dice: random.Random, count: int, **how: Any) -> list[LazyReadData]:
        paths = self.paths(dice, count)
        return [LazyReadData(path, dtype=np.float32, **how) for path in paths]

    def paths(self, dice: random.Random, count: int) -> list[Path]:
        """Some files; at most one is compressed, since reading those takes three volumes more."""
        paths = dice.sample(self.plain, count)
        if dice.random() < 0.2:
            paths[dice.randrange(count)] = dice.choice(self.compressed)
        return paths

    def content(self, proxy: LazyReadData) -> Array:
        return self.contents[Path(str(proxy.filename))]

    # Acts. None of them holds more than one volume at any time.

    def expression(self, dice: random.Random, **how: Any) -> None:
        function = dice.choice(list(self.computed if dice.random() < 0.3 else LIGHT))
        proxies = self.some(dice, dice.randint(*self.computed[function]), **how)
        with np.errstate(all="ignore"):
            expected = function(np, *map(self.content, proxies))
            result = function(lc, *proxies)
            same(result.data if isinstance(result, LazyReadData) else result, expected)

    def read(self, dice: random.Random) -> None:
        """A file that is held, evicted and asked for again: all the same memory."""
        [proxy] = self.some(dice, 1)
        value = proxy.data
        proxy.release()
        same(proxy.data, self.content(proxy))
        same(value, self.content(proxy))

    def as_it_is(self, dice: random.Random) -> None:
        """Files in their own types, of which parts and comparisons are small."""
        paths = self.paths(dice, 3)
        function = dice.choice([compared, planes])
        expected = function(np, *(self.raw[path] for path in paths))
        same(function(lc, *map(lc.load, paths)).data, expected)

    def together(self, dice: random.Random) -> None:
        a, b = self.some(dice, 2)
        both = lc.compute(a[2:9] + b[2:9], a > b)
        x, y = self.content(a), self.content(b)
        same(both[0], x[2:9] + y[2:9])
        same(both[1], x > y)

    def few_operations(self, dice: random.Random) -> None:
        self.expression(dice, nops=dice.randint(1, 2))

    def in_place(self, dice: random.Random) -> None:
        changed, other = self.some(dice, 2)
        twin = LazyReadData(changed.filename, dtype=np.float32)
        before = twin[1:7] * 2
        changed += other
        x, y = self.content(changed), self.content(other)
        same(changed.data, x + y)
        same(before.data, x[1:7] * 2)
        same(twin.data, x)
        changed[3] = 1
        expected = x + y
        expected[3] = 1
        same(changed.data, expected)

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Whether this thread may hold a volume besides the one that each may."""
        mine = self.holding.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self.holding.release()

    def view(self, dice: random.Random) -> None:
        with self.hold() as mine:
            if not mine:
                return
            [proxy] = self.some(dice, 1)
            view = proxy.data[3:]
            proxy.release()
            same(proxy.data, self.content(proxy))
            self.expression(dice)
            same(proxy.data, self.content(proxy))
            same(view, self.content(proxy)[3:])
            del view

    def pin(self, dice: random.Random) -> None:
        with self.hold() as mine:
            if not mine:
                return
            [proxy] = self.some(dice, 1)
            with proxy.pinned() as value:
                self.expression(dice)
                same(value, self.content(proxy))
                del value

    def loop(self, dice: random.Random) -> None:
        """A loop, with or without loads ahead of it, left in every way that there is."""
        proxies = self.some(dice, 8)
        npreload = dice.choice([0, 1, 2, 4])
        items = dice.choice([list, tuple, iter, self.as_dicts, self.as_pairs])(proxies)
        iterator = iter(dice.choice([PreloadList, PreloadIterator])(items, npreload))
        for item in islice(iterator, dice.choice([1, 3, 8])):
            proxy = item if isinstance(item, LazyReadData) else item[0]
            same(proxy.data, self.content(proxy))
        if dice.random() < 0.5:
            iterator.close()

    def left_loop(self, dice: random.Random) -> None:
        """Loops that are left early, while slow loads are under way."""
        loops = []
        for _ in range(6):
            loops.append(PreloadIterator(self.some(dice, 4, reader=self.slow), 4))
            if dice.random() < 0.2:
                proxy = next(loops[-1])
                same(proxy.data, self.content(proxy))
            if dice.random() < 0.5:
                loops.pop().close()

    @staticmethod
    def as_dicts(proxies: list[LazyReadData]) -> Iterator[dict[Any, Any]]:
        return ({0: proxy, "label": 1} for proxy in proxies)

    @staticmethod
    def as_pairs(proxies: list[LazyReadData]) -> Any:
        return zip(proxies, range(99), strict=False)

    def two_loops(self, dice: random.Random) -> None:
        left, right = self.some(dice, 4), self.some(dice, 4)
        for a, b in zip(PreloadList(left, 2), PreloadList(right, 2), strict=True):
            same((a - b).data, self.content(a) - self.content(b))
            if dice.random() < 0.1:
                break

    def nested_loops(self, dice: random.Random) -> None:
        inner = PreloadList(self.some(dice, 3), 2)
        for a in PreloadList(self.some(dice, 2), 1):
            for b in inner:
                same((a > b).data, self.content(a) > self.content(b))

    def scope(self, dice: random.Random) -> None:
        """A share of the budget, left in the usual way or by an exception."""
        try:
            with DataCache(self.share):
                self.inside(dice)
                if dice.random() < 0.3:
                    raise LeavingError
                self.inside(dice)
        except LeavingError:
            pass

    def inside(self, dice: random.Random) -> None:
        # Files that nobody holds outside operations: that would be charged to this share.
        self.expression(dice, reader=self.inner)

    def suspended(self, dice: random.Random) -> None:
        """Scopes in generators, which begin and end in any order, or are forgotten."""

        def steps() -> Iterator[None]:
            with DataCache(self.share):
                for _ in range(2):
                    self.inside(dice)
                    yield

        generators = [steps() for _ in range(3)]
        for generator in dice.choices(generators, k=5):
            next(generator, None)
        dice.shuffle(generators)
        if dice.random() < 0.5:
            generators[0].close()
        generators.clear()

    def wrong(self, dice: random.Random) -> None:
        """Readers that fail, or that an interrupt hits, in demands and ahead of loops."""
        reader = dice.choice([self.failing, self.interrupted])
        loop = PreloadIterator(self.some(dice, 6, reader=reader), dice.choice([0, 1, 3]))
        for proxy in loop:
            with self.expected_fault(reader):
                same(proxy.data, self.content(proxy))
        with self.expected_fault(reader):
            self.expression(dice, reader=reader)

    @contextmanager
    def expected_fault(self, reader: FaultyReader) -> Iterator[None]:
        try:
            yield
        except OSError:
            assert reader is self.failing
        except InterruptedRead:
            assert reader is self.interrupted

    def tidy(self, dice: random.Random) -> None:
        if dice.random() < 0.3:
            lc.get_cache().clear()
        else:
            for proxy in self.some(dice, 5):
                proxy.release()

    def resize(self, dice: random.Random) -> None:
        lc.set_budget(self.budget + dice.choice([0, 2, 8]) * VOLUME)

    def ask(self) -> None:
        """What anybody may ask at any time."""
        cache = self.cache
        before = cache.stats()
        assert 0 <= cache.headroom <= cache.budget
        held = cache.held()
        assert all(holder.nbytes > 0 for holder in held)
        after = cache.stats() - before
        assert min(after.loads, after.hits, after.misses, after.evictions, after.waits) >= 0
        assert repr(cache)


class Streams(Files):
    """The same, and what goes by blocks only."""

    computed = MORE
    share = NEED_BY_BLOCKS + VOLUME

    def save(self, dice: random.Random) -> None:
        """Results that go to disk, block by block where they can."""
        a, b = self.some(dice, 2)
        folder = self.plain[0].parent / f"out-{threading.get_ident()}"
        folder.mkdir(exist_ok=True)
        paths = [folder / "out.npy", folder / dice.choice(["out.nii", "out.nii.gz"])]
        lc.save_all({paths[0]: a - b, paths[1]: a + b})
        x, y = self.content(a), self.content(b)
        same(np.load(paths[0]), x - y)
        same(np.asarray(nib.load(paths[1]).dataobj), x + y)
        assert set(folder.iterdir()) == set(paths)
        shutil.rmtree(folder)

    def streamed(self, dice: random.Random) -> None:
        """Files that nobody wants besides, in their own types."""
        paths = self.paths(dice, 4)
        result = lc.mean(lc.load(path) for path in paths)
        same(result.data, np.mean(np.stack([self.raw[path] for path in paths]), axis=0))


@pytest.fixture
def many(files: list[tuple[Path, Array]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    lc.set_budget(BUDGET)
    with fast_switching():
        yield Files(files, lc.get_cache())
    gc.collect()


def acts(many: Files) -> dict[Act, int]:
    return {
        many.expression: 6, many.read: 3, many.as_it_is: 2, many.together: 2,
        many.few_operations: 2, many.in_place: 2, many.view: 3, many.pin: 1, many.loop: 3,
        many.left_loop: 4, many.two_loops: 1, many.nested_loops: 1, many.scope: 1,
        many.suspended: 1, many.wrong: 5, many.tidy: 2,
    }  # fmt: skip


def test_a_storm_of_everything_keeps_values_and_budget(
    many: Files, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    watch = Watch(monkeypatch, many.cache)
    storm = Storm(watch, choose_from(acts(many)), pytestconfig.getoption("storm_seconds"))
    storm.rage([many.ask])
    stats = many.cache.stats()
    assert stats.overcommits == 0
    assert stats.peak_bytes <= BUDGET


# What was admitted to a larger budget may not fit the smaller one: that is no fault.
@pytest.mark.filterwarnings("ignore::lazycache.errors.BudgetExceededWarning")
def test_a_storm_of_everything_goes_on_while_the_budget_changes(
    many: Files, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    watch = Watch(monkeypatch, many.cache, holds=False)
    choose = choose_from(acts(many) | {many.resize: 4})
    storm = Storm(watch, choose, pytestconfig.getoption("storm_seconds"))
    storm.rage([many.ask])
    stats = many.cache.stats()
    assert stats.overcommits <= stats.misses // 100
    assert stats.peak_bytes <= BUDGET + 8 * VOLUME


@pytest.fixture
def streams(files: list[tuple[Path, Array]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Volumes go by sixteen blocks."""
    monkeypatch.setattr(needs, "_WORTH_IT", 0)
    monkeypatch.setattr(program, "_SHORTEST", VOLUME // 4 // 16)
    lc.set_budget(BUDGET_BY_BLOCKS)
    threads = _thread._count()
    with fast_switching():
        yield Streams(files, lc.get_cache())
    gc.collect()
    deadline = time.monotonic() + SOON
    while _thread._count() > threads:  # they end by themselves
        assert time.monotonic() < deadline, "a thread is left"
    assert not list(files[0][0].parent.rglob(".lazycache*"))


def acts_by_blocks(streams: Streams) -> dict[Act, int]:
    return acts(streams) | {streams.save: 3, streams.streamed: 4}


def test_a_storm_by_blocks_keeps_values_and_budget(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    watch = Watch(monkeypatch, streams.cache)
    choose = choose_from(acts_by_blocks(streams))
    storm = Storm(watch, choose, pytestconfig.getoption("storm_seconds"))
    storm.rage([streams.ask])
    stats = streams.cache.stats()
    assert stats.overcommits == 0
    assert stats.peak_bytes <= BUDGET_BY_BLOCKS


@pytest.mark.filterwarnings("ignore::lazycache.errors.BudgetExceededWarning")
def test_a_storm_by_blocks_goes_on_while_the_budget_changes(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    watch = Watch(monkeypatch, streams.cache, holds=False)
    choose = choose_from(acts_by_blocks(streams) | {streams.resize: 4})
    storm = Storm(watch, choose, pytestconfig.getoption("storm_seconds"))
    storm.rage([streams.ask])
    stats = streams.cache.stats()
    assert stats.overcommits <= stats.misses // 100
    assert stats.peak_bytes <= BUDGET_BY_BLOCKS + 8 * VOLUME


@pytest.mark.parametrize("worth_it", [0, needs._WORTH_IT], ids=["blocks", "whole"])
@pytest.mark.parametrize("function", MORE, ids=lambda function: function.__name__)
def test_no_operation_of_the_storm_takes_more_than_it_asks_for(
    files: list[tuple[Path, Array]],
    function: Callable[..., Any],
    worth_it: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(needs, "_WORTH_IT", worth_it)
    operation = DataCache.operation

    def ask(cache: DataCache, label: str, *, workspace: int, room: int, **kwargs: Any) -> Any:
        asked.append(workspace + room)
        return operation(cache, label, workspace=workspace, room=room, **kwargs)

    def compute(budget: int) -> CacheStats:
        with DataCache(budget) as cache:
            proxies = [LazyReadData(path, dtype=np.float32) for path, _ in files[-most:]]
            result = function(lc, *proxies)
            _ = result.data if isinstance(result, LazyReadData) else result
            return cache.stats()

    most = MORE[function][1]
    monkeypatch.setattr(DataCache, "operation", ask)
    compute(100 * VOLUME)
    stats = compute(max(asked))
    assert stats.overcommits == 0
    assert stats.peak_bytes <= max(asked)
