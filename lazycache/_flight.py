"""One load of one key, however many threads ask for it.

A flight opens under the lock once its bytes are granted, and ends once, in one of four ways:
*landed* (an entry exists, pinned for everyone who had joined), *failed* (everyone who joined gets
the error; nothing is kept), *cancelled* (a prefetch that nobody had joined gave its bytes back) or
*abandoned* (who was to read it never did: everyone who joined starts again).
"""

from __future__ import annotations

import copy
import queue
from typing import TYPE_CHECKING, Any

from .source import Key

if TYPE_CHECKING:
    from ._records import Charge, Entry, Stream, Use


class AbandonedError(Exception):
    """Told to the joiners of a flight that ended without data or error: start again."""


class Joiner:
    """A thread that waits for a flight; ``outcome`` gets its one end."""

    __slots__ = ("outcome", "thread", "use")

    def __init__(self, use: Use, thread: int) -> None:
        self.use = use
        self.thread = thread
        self.outcome: queue.SimpleQueue[Entry | Exception] = queue.SimpleQueue()


class Flight:
    """A load under way. Guarded by the lock of its table, but for ``cancelled``."""

    __slots__ = (
        "cancelled",
        "charge",
        "context",
        "ended",
        "joiners",
        "key",
        "prefetch",
        "stream",
        "thread",
        "use",
    )

    def __init__(
        self, key: Key, charge: Charge, *, use: Use | None = None, stream: Stream | None = None
    ) -> None:
        self.key = key
        self.charge = charge
        self.use = use  # the operation that opened it; None for a prefetch
        self.stream = stream  # the stream that it is a prefetch of
        self.prefetch = stream is not None  # until a demand joins
        self.context: Any = None  # the contextvars to read in, for pool threads
        self.thread: int | None = None  # who reads it; None while it is queued
        self.joiners: list[Joiner] = []
        self.ended = False  # its end has begun; an interrupt may have left it unfinished
        # Set under the lock, read without it by the reading thread: one bool.
        self.cancelled = False


def error_for_another(error: Exception) -> Exception:
    """``error`` for one more thread: a copy, so that each gets a traceback of its own.

    The error itself where its class can't be made again from its arguments.
    """
    try:
        twin = copy.copy(error)
    except Exception:
        return error
    if type(twin) is not type(error):
        return error
    twin.__cause__ = error
    return twin


def name_file(error: Exception, key: Key) -> None:
    """Add the name of what was read to an error that doesn't tell it."""
    told = str(error) + "".join(getattr(error, "__notes__", ()))
    path = getattr(key, "path", key.name)
    if path not in told and getattr(error, "filename", None) != path:
        error.add_note(f"while reading {key.name}")
