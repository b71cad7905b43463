"""Other processes: what travels to workers, what a fork inherits, and how a budget is divided."""

from __future__ import annotations

import faulthandler
import multiprocessing
import operator
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
from support import (
    SOON,
    UNIT,
    Blocked,
    Gate,
    Made,
    Running,
    load,
    preload_threads,
    table_of,
    using,
)

import lazycache as lc
from lazycache import memory
from lazycache.cache import DataCache
from lazycache.errors import CacheBusyError

METHODS = multiprocessing.get_all_start_methods()
SHAPE = (8, 9, 10)
VOLUME = 2 * 8 * 9 * 10

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def cache() -> DataCache:
    return DataCache(6 * UNIT)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(5)
    paths = [str(tmp_path / f"sub-{number:02d}_T1w.nii.gz") for number in range(6)]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, 99, SHAPE, np.int16), np.eye(4)), path)
    return paths


def eager(path: str) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


# What travels


def tenfold(path: str, by: int, more: str) -> np.ndarray:
    return np.load(path) * by


def test_the_proxy_of_a_file_pickles_to_under_1_kb(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*[f"a folder with a long name, number {i}" for i in range(10)])
    folder.mkdir(parents=True)
    path = folder / "sub-01_ses-02_acq-mprage_run-03_desc-preprocessed_T1w.npy"
    np.save(path, np.ones((400, 400)))
    assert len(str(path)) > 450
    proxies = [
        lc.load(path),
        lc.load(path, reader=tenfold, read_options={"by": 10}, dtype="f4", nops=3, more="x" * 50),
    ]
    for proxy in proxies:
        assert len(pickle.dumps(proxy)) < 1000
        assert proxy.data.nbytes > 500_000
        assert len(pickle.dumps(proxy)) < 1000
        assert pickle.loads(pickle.dumps(proxy)).data.tobytes() == proxy.data.tobytes()


def test_an_expression_over_three_files_pickles_to_under_1_kb_even_computed(
    files: list[str],
) -> None:
    a, b, c = (lc.load(path) for path in files[:3])
    for expression in (a * 2 + b * c, lc.mean([a, b, c]), lc.where(a > b, c, 0), a[..., 2:4] / 3):
        assert len(pickle.dumps(expression)) < 1000
        expression.data
        assert len(pickle.dumps(expression)) < 1100  # and the states of the files


@pytest.mark.parametrize(
    "value",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24, dtype=">i2").reshape(2, 3, 4)),
        np.arange(48, dtype="c8").reshape(4, 3, 4).transpose(2, 0, 1),
        np.array(2.5),
        np.float32(2.5),
        np.zeros((0, 3)),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        {"no": "array"},
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'shape', '')}",
)
def test_data_in_memory_travel_with_their_type_and_memory_order(value: Any) -> None:
    proxy = lc.load(value)
    again = pickle.loads(pickle.dumps(proxy)).data
    assert type(again) is type(value)
    if isinstance(value, np.ndarray):
        assert (again.dtype, again.strides) == (proxy.data.dtype, proxy.data.strides)
        assert again.tobytes("A") == proxy.data.tobytes("A") == value.tobytes("A")
        assert not again.flags.writeable
    else:
        assert again == value


def test_changed_data_travel_and_those_of_the_file_do_not(files: list[str]) -> None:
    proxy = lc.load(files[0])
    proxy += 1000
    untouched = lc.load(files[0])
    changed, again = pickle.loads(pickle.dumps((proxy, untouched)))
    assert np.array_equal(changed.data, eager(files[0]) + np.int16(1000))
    assert np.array_equal(again.data, eager(files[0]))


def test_an_expression_of_100_000_terms_pickles() -> None:
    a, b = lc.load(np.ones(3)), lc.load(np.full(3, 2.0))
    expression = reduce(operator.add, (a if turn % 2 else b for turn in range(100_000)))
    text = pickle.dumps(expression)
    assert len(text) < 100_000 * 100
    assert pickle.dumps(pickle.loads(text)) == text


# Workers


def mean_in_a_worker(expression: Any, budget: int | None) -> dict[str, Any]:
    """What a worker finds: run in its own process, under its own budget."""
    if budget is not None:
        lc.set_budget(budget)
    before = lc.get_cache().stats()
    data = expression.data
    stats = lc.get_cache().stats() - before
    lc.get_cache().check()
    return {
        "data": data, "pid": os.getpid(), "budget": lc.get_cache().budget,
        "loads": stats.loads, "peak": stats.peak_bytes, "overcommits": stats.overcommits,
    }  # fmt: skip


def put_mean(answers: Any, *arguments: Any) -> None:
    answers.put(mean_in_a_worker(*arguments))


def by_pool(context: Any, work: Any, arguments: list[Any]) -> list[Any]:
    with context.Pool(2) as pool:
        return pool.starmap_async(work, arguments).get(60)


def by_executor(context: Any, work: Any, arguments: list[Any]) -> list[Any]:
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        return list(executor.map(work, *zip(*arguments, strict=True), timeout=60))


def by_process(context: Any, work: Any, arguments: list[Any]) -> list[Any]:
    answers = context.Queue()
    workers = [context.Process(target=put_mean, args=(answers, *each)) for each in arguments]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found


def by_joblib(backend: str) -> Callable[..., list[Any]]:
    def run(_: Any, work: Any, arguments: list[Any]) -> list[Any]:
        joblib = pytest.importorskip("joblib")
        try:
            with joblib.parallel_config(backend=backend):
                return list(joblib.Parallel(2)(joblib.delayed(work)(*each) for each in arguments))
        finally:
            joblib.externals.loky.get_reusable_executor().shutdown(wait=True)

    return run


FLAVOURS = [
    *[
        pytest.param(method, run, id=f"{run.__name__[3:]}-{method}")
        for method in METHODS
        for run in (by_pool, by_process, by_executor)
    ],
    *[pytest.param("fork", by_joblib(name), id=name) for name in ("loky", "multiprocessing")],
]


@pytest.mark.parametrize(("method", "run"), FLAVOURS)
def test_workers_compute_in_caches_of_their_own(
    files: list[str], method: str, run: Callable[..., list[Any]]
) -> None:
    budget = 12 * VOLUME
    mean = lc.mean([lc.load(path) for path in files])
    expected = np.mean(np.stack([eager(path) for path in files]), axis=0)
    before = lc.get_cache().stats()
    found = run(multiprocessing.get_context(method), mean_in_a_worker, [(mean, budget)] * 3)
    assert len(found) == 3
    for told in found:
        assert told["data"].tobytes("A") == expected.tobytes("A")
        assert told["data"].strides == expected.strides
        assert told["pid"] != os.getpid()
        assert told["budget"] == budget
        assert told["overcommits"] == 0
        assert told["peak"] <= budget
    # One worker may do two of the tasks, and finds its result in memory or its files loaded.
    assert sum(told["loads"] for told in found) >= len(files)
    assert (lc.get_cache().stats() - before).loads == 0


def test_threads_of_joblib_share_one_cache(files: list[str]) -> None:
    joblib = pytest.importorskip("joblib")
    images = [lc.load(path) for path in files]
    with joblib.parallel_config(backend="threading"):
        sums = joblib.Parallel(2)(
            joblib.delayed(lambda image: int(image.sum()))(image) for image in images * 3
        )
    assert sums == [int(eager(path).sum()) for path in files] * 3
    assert lc.get_cache().stats().loads == len(files)


# How "auto" is divided


def meet(barrier: Any) -> None:
    """In each worker, as it starts: where all of them wait for each other."""
    global _barrier
    _barrier = barrier


_barrier: Any = None


def auto_budget(_: object) -> int:
    _barrier.wait(60)  # all have been started
    budget = lc.get_cache().budget
    _barrier.wait(60)  # and all are there still
    return budget


def count_workers(barrier: Any = None) -> int:
    if barrier is not None:
        barrier.wait(60)
    count = memory._workers()
    if barrier is not None:
        barrier.wait(60)
    return count


def put_count(answers: Any, barrier: Any) -> None:
    answers.put(count_workers(barrier))


@pytest.fixture
def bystanders() -> Iterator[None]:
    """Children of this process that are no workers: the helpers of multiprocessing, a program."""
    from multiprocessing import forkserver, resource_tracker

    forkserver.ensure_running()
    resource_tracker.ensure_running()
    with subprocess.Popen(["sleep", "100"]) as program:
        yield
        program.kill()


@pytest.mark.usefixtures("bystanders")
@pytest.mark.parametrize(
    ("method", "made_before"),
    [*((method, False) for method in METHODS), ("fork", True)],
    ids=[*METHODS, "fork with a cache"],
)
@pytest.mark.parametrize("kind", ["pool", "executor"])
def test_workers_divide_auto_among_them(method: str, made_before: bool, kind: str) -> None:
    if made_before:
        lc.get_cache().budget  # the parent's whole share, which forked workers inherit
    context = multiprocessing.get_context(method)
    limit = memory.machine_limit()
    barrier = context.Barrier(3)
    if kind == "pool":
        with context.Pool(3, meet, (barrier,)) as pool:
            budgets = pool.map_async(auto_budget, range(3), chunksize=1).get(60)
    else:
        with ProcessPoolExecutor(3, context, meet, (barrier,)) as executor:
            budgets = list(executor.map(auto_budget, range(3), timeout=60))
    # "auto" is half; what the machine's other processes use may have changed meanwhile.
    assert 0.4 * limit < sum(budgets) < 0.6 * limit


def test_the_workers_of_joblib_divide_auto_and_are_counted_when_used_again(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    try:
        with joblib.parallel_config(backend="loky"):
            for workers in (2, 3, 2):
                counts = joblib.Parallel(workers)(joblib.delayed(count_workers)() for _ in range(4))
                # Those that wait for more to do hold memory as well.
                assert all(workers <= count <= 3 for count in counts)
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


@pytest.mark.usefixtures("bystanders")
@pytest.mark.parametrize("method", METHODS)
def test_the_first_worker_of_an_executor_counts_those_that_are_not_started_yet(
    method: str,
) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(4, mp_context=context) as executor:
        assert executor.submit(count_workers).result(60) == 4


def run_workers(method: str, count: int, barrier: Any, answers: Any) -> None:
    """Workers of a worker."""
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=put_count, args=(answers, barrier)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)


@pytest.mark.usefixtures("bystanders")
@pytest.mark.parametrize(
    ("outer", "inner"),
    [("fork", "fork"), ("spawn", "fork"), ("forkserver", "fork"), ("fork", "spawn")],
)
def test_the_workers_of_workers_share_what_is_one_workers_part(outer: str, inner: str) -> None:
    context = multiprocessing.get_context(outer)
    both = multiprocessing.get_context("spawn")  # its locks go to processes of any kind
    barrier, answers = both.Barrier(4), both.Queue()
    workers = [
        context.Process(target=run_workers, args=(inner, 2, barrier, answers)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    counts = [answers.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(60)
    assert counts == [4] * 4


def test_a_process_that_was_forked_otherwise_is_no_worker(cache: DataCache) -> None:
    assert forked(lambda: check_equal(memory._workers(), 1)) == 0


def check_equal(found: object, wanted: object) -> None:
    assert found == wanted


# Forks


def forked(work: Callable[[], object]) -> int:
    """The exit status of a forked child that does ``work``: 0 if it returns, 1 if it raises."""
    child = os.fork()
    if child == 0:
        finish(work)
    return reap(child)


def finish(work: Callable[[], object]) -> None:
    """In a child: do ``work`` and end. One that hangs can be asked where."""
    faulthandler.register(signal.SIGUSR2)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def reap(child: int) -> int:
    """The exit status of a child; one that doesn't end is killed, and the test fails."""
    process = psutil.Process(child)
    try:
        return int(process.wait(SOON))
    except psutil.TimeoutExpired:
        process.send_signal(signal.SIGUSR2)
        with suppress(psutil.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.wait()
        pytest.fail("a forked child hung")


def works(cache: DataCache) -> None:
    """Do everything with a cache of 6 units."""
    cache.check()
    table = table_of(cache)
    me = threading.get_ident()
    assert all(use.thread == me for use in table.uses)
    assert all(flight.thread == me for flight in table.flights.values())
    with cache.operation("its own", workspace=UNIT, room=UNIT) as operation:
        assert operation.pin([Made("one more", fill=9)])[0][0] == 9
    keys = [Made(f"ahead {number}", UNIT // 8, fill=number) for number in range(4)]
    loop = Running(lambda: None)  # any object
    loop.result()
    stream = cache.preloading(loop, 4)
    stream.expect(keys)
    stream.want(keys)
    for key in keys:
        assert cache.load(key)[0] == key.fill
        stream.done([key])
    stream.close()
    assert all(key.loads == 1 for key in keys)
    assert cache.stats().overcommits == 0
    cache.check()


def uses_up(cache: DataCache) -> None:
    """The whole budget can be had: nothing is charged to somebody who isn't here."""
    works(cache)
    assert load(cache, Made("all of it", 6 * UNIT, fill=7)) == 7
    assert cache.stats().overcommits == 0
    cache.check()


@pytest.mark.parametrize("nbytes", [UNIT, 3 << 20], ids=["small", "mapped"])
def test_a_child_uses_what_was_loaded_and_leaves_the_parents_alone(nbytes: int) -> None:
    cache = DataCache(6 * nbytes)
    keys = [Made(str(number), nbytes, fill=number) for number in range(5)]
    held = cache.load(keys[0])
    for key in keys:
        cache.load(key)
    before, used = cache.stats(), cache.used

    def work() -> None:
        assert cache.used == used == 5 * nbytes  # still charged
        for key in keys:
            value = cache.load(key)
            assert (value[0], value[-1]) == (key.fill, key.fill)
            with pytest.raises(ValueError, match="read-only"):
                value[0] = 99
            with pytest.raises(ValueError, match="WRITEABLE"):
                value.flags.writeable = True
        assert (cache.stats() - before).loads == 0
        del value
        # Evicting is its own affair, and what is held stays charged.
        cache.load(Made("large", 5 * nbytes, fill=8))
        assert cache.used == 6 * nbytes
        assert held[0] == 0
        changed = lc.LazyReadData(held, cache=cache)
        changed += 50
        assert changed.data[0] == 50
        assert cache.load(keys[0])[0] == 0
        cache.check()

    assert forked(work) == 0
    assert cache.used == used
    assert [load(cache, key) for key in keys] == [0, 1, 2, 3, 4]
    assert [key.loads for key in keys] == [1] * 5
    assert (cache.stats() - before).evictions == 0
    works(cache) if nbytes == UNIT else cache.check()


def test_children_of_children_go_on_and_so_do_all_their_parents(cache: DataCache) -> None:
    key = Made("loaded", fill=3)
    cache.load(key)

    def generation(left: int) -> None:
        assert cache.load(key)[0] == 3
        assert key.loads == 1
        if left:
            assert forked(lambda: generation(left - 1)) == 0
        uses_up(cache)

    generation(3)


def test_a_fork_while_another_thread_reads(cache: DataCache) -> None:
    gate = Gate()
    key = Made("read by another", 3 * UNIT, fill=4, during=gate)
    reading = Running(load, cache, key)
    gate.reached()

    def work() -> None:
        key.during = None
        assert load(cache, key) == 4
        uses_up(cache)

    assert forked(work) == 0
    assert not reading.done
    gate.open()
    assert reading.result() == 4
    assert key.loads == 1
    works(cache)


def test_a_fork_in_a_reader_lets_both_finish_their_load(cache: DataCache) -> None:
    children: list[int] = []
    key = Made("forks", fill=6, during=lambda: children.append(os.fork()))
    value = load(cache, key)
    if children == [0]:
        finish(lambda: (check_equal((value, key.loads), (6, 1)), uses_up(cache)))
    assert reap(children[0]) == 0
    assert value == 6
    works(cache)


def test_a_fork_in_a_reader_lets_the_child_use_the_cache_at_once(cache: DataCache) -> None:
    codes: list[int] = []
    key = Made("forks", fill=6, during=lambda: codes.append(forked(lambda: works(cache))))
    assert load(cache, key) == 6
    assert codes == [0]
    works(cache)


@pytest.mark.parametrize("event", ["load", "evict"])
def test_a_fork_in_a_callback_of_the_cache(cache: DataCache, event: str) -> None:
    codes: list[int] = []

    def callback(told: Any) -> None:
        if told.kind == event and not codes:
            codes.append(-1)  # not again in the child
            codes[0] = forked(lambda: works(cache))

    unsubscribe = cache.subscribe(callback)
    for number in range(8):
        load(cache, Made(str(number)))
    unsubscribe()
    assert codes == [0]
    works(cache)


def test_a_fork_while_threads_read_ahead(cache: DataCache) -> None:
    gates = [Gate(), Gate()]
    keys = [Made(str(number), fill=number) for number in range(5)]
    for key, gate in zip(keys, gates, strict=False):
        key.during = gate
    loop = Running(lambda: None)
    loop.result()
    stream = cache.preloading(loop, 2)
    stream.expect(keys)
    stream.want(keys)
    for gate in gates:
        gate.reached()

    def work() -> None:
        # Nothing is read for a loop of the parent's that nobody here goes on with.
        assert not preload_threads()
        for key in keys:
            key.during = None
        keys[0].during = ahead = Gate()
        stream.want(keys)
        assert ahead.reached() != threading.get_ident()
        ahead.open()
        for key in keys:
            assert load(cache, key) == key.fill
            stream.done([key])
        stream.close()
        uses_up(cache)

    code = forked(work)
    for gate in gates:
        gate.open()
    assert code == 0
    for key in keys:
        assert load(cache, key) == key.fill
        stream.done([key])
    stream.close()
    works(cache)


def test_a_list_that_is_being_iterated_goes_on_in_the_child(files: list[str]) -> None:
    expected = [int(eager(path).sum()) for path in files]
    images = lc.PreloadList([lc.load(path) for path in files], npreload=3)
    found: list[int] = []
    child = -1
    for place, image in enumerate(images):
        if place == 2:
            child = os.fork()
        found.append(int(image.data.sum()))
    if child == 0:
        finish(
            lambda: (
                check_equal(found, expected),
                check_equal([int(image.data.sum()) for image in images], expected),
                lc.get_cache().check(),
            )
        )
    assert reap(child) == 0
    assert found == expected


def test_a_fork_while_another_thread_is_in_a_section(cache: DataCache) -> None:
    cache.load(Made("before", fill=2))
    gate = Gate()
    inside = Running(lambda: table_of(cache).section(lambda after: gate()))
    gate.reached()
    assert forked(lambda: uses_up(cache)) == 0
    gate.open()
    inside.result()
    works(cache)


def test_a_fork_in_a_section_of_this_thread_lets_both_go_on(cache: DataCache) -> None:
    cache.load(Made("before", fill=2))
    children: list[int] = []
    table_of(cache).section(lambda after: children.append(os.fork()))
    if children == [0]:
        finish(lambda: uses_up(cache))
    assert reap(children[0]) == 0
    works(cache)


def test_a_fork_in_a_section_of_this_thread_never_hangs_in_it(cache: DataCache) -> None:
    # As a signal handler would: the section that it interrupted can't go on before it is done.
    cache.load(Made("before", fill=2))
    codes: list[int] = []

    def work() -> None:
        with pytest.raises(CacheBusyError):
            cache.load(Made("another"))

    table_of(cache).section(lambda after: codes.append(forked(work)))
    assert codes == [0]
    works(cache)


@pytest.mark.parametrize("function", ["enter", "leave", "_try", "_land", "end_use", "detach"])
def test_a_fork_at_any_line_of_a_section_leaves_a_whole_cache(
    cache: DataCache, function: str
) -> None:
    """Every third line of one function of the core, as a signal may come at any of them."""
    lines: set[int] = set()
    children: list[int] = []
    grown: list[Made] = []

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name != function or "lazycache" not in frame.f_code.co_filename:
            return trace if event == "call" else None

        def at_line(frame: Any, event: str, _: object) -> Any:
            if event == "line" and frame.f_lineno not in lines:
                lines.add(frame.f_lineno)
                if len(lines) % 3 == 1:
                    pid = os.fork()
                    if pid == 0:
                        sys.settrace(None)
                        children.clear()
                        grown.append(Made("child"))
                    else:
                        children.append(pid)
            return at_line

        return at_line

    values = []
    sys.settrace(trace)
    try:
        for number in range(8):
            values.append(load(cache, Made(str(number), fill=number)))
            if grown:
                break
    finally:
        sys.settrace(None)
    if grown:
        finish(lambda: (check_equal(values, list(range(len(values)))), uses_up(cache)))
    assert children
    assert [reap(child) for child in children] == [0] * len(children)
    works(cache)


# In a signal handler


class Interrupting:
    """A signal handler that forks once; its child works in the handler, or goes on where it was."""

    def __init__(self, cache: DataCache, at_once: bool) -> None:
        self.cache = cache
        self.at_once = at_once
        self.entered = False
        self.children: list[int] = []
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __call__(self, *_: object) -> None:
        if self.entered:
            return
        self.entered = True
        child = os.fork()
        if child == 0 and self.at_once:
            finish(lambda: works(self.cache))
        self.children.append(child)
        self.done.put(None)

    def when_blocked(self, gate: Gate) -> Running:
        """Interrupt this thread once it has begun to wait in the cache, and open ``gate`` then."""
        blocked, table = Blocked(self.cache), table_of(self.cache)
        me = threading.get_ident()

        def send() -> None:
            assert blocked._blocked.told.get(timeout=SOON) == me
            with table.lock:  # it has left the section in which it told that
                pass
            while True:  # one that comes just before the wait begins is noticed after it only
                signal.pthread_kill(me, signal.SIGUSR1)
                with suppress(queue.Empty):
                    self.done.get(timeout=0.05)
                    break
            gate.open()

        return Running(send)

    @property
    def is_child(self) -> bool:
        return self.children == [0]

    def reap(self) -> None:
        [child] = self.children
        assert reap(child) == 0


@pytest.fixture(params=[True, False], ids=["works at once", "goes on"])
def interrupting(cache: DataCache, request: pytest.FixtureRequest) -> Iterator[Interrupting]:
    handler = Interrupting(cache, request.param)
    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_interrupts_plain_code_forks(
    cache: DataCache, interrupting: Interrupting
) -> None:
    load(cache, Made("before"))
    signal.raise_signal(signal.SIGUSR1)
    if interrupting.is_child:
        finish(lambda: uses_up(cache))
    interrupting.reap()
    works(cache)


def test_a_handler_that_interrupts_a_wait_for_a_load_forks(
    cache: DataCache, interrupting: Interrupting
) -> None:
    gate = Gate()
    main = threading.get_ident()
    key = Made("shared", fill=5)
    # In the parent the other thread reads it; in the child, which has no other, this one.
    key.during = lambda: None if threading.get_ident() == main else gate()
    reading = Running(load, cache, key)
    gate.reached()
    sending = interrupting.when_blocked(gate)
    value = load(cache, key)
    if interrupting.is_child:
        finish(lambda: (check_equal((value, key.loads), (5, 2)), uses_up(cache)))
    sending.result()
    assert (value, reading.result(), key.loads) == (5, 5, 1)
    interrupting.reap()
    works(cache)


def test_a_handler_that_interrupts_a_wait_for_memory_forks(
    cache: DataCache, interrupting: Interrupting
) -> None:
    gate = Gate()

    def hold() -> None:
        with using(cache, Made("held", 4 * UNIT)):
            gate()

    holding = Running(hold)
    gate.reached()
    sending = interrupting.when_blocked(gate)
    value = load(cache, Made("asked", 4 * UNIT, fill=3))
    if interrupting.is_child:
        finish(lambda: (check_equal(value, 3), uses_up(cache)))
    sending.result()
    holding.result()
    assert value == 3
    assert cache.stats().overcommits == 0
    interrupting.reap()
    works(cache)


# A child that ends as programs do

ENDS = """
import os, sys, threading
import numpy as np
import lazycache as lc

folder, how = sys.argv[1:]
for number in range(8):
    np.save(f"{folder}/{number}.npy", np.full((200, 200), number))

started, go_on = threading.Semaphore(0), threading.Event()

def read(path):
    started.release()
    if parent == os.getpid():
        assert go_on.wait(20)
    return np.load(path)

parent = os.getpid()
images = lc.PreloadList(
    [lc.load(f"{folder}/{number}.npy", reader=read) for number in range(8)], npreload=4)
loop = iter(images)
loaded = lc.load(f"{folder}/7.npy")
assert loaded.data[0, 0] == 7
first = threading.Thread(target=lambda: next(loop).data)
first.start()
assert started.acquire(timeout=20)  # somebody reads
child = os.fork()
if child == 0:
    assert loaded.data[0, 0] == 7
    if how == "uses":
        assert [int(image.data[0, 0]) for image in images] == list(range(8))
    elif how == "iterates":
        inner = iter(images)
        assert int(next(inner).data[0, 0]) == 0
    elif how == "fails":
        raise SystemExit(3)
    sys.exit(0)
status = os.waitpid(child, 0)[1]
go_on.set()
first.join(20)
assert [int(image.data[0, 0]) for image in images] == list(range(8))
lc.get_cache().check()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    ("how", "code"), [("does nothing", 0), ("uses", 0), ("iterates", 0), ("fails", 3)]
)
def test_a_child_that_ends_normally_while_its_parent_reads_ahead(
    tmp_path: Path, how: str, code: int
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path), how],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    assert not process.stderr
