"""What a cache tells about itself: counters, who holds its bytes, and events."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from .sizes import format_size

Reason = Literal["operation", "pinned()", "held outside", "reading", "result", "memory", "cached"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a cache since it was made, its closed and open scopes included.

    ``a - b`` gives the counts of the interval between two snapshots; ``peak_bytes`` and
    ``untracked_bytes`` of a difference are those of the later one.

    ``hits``: requests answered from memory, also from evicted data that somebody still held.
    ``misses``: requests that had to wait for a load, their own or another's.
    ``loads``: reads that ended well, preloads included. ``load_failures``: reads that raised.
    ``load_seconds``: time spent reading, added up over threads.
    ``loaded_bytes``: bytes that loads put into memory.
    ``preloads``: loads that began before anybody asked for them.
    ``evictions``, ``evicted_bytes``: entries dropped to make room.
    ``releases``: entries dropped because their ``nops`` were used up or they were released.
    ``overcommits``: times the budget was exceeded because nothing more could be freed.
    ``waits``: requests that waited for memory.
    ``joins``: requests for what was just being loaded for somebody else, or ahead of use.
    ``recalls``: evicted data that somebody still held, taken back without a read.
    ``cancelled``: preloads that were stopped, because their room was needed or their loop ended.
    ``abandoned``: loads that ended without data or error, because who asked for them had failed
    or was interrupted; whoever else had asked started them again.
    ``peak_bytes``: the most that was ever in use.
    ``untracked_bytes``: bytes dropped that can't be proved to be free, because their type can't be
    weakly referenced.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_failures: int = 0
    load_seconds: float = 0.0
    loaded_bytes: int = 0
    preloads: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    releases: int = 0
    overcommits: int = 0
    waits: int = 0
    joins: int = 0
    recalls: int = 0
    cancelled: int = 0
    abandoned: int = 0
    peak_bytes: int = 0
    untracked_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over all requests; 0.0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        values = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        values["peak_bytes"] = self.peak_bytes
        values["untracked_bytes"] = self.untracked_bytes
        return CacheStats(**values)


COUNTERS = tuple(f.name for f in fields(CacheStats) if f.name != "peak_bytes")


class Counters:
    """The running counts of one scope; only ever changed under the lock of its table."""

    __slots__ = COUNTERS

    hits: int
    misses: int
    loads: int
    load_failures: int
    load_seconds: float
    loaded_bytes: int
    preloads: int
    evictions: int
    evicted_bytes: int
    releases: int
    overcommits: int
    waits: int
    joins: int
    recalls: int
    cancelled: int
    abandoned: int
    untracked_bytes: int

    def __init__(self) -> None:
        for name in COUNTERS:
            setattr(self, name, 0)

    def add(self, other: Counters) -> None:
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who holds bytes of a budget, and why they can't go (or ``cached``: they can)."""

    name: str
    nbytes: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.name}: {format_size(self.nbytes)} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a cache, told to its subscribers after it happened.

    ``kind`` is ``load``, ``load_failure``, ``evict``, ``release``, ``invalidate`` or
    ``overcommit``; ``name`` the file (or a description), ``nbytes`` how much memory it concerns.
    """

    kind: Literal["load", "load_failure", "evict", "release", "invalidate", "overcommit"]
    name: str
    nbytes: int
