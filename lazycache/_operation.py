"""An operation: everything that it needs, in one request, or nothing.

An operation is admitted before it reads anything. It brings a *workspace* (the most bytes that its
intermediates and results take at once), which is charged for its whole length, and a *room* (the
most bytes of operands that it pins at once), which isn't charged but must be obtainable: at each
level of its scope, the workspaces of all operations, what users hold and the largest room among
them fit the budget together. So when every admitted operation waits, none has operands pinned, all
operands can be evicted, and the one whose turn it is goes on. Then it pins its operands step by
step.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import _buffers
from ._cycles import PATIENCE, is_alive, leads_to, served, waits_for
from ._flight import AbandonedError, Flight, Joiner, error_for_another
from ._ledger import Schedule
from ._records import After, Entry, Scope, Stream, Use
from ._request import Request, Verdict, insist, obtain
from ._table import Table
from ._victims import add_result, shrink
from .errors import CacheClosedError, LoadCycleError
from .sizes import nbytes_of
from .source import Key, Result


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
        request = Request(use.scope, use.label, nested=runs_here(table))
        request.operands = {key: key.estimate()[1] for key in dict.fromkeys(self._order)}
        # With one or two operands there is nothing to read ahead of.
        wants = list(request.operands.items()) if len(request.operands) > 2 else []
        table.pool.look_at_machine()

        def attempt(after: After) -> Verdict:
            if use.scope.closed:
                return CacheClosedError(
                    "this cache is closed: use the proxy without cache=, or with an open one"
                )
            verdict = obtain(table, request, self._workspace, use.room, after)
            if verdict == "granted":
                self._admit(wants, after)
            return verdict

        insist(table, request, attempt)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unpin everything and give the workspace back. Does nothing the second time."""
        table, use = self._table, self._use
        table.soon(lambda after: table.end_use(use, after))
        if use.stream is not None:
            table.pool.join_threads(timeout=1.0)

    def _admit(self, wants: list[tuple[Key, int]], after: After) -> None:
        table, use = self._table, self._use
        use.workspace = table.accounts.charge(use.scope, self._workspace, "workspace", use.label)
        table.uses[use] = table.watch(use, self)
        if self._order:
            use.schedule = Schedule(table.uses_clock, self._order)
            table.schedules.append(use.schedule)
            for key in dict.fromkeys(self._order):
                # What was evicted and is held outside is taken back when it is pinned: here it
                # would lie idle, over the budget perhaps, once its holder lets go.
                entry = table.entries.get(key)
                if entry is not None and entry.pins == 0:
                    entry.spent = None
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
        request = Request(use.scope, use.label, nested=True)
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

            insist(table, request, attempt)
            if unknown:
                # Their headers are read outside the lock.
                peaks.update((key, key.estimate()[1]) for key in unknown)
                table.pool.look_at_machine()
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
        request: Request,
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
            if leads_to(table, flight, request.thread):
                verdict = _cycle_at(flight)
        if missing and not unknown and verdict == "granted":
            need = sum(peaks[key] for key in missing)
            verdict = obtain(table, request, need, 0, after)
        if verdict != "granted" or unknown:
            for key in hits:
                table.unpin(use, key, after, used=False)
            hits.clear()
            return verdict
        counters = use.scope.counters
        counters.hits += len(hits)
        counters.misses += len(flying) + len(missing)
        counters.joins += len(flying)
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
                    if leads_to(table, flight, me):
                        cycle.append(True)
                    else:
                        table.blocked[me] = flight
                        table.changed = True

            if joiner.outcome.empty():
                table.section(block)
            if cycle:
                raise _cycle_at(flight)
            outcome = self._outcome(flight, joiner)
            if isinstance(outcome, AbandonedError):
                complete = False
            elif isinstance(outcome, Exception):
                try:
                    raise outcome if flight.use is use else error_for_another(outcome)
                finally:
                    del outcome  # its traceback has this frame: a cycle that would keep all of it
        return complete

    def _outcome(self, flight: Flight, joiner: Joiner) -> Entry | Exception:
        """Wait for the end of a flight, unless it can't come."""
        table, patience = self._table, PATIENCE
        while True:
            try:
                return joiner.outcome.get(timeout=patience)
            except queue.Empty:
                reader = flight.thread
            if reader is not None and waits_for(table, reader, joiner.thread):
                raise _cycle_at(flight)
            if reader is not None and not is_alive(reader):
                # Not even settling went well, for want of memory.
                table.section(lambda after: table.pool.abandon(flight))
            patience = min(2 * patience, 10 * PATIENCE)

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

        table.soon(undo)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Let go of data that `pin` gave, once for each pin; their next planned use is over."""
        table, use = self._table, self._use

        def work(after: After) -> None:
            for key in dict.fromkeys(keys):
                table.unpin(use, key, after)

        table.soon(work)

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
            reserved = 0 if workspace is None else workspace.nbytes
            if workspace is not None:
                table.accounts.recharge(workspace, nbytes=max(0, reserved - nbytes))
            table.accounts.hold(value, nbytes, use.scope, result.name, "result")
            result.value = value
            if cost != float("inf") and nbytes:
                add_result(table, result, nbytes, cost, use.scope)
            # What came out of the workspace takes nothing more: if the budget is exceeded all the
            # same, it has shrunk since.
            shrink(table, use.scope, after, use.label if nbytes > reserved else None)

        table.section(work)
        return value


def runs_here(table: Table) -> bool:
    here = threading.get_ident(), served.get()
    return any(use.thread in here and not use.pinned for use in list(table.uses))


def _cycle_at(flight: Flight) -> LoadCycleError:
    return LoadCycleError(
        f"the reader of {flight.key.name} asks, directly or through other readers and threads, for "
        f"the data that it is reading"
    )
