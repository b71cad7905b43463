"""Which data leave when room is needed, across the scopes of a level.

Each scope has a ledger of its own entries. The next victim of a level is the one that goes first
among the first of each ledger in it; computed results go after every file, the cheapest first.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ._holders import count_overcommit
from ._ledger import TIERS, Tier
from ._records import After, Scope
from .source import Key, Result
from .stats import Event

if TYPE_CHECKING:
    from ._table import Table


def evictable(level: Scope) -> int:
    """The bytes of ``level`` that could be given up, if nobody outside holds them."""
    return sum(scope.ledger.nbytes + scope.results_nbytes for scope in level.tree())


def make_room(
    table: Table,
    level: Scope,
    short: int,
    after: After,
    tiers: Iterable[Tier] = TIERS,
    later_than: int | None = None,
    requested: bool = False,
) -> int:
    """Detach victims of ``level`` until ``short`` bytes are on their way out.

    ``requested`` says that an operation needs them now. Returns the bytes that are still missing.
    """
    tiers = tuple(tiers)
    scopes = level.tree()
    while short > 0:
        found = _victim(table, scopes, tiers, later_than)
        if found is None:
            break
        entry = table.entries[found]
        entry.scope.counters.evictions += 1
        entry.scope.counters.evicted_bytes += entry.nbytes
        after.events.append((entry.scope, Event("evict", entry.key.name, entry.nbytes)))
        short -= entry.nbytes
        if requested and entry.unasked is not None:
            entry.unasked.spare += entry.nbytes
        table.detach(entry, after)
    if tiers == TIERS and later_than is None:
        short = drop_results(scopes, short, after)
    return short


def _victim(
    table: Table, scopes: list[Scope], tiers: tuple[Tier, ...], later_than: int | None
) -> Key | None:
    best: tuple[int, int, Key] | None = None
    for scope in scopes:
        found = scope.ledger.peek(tiers)
        if found is None:
            continue
        rank, key = found
        if TIERS[rank] == "planned":
            farthest = scope.ledger.farthest()
            assert farthest is not None
            if later_than is not None and farthest[0] <= later_than:
                continue
            order = -farthest[0]
        else:
            order = table.entries[key].stamp
        if best is None or (rank, order) < best[:2]:
            best = (rank, order, key)
    return None if best is None else best[2]


def add_result(table: Table, result: Result, nbytes: int, cost: float, scope: Scope) -> None:
    """``result`` may be evicted from now on; ``cost`` is how much work making it again would be."""
    table.serial += 1
    heapq.heappush(scope.results, (cost, table.serial, weakref.ref(result), nbytes))
    scope.results_nbytes += nbytes
    count = len(scope.results)
    if count >= 64 and count & (count - 1) == 0:
        # Results whose makers are gone leave the heap now and then, so that it doesn't grow.
        scope.results = [item for item in scope.results if item[2]() is not None]
        heapq.heapify(scope.results)
        scope.results_nbytes = sum(item[3] for item in scope.results)


def drop_results(scopes: list[Scope], short: int, after: After) -> int:
    """Evict computed results, the cheapest first, until ``short`` bytes are on their way out.

    Returns the bytes that are still missing.
    """
    while short > 0:
        scope = min(
            (scope for scope in scopes if scope.results),
            key=lambda scope: scope.results[0][0],
            default=None,
        )
        if scope is None:
            break
        _, _, ref, nbytes = heapq.heappop(scope.results)
        scope.results_nbytes -= nbytes
        result = ref()
        value = None if result is None else result.evict()
        if value is None:
            continue
        assert result is not None
        after.garbage.values.append(value)
        after.garbage.bytes.append((scope, nbytes))
        scope.counters.evictions += 1
        scope.counters.evicted_bytes += nbytes
        after.events.append((scope, Event("evict", result.name, nbytes)))
        short -= nbytes
    return short


def shrink(table: Table, scope: Scope, after: After, label: str | None = None) -> None:
    """Evict until every level fits its budget again, or nothing more can go.

    What is evicted may be held outside and free nothing, which shows once it is dropped: then the
    section that follows looks again. What is over in the end is an overcommit of ``label``.
    """
    for level in scope.chain:
        short = level.used - table.dying(level) - after.garbage.dying(level) - level.budget
        make_room(table, level, short, after)
    if after.garbage.bytes:
        after.shrinking.append((scope, label))
    elif label is not None:
        count_overcommit(table, scope, label, 0, after)
