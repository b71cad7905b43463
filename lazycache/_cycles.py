"""Readers that wait for their own data: found, so that they get an error and never hang.

A reader may ask the cache for other data, itself or through threads that it starts and waits for.
When what it asks for leads back to what it is reading, nobody would ever go on. Three things tell:
which flights the threads that read wait for, which reads the calling context is part of (contexts
are copied to tasks and to `asyncio.to_thread`), and, for plain threads and executors, whose end the
frames of a thread wait for. The last is looked at only by who has waited for a while.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

from ._flight import Flight

if TYPE_CHECKING:
    from ._table import Table

# How long somebody waits for a load before looking whether it waits for him, in seconds.
PATIENCE = 0.25

_WAITING = frozenset({"threading", "concurrent.futures._base", "multiprocessing.pool"})
_WORKING = frozenset({"concurrent.futures.thread", "multiprocessing.pool"})

_reading: ContextVar[tuple[Flight, ...]] = ContextVar("lazycache_reading", default=())
# The thread that waits for what is done in this context, where another does that: it releases
# nothing before.
served: ContextVar[int | None] = ContextVar("lazycache_served", default=None)


@contextmanager
def reading(flight: Flight) -> Iterator[None]:
    """Mark what is done in the block, in copies of its context too, as part of reading."""
    token = _reading.set((*_reading.get(), flight))
    try:
        yield
    finally:
        _reading.reset(token)


def leads_to(table: Table, flight: Flight, thread: int) -> bool:
    """Whether who reads ``flight`` waits, through any number of flights, for ``thread``.

    Also if this context is part of reading it. Guarded by the lock of the table.
    """
    part_of = _reading.get()
    seen: set[Flight] = set()
    while flight not in seen:
        seen.add(flight)
        if flight.thread == thread or flight in part_of:
            return True
        blocked = None if flight.thread is None else table.blocked.get(flight.thread)
        if not isinstance(blocked, Flight):
            return False
        flight = blocked
    return True


def waits_for(table: Table, thread: int, target: int) -> bool:
    """Whether ``thread`` waits, for flights or for the end of other threads, for ``target``.

    Called without the lock: what it finds may be over already, but not for those who wait in a
    circle, who can't go on.
    """
    # Only while they are looked at: a frame that is referred to keeps its variables alive.
    frames = sys._current_frames()
    waits = {ident: _waits(frame) for ident, frame in frames.items()}
    ends = {ident: _ends(frame, ident) for ident, frame in frames.items()}
    del frames
    seen: set[int] = set()
    ahead = [thread]
    while ahead:
        current = ahead.pop()
        if current == target:
            return True
        if current in seen or current not in waits:
            continue
        seen.add(current)
        blocked = table.blocked.get(current)
        if blocked is not None and blocked.thread is not None:
            ahead.append(blocked.thread)
        ahead.extend(ident for ident, ended in ends.items() if waits[current] & ended)
    return False


def is_alive(thread: int) -> bool:
    """Whether the thread of that identity runs."""
    return thread in sys._current_frames()


def _callers(frame: FrameType | None, modules: frozenset[str]) -> Iterator[FrameType]:
    """The calls in the stack of ``frame`` that are of ``modules``; no others are looked into."""
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            yield frame
        frame = frame.f_back


def _waits(frame: FrameType) -> set[Hashable]:
    """The threads, futures and jobs of pools that some call in the stack of ``frame`` is about."""
    found: set[Hashable] = set()
    for caller in _callers(frame, _WAITING):
        name = caller.f_code.co_name
        # A thread's own first calls are about itself.
        if name in ("run", "_bootstrap", "_bootstrap_inner"):
            continue
        values = caller.f_locals
        about = values.get("self")
        found.update((id(about), ("job", getattr(about, "_job", None))))
        if name in ("wait", "as_completed") and about is None:
            for some in ("fs", "not_done", "pending"):
                found.update(id(future) for future in values.get(some) or ())
    return found


def _ends(frame: FrameType, ident: int) -> set[Hashable]:
    """The thread that ``frame`` runs in, and what it will be the result of."""
    found: set[Hashable] = {id(threading._active.get(ident))}  # type: ignore[attr-defined]
    for caller in _callers(frame, _WORKING):
        if caller.f_code.co_name not in ("run", "worker"):
            continue
        values = caller.f_locals
        item, job = values.get("self"), values.get("job")
        if sys.version_info < (3, 13):
            # A copy that the frame keeps, and with it what each task was given and gave.
            values.clear()
        found.add(id(getattr(item, "future", caller)))
        if job is not None:
            found.add(("job", job))
    return found
