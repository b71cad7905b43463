"""`DataCache`: data under a byte budget, and the scopes that share one.

Every `DataCache` is a scope: a budget and a label. Scopes that are entered with ``with`` inside one
another share one table of data, so that a file is read once for all of them, and what one uses
counts against the budgets of all that enclose it. Who may free what, and when a request waits, is
in ``_table`` and ``_operation``; reading in ``_pool``; the order of victims in ``_ledger``.
"""

from __future__ import annotations

import atexit
import contextvars
import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import _buffers, config, memory
from ._closing import close_scope
from ._frames import warn
from ._holders import holders
from ._integrity import after_fork, check
from ._operation import Operation, runs_here
from ._preloading import Preloading
from ._records import After, Scope
from ._table import Table, busy
from ._victims import drop_results, shrink
from .errors import CacheClosedError, FileChangedWarning
from .sizes import format_size, nbytes_of
from .source import FileKey, Handle, Key, keys_of
from .stats import COUNTERS, CacheStats, Event, Holder

Budget = int | float | str


class _ScopeRef(weakref.ref["DataCache"]):
    """An entered scope, and the one around it.

    Weak: the block keeps its scope alive, and one that an interrupt left without calling
    ``__exit__`` ends with its last reference.
    """

    __slots__ = ("around",)
    around: _ScopeRef | None


_scope: contextvars.ContextVar[_ScopeRef | None] = contextvars.ContextVar("lazycache", default=None)
_tables: weakref.WeakSet[Table] = weakref.WeakSet()
# How often counters are read again when a scope closes meanwhile.
_LOOKS = 100
# Guards the making of tables and of the global cache; reentrant, because a finalizer that runs
# inside may use a cache.
_making = threading.RLock()
_global: DataCache | None = None
_process = os.getpid()


class DataCache:
    """Data of many files, under a budget of bytes.

    ``budget`` is a number of bytes, a size (``"4GiB"``), a share of what the machine, the cgroup
    or the job really leaves to this process (``"50%"``, ``0.5``), or ``"auto"``: half of that.
    Shrinking `budget` evicts at once. When more is needed than can be freed, a ``strict`` cache
    raises `BudgetExceededError`; another goes over its budget, counts it (``overcommits``) and
    warns once.

    Used with ``with``, it becomes a scope inside the one that is open (or inside the global cache):
    proxies used in the block are charged to it and to all scopes around it, and at the end what it
    cached is given back, while data that are in use or held outside move to the enclosing scope.
    A cache that is never entered stands alone, for proxies made with ``cache=``.
    """

    def __init__(self, budget: Budget = "auto", *, strict: bool = False) -> None:
        self._asked = memory.resolve_budget(budget)
        # The share that the budget is of the memory, if any, and for which process it was found.
        self._share = budget if memory.is_share(budget) else None
        self._process = _process
        self._strict = strict
        # Set together, once, by `_bind`; read without a lock.
        self._table: Table | None = None
        self._in: Scope | None = None
        self._outer: DataCache | None = None

    # Scopes

    def _bind(self, outer: DataCache | None = None) -> tuple[Table, Scope]:
        """The table and scope of this cache, made at first use: its own, or inside ``outer``."""
        if self._process != _process:
            self._divide()
        if self._in is None:
            if outer is None:
                table = Table(self._asked, self._strict)
                self._settle(table, table.root, None)
                assert self._table is not None
                _tables.add(self._table)
            else:
                table, inside = outer._bind()
                table.section(lambda after: self._begin(table, inside, outer))
        assert self._table is not None
        assert self._in is not None
        return self._table, self._in

    def _begin(self, table: Table, parent: Scope, outer: DataCache) -> None:
        parent = _open_one(parent)  # another thread may just have closed it
        scope = Scope(self._asked, self._strict, parent)
        if self._settle(table, scope, outer):
            parent.children.append(scope)

    def _settle(self, table: Table, scope: Scope, outer: DataCache | None) -> bool:
        """Belong to the first scope that any thread comes with; whether it is this one.

        By a call of C, not under a lock: a finalizer that runs in here may use any cache.
        """
        bound = self.__dict__.setdefault("_bound", (table, scope, outer))
        self._table, self._in, self._outer = bound
        return bound[1] is scope

    def __enter__(self) -> DataCache:
        if self.closed:
            raise CacheClosedError("this cache was closed: make a new one")
        if self._outer is not None:
            raise CacheClosedError("this cache is open already: make another for the inner block")
        entered = _ScopeRef(self)
        entered.around = _scope.get()
        if self._in is None:
            self._bind(get_cache())
        elif (outer := get_cache()) is not self:  # as the global cache is
            self._outer = outer
        _scope.set(entered)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        # Not reset by a token: a generator may end in another context than it began in. Whoever
        # finds a closed scope in the variable goes on to the one around it.
        entered = _scope.get()
        if entered is not None and entered() is self:
            _scope.set(entered.around)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the ``with`` block was left."""
        return self._in is not None and self._in.closed

    def close(self) -> None:
        """Give back what is cached. Data in use or held outside move to the enclosing scope.

        Loads under way end, and are charged to the enclosing scope. Closing again does nothing.
        """
        table, scope = self._bind()
        table.soon(lambda after: close_scope(table, scope, after))

    def __del__(self) -> None:
        # A table is part of reference cycles: without this, the data of a cache that was dropped
        # without `close` would wait for the garbage collector.
        if getattr(self, "_table", None) is not None and not sys.is_finalizing():
            self.close()

    def clear(self) -> None:
        """Drop everything that isn't in use, in this scope and in those inside it."""
        table, scope = self._bind()

        def work(after: After) -> None:
            scopes = scope.tree()
            for entry in list(table.entries.values()):
                if entry.pins == 0 and entry.scope in scopes:
                    table.detach(entry, after)
            drop_results(scopes, scope.used, after)

        table.soon(work)

    # Size

    @property
    def budget(self) -> int:
        """The budget, in bytes. Setting it takes what the constructor takes."""
        if self._process != _process:
            self._divide()
        return self._asked if self._in is None else self._in.budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        table, scope = self._bind()
        budget = memory.resolve_budget(value, cached=scope.used)
        self._share = value if memory.is_share(value) else None

        def work(after: After) -> None:
            scope.budget = budget
            shrink(table, scope, after)
            table.changed = True

        table.soon(work)

    def _divide(self) -> None:
        """In a forked worker: take no more than its part of the share that the parent's cache had.

        At its first use there: at the fork the workers beside it may not have been started yet.
        """
        self._process = _process
        share = self._share
        if share is None:
            return
        part = memory.resolve_budget(share, cached=0 if self._in is None else self._in.used)
        if self._in is None:
            self._asked = min(self._asked, part)
        elif part < self._in.budget:
            self.budget = part
            self._share = share

    @property
    def strict(self) -> bool:
        """Whether a request that can't be met raises, instead of going over the budget."""
        return self._strict

    @property
    def used(self) -> int:
        """The bytes in use now: data, loads under way, intermediates, and what is held outside."""
        self._tidy()
        return 0 if self._in is None else self._in.used

    @property
    def headroom(self) -> int:
        """The bytes that a load could take now without evicting anything."""
        self._tidy()
        if self._in is None:
            return min(self._asked, memory.available_now())
        free = min(level.budget - level.used for level in self._in.chain)
        return max(0, min(free, memory.available_now()))

    def stats(self) -> CacheStats:
        """The counters so far, of this scope and of those inside it. Never blocks."""
        self._tidy()
        if self._in is None:
            return CacheStats()
        for _ in range(_LOOKS):
            scopes = self._in.tree()
            values = {name: sum(getattr(s.counters, name) for s in scopes) for name in COUNTERS}
            # A scope that closes meanwhile would be counted twice, or not at all.
            if scopes == self._in.tree() and not any(scope.closed for scope in scopes[1:]):
                break
            time.sleep(0)  # let whoever closes one go on
        return CacheStats(peak_bytes=self._in.peak, **values)

    def held(self) -> list[Holder]:
        """Who holds the bytes in use and why, the largest first."""
        table, scope = self._bind()
        if table.inside() or busy() is not None:
            return holders(table, scope)
        found: list[Holder] = []
        table.section(lambda after: found.extend(holders(table, scope)))
        return found

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each `Event` after it happened, in the thread where it did.

        No lock is held meanwhile; an error in it is logged. Returns a function that ends it.
        """
        table, scope = self._bind()
        table.soon(lambda after: scope.subscribers.append(callback))

        def unsubscribe() -> None:
            table.soon(
                lambda after: (
                    None
                    if callback not in scope.subscribers
                    else scope.subscribers.remove(callback)
                )
            )

        return unsubscribe

    def _tidy(self) -> None:
        """Take note of what died since the last section, unless somebody is inside one.

        That may be this very thread: a signal handler that asks how much is used.
        """
        table = self._table
        if table is not None and (table.dead or table.postponed) and not table.torn:
            table.soon(lambda after: None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{format_size(self.used)} used"
        return f"<DataCache of {format_size(self.budget)}, {state}>"

    # What proxies and plans use

    def lookup(self, key: Key) -> Any:
        """The data of ``key`` if they are here (a hit), else None; `load` is sure. Never reads."""
        table = self._table
        scope = self._in
        if table is None or scope is None:
            return None
        value = None
        if table.torn and busy() not in (None, table):
            return None  # whoever is in that table may wait for the one that this interrupted
        with table.lock:
            entry = table.entries.get(key)
            # Past its last planned use, it would stay the first victim: who asks for it anew
            # pins it, which files it anew.
            if entry is not None and entry.spent is None and not table.torn:
                table.torn = True  # an interrupt may come while the ledger is being changed
                entry.scope.ledger.touch(key)
                table.serial += 1
                entry.stamp = table.serial
                entry.unasked = None
                scope.counters.hits += 1
                table.torn = False
                value = entry.value
        if table.postponed:  # by who interrupted this, not being a section
            table.soon(lambda after: None)
        return value

    def load(self, key: Key) -> Any:
        """The data of ``key``, read if they aren't here. Raises what reading raises."""
        value = self.lookup(key)
        if value is None:
            if isinstance(key, FileKey):
                self.verify([key])
            with self.operation(f"reading {key.name}", workspace=0, room=0) as operation:
                [value] = operation.pin([key])
        return value

    def operation(
        self, label: str, *, workspace: int, room: int, order: Sequence[Key] = ()
    ) -> Operation:
        """A context manager for one operation, or one plan of several; nothing is read before.

        ``workspace`` is the most bytes that its intermediates and results take at once; ``room``
        the most bytes of operands that it pins at once; ``order`` the keys in the order of their
        uses, for prefetching and for the choice of victims. Entering waits until other operations
        leave enough, and raises `BudgetExceededError` in a strict cache that can't give it.
        """
        table, scope = self._bind()
        return Operation(table, scope, label, workspace, room, order)

    def pinned(self, key: Key) -> Operation:
        """A context manager that keeps the data of ``key`` in memory for as long as users want."""
        table, scope = self._bind()
        return Operation(table, scope, f"pinned() of {key.name}", 0, 0, pinned=True)

    def preloading(self, consumer: Any, npreload: int) -> Preloading:
        """The means for a loop to have loads run ahead of it; they end when ``consumer`` dies."""
        table, scope = self._bind()
        return Preloading(table, scope, consumer, npreload)

    def adopt(self, value: Any, name: str) -> Any:
        """Charge data that were made in memory until they die, and return them read-only."""
        table, scope = self._bind()
        if isinstance(value, np.ndarray):
            value = _buffers.readonly(value)
        nbytes = nbytes_of(value)

        def work(after: After) -> None:
            table.accounts.hold(value, nbytes, scope, name, "memory")
            shrink(table, scope, after, name)

        table.soon(work)
        return value

    def verify(self, keys: Iterable[Key]) -> None:
        """Look whether files changed since they were read; what is cached of those goes.

        Warns of each changed file with `FileChangedWarning`.
        """
        changed = [key for key in keys if isinstance(key, FileKey) and key.refresh()]
        _invalidate(changed)
        for key in changed:
            warn(
                f"{key.name} changed since it was last read: its old data are dropped",
                FileChangedWarning,
            )

    def count_load(self, key: Key, nbytes: int, seconds: float) -> None:
        """Data of ``key`` were read, in blocks that were nowhere kept."""
        table, scope = self._bind()

        def work(after: After) -> None:
            level = _open_one(scope)
            level.counters.misses += 1
            level.counters.loads += 1
            level.counters.load_seconds += seconds
            level.counters.loaded_bytes += nbytes
            after.events.append((level, Event("load", key.name, nbytes)))

        table.soon(work)

    def count_failure(self, key: Key) -> None:
        """Reading data of ``key`` in blocks failed."""
        table, scope = self._bind()

        def work(after: After) -> None:
            level = _open_one(scope)
            level.counters.misses += 1
            level.counters.load_failures += 1
            after.events.append((level, Event("load_failure", key.name, 0)))

        table.soon(work)

    def obtainable(self) -> int:
        """The bytes that an operation could have once others let go of what isn't theirs for good.

        Other operations are waited for, but for those that this thread is in.
        """
        table, scope = self._bind()
        free = [level.budget - level.by_kind["held"] for level in scope.chain]
        if runs_here(table):
            taken = [level.by_kind["workspace"] for level in scope.chain]
            free = [left - more for left, more in zip(free, taken, strict=True)]
        return max(0, min(free))

    def used_up(self, handle: Handle, uses: int) -> None:
        """``uses`` executed operators read the data of ``handle``; they go once all are used up."""
        table, _ = self._bind()

        def work(after: After) -> None:
            if handle.nops:
                handle.left = max(0, handle.left - uses)
            entry = table.entries.get(handle.key)
            if entry is not None and entry.pins == 0 and handle.exhausted:
                table.file(entry, after)

        table.soon(work)

    def release(self, key: Key) -> None:
        """Drop the data of ``key`` if nobody is using them."""
        table, _ = self._bind()
        table.soon(lambda after: table.forget(key, after, "release"))

    def holds(self, key: Key) -> bool:
        """Whether the data of ``key`` can be had without reading. Never blocks."""
        table = self._table
        if table is None:
            return False
        ghost = table.ghosts.get(key)
        return key in table.entries or (ghost is not None and ghost.value() is not None)

    def loading(self, key: Key) -> bool:
        """Whether the data of ``key`` are being read, or are about to be. Never blocks."""
        return self._table is not None and key in self._table.flights

    def check(self) -> None:
        """Assert every invariant of the cache; for tests."""
        table, _ = self._bind()
        check(table)


def _open_one(scope: Scope) -> Scope:
    """``scope``, or the innermost one around it that isn't closed."""
    while scope.closed and scope.parent is not None:
        scope = scope.parent
    return scope


def _invalidate(keys: list[FileKey]) -> None:
    for table in list(_tables) if keys else []:

        def work(after: After, table: Table = table) -> None:
            for key in keys:
                table.forget(key, after, "invalidate")

        table.soon(work)


def forget_file(path: str | os.PathLike[str]) -> None:
    """Drop what is cached of a file that was just written: nobody has to be warned of that."""
    _invalidate([key for key in keys_of(path) if key.refresh()])


def _open_scope() -> DataCache | None:
    """The innermost scope of this context that is still open; None outside any."""
    entered = _scope.get()
    while entered is not None:
        scope = entered()
        if scope is not None and not scope.closed:
            return None if scope is _global else scope
        entered = entered.around
    return None


def get_cache() -> DataCache:
    """The innermost open scope, else the global cache, which is made when it is first used.

    The global cache's budget is ``LAZYCACHE_BUDGET``, or ``"auto"``; it is strict if
    ``LAZYCACHE_STRICT`` is 1.
    """
    global _global
    scope = _open_scope()
    if scope is not None:
        return scope
    if _global is None or _global.closed:
        with _making:
            if _global is None or _global.closed:
                _global = DataCache(config.budget(), strict=config.strict())
                _global._bind()
    return _global


def set_budget(budget: Budget) -> None:
    """Set the budget of the global cache; shrinking evicts at once.

    Raises `SizeError` for what is no budget; the old one stays.
    """
    global _global
    if _global is None or _global.closed:
        with _making:
            _global = DataCache(budget, strict=config.strict())
            _global._bind()
    else:
        _global.budget = budget


def cache_for(explicit: DataCache | None, made_in: weakref.ref[DataCache] | None) -> DataCache:
    """Where a proxy's data go: its explicit cache, else the innermost scope open here, else the
    scope that it was made in, if that is still open, else the global cache.
    """
    if explicit is not None:
        return explicit
    # Every hit comes through here: the usual cases first.
    entered = _scope.get()
    scope = None if entered is None else entered()
    if scope is None and made_in is not None:
        scope = made_in()
    if scope is None:
        scope = _global
    if scope is not None and scope._in is not None and not scope._in.closed:
        return scope
    scope = _open_scope()
    if scope is None and made_in is not None:
        scope = made_in()
        if scope is not None and scope.closed:
            scope = None
    return scope if scope is not None else get_cache()


# Processes


@atexit.register
def _stop_preloading() -> None:
    """Let no thread read on while the interpreter goes away."""
    for table in list(_tables):

        def stop(after: After, table: Table = table) -> None:
            for stream in list(table.streams):
                table.close_stream(stream, after)

        table.section(stop)
        table.pool.join_threads(timeout=1.0)


_locked: list[Table] = []
_IMPORTED_LATE = {"psutil", "nibabel", "isal", "h5py", "tqdm", "scipy", "nitransforms"}


def _before_fork() -> None:
    # A module that another thread is importing would stay locked in the child for ever.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _IMPORTED_LATE and getattr(
            getattr(module, "__spec__", None), "_initializing", False
        ):
            importlib.import_module(name)
    # What a section of another thread leaves half done could not be told from the truth in the
    # child. Sections are short; a fork that waits for longer goes on.
    _locked[:] = [table for table in list(_tables) if table.lock.acquire(timeout=1.0)]


def _unlock_after_fork() -> None:
    while _locked:
        _locked.pop().lock.release()


def _after_fork_in_child() -> None:
    global _making, _process
    _process = os.getpid()
    _unlock_after_fork()
    _making = threading.RLock()
    for table in list(_tables):
        after_fork(table)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_unlock_after_fork,
        after_in_child=_after_fork_in_child,
    )
