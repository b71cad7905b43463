"""The table of a tree of scopes: what is held, who is charged for it, and what goes next.

One lock guards everything. It is only ever taken by ``with table.lock`` (an interrupt between a
call of ``acquire`` and a ``try`` would leave it held), for short sections that call no code of
anybody else: reading, computing, freeing and callbacks happen outside. A section opens with
`Table.enter` and closes with `Table.leave`; what is left to be done outside the lock is put into an
`After`.

Python itself may run other code in the middle of a section: a signal handler, or a finalizer that
the garbage collector calls. When that code uses the cache it is inside a section of its own thread
(`Table.inside`; or of another table, `busy`). What can be done later is (`Table.soon`); what can't
raises `CacheBusyError`.

An interrupt may end a section anywhere. The next `enter` finds ``torn`` set, ends what was half
ended, and makes everything that is derived again from the records.

Objects die anywhere, inside a locked section too. Their callbacks take no lock: they append to
``dead``, which is drained at both ends of each section.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from . import _buffers
from ._accounts import Accounts
from ._cycles import served
from ._flight import Flight
from ._frames import warn
from ._integrity import repair
from ._ledger import Schedule, Tier
from ._pool import Pool
from ._records import (
    After,
    Entry,
    Garbage,
    Ghost,
    Owner,
    Ref,
    Scope,
    Stream,
    Use,
    Waiter,
)
from ._victims import shrink
from .errors import BudgetExceededWarning, CacheBusyError
from .source import Key
from .stats import Event

log = logging.getLogger("lazycache")

# The table that each thread was last in a section of.
_last = threading.local()


def busy() -> Table | None:
    """The table that the calling thread is in a section of, which it interrupted.

    There it waits for no other table: whoever is in that one might be waiting for this.
    """
    table: Table | None = getattr(_last, "table", None)
    return table if table is not None and table.inside() else None


class Table:
    """See the module. Methods expect the lock to be held unless they say otherwise."""

    def __init__(
        self,
        budget: int,
        strict: bool,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_limit: float = 60.0,
    ) -> None:
        # Reentrant only so that a thread can tell that it is inside; sections never nest.
        self.lock = threading.RLock()
        self.clock = clock
        self.wait_limit = wait_limit
        # Appended to by callbacks of dying objects, without the lock.
        self.dead: deque[Any] = deque()
        # What was asked for inside a section of the same thread, and is done at its end.
        self.postponed: deque[Callable[[After], None]] = deque()
        # Other tables that it was asked of; they do it when this one is free.
        self.elsewhere: deque[Table] = deque()
        # The waiter whose turn it is; read by those callbacks without the lock.
        self.head: weakref.ref[Waiter] | None = None

        # All below: guarded by the lock. The truth:
        self.root = Scope(budget, strict, None)
        self.accounts = Accounts(self.watch)
        self.uses: dict[Use, Ref] = {}
        self.entries: dict[Key, Entry] = {}
        self.flights: dict[Key, Flight] = {}
        # Evicted, perhaps still alive.
        self.ghosts: dict[Key, Ghost] = {}
        # Threads that wait, so won't release: for a flight, or (None) for memory.
        self.blocked: dict[int, Flight | None] = {}
        # Tickets: requests inside an operation go before those that begin one.
        self.nested: deque[weakref.ref[Waiter]] = deque()
        self.fresh: deque[weakref.ref[Waiter]] = deque()
        # What is known of the future.
        self.schedules: list[Schedule[Key]] = []
        self.streams: OrderedDict[Stream, Ref | None] = OrderedDict()
        self.uses_clock = 0
        self.serial = 0
        self.torn = False
        self.changed = False  # somebody let go or was blocked: whose turn it is should look again
        self.garbage: list[weakref.ref[Garbage]] = []
        self.pool = Pool(self)

    # Sections

    def enter(self, after: After) -> None:
        if self.torn:
            repair(self, after)
        self.torn = True
        self._drain(after)
        if self.blocked:
            self._unblock_lost()

    def leave(self, after: After) -> None:
        self._drain(after)
        while self.postponed:
            self.postponed[0](after)
            self.postponed.popleft()  # only now: after an interrupt it is done again
        if after.garbage.values:
            self.garbage = [ref for ref in self.garbage if ref() is not None]
            self.garbage.append(weakref.ref(after.garbage, self._nudge))
        self.pool.admit(after)
        self._kick()
        self.torn = False

    def finish(self, after: After) -> None:
        """Do what sections left to be done. Called without the lock."""
        while True:
            garbage = after.garbage
            dropped = sum(nbytes for _, nbytes in garbage.bytes)
            garbage.drop()
            self.pool.freed(after.freed)
            self.pool.start_workers()
            self._tell(after)
            while self.elsewhere:
                self.elsewhere.popleft().soon(lambda after: None)
            if not dropped and not self.postponed:
                return
            shrinking, after = after.shrinking, After()
            with self.lock:
                _last.table = self
                self.enter(after)
                self.changed = True
                for scope, label in shrinking:
                    shrink(self, scope, after, label)
                self.leave(after)

    def inside(self) -> bool:
        """Whether the calling thread is in a section already, which it interrupted."""
        return self.lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def section(self, work: Callable[[After], None]) -> None:
        """Run ``work`` in a locked section. Called without the lock.

        Raises `CacheBusyError` inside a section of the same thread, of this table or another.
        """
        if self.inside() or busy() is not None:
            raise CacheBusyError(
                "a finalizer or signal handler that interrupted the cache asked it for data, which "
                "can't be had there: ask for them before, or later"
            )
        after = After()
        with self.lock:
            _last.table = self
            self.enter(after)
            work(after)
            self.leave(after)
        self.finish(after)

    def soon(self, work: Callable[[After], None]) -> None:
        """Run ``work`` in a section; inside one of the same thread, once that is over."""
        table = self if self.inside() else busy()
        if table is None:
            self.section(work)
            return
        self.postponed.append(work)
        if table is not self:
            table.elsewhere.append(self)

    def _tell(self, after: After) -> None:
        for scope, event in after.events:
            for level in scope.chain:
                for callback in list(level.subscribers):
                    try:
                        callback(event)
                    except Exception:
                        log.exception("a subscriber failed on %s", event)
        for text in after.messages:
            log.warning(text)
        for text in after.warnings:
            log.info(text)
            warn(text, BudgetExceededWarning)

    # Waking

    def first(self) -> Waiter | None:
        """The waiter whose turn it is."""
        for tickets in (self.nested, self.fresh):
            while tickets:
                waiter = tickets[0]()
                if waiter is not None and not waiter.left:
                    self.head = tickets[0]
                    return waiter
                tickets.popleft()
        self.head = None
        return None

    def _unblock_lost(self) -> None:
        """Threads that an interrupt took out of their wait, and another out of saying so."""
        waiters = [ref() for ref in (*self.nested, *self.fresh)]
        waiting = {waiter.thread for waiter in waiters if waiter is not None}
        for thread, flight in list(self.blocked.items()):
            if flight is None:
                lost = thread not in waiting
            else:
                lost = all(joiner.thread != thread for joiner in flight.joiners)
            if lost:
                del self.blocked[thread]

    def _kick(self) -> None:
        waiter = self.first()
        changed = self.changed or self.accounts.released
        if changed and waiter is not None and waiter.thread != threading.get_ident():
            # It can run from now on, not only once it has woken: else others would think in the
            # meantime that nobody is left who could release.
            self.blocked.pop(waiter.thread, None)
            waiter.wake.put(None)
        self.changed = self.accounts.released = False

    def _nudge(self, _: object) -> None:
        head = self.head
        waiter = None if head is None else head()
        if waiter is not None:
            waiter.wake.put(None)

    def watch(self, record: Owner | Use | Stream, target: Any) -> Ref:
        """A weak reference whose ``record`` is ended when ``target`` dies.

        Callbacks run anywhere and take no lock. An interrupt in one of Python's would lose the
        news, so they are told by a call of C alone; waking somebody by another, which may be lost.
        """
        nudge = weakref.ref(target, self._nudge)
        ref = Ref(target, self.dead.append)
        ref.nudge = nudge
        ref.record = record
        return ref

    def _drain(self, after: After) -> None:
        while self.dead:
            item = self.dead.popleft()
            if isinstance(item, Key):
                entry = self.entries.get(item)
                if entry is not None and entry.pins == 0:
                    self.file(entry, after)
                continue
            # None where an interrupt came before `watch` had set it.
            record = getattr(item, "record", None)
            if isinstance(record, Owner):
                self._owner_died(record, after)
            elif isinstance(record, Use):
                self.end_use(record, after)
            elif isinstance(record, Stream):
                self.close_stream(record, after)

    def _owner_died(self, owner: Owner, after: After) -> None:
        after.freed += owner.charge.nbytes
        self.accounts.bury(owner)
        for key in owner.ghosts:
            ghost = self.ghosts.get(key)
            if ghost is not None and ghost.owner is owner:
                del self.ghosts[key]
                for stream in self.streams:
                    stream.want_again(key)

    def dying(self, level: Scope) -> int:
        """Bytes of ``level`` that some thread is about to free."""
        total = 0
        alive = []
        for ref in self.garbage:
            garbage = ref()
            if garbage is not None and garbage.bytes:
                alive.append(ref)
                total += garbage.dying(level)
        self.garbage = alive
        return total

    # Entries

    def land(self, key: Key, value: Any, nbytes: int, scope: Scope) -> Entry:
        """An entry for data that were just read."""
        owner = self.accounts.track(value, nbytes, scope, "entry", key.name)
        entry = Entry(key, value, owner, scope)
        self._settle_in(entry)
        for handle in key.handles():
            if handle.exhausted:
                handle.left = handle.nops
        return entry

    def resurrect(self, key: Key) -> Entry | None:
        """The entry of what was evicted but is still alive, or None."""
        ghost = self.ghosts.pop(key, None)
        if ghost is None:
            return None
        value = ghost.value()
        if value is None or ghost.owner.charge not in self.accounts.charges:
            return None
        entry = Entry(key, value, ghost.owner, ghost.owner.charge.scope)
        for recall, nbytes in ghost.lent:
            part = None if recall is None else recall()
            held = self.accounts.owners.get(id(_buffers.owner_of(part)))
            if part is not None and held is not None and held.entries == 0:
                # Evicted with the value again.
                charge = entry.owner.charge
                self.accounts.recharge(charge, nbytes=charge.nbytes + nbytes)
                self.accounts.bury(held)
                entry.parts.append((part, nbytes))
        entry.nbytes = entry.owner.charge.nbytes
        self._settle_in(entry)
        entry.scope.counters.recalls += 1
        return entry

    def _settle_in(self, entry: Entry) -> None:
        entry.owner.entries += 1
        if entry.owner.charge.kind != "entry":
            self.accounts.recharge(entry.owner.charge, kind="entry")
        self.entries[entry.key] = entry
        entry.key.watchers.append(self.dead)

    def pin(self, use: Use, entry: Entry) -> None:
        if entry.pins == 0:
            entry.scope.ledger.remove(entry.key)
        entry.pins += 1
        entry.spent = None
        entry.unasked = None
        use.entries[entry.key] = entry
        use.counts[entry.key] = use.counts.get(entry.key, 0) + 1

    def unpin(self, use: Use, key: Key, after: After, used: bool = True) -> None:
        """Undo one pin; ``used`` unless it is of a request that did not come about."""
        entry = use.entries[key]
        use.counts[key] -= 1
        if not use.counts[key]:
            del use.counts[key], use.entries[key]
        entry.pins -= 1
        if use.schedule is not None and used:
            self.advance(use.schedule, key)
        if entry.pins == 0:
            self.changed = True
            self.file(entry, after)
            if used:
                # What was over the budget only because it was in use goes now.
                shrink(self, entry.scope, after)

    def file(self, entry: Entry, after: After) -> None:
        """Say what an entry that nobody uses is worth: drop it, or put it into its ledger."""
        key = entry.key
        if entry.stale or entry.scope.closed:
            self.detach(entry, after)
            return
        next_use = self.next_use(key)
        if next_use is None and key.used_up:
            self._count_release(entry, after)
            self.detach(entry, after)
            return
        tier: Tier
        if next_use is not None:
            tier = "planned"
        elif entry.spent is not None:
            tier = "spent"
        elif not key.referenced:
            tier = "unreferenced"
        else:
            tier = "recent"
        self.serial += 1
        entry.stamp = self.serial
        entry.scope.ledger.put(key, entry.nbytes, tier, next_use, entry.spent)

    def detach(self, entry: Entry, after: After) -> None:
        """Take an entry out; its value is dropped outside the lock and charged until it is dead."""
        key, owner = entry.key, entry.owner
        # An invalidated one has left before, and a new one may stand in its place.
        if self.entries.get(key) is entry:
            entry.scope.ledger.remove(key)
            del self.entries[key]
            if self.dead in key.watchers:
                key.watchers.remove(self.dead)
            for stream in self.streams:
                stream.want_again(key)
        owner.entries -= 1
        after.garbage.bytes.append((entry.scope, entry.nbytes))
        after.garbage.values.append(entry.value)
        lent: list[tuple[Any, int]] = []
        while entry.parts and owner.entries == 0:
            # Whoever holds one of them, and not the value, keeps its memory.
            # First charged anew: an interrupt in between leaves too much charged, never too little.
            part, nbytes = entry.parts[-1]
            lent.append((_buffers.recall(part), nbytes))
            self.accounts.track(part, nbytes, entry.scope, "held", key.name)
            self.accounts.recharge(owner.charge, nbytes=max(0, owner.charge.nbytes - nbytes))
            after.garbage.values.append(part)
            del part
            entry.parts.pop()
        if owner.ref is None:
            entry.scope.counters.untracked_bytes += owner.charge.nbytes
            after.freed += owner.charge.nbytes
            self.accounts.discharge(owner.charge)
        elif owner.entries == 0:
            self.accounts.recharge(owner.charge, kind="held")
        if owner.ref is not None and not entry.stale:
            ghost = Ghost(entry, after.garbage)
            ghost.lent = lent
            if ghost.recall is not None:
                self.ghosts[key] = ghost
                owner.ghosts.add(key)
        entry.value = None

    def forget(self, key: Key, after: After, kind: Any) -> None:
        """Drop the data of a key: at once, or, where they are in use, as soon as they aren't."""
        entry = self.entries.get(key)
        if kind == "invalidate":
            self.ghosts.pop(key, None)
        if entry is None:
            return
        if kind == "invalidate":
            after.events.append((entry.scope, Event(kind, key.name, entry.nbytes)))
            entry.stale = True
            if entry.pins:
                # Who uses it keeps it; whoever comes next loads anew.
                del self.entries[key]
                key.watchers.remove(self.dead)
        elif entry.pins == 0:
            self._count_release(entry, after)
        if entry.pins == 0:
            self.detach(entry, after)

    def _count_release(self, entry: Entry, after: After) -> None:
        entry.scope.counters.releases += 1
        after.events.append((entry.scope, Event("release", entry.key.name, entry.nbytes)))

    # The future

    def next_use(self, key: Key) -> int | None:
        uses = [use for s in self.schedules if (use := s.next_use(key)) is not None]
        return min(uses, default=None)

    def advance(self, schedule: Schedule[Key], key: Key) -> None:
        """One planned use of ``key`` is over."""
        self.uses_clock += 1
        entry = self.entries.get(key)
        if schedule.advance(key) and entry is not None:
            entry.spent = schedule

    def end_schedule(self, schedule: Schedule[Key], after: After) -> None:
        if schedule in self.schedules:
            self.schedules.remove(schedule)
        for key in schedule.remaining():
            entry = self.entries.get(key)
            if entry is not None and entry.pins == 0:
                self.file(entry, after)

    def close_stream(self, stream: Stream, after: After) -> None:
        """Stop preloading for ``stream`` and give back what it loaded and nobody asked for."""
        if stream.closed:
            return
        stream.wanted.clear()
        for flight in [f for f in self.flights.values() if f.stream is stream and f.prefetch]:
            self.pool.cancel(flight)
        keys = stream.schedule.remaining()
        self.end_schedule(stream.schedule, after)
        for key in keys:
            entry = self.entries.get(key)
            if entry is None or entry.unasked is not stream or entry.pins:
                continue
            if self.next_use(key) is None:
                self._count_release(entry, after)
                self.detach(entry, after)
        # Last, so that one that an interrupt left half closed is closed again.
        self.streams.pop(stream, None)
        stream.closed = True
        self.changed = True

    # Operations

    def end_use(self, use: Use, after: After) -> None:
        """Give back everything that an operation holds, however it ended."""
        if use not in self.uses:
            return
        for flight in list(self.flights.values()):
            self.pool.leave(flight, use)
        if use.schedule is not None and use.schedule in self.schedules:
            self.schedules.remove(use.schedule)
        for key in list(use.entries):
            while key in use.counts:
                self.unpin(use, key, after)
        if use.stream is not None:
            self.close_stream(use.stream, after)
        elif use.schedule is not None:
            self.end_schedule(use.schedule, after)
        if use.workspace is not None:
            after.freed += use.workspace.nbytes
            self.accounts.discharge(use.workspace)
        # Last, so that one that an interrupt left half ended is ended again.
        del self.uses[use]
        self.changed = True

    def helpers(self, me: int) -> bool:
        """Whether some other thread runs that will release something without waiting first."""
        here = me, served.get()
        if any(
            use.thread not in here and not use.pinned and use.thread not in self.blocked
            for use in self.uses
        ):
            return True
        if any(
            garbage is not None and garbage.bytes and garbage.thread != me
            for garbage in (ref() for ref in self.garbage)
        ):
            return True
        return any(
            flight.thread != me and flight.thread not in self.blocked
            for flight in self.flights.values()
            if flight.thread is not None
        )
