"""The truth counted outside the package: weak references to owners, and the process's memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import UNIT, Made, using

import lazycache
from lazycache import LazyReadData, _buffers
from lazycache._buffers import Buffer, owner_of
from lazycache.cache import DataCache
from lazycache.source import Handle, Result

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Owners(Made):
    """A key that remembers, weakly, the owner of everything it ever loaded."""

    def __init__(self, name: str, nbytes: int = UNIT) -> None:
        super().__init__(name, nbytes)
        self.owners: list[weakref.ref[object]] = []

    def load(self) -> object:
        value = super().load()
        self.owners.append(weakref.ref(owner_of(value)))
        return value

    @property
    def alive(self) -> int:
        return sum(owner() is not None for owner in self.owners)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("nbytes", [UNIT, 3 << 20], ids=["small", "mapped"])
def test_an_owner_dies_with_its_last_reference(nbytes: int) -> None:
    cache = DataCache(10 * nbytes)
    key = Owners("a", nbytes)
    view = cache.load(key)[1:].reshape(-1, 1)
    handle = Handle(key, 1)
    cache.used_up(handle, 1)
    assert (key.alive, cache.used) == (1, nbytes)
    del view
    assert (key.alive, cache.used) == (0, 0)


@pytest.mark.usefixtures("no_collector")
def test_what_is_evicted_released_cleared_or_closed_is_dead() -> None:
    cache = DataCache(3 * UNIT)
    keys = [Owners(str(i)) for i in range(8)]
    for key in keys:
        cache.load(key)
    assert [key.alive for key in keys] == [0] * 5 + [1] * 3
    cache.release(keys[5])
    assert keys[5].alive == 0
    cache.budget = UNIT
    assert keys[6].alive == 0
    cache.clear()
    assert keys[7].alive == 0
    with using(cache, keys[0]) as values:
        values.clear()
        cache.close()
        assert keys[0].alive == 1
    assert keys[0].alive == 0
    assert cache.used == 0


@pytest.mark.usefixtures("no_collector")
def test_results_and_constants_are_dead_when_nobody_refers_to_them() -> None:
    cache = DataCache(9 * UNIT)
    result = Result("a result")
    with cache.operation("a test", workspace=UNIT, room=0) as operation:
        operation.keep(result, np.ones(UNIT, np.uint8), 1.0)
    constant = cache.adopt(np.ones(UNIT, np.uint8), "a constant")
    owners = [weakref.ref(owner_of(value)) for value in (result.value, constant)]
    assert cache.used == 2 * UNIT
    del constant
    assert owners[1]() is None
    del result
    assert owners[0]() is None
    assert cache.used == 0


@pytest.mark.usefixtures("no_collector")
def test_the_accounts_are_never_below_what_is_alive() -> None:
    cache = DataCache(4 * UNIT)
    keys = [Owners(str(i)) for i in range(6)]
    views = []
    for turn in range(60):
        value = cache.load(keys[turn * 7 % 6])
        if turn % 5 == 0:
            views = [*views[-1:], value[turn:]]
        del value
        assert cache.used == sum(key.alive for key in keys) * UNIT
    assert cache.stats().overcommits == 0


def test_a_buffer_is_alive_as_long_as_any_view_of_it() -> None:
    for nbytes in (100, 5 << 20):
        buffer = Buffer(nbytes)
        owner = weakref.ref(buffer.owner)
        buffer.writable((nbytes,), np.uint8)[:] = 7
        view = buffer.readonly((nbytes // 4,), np.uint32)[5:10]
        del buffer
        assert owner() is not None
        assert int(view[0]) == 0x07070707
        assert owner_of(view) is owner()
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
        del view
        assert owner() is None


def test_an_owner_whose_death_nobody_tells_of_stays_charged_while_it_is_held() -> None:
    # As nibabel gives the voxels of a .nii.gz.
    cache = DataCache(10 * UNIT)
    key = Made("a", make=lambda: np.frombuffer(bytearray(UNIT), np.uint8))
    view = cache.load(key)[1:]
    cache.clear()
    assert cache.used == UNIT
    assert cache.load(key) is not None
    assert key.loads == 1
    del view
    cache.clear()
    assert cache.used == 0
    assert cache.stats().untracked_bytes == 0


def test_a_kept_error_keeps_the_frames_of_users_and_no_array_of_ours(tmp_path: Path) -> None:
    made: list[weakref.ref[object]] = []

    def failing(path: str) -> object:
        mine = "what the user may want to look at"
        raise OSError(mine)

    class Watched(np.ndarray):
        pass

    def reading(path: str) -> object:
        array = np.ones(UNIT).view(Watched)
        made.append(weakref.ref(array))
        return array

    for name in ("good", "bad"):
        (tmp_path / name).write_text("some text")
    good = LazyReadData(tmp_path / "good", reader=reading)
    bad = LazyReadData(tmp_path / "bad", reader=failing)
    with DataCache(10**6) as cache:
        with pytest.raises(OSError, match="look at") as caught:
            (good + 1 + bad).data
        cache.clear()
        assert cache.used == 0
        assert [ref() for ref in made] == [None]
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(caught.tb)}
    assert frames["failing"].f_locals["mine"] == "what the user may want to look at"
    assert frames["execute"].f_code.co_filename in "".join(traceback.format_tb(caught.tb))


@LINUX
def test_only_whole_huge_pages_are_asked_for() -> None:
    # Else a kernel that gives huge pages unasked would round each array up to 2 MiB.
    buffer = Buffer((4 << 20) + 8192)
    small = Buffer(1 << 20)
    array = buffer.writable((buffer.nbytes,), np.uint8)
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (place := line.split()[0]) and ":" not in place:
            first, _, last = place.partition("-")
        elif line.startswith("VmFlags:"):
            flags[range(int(first, 16), int(last, 16))] = line.split()
    start = array.__array_interface__["data"][0]
    [huge] = [found for place, found in flags.items() if start in place]
    [tail] = [found for place, found in flags.items() if start + array.nbytes - 1 in place]
    assert "hg" in huge or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert "hg" not in tail
    assert ("nh" in tail) == ("hg" in huge)
    start = small.writable((1,), np.uint8).__array_interface__["data"][0]
    assert "hg" not in next(found for place, found in flags.items() if start in place)


# In a process of its own: the resident memory falls at once by what was freed.
FREEING = """
import sys
import numpy as np
from lazycache import _buffers
from lazycache.cache import DataCache
from lazycache.source import Key

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * 1024

class Volume(Key):
    def __init__(self, nbytes):
        super().__init__("a volume")
        self.nbytes = nbytes
    def estimate(self):
        return self.nbytes, self.nbytes
    def load(self):
        array = _buffers.empty((self.nbytes,), np.uint8)
        array[:] = 1
        survivors.append(bytearray(4096))  # the small things that any load leaves behind
        return _buffers.readonly(array)

size, count = int(sys.argv[1]), int(sys.argv[2])
survivors = []
cache = DataCache(4 << 30)
cache.load(Volume(4 << 20))
cache.clear()
before = resident()
volumes = [Volume(size) for _ in range(count)]
for volume in volumes:
    cache.load(volume)
loaded = resident() - before
assert loaded > 0.9 * size * count, (loaded, size * count)
cache.clear()
left = resident() - before
later = 0 if size >= _buffers.LARGE else _buffers.TRIM_AFTER  # small ones go now and then
assert left < 0.1 * size * count + later, (left, size * count)
assert cache.used == 0
"""


@LINUX
@pytest.mark.parametrize(
    ("size", "count"),
    [(100 << 10, 800), (1 << 19, 160), (3 << 19, 60), (5 << 20, 20), (30 << 20, 4)],
)
def test_freed_means_given_back_to_the_system(size: int, count: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(lazycache.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FREEING, str(size), str(count)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_small_arrays_are_trimmed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(_buffers, "trim", lambda: trimmed.append(1))
    monkeypatch.setattr(_buffers, "TRIM_AFTER", 10 * UNIT)
    cache = DataCache(100 * UNIT)
    for i in range(25):
        cache.load(Made(str(i)))
        cache.clear()
    assert len(trimmed) == 2
