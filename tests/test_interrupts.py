"""An interrupt at any line leaves the cache whole, and the next request right.

`KeyboardInterrupt` is raised by a trace function, once in each run of a scenario: at each line that
the scenario runs, the first time and the last time that it runs it. Where an interrupt comes while
another is being cleaned up, at a sample of all pairs of lines; and so for other exceptions that
come from anywhere, such as `MemoryError`.

What a scenario does at any line must be undone, whatever it holds: the checks that follow know
nothing of where the interrupt was.
"""

from __future__ import annotations

import _thread
import ast
import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

import nibabel as nib
import numpy as np
import pytest
from support import SOON, UNIT, Blocked, Made, Running, load, table_of

import lazycache
import lazycache as lc
from lazycache import needs, program
from lazycache.cache import DataCache, get_cache
from lazycache.proxy import LazyReadData
from lazycache.source import Handle, Result

PACKAGE = Path(lazycache.__file__).parent
# What runs in locked sections and around them; that which computes, loops and writes above it.
CORE = {
    str(PACKAGE / name)
    for name in ("cache.py", "source.py", *(file.name for file in PACKAGE.glob("_[!_]*.py")))
}
ABOVE = {
    str(PACKAGE / f"{name}.py")
    for name in (
        "proxy", "execute", "preload", "results", "expression", "outline", "headers", "writing",
        "saving",
    )
}  # fmt: skip

# What runs while blocks do, and what is asked beforehand.
STREAMING = {
    str(PACKAGE / f"{name}.py")
    for name in (
        "execute",
        "streaming",
        "saving",
        "writing",
        "_sinks",
        "_tasks",
        "totals",
        "voxelwise",
    )
}
PLANNING = {
    str(PACKAGE / f"{name}.py")
    for name in ("outline", "headers", "planning", "needs", "program", "spaces")
}

Place = tuple[str, int]


def idle_lines(files: set[str]) -> set[Place]:
    """The lines at which no real interrupt comes.

    A ``with`` is traced again at the end of its block, just before the call of a built-in
    ``__exit__``. A ``try`` does nothing, and Python counts it to no block. So it is with what ends
    an ``except`` block and asks for nothing.
    """
    found: set[Place] = set()
    for file in files:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.With | ast.Try):
                found.add((file, node.lineno))
            elif isinstance(node, ast.ExceptHandler):
                found.update((file, part.lineno) for part in ast.walk(node) if _only_ends(part))
    return found


def _only_ends(node: ast.AST) -> TypeGuard[ast.stmt]:
    if isinstance(node, ast.Return):
        return node.value is None or isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Continue | ast.Break | ast.Pass)


IDLE = idle_lines(CORE | ABOVE | STREAMING | PLANNING)


class World:
    """A cache with something in it, made anew for each interrupt."""

    files = CORE

    def __init__(self) -> None:
        self.cache = DataCache(6 * UNIT)
        self.keys = [Made(str(i), fill=i) for i in range(8)]
        self.handles = [Handle(self.keys[0], 1)]
        for key in self.keys[:6]:
            self.cache.load(key)
        self.view = self.cache.load(self.keys[5])[1:]
        self.result = Result("a result")
        self.ends: list[Callable[[], object]] = []

    def end(self) -> None:
        """Let whoever else is at work in it go to its end."""
        for end in self.ends:
            end()


def hit(world: World) -> None:
    world.cache.lookup(world.keys[1])
    world.cache.lookup(world.keys[1])


def miss_and_evict(world: World) -> None:
    world.cache.load(world.keys[6])


def pin_several(world: World) -> None:
    order = [world.keys[1], world.keys[7], world.keys[1]]
    with world.cache.operation("a test", workspace=UNIT, room=2 * UNIT, order=order) as operation:
        operation.pin([world.keys[1], world.keys[7]])
        operation.unpin([world.keys[1]])


def keep(world: World) -> None:
    with world.cache.operation("a test", workspace=UNIT, room=0) as operation:
        operation.keep(world.result, np.ones(UNIT, np.uint8), 1.0)
    world.cache.budget = 2 * UNIT


def release(world: World) -> None:
    world.cache.used_up(world.handles[0], 1)
    world.cache.release(world.keys[5])
    world.cache.load(world.keys[5])
    world.view = None
    world.handles.clear()
    world.cache.clear()


def scope(world: World) -> None:
    inner = DataCache(3 * UNIT)
    inner._bind(world.cache)
    inner.load(world.keys[6])
    innermost = DataCache(2 * UNIT)
    innermost._bind(inner)
    held = innermost.load(world.keys[7])[1:]
    inner.close()
    innermost.close()
    del held


def preload(world: World) -> None:
    loop = Loop()
    ahead = world.cache.preloading(loop, 2)
    ahead.expect(world.keys[5:])
    ahead.want(world.keys[5:])
    world.cache.load(world.keys[6])
    ahead.done([world.keys[5], world.keys[6]])
    ahead.close()


class Loop:
    pass


def forgotten_loop(world: World) -> None:
    loop = Loop()
    ahead = world.cache.preloading(loop, 2)
    ahead.expect(world.keys[4:])
    ahead.want(world.keys[4:])
    ahead.asked(world.keys[4:5])
    del loop
    world.cache.load(world.keys[6])


def failing(world: World) -> None:
    def fail() -> None:
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"):
        world.cache.load(Made("bad", during=fail))


def resize(world: World) -> None:
    with world.cache.pinned(world.keys[4]) as pinned:
        pinned.pin([world.keys[4]])
        world.cache.budget = 3 * UNIT
        world.cache.budget = UNIT
    world.view = None
    world.cache.budget = 6 * UNIT
    world.cache.load(world.keys[7])
    assert world.cache.held()


def other_orders(world: World) -> None:
    """Scopes that close in the middle and before a loop and an operation inside them."""
    outer, inner = DataCache(5 * UNIT), DataCache(4 * UNIT)
    outer._bind(world.cache)
    inner._bind(outer)
    loop = Loop()
    ahead = inner.preloading(loop, 1)
    ahead.expect(world.keys[6:])
    ahead.want(world.keys[6:])
    with inner.operation("a test", workspace=UNIT, room=UNIT) as operation:
        operation.pin([world.keys[2]])
        outer.close()
        inner.close()
        operation.keep(world.result, np.ones(UNIT, np.uint8), 1.0)
    ahead.close()


def joined(world: World) -> None:
    """The load of another thread, which goes on once this one waits for it."""
    told, started = Blocked(world.cache).told, threading.Event()

    def during() -> None:
        started.set()
        told.get(timeout=SOON)

    key = Made("joined", fill=9, during=during)
    loading = Running(load, world.cache, key)
    world.ends += [lambda: told.put(0), loading.result]
    assert started.wait(SOON)
    world.cache.load(key)


def waiting(world: World) -> None:
    """Memory that another operation gives back once this one waits for it."""
    told, admitted = Blocked(world.cache).told, threading.Event()

    def hold() -> None:
        with world.cache.operation("another", workspace=4 * UNIT, room=0):
            admitted.set()
            told.get(timeout=SOON)

    holding = Running(hold)
    world.ends += [lambda: told.put(0), holding.result]
    assert admitted.wait(SOON)
    with world.cache.operation("a test", workspace=3 * UNIT, room=0) as operation:
        operation.pin([world.keys[7]])


SMALL = [hit, miss_and_evict, pin_several, keep, release, scope, preload, failing]
MORE = [forgotten_loop, resize, other_orders, joined, waiting]


class Interrupts:
    """Raises in the scenario at the lines of these numbers, counted from the interrupt before."""

    def __init__(self, files: set[str], error: type[BaseException], *numbers: int) -> None:
        self.files = files
        self.error = error
        self.numbers = list(numbers)
        self.places: list[Place] = []
        self.since = 0
        self.raised: list[Place] = []
        # Python itself wouldn't keep the bound method alive while it is called.
        self.tracing = self.trace

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in self.files:
            return None
        place = (file, frame.f_lineno)
        if event == "line" and place not in IDLE:
            self.places.append(place)
            self.since += 1
            if self.numbers and self.since == self.numbers[0]:
                del self.numbers[0]
                self.since = 0
                self.raised.append(place)
                raise self.error
        return self.tracing

    def again(self, *_: object) -> None:
        """Python ends the tracing with what is raised in it; this is called at the next call."""
        if sys.gettrace() is None and self.numbers:
            sys.settrace(self.tracing)

    def run(self, *scenarios: Callable[[], object]) -> None:
        """Each scenario, one after the other, up to its interrupt."""
        monkeypatch = pytest.MonkeyPatch()
        outer = sys.gettrace()
        # An interrupt between the beginning of a `with np.errstate` and its block leaves it set.
        errors = np.geterr()
        # What is raised in a callback of a dying object is only told, with all its frames.
        monkeypatch.setattr(sys, "unraisablehook", lambda told: None)
        gc.disable()  # finalizers of what was before would be traced
        if len(self.numbers) > 1:
            sys.setprofile(self.again)
        sys.settrace(self.tracing)
        try:
            for scenario in scenarios:
                with suppress(self.error):
                    scenario()
        finally:
            sys.setprofile(None)
            sys.settrace(outer)
            gc.enable()
            monkeypatch.undo()
            np.seterr(**errors)


def firsts(places: Sequence[Place]) -> dict[Place, int]:
    return {place: number for number, place in reversed(list(enumerate(places, start=1)))}


def ends_of(places: Sequence[Place]) -> list[int]:
    """The numbers of the first time that each line runs, and of the last (a sample, if many)."""
    first = set(firsts(places).values())
    last = sorted(set({place: number for number, place in enumerate(places, start=1)}.values()))
    return sorted(first.union(random.Random(len(last)).sample(last, min(50, len(last)))))


def told(error: BaseException, interrupts: Interrupts) -> None:
    places = [f"{Path(file).name}:{line}" for file, line in interrupts.raised]
    error.add_note(f"after {interrupts.error.__name__} at {', '.join(places) or 'no line'}")


def check_after(
    scenario: Callable[[World], None], error: type[BaseException], *numbers: int
) -> list[Place]:
    """Run the scenario with interrupts at lines of these numbers, and look; the lines that ran."""
    world = World()
    interrupts = Interrupts(CORE, error, *numbers)
    try:
        if len(numbers) > 1:
            # The second may come in what repairs the table, when it is used next.
            interrupts.run(lambda: scenario(world), lambda: world.cache.release(world.keys[3]))
        else:
            interrupts.run(lambda: scenario(world))
        world.end()
        look(world)
    except BaseException as failure:
        told(failure, interrupts)
        raise
    return interrupts.places


def lines_of(scenario: Callable[[World], None]) -> list[Place]:
    world = World()
    interrupts = Interrupts(CORE, KeyboardInterrupt)
    interrupts.run(lambda: scenario(world))
    world.end()
    return interrupts.places


@pytest.mark.parametrize("scenario", SMALL + MORE, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_at_any_line_leaves_the_cache_whole(
    scenario: Callable[[World], None],
) -> None:
    numbers = ends_of(lines_of(scenario))
    assert len(numbers) >= 10
    for number in numbers:
        check_after(scenario, KeyboardInterrupt, number)


# Small ones: more pairs of lines of them are tried.
PAIRS = {
    hit: 400,
    keep: 120,
    miss_and_evict: 200,
    waiting: 120,
    joined: 120,
    pin_several: 120,
    scope: 100,
    preload: 100,
}


@pytest.mark.parametrize("scenario", PAIRS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_of_what_follows_an_interrupt_leaves_the_cache_whole(
    scenario: Callable[[World], None],
) -> None:
    dice = random.Random(scenario.__name__)
    before = len(lines_of(scenario))
    # How many lines follow the first is told by a second that never comes.
    most = len(check_after(scenario, KeyboardInterrupt, before // 2, 1 << 60)) - before // 2
    for _ in range(PAIRS[scenario]):
        check_after(
            scenario, KeyboardInterrupt, dice.randint(1, before), dice.randint(1, max(most, before))
        )


@pytest.mark.parametrize("error", [MemoryError, SystemExit, asyncio.CancelledError, GeneratorExit])
def test_any_error_at_any_line_leaves_the_cache_whole(error: type[BaseException]) -> None:
    dice = random.Random(error.__name__)
    for scenario in SMALL + MORE:
        numbers = ends_of(lines_of(scenario))
        for number in dice.sample(numbers, min(15, len(numbers))):
            check_after(scenario, error, number)


def test_an_interrupt_while_a_scope_opens_or_closes_leaves_none_behind() -> None:
    """Else what comes next would go on in the scope of a block that was left."""
    lc.set_budget(10 * UNIT)
    outer = get_cache()
    key = Made("a")

    def scenario() -> None:
        with DataCache(4 * UNIT):
            get_cache().load(key)

    plain = Interrupts(CORE, KeyboardInterrupt)
    plain.run(scenario)
    for number in firsts(plain.places).values():
        interrupts = Interrupts(CORE, KeyboardInterrupt, number)
        try:
            interrupts.run(scenario)
            outer.check()
            assert get_cache() is outer
            outer.clear()  # what was in use when the scope closed has moved
            assert outer.used == 0
            assert len(table_of(outer).root.tree()) == 1
        except BaseException as error:
            told(error, interrupts)
            raise


def look(world: World) -> None:
    """The cache is whole, nothing is left over, and every file can be had, here and elsewhere."""
    cache, table = world.cache, table_of(world.cache)
    assert not table.inside()
    cache.check()  # takes note of what died
    table.pool.join_threads(SOON)
    if table.uses:
        gc.collect()  # an operation in a cycle with the frames of an error
    cache.check()
    assert not table.uses
    assert not table.flights
    assert not table.blocked
    assert not table.streams
    assert not table.schedules
    assert not table.postponed
    assert table.first() is None
    assert not any(level.closed for level in table.root.tree())
    cache.budget = 6 * UNIT
    elsewhere = Running(lambda: [load(cache, key) for key in world.keys[:5]])
    assert elsewhere.result() == list(range(5))
    assert [load(cache, key) for key in world.keys[3:]] == list(range(3, 8))
    assert cache.stats().overcommits == 0
    world.view = None
    world.result = Result("another")
    cache.clear()
    if cache.used:
        gc.collect()
    cache.check()
    assert cache.used == 0


class Plans:
    """Small files, proxies of them in a cache, and what they hold."""

    files = CORE | ABOVE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = DataCache(8 * UNIT)
        self.paths = sorted(folder.glob("in*.nii"))
        self.images = [LazyReadData(path, cache=self.cache) for path in self.paths]
        self.truth = [np.asarray(nib.load(path).dataobj) for path in self.paths]
        self.target = folder / "out.nii"
        self.old = np.zeros((5, 5, 10), np.float32)
        nib.Nifti1Image(self.old, np.eye(4)).to_filename(self.target)
        self.images[0].data  # one is there

    def look(self) -> None:
        """Nothing is left over, and whatever is asked for next is right."""
        table = table_of(self.cache)
        assert not table.inside()
        self.cache.check()
        table.pool.join_threads(SOON)
        if table.uses or table.streams:
            gc.collect()  # a plan or loop in a cycle with its own frames
        self.cache.check()
        left = (table.uses, table.flights, table.blocked, table.streams, table.schedules)
        assert not any(left)
        assert not table.postponed
        assert [file.name for file in self.folder.iterdir() if file.name[0] == "."] == []
        a, b, c = self.images[:3]
        x, y, z = self.truth[:3]
        for image, values in zip(self.images, self.truth, strict=True):
            assert image.data.tobytes() == values.tobytes()
        assert ((a * 2 + b * c) / 2 - a).data.tobytes() == ((x * 2 + y * z) / 2 - x).tobytes()
        assert self.cache.stats().overcommits == 0
        self.images.clear()
        del a, b, c, image
        self.cache.clear()
        if self.cache.used:
            gc.collect()
        self.cache.check()
        assert self.cache.held() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        values = np.arange(250, dtype=np.float32).reshape(5, 5, 10) + number
        nib.Nifti1Image(values, np.eye(4)).to_filename(folder / f"in{number}.nii")
    return folder


def temporaries(plans: Plans) -> None:
    a, b, c = plans.images[:3]
    ((a * 2 + b * c) / 2 - a).data


def two_results(plans: Plans) -> None:
    mean, sd = lc.mean(plans.images), lc.std(plans.images, ddof=1)
    lc.compute(mean, sd)
    (mean - sd + np.ones((5, 5, 10), np.float32)).data


def in_place(plans: Plans) -> None:
    """Whatever the interrupt left undone, the proxy has the values of one moment."""
    a, b = plans.images[:2]
    x, y = plans.truth[:2]
    changed = LazyReadData(a)
    first = x + y
    second = first.copy()
    second[0] = 1
    try:
        changed += b
        changed.data
        changed[0] = 1
        changed.data
    except KeyboardInterrupt:
        assert any(np.array_equal(changed.data, values) for values in (x, first, second))
        raise
    assert np.array_equal(changed.data, second)


def slices(plans: Plans) -> None:
    a, b = plans.images[:2]
    (a[..., 2:] + b.data[..., 2:]).data
    ((a + b)[1:] * 2)[0].data


def loop(plans: Plans) -> None:
    for image in lc.PreloadList(plans.images, npreload=2):
        image.data


def broken_loop(plans: Plans) -> None:
    images = lc.PreloadIterator(plans.images, npreload=3)
    next(images).data
    (next(images) + 1).data
    del images


def pinned_and_released(plans: Plans) -> None:
    a, b = plans.images[:2]
    b.nops = 1
    with a.pinned(), b.pinned() as values:
        (a + b).data
        values.copy()
    a.release()


def save(plans: Plans) -> None:
    """What stood in the file before still does, or the whole of the new."""
    a, b = plans.images[:2]
    new = plans.truth[0] + plans.truth[1]
    try:
        (a + b).save(plans.target)
    finally:
        found = np.asarray(nib.load(plans.target).dataobj)
        assert np.array_equal(found, plans.old) or np.array_equal(found, new)


@pytest.mark.parametrize(
    "scenario",
    [temporaries, two_results, in_place, slices, loop, broken_loop, pinned_and_released, save],
    ids=lambda scenario: scenario.__name__,
)
def test_an_interrupt_at_any_line_of_a_plan_a_loop_or_a_save_is_undone(
    scenario: Callable[[Plans], None], folder: Path
) -> None:
    plain = Interrupts(Plans.files, KeyboardInterrupt)
    world = Plans(folder)
    plain.run(lambda: scenario(world))
    first = firsts(plain.places)
    above = [number for place, number in first.items() if place[0] in ABOVE]
    # The lines of the core have their own tests: a sample of what they do to plans.
    core = [number for place, number in first.items() if place[0] in CORE]
    assert len(above) > 50
    dice = random.Random(scenario.__name__)
    for number in sorted(dice.sample(above, len(above) // 4) + dice.sample(core, 20)):
        plans = Plans(folder)
        interrupts = Interrupts(Plans.files, KeyboardInterrupt, number)
        try:
            interrupts.run(lambda plans=plans: scenario(plans))  # type: ignore[misc]
            plans.look()
        except BaseException as error:
            told(error, interrupts)
            raise


class Streams(Plans):
    """The same, where everything goes by blocks of a few elements, and a compressed file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cache.budget = "8MiB"  # what compresses takes some
        self.images.append(LazyReadData(folder / "packed.nii.gz", cache=self.cache))
        self.truth.append(np.asarray(nib.load(folder / "packed.nii.gz").dataobj))
        self.cache.clear()
        self.target = folder / "out.nii.gz"
        nib.Nifti1Image(self.old, np.eye(4)).to_filename(self.target)
        self.opened = opened()

    def look(self) -> None:
        assert opened() == self.opened
        super().look()


def opened() -> list[str]:
    """The files of the scenarios that are open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder that is being listed
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.endswith((".nii", ".nii.gz"))]


class Threads:
    """Those of what goes by blocks, from the moment in which they are asked for.

    ``_thread._count`` counts a thread only once it runs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._asked: set[object] = set()
        self._others = _thread._count()
        self._start = _thread.start_new_thread
        monkeypatch.setattr(_thread, "start_new_thread", self._start_one)

    def _start_one(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> int:
        one = object()

        def run() -> None:
            try:
                function(*arguments)
            finally:
                self._asked.discard(one)

        self._asked.add(one)
        return self._start(run, ())

    def wait(self) -> None:
        """They end by themselves."""
        deadline = time.monotonic() + SOON
        while self._asked or _thread._count() > self._others:
            assert time.monotonic() < deadline, "a thread is left"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """Those of plans that all go by blocks."""
    monkeypatch.setattr(needs, "_WORTH_IT", 0)
    monkeypatch.setattr(program, "_SHORTEST", 64)
    return Threads(monkeypatch)


@pytest.fixture(scope="module")
def streamed(folder: Path) -> Path:
    values = np.arange(250, dtype=np.int16).reshape(5, 5, 10)
    nib.Nifti1Image(values, np.eye(4)).to_filename(folder / "packed.nii.gz")
    return folder


def once(plans: Plans) -> Iterator[LazyReadData]:
    """Proxies that nobody keeps: what was read of their files isn't kept either."""
    for path in [*plans.paths, plans.folder / "packed.nii.gz"]:
        yield LazyReadData(path, cache=plans.cache)


def mean_and_sd(plans: Plans) -> None:
    images = list(once(plans))
    results = [lc.mean(images), lc.std(images, ddof=1)]
    images.clear()
    lc.compute(*results)


def in_turn(plans: Plans) -> None:
    """With hardly any memory each file is opened again and again."""
    median = lc.median(once(plans))
    plans.cache.budget = lc.explain(median).min_budget
    median.data


def along_axes(plans: Plans) -> None:
    def results() -> list[LazyReadData]:
        *_, a, b = once(plans)
        return [(a + b).max(0), (a * b).sum()]

    lc.compute(*results())


def voxels(plans: Plans) -> None:
    lc.map_voxels(lambda block: block.max(0), once(plans), mask=plans.images[1]).data


def save_mean(plans: Plans) -> None:
    new = np.mean(np.stack(plans.truth), 0)
    try:
        lc.mean(once(plans)).save(plans.target)
    finally:
        found = np.asarray(nib.load(plans.target).dataobj)
        assert np.array_equal(found, plans.old) or np.array_equal(found, new)


def save_several(plans: Plans) -> None:
    others = [plans.folder / "other.nii", plans.folder / "third.npy"]

    def results() -> dict[Path, LazyReadData]:
        *_, a, b = once(plans)
        return dict(zip([plans.target, *others], [a + b, a - b, a * b], strict=True))

    try:
        lc.save_all(results())
    finally:
        for path in others:
            path.unlink(missing_ok=True)


STREAMED = [mean_and_sd, in_turn, along_axes, voxels, save_mean, save_several]


def check_streams_after(
    scenario: Callable[[Plans], None],
    folder: Path,
    threads: Threads,
    files: set[str],
    error: type[BaseException],
    *numbers: int,
) -> list[Place]:
    plans = Streams(folder)
    interrupts = Interrupts(files, error, *numbers)
    try:
        interrupts.run(lambda: scenario(plans))
        threads.wait()
        if len(interrupts.raised) > 1:
            gc.collect()  # what nothing could end is in cycles with the frames of the interrupts
        plans.look()
    except BaseException as failure:
        told(failure, interrupts)
        raise
    return interrupts.places


@pytest.mark.parametrize("scenario", STREAMED, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_at_any_line_of_what_goes_by_blocks_is_undone(
    scenario: Callable[[Plans], None], streamed: Path, threads: Threads
) -> None:
    places = check_streams_after(scenario, streamed, threads, STREAMING, KeyboardInterrupt)
    first = firsts(places)
    assert len(first) > 150
    last = {place: number for number, place in enumerate(places, start=1)}
    dice = random.Random(scenario.__name__)
    # All scenarios together come to nearly all of these lines.
    some = dice.sample(sorted(first.values()), len(first) // 3)
    for number in sorted({*some, *dice.sample(sorted(last.values()), 15)}):
        check_streams_after(scenario, streamed, threads, STREAMING, KeyboardInterrupt, number)


@pytest.mark.parametrize("scenario", STREAMED, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_of_what_cleans_up_after_blocks_leaves_nothing(
    scenario: Callable[[Plans], None], streamed: Path, threads: Threads
) -> None:
    """Close to the first, where a run ends its threads and closes its files."""
    dice = random.Random(scenario.__name__)
    count = len(check_streams_after(scenario, streamed, threads, STREAMING, KeyboardInterrupt))
    for number in dice.sample(range(1, count + 1), 6):
        pair = (number, 1 << 60)
        after = check_streams_after(
            scenario, streamed, threads, STREAMING, KeyboardInterrupt, *pair
        )
        follow = range(1, len(after) - number + 1)
        for second in dice.sample(follow, min(10, len(follow))):
            check_streams_after(
                scenario, streamed, threads, STREAMING, KeyboardInterrupt, number, second
            )


@pytest.mark.parametrize("error", [MemoryError, SystemExit])
def test_any_error_at_any_line_of_what_goes_by_blocks_is_undone(
    error: type[BaseException], streamed: Path, threads: Threads
) -> None:
    dice = random.Random(error.__name__)
    for scenario in STREAMED:
        first = firsts(check_streams_after(scenario, streamed, threads, STREAMING, error))
        for number in dice.sample(sorted(first.values()), 8):
            check_streams_after(scenario, streamed, threads, STREAMING, error, number)


def test_an_interrupt_while_a_program_is_chosen_leaves_nothing(
    streamed: Path, threads: Threads
) -> None:
    first = firsts(check_streams_after(save_mean, streamed, threads, PLANNING, KeyboardInterrupt))
    assert len(first) > 200
    for number in random.Random(0).sample(sorted(first.values()), 30):
        check_streams_after(save_mean, streamed, threads, PLANNING, KeyboardInterrupt, number)
