"""Computing by blocks: what goes wrong while files are read ahead, and what is left after it."""

from __future__ import annotations

import _thread
import gc
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from support import SOON, Gate, Running, together

import lazycache as lc
from lazycache import DataCache, LazyReadData, _tasks, needs, planning, program
from lazycache.cache import get_cache
from lazycache.errors import FileChangedError, ReadError, WriteError
from lazycache.expression import FileNode
from lazycache.readers.base import Probe, checkpoint
from lazycache.stats import Event
from lazycache.testing import FaultyReader

Array = NDArray[Any]

SHAPE = (16, 16, 32)
SIZE = 16 * 16 * 32
BLOCKS = 16  # of a volume
COUNT = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_WORTH_IT", 0)
    monkeypatch.setattr(program, "_SHORTEST", SIZE // BLOCKS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Volumes of noise, compressed and not."""
    dice = np.random.default_rng(0)
    for number in range(COUNT):
        data = np.asfortranarray(dice.integers(0, 2000, SHAPE).astype(np.int16))
        if number % 3 == 2:
            np.save(tmp_path / f"{number}.npy", data)
        else:
            name = f"{number}.nii.gz" if number % 3 else f"{number}.nii"
            nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / name)
    return tmp_path


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9].*"))


def contents(paths: Sequence[Path]) -> list[Array]:
    return [np.asarray(lc.load(path).data) for path in paths]


class Small:
    """A reader of files that it makes up, whose blocks do what a test wants of them.

    ``during`` is called before each block with the name of the file and the place in it.
    """

    name = "small"

    def __init__(self, during: Callable[[str, int], object] = lambda name, place: None) -> None:
        self.during = during
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()

    def can_read(self, path: str) -> bool:
        return True

    def probe(self, path: str, **options: Any) -> Probe:
        nbytes = 4 * SIZE
        return Probe("small", SHAPE, np.dtype("f4"), nbytes, nbytes, (path,), "F", in_blocks=True)

    def read(self, path: str, **options: Any) -> Array:
        data = np.empty(SIZE, "f4")
        blocks = self.open_blocks(path)
        blocks.into(data)
        blocks.close()
        return data.reshape(SHAPE, order="F")

    def open_blocks(self, path: str, **options: Any) -> _SmallBlocks:
        self.opened[Path(path).name] += 1
        return _SmallBlocks(self, Path(path).name)


class _SmallBlocks:
    def __init__(self, reader: Small, name: str) -> None:
        self._reader = reader
        self._name = name
        self._place = 0

    def into(self, flat: Array) -> None:
        self._reader.during(self._name, self._place)
        flat[:] = np.arange(self._place, self._place + flat.size) * (1 + int(self._name))
        self._place += flat.size

    def skip(self, count: int) -> None:
        self._place += count

    def close(self) -> None:
        self._reader.closed[self._name] += 1


def made_up(number: int) -> Array:
    """What `Small` gives for a file of this name."""
    return (np.arange(SIZE) * (1 + number)).astype("f4").reshape(SHAPE, order="F")


class Place:
    """Files of `Small`, and a cache."""

    def __init__(self, folder: Path, budget: int | str = "64MiB", count: int = 4) -> None:
        self.reader = Small()
        self.cache = DataCache(budget, strict=True)
        self.paths = [folder / f"{number}" for number in range(count)]
        for path in self.paths:
            path.touch()
        self.truth = [made_up(number) for number in range(count)]

    def images(self) -> Iterator[LazyReadData]:
        """Proxies that nobody keeps: so their files aren't kept either."""
        for path in self.paths:
            yield LazyReadData(path, reader=self.reader, cache=self.cache)

    def mean(self) -> LazyReadData:
        return lc.mean(self.images())

    def true_mean(self) -> Array:
        return np.mean(np.stack(self.truth), axis=0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def opened(folder: Path) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder that is being listed
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.startswith(str(folder))]


def wait_for_threads(count: int) -> None:
    """Threads end by themselves when nothing is left to do: see that they do."""
    deadline = time.monotonic() + SOON
    while _thread._count() > count:
        assert time.monotonic() < deadline, "a thread is left"


@pytest.fixture
def tidy(tmp_path: Path) -> Iterator[Callable[[DataCache], None]]:
    """Asserts that nothing is left of a computation that failed."""
    threads = _thread._count()

    def look(cache: DataCache) -> None:
        wait_for_threads(threads)
        assert opened(tmp_path) == []
        assert [path.name for path in tmp_path.rglob(".lazycache*")] == []
        cache.check()
        assert cache.used == 0
        assert cache.held() == []
        assert cache.stats().overcommits == 0

    return look


def same(value: Any, expected: Any) -> None:
    assert value.dtype == expected.dtype
    assert value.shape == expected.shape
    assert value.tobytes() == expected.tobytes()


# Files that are bad, or become bad while they are read


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    """Damage the checksum, which comes after the last voxel."""
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)


BAD = [("1.nii.gz", cut), ("1.nii.gz", flip), ("1.nii.gz", spoil), ("2.npy", cut), ("3.nii", cut)]


def bad_mean(images: Iterator[LazyReadData], target: Path) -> None:
    lc.mean(images).data


def bad_save(images: Iterator[LazyReadData], target: Path) -> None:
    lc.mean(images).save(target)


def bad_voxels(images: Iterator[LazyReadData], target: Path) -> None:
    lc.map_voxels(lambda block: block.max(0), images).data


def bad_axis(images: Iterator[LazyReadData], target: Path) -> None:
    (sum(images) * 1.0).mean(0).data


@pytest.mark.parametrize("how", [bad_mean, bad_save, bad_voxels, bad_axis])
@pytest.mark.parametrize(("name", "damage"), BAD)
def test_a_bad_file_is_named_and_nothing_is_left(
    folder: Path,
    tidy: Callable[[DataCache], None],
    how: Callable[..., None],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    whole = (folder / name).read_bytes()
    # Its header is read, and may tell that it is cut, before the first voxel of any.
    paths = files_in(folder)
    target = folder / "out.nii.gz"
    target.write_bytes(b"what stood there")
    damage(folder / name)
    cache = DataCache("64MiB")

    def images() -> Iterator[LazyReadData]:
        return (LazyReadData(path, cache=cache) for path in paths)

    with pytest.raises(ReadError) as told:
        how(images(), target)
    assert name in str(told.value)
    tidy(cache)
    assert target.read_bytes() == b"what stood there"
    (folder / name).write_bytes(whole)
    mean = lc.mean(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lc.FileChangedWarning)  # where its header was read before
        same(mean.data, np.mean(np.stack(contents(paths)), axis=0))


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace, cut, Path.unlink])
@pytest.mark.parametrize("name", ["1.nii.gz", "2.npy", "3.nii"])
@pytest.mark.parametrize("when", ["amid", "after", "before"])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    folder: Path,
    tidy: Callable[[DataCache], None],
    change: Callable[[Path], None],
    name: str,
    when: Any,
) -> None:
    def during(path: str) -> None:
        if path.endswith(name):
            change(folder / name)

    faulty = FaultyReader(during=during, when=when)
    cache = DataCache("64MiB")
    target = folder / "out.nii"
    mean = lc.mean(LazyReadData(path, reader=faulty, cache=cache) for path in files_in(folder))
    with pytest.raises(FileChangedError, match=name):
        mean.save(target)
    assert faulty.reads > 1
    tidy(cache)
    assert not target.exists()


@pytest.mark.parametrize("error", [ValueError, MemoryError, PermissionError, KeyError])
@pytest.mark.parametrize("block", [0, BLOCKS // 2, BLOCKS - 1])
def test_what_a_reader_raises_comes_with_the_file_and_the_operation(
    place: Place, tidy: Callable[[DataCache], None], error: type[Exception], block: int
) -> None:
    def fail(name: str, at: int) -> None:
        if name == "2" and at == block * SIZE // BLOCKS:
            raise error("injected")

    place.reader.during = fail
    mean = place.mean()
    with pytest.raises(error, match="injected") as told:
        mean.data
    notes = "\n".join(told.value.__notes__)
    assert f"while reading {place.paths[2]}" in notes
    assert 'written at "' in notes
    assert "test_streaming.py" in notes
    del told
    tidy(place.cache)
    assert place.reader.opened == place.reader.closed
    assert place.cache.stats().load_failures == 1
    place.reader.during = lambda name, at: None
    same(mean.data, place.true_mean())


def test_an_error_that_cannot_even_be_shown_is_raised(place: Place) -> None:
    """Its text is asked for in the thread that reads, to see whether it names the file."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def fail(name: str, at: int) -> None:
        if at:
            raise MuteError

    place.reader.during = fail
    with pytest.raises(RuntimeError, match="no words"):
        place.mean().data


def test_all_files_are_closed_where_closing_one_fails(place: Place) -> None:
    class Stubborn(_SmallBlocks):
        def close(self) -> None:
            super().close()
            if self._name == "1":
                raise OSError("it won't close")

    place.reader.open_blocks = lambda path, **options: Stubborn(  # type: ignore[method-assign]
        place.reader, Path(path).name
    )
    with pytest.raises(OSError, match="it won't close"):
        place.mean().data
    assert set(place.reader.closed) == {"0", "1", "2", "3"}


def test_the_other_readers_stop_when_one_fails(place: Place) -> None:
    """They see it at their next checkpoint, however long they would go on."""
    reading = threading.Event()

    def during(name: str, at: int) -> None:
        if name == "0" and at:
            assert reading.wait(SOON)
            raise ValueError("injected")
        while name == "1" and at:
            reading.set()
            checkpoint()

    place.reader.during = during
    with pytest.raises(ValueError, match="injected"):
        place.mean().data
    assert place.reader.opened == place.reader.closed


@pytest.mark.parametrize("how", ["read", "computed", "written"])
def test_a_kept_error_holds_no_data(folder: Path, how: str, monkeypatch: Any) -> None:
    """Notebooks keep the last one."""
    monkeypatch.setattr(program, "_SHORTEST", 1 << 17)
    data = np.zeros((128, 128, 64), np.float32, order="F")
    paths = [folder / f"large{number}.nii" for number in range(3)]
    for path in paths:
        nib.Nifti1Image(data, np.eye(4)).to_filename(path)
    cache = DataCache("64MiB")

    def wrong() -> LazyReadData:
        faulty = FaultyReader(fail_every=3 if how == "read" else 0, when="after")
        images = [LazyReadData(path, reader=faulty, cache=cache) for path in paths]
        if how == "computed":
            return images[0] + 1 / images[1]
        return lc.mean(images) + np.float32(1e6)

    def run() -> BaseException:
        result = wrong()
        try:
            with np.errstate(all="raise"):
                result.save(folder / "out.nii", np.int8 if how == "written" else None)
        except Exception as error:
            return error
        raise AssertionError("no error")

    threads = _thread._count()
    run()  # what stays of the first time isn't of interest
    wait_for_threads(threads)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = run()
        wait_for_threads(threads)
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
        assert cache.used == 0
        assert kept.__traceback__ is not None
    finally:
        tracemalloc.stop()
        gc.enable()


# Errors of steps and of what is written


def test_the_errstate_of_the_thread_that_asks_applies(place: Place) -> None:
    def ratio() -> LazyReadData:
        first, second, *_ = place.images()
        return second / first

    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError, match="invalid") as told:
        ratio().data
    assert "in / of" in "".join(told.value.__notes__)
    with np.errstate(invalid="ignore"):
        value = ratio().data
        expected = made_up(1) / made_up(0)
    same(value, expected)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        ratio().data


def test_the_errstate_applies_in_the_threads_that_read(place: Place) -> None:
    def during(name: str, at: int) -> None:
        np.ones(1) / np.zeros(1)

    place.reader.during = during
    with np.errstate(divide="ignore"):
        same(place.mean().data, place.true_mean())
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError, match="divide"):
        place.mean().data


def test_an_error_of_a_function_of_voxels_names_it(
    place: Place, tidy: Callable[[DataCache], None]
) -> None:
    calls: list[int] = []

    def picky(block: Array) -> Array:
        calls.append(block.shape[1])
        if len(calls) > 3:
            raise ValueError("these I don't like")
        return block.max(0)

    with pytest.raises(ValueError, match="these I don't like") as told:
        lc.map_voxels(picky, place.images()).data
    assert "in picky of" in "".join(told.value.__notes__)
    del told
    tidy(place.cache)


def test_a_function_of_voxels_may_compute(place: Place) -> None:
    """In the thread that computes, under the same cache."""
    seen = []

    def computing(block: Array) -> Array:
        mean = lc.mean([LazyReadData(p, reader=place.reader) for p in place.paths[:2]])
        seen.append(mean.data[1, 0, 0])
        return block.max(0)

    same(lc.map_voxels(computing, place.images()).data, np.max(np.stack(place.truth), 0))
    assert set(seen) == {np.float32(1.5)}


def test_where_the_folder_of_the_output_goes_the_error_says_so(
    place: Place, tmp_path: Path, tidy: Callable[[DataCache], None]
) -> None:
    target = tmp_path / "gone" / "out.nii.gz"
    target.parent.mkdir()

    def during(name: str, at: int) -> None:
        if at == SIZE // 2:
            shutil.rmtree(target.parent, ignore_errors=True)

    place.reader.during = during
    with pytest.raises(WriteError, match=str(target)):
        place.mean().save(target)
    tidy(place.cache)


def test_a_disk_that_gets_full_leaves_the_old_file(
    place: Place,
    tmp_path: Path,
    tidy: Callable[[DataCache], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    from lazycache import writing

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.left = 2000

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count: int = self.file.write(data)
            return count

    created = writing._created
    monkeypatch.setattr(writing, "_created", lambda path: Full(created(path)))
    for name in ("out.nii", "out.nii.gz", "out.npy"):
        target = tmp_path / name
        target.write_bytes(b"what stood there")
        with pytest.raises(WriteError, match="free some space"):
            place.mean().save(target)
        tidy(place.cache)
        assert target.read_bytes() == b"what stood there"
    monkeypatch.undo()
    place.mean().save(target)
    same(np.load(target), place.true_mean())


# Threads


@pytest.mark.parametrize("count", [1, 3])
def test_so_many_files_are_read_at_once_as_there_are_threads(
    place: Place, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("LAZYCACHE_THREADS", str(count))
    reading: Counter[int] = Counter()
    most = []
    among = threading.Barrier(count)

    def during(name: str, at: int) -> None:
        reading[_thread.get_ident()] += 1
        most.append(sum(reading.values()))
        if int(name) < count and at == 0:
            among.wait(SOON)  # all at once
        reading[_thread.get_ident()] -= 1

    place.reader.during = during
    same(place.mean().data, place.true_mean())
    assert max(most) == count
    # The caller is one of them while he waits, unless there is to be one only.
    assert (_thread.get_ident() in reading) == (count > 1)


def test_without_threads_the_caller_reads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_tasks._thread, "start_new_thread", refuse)
    same(place.mean().data, place.true_mean())
    place.mean().save(place.paths[0].with_name("out.nii.gz"))

    def fail(name: str, at: int) -> None:
        raise ValueError("injected")

    place.reader.during = fail
    with pytest.raises(ValueError, match="injected"):
        place.mean().data
    assert place.reader.opened == place.reader.closed


def test_readers_see_the_scope_of_the_computation(place: Place) -> None:
    seen = set()

    def during(name: str, at: int) -> None:
        seen.add(get_cache())

    place.reader.during = during
    with DataCache("8MiB") as scope:
        lc.mean([LazyReadData(path, reader=place.reader) for path in place.paths]).data
        assert seen == {scope}


def test_eight_threads_share_a_budget_that_is_enough_for_each(place: Place) -> None:
    """They wait for one another rather than exceed it."""
    place.cache.budget = lc.explain(place.mean()).min_budget + 8 * 4 * SIZE

    def work(number: int) -> None:
        for _ in range(5):
            same(place.mean().data, place.true_mean())

    together(8, work)
    place.cache.check()
    assert place.cache.stats().overcommits == 0
    assert place.cache.stats().peak_bytes <= place.cache.budget


@pytest.mark.filterwarnings("ignore::lazycache.errors.BudgetExceededWarning")
@pytest.mark.parametrize("share", [1, 2])
def test_a_reader_may_use_the_cache_for_other_files(place: Place, share: int) -> None:
    """Also where the computation that waits for it leaves no room: it isn't waited for."""
    place.cache = DataCache(share * lc.explain(place.mean()).min_budget)
    other = place.paths[3]

    def during(name: str, at: int) -> None:
        if name == "0":
            twice = LazyReadData(other, reader=Small(), cache=place.cache) * 2
            assert twice.data[1, 0, 0] == 8

    place.reader.during = during
    started = time.monotonic()
    same(place.mean().data, place.true_mean())
    assert time.monotonic() - started < SOON


def test_a_fork_while_blocks_are_read_computes_on_its_own(place: Place) -> None:
    gate = Gate()

    def during(name: str, at: int) -> None:
        if name == "1" and at == SIZE // 2:
            gate()

    place.reader.during = during
    computing = Running(lambda: place.mean().data)
    gate.reached()
    child = os.fork()
    if not child:
        code = 1
        try:
            place.reader.during = lambda name, at: None
            same(place.mean().data, place.true_mean())
            place.cache.check()
            code = 0
        finally:
            os._exit(code)
    gate.open()
    same(computing.result(), place.true_mean())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_while_a_result_is_written_leaves_it_to_the_parent(
    place: Place, tmp_path: Path
) -> None:
    gate = Gate()
    target = tmp_path / "out.nii.gz"

    def during(name: str, at: int) -> None:
        if name == "1" and at == SIZE // 2:
            gate()

    place.reader.during = during
    saving = Running(lambda: place.mean().save(target))
    gate.reached()
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    saving.result()
    same(np.asarray(nib.load(target).dataobj), place.true_mean())


# What is counted


def test_reads_in_blocks_are_counted(place: Place) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    place.cache.subscribe(events.put)
    place.mean().data
    stats = place.cache.stats()
    assert (stats.loads, stats.misses, stats.load_failures) == (4, 4, 0)
    assert stats.loaded_bytes == 4 * 4 * SIZE
    assert stats.load_seconds > 0
    told = [events.get_nowait() for _ in range(events.qsize())]
    assert sorted(event.name for event in told if event.kind == "load") == [
        str(path) for path in place.paths
    ]


def test_reads_are_counted_where_the_scope_closes_meanwhile(place: Place) -> None:
    gate = Gate()

    def during(name: str, at: int) -> None:
        if name == "1" and at == SIZE // 2:
            gate()

    place.reader.during = during
    outer, inner = DataCache("8MiB"), DataCache("4MiB")
    inner._bind(outer)
    mean = lc.mean(LazyReadData(path, reader=place.reader, cache=inner) for path in place.paths)
    computing = Running(lambda: mean.data)
    gate.reached()
    inner.close()
    gate.open()
    same(computing.result(), place.true_mean())
    assert outer.stats().loads == 4
    outer.check()


@pytest.mark.parametrize("worth_it", [0, 1 << 30], ids=["blocks", "whole"])
def test_operations_are_counted_as_with_whole_arrays(
    place: Place, monkeypatch: pytest.MonkeyPatch, worth_it: int
) -> None:
    monkeypatch.setattr(needs, "_WORTH_IT", worth_it)
    images = [
        LazyReadData(path, reader=place.reader, cache=place.cache, nops=3) for path in place.paths
    ]
    handles = [image._node.handle for image in images if isinstance(image._node, FileNode)]
    lc.mean(images).data
    assert [handle.left for handle in handles] == [2] * 4
    first, second, *_ = images
    (first + second * first).data
    assert [handle.left for handle in handles] == [0, 1, 2, 2]
    assert [image.loaded() for image in images] == [False, True, True, True]


# Limits of the system, in processes of their own

FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[2:4])))
import numpy as np
import lazycache as lc
from lazycache import needs, program
needs._WORTH_IT, program._SHORTEST = 0, 64
paths = [f"{sys.argv[1]}/{number}.nii" for number in range(300)]
cache = lc.DataCache(int(sys.argv[4]), strict=True)
median = lc.median(lc.load(path, cache=cache) for path in paths)
truth = np.median(np.stack([np.full((8, 8, 8), n * 7 % 300, "f4") for n in range(300)]), 0)
assert median.data.tobytes() == truth.tobytes()
assert len(__import__("os").listdir("/dev/fd")) < 10
print(cache.stats().loads, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(300):
        data = np.full((8, 8, 8), number * 7 % 300, np.float32)
        nib.Nifti1Image(data, np.eye(4)).to_filename(folder / f"{number}.nii")
    return folder


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize(("soft", "hard", "once"), [(64, 64, False), (256, 8192, True)])
def test_three_hundred_files_go_in_lock_step_whatever_may_be_open(
    many: Path, soft: int, hard: int, once: bool, threads: int
) -> None:
    budget = 500_000  # less than the files
    done = python(FEW_FILES, many, soft, hard, budget, LAZYCACHE_THREADS=str(threads))
    assert done.returncode == 0, done.stderr
    loads, limit = map(int, done.stdout.split())
    assert (loads == 300) == once
    assert (limit > soft) == (hard > soft)


def python(code: str, *args: object, **environ: str) -> subprocess.CompletedProcess[str]:
    root = Path(lc.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(root), **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of real size and noise, so that it takes a while to read and to write them."""
    folder = tmp_path_factory.mktemp("brains")
    dice = np.random.default_rng(0)
    data = np.asfortranarray(dice.integers(0, 2000, (128, 128, 160), dtype=np.int16))
    lc.load(data).save(folder / "0.nii.gz")
    for number in range(1, 12):
        os.link(folder / "0.nii.gz", folder / f"{number}.nii.gz")
    return folder


@pytest.mark.parametrize("written", [0, 1, 1 << 20, 4 << 20])
def test_control_c_while_a_result_is_streamed_leaves_nothing(
    brains: Path, tmp_path: Path, written: int
) -> None:
    target = tmp_path / "mean.nii.gz"
    target.write_bytes(b"what stood there")
    command = ["eval", *map(str, sorted(brains.iterdir())), "-o", f"{target}=mean(images)"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "lazycache", *command, "--budget", "64MiB"],
        env={**os.environ, "PYTHONPATH": str(Path(lc.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def growing() -> bool:
        with suppress(OSError):
            [hidden] = tmp_path.glob(".lazycache*")
            return written == 0 or (hidden / target.name).stat().st_size >= written
        return False

    def safely() -> bool:
        with suppress(ValueError):  # it isn't there yet
            return growing()
        return False

    deadline = time.monotonic() + 60
    while not safely():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert os.listdir(tmp_path) == [target.name]
    assert target.read_bytes() == b"what stood there"


RESIDENT = """
import ctypes, gc, os, sys
import numpy as np
import lazycache as lc

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

folder, what = sys.argv[1:]
paths = [f"{folder}/{number}.nii.gz" for number in range(12)]

lock_step = what in ("median", "voxels")
MANY = 6 if lock_step else 40

def result(cache, count):
    images = (lc.load(path, cache=cache) for path in (paths * 4)[:count])
    if what == "median":
        return lc.median(images)
    if what == "voxels":
        return lc.map_voxels(lambda block: block.max(0), images)
    if what == "deviation":
        return lc.std(images, ddof=1)
    if what == "axis":
        return next(images).std(-1)
    return lc.mean(images)

def run(cache, count):
    if what == "saved":
        target = f"{folder}/out-{os.getpid()}.nii.gz"
        result(cache, count).save(target)
        os.unlink(target)
    else:
        result(cache, count).data

run(lc.DataCache("1GiB"), 2)  # modules, threads
least = lc.explain(result(lc.DataCache("1GiB"), MANY)).min_budget
for budget in (least * (1 + lock_step), 1 << 30):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    cache = lc.DataCache(budget, strict=True)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    run(cache, MANY)
    peak = status("VmHWM") - before
    print(peak - cache.stats().peak_bytes, status("VmRSS") - before - cache.used)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("what", ["mean", "deviation", "median", "voxels", "axis", "saved"])
def test_no_more_is_resident_than_is_accounted(brains: Path, what: str) -> None:
    done = python(RESIDENT, brains, what)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        beyond, left = map(int, line.split())
        assert beyond < 8 << 20
        assert left < 8 << 20


def test_many_files_are_read_farther_ahead_where_there_is_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As foretold, to the same values, and for no larger smallest budget."""
    monkeypatch.setattr(program, "_SHORTEST", 64)
    for name, nbytes in {"READ_AHEAD": 1 << 17, "READ_FAR_AHEAD": 1 << 19}.items():
        monkeypatch.setattr(program, name, nbytes)
        monkeypatch.setattr(planning, name, nbytes)
    data = np.random.default_rng(0).integers(0, 200, (64, 64, 16)).astype(np.uint8, order="F")
    paths = [tmp_path / f"{number}.nii" for number in range(100)]
    nib.Nifti1Image(data, np.eye(4)).to_filename(paths[0])
    for path in paths[1:]:
        path.symlink_to(paths[0])
    found = []
    for budget in ("2MiB", "5MiB"):
        cache = DataCache(budget, strict=True)
        images = [LazyReadData(path, cache=cache) for path in paths]
        most = lc.map_voxels(lambda block: block.max(0), images)
        images.clear()
        plan = lc.explain(most)
        assert most.data.tobytes() == data.tobytes()
        stats = cache.stats()
        assert stats.peak_bytes == plan.peak_bytes
        assert stats.loads == len(paths)
        found.append((plan.min_budget, plan.peak_bytes))
    (least, near), (least_too, far) = found
    assert least == least_too
    assert near + (1 << 17) < far
