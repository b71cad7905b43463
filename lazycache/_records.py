"""The records of a table: who holds which bytes, and what is in use.

Plain data. Every field of every record here is guarded by the lock of its table, except where a
comment says otherwise. The truth is in `Table.charges` and in the `Use` records; what a scope adds
up can be made again from them (`Table.repair`).
"""

from __future__ import annotations

import heapq
import math
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

from . import _buffers
from ._ledger import Ledger, Schedule
from .source import Key, Result
from .stats import Counters, Event, Reason

Kind = Literal["entry", "flight", "workspace", "held"]
KINDS: tuple[Kind, ...] = ("entry", "flight", "workspace", "held")


class Scope:
    """A budget, and a label for the charges and entries that belong to it."""

    __slots__ = (
        "budget",
        "by_kind",
        "chain",
        "children",
        "closed",
        "counters",
        "counting",
        "ledger",
        "parent",
        "peak",
        "results",
        "results_nbytes",
        "strict",
        "subscribers",
        "used",
        "warned",
    )

    def __init__(self, budget: int, strict: bool, parent: Scope | None) -> None:
        self.budget = budget
        self.strict = strict
        self.parent = parent
        # This scope and its ancestors, the root last.
        self.chain: tuple[Scope, ...] = (self, *(parent.chain if parent else ()))
        self.children: list[Scope] = []
        self.used = 0  # also read without the lock: one int
        self.peak = 0
        self.by_kind: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.ledger: Ledger[Key] = Ledger()
        # Computed results that may go, cheapest first: (cost, serial, result, nbytes).
        self.results: list[tuple[float, int, weakref.ref[Result], int]] = []
        self.results_nbytes = 0  # of those in the heap, dead ones included
        self.counters = Counters()
        self.counting = True  # not yet added to those of its parent
        self.subscribers: list[Callable[[Event], None]] = []
        self.warned = False
        self.closed = False

    def tree(self) -> list[Scope]:
        """This scope and every open scope inside it."""
        found = [self]
        for scope in found:
            found.extend(scope.children)
        return found


class Charge:
    """Bytes on the account of a scope and of its ancestors."""

    __slots__ = ("kind", "made", "name", "nbytes", "scope")

    def __init__(self, scope: Scope, nbytes: int, kind: Kind, name: str) -> None:
        self.scope = scope
        self.nbytes = nbytes
        self.kind = kind
        self.name = name
        self.made: Reason | None = None  # computed or made in memory, not read

    def reason(self) -> Reason:
        if self.made is not None:
            return self.made
        return _REASONS[self.kind]


_REASONS: dict[Kind, Reason] = {
    "entry": "cached",
    "flight": "reading",
    "workspace": "operation",
    "held": "held outside",
}


class Ref(weakref.ref[Any]):
    """A weak reference to what somebody holds; its death ends ``record``. See `Table.watch`."""

    __slots__ = ("nudge", "record")
    nudge: weakref.ref[Any]
    record: Owner | Use | Stream


class Owner:
    """An object whose death frees memory, and the charge for it."""

    __slots__ = ("charge", "entries", "ghosts", "ident", "ref")

    def __init__(self, charge: Charge, ident: int) -> None:
        self.charge = charge
        self.ident = ident
        self.ref: Ref | None = None  # None: a type that can't be weakly referenced
        self.entries = 0  # resident entries that refer to it
        self.ghosts: set[Key] = set()


class Entry:
    """Data that the table holds for a key."""

    __slots__ = (
        "key",
        "nbytes",
        "owner",
        "parts",
        "pins",
        "scope",
        "spent",
        "stale",
        "stamp",
        "unasked",
        "value",
    )

    def __init__(self, key: Key, value: Any, owner: Owner, scope: Scope) -> None:
        self.key = key
        self.value = value
        self.owner = owner
        self.scope = scope
        self.nbytes = owner.charge.nbytes
        # Memory inside a value that is no array, and its bytes: it may be held without the value.
        self.parts: list[tuple[Any, int]] = []
        self.pins = 0
        self.stamp = 0  # when it was last used, on the table's count of uses
        # The plan or loop that it is past its last use in.
        self.spent: Schedule[Key] | None = None
        self.stale = False  # its file changed, or it was released, while it was in use
        self.unasked: Stream | None = None  # preloaded for this stream, and not asked for yet


class Ghost:
    """What was evicted while somebody may still refer to its memory."""

    __slots__ = ("_garbage", "lent", "owner", "recall")

    def __init__(self, entry: Entry, garbage: Garbage) -> None:
        self._garbage = weakref.ref(garbage)
        self.owner = entry.owner
        self.lent: list[tuple[Any, int]] = []  # its parts, that are charged on their own meanwhile
        self.recall = _buffers.recall(entry.value)

    @property
    def dying(self) -> bool:
        """Whether the data are still on their way out, so that nobody else may hold them."""
        garbage = self._garbage()
        return garbage is not None and bool(garbage.values)

    def value(self) -> Any:
        """The data again, or None if nobody kept them alive."""
        return None if self.recall is None else self.recall()


class Use:
    """What one operation holds: its workspace and its pins.

    Kept by the table; the `Operation` that the user's frame holds only points to it, so that an
    operation whose frame is gone, by whatever interrupt, is noticed and ended.
    """

    __slots__ = (
        "counts",
        "entries",
        "label",
        "pinned",
        "room",
        "schedule",
        "scope",
        "stream",
        "thread",
        "workspace",
    )

    def __init__(self, scope: Scope, label: str, thread: int, room: int, pinned: bool) -> None:
        self.scope = scope
        self.label = label
        self.thread = thread
        self.room = room
        # Held by ``pinned()``: users decide when it ends, so nobody waits for it.
        self.pinned = pinned
        self.workspace: Charge | None = None
        self.entries: dict[Key, Entry] = {}
        self.counts: dict[Key, int] = {}  # how often each of its entries is pinned
        self.schedule: Schedule[Key] | None = None
        self.stream: Stream | None = None


class Waiter:
    """The ticket of a request that needs memory. ``wake`` is used without the lock.

    Tables refer to it weakly, so that the ticket of an interrupted request goes with its frame.
    """

    __slots__ = ("__weakref__", "left", "thread", "wake")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.left = False  # a callback may still refer to it when it has left the queue
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()


class Stream:
    """A loop or a plan that tells which keys it will use next."""

    __slots__ = (
        "closed",
        "context",
        "failed",
        "now",
        "npreload",
        "peaks",
        "schedule",
        "scope",
        "spare",
        "wanted",
    )

    def __init__(self, scope: Scope, schedule: Schedule[Key], npreload: int, context: Any) -> None:
        self.scope = scope
        self.schedule = schedule
        self.npreload = npreload
        self.context = context  # the contextvars of whoever iterates; loads run in a copy
        # The loads to be had ahead, the soonest used first, as a heap of (position, key);
        # and the bytes that each takes at its peak.
        self.wanted: list[tuple[int, Key]] = []
        self.peaks: dict[Key, int] = {}
        # Bytes that requests had to take back from what was loaded ahead: its loop needs them again
        # at its next step, so that they are left free from then on.
        self.spare = 0
        self.now: tuple[Key, ...] = ()  # what a loop is using now, as far as it told
        # Not tried again: the demand for them tells what is wrong, at its own position.
        self.failed: set[Key] = set()
        self.closed = False

    def want(self, key: Key, peak: int) -> None:
        """Load ``key`` ahead of its next use."""
        self.peaks[key] = peak
        self.want_again(key)

    def want_again(self, key: Key) -> None:
        """What was loaded ahead, or about to be, is gone before its use.

        It comes before all that is used later: were such gaps left, the loop would find one at
        each step, and send away what was loaded behind it.
        """
        position = self.schedule.next_use(key)
        if position is not None and key in self.peaks and not self.closed:
            heapq.heappush(self.wanted, (position, key))

    def leaves(self, level: Scope) -> int:
        """Bytes of ``level`` that nothing is loaded ahead into, though they are free."""
        return max(0, self.spare - level.by_kind["workspace"])

    def patience(self, key: Key) -> int:
        """What is used up to this position doesn't go for a load of ``key`` ahead.

        What the loop is using now makes room soon. Where that is wanted again so late that
        anything else would be missed in less than half the time, the load waits for it.
        """
        position = self.schedule.next_use(key)
        assert position is not None
        again = (
            (now + later) // 2
            for used in self.now
            if (now := self.schedule.next_use(used)) is not None
            and (later := self.schedule.use_after(used, position)) is not None
        )
        return max([position, *again])

    def first_wanted(self) -> Key | None:
        """What is used soonest of what is wanted."""
        while self.wanted:
            _, key = self.wanted[0]
            if self.schedule.next_use(key) is not None and key not in self.failed:
                return key
            heapq.heappop(self.wanted)
        return None

    def first_position(self) -> float:
        """When that is used; infinity if nothing is wanted."""
        return math.inf if self.first_wanted() is None else self.wanted[0][0]


class Garbage:
    """Values that left the table and are dropped outside its lock.

    The table knows it weakly: until the values are gone, or this object is (an interrupted frame),
    their memory counts as about to be free.
    """

    __slots__ = ("__weakref__", "bytes", "thread", "values")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.values: list[Any] = []
        self.bytes: list[tuple[Scope, int]] = []

    def drop(self) -> None:
        # A list is empty before its first item dies, so `values` can't tell when all are dead.
        self.values.clear()
        self.bytes.clear()

    def dying(self, level: Scope) -> int:
        return sum(nbytes for scope, nbytes in self.bytes if level in scope.chain)


class After:
    """What a locked section leaves to be done once the lock is free."""

    __slots__ = ("events", "freed", "garbage", "messages", "shrinking", "warnings")

    def __init__(self) -> None:
        self.garbage = Garbage(threading.get_ident())
        self.events: list[tuple[Scope, Event]] = []
        self.freed = 0  # bytes that died, or were given back unused; the allocator may keep them
        self.messages: list[str] = []  # for the log alone
        # Who may still be over a budget when the garbage is gone, and why; see `shrink`.
        self.shrinking: list[tuple[Scope, str | None]] = []
        self.warnings: list[str] = []
