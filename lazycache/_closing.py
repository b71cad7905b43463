"""The end of a scope, which may come in any order and while others are at work in it."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from ._records import KINDS, After, Scope

if TYPE_CHECKING:
    from ._table import Table


def close_scope(table: Table, scope: Scope, after: After) -> None:
    """End a scope: what is only cached goes, what is in use or held moves to its parent."""
    if not scope.closed:
        scope.closed = True
        finish_closing(table, scope, after)


def finish_closing(table: Table, scope: Scope, after: After) -> None:
    """What is left to do for a closed scope. Each step may be done again after an interrupt."""
    for stream in [s for s in table.streams if s.scope is scope]:
        table.close_stream(stream, after)
    for entry in [e for e in table.entries.values() if e.scope is scope]:
        if entry.pins == 0:
            table.detach(entry, after)
    parent = scope.parent
    if parent is None:
        return
    parent.results.extend(scope.results)
    heapq.heapify(parent.results)
    parent.results_nbytes += scope.results_nbytes
    scope.results, scope.results_nbytes = [], 0
    for charge in table.accounts.charges:
        if charge.scope is scope:
            charge.scope = parent
    for entry in table.entries.values():
        if entry.scope is scope:
            entry.scope = parent
    for use in table.uses:
        if use.scope is scope:
            use.scope = parent
            for entry in use.entries.values():
                if entry.scope is scope:
                    entry.scope = parent
    scope.used, scope.by_kind = 0, dict.fromkeys(KINDS, 0)
    # Its own too: a request that still waits in it goes on with the levels around it.
    for inner in scope.tree():
        inner.chain = tuple(level for level in inner.chain if level is not scope)
    for child in scope.children:
        child.parent = parent
    # Before it leaves the tree: who adds up the counters of a tree without the lock finds a closed
    # scope in it, or another tree than before, and starts again.
    if scope.counting:
        scope.counting = False
        parent.counters.add(scope.counters)
    # Last, because this is how an interrupted closing is found.
    parent.children = [c for c in parent.children if c is not scope] + scope.children
    scope.children = []
    table.changed = True
