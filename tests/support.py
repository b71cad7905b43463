"""What the tests of the cache share: keys that tests control, threads that report, what to watch.

No test sleeps. A test that needs another thread to be somewhere opens a gate that the thread waits
for, or waits for what the thread announces, each time with a limit (`SOON`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from lazycache import _buffers
from lazycache._table import Table
from lazycache.cache import DataCache
from lazycache.readers import reader_for
from lazycache.readers.base import Probe
from lazycache.source import Key

UNIT = 1000
# How long anything that must happen may take, in seconds; only failing tests wait for it.
SOON = 20.0


class Made(Key):
    """A key whose data a test makes: ``nbytes`` bytes, all equal to ``fill``.

    ``during`` is called in each load, before the data are made, and may wait, fail, or use the
    cache. ``announced`` is what the header says of the size, if that isn't the truth.
    """

    def __init__(
        self,
        name: str,
        nbytes: int = UNIT,
        *,
        peak: int | None = None,
        announced: int | None = None,
        fill: int = 0,
        during: Callable[[], Any] | None = None,
        make: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(name)
        self.nbytes = nbytes
        self.announced = nbytes if announced is None else announced
        self.peak = self.announced if peak is None else peak
        self.fill = fill
        self.during = during
        self.make = make
        self.loads = 0
        self._counting = threading.Lock()

    def estimate(self) -> tuple[int, int]:
        return self.announced, self.peak

    def load(self) -> Any:
        with self._counting:
            self.loads += 1
        if self.during is not None:
            self.during()
        if self.make is not None:
            return self.make()
        return _buffers.readonly(np.full(self.nbytes, self.fill, np.uint8))

    def __repr__(self) -> str:
        return self.name


class Whole:
    """The default reader of a file, which gives it as a whole only."""

    name = "whole"

    def can_read(self, path: str) -> bool:
        return True

    def probe(self, path: str, **options: Any) -> Probe:
        return replace(reader_for(path).probe(path, **options), in_blocks=False)

    def read(self, path: str, **options: Any) -> Any:
        return reader_for(path).read(path, **options)


WHOLE = Whole()


class Gate:
    """A place in a load where it stops: it tells that it is there and waits to be let through."""

    def __init__(self) -> None:
        self._reached: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._open = threading.Event()

    def __call__(self) -> None:
        self._reached.put(threading.get_ident())
        assert self._open.wait(SOON), "nobody opened the gate"

    def reached(self) -> int:
        """Wait until a thread is at the gate; its identity."""
        return self._reached.get(timeout=SOON)

    def open(self) -> None:
        self._open.set()


class Running:
    """A function under way in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._future: Future[Any] = Future()

        def run() -> None:
            try:
                self._future.set_result(function(*args, **kwargs))
            except BaseException as error:
                self._future.set_exception(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self) -> Any:
        """What the function returned, or raises what it raised."""
        try:
            return self._future.result(SOON)
        finally:
            self.thread.join(SOON)

    def error(self) -> BaseException | None:
        found = self._future.exception(SOON)
        self.thread.join(SOON)
        return found

    @property
    def done(self) -> bool:
        return self._future.done()


def together(count: int, function: Callable[[int], Any]) -> list[Any]:
    """``function(0 .. count-1)``, each in a thread, all let go at one moment; their results."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait(SOON)
        return function(number)

    threads = [Running(run, number) for number in range(count)]
    return [thread.result() for thread in threads]


def table_of(cache: DataCache) -> Table:
    return cache._bind()[0]


class _Announced(dict[int, Any]):
    def __init__(self) -> None:
        super().__init__()
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __setitem__(self, thread: int, awaited: Any) -> None:
        super().__setitem__(thread, awaited)
        self.told.put(thread)


class Blocked:
    """Tells when threads begin to wait in a cache, for memory or for a load."""

    def __init__(self, cache: DataCache) -> None:
        self._blocked = _Announced()
        table_of(cache).blocked = self._blocked
        self.told = self._blocked.told  # gets the identity of each thread that begins to wait

    def wait_for(self, *threads: Running) -> None:
        """Wait until each of ``threads`` has begun to wait in the cache."""
        missing = {thread.thread.ident for thread in threads}
        while missing:
            missing.discard(self._blocked.told.get(timeout=SOON))


@contextmanager
def using(cache: DataCache, *keys: Key, workspace: int = 0) -> Iterator[list[Any]]:
    """An operation that has pinned ``keys`` for the length of the block."""
    with cache.operation("a test", workspace=workspace, room=0) as operation:
        yield operation.pin(keys)


def load(cache: DataCache, key: Made) -> int:
    """Load ``key`` and keep nothing of it: its first byte."""
    return int(cache.load(key)[0])


def preload_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lazycache-preload"]
