"""Readers that do wrong: the error is the right one, and afterwards nothing is left of the fault.

Each fault is made by `lazycache.testing.FaultyReader` and met through what users call.
"""

from __future__ import annotations

import ast
import gzip
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from support import Running, preload_threads, table_of, together

import lazycache as lc
from lazycache import DataCache, LazyReadData, PreloadIterator, writing
from lazycache.errors import (
    BudgetExceededError,
    BudgetExceededWarning,
    FileChangedError,
    FileChangedWarning,
    LoadCycleError,
    ReadError,
    WriteError,
)
from lazycache.readers.base import LoadCancelled, cancellable
from lazycache.testing import FaultyReader, check_reader

SHAPE = (64, 64, 160)  # over 2 MiB of float32: memory of our own, and several checkpoints
VOLUME = int(np.prod(SHAPE)) * 4
# A reader of a .npy file announces exactly its array.
COUNT = 6


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random(SHAPE, "f4") for _ in range(COUNT)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, arrays: list[np.ndarray]) -> list[str]:
    folder = tmp_path_factory.mktemp("volumes")
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    return [str(folder / f"{number}.npy") for number in range(COUNT)]


@pytest.fixture
def cache() -> Iterator[DataCache]:
    with DataCache(20 * VOLUME) as cache:
        yield cache


def look(cache: DataCache, held: int = 0, overcommits: int = 0) -> None:
    """The cache is whole, and has nothing left once it is cleared but what users hold."""
    cache.check()
    table = table_of(cache)
    assert not table.uses
    table.pool.join_threads(20)
    assert not preload_threads()
    assert not table.flights
    assert cache.stats().overcommits == overcommits
    cache.clear()
    assert cache.used == held


# The reader itself


def test_without_faults_it_keeps_the_contract(paths: list[str]) -> None:
    check_reader(FaultyReader(), paths[0])


def test_a_registered_one_wraps_the_next_reader(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, cache: DataCache
) -> None:
    monkeypatch.setattr(lc.readers, "_registered", ())
    faulty = FaultyReader()
    lc.register_reader(faulty)
    assert faulty.can_read(paths[0])
    assert not faulty.can_read("a.no-such-format")
    assert LazyReadData(paths[0]).data.shape == SHAPE
    assert faulty.reads == 1


def test_it_counts_by_file_and_fails_every_nth(paths: list[str]) -> None:
    faulty = FaultyReader(fail_every=3)
    outcomes = []
    for turn in range(6):
        try:
            faulty.read(paths[turn % 2])
            outcomes.append(True)
        except OSError:
            outcomes.append(False)
    assert outcomes == [True, True, False] * 2
    assert (faulty.reads, faulty.reads_of(paths[0]), faulty.reads_of(paths[1])) == (6, 3, 3)


def test_a_slow_read_stops_at_the_next_step(paths: list[str]) -> None:
    faulty = FaultyReader(seconds=100, steps=10_000)
    asked = iter([False] * 3)
    with cancellable(lambda: next(asked, True)), pytest.raises(LoadCancelled):
        faulty.read(paths[0])


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_faults_happen_when_they_are_asked_to(paths: list[str], when: Any) -> None:
    seen: list[str] = []

    class Wrapped(FaultyReader):
        def read(self, path: str, **options: Any) -> Any:
            seen.append("open")
            data = super().read(path, **options)
            seen.append("close")
            return data

    FaultyReader(Wrapped(), during=lambda path: seen.append("fault"), when=when).read(paths[0])
    # "Amid" is at the first checkpoint of the reader of NumPy's files.
    assert seen.index("fault") == {"before": 0, "amid": 1, "after": 2}[when]


def test_a_healed_one_reads_like_the_wrapped_one(
    paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(
        fail_every=1, hangs=True, size_factor=10, larger=3, keeps=True, nothing=True, asks="thread"
    )
    faulty.heal()
    assert np.array_equal(faulty.read(paths[0]), arrays[0])
    assert faulty.probe(paths[0]).nbytes == VOLUME
    assert faulty.kept == {}


# Errors

# How users ask; the second of the volumes is the bad one.
Ask = Callable[[list[LazyReadData], Path], Any]


def loop(volumes: list[LazyReadData]) -> list[Any]:
    with PreloadIterator(volumes, npreload=2) as items:
        return [volume.data.sum() for volume in items]


def save(volumes: list[LazyReadData], path: Path) -> Any:
    (volumes[0] + volumes[1]).save(path)
    return np.load(path)


def save_all(volumes: list[LazyReadData], path: Path) -> Any:
    lc.save_all({path: volumes[0] - volumes[1], f"{path}.nii": lc.mean(volumes)})
    return np.load(path)


ASKS: dict[str, Ask] = {
    "data": lambda v, path: v[1].data,
    "mean": lambda v, path: lc.mean(v).data,
    "formula": lambda v, path: ((v[0] * 2 + v[1] * v[2]) / 1.2).data,
    "part": lambda v, path: v[1][..., 10:20].data,
    "compute": lambda v, path: lc.compute(v[0] + v[1], v[1], v[2])[0],
    "loop": lambda v, path: loop(v),
    "save": save,
    "save_all": save_all,
    "pinned": lambda v, path: pin(v[1]),
}


def pin(proxy: LazyReadData) -> Any:
    with proxy.pinned() as data:
        return data


FAULTS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "an error": ({"fail_every": 1}, OSError),
    "one error object": ({"fail_every": 1, "error": ValueError("bad voxels")}, ValueError),
    "no memory": ({"fail_every": 1, "error": MemoryError}, MemoryError),
    "an interrupt": ({"fail_every": 1, "error": KeyboardInterrupt}, KeyboardInterrupt),
    "nothing": ({"nothing": True}, ReadError),
    "itself": ({"asks": "directly"}, LoadCycleError),
}
OTHER_THREADS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "itself in a thread": ({"asks": "thread"}, LoadCycleError),
    "itself in an executor": ({"asks": "executor"}, LoadCycleError),
}


def files_named(error: BaseException) -> str:
    """All that an error and those that led to it say."""
    told = ""
    found: BaseException | None = error
    while found is not None:
        told += f"{found} {getattr(found, 'filename', '')} {getattr(found, '__notes__', '')}"
        found = found.__cause__
    return told


def outcome_of(function: Callable[[], Any]) -> Any:
    """What the function returns, or the error about a file that it raises."""
    try:
        return function()
    except OSError as error:
        return error


def volumes_of(paths: list[str], faulty: FaultyReader) -> list[LazyReadData]:
    return [LazyReadData(paths[0]), LazyReadData(paths[1], reader=faulty), LazyReadData(paths[2])]


def fails_and_heals(
    cache: DataCache, paths: list[str], fault: str, when: str, ask: str, folder: Path
) -> None:
    settings, kind = {**FAULTS, **OTHER_THREADS}[fault]
    faulty = FaultyReader(when=when, **settings)  # type: ignore[arg-type]
    volumes = volumes_of(paths, faulty)
    threads = threading.active_count()
    for turn in range(1, 3):
        with pytest.raises(kind) as caught:
            ASKS[ask](volumes, folder / "out.npy")
        # Once ahead of the demand, once for it, and each once more with the cache emptied where
        # memory was lacking; not again and again.
        assert faulty.reads <= (4 if kind is MemoryError else 2) * turn
        assert type(caught.value) is kind
        if kind is not KeyboardInterrupt:
            assert paths[1] in files_named(caught.value)
        assert not list(folder.iterdir())
        look(cache)
        assert threading.active_count() == threads
    faulty.heal()
    found = ASKS[ask](volumes, folder / "out.npy")
    with DataCache(20 * VOLUME):
        good = [LazyReadData(path) for path in paths[:3]]
        np.testing.assert_array_equal(found, ASKS[ask](good, folder / "good.npy"))
    del found, good, volumes, caught
    look(cache)


@pytest.mark.parametrize(
    ("ask", "when"),
    [
        *((ask, "amid") for ask in ASKS),
        *((ask, when) for ask in ("data", "mean", "loop") for when in ("before", "after")),
    ],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_leaves_nothing(
    cache: DataCache, paths: list[str], fault: str, when: str, ask: str, tmp_path: Path
) -> None:
    fails_and_heals(cache, paths, fault, when, ask, tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("ask", ["data", "mean", "loop", "save"])
@pytest.mark.parametrize("fault", OTHER_THREADS)
def test_a_reader_that_asks_for_its_own_data_in_another_thread_gets_an_error(
    cache: DataCache, paths: list[str], fault: str, ask: str, tmp_path: Path
) -> None:
    fails_and_heals(cache, paths, fault, "amid", ask, tmp_path)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "an interrupt"])
def test_everyone_who_asked_gets_the_error_of_one_read(
    cache: DataCache, paths: list[str], fault: str
) -> None:
    settings, kind = FAULTS[fault]
    faulty = FaultyReader(hangs=True, **settings)

    def ask() -> None:
        with pytest.raises(kind) as caught:
            LazyReadData(paths[1], reader=faulty, cache=cache).data
        assert paths[1] in files_named(caught.value)

    first = Running(ask)
    faulty.wait_reached()
    others = [Running(ask) for _ in range(4)]
    while len(table_of(cache).blocked) < 4:
        assert not any(thread.done for thread in others)
    faulty.let_go()
    for thread in [first, *others]:
        thread.result()
    assert faulty.reads == 1
    look(cache)


def test_an_interrupt_of_who_reads_makes_another_read(cache: DataCache, paths: list[str]) -> None:
    faulty = FaultyReader(hangs=True, fail_every=1, error=KeyboardInterrupt)
    volume = LazyReadData(paths[1], reader=faulty, cache=cache)
    first = Running(lambda: volume.data)
    faulty.wait_reached()
    other = Running(lambda: volume.data.sum())
    while not table_of(cache).blocked:
        assert not other.done
    faulty.let_go()
    assert isinstance(first.error(), KeyboardInterrupt)
    assert isinstance(other.error(), KeyboardInterrupt)
    assert faulty.reads == 2
    look(cache)


def test_every_third_read_fails_and_all_others_are_right(
    cache: DataCache, paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(fail_every=3, seconds=0.002, steps=2)
    cache.budget = 4 * VOLUME  # one for each thread, and six files

    def ask(thread: int) -> tuple[int, int]:
        right = wrong = 0
        for turn in range(40):
            number = (turn * (thread + 1) + thread) % COUNT
            proxy = LazyReadData(paths[number], reader=faulty, cache=cache)
            data = outcome_of(lambda proxy=proxy: proxy.data)
            if isinstance(data, OSError):
                assert paths[number] in files_named(data)
                wrong += 1
            else:
                assert data.tobytes() == arrays[number].tobytes()
                right += 1
            del data
        return right, wrong

    outcomes = together(4, ask)
    assert sum(wrong for _, wrong in outcomes) >= faulty.reads // 3
    stats = cache.stats()
    assert stats.load_failures == faulty.reads // 3
    assert stats.loads == faulty.reads - faulty.reads // 3
    look(cache)


# Slow and hanging


def test_nobody_waits_for_a_read_that_hangs_but_who_wants_it(
    cache: DataCache, paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(hangs=True)
    volumes = [LazyReadData(path, cache=cache) for path in paths]
    stuck = Running(lambda: LazyReadData(paths[1], reader=faulty, cache=cache).data.sum())
    faulty.wait_reached()
    assert np.array_equal(lc.mean(volumes).data, np.mean(arrays, axis=0))
    assert not stuck.done
    assert cache.stats().loads == COUNT
    cache.clear()
    assert cache.used == VOLUME  # what is being read
    faulty.let_go()
    assert stuck.result() == arrays[1].sum()
    look(cache)


def test_a_preload_that_hangs_holds_up_the_end_of_a_loop_for_a_second_at_most(
    cache: DataCache, paths: list[str]
) -> None:
    faulty = FaultyReader(hangs=True)
    volumes = [LazyReadData(path, reader=faulty) for path in paths]
    table = table_of(cache)
    started = table.clock()
    with PreloadIterator(volumes, npreload=2):
        faulty.wait_reached(2)
    assert table.clock() - started < 10
    faulty.let_go()
    look(cache)
    assert faulty.reads == 2


def test_memory_of_a_preload_that_hangs_is_waited_for_as_long_as_the_limit(
    paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(hangs=True)
    with DataCache(VOLUME + 100) as cache:
        table_of(cache).wait_limit = 0.2
        volumes = [LazyReadData(path, reader=faulty) for path in paths]
        with PreloadIterator(volumes, npreload=1):
            faulty.wait_reached()
            with pytest.warns(BudgetExceededWarning):
                assert np.array_equal(LazyReadData(paths[3]).data, arrays[3])
        faulty.let_go()
        assert cache.stats().overcommits == 1
        look(cache, overcommits=1)


def test_a_demand_ends_a_slow_preload_that_nobody_wants(
    paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(seconds=1000, steps=100_000)
    with DataCache(VOLUME + 100) as cache:
        with PreloadIterator([LazyReadData(path, reader=faulty) for path in paths], npreload=1):
            faulty.wait_reached()
            assert np.array_equal(LazyReadData(paths[3]).data, arrays[3])
        look(cache)


# Sizes


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("factor", [0.1, 10])
def test_a_reader_that_lies_about_sizes_gives_right_values_within_the_budget(
    paths: list[str],
    factor: float,
    ask: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    faulty = FaultyReader(size_factor=factor)
    with DataCache(14 * VOLUME) as cache:
        with caplog.at_level(logging.WARNING, "lazycache"):
            found = ASKS[ask](volumes_of(paths, faulty), tmp_path / "out.npy")
        good = ASKS[ask]([LazyReadData(path) for path in paths[:3]], tmp_path / "good.npy")
        np.testing.assert_array_equal(found, good)
        if factor < 1:
            assert any("faulty" in text and "announced" in text for text in caplog.messages)
        else:
            assert not caplog.messages
        assert cache.stats().peak_bytes <= 14 * VOLUME
        del found, good
        look(cache)


def test_an_announced_size_over_the_budget_is_counted_or_in_a_strict_cache_refused(
    paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(size_factor=10)
    with DataCache(3 * VOLUME) as cache:
        with pytest.warns(BudgetExceededWarning):
            data = LazyReadData(paths[0], reader=faulty).data
        assert np.array_equal(data, arrays[0])
        assert cache.used == VOLUME
        del data
        look(cache, overcommits=1)
    with DataCache(3 * VOLUME, strict=True) as cache:
        proxy = LazyReadData(paths[0], reader=faulty)
        with pytest.raises(BudgetExceededError, match=r"0\.npy"):
            proxy.data
        assert faulty.reads == 1  # before reading
        look(cache)
        assert np.array_equal(LazyReadData(paths[0]).data, arrays[0])


def test_bytes_that_were_not_announced_send_others_away_and_count_only_if_that_is_not_enough(
    paths: list[str],
) -> None:
    faulty = FaultyReader(size_factor=0.1)
    with DataCache(3 * VOLUME) as cache:
        for path in paths[:3]:
            LazyReadData(path).data
        LazyReadData(paths[3], reader=faulty).data
        assert cache.used == 3 * VOLUME
        assert cache.stats().evictions == 1
        look(cache)
    with DataCache(VOLUME // 2) as cache:
        with pytest.warns(BudgetExceededWarning):
            data = LazyReadData(paths[3], reader=faulty).data
        assert cache.used == VOLUME
        del data
        look(cache, overcommits=1)


# What the data are a view of


def test_a_view_is_charged_what_it_keeps_alive(
    cache: DataCache, paths: list[str], arrays: list[np.ndarray]
) -> None:
    faulty = FaultyReader(larger=3)
    proxy = LazyReadData(paths[0], reader=faulty)
    data = proxy.data
    assert np.array_equal(data, arrays[0])
    assert not data.flags.writeable
    assert cache.used == 3 * VOLUME
    part = data[0, 0]
    del data
    cache.clear()
    assert cache.used == 3 * VOLUME  # the part keeps all of it alive
    assert proxy.data[0, 0].tobytes() == part.tobytes()
    assert faulty.reads == 1
    assert cache.used == 3 * VOLUME
    del part
    look(cache)


@pytest.mark.parametrize("larger", [1, 3])
def test_what_a_reader_keeps_is_charged_once_and_as_long_as_it_keeps_it(
    cache: DataCache, paths: list[str], arrays: list[np.ndarray], larger: int
) -> None:
    faulty = FaultyReader(keeps=True, larger=larger)
    first, again = (LazyReadData(paths[0], reader=faulty) for _ in range(2))
    size = larger * VOLUME
    assert np.array_equal((first + again).data, arrays[0] * 2)
    assert cache.used == size
    for _ in range(3):
        cache.clear()
        assert cache.used == size
        assert [holder.reason for holder in cache.held()] == ["held outside"]
        # As another key, so that it is read again: the same memory.
        other = LazyReadData(paths[0], reader=faulty, dtype="f4")
        assert np.array_equal(other.data, arrays[0])
        assert np.array_equal(first.data, arrays[0])
        assert cache.used == size
        del other
    look(cache, held=size)
    faulty.kept.clear()
    assert cache.used == 0
    look(cache)


def test_a_budget_that_a_reader_has_filled_is_exceeded_and_counted(paths: list[str]) -> None:
    faulty = FaultyReader(keeps=True)
    with DataCache(2 * VOLUME) as cache:
        for path in paths[:2]:
            LazyReadData(path, reader=faulty).data
        assert cache.stats().overcommits == 0
        with pytest.warns(BudgetExceededWarning):
            LazyReadData(paths[2], reader=faulty).data
        assert cache.used == 3 * VOLUME
        look(cache, held=3 * VOLUME, overcommits=1)
        faulty.kept.clear()
        look(cache, overcommits=1)


def test_no_fault_leaves_a_file_open(paths: list[str], cache: DataCache) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for settings, kind in FAULTS.values():
        with pytest.raises(kind):
            LazyReadData(paths[0], reader=FaultyReader(**settings)).data
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_header_is_understood_although_python_mixes_threads_up(
    paths: list[str], arrays: list[np.ndarray], cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 counts the depth of a syntax tree for all threads that make one together."""
    real, calls = ast.literal_eval, iter([True, True])

    def mixed_up(text: str) -> Any:
        if next(calls, False):
            raise SystemError("AST constructor recursion depth mismatch")
        return real(text)

    monkeypatch.setattr(ast, "literal_eval", mixed_up)
    assert np.array_equal(LazyReadData(paths[0]).data, arrays[0])


# Not enough memory for real


def in_a_process(
    code: str, *arguments: object, prefix: tuple[str, ...] = (), timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lc.__file__).parents[1])}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def must_end_well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of the address space are Linux's"
)

# Of all scripts below: what isn't measured comes before the limit.
LIMITED = """
import os, resource, sys, threading
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))  # as ulimit -v does, before all else
import numpy as np
import lazycache as lc
from lazycache import LazyReadData
from lazycache.testing import FaultyReader

folder = sys.argv[1]
LazyReadData(f"{folder}/small.nii.gz").data, LazyReadData(f"{folder}/small.npy").data
lc.get_cache().clear()

def limit(more):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), used + (more << 20)))

def fails(function, *names):
    try:
        function()
    except MemoryError as error:
        told = f"{error} {getattr(error, '__notes__', '')}"
        assert all(name in told for name in names), told
    else:
        raise AssertionError("there was enough memory")

def whole(cache, held=0):
    for thread in threading.enumerate():
        if thread.name == "lazycache-preload":  # an error may come before the end of other reads
            thread.join()
    cache.check()
    assert cache.stats().overcommits == 0
    cache.clear()
    assert cache.used == held, cache.used
"""


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of zeros: of 300 MiB, ten of 32 MiB, small ones."""
    folder = tmp_path_factory.mktemp("zeros")

    def sparse(name: str, mib: int) -> None:
        with open(folder / name, "wb") as file:
            header = {"descr": "<f4", "fortran_order": True, "shape": (mib << 8, 32, 32)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + (mib << 20))

    sparse("big.npy", 300)
    sparse("small.npy", 1)
    for number in range(10):
        sparse(f"{number}.npy", 32)
    for name, mib in (("big.nii.gz", 300), ("small.nii.gz", 4)):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape((mib, 1024, 256))
        with gzip.open(folder / name, "wb", compresslevel=1) as file:
            header.write_to(file)
            file.write(bytes(4))
            for _ in range(mib):
                file.write(bytes(1 << 20))
    return folder


@LINUX
@pytest.mark.parametrize("name", ["big.npy", "big.nii.gz"])
def test_a_file_that_memory_has_no_room_for_is_an_error_and_others_go_on(
    zeros: Path, name: str
) -> None:
    code = """
lc.set_budget("8GiB")
cache = lc.get_cache()
limit(200)
big = LazyReadData(f"{folder}/{sys.argv[2]}")
for _ in range(3):
    fails(lambda: big.data, sys.argv[2])
    fails(lambda: (big[::2] + big[1::2]).data, sys.argv[2])
    fails(lambda: lc.mean([big, big]).data, sys.argv[2])
    whole(cache)
    for small in ("small.npy", "small.nii.gz", "0.npy"):
        assert not LazyReadData(f"{folder}/{small}").data.any()
    whole(cache)
seen = []
ends = [LazyReadData(f"{folder}/{number}.npy") for number in (0, 1)]
for volume in lc.PreloadList([ends[0], big, ends[1]]):
    try:
        seen.append(bool(volume.data.any()))
    except MemoryError:
        seen.append("failed")
assert seen == [False, "failed", False]
del volume
whole(cache)
"""
    must_end_well(in_a_process(LIMITED + code, zeros, name))


@LINUX
def test_an_expression_that_memory_has_no_room_for_is_an_error_and_smaller_ones_go_on(
    zeros: Path,
) -> None:
    code = """
lc.set_budget("8GiB")
cache = lc.get_cache()
limit(200)
v = [LazyReadData(f"{folder}/{number}.npy") for number in range(10)]
for _ in range(3):
    fails(lambda: (v[0].astype("f8") * v[1] + v[2].astype("c16")).data, ".npy")
    whole(cache)
    fails(lambda: np.stack(v).data, ".npy")
    whole(cache)
    fails(lambda: lc.save_all({f"{folder}/out.npy": np.stack(v)}), ".npy")
    assert not os.path.exists(f"{folder}/out.npy")
    whole(cache)
    assert not (v[0] + v[1]).data.any()
    whole(cache)
"""
    must_end_well(in_a_process(LIMITED + code, zeros))


@LINUX
def test_numpy_out_of_memory_in_one_reader_does_not_disturb_the_reads_of_others(
    zeros: Path,
) -> None:
    code = """
def greedy(path):
    return np.ones(1 << 30, np.uint8)

lc.set_budget("150MiB")
cache = lc.get_cache()
go = threading.Barrier(3)
limit(400)
failures = []

def fail():
    go.wait()
    for _ in range(30):
        fails(lambda: LazyReadData(f"{folder}/small.npy", reader=greedy).data, "small.npy")

def read(first):
    go.wait()
    for turn in range(60):
        path = f"{folder}/{(first + turn) % 5}.npy"
        assert not LazyReadData(path).data.any()

def run(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        failures.append(error)
        raise

threads = [threading.Thread(target=run, args=args) for args in [(fail,), (read, 0), (read, 3)]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert cache.stats().load_failures == 30
whole(cache)
"""
    must_end_well(in_a_process(LIMITED + code, zeros))


@LINUX
@pytest.mark.parametrize("mib", [300, 1000])
def test_an_automatic_budget_leaves_enough_under_a_limit_of_the_address_space(
    zeros: Path, mib: int
) -> None:
    code = """
limit(int(sys.argv[2]))
lc.set_budget("auto")
cache = lc.get_cache()
assert (int(sys.argv[2]) << 19) * 0.8 < cache.budget <= (int(sys.argv[2]) << 19), cache.budget
v = [LazyReadData(f"{folder}/{number}.npy") for number in range(10)]
for _ in range(2):
    mean, sd = lc.compute(lc.mean(v), lc.std(v, ddof=1))
    assert not mean.any() and not sd.any()
    del mean, sd
for volume in lc.PreloadList(v):
    assert not volume.data.any()
del volume
whole(cache)
"""
    must_end_well(in_a_process(LIMITED + code, zeros, mib))


# Files that change

SMALL = (20, 30, 40)


class Volume:
    """An image file, or a pair of them, that a test changes; ``value`` is what its voxels are."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = str(folder / name)
        self.value: np.ndarray | None = None
        self.write(1)

    def write(self, value: float, shape: tuple[int, ...] = SMALL, dtype: str = "f4") -> None:
        """Put another file in its place."""
        array = np.full(shape, value, dtype)
        scratch = Path(self.path).parent / "scratch"
        scratch.mkdir(exist_ok=True)
        aside = scratch / Path(self.path).name
        if self.path.endswith(".npy"):
            np.save(aside, array)
        else:
            kind = nibabel.Nifti1Pair if self.path.endswith((".hdr", ".img")) else None
            image = (kind or nibabel.Nifti1Image)(array, np.eye(4))
            nibabel.save(image, aside)
        for file in scratch.iterdir():
            os.replace(file, Path(self.path).parent / file.name)
        scratch.rmdir()
        self.value = array

    def side(self, extension: str) -> str:
        return self.path.removesuffix(".img").removesuffix(".hdr") + extension

    @property
    def voxels(self) -> str:
        """The file in which the voxels are."""
        return self.side(".img") if self.path.endswith(".hdr") else self.path


def replace(volume: Volume) -> None:
    volume.write(5)


def reshape(volume: Volume) -> None:
    volume.write(6, (30, 20, 40))


def retype(volume: Volume) -> None:
    volume.write(7, dtype="i2")


def truncate(volume: Volume) -> None:
    os.truncate(volume.voxels, os.path.getsize(volume.voxels) // 2)
    volume.value = None


def delete(volume: Volume) -> None:
    os.remove(volume.voxels)
    volume.value = None


def touch(volume: Volume) -> None:
    os.utime(volume.voxels, ns=(1, 1))


def touch_header(volume: Volume) -> None:
    os.utime(volume.side(".hdr") if volume.path.endswith((".img", ".hdr")) else volume.path, (1, 1))


CHANGES = [replace, reshape, retype, truncate, delete, touch, touch_header]
NAMES = ["a.npy", "a.nii", "a.nii.gz", "a.img", "a.hdr"]

changing = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
files = pytest.mark.parametrize("name", NAMES)


def is_as_it_is(volume: Volume, proxy: Any, function: Callable[[Any], Any] = lambda x: x) -> None:
    """The proxy gives what is in the file, or the right error if it isn't there or not whole."""
    if volume.value is not None:
        found, wanted = np.asarray(proxy), function(volume.value)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.tobytes() == wanted.tobytes()
        return
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which file is what matters
        np.asarray(proxy)
    assert os.path.splitext(volume.path)[0] in files_named(caught.value)


@files
@changing
def test_what_happens_before_a_file_is_looked_at_does_not_matter(
    cache: DataCache, tmp_path: Path, name: str, change: Any
) -> None:
    volume = Volume(tmp_path, name)
    proxy = LazyReadData(volume.path)
    total = proxy + 1
    change(volume)
    is_as_it_is(volume, total, lambda x: x + 1)
    is_as_it_is(volume, proxy)
    del proxy, total
    look(cache)


@files
@changing
@pytest.mark.parametrize("before", ["probed", "loaded", "evicted"])
def test_a_change_between_two_computations_is_warned_of_and_the_new_data_are_used(
    cache: DataCache, tmp_path: Path, name: str, change: Any, before: str
) -> None:
    volume = Volume(tmp_path, name)
    proxy = LazyReadData(volume.path)
    assert proxy.shape == SMALL
    if before != "probed":
        assert proxy.data[0, 0, 0] == 1
    if before == "evicted":
        cache.clear()
    change(volume)
    with pytest.warns(FileChangedWarning, match=r"a\."):
        is_as_it_is(volume, proxy + 1, lambda x: x + 1)
    is_as_it_is(volume, proxy)
    is_as_it_is(volume, LazyReadData(volume.path))
    volume.write(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FileChangedWarning)  # a file that was gone is no change
        is_as_it_is(volume, proxy * 2, lambda x: x * 2)
    del proxy
    look(cache)


@files
@changing
@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_a_change_amid_a_load_is_an_error_and_no_voxel_of_it_is_kept(
    cache: DataCache, tmp_path: Path, name: str, change: Any, when: Any
) -> None:
    volume = Volume(tmp_path, name)
    faulty = FaultyReader(during=lambda path: change(volume), when=when)
    proxy = LazyReadData(volume.path, reader=faulty)
    with pytest.raises(FileChangedError, match=r"a\."):
        (proxy + 1).data
    assert not proxy.loaded()
    look(cache)
    faulty.heal()
    is_as_it_is(volume, proxy + 1, lambda x: x + 1)
    is_as_it_is(volume, proxy)
    del proxy
    look(cache)


def two(folder: Path) -> tuple[Volume, LazyReadData, LazyReadData, FaultyReader]:
    """A volume of ones, to be changed, its proxy, that of another, and the reader of that one."""
    first, second = (Volume(folder, f"{name}.npy") for name in "ac")
    faulty = FaultyReader()
    return first, LazyReadData(first.path), LazyReadData(second.path, reader=faulty), faulty


@changing
def test_a_file_that_changes_before_its_turn_in_a_plan_is_an_error(
    cache: DataCache, tmp_path: Path, change: Any
) -> None:
    a, _, z, faulty = two(tmp_path)
    counting = FaultyReader()
    x = LazyReadData(a.path, reader=counting)
    faulty.during = lambda path: change(a)
    total = z * 2 + x
    with pytest.raises(FileChangedError, match=r"a\.npy"):
        total.data
    assert counting.reads == 0
    look(cache)
    faulty.heal()
    if a.value is not None and a.value.shape == SMALL:
        assert np.array_equal(total.data, a.value + 2)
    del total
    look(cache)


# What ``x * 2 + z * 3 + x`` needs: x goes before it is used again.
THREE = 3 * int(np.prod(SMALL)) * 4


@changing
@pytest.mark.parametrize("budget", [THREE, 10 * THREE])
def test_a_file_that_changes_between_two_uses_in_a_plan_is_never_mixed(
    tmp_path: Path, change: Any, budget: int
) -> None:
    with DataCache(budget) as cache:
        a, x, z, faulty = two(tmp_path)
        faulty.during = lambda path: change(a)
        total = x * 2 + z * 3 + x
        if budget == THREE:
            with pytest.raises(FileChangedError, match=r"a\.npy"):
                total.data
        else:
            assert np.array_equal(total.data, np.full(SMALL, 6, "f4"))
        faulty.heal()
        del total
        look(cache)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_others_who_notice_a_change_do_not_hide_it_from_a_running_plan(
    tmp_path: Path, elsewhere: bool
) -> None:
    """They forget what was known of the old file; x, read again, would be of another content."""
    with DataCache(THREE):
        a, x, z, faulty = two(tmp_path)

        def notice(path: str) -> None:
            a.write(5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FileChangedWarning)
                assert LazyReadData(a.path).shape == SMALL

        faulty.during = (lambda path: Running(notice, path).result()) if elsewhere else notice
        with pytest.raises(FileChangedError, match=r"a\.npy"):
            (x * 2 + z * 3 + x).data


@pytest.mark.parametrize("noticed", [False, True])
def test_a_result_remembers_the_files_that_it_was_computed_from(
    cache: DataCache, tmp_path: Path, noticed: bool
) -> None:
    """Also if x changes after it was read, and somebody notices, before the plan is over."""
    a, x, z, faulty = two(tmp_path)

    def change(path: str) -> None:
        a.write(5)
        if noticed:
            with pytest.warns(FileChangedWarning):
                assert LazyReadData(a.path).shape == SMALL

    faulty.during = change
    total = x * 2 + z
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = total.data[0, 0, 0]
    assert value == 3
    faulty.heal()
    total.release()
    cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FileChangedWarning)
        with pytest.raises(FileChangedError, match="write the expression again"):
            total.data
        assert (x * 2 + z).data[0, 0, 0] == 11


@changing
@pytest.mark.parametrize("npreload", [0, 1, 5])
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_a_change_amid_a_loop_gives_old_data_or_new_and_hurts_no_neighbour(
    cache: DataCache, tmp_path: Path, change: Any, npreload: int, at: int
) -> None:
    volumes = [Volume(tmp_path, f"{number}.npy") for number in range(5)]
    changed = volumes[at]
    seen: list[Any] = []
    with PreloadIterator([LazyReadData(v.path) for v in volumes], npreload) as items:
        for number, item in enumerate(items):
            if number == 1:
                change(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FileChangedWarning)
                seen.append(outcome_of(lambda item=item: item.data))
    for number, found in enumerate(seen):
        if isinstance(found, OSError):
            assert number == at
            assert changed.path in files_named(found)
        elif number != at or not np.array_equal(found, changed.value):
            assert np.array_equal(found, np.ones(SMALL, "f4"))
    del item, found, seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FileChangedWarning)
        is_as_it_is(changed, LazyReadData(changed.path))
    look(cache)


def test_loops_and_plans_over_a_file_that_is_replaced_all_the_time_never_mix_it(
    cache: DataCache, tmp_path: Path
) -> None:
    volumes = [Volume(tmp_path, f"{number}.nii.gz") for number in range(3)]
    cache.budget = 20 * int(np.prod(SMALL)) * 4
    over = threading.Event()

    def write() -> int:
        value = 1
        while not over.is_set():
            value += 1
            volumes[1].write(value)
        return value

    def ask(thread: int) -> int:
        right = 0
        for turn in range(60):
            proxies = [LazyReadData(volume.path, cache=cache) for volume in volumes]
            if (turn + thread) % 3:
                proxies[1] = proxies[1] - proxies[0] * 0 + proxies[1] * 0
            found = outcome_of(lambda proxies=proxies: proxies[1].data)
            if isinstance(found, FileChangedError):
                assert volumes[1].path in files_named(found)
            else:
                assert found.min() == found.max()
                right += 1
            del found
        return right

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = Running(write)
        outcomes = together(3, ask)
        over.set()
        assert writer.result() > 3
    assert sum(outcomes) > 3
    look(cache)


# A full disk

OUTPUTS = ["out.nii", "out.nii.gz", "out.img", "out.mgz", "out.npy"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 1 MiB that no compression makes smaller."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for name in "ab":
        array = rng.random((64, 64, 64), "f4")
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii")
    return folder


def put_old_files(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Files of these names, with the other one of a pair; what is in each."""
    old = {name: f"old {name}".encode() for name in names}
    old.update({name.replace(".img", ".hdr"): b"old" for name in names if ".img" in name})
    for name, content in old.items():
        (folder / name).write_bytes(content)
    return old


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Of the scripts below. A limit of the size of files is like a quota that is used up; the limit of
# a file system is one.
SAVING = """
import os, resource, sys
import lazycache as lc
from lazycache.errors import WriteError

noise, how, *names = sys.argv[1:]
if os.environ.get("LIMIT"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
a, b = (lc.load(f"{noise}/{name}.nii") for name in "ab")
def fails(function):
    try:
        function()
    except WriteError as error:
        assert isinstance(error, OSError)
        print(error)

if how == "save":
    for name in names:
        fails(lambda: (a - b).save(name))
else:
    small, *large = names
    fails(lambda: lc.save_all({small: (a - b)[:8], **{name: a + b for name in large}}))
cache = lc.get_cache()
cache.check()
assert not any(name.startswith(".lazycache-") for name in os.listdir(os.path.dirname(names[0])))
cache.clear()
del a, b
assert cache.used == 0
"""

COMMAND = """
import os, resource, sys
from lazycache.cli import main

if os.environ.get("LIMIT"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(params=["quota", "disk"])
def full(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """What to put before a command that shall find a disk of less than 1 MiB at ``tmp_path``."""
    if request.param == "quota":
        if sys.platform == "win32":
            pytest.skip("limits of the size of files are POSIX")
        monkeypatch.setenv("LIMIT", "1")
        return ()
    # In a name space of its own, so that it is gone with the process. What was in the folder is
    # hidden: it is copied there and back.
    mounting = (
        'mount -t tmpfs -o size=700k tmpfs "$1" && cp -a "$2/." "$1" && folder="$1" && aside="$2" '
        '&& shift 2 && "$@"; code=$?; [ -n "$folder" ] || exit 99; '
        'rm -rf "$aside"; cp -a "$folder/." "$aside"; exit $code'
    )
    aside = tmp_path.parent / f"{tmp_path.name}-aside"
    prefix = ("unshare", "--mount", "sh", "-c", mounting, "sh", str(tmp_path), str(aside))
    aside.mkdir()
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if tried.returncode:
        pytest.skip("no file system may be mounted here")
    return prefix


def run_on_a_full_disk(
    full: tuple[str, ...], folder: Path, code: str, *arguments: object
) -> tuple[subprocess.CompletedProcess[str], dict[str, bytes]]:
    """Run Python there; what came of it, and what is in the folder afterwards."""
    aside = folder.parent / f"{folder.name}-aside"
    if full:
        for name, content in content_of(folder).items():
            (aside / name).write_bytes(content)
    done = in_a_process(code, *arguments, prefix=full)
    return done, content_of(aside if full else folder)


@pytest.mark.parametrize("there", [False, True])
def test_a_result_that_does_not_fit_on_the_disk_leaves_what_was_there(
    full: tuple[str, ...], noise: Path, tmp_path: Path, there: bool
) -> None:
    old = put_old_files(tmp_path, OUTPUTS) if there else {}
    outputs = [tmp_path / name for name in OUTPUTS]
    done, left = run_on_a_full_disk(full, tmp_path, SAVING, noise, "save", *outputs)
    for told, output in zip(must_end_well(done).splitlines(), outputs, strict=True):
        assert told.startswith(f"{output}: can't be written")
    assert left == old


def test_of_several_results_written_together_none_stands_if_one_does_not_fit(
    full: tuple[str, ...], noise: Path, tmp_path: Path
) -> None:
    names = ["fits.nii.gz", "out.nii.gz", "out.npy"]
    old = put_old_files(tmp_path, names)
    done, left = run_on_a_full_disk(
        full, tmp_path, SAVING, noise, "save_all", *(tmp_path / name for name in names)
    )
    # They are written while they are computed; which of them meets the end of the room is chance.
    assert re.search(r"out\.(npy|nii\.gz): can't be written", must_end_well(done))
    assert left == old


def test_the_command_tells_that_a_result_does_not_fit(
    full: tuple[str, ...], noise: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.nii.gz"
    old = put_old_files(tmp_path, [out.name])
    images = [noise / "a.nii", noise / "b.nii"]
    done, left = run_on_a_full_disk(
        full, tmp_path, COMMAND, "eval", "I1 - I2", *images, "-o", out, "--quiet"
    )
    assert done.returncode not in (0, 99)
    assert f"{out}: can't be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert left == old


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_is_found_full_when_the_last_bytes_go_out(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, cache: DataCache
) -> None:
    """What fits into a buffer fails when the file is flushed or closed."""
    np.save(tmp_path / "a.npy", np.ones((3, 4, 5), "f4"))

    def opened(path: str, mode: str) -> Any:
        os.symlink("/dev/full", path)
        return open(path, "wb")

    monkeypatch.setattr(writing, "open", opened, raising=False)
    old = {**content_of(tmp_path), **put_old_files(tmp_path, [name])}
    with pytest.raises(WriteError, match=r"out\..*free some space") as caught:
        (LazyReadData(tmp_path / "a.npy") + 1).save(tmp_path / name)
    assert isinstance(caught.value.__cause__, OSError)
    assert content_of(tmp_path) == old
    del caught
    look(cache)


# The end of the interpreter

# Reads that are under way as the interpreter ends. What isn't a preload is asked for.
ENDING = """
import os, sys, threading
import lazycache as lc
from lazycache.testing import FaultyReader

path, reading, where, end = sys.argv[1:]

class Telling(FaultyReader):
    def read(self, path, **options):
        try:
            return super().read(path, **options)
        finally:
            os.write(1, b"tidied up\\n")  # print() may be cut in two by another thread

faulty = Telling(hangs=reading == "hanging", seconds=1000 * (reading == "slow"), steps=10**5)
volumes = [lc.load(f"{path}/{number}.npy", reader=faulty) for number in range(6)]

def finish():
    faulty.wait_reached(2 if where != "demand in a daemon" else 1)
    print("under way", flush=True)
    if end == "sys.exit":
        sys.exit(3)
    if end == "exception":
        raise ZeroDivisionError("of the user")
    if end == "interrupt":
        raise KeyboardInterrupt

def loop():
    for volume in lc.PreloadList(volumes, npreload=2):
        faulty.wait_reached(2)
        return

def kept():
    kept.iterator = lc.PreloadIterator(volumes, npreload=2)
    next(kept.iterator)
    faulty.wait_reached(2)

if where == "loop":
    for volume in lc.PreloadList(volumes, npreload=2):
        finish()
        break
elif where == "forgotten":
    kept()
    finish()
elif where == "demand in a daemon":
    threading.Thread(target=lambda: volumes[0].data, daemon=True).start()
    finish()
else:
    target = loop if where == "loop in a thread" else kept
    thread = threading.Thread(target=target, daemon=where == "kept by a daemon")
    thread.start()
    finish()
"""


ENDS = ["return", "sys.exit", "exception", "interrupt"]


@pytest.mark.parametrize(
    ("reading", "where", "ends"),
    [
        ("slow", "loop", ENDS),
        ("hanging", "loop", ENDS),
        ("slow", "forgotten", ENDS[1:3]),
        ("hanging", "forgotten", ENDS[2:]),
        ("hanging", "loop in a thread", ENDS[:3]),
        ("slow", "kept by a daemon", ENDS[:2]),
        ("hanging", "kept by a daemon", ENDS[1:]),
        ("hanging", "demand in a daemon", ENDS[:3]),
    ],
)
def test_the_interpreter_ends_although_reads_are_under_way(
    paths: list[str], reading: str, where: str, ends: list[str]
) -> None:
    folder = os.path.dirname(paths[0])
    runs = {
        end: Running(in_a_process, ENDING, folder, reading, where, end, timeout=15) for end in ends
    }
    for end, run in runs.items():
        ended_well(run.result(), end, tidy=reading == "slow")


def ended_well(done: subprocess.CompletedProcess[str], end: str, tidy: bool) -> None:
    first, *others = done.stdout.splitlines()
    assert first == "under way"
    # What looks at checkpoints comes to its end.
    assert others == ["tidied up"] * len(others)
    assert (len(others) >= 2) == tidy
    code, last = {
        "return": (0, None),
        "sys.exit": (3, None),
        "exception": (1, "ZeroDivisionError: of the user"),
        "interrupt": (-signal.SIGINT, "KeyboardInterrupt"),
    }[end]
    assert done.returncode == code
    if last is None:
        assert done.stderr == ""
    else:  # the traceback of the user's error, and nothing else
        assert done.stderr.startswith("Traceback")
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.endswith(f"{last}\n")
