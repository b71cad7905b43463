"""Ctrl-C, as the system sends it, at known places and at a hundred random ones.

What `test_interrupts` tries line by line happens here in real loads, waits and saves.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support import SOON, UNIT, Blocked, Gate, Made, Running, load, preload_threads, table_of, using

import lazycache as lc
from lazycache._operation import Operation
from lazycache._request import insist
from lazycache.cache import DataCache
from lazycache.proxy import LazyReadData

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
    # Python tells of a file that is open when an interrupt comes between `open` and ``with``.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(lc.__file__).parent.parent


@contextlib.contextmanager
def interrupted(when: Callable[[], object], times: int = 1) -> Iterator[None]:
    """A block that Ctrl-C ends, once ``when`` returns (in another thread)."""
    main = threading.get_ident()
    over: queue.SimpleQueue[None] = queue.SimpleQueue()

    def send() -> None:
        when()
        for _ in range(times):
            signal.pthread_kill(main, signal.SIGINT)
        # One that comes just before a wait of the system is noticed after it: users press again.
        while True:
            try:
                return over.get(timeout=0.5)
            except queue.Empty:
                signal.pthread_kill(main, signal.SIGINT)

    sending = Running(send)
    came = False
    try:
        yield
        sending.result()
        threading.Event().wait(SOON)
    except KeyboardInterrupt:
        came = True
    with contextlib.suppress(KeyboardInterrupt):  # a second one
        over.put(None)
    sending.result()
    assert came


def waits_in(function: Callable[..., object]) -> Callable[[], None]:
    """Returns when the main thread has called C from ``function``, or runs its own lines."""
    main = threading.get_ident()
    return until(lambda: sys._current_frames()[main].f_code is function.__code__)


@pytest.fixture(autouse=True)
def threads_that_never_started() -> Iterator[None]:
    """Python's list of them is never cleared of those whose start was interrupted."""
    yield
    threading._limbo.clear()  # type: ignore[attr-defined]


def whole(cache: DataCache) -> None:
    """Nothing is left over."""
    table = table_of(cache)
    cache.check()
    table.pool.join_threads(SOON)
    cache.check()
    assert not any((table.uses, table.flights, table.blocked, table.streams))
    assert table.first() is None
    assert not any(thread.is_alive() for thread in preload_threads())


def until(happens: Callable[[], object]) -> Callable[[], None]:
    """Returns when ``happens`` is true. Busy: what it looks at tells nobody when it changes."""

    def wait() -> None:
        while not happens():
            pass

    return wait


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Volumes of real size."""
    folder = tmp_path_factory.mktemp("brains")
    dice = np.random.default_rng(0)
    noise = dice.integers(0, 2000, (197, 233, 47), dtype=np.int16)
    volume = np.concatenate([noise] * 4, axis=2)
    first = folder / "brain0.nii.gz"
    lc.load(volume).save(first)
    paths = [first]
    for number in range(1, 6):
        paths.append(folder / f"brain{number}.nii.gz")
        os.link(first, paths[-1])
    return paths


@pytest.fixture
def cache() -> DataCache:
    return DataCache(6 * UNIT)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_in_a_reader(cache: DataCache, times: int) -> None:
    gate = Gate()
    key = Made("a", fill=3, during=gate)
    with interrupted(gate.reached, times):
        cache.load(key)
    whole(cache)
    assert cache.used == 0
    key.during = None
    assert load(cache, key) == 3
    assert cache.stats().loads == 1


def test_an_interrupt_in_a_reader_that_others_wait_for(cache: DataCache) -> None:
    """They read it themselves."""
    gate = Gate()
    key = Made("a", fill=3, during=gate)
    others: list[Running] = []
    blocked = Blocked(cache)

    def join() -> None:
        gate.reached()
        key.during = None
        others.extend(Running(load, cache, key) for _ in range(3))
        blocked.wait_for(*others)

    with interrupted(join):
        cache.load(key)
    assert [other.result() for other in others] == [3, 3, 3]
    whole(cache)
    assert key.loads == 2


def test_an_interrupt_while_a_volume_is_decoded(brains: list[Path]) -> None:
    cache = DataCache("64MiB")
    proxy = LazyReadData(brains[0], cache=cache)
    expected = np.asarray(nib.load(brains[0]).dataobj)
    with interrupted(until(proxy.preloading)):
        proxy.data
    whole(cache)
    assert cache.used == 0
    assert np.array_equal(proxy.data, expected)


def test_an_interrupt_in_a_loop_whose_loads_run_ahead(brains: list[Path]) -> None:
    cache = DataCache("64MiB")
    proxies = [LazyReadData(path, cache=cache) for path in brains]
    reading = threading.Event()

    def work() -> None:
        for proxy in lc.PreloadList(proxies, npreload=3):
            proxy.data
            reading.set()
            threading.Event().wait(SOON)

    with interrupted(reading.wait):
        work()
    whole(cache)
    assert cache.stats().overcommits == 0
    assert [int(proxy.data.max()) for proxy in lc.PreloadList(proxies)] == [1999] * 6
    whole(cache)


def test_an_interrupt_of_a_wait_for_memory(cache: DataCache) -> None:
    blocked, gate = Blocked(cache), Gate()

    def hold() -> None:
        with cache.operation("another", workspace=5 * UNIT, room=0):
            gate()

    holding = Running(hold)
    gate.reached()
    waits = waits_in(insist)
    with (
        interrupted(lambda: (blocked.told.get(), waits())),
        cache.operation("a test", workspace=2 * UNIT, room=0),
    ):
        pytest.fail("it was admitted")
    table = table_of(cache)
    assert not table.blocked
    assert table.first() is None
    # Whoever comes next waits for the other alone.
    asking = Running(load, cache, Made("two", 2 * UNIT, fill=2))
    blocked.wait_for(asking)
    gate.open()
    holding.result()
    assert asking.result() == 2
    whole(cache)
    assert cache.stats().overcommits == 0


def test_an_interrupt_of_a_wait_for_the_load_of_another_thread(cache: DataCache) -> None:
    blocked, gate = Blocked(cache), Gate()
    key = Made("a", fill=3, during=gate)
    other = Running(load, cache, key)
    gate.reached()
    waits = waits_in(Operation._outcome)
    with interrupted(lambda: (blocked.told.get(), waits())), using(cache, key):
        pytest.fail("it was loaded")
    assert not table_of(cache).blocked
    gate.open()
    assert other.result() == 3
    whole(cache)
    assert key.loads == 1


@pytest.mark.parametrize("extension", ["nii.gz", "nii", "npy", "mgz"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    extension: str, tmp_path: Path
) -> None:
    target = tmp_path / f"out.{extension}"
    lc.load(np.ones((4, 4, 4), np.float32)).save(target)
    old = target.read_bytes()
    dice = np.random.default_rng(0)
    large = lc.load(dice.random((256, 256, 192), np.float32))
    large.data
    with interrupted(until(lambda: any(tmp_path.glob(".lazycache-*/*")))):
        while True:  # an uncompressed file may be faster than the signal
            large.save(target)
            old = target.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [target.name]
    found = target.read_bytes()
    assert found == old or len(found) > large.nbytes // 2


def test_an_interrupt_of_a_mean_of_many_files(tmp_path: Path) -> None:
    cache = DataCache(20 * UNIT)
    paths = [tmp_path / f"{number}.nii.gz" for number in range(60)]
    for number, path in enumerate(paths):
        values = np.full((5, 5, 10), number, np.float32)
        nib.Nifti1Image(values, np.eye(4)).to_filename(path)
    proxies = [LazyReadData(path, cache=cache) for path in paths]
    with interrupted(until(lambda: cache.stats().loads > 10)):
        while True:
            lc.mean(proxies).data
            cache.clear()
    whole(cache)
    assert lc.mean(proxies).data.tobytes() == np.full((5, 5, 10), 29.5, np.float32).tobytes()
    assert cache.stats().overcommits == 0


def script(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", text, *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=100,
    )


STORM = """
import faulthandler, random, signal, sys, threading
import numpy as np
import lazycache as lc
from lazycache.cache import get_cache
from support import UNIT, preload_threads, table_of

faulthandler.dump_traceback_later(20, exit=True)
paths, seed = sys.argv[2:], int(sys.argv[1])
dice = random.Random(seed)
truth = [np.load(path) for path in paths]
mean = np.mean(np.stack(truth), axis=0)
lc.set_budget(12 * UNIT)
outer = get_cache()
images = [lc.load(path) for path in paths]
told = []
sys.unraisablehook = lambda unraisable: told.append(unraisable.exc_type)
signal.signal(signal.SIGALRM, signal.default_int_handler)

def work():
    while True:
        with lc.DataCache(8 * UNIT):
            assert lc.mean(images).data.tobytes() == mean.tobytes()
            for image, values in zip(lc.PreloadList(images, npreload=2), truth):
                assert image.data[0, 0, 0] == values[0, 0, 0]
        a, b, c = images[:3]
        ((a + b) * c).data

def interrupt(seconds):
    try:
        try:
            # Again, if Python ignores one in a finalizer.
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass

def look():
    table = table_of(outer)
    assert not table.inside()
    outer.check()
    table.pool.join_threads(20)
    outer.check()
    assert not (table.uses or table.flights or table.blocked or table.streams), vars(table)
    assert table.first() is None
    assert not any(thread.is_alive() for thread in preload_threads())
    assert outer.used <= outer.budget
    assert lc.get_cache() is outer, lc.get_cache()
    assert len(table.root.tree()) == 1
    assert lc.mean(images).data.tobytes() == mean.tobytes()

for number in range(100):
    interrupt(dice.uniform(1e-4, 2e-2))
    if number % 3 == 0:
        # One more while the first is being cleaned up after.
        interrupt(dice.uniform(1e-5, 1e-3))
    look()
outer.clear()
images.clear()
print(outer.used, outer.stats().overcommits, set(told) <= {KeyboardInterrupt})
print([thread.name for thread in threading.enumerate() if thread.is_alive()])
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_a_hundred_interrupts_at_random_moments(seed: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(8)]
    for number, path in enumerate(paths):
        np.save(path, np.full((5, 5, 10), number, np.float32))
    done = script(STORM, str(seed), *map(str, paths))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 0 True", "['MainThread']"]


COMMAND = """
import os, signal, sys, threading
from lazycache.cli import main

def send():
    [output] = [text for text in sys.argv if "=" in text]
    while not any(name.startswith(".lazycache") for name in os.listdir(os.path.dirname(output))):
        pass  # until the result is being written
    while True:  # as in `interrupted`, but not while it is on its way out
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait(10)

threading.Thread(target=send, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_command_ends_with_130_and_leaves_no_file(
    brains: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "sd.nii.gz"
    target.write_bytes(b"what was there")
    done = script(
        COMMAND,
        *("eval", *map(str, brains), "-o", f"{target}=std(images)", "--budget", "200MiB"),
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == ["lazycache: interrupted"]
    assert target.read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


EXIT = """
import signal, sys, threading
from support import Gate, Made
from lazycache.cache import DataCache

gate = Gate()

class Loop:
    pass

def send():
    gate.reached()
    while True:  # as in `interrupted`, but not while it is on its way out
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait(10)

cache = DataCache(4000)
loop = Loop()
ahead = cache.preloading(loop, 1)
key = Made("a", during=gate)
ahead.expect([key])
threading.Thread(target=send, daemon=True).start()
ahead.want([key])
threading.Event().wait(80)
"""


def test_the_process_ends_at_once_while_a_pool_thread_reads() -> None:
    done = script(EXIT)
    assert done.returncode in (1, 130, -signal.SIGINT)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
