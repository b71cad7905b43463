"""A reader that does wrong on demand, to see what a program makes of it.

::

    from lazycache.testing import FaultyReader

    faulty = FaultyReader(fail_every=3, error=OSError, seconds=0.01)
    volumes = [lc.load(path, reader=faulty) for path in paths]
    ...
    assert faulty.reads == len(paths)
    faulty.heal()  # from now on it reads like the reader that it wraps
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lazycache.proxy import LazyReadData
from lazycache.readers import Probe, Reader, reader_for
from lazycache.readers.base import (
    BlockReader,
    Blocks,
    cancellable,
    checkpoint,
    outer_cancelled,
)

_TIMEOUT = 20.0


@dataclass(eq=False)
class FaultyReader:
    """Reads what ``reader`` (else the one that lazycache would choose) reads, with these faults.

    A file that is opened to be read in blocks counts as one read, and its faults come once: before
    it is opened, with the first block, or after the last one. The last four faults make it be read
    as a whole. Every field may be changed while reads are under way, and any may be combined.

    ``fail_every``
        n: every nth read raises ``error``, an exception or a class of them; 0: none does.
    ``seconds``, ``steps``
        each read takes so much longer, in so many steps with a checkpoint after each.
    ``hangs``
        each read waits, without looking at any checkpoint, until `let_go`.
    ``during``
        is called with the path in each read, and may do what it likes.
    ``asks``
        each read asks for the very data that it is to read: "directly", in a "thread" that it
        starts and joins, or in an "executor" whose future it waits for.
    ``when``
        the faults above happen "before" the file is opened, "amid" the read (at the first
        checkpoint of the wrapped reader) or "after" it, with all data in memory.
    ``size_factor``
        `probe` announces so many times the true sizes.
    ``larger``
        the data are a view of an array so many times as large.
    ``keeps``
        the reader keeps what it read, in ``kept`` by path, and gives the same object each time.
    ``nothing``
        None is returned in place of the data.
    """

    reader: Reader | None = None
    _: KW_ONLY
    fail_every: int = 0
    error: BaseException | type[BaseException] = OSError
    seconds: float = 0.0
    steps: int = 10
    hangs: bool = False
    during: Callable[[str], object] | None = None
    asks: Literal["", "directly", "thread", "executor"] = ""
    when: Literal["before", "amid", "after"] = "amid"
    size_factor: float = 1.0
    larger: int = 1
    keeps: bool = False
    nothing: bool = False
    kept: dict[str, Any] = field(default_factory=dict, init=False)

    name = "faulty"

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._reads: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()
        self._asking = threading.local()

    def __repr__(self) -> str:
        return f"<FaultyReader of {self.reader!r}, {self.reads} reads>"

    # What a test sees and does

    @property
    def reads(self) -> int:
        """How often `read` was called."""
        with self._changed:
            return self._reads.total()

    def reads_of(self, path: str) -> int:
        """How often `read` was called for ``path``."""
        with self._changed:
            return self._reads[path]

    def wait_reached(
        self, times: int = 1, path: str | None = None, timeout: float = _TIMEOUT
    ) -> None:
        """Wait until so many reads (of ``path``) have got to the moment of their faults."""

        def there() -> bool:
            found = self._reached.total() if path is None else self._reached[path]
            return found >= times

        with self._changed:
            if not self._changed.wait_for(there, timeout):
                raise TimeoutError(f"{times} reads expected, but there were {self._reached}")

    def let_go(self) -> None:
        """End the waiting of reads that hang; no further one hangs."""
        with self._changed:
            self.hangs = False
            self._changed.notify_all()

    def heal(self) -> None:
        """No more faults: reads that hang go on, what was kept is forgotten."""
        for each in fields(self):
            if each.init and each.name not in ("reader", "hangs"):
                setattr(self, each.name, each.default)
        self.kept.clear()
        self.let_go()

    # What a reader does

    def can_read(self, path: str) -> bool:
        try:
            return self._wrapped(path).can_read(path)
        except Exception:
            return False

    def probe(self, path: str, **options: Any) -> Probe:
        probe = self._wrapped(path).probe(path, **options)
        whole = self.size_factor != 1 or self.larger > 1 or self.keeps or self.nothing
        return replace(
            probe,
            nbytes=int(probe.nbytes * self.size_factor),
            peak_nbytes=int(probe.peak_nbytes * self.size_factor),
            in_blocks=probe.in_blocks and not whole,
        )

    def read(self, path: str, **options: Any) -> Any:
        misbehave = self._count_read(path, options)
        data = self.kept.get(path)
        if data is None:
            data = self._read(path, options, misbehave)
        misbehave()
        if self.keeps:
            self.kept[path] = data
        return None if self.nothing else data

    def open_blocks(self, path: str, **options: Any) -> Blocks:
        misbehave = self._count_read(path, options)
        reader = cast(BlockReader, self._wrapped(path))
        shape = reader.probe(path, **options).shape  # type: ignore[attr-defined]
        return _FaultyBlocks(self, reader.open_blocks(path, **options), math.prod(shape), misbehave)

    def _count_read(self, path: str, options: dict[str, Any]) -> Callable[[], None]:
        """Begin a read; what is returned does wrong, the first time that it is called."""
        with self._changed:
            self._reads[path] += 1
            number = self._reads.total()
        pending = [self.when]

        def misbehave() -> None:
            if pending:
                pending.pop()
                self._misbehave(path, number, options)

        if self.when == "before":
            misbehave()
        return misbehave

    def _wrapped(self, path: str) -> Reader:
        return self.reader or reader_for(path, without=self)

    def _read(self, path: str, options: dict[str, Any], misbehave: Callable[[], None]) -> Any:
        outer = outer_cancelled()

        def asked() -> bool:
            if self.when == "amid":
                misbehave()
            return outer()

        with cancellable(asked):
            data = self._wrapped(path).read(path, **options)
        return _view_in_larger(data, self.larger) if self.larger > 1 else data

    def _misbehave(self, path: str, number: int, options: dict[str, Any]) -> None:
        with self._changed:
            self._reached[path] += 1
            self._changed.notify_all()
        if self.seconds:
            for _ in range(self.steps):
                time.sleep(self.seconds / self.steps)
                checkpoint()
        with self._changed:
            self._changed.wait_for(lambda: not self.hangs)
        if self.during is not None:
            self.during(path)
        if self.asks:
            self._ask(path, options)
        if self.fail_every and number % self.fail_every == 0:
            raise self.error if isinstance(self.error, BaseException) else self.error("injected")

    def _ask(self, path: str, options: dict[str, Any]) -> None:
        if getattr(self._asking, "yes", False):
            return  # a thread started below, which came to read: its own thread would never end
        proxy = LazyReadData(path, reader=self, **options)
        if self.asks == "directly":
            _ = proxy.data
            return

        def ask() -> Any:
            self._asking.yes = True
            return proxy.data

        if self.asks == "executor":
            executor = ThreadPoolExecutor(1)
            future = executor.submit(ask)
            try:
                future.result()
            finally:
                executor.shutdown(wait=future.done())  # not for ever after an interrupt
            return
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join()
        answer.result()


class _FaultyBlocks:
    def __init__(
        self, faulty: FaultyReader, blocks: Blocks, size: int, misbehave: Callable[[], None]
    ) -> None:
        self._faulty = faulty
        self._blocks = blocks
        self._left = size
        self._misbehave = misbehave

    def into(self, flat: NDArray[Any]) -> None:
        if self._faulty.when == "amid":
            self._misbehave()
        self._blocks.into(flat)
        self._left -= flat.size
        if not self._left:
            self._misbehave()

    def skip(self, count: int) -> None:
        self._left -= count
        self._blocks.skip(count)

    def close(self) -> None:
        self._blocks.close()


def _view_in_larger(data: Any, times: int) -> Any:
    whole = np.empty((times, *data.shape), data.dtype)
    whole[0] = data
    return whole[0]
