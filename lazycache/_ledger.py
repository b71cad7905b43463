"""Who goes next. Pure bookkeeping: no thread, no lock, no clock, no I/O, no data.

The life of a key in a `Ledger`:

1. An entry in use is in no ledger: it can't be a victim.
2. When its last user lets go, `put` files it under what is known of its future: ``spent`` (past its
   last use in the plan or loop that used it), ``unreferenced`` (no proxy refers to it),
   ``recent`` (it may be used again, nobody knows when), or ``planned`` (its next use is known).
3. `touch` makes it the most recently used of its kind.
4. `remove` takes it out, because it is in use again or gone.
5. `pop` names the next victim and takes it out: spent, from the loop or plan that has been quiet
   for longest on, and of each the most recently used first; then unreferenced, then recent, each
   from the least recently used on; then planned, from the farthest next use on.

A loop that comes again comes in the same order: what it has just passed is what the next round
wants last. So rounds over more data than fit keep some of them and read the rest again, where the
least recently used would be read every time just after it had gone.

Recency is kept by `cachetools.LRUCache`s weighed in bytes. They are unbounded themselves: the
cache decides when something must go, they decide which. `Schedule` turns the order in which keys
will be used into next uses.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, Literal, TypeAlias, TypeVar

from cachetools import LRUCache

K = TypeVar("K", bound=Hashable)

Tier = Literal["spent", "unreferenced", "recent", "planned"]

# The order in which tiers give victims.
TIERS: tuple[Tier, ...] = ("spent", "unreferenced", "recent", "planned")
# What a prefetch may take besides free bytes: data that nobody is known to want again.
IDLE: tuple[Tier, ...] = ("spent", "unreferenced")

# Stale heap entries that are tolerated before the heap is made anew, beyond as many live ones.
_STALE = 64


class _Recency(Generic[K]):
    """Keys from the least recently used on, weighed in bytes, with a look at the first."""

    __slots__ = ("_first", "_lru", "tier")

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._lru: LRUCache[K, int] = LRUCache(math.inf, getsizeof=int)
        # The least recently used key and its bytes once somebody looked: cachetools tells which
        # one it is only by giving it up.
        self._first: tuple[K, int] | None = None

    @property
    def nbytes(self) -> int:
        first = self._first
        return int(self._lru.currsize) + (0 if first is None else first[1])

    def add(self, key: K, nbytes: int) -> None:
        self._lru[key] = nbytes

    def touch(self, key: K) -> None:
        first = self._first
        if first is not None and first[0] is key:
            self._first = None
            self._lru[key] = first[1]
        else:
            self._lru[key]

    def discard(self, key: K) -> None:
        if self._first is not None and self._first[0] is key:
            self._first = None
        else:
            del self._lru[key]

    def peek(self) -> K | None:
        if self._first is None:
            if not len(self._lru):
                return None
            self._first = self._lru.popitem()
        return self._first[0]


class _Rounds(Generic[K]):
    """Keys that rounds have passed, weighed in bytes: the latest of the quietest round first."""

    __slots__ = ("_round_of", "_rounds", "nbytes")

    tier: Tier = "spent"

    def __init__(self) -> None:
        # Rounds from the quietest on, each with its keys and their bytes in the order of their use.
        self._rounds: OrderedDict[Hashable, dict[K, int]] = OrderedDict()
        self._round_of: dict[K, Hashable] = {}
        self.nbytes = 0

    def add(self, key: K, nbytes: int, of: Hashable) -> None:
        self._round_of[key] = of
        self._rounds.setdefault(of, {})[key] = nbytes
        self._rounds.move_to_end(of)
        self.nbytes += nbytes

    def touch(self, key: K) -> None:
        of = self._round_of[key]
        keys = self._rounds[of]
        keys[key] = keys.pop(key)
        self._rounds.move_to_end(of)

    def discard(self, key: K) -> None:
        of = self._round_of.pop(key)
        keys = self._rounds[of]
        self.nbytes -= keys.pop(key)
        if not keys:
            del self._rounds[of]

    def peek(self) -> K | None:
        for keys in self._rounds.values():
            return next(reversed(keys))
        return None


class _NextUse(Generic[K]):
    """Keys from the farthest next use on, weighed in bytes: a heap with stale entries."""

    __slots__ = ("_heap", "_live", "_serial", "nbytes")

    tier: Tier = "planned"

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, K]] = []
        self._live: dict[K, tuple[int, int, int]] = {}  # key → (-next use, serial, nbytes)
        self._serial = 0
        self.nbytes = 0

    def add(self, key: K, nbytes: int, next_use: int) -> None:
        self._serial += 1
        self._live[key] = (-next_use, self._serial, nbytes)
        self.nbytes += nbytes
        if len(self._heap) > 2 * len(self._live) + _STALE:
            self._heap = [(use, serial, k) for k, (use, serial, _) in self._live.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (-next_use, self._serial, key))

    def touch(self, key: K) -> None:
        """A use that wasn't planned changes nothing of the plan."""

    def discard(self, key: K) -> None:
        self.nbytes -= self._live.pop(key)[2]

    def next_use(self, key: K) -> int:
        return -self._live[key][0]

    def peek(self) -> K | None:
        while self._heap:
            _, serial, key = self._heap[0]
            live = self._live.get(key)
            if live is not None and live[1] == serial:
                return key
            heapq.heappop(self._heap)
        return None


_Kind: TypeAlias = _Rounds[K] | _Recency[K] | _NextUse[K]


class Ledger(Generic[K]):
    """The entries of one scope that nobody is using, in the order in which they would go."""

    __slots__ = ("_kinds", "_next_use", "_recency", "_spent", "_where")

    def __init__(self) -> None:
        self._spent: _Rounds[K] = _Rounds()
        self._recency: dict[Tier, _Recency[K]] = {
            tier: _Recency(tier) for tier in ("unreferenced", "recent")
        }
        self._next_use: _NextUse[K] = _NextUse()
        self._kinds: dict[Tier, _Kind[K]] = {
            "spent": self._spent,
            **self._recency,
            "planned": self._next_use,
        }
        self._where: dict[K, _Kind[K]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: K) -> bool:
        return key in self._where

    @property
    def nbytes(self) -> int:
        """The bytes of all entries that could go."""
        return sum(kind.nbytes for kind in self._kinds.values())

    def put(
        self, key: K, nbytes: int, tier: Tier, next_use: int | None = None, of: Hashable = None
    ) -> None:
        """File an entry that nobody uses any more.

        ``next_use`` goes with ``planned``; ``of``, the loop or plan that has passed it, with
        ``spent``. Without it the entry stands alone.
        """
        self.remove(key)
        self._where[key] = self._kinds[tier]
        if tier == "planned":
            assert next_use is not None
            self._next_use.add(key, nbytes, next_use)
        elif tier == "spent":
            self._spent.add(key, nbytes, key if of is None else of)
        else:
            self._recency[tier].add(key, nbytes)

    def touch(self, key: K) -> None:
        """The entry was used: it becomes the most recent of its tier. Unknown keys are ignored."""
        kind = self._where.get(key)
        if kind is not None:
            kind.touch(key)

    def remove(self, key: K) -> bool:
        """Take an entry out; False if it isn't here."""
        kind = self._where.pop(key, None)
        if kind is None:
            return False
        kind.discard(key)
        return True

    def tier(self, key: K) -> Tier | None:
        kind = self._where.get(key)
        return None if kind is None else kind.tier

    def peek(self, tiers: Iterable[Tier] = TIERS) -> tuple[int, K] | None:
        """(rank of its tier, key) of the next victim among ``tiers``, or None."""
        for tier in tiers:
            key = self._kinds[tier].peek()
            if key is not None:
                return TIERS.index(tier), key
        return None

    def pop(self, tiers: Iterable[Tier] = TIERS) -> K | None:
        """The next victim, taken out; None if there is none."""
        found = self.peek(tiers)
        if found is None:
            return None
        self.remove(found[1])
        return found[1]

    def farthest(self) -> tuple[int, K] | None:
        """(next use, key) of the planned entry that is wanted last, or None."""
        key = self._next_use.peek()
        return None if key is None else (self._next_use.next_use(key), key)

    def check(self) -> None:
        """Assert that every part tells the same story; for tests."""
        seen: dict[K, Tier] = dict.fromkeys(self._next_use._live, "planned")
        seen.update(dict.fromkeys(self._spent._round_of, "spent"))
        assert not self._spent._round_of.keys() & self._next_use._live.keys()
        rounds = self._spent._rounds
        assert {key: of for of, keys in rounds.items() for key in keys} == self._spent._round_of
        assert all(rounds.values())
        assert self._spent.nbytes == sum(sum(keys.values()) for keys in rounds.values())
        for tier, recency in self._recency.items():
            keys = list(recency._lru)
            if recency._first is not None:
                keys.append(recency._first[0])
            for key in keys:
                assert key not in seen, f"{key!r} is filed twice"
                seen[key] = tier
        assert seen == {key: kind.tier for key, kind in self._where.items()}
        assert self._next_use.nbytes == sum(n for _, _, n in self._next_use._live.values())


class Schedule(Generic[K]):
    """When the keys of a plan or a loop will be used, on a clock that its owner moves on.

    Positions count from ``start``, the owner's clock at the time the schedule was made, so that
    the next uses of several schedules can be compared.
    """

    __slots__ = ("_end", "_uses")

    def __init__(self, start: int, keys: Iterable[K] = ()) -> None:
        self._end = start
        self._uses: dict[K, deque[int]] = {}
        for key in keys:
            self.append(key)

    def append(self, key: K) -> int:
        """One more use, after all others; gives its position."""
        self._end += 1
        self._uses.setdefault(key, deque()).append(self._end)
        return self._end

    def advance(self, key: K) -> bool:
        """The first of the known uses of ``key`` is over; True if it was the last one known."""
        uses = self._uses.get(key)
        if uses is None:
            return False
        uses.popleft()
        if uses:
            return False
        del self._uses[key]
        return True

    def next_use(self, key: K) -> int | None:
        uses = self._uses.get(key)
        return uses[0] if uses else None

    def use_after(self, key: K, position: int) -> int | None:
        """The first use of ``key`` after ``position``, or None."""
        return next((use for use in self._uses.get(key, ()) if use > position), None)

    def remaining(self) -> list[K]:
        """The keys that have uses left."""
        return list(self._uses)
