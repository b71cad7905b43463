"""Keeping a table whole: after an interrupt, in a forked child, and, as assertions, in tests."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ._closing import finish_closing
from ._ledger import Ledger
from ._records import KINDS, After, Charge, Entry

if TYPE_CHECKING:
    from ._table import Table


def after_fork(table: Table) -> None:
    """Make this table whole in a child process, where only the calling thread lives on.

    What was loaded stays, what other threads were reading or doing is forgotten. A section that
    this thread is in, where a signal handler forked, goes on before.
    """
    if not table.inside():
        table.lock = threading.RLock()
        table.torn = True  # by the section of another thread, perhaps
    table.soon(lambda after: _forget_threads(table, after))


def _forget_threads(table: Table, after: After) -> None:
    me = threading.get_ident()
    table.pool.after_fork()
    for flight in list(table.flights.values()):
        if flight.thread != me:
            flight.joiners = [joiner for joiner in flight.joiners if joiner.thread == me]
            table.pool.abandon(flight)
    for use in list(table.uses):
        if use.thread != me and not use.pinned:
            table.end_use(use, after)
    for stream in table.streams:
        stream.wanted.clear()  # until a loop goes on here: a child that doesn't reads nothing
    table.blocked = {thread: awaited for thread, awaited in table.blocked.items() if thread == me}
    table.garbage.clear()
    for tickets in (table.nested, table.fresh):
        for ref in list(tickets):
            waiter = ref()
            if waiter is None or waiter.thread != me:
                tickets.remove(ref)
            else:
                waiter.wake.put(None)  # nobody else is left to do that


def repair(table: Table, after: After) -> None:
    """Make all that is derived again from the charges, the entries and the uses."""
    table.pool.finish_ended()
    # The news of a death may have been lost on its way; hearing it twice does nothing.
    refs: list[Any] = [owner.ref for owner in table.accounts.owners.values()]
    refs += [*table.uses.values(), *table.streams.values()]
    table.dead.extend(ref for ref in refs if ref is not None and ref() is None)
    kept: set[Charge] = {use.workspace for use in table.uses if use.workspace is not None}
    kept.update(owner.charge for owner in table.accounts.owners.values())
    kept.update(flight.charge for flight in table.flights.values())
    kept.update(entry.owner.charge for entry in table.entries.values())
    kept.update(e.owner.charge for use in table.uses for e in use.entries.values())
    pinned: dict[Entry, int] = {}
    for use in table.uses:
        # An entry without a count, or a count without an entry, was about to be added or removed.
        use.counts = {key: max(1, use.counts.get(key, 1)) for key in use.entries}
        for key, entry in use.entries.items():
            pinned[entry] = pinned.get(entry, 0) + use.counts[key]
    for owner in table.accounts.owners.values():
        owner.entries = 0
    for entry in {*table.entries.values(), *pinned}:
        entry.owner.entries += 1
        entry.pins = pinned.get(entry, 0)
    for owner in table.accounts.owners.values():
        owner.charge.kind = "entry" if owner.entries else "held"
    scopes = table.root.tree()
    for scope in scopes:
        scope.ledger = Ledger()
        scope.results_nbytes = sum(item[3] for item in scope.results)
    table.accounts.add_up(scopes, kept)
    for entry in sorted(table.entries.values(), key=lambda entry: entry.stamp):
        if table.dead not in entry.key.watchers:
            entry.key.watchers.append(table.dead)
        if entry.pins == 0:
            table.file(entry, after)
    for scope in scopes:
        if scope.closed:
            finish_closing(table, scope, after)
    table.changed = True


def check(table: Table) -> None:
    """Assert every invariant; for tests. Called without the lock."""
    table.section(lambda after: _check(table))


def _check(table: Table) -> None:
    for scope in table.root.tree():
        for kind in KINDS:
            inside = [c for c in table.accounts.charges if scope in c.scope.chain]
            total = sum(charge.nbytes for charge in inside if charge.kind == kind)
            assert scope.by_kind[kind] == total, (kind, scope.by_kind[kind], total)
        assert scope.used == sum(scope.by_kind.values())
        assert scope.used <= scope.peak
        scope.ledger.check()
    pins: dict[Entry, int] = {}
    for use in table.uses:
        assert use.counts.keys() == use.entries.keys()
        for key, entry in use.entries.items():
            pins[entry] = pins.get(entry, 0) + use.counts[key]
    for key, entry in table.entries.items():
        assert entry.key is key
        assert entry.value is not None
        assert entry.pins == pins.get(entry, 0), (key.name, entry.pins)
        assert (key in entry.scope.ledger) == (entry.pins == 0), key.name
        assert entry.owner.charge in table.accounts.charges
        assert entry.owner.charge.kind == "entry"
        assert key not in table.flights
        assert key not in table.ghosts
    filed = sum(len(scope.ledger) for scope in table.root.tree())
    assert filed == sum(entry.pins == 0 for entry in table.entries.values())
    for flight in table.flights.values():
        assert flight.charge in table.accounts.charges
        assert flight.charge.kind == "flight"
    for owner in table.accounts.owners.values():
        assert owner.charge in table.accounts.charges
        assert owner.ref is not None
    for awaited in table.blocked.values():
        assert awaited is None or table.flights.get(awaited.key) is awaited
