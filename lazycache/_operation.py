"""An operation: everything that it needs, in one request, or nothing.

An operation is admitted before it reads anything. It brings a *workspace* (the most bytes that its
intermediates and results take at once), which is charged for its whole length, and a *room* (the
most bytes of operands that it pins at once), which isn't charged but must be obtainable: at each
level of its scope, the workspaces of all operations, what users hold and the largest room among
them fit the budget together. So when every admitted operation waits, none has operands pinned, all
operands can be evicted, and the one whose turn it is goes on. Then it pins its operands step by
step.

A request waits only while some thread runs that will release something: another operation that
isn't waiting itself, somebody who is about to free a victim, a read by a pool thread. When there is
none, and after one garbage collection, it goes on over the budget (an overcommit), or, in a strict
cache, raises.
"""

from __future__ import annotations

import contextvars
import gc
import queue
import threading
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np

from . import _buffers
from ._flight import AbandonedError, Flight, Joiner, error_for_another
from ._holders import count_overcommit, largest
from ._ledger import Schedule
from ._records import Scope, Stream, Use, UseRef, Waiter
from ._table import After, Table
from ._victims import add_result, drop_results, evictable, make_room, shrink
from .errors import BudgetExceededError, CacheClosedError, LoadCycleError
from .sizes import format_size, nbytes_of
from .source import Key, Result

Verdict = Literal["granted", "again", "collect", "wait"] | Exception


class _Request:
    """The state of one request between its looks at the table."""

    __slots__ = (
        "collected",
        "impatient",
        "label",
        "nested",
        "operands",
        "scope",
        "thread",
        "waiter",
        "waits",
    )

    def __init__(self, scope: Scope, label: str, nested: bool) -> None:
        self.scope = scope
        self.label = label
        self.nested = nested
        self.thread = threading.get_ident()
        self.operands: dict[Key, int] = {}  # what it will pin, and the bytes of each
        self.waiter: Waiter | None = None
        self.waits = 0
        self.collected = False
        self.impatient = False


class Operation:
    """A context manager; see `DataCache.operation`."""

    __slots__ = ("__weakref__", "_order", "_table", "_use", "_workspace")

    def __init__(
        self,
        table: Table,
        scope: Scope,
        label: str,
        workspace: int,
        room: int,
        order: Sequence[Key] = (),
        pinned: bool = False,
    ) -> None:
        self._table = table
        self._workspace = workspace
        self._order = order
        self._use = Use(scope, label, threading.get_ident(), room, pinned)

    def __enter__(self) -> Operation:
        table, use = self._table, self._use
        request = _Request(use.scope, use.label, nested=_runs_here(table))
        request.operands = {key: key.estimate()[1] for key in dict.fromkeys(self._order)}
        # With one or two operands there is nothing to read ahead of.
        wants = list(request.operands.items()) if len(request.operands) > 2 else []
        if wants:
            table.pool.look_at_machine()

        def attempt(after: After) -> Verdict:
            if use.scope.closed:
                return CacheClosedError(
                    "this cache is closed: use the proxy without cache=, or with an open one"
                )
            verdict = _obtain(table, request, self._workspace, use.room, after)
            if verdict == "granted":
                self._admit(wants, after)
            return verdict

        _insist(table, request, attempt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unpin everything and give the workspace back. Does nothing the second time."""
        table, use = self._table, self._use
        table.section(lambda after: table.end_use(use, after))
        if use.stream is not None:
            table.pool.join_threads(timeout=1.0)

    def _admit(self, wants: list[tuple[Key, int]], after: After) -> None:
        table, use = self._table, self._use
        use.workspace = table.accounts.charge(use.scope, self._workspace, "workspace", use.label)
        ref = table.watch(UseRef, self)
        ref.use = use
        table.uses[use] = ref
        if self._order:
            use.schedule = Schedule(table.uses_clock, self._order)
            table.schedules.append(use.schedule)
            for key in dict.fromkeys(self._order):
                entry = table.entries.get(key) or table.resurrect(key)
                if entry is not None and entry.pins == 0:
                    entry.spent = False
                    table.file(entry, after)
        if wants:
            assert use.schedule is not None
            stream = Stream(use.scope, use.schedule, 0, contextvars.copy_context())
            for key, peak in wants:
                stream.want(key, peak)
            use.stream = stream
            table.streams[stream] = None

    def pin(self, keys: Iterable[Key]) -> list[Any]:
        """The data of ``keys``, in use until `unpin`: all of them, or an error and none.

        Loads what is missing, once however many threads ask. A key that is named several times is
        pinned once. Raises what reading raises.
        """
        table, use = self._table, self._use
        wanted = list(keys)
        distinct = list(dict.fromkeys(wanted))
        peaks: dict[Key, int] = {}
        request = _Request(use.scope, use.label, nested=True)
        while True:
            joined: list[tuple[Flight, Joiner]] = []
            hits: list[Key] = []
            unknown: list[Key] = []

            def attempt(
                after: After,
                joined: list[tuple[Flight, Joiner]] = joined,
                hits: list[Key] = hits,
                unknown: list[Key] = unknown,
            ) -> Verdict:
                joined.clear()
                hits.clear()
                unknown.clear()
                return self._try(distinct, peaks, request, joined, hits, unknown, after)

            _insist(table, request, attempt)
            if unknown:
                # Their headers are read outside the lock.
                peaks.update((key, key.estimate()[1]) for key in unknown)
                continue
            try:
                if self._fly(joined):
                    break
            except BaseException:
                self._let_go(hits, joined)
                raise
            self._let_go(hits, joined)
        return [use.entries[key].value for key in wanted]

    def _try(
        self,
        keys: list[Key],
        peaks: dict[Key, int],
        request: _Request,
        joined: list[tuple[Flight, Joiner]],
        hits: list[Key],
        unknown: list[Key],
        after: After,
    ) -> Verdict:
        table, use = self._table, self._use
        flying: list[Flight] = []
        missing: list[Key] = []
        for key in keys:
            entry = use.entries.get(key) or table.entries.get(key) or table.resurrect(key)
            if entry is not None:
                # Before room is made, so that none of them is a victim.
                table.pin(use, entry)
                hits.append(key)
            elif key in table.flights:
                flying.append(table.flights[key])
            else:
                missing.append(key)
        unknown.extend(key for key in missing if key not in peaks)
        verdict: Verdict = "granted"
        for flight in flying:
            if _leads_to(table, flight, request.thread):
                verdict = LoadCycleError(
                    f"the reader of {flight.key.name} asks, directly or through another thread, "
                    f"for the data that it is reading"
                )
        if missing and not unknown and verdict == "granted":
            need = sum(peaks[key] for key in missing)
            verdict = _obtain(table, request, need, 0, after)
        if verdict != "granted" or unknown:
            for key in hits:
                table.unpin(use, key, after, used=False)
            hits.clear()
            return verdict
        counters = use.scope.counters
        counters.hits += len(hits)
        counters.misses += len(flying) + len(missing)
        joined.extend((flight, table.pool.join(flight, use)) for flight in flying)
        for key in missing:
            flight = table.pool.open(key, peaks[key], use, None)
            joined.append((flight, table.pool.join(flight, use)))
            if key is missing[0]:
                flight.thread = request.thread
            else:
                # A pool thread may take it while the first is read here.
                flight.context = contextvars.copy_context()
                table.pool.queue.append(flight)
        return "granted"

    def _fly(self, joined: list[tuple[Flight, Joiner]]) -> bool:
        """Read, or wait for, every flight. False if one was abandoned: start again."""
        table, use = self._table, self._use
        me = threading.get_ident()
        complete = True
        # What nobody else reads first: meanwhile the others go on.
        for flight, _ in joined:
            with table.lock:
                mine = flight.thread == me or table.pool.take_over(flight, use)
            if mine:
                table.pool.read(flight)
        for flight, joiner in joined:
            cycle: list[bool] = []

            def block(after: After, flight: Flight = flight, cycle: list[bool] = cycle) -> None:
                if table.flights.get(flight.key) is flight:
                    if _leads_to(table, flight, me):
                        cycle.append(True)
                    else:
                        table.blocked[me] = flight
                        table.changed = True

            if joiner.outcome.empty():
                table.section(block)
            if cycle:
                raise LoadCycleError(
                    f"readers wait for each other in a circle, at {flight.key.name}"
                )
            outcome = joiner.outcome.get()
            if isinstance(outcome, AbandonedError):
                complete = False
            elif isinstance(outcome, Exception):
                try:
                    raise outcome if flight.use is use else error_for_another(outcome)
                finally:
                    del outcome  # its traceback has this frame: a cycle that would keep all of it
        return complete

    def _let_go(self, hits: list[Key], joined: list[tuple[Flight, Joiner]]) -> None:
        """Undo a pin that did not come about."""
        table, use = self._table, self._use

        def undo(after: After) -> None:
            table.blocked.pop(threading.get_ident(), None)
            for flight, _ in joined:
                if table.flights.get(flight.key) is flight:
                    table.pool.leave(flight, use)
                elif flight.key in use.counts:
                    hits.append(flight.key)
            for key in hits:
                if key in use.counts:
                    table.unpin(use, key, after, used=False)

        table.section(undo)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Let go of data that `pin` gave, once for each pin; their next planned use is over."""
        table, use = self._table, self._use

        def work(after: After) -> None:
            for key in dict.fromkeys(keys):
                table.unpin(use, key, after)

        table.section(work)

    def keep(self, result: Result, value: Any, cost: float) -> Any:
        """Make ``value`` the value of ``result``, charged until it dies, and return it read-only.

        ``cost`` is how much work computing it again would be; infinite if that is impossible, and
        then it is never evicted. The bytes come out of the workspace.
        """
        table, use = self._table, self._use
        if isinstance(value, np.ndarray):
            value = _buffers.readonly(value)
        nbytes = nbytes_of(value)

        def work(after: After) -> None:
            workspace = use.workspace
            if workspace is not None:
                left = max(0, workspace.nbytes - nbytes)
                table.accounts.recharge(workspace, nbytes=left)
            table.accounts.hold(value, nbytes, use.scope, result.name, "result")
            result.value = value
            if cost != float("inf") and nbytes:
                add_result(table, result, nbytes, cost, use.scope)
            shrink(table, use.scope, after, use.label)

        table.section(work)
        return value


def _runs_here(table: Table) -> bool:
    me = threading.get_ident()
    return any(use.thread == me and not use.pinned for use in list(table.uses))


def _leads_to(table: Table, flight: Flight, thread: int) -> bool:
    """Whether who reads ``flight`` waits, through any number of flights, for ``thread``."""
    seen: set[Flight] = set()
    while flight not in seen:
        seen.add(flight)
        if flight.thread == thread:
            return True
        blocked = None if flight.thread is None else table.blocked.get(flight.thread)
        if not isinstance(blocked, Flight):
            return False
        flight = blocked
    return True


def _insist(table: Table, request: _Request, attempt: Any) -> None:
    """Look at the table until ``attempt`` is granted. Called without the lock."""
    try:
        while True:
            verdicts: list[Verdict] = []

            def look(after: After, verdicts: list[Verdict] = verdicts) -> None:
                table.blocked.pop(request.thread, None)
                verdict = attempt(after)
                if verdict == "granted" or isinstance(verdict, Exception):
                    _leave_queue(table, request)
                else:
                    _queue(table, request)
                if verdict == "wait":
                    table.blocked[request.thread] = None
                    request.waits += 1
                    request.scope.counters.waits += request.waits == 1
                verdicts.append(verdict)

            table.section(look)
            verdict = verdicts[0]
            if verdict == "granted":
                return
            if isinstance(verdict, Exception):
                verdicts.clear()
                try:
                    raise verdict
                finally:
                    del verdict  # its traceback has this frame
            if verdict == "collect":
                gc.collect()
            elif verdict == "wait":
                assert request.waiter is not None
                try:
                    request.waiter.wake.get(timeout=table.wait_limit)
                except queue.Empty:
                    request.impatient = True
    except BaseException:

        def withdraw(after: After) -> None:
            table.blocked.pop(request.thread, None)
            _leave_queue(table, request)

        table.section(withdraw)
        raise


def _queue(table: Table, request: _Request) -> None:
    """Take a ticket, so that neither later requests nor prefetches get what is being freed."""
    if request.waiter is None:
        request.waiter = Waiter(request.thread)
        tickets = table.nested if request.nested else table.fresh
        tickets.append(weakref.ref(request.waiter))
    table.changed = True


def _leave_queue(table: Table, request: _Request) -> None:
    if request.waiter is not None:
        request.waiter.left = True
        request.waiter = None
        table.changed = True


def _my_turn(table: Table, request: _Request) -> bool:
    if request.nested:
        return True
    return table.first() in (None, request.waiter)


def _obtain(table: Table, request: _Request, need: int, room: int, after: After) -> Verdict:
    """Whether ``need`` bytes may be charged now; if not, begin what may lead there."""
    scope = request.scope
    if not need and not room:
        return "granted"
    if not _my_turn(table, request):
        return "wait"
    lacking = [
        (level, short) for level in scope.chain if (short := level.used + need - level.budget) > 0
    ]
    crowded = (
        []
        if request.nested
        else [
            (level, short)
            for level in scope.chain
            if (short := _crowd(table, level, need, room, request.operands)) > 0
        ]
    )
    if not lacking and not crowded:
        return "granted"
    others = table.helpers(request.thread) and not request.impatient
    for level, short in lacking:
        short -= table.dying(level) + after.garbage.dying(level)
        if short > 0 and (not others or evictable(level) >= short):
            make_room(table, level, short, after)
    for level, short in crowded:
        if not after.garbage.bytes:
            drop_results(level.tree(), short, after)
    if after.garbage.bytes:
        return "again"
    freed = [_cancel_prefetches(table, level, short) for level, short in lacking]
    if any(freed):
        return "again"
    if table.helpers(request.thread) and not request.impatient:
        return "wait"
    if not request.collected:
        request.collected = True
        return "collect"
    if any(level.strict for level in scope.chain):
        level, short = (lacking or crowded)[0]
        return BudgetExceededError(
            f"{request.label} needs {format_size(need + room)}, {format_size(short)} more than the "
            f"budget of {format_size(level.budget)} can give. {largest(table, level)}"
            f"Set a larger budget, or let go of data that you hold"
        )
    if lacking:
        count_overcommit(table, scope, request.label, need, after)
    return "granted"


def _crowd(table: Table, level: Scope, need: int, room: int, operands: dict[Key, int]) -> int:
    """By how much the admission of one more operation would be too much for ``level``."""
    rooms = [use.room for use in table.uses if level in use.scope.chain and not use.pinned]
    pinned = {
        entry
        for use in table.uses
        if use.pinned
        for entry in use.entries.values()
        if level in entry.owner.charge.scope.chain
    }
    fixed = level.by_kind["workspace"] + level.by_kind["held"]
    fixed += sum(entry.nbytes for entry in pinned)
    if operands and fixed + need + room > level.budget:
        # Operands that users hold are counted already, and take no more room.
        there = {entry.key for entry in pinned}
        there.update(
            key
            for key in operands.keys() & table.ghosts.keys()
            if table.ghosts[key].owner.charge in table.accounts.charges
        )
        room = min(room, sum(peak for key, peak in operands.items() if key not in there))
    return fixed + need + max([room, *rooms]) - level.budget


def _cancel_prefetches(table: Table, level: Scope, short: int) -> bool:
    """Cancel prefetches that nobody has joined, those wanted last first; True if bytes are free."""
    mine = [
        flight
        for flight in table.flights.values()
        if flight.prefetch and not flight.cancelled and level in flight.charge.scope.chain
    ]
    freed = False
    for flight in reversed(mine):
        if short <= 0:
            break
        short -= flight.charge.nbytes
        freed = freed or flight.thread is None
        table.pool.cancel(flight)
    return freed
