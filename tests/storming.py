"""What storms share: threads that act at random, and somebody who watches every step they take.

A storm lasts ``--storm-seconds``, and goes on after that until everything that must happen in it
did so often enough, but no longer than ten times as long.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from support import SOON, Running, preload_threads, table_of

from lazycache._integrity import _check
from lazycache._records import After
from lazycache._request import Request
from lazycache._table import Table
from lazycache.cache import DataCache

THREADS = 8
# How long one action may take, in seconds, before a storm counts as stuck.
STUCK = 60.0
# No wait is that long where somebody tells those who wait.
PATIENCE = 20.0
# What a storm is made of, each of it more often than that.
STORMY = (
    "evictions", "waits", "joins", "recalls", "cancelled", "abandoned", "load_failures", "preloads",
)  # fmt: skip
OFTEN = 50

Act = Callable[[random.Random], object]


class Watch:
    """Looks at the table of a cache at the end of locked sections.

    Every invariant must hold at every ``every``-th of them, and at each no scope may use more than
    its budget if that ``holds``. What is wrong is told by `failures`.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, cache: DataCache, *, every: int = 1, holds: bool = True
    ) -> None:
        self.cache = cache
        self.table = table_of(cache)
        self.table.wait_limit = PATIENCE
        self.every = every
        self.holds = holds
        self.sections = 0
        self.checked = 0
        self.evictions = 0
        self.failures: list[str] = []
        self._look_at_sections(patch)
        self._look_at_patience(patch)

    def counts(self) -> dict[str, int]:
        """How often what a storm is made of happened."""
        stats = self.cache.stats()
        return {name: getattr(stats, name) for name in STORMY}

    def _look_at_sections(self, patch: pytest.MonkeyPatch) -> None:
        leave = Table.leave

        def look(table: Table, after: After) -> None:
            leave(table, after)
            if table is not self.table:
                return
            self.sections += 1
            try:
                if self.holds:
                    for scope in table.root.tree():
                        assert scope.used <= scope.budget, "a budget is exceeded"
                if self.sections % self.every == 0:
                    self.checked += 1
                    _check(table)
                if self.sections % 1000 == 0:
                    before, self.evictions = self.evictions, self.cache.stats().evictions
                    assert self.evictions - before < 500, "evicted in vain, again and again"
            except AssertionError:
                if not self.failures:
                    self.failures += [*traceback.format_stack(), traceback.format_exc()]
                    self.failures += [stacks(), state(table)]

        patch.setattr(Table, "leave", look)

    def _look_at_patience(self, patch: pytest.MonkeyPatch) -> None:
        failures = self.failures

        class Patient(Request):
            """A request that must be told when to go on: it never may because time is over."""

            @property
            def impatient(self) -> bool:
                return False

            @impatient.setter
            def impatient(self, value: bool) -> None:
                if value:
                    failures.append(f"{self.label} was told nothing for {PATIENCE} s")

        patch.setattr("lazycache._operation.Request", Patient)


class Storm:
    """`THREADS` threads, each doing one act after the other, chosen by ``choose``."""

    def __init__(self, watch: Watch, choose: Callable[[random.Random], Act], seconds: float):
        self.watch = watch
        self.choose = choose
        self.seconds = seconds
        self.seed = random.SystemRandom().randrange(1 << 32)
        self.done: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._over = threading.Event()
        self._since: dict[int, tuple[float, str]] = {}

    def rage(self, besides: Sequence[Callable[[], object]] = ()) -> None:
        """Run the storm, and ``besides`` again and again until it is over; look at its end."""
        started = time.monotonic()
        threads = [Running(self._run, number) for number in range(THREADS)]
        threads += [Running(self._repeat, function) for function in besides]
        while not self._over.wait(0.05):
            self._look(threads, time.monotonic() - started)
        while not all(thread.done for thread in threads):
            threads[0].thread.join(0.05)
            self._look_for_stuck()
        for thread in threads:
            error = thread.error()
            assert error is None, self._told(repr(error)) + "".join(
                traceback.format_exception(error)
            )
        assert not self.watch.failures, self._told("a step went wrong")
        seconds = time.monotonic() - started
        short = {name: n for name, n in self.watch.counts().items() if n <= OFTEN}
        assert not short, self._told(f"no storm, after {seconds:.0f} s")
        self._look_at_what_is_left()
        print(
            f"{sum(self.done.values())} acts {dict(self.done)} in {seconds:.1f} s, every invariant "
            f"checked {self.watch.checked} times, {self.watch.cache.stats()}"
        )

    def _run(self, number: int) -> None:
        dice = random.Random(self.seed + number)
        try:
            while not self._over.is_set():
                act = self.choose(dice)
                self._since[number] = (time.monotonic(), act.__name__)
                act(dice)
                with self._counting:
                    self.done[act.__name__] += 1
            del self._since[number]
        except BaseException:
            self._over.set()
            raise

    def _repeat(self, function: Callable[[], object]) -> None:
        try:
            while not self._over.wait(0.001):
                function()
        except BaseException:
            self._over.set()
            raise

    def _look(self, threads: Sequence[Running], passed: float) -> None:
        self._look_for_stuck()
        enough = min(self.watch.counts().values()) > OFTEN
        if self.watch.failures or (passed > self.seconds and enough) or passed > 10 * self.seconds:
            self._over.set()

    def _look_for_stuck(self) -> None:
        for number, (since, act) in list(self._since.items()):
            if time.monotonic() - since > STUCK:
                self._over.set()
                pytest.fail(self._told(f"thread {number} is stuck in {act!r}\n{stacks()}"))

    def _told(self, what: str) -> str:
        return (
            f"{what}\n{''.join(self.watch.failures)}\nseed {self.seed}, acts {dict(self.done)}\n"
            f"{self.watch.counts()}\n{self.watch.cache.stats()}\n{state(self.watch.table)}"
        )

    def _look_at_what_is_left(self) -> None:
        cache, table = self.watch.cache, self.watch.table
        table.pool.join_threads(SOON)
        for thread in preload_threads():
            thread.join(SOON)
        assert not preload_threads()
        cache.check()
        assert not table.uses
        assert not table.flights
        assert not table.schedules
        assert not table.streams
        assert not table.blocked
        assert table.first() is None
        cache.clear()
        assert cache.used == 0, self._told("not everything was given back")


def choose_from(acts: Mapping[Act, int]) -> Callable[[random.Random], Act]:
    """A choice among ``acts``, each as often as its weight says."""
    names, weights = list(acts), list(acts.values())
    return lambda dice: dice.choices(names, weights)[0]


@contextmanager
def fast_switching() -> Iterator[None]:
    """Threads take turns every 10 µs: more interleavings in the same time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def stacks() -> str:
    """Where every thread is."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()


def state(table: Table) -> str:
    """What a table knows, read without its lock: it may be held for ever."""
    lines = [f"uses: {[(use.label, use.thread, use.room) for use in list(table.uses)]}"]
    lines += [
        f"flight of {f.key.name}: thread {f.thread}, {len(f.joiners)} joiners, "
        f"prefetch {f.prefetch}, cancelled {f.cancelled}, ended {f.ended}"
        for f in list(table.flights.values())
    ]
    lines.append(f"blocked: { {t: f and f.key.name for t, f in list(table.blocked.items())} }")
    tickets = [(ref() and ref().thread) for ref in [*table.nested, *table.fresh]]  # type: ignore[union-attr]
    lines.append(f"tickets: {tickets}, queued: {len(table.pool.queue)}")
    for scope in table.root.tree():
        lines.append(f"scope of {scope.budget}: {scope.used} used, {scope.by_kind}")
    lines += [
        f"charge {c.kind} {c.nbytes} of {c.name} (scope of {c.scope.budget})"
        for c in list(table.accounts.charges)
    ]
    return "\n".join(lines)
