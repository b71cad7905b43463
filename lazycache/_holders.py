"""Who holds the bytes of a budget, and what is said when there are too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._records import After, Charge, Scope
from .sizes import format_size
from .stats import Event, Holder, Reason

if TYPE_CHECKING:
    from ._table import Table


def count_overcommit(table: Table, scope: Scope, label: str, need: int, after: After) -> None:
    """Count one if some level of ``scope`` holds more than its budget with ``need`` added."""
    for level in scope.chain:
        short = level.used + need - level.budget
        short -= table.dying(level) + after.garbage.dying(level)
        if short <= 0:
            continue
        level.counters.overcommits += 1
        after.events.append((level, Event("overcommit", label, short)))
        if not level.warned:
            level.warned = True
            after.warnings.append(
                f"{label} needs {format_size(short)} more than the budget of "
                f"{format_size(level.budget)} has left, and nothing more can be freed. "
                f"{largest(table, level)}Set a larger budget, or let go of data that you hold"
            )
        return


def holders(table: Table, level: Scope) -> list[Holder]:
    """Who holds the bytes of ``level``, the largest first."""
    using: dict[Charge, Reason] = {}
    for use in table.uses:
        for entry in use.entries.values():
            using[entry.owner.charge] = "pinned()" if use.pinned else "operation"
    found = []
    for charge in table.accounts.charges:
        if level not in charge.scope.chain or not charge.nbytes:
            continue
        found.append(Holder(charge.name, charge.nbytes, using.get(charge) or charge.reason()))
    return sorted(found, key=lambda holder: -holder.nbytes)


def largest(table: Table, level: Scope, count: int = 5) -> str:
    """A sentence about the largest holders of what can't be freed; nothing if there are none."""
    held = [holder for holder in holders(table, level) if holder.reason != "cached"][:count]
    return f"Held are {'; '.join(map(str, held))}. " if held else ""
