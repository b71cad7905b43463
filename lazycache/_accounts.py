"""Who is charged for which bytes. Guarded by the lock of the table that it belongs to.

Bytes belong to the object whose death frees them, the *owner* of the memory, and stay charged until
it dies, whoever keeps it alive. What isn't there yet (a load under way, the workspace of an
operation) is charged under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _buffers
from ._records import KINDS, Charge, Kind, Owner, Ref, Scope
from .stats import Reason


class Accounts:
    """The charges of a tree of scopes; ``watch`` is the method of its table."""

    def __init__(self, watch: Callable[[Owner, Any], Ref]) -> None:
        self._watch = watch
        self.charges: set[Charge] = set()
        self.owners: dict[int, Owner] = {}
        self.released = False  # bytes were given back; whoever waits for some should look again

    def charge(self, scope: Scope, nbytes: int, kind: Kind, name: str) -> Charge:
        charge = Charge(scope, nbytes, kind, name)
        self.charges.add(charge)
        for level in scope.chain:
            self._add(level, nbytes, kind)
        return charge

    def discharge(self, charge: Charge) -> None:
        self.charges.discard(charge)
        for level in charge.scope.chain:
            self._add(level, -charge.nbytes, charge.kind)
        self.released = True

    def recharge(
        self, charge: Charge, *, nbytes: int | None = None, kind: Kind | None = None
    ) -> None:
        """Change how much a charge is, or what for."""
        for level in charge.scope.chain:
            self._add(level, -charge.nbytes, charge.kind, peak=False)
        if nbytes is not None:
            self.released = self.released or nbytes < charge.nbytes
            charge.nbytes = nbytes
        if kind is not None:
            charge.kind = kind
        for level in charge.scope.chain:
            self._add(level, charge.nbytes, charge.kind)

    @staticmethod
    def _add(level: Scope, nbytes: int, kind: Kind, peak: bool = True) -> None:
        level.used += nbytes
        level.by_kind[kind] += nbytes
        if peak and level.used > level.peak:
            level.peak = level.used

    def track(self, value: Any, nbytes: int, scope: Scope, kind: Kind, name: str) -> Owner:
        """The owner of ``value``'s memory, charged until it dies; ``nbytes`` if it is new."""
        holder = _buffers.owner_of(value)
        ident = id(holder)
        known = self.owners.get(ident)
        if known is not None and known.ref is not None and known.ref() is holder:
            return known
        owner = Owner(self.charge(scope, nbytes, kind, name), ident)
        try:
            owner.ref = self._watch(owner, holder)
        except TypeError:
            return owner
        self.owners[ident] = owner
        return owner

    def hold(self, value: Any, nbytes: int, scope: Scope, name: str, made: Reason) -> None:
        """Charge what was computed or made in memory until it dies."""
        owner = self.track(value, nbytes, scope, "held", name)
        if owner.ref is None:
            # Nobody would tell when it is gone. Such values are small: numbers and the like.
            scope.counters.untracked_bytes += owner.charge.nbytes
            self.discharge(owner.charge)
        elif owner.charge.kind == "held":
            owner.charge.made = made

    def bury(self, owner: Owner) -> None:
        """An owner is dead: its bytes are free."""
        if self.owners.get(owner.ident) is owner:
            del self.owners[owner.ident]
        if owner.charge in self.charges:
            self.discharge(owner.charge)

    def add_up(self, scopes: list[Scope], charges: set[Charge]) -> None:
        """Make the sums of ``scopes`` again, of ``charges`` and nothing else."""
        self.charges = charges
        for scope in scopes:
            scope.used = 0
            scope.by_kind = dict.fromkeys(KINDS, 0)
        for charge in charges:
            for level in charge.scope.chain:
                self._add(level, charge.nbytes, charge.kind)
