"""What is accounted against what the process really holds, step by step, on real files.

Each scenario and each walk runs in a process of its own and compares after every step the bytes
that the cache counts with the memory that the system says is resident: what is resident is counted,
and what is counted is there. Bytes that the scenario itself holds are told to `Truth`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from support import SOON, preload_threads, together

import lazycache as lc
from lazycache import DataCache, LazyReadData, PreloadIterator, PreloadList

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 1 << 20
VOLUME = 4 * MIB
SHAPE = (64, 128, 128)
SLACK = 3 * MIB  # decoders that stay open, frames, headers
# What the C allocator may keep of arrays that are too small for memory of their own, and of what
# NumPy takes beside operands and result.
BATCH = 16 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of 4 MiB in every kind, 160 of half a MiB, some of 30 MiB, and two bad ones."""
    folder = tmp_path_factory.mktemp("volumes")
    ramp = (np.arange(VOLUME // 2, dtype=np.int64) % 1999).astype(np.int16)
    short = ramp.reshape(*SHAPE, 2)
    for i in range(4):
        nibabel.save(nibabel.Nifti1Image(short + np.int16(i), np.eye(4)), folder / f"i{i}.nii.gz")
        np.save(folder / f"f{i}.npy", np.full(SHAPE, i + 1.5, np.float32))
    nibabel.save(nibabel.Nifti1Image(short, np.eye(4)), folder / "u.nii")
    scaled = nibabel.Nifti1Image(short[:32, ..., 0], np.eye(4))
    scaled.header.set_slope_inter(0.5, 3)
    nibabel.save(scaled, folder / "s.nii.gz")
    np.save(folder / "F.npy", np.asfortranarray(np.ones(SHAPE, np.float32)))
    np.save(folder / "d.npy", np.ones((32, 128, 128)))
    np.save(folder / "c.npy", np.ones((32, 128, 128), np.complex64))
    np.save(folder / "b.npy", np.ones((256, 128, 128), bool))
    for i in range(160):
        np.save(folder / f"half{i}.npy", np.full((32, 64, 64), i, np.float32))
    for i in range(4):
        np.save(folder / f"large{i}.npy", np.full((30, 512, 512), i, np.float32))
    packed = bytearray((folder / "i0.nii.gz").read_bytes())
    packed[len(packed) // 2] ^= 0xFF
    (folder / "damaged.nii.gz").write_bytes(packed)
    (folder / "cut.nii.gz").write_bytes((folder / "i0.nii.gz").read_bytes()[: len(packed) * 3 // 4])
    return folder


def run(name: str, folder: Path, *args: object) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(lc.__file__).parents[1]), str(here)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, name, str(folder), *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# What runs in the processes


def resident(field: str = "Rss") -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{field}:")) * 1024


def quiet(cache: DataCache) -> None:
    """Wait until nothing is loaded ahead any more, nor begun because there is room again."""
    looks = 0
    while looks < 2:
        looks = 0 if any(holder.reason == "reading" for holder in cache.held()) else looks + 1
        for thread in preload_threads():
            thread.join(SOON)


def trim() -> None:
    """Have the C allocator give back what arrays and texts of the scenario itself left behind."""
    ctypes.CDLL(None).malloc_trim(0)


class Truth:
    """Compares the accounts of a cache with what is resident, from where both are now."""

    counts = True  # not while a scenario runs for the first time, to set up all that stays

    def __init__(self, cache: DataCache, field: str = "Rss", spare: int = 0) -> None:
        gc.collect()
        quiet(cache)
        trim()
        self.cache = cache
        self.field = field
        self.spare = spare  # what the C allocator may keep for itself until it is asked for it
        self.before = resident(field) - cache.used

    def __call__(self, what: str, own: int = 0) -> None:
        """``own`` bytes are held by the scenario, and none of the cache's business."""
        quiet(self.cache)
        if not self.counts:
            return
        for _ in range(100):  # a preload may begin at any moment
            quiet(self.cache)
            used = self.cache.used
            there = resident(self.field) - self.before - own
            holders = self.cache.held()
            if used == sum(holder.nbytes for holder in holders):
                break
        else:
            raise AssertionError(f"{what}: {used} bytes are used, held are {holders}")
        report = (
            f"{what}: {used / MIB:.2f} MiB are accounted, {there / MIB:.2f} MiB resident; "
            f"{'; '.join(map(str, holders))}"
        )
        most = used * 1.05 + SLACK
        assert there <= most + self.spare, report
        if there > most:
            trim()
            there = resident(self.field) - self.before - own
            assert there <= most, f"{report}; {there / MIB:.2f} MiB after a trim"
        # What was kept for the allocator's own use when this began may have been used again.
        assert used <= max(there, 0) * 1.1 + SLACK + self.spare, report


def mine(nbytes: int, dtype: Any = np.float32) -> np.ndarray:
    """An array of the scenario's own, in memory that is gone as soon as it is."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, dtype)
    array[:] = 1
    return array


Scenario = Callable[[DataCache, Path], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


KINDS = ("i0.nii.gz", "s.nii.gz", "u.nii", "f0.npy", "F.npy", "d.npy", "c.npy", "b.npy")


@scenario
def every_kind_of_file(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    for name in (*KINDS, "large0.npy"):
        proxy = lc.load(folder / name)
        data = proxy.data
        truth(f"{name} loaded")
        cache.clear()
        truth(f"{name} evicted and held")
        assert proxy.data is not None
        truth(f"{name} asked for again")
        assert cache.used == data.nbytes
        proxy.release()
        del data
        truth(f"{name} let go")
        assert cache.used == 0


class Consumer:
    """Somebody who only knows NumPy's array interface, as torch does."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


VIEWS: dict[str, Callable[[np.ndarray], Any]] = {
    "every other": lambda a: a[::2],
    "a few": lambda a: a[..., 10:20, :],
    "transposed": lambda a: a.T,
    "reshaped": lambda a: a.reshape(-1, order="A"),
    "of bytes": lambda a: a.reshape(-1, order="A").view(np.uint8),
    "as an array": np.asarray,
    "memoryview": memoryview,
    "part of a memoryview": lambda a: memoryview(a)[3:4],
    "from a buffer": lambda a: np.frombuffer(memoryview(a.reshape(-1, order="A")), a.dtype)[9:],
    "array interface": lambda a: np.asarray(Consumer(a))[1:2],
    "in containers": lambda a: [{"one": (a[1:2], a[2:3])}],
}


@scenario
def views_held_outside(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    for name in ("f0.npy", "large0.npy"):
        for how, view in VIEWS.items():
            proxy = lc.load(folder / name)
            held = view(proxy.data)
            cache.clear()
            truth(f"{name}, {how}: evicted")
            assert cache.used == proxy.nbytes
            proxy.data
            truth(f"{name}, {how}: back again")
            assert cache.used == proxy.nbytes
            del held
            cache.clear()
            truth(f"{name}, {how}: let go")
            assert cache.used == 0


@scenario
def lazy_slices(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    result = lc.load(folder / "f0.npy") * 2
    part = result[3:9]
    small = part.data
    truth("a small slice of a result")
    cache.clear()
    part.release()
    truth("all evicted but the slice")
    assert cache.used == small.nbytes
    del small
    most = result[1:].data
    cache.clear()
    truth("a large slice of a result that nobody asked for")
    assert cache.used == VOLUME
    result.data
    truth("the result as well")
    del result, part, most
    cache.clear()
    truth("nothing")
    whole = lc.load(folder / "i0.nii.gz")
    parts = [whole[:, :, 10:20], whole[:40], whole[..., 0]]
    for piece in parts:
        piece.data
        truth("a part of a file")
    whole.data
    held = whole[:, :, 10:20].data
    truth("the whole, and a part of it")
    cache.clear()
    truth("evicted but a part")
    assert cache.used == held.nbytes


@scenario
def arrays_of_users(cache: DataCache, folder: Path) -> None:
    array = mine(VOLUME).reshape(SHAPE)
    truth = Truth(cache)
    proxy = LazyReadData(array)
    truth("a copy was taken")
    assert cache.used == VOLUME
    (proxy + 1).data
    del proxy
    truth("gone")
    image = lc.load(folder / "f0.npy")
    sums = [image + array for _ in range(3)]
    truth("in expressions that nobody has computed")
    assert cache.used == 3 * VOLUME
    lc.compute(*sums)
    truth("computed")
    del sums
    cache.clear()
    truth("gone")
    image[2:40] = array[2:40]
    image += array
    truth("assigned and added, not computed")
    np.multiply(image, array, out=image)
    image.data
    truth("written into")
    image.data = array
    truth("replaced")
    image = pickle.loads(pickle.dumps(image + array))
    trim()  # the pickle itself
    truth("pickled and back")
    del image
    cache.clear()
    truth("gone")
    assert cache.used == 0
    array.flags.writeable = False
    truth.before = resident() - VOLUME  # from now on the cache counts the array itself
    fixed = np.frombuffer(memoryview(array.reshape(-1)).toreadonly(), np.float32).reshape(SHAPE)
    users = [LazyReadData(fixed), lc.load(folder / "f0.npy") + fixed, fixed - LazyReadData(fixed)]
    truth("a read-only array counts once")
    assert cache.used == VOLUME
    lc.compute(*users)
    truth("its uses computed")
    del users
    cache.clear()
    truth("counted as long as its owner keeps it")
    del array, fixed
    truth("gone with its owner")
    assert cache.used == 0


@scenario
def memory_maps_of_users(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache, "Anonymous")  # pages of a file go when the system wants them to
    mapped = np.load(folder / "f0.npy", mmap_mode="r")
    proxy = LazyReadData(mapped)
    truth("a copy")
    assert cache.used == VOLUME
    total = lc.load(folder / "f1.npy") + mapped
    total.data
    truth("in a result")
    del proxy, total, mapped
    cache.clear()
    truth("gone")
    # A reader that maps: the pages may all be resident, and that much is counted.
    mapped = LazyReadData(folder / "f0.npy", reader=lambda path: np.load(path, mmap_mode="r"))
    assert mapped.data.nbytes <= cache.used <= mapped.data.nbytes + 4096


@scenario
def readers_of_users(cache: DataCache, folder: Path) -> None:
    # Nobody is told of the death of a bytearray: nibabel's arrays from .nii.gz are made over one.
    truth = Truth(cache, spare=BATCH)
    for reader in (
        lambda path: np.asarray(nibabel.load(path).dataobj),
        lambda path: np.frombuffer(bytearray(b"1" * VOLUME), np.uint8),
        lambda path: np.frombuffer(memoryview(b"1" * VOLUME), np.uint8),
    ):
        proxy = LazyReadData(folder / "i0.nii.gz", reader=reader)
        view = proxy.data[1:]
        truth("loaded")
        cache.clear()
        truth("evicted and held")
        assert cache.used >= view.nbytes
        del view
        truth("gone")
        assert cache.used == 0
    assert cache.stats().untracked_bytes == 0


@scenario
def data_of_several_arrays(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache, spare=BATCH)

    class Pair:
        def __init__(self, path: str) -> None:
            self.arrays = {"one": np.load(path), "two": np.load(path)}

    for reader, one in (
        (Pair, lambda pair: pair.arrays["one"]),
        (lambda path: vars(Pair(path)), lambda pair: pair["arrays"]["one"]),
        (lambda path: tuple(Pair(path).arrays.values()), lambda pair: pair[0]),
    ):
        proxy = LazyReadData(folder / "f0.npy", reader=reader)
        held = one(proxy.data)[1:]
        truth("loaded")
        cache.clear()
        truth("evicted, one array held")
        assert cache.used == VOLUME
        del held
        truth("gone")
        assert cache.used == 0


@scenario
def results(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    sums = [lc.load(folder / f"f{i}.npy") + 1 for i in range(4)]
    for turn in range(2):
        for total in sums:
            total.data
            truth(f"computed, {turn}")
        held = sums[turn].data[1:]
        cache.clear()
        truth("evicted, one held")
        assert cache.used == VOLUME
        del held
        truth("let go")
        assert cache.used == 0
    mean, deviation = lc.mean(sums), lc.std(sums)
    lc.compute(mean, deviation)
    del sums, total
    cache.clear()
    truth("evicted for good")
    unasked = (lc.load(folder / "f0.npy") * 3) / lc.load(folder / "f1.npy")
    del unasked
    truth("built and dropped")
    lc.save_all({folder / "mean.nii.gz": mean, folder / "deviation.npy": deviation})
    del mean, deviation
    cache.clear()
    truth("saved")
    assert cache.used == 0


@scenario
def copies(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    image = lc.load(folder / "f0.npy")
    total = image + 1
    twins = [copy.copy(image), copy.deepcopy(image), copy.copy(total), copy.deepcopy(total)]
    twins += [pickle.loads(pickle.dumps(proxy)) for proxy in (image, total)]
    truth("not computed")
    for twin in twins:
        twin.data
        truth("computed")
    own = mine(VOLUME).reshape(SHAPE)
    np.copyto(own, total.data)
    truth("a user's own copy", own.nbytes)
    del total, own, twin
    image.release()
    truth("the first gone")
    while twins:
        twins.pop()
        truth("a twin gone")
    cache.clear()
    truth("nothing")
    assert cache.used == 0


@scenario
def operations_in_place(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    a, b = lc.load(folder / "f0.npy"), lc.load(folder / "f1.npy")
    before = a * 2
    for turn in range(3):
        a += b
        truth("built")
        a.data
        truth("computed")
        a[turn : turn + 20] = b[20:40]
        a *= 2
        truth("built on it")
        a.data
        truth("computed")
    before.data
    truth("what was written before")
    del a, before
    b.release()
    cache.clear()
    truth("nothing")
    assert cache.used == 0


@scenario
def uses_and_deletion(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    image = lc.load(folder / "f0.npy", nops=2)
    for used in (VOLUME, 0, VOLUME):
        (image + 1).data
        truth("used")
        assert cache.used == used
    del image
    truth("deleted")
    cache.clear()
    truth("cleared")
    image = lc.load(folder / "large0.npy")
    with image.pinned() as data:
        cache.clear()
        truth("pinned")
    del data, image
    cache.clear()
    truth("nothing")
    assert cache.used == 0


@scenario
def cycles(cache: DataCache, folder: Path) -> None:
    gc.disable()
    truth = Truth(cache)
    for name in ("f0.npy", "i0.nii.gz"):
        proxy = lc.load(folder / name)
        total = proxy + 1
        cycle = [proxy, proxy.data[1:], total, total.data]
        cycle.append(cycle)
        del proxy, total
        cache.clear()
        truth("evicted, in a cycle")
        assert cache.used == 2 * VOLUME
        del cycle
        truth("nobody knows that it is garbage")
        gc.collect()
        truth("collected")
        assert cache.used == 0


@scenario
def images_for_nibabel(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    for name, total in (("i0.nii.gz", False), ("f0.npy", True)):
        proxy = lc.load(folder / name)
        image = (proxy + 1 if total else proxy).to_nibabel()
        truth("nothing asked")
        voxels = np.asarray(image.dataobj)
        truth("its voxels", voxels.nbytes)
        doubles = image.get_fdata()
        truth("as doubles", voxels.nbytes + doubles.nbytes)
        part = image.dataobj[..., :32]
        truth("a part", voxels.nbytes + doubles.nbytes + part.nbytes)
        del voxels, doubles, part
        truth("let go")
        del image, proxy
        cache.clear()
        truth("nothing")
        assert cache.used == 0
    made = nibabel.Nifti1Image(mine(VOLUME).reshape(SHAPE), np.eye(4))
    truth("a user's own image", VOLUME)
    proxy = LazyReadData(made)
    truth("a proxy of an image in memory", VOLUME)
    assert cache.used == VOLUME
    del proxy
    truth("gone", VOLUME)
    assert cache.used == 0


@scenario
def loops_left_early(cache: DataCache, folder: Path) -> None:
    images = PreloadList([lc.load(folder / f"i{i}.nii.gz") for i in range(4)], npreload=2)
    images[0].data
    cache.clear()
    truth = Truth(cache)
    iterator = iter(images)
    next(iterator).data
    next(iterator)
    truth("half consumed")
    del iterator
    truth("dropped")
    cache.clear()
    truth("cleared")
    maxima = (image.data.max() for image in images)
    next(maxima)
    truth("a generator")
    maxima.close()
    truth("closed")
    del maxima
    cache.clear()
    truth("cleared")
    for image in images:
        closure = image.data.max
        break
    del image
    cache.clear()
    truth("left early, one image held by a closure")
    assert cache.used == VOLUME
    del closure
    truth("the closure gone")
    assert cache.used == 0
    for image in images:
        image.data.max()
    truth("the whole loop")
    del image
    cache.clear()
    truth("cleared")
    assert cache.used == 0


@scenario
def errors_that_are_kept(cache: DataCache, folder: Path) -> None:
    kept: list[BaseException] = []

    def fail(work: Callable[[], Any]) -> None:
        for path in ("f0.npy", "f1.npy"):
            lc.load(folder / path).release()
        try:
            work()
        except (Exception, KeyboardInterrupt) as error:
            kept.append(error)

    def fails(path: str) -> Any:
        raise OSError(f"{path}: gone")

    def interrupted(path: str) -> Any:
        raise KeyboardInterrupt

    def plan(last: Any) -> Any:
        x, y = lc.load(folder / "f0.npy"), lc.load(folder / "f1.npy")
        return (x * y) / (x - x) + (y - last)

    def by_zero() -> Any:
        with np.errstate(all="raise"):
            return plan(1).data

    gone = LazyReadData(folder / "f3.npy", reader=fails)
    stopped = LazyReadData(folder / "f3.npy", reader=interrupted)
    computed = lc.load(folder / "f2.npy") * 2
    for name, work in {
        "a file cut short": lambda: lc.load(folder / "cut.nii.gz").data,
        "a damaged file": lambda: lc.load(folder / "damaged.nii.gz").data,
        "pinned": lambda: lc.load(folder / "cut.nii.gz").pinned().__enter__(),
        "a plan with a reader that fails": lambda: plan(gone).data,
        "a plan with a damaged file": lambda: plan(lc.load(folder / "cut.nii.gz")[..., 1]).data,
        "a plan that is interrupted": lambda: plan(stopped).data,
        "a division by zero": by_zero,
        "several results": lambda: lc.compute(plan(1), plan(gone)),
        "in a list": lambda: [v.data for v in PreloadList([lc.load(folder / "cut.nii.gz")])],
    }.items():
        truth = Truth(cache)
        computed.data
        fail(work)
        assert kept, name
        truth(f"{name}: the error is kept")
        assert cache.used <= 5 * VOLUME
        cache.clear()
        truth(f"{name}: nothing else")
        assert cache.used == 0
        kept.clear()
        truth(f"{name}: gone")


@scenario
def scopes_that_close(cache: DataCache, folder: Path) -> None:
    truth = Truth(cache)
    with DataCache("100MiB"):
        images = [lc.load(folder / f"f{i}.npy") for i in range(4)]
        total = images[0] + LazyReadData(mine(VOLUME).reshape(SHAPE))
        total.data
        held = images[1].data
        lc.mean(images).data
        truth("inside")
    truth("closed")
    # A file that is held, and a result with the array that it was made of.
    assert cache.used == 3 * VOLUME
    del held
    truth("the file let go")
    del total, images
    truth("the result let go")
    assert cache.used == 0


@scenario
def a_budget_that_shrinks_while_others_load(cache: DataCache, folder: Path) -> None:
    names = [f"f{i}.npy" for i in range(4)] + ["i0.nii.gz", "i1.nii.gz", "u.nii", "F.npy"]
    proxies = [lc.load(folder / name, dtype=dtype) for name in names for dtype in (None, "f4")]
    truth = Truth(cache)
    done = threading.Event()
    loaded = threading.Semaphore(0)

    def load(number: int) -> None:
        rng = random.Random(number)
        while not done.is_set():
            proxy = rng.choice(proxies)
            proxy.data.max()
            if number % 2:
                (proxy * 2).data.max()
            loaded.release()

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            for volumes in (30, 4, 10):
                cache.budget = volumes * VOLUME
                for _ in range(6):
                    assert loaded.acquire(timeout=SOON)
                # Each thread may hold two more that were evicted meanwhile, of up to 8 MiB.
                most = (volumes + 3 * 4) * VOLUME
                assert cache.used <= most
                there = resident() - truth.before
                assert there <= most * 1.05 + SLACK, (turn, volumes, there / MIB)
    finally:
        done.set()
        for thread in threads:
            thread.join(SOON)
    truth("all threads ended")
    cache.budget = 30 * VOLUME
    lc.compute(*proxies)
    before, full = cache.used, resident()
    truth("full")
    cache.budget = 3 * VOLUME
    truth("shrunk")
    freed = before - cache.used
    assert freed > 8 * VOLUME
    assert full - resident() >= 0.9 * freed


@scenario
def what_numpy_takes_beside(cache: DataCache, folder: Path) -> None:
    """Plans whose steps NumPy allocates for: the C allocator keeps no more than a batch of it."""
    images = [lc.load(folder / f"f{i}.npy") for i in range(4)]
    truth = Truth(cache, spare=BATCH)
    for turn in range(2):
        for make in (
            lambda: np.stack(images),
            lambda: lc.median(images),
            lambda: images[0].std(axis=0),
            lambda: np.percentile(images[1], 30, axis=0),
            lambda: np.concatenate(images, axis=1),
        ):
            total = make()
            total.data
            truth(f"computed, {turn}")
            del total
            truth(f"dropped, {turn}")
            cache.clear()
            truth(f"cleared, {turn}")


PLANS: dict[str, Callable[[Any, Any], Any]] = {
    "a sum": lambda x, i: x + x[::-1] + i[..., 0],
    "many results": lambda x, i: lc.std([x, x * 2, x * 3]),
    "a median": lambda x, i: lc.median([x, x * 2, x * 3]),
    "percentiles": lambda x, i: np.percentile(x, 30, axis=0),
    "a deviation": lambda x, i: i.std(axis=0),
    "nan left out": lambda x, i: np.nanmean(x, axis=0),
    "a place": lambda x, i: np.argmax(i, axis=0),
    "another place": lambda x, i: x.argmin(axis=0),
    "a count": lambda x, i: np.count_nonzero(x, axis=0),
    "a power": lambda x, i: i**2,
    "a power of another type": lambda x, i: i**0.5,
    "a choice": lambda x, i: lc.where(x > 2, x, 0),
    "a conversion": lambda x, i: i.astype("c16"),
    "a stack": lambda x, i: np.stack([x, x * 2]),
}


@scenario
def the_peak_of_a_plan(cache: DataCache, folder: Path) -> None:
    for what, make in PLANS.items():
        with DataCache("1GiB") as inner:
            trim()
            before = resident()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
            make(lc.load(folder / "f0.npy"), lc.load(folder / "i0.nii.gz")).data
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
            most = inner.stats().peak_bytes * 1.05 + SLACK
        if Truth.counts:
            assert peak - before <= most, (what, (peak - before) / MIB, most / MIB)


# Freeing


def freed_by_evicting(cache: DataCache, proxies: list[Any]) -> None:
    cache.budget = 0


def freed_by_releasing(cache: DataCache, proxies: list[Any]) -> None:
    for proxy in proxies:
        proxy.release()


def freed_by_clearing(cache: DataCache, proxies: list[Any]) -> None:
    cache.clear()


def freed_by_deleting_results(cache: DataCache, proxies: list[Any]) -> None:
    proxies.clear()


def freed_by_letting_go_of_views(cache: DataCache, proxies: list[Any]) -> None:
    views = [proxy.data[1:] for proxy in proxies]
    cache.clear()
    views.clear()


def freed_by_using_up(cache: DataCache, proxies: list[Any]) -> None:
    for proxy in proxies:
        proxy.nops = 1
        (proxy > 3).any(axis=0).data


def freed_at_the_end_of_a_loop(cache: DataCache, proxies: list[Any]) -> None:
    for proxy in proxies:
        proxy.nops = 1
    for proxy in PreloadIterator(proxies, npreload=2):
        (proxy > 3).any(axis=0).data


def freed_by_another_thread(cache: DataCache, proxies: list[Any]) -> None:
    together(1, lambda _: cache.clear())


FREEING = [function for name, function in list(globals().items()) if name.startswith("freed_")]


def load_all(proxies: list[Any], survivors: list[Any]) -> None:
    for proxy in proxies:
        proxy.data
        survivors.append(bytearray(4096))  # the small things that any work leaves behind


def freeing(cache: DataCache, folder: Path, name: str, count: str) -> None:
    """Every way to free ``count`` volumes gives them back, to within a tenth or one batch."""
    paths = [folder / f"{name}{i}.npy" for i in range(int(count))]
    nbytes = lc.load(paths[0]).nbytes * len(paths)
    batch = BATCH if name == "half" else 0
    survivors: list[Any] = []
    load_all([lc.load(path) for path in paths], survivors)
    cache.clear()
    for free in FREEING:
        cache.budget = 4 << 30
        proxies = [lc.load(path) for path in paths]
        if free is freed_by_deleting_results:
            proxies = [proxy + 1 for proxy in proxies]
        gc.collect()
        trim()
        before = resident()
        load_all(proxies, survivors)
        for path in paths if free is freed_by_deleting_results else []:
            lc.load(path).release()
        loaded = resident() - before
        assert loaded > 0.9 * nbytes, (free.__name__, loaded / MIB)
        free(cache, proxies)
        assert cache.used == 0, free.__name__
        left = resident() - before
        assert left < max(0.1 * nbytes, batch), (free.__name__, left / MIB, nbytes / MIB)


@scenario
def what_four_threads_loaded(cache: DataCache, folder: Path) -> None:
    """Each thread has an arena of the C allocator: what is freed goes back from all of them."""
    halves = [folder / f"half{i}.npy" for i in range(160)]
    nbytes = lc.load(halves[0]).nbytes * len(halves)
    survivors: list[Any] = []

    def work(number: int) -> None:
        results = [lc.load(path, cache=cache) * 2 for path in halves[number::4]]
        load_all(results, survivors)
        kept.append(results)

    kept: list[Any] = []
    together(4, work)
    kept.clear()
    cache.clear()
    for turn in range(3):
        truth = Truth(cache, spare=BATCH)
        together(4, work)
        truth(f"loaded and computed, {turn}")
        assert cache.used >= nbytes
        together(4, lambda number: kept.pop(0).clear())
        truth(f"results gone, {turn}")
        cache.clear()
        truth(f"all gone, {turn}")
        assert cache.used == 0


# Random walks


class Walk:
    """Random things that users do, with what they hold between them."""

    HELD = 4

    def __init__(self, cache: DataCache, folder: Path, seed: int) -> None:
        self.cache = cache
        self.folder = folder
        self.rng = random.Random(seed)
        names = [f"f{i}.npy" for i in range(4)] + ["i0.nii.gz", "i1.nii.gz", "u.nii", "F.npy"]
        self.names = [*names, "s.nii.gz", "d.npy", "c.npy", "b.npy"]
        self.proxies: list[Any] = []
        self.held: list[Any] = []  # views, errors, cycles, closures, iterators
        self.own: list[np.ndarray] = []
        self.scopes: list[ExitStack] = []
        self.actions = [getattr(self, name) for name in dir(Walk) if name.startswith("do_")]

    def step(self) -> str:
        action = self.rng.choice(self.actions)
        with suppress(GeneratorExit):
            action()
        for kept in (self.proxies, self.held, self.own):
            while len(kept) > self.HELD:
                kept.pop(self.rng.randrange(len(kept)))
        return str(action.__name__)

    def end(self) -> None:
        self.held.clear()
        self.own.clear()
        self.proxies.clear()
        while self.scopes:
            self.scopes.pop().close()
        gc.collect()

    def file(self, **options: Any) -> Any:
        return lc.load(self.folder / self.rng.choice(self.names), **options)

    def float(self) -> Any:
        return lc.load(self.folder / f"f{self.rng.randrange(4)}.npy")

    def some(self) -> Any:
        if not self.proxies:
            self.proxies.append(self.file())
        return self.rng.choice(self.proxies)

    def do_load(self) -> None:
        self.proxies.append(self.file(nops=self.rng.choice([0, 0, 1, 2])))
        self.proxies[-1].data

    def do_ask(self) -> None:
        self.some().data

    def do_hold(self) -> None:
        array = self.some().data
        how = self.rng.choice(list(VIEWS.values()))
        # Of strided memory some of them would be copies.
        self.held.append(how(array) if array.ndim > 2 and array.flags.forc else array)

    def do_let_go(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held)))

    def do_forget(self) -> None:
        if self.proxies:
            self.proxies.pop(self.rng.randrange(len(self.proxies)))

    def do_express(self) -> None:
        x, y = self.float(), self.float()
        made = self.rng.choice(
            [x + y, x * 2 - y, lc.mean([x, y]), lc.std([x, y, x]), lc.where(x > y, x, y), x[1:] - 1,
             sum([x, y, x]), lc.clip(x, 1, 2), x.astype("f8"), (x > 1) & (y > 1), x.T, y[3:9]]
        )  # fmt: skip
        self.proxies.append(made)
        if self.rng.random() < 0.7:
            made.data

    def do_slice(self) -> None:
        proxy = self.some()
        first = self.rng.randrange(20)
        self.proxies.append(proxy[first : first + self.rng.choice([2, 10, 100])])
        self.proxies[-1].data

    def do_change(self) -> None:
        proxy = self.float() + 1 if self.rng.random() < 0.5 else self.float()
        proxy += self.float()
        proxy[self.rng.randrange(30) :] = 3
        if self.rng.random() < 0.5:
            proxy.data
        proxy *= 2
        proxy.data
        self.proxies.append(proxy)

    def do_give_an_array(self) -> None:
        array = mine(VOLUME).reshape(SHAPE)
        if self.rng.random() < 0.5:
            array = np.frombuffer(memoryview(array.reshape(-1)).toreadonly(), array.dtype)
            array = array.reshape(SHAPE)
        self.proxies.append(self.float() + array if self.rng.random() < 0.5 else lc.load(array))
        if self.rng.random() < 0.5:
            self.proxies[-1].data

    def do_copy(self) -> None:
        proxy = self.some()
        how: list[Callable[[Any], Any]] = [
            copy.copy, copy.deepcopy, lambda p: LazyReadData(p),
            lambda p: pickle.loads(pickle.dumps(p)),
        ]  # fmt: skip
        self.proxies.append(self.rng.choice(how)(proxy))
        trim()  # of pickles

    def do_copy_data(self) -> None:
        data = self.some().data
        own = mine(max(4096, data.nbytes), np.uint8)
        np.copyto(own[: data.nbytes].view(data.dtype).reshape(data.shape), data)
        self.own.append(own)

    def do_release(self) -> None:
        self.some().release()

    def do_clear(self) -> None:
        self.cache.clear()

    def do_resize(self) -> None:
        self.cache.budget = self.rng.choice([0, 3, 6, 10, 30]) * VOLUME

    def do_iterate(self) -> None:
        images = PreloadList([self.file() for _ in range(4)], npreload=self.rng.randrange(3))
        iterator = iter(images)
        for _ in range(self.rng.randrange(4)):
            next(iterator).data
        self.held.append(iterator)

    def do_generate(self) -> None:
        generator = (float(image.data.real.max()) for image in [self.file() for _ in range(3)])
        next(generator)
        self.held.append(generator)

    def do_close_over(self) -> None:
        data = self.some().data
        self.held.append(lambda: data)

    def do_make_a_cycle(self) -> None:
        proxy = self.some()
        cycle = [proxy, proxy.data[1:], proxy + 1]
        cycle.append(cycle)
        if self.rng.random() < 0.5:
            self.held.append(cycle)

    def do_collect(self) -> None:
        gc.collect()

    def do_fail(self) -> None:
        bad = lc.load(self.folder / self.rng.choice(["cut.nii.gz", "damaged.nii.gz"]))
        x, y = self.float(), self.float()
        works: list[Callable[[], Any]] = [
            lambda: bad.data,
            lambda: (x * y / (y + 1) - bad[..., 1]).data,
            lambda: lc.compute(x + y, bad),
            lambda: (x[:, :5] * y).data,
            lambda: [v.data for v in PreloadList([x, bad, y], npreload=1)],
        ]
        try:
            self.rng.choice(works)()
        except Exception as error:
            if self.rng.random() < 0.5:
                self.held.append(error)

    def do_image(self) -> None:
        proxy = self.float()
        image = (proxy if self.rng.random() < 0.5 else proxy + 1).to_nibabel()
        self.own.append(image.get_fdata() if self.rng.random() < 0.5 else np.asarray(image.dataobj))

    def do_open_a_scope(self) -> None:
        if len(self.scopes) < 2:
            self.scopes.append(ExitStack())
            self.scopes[-1].enter_context(DataCache(self.rng.choice([3, 10, 30]) * VOLUME))

    def do_close_a_scope(self) -> None:
        if self.scopes:
            self.scopes.pop().close()

    def do_save(self) -> None:
        (self.float() + 1).save(self.folder / f"saved{os.getpid()}.npy")
        trim()  # of the blocks that were written


def walk(cache: DataCache, folder: Path, first: str, count: str) -> None:
    warm = Walk(cache, folder, 0)
    for action in warm.actions:
        action()
    warm.end()
    gc.freeze()  # what was imported need not be looked through again
    for seed in range(int(first), int(first) + int(count)):
        cache.clear()
        cache.budget = 30 * VOLUME
        walker = Walk(cache, folder, seed)
        truth = Truth(cache, spare=BATCH)
        told: list[str] = []
        for _ in range(100):
            told += [walker.step() for _ in range(3)]
            truth(f"seed {seed}: ... {' '.join(told[-12:])}", sum(a.nbytes for a in walker.own))
        walker.end()
        truth(f"seed {seed}: let go of everything")
        cache.clear()
        truth(f"seed {seed}: the end")
        assert cache.used == 0
        cache.check()


def main(name: str, folder: str, *args: str) -> None:
    work: Callable[..., None] = SCENARIOS.get(name) or globals()[name]
    with DataCache("2GiB") as cache:
        for Truth.counts in (True,) if args else (False, True):
            cache.budget = "2GiB"
            work(cache, Path(folder), *args)
            cache.clear()
            gc.collect()


@LINUX
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_resident_is_accounted_and_what_is_accounted_is_there(
    name: str, folder: Path
) -> None:
    run(name, folder)


@LINUX
@pytest.mark.parametrize(("size", "count"), [("half", 160), ("f", 4), ("large", 4)])
def test_what_is_freed_goes_back_to_the_system(size: str, count: int, folder: Path) -> None:
    run("freeing", folder, size, count)


@LINUX
@pytest.mark.parametrize("first", [1, 4, 7])
def test_walks_of_random_actions_stay_true(first: int, folder: Path) -> None:
    run("walk", folder, first, 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
