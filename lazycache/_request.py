"""Asking for memory: when a request is met, what it may send away, and when it waits.

A request waits only while some thread runs that will release something: another operation that
isn't waiting itself, somebody who is about to free a victim, a read by a pool thread. When there is
none, and after one garbage collection, it goes on over the budget (an overcommit), or, in a strict
cache, raises.
"""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Literal

from ._holders import count_overcommit, largest
from ._records import After, Scope, Waiter
from ._table import Table
from ._victims import drop_results, evictable, make_room
from .errors import BudgetExceededError
from .sizes import format_size
from .source import Key

Verdict = Literal["granted", "again", "collect", "wait"] | Exception


class Request:
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


def insist(table: Table, request: Request, attempt: Callable[[After], Verdict]) -> None:
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

        table.soon(withdraw)
        raise


def _queue(table: Table, request: Request) -> None:
    """Take a ticket, so that neither later requests nor prefetches get what is being freed."""
    if request.waiter is None:
        request.waiter = Waiter(request.thread)
        tickets = table.nested if request.nested else table.fresh
        # Before the one of a wait that this, a signal handler or finalizer, interrupted.
        there = [waiter for ref in tickets if (waiter := ref()) is not None and not waiter.left]
        inner = any(waiter.thread == request.thread for waiter in there)
        (tickets.appendleft if inner else tickets.append)(weakref.ref(request.waiter))
    table.changed = True


def _leave_queue(table: Table, request: Request) -> None:
    if request.waiter is not None:
        request.waiter.left = True
        request.waiter = None
        table.changed = True


def _my_turn(table: Table, request: Request) -> bool:
    if request.nested:
        return True
    first = table.first()
    # Its own thread's: this is a signal handler, or a finalizer, that interrupted that wait.
    return first is None or first is request.waiter or first.thread == request.thread


def obtain(table: Table, request: Request, need: int, room: int, after: After) -> Verdict:
    """Whether ``need`` bytes may be charged now; if not, begin what may lead there."""
    scope = request.scope
    if not need and not room:
        return "granted"
    if not _my_turn(table, request):
        return "wait"
    table.pool.evict_for_machine(need, after)
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
        return "again" if after.garbage.bytes else "granted"
    others = table.helpers(request.thread) and not request.impatient
    for level, short in lacking:
        short -= table.dying(level) + after.garbage.dying(level)
        if short > 0 and (not others or evictable(level) >= short):
            make_room(table, level, short, after, requested=True)
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
        if flight.stream is not None:
            flight.stream.spare += flight.charge.nbytes
        freed = freed or flight.thread is None
        table.pool.cancel(flight)
    return freed
