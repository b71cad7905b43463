"""Loops whose loads run ahead of them."""

from __future__ import annotations

import glob as _glob
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal, SupportsIndex

from . import memory
from ._preloading import Preloading
from .cache import DataCache
from .execute import available
from .expression import Node, files_under
from .proxy import LazyReadData
from .source import Key

Order = Literal["given", "any"]

_Uses = list[tuple[DataCache, list[Key]]]


def _uses(item: Any) -> _Uses:
    """What using ``item`` will load: a proxy, or a tuple, list or dict that holds some."""
    if isinstance(item, LazyReadData):
        proxies = [item]
    elif isinstance(item, dict):
        proxies = [value for value in item.values() if isinstance(value, LazyReadData)]
    elif isinstance(item, list | tuple):
        values = list.__iter__(item) if isinstance(item, list) else iter(item)
        proxies = [value for value in values if isinstance(value, LazyReadData)]
    else:
        proxies = []
    return [(proxy._use(), _needs(proxy._node)) for proxy in proxies]


def _needs(node: Node) -> list[Key]:
    if available(node):
        return []
    return [file.key for file in files_under([node])]


def _in_memory(item: Any) -> bool:
    return all(cache.holds(key) for cache, keys in _uses(item) for key in keys)


class PreloadIterator:
    """Iterate over ``iterable`` while the data of the next items are loaded ahead.

    An item is a proxy, or a tuple, list or dict that holds proxies; anything else passes through.
    Up to ``npreload`` items after the current one are loaded, in the order of the loop, by threads
    that the cache bounds, as long as the budget has room for them: a preload takes free bytes, then
    data that nobody wants any more, or wants later. What the loop itself asks for goes first. By
    default ``npreload`` is the number of CPUs that this process may use; 0 preloads nothing.

    A file that can't be read raises where its item is used; its neighbours aren't affected. The
    end of the loop, `close`, leaving a ``with`` block, and the end of the iterator's own life stop
    the threads and give back what was loaded and not used. A loop that doesn't use its items' data
    (``sum(iterator)`` builds an expression) makes the preloading pause.

    Loops again and again over more data than fit keep a part of them from round to round, and read
    the rest again. Where at least half of its data are in memory, a loop reads only so far ahead
    (one item in 25) as that leaves to the next round what it would find. With ``order="any"`` the
    items come in another order, each once: those that are in memory when the loop begins, then the
    rest. All items of ``iterable`` are taken at the beginning then.
    """

    def __init__(
        self, iterable: Iterable[Any], npreload: int | None = None, order: Order = "given"
    ) -> None:
        self.npreload = checked(npreload)
        if _checked_order(order) == "any":
            # Stable: among themselves, those in memory and the others keep their order.
            iterable = sorted(quietly(iterable), key=lambda item: not _in_memory(item))
        self._streams: dict[DataCache, Preloading] = {}
        # A list is looked at in place, so that what is appended meanwhile is seen; of any other
        # iterable, the items that were taken ahead wait here, with the error that ended it.
        self._list: list[Any] | tuple[Any, ...] | None = None
        self._ahead: deque[tuple[Any, _Uses]] = deque()
        self._error: BaseException | None = None
        self._exhausted = False
        self._at = 0  # how many items were given out
        self._current: _Uses = []
        self._closed = False
        if isinstance(iterable, list | tuple):
            self._list = iterable
            plain = list.__iter__(iterable) if isinstance(iterable, list) else iter(iterable)
            self._expect([use for item in plain for use in _uses(item)])
        else:
            self._rest = iter(iterable)
        self.preload()

    def __iter__(self) -> PreloadIterator:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        used = self._was_used()
        for cache, keys in self._current:
            self._stream(cache).done(keys)
        self._current = []
        try:
            item, uses = self._take()
        except BaseException:
            self.close()
            raise
        self._current = uses
        if used:
            self.preload()
        return item

    def __enter__(self) -> PreloadIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop preloading and give back what wasn't used. Closing again does nothing."""
        self._closed = True
        self._current = []
        self._ahead.clear()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def preload(self) -> None:
        """Begin what isn't begun of the current item and of the ``npreload`` after it."""
        if self._closed or not self.npreload:
            return
        wanted: dict[DataCache, list[Key]] = {}
        uses: _Uses | None = self._current
        for position in range(self._at, self._at + self.npreload + 1):
            for cache, keys in uses or ():
                wanted.setdefault(cache, []).extend(keys)
            uses = self._look(position) if position < self._at + self.npreload else None
            if uses is None:
                break
        now: dict[DataCache, list[Key]] = {}
        for cache, keys in self._current:
            now.setdefault(cache, []).extend(keys)
        for cache, keys in wanted.items():
            self._stream(cache).want(dict.fromkeys(keys), now.get(cache, ()))

    def _was_used(self) -> bool:
        """Whether the loop asked for the data of the current item."""
        return not self._current or any(
            self._stream(cache).asked(keys) for cache, keys in self._current
        )

    def _look(self, position: int) -> _Uses | None:
        """What the item at ``position`` will load; None past the end."""
        if self._list is not None:
            return _uses(self._list[position]) if position < len(self._list) else None
        while not self._exhausted and len(self._ahead) <= position - self._at:
            try:
                item = next(self._rest)
            except StopIteration:
                self._exhausted = True
            except BaseException as error:
                # Raised again when the loop has come that far. Without this frame in its
                # traceback, which would keep this iterator alive.
                trace = error.__traceback__
                self._error = error.with_traceback(trace.tb_next if trace else None)
                self._exhausted = True
            if self._exhausted:
                break
            uses = _uses(item)
            self._expect(uses)
            self._ahead.append((item, uses))
        place = position - self._at
        return self._ahead[place][1] if place < len(self._ahead) else None

    def _take(self) -> tuple[Any, _Uses]:
        if self._look(self._at) is None:
            error, self._error = self._error, None
            raise StopIteration if error is None else error
        if self._list is None:
            item, uses = self._ahead.popleft()
        else:
            item = self._list[self._at]
            uses = _uses(item)
        self._at += 1
        return item, uses

    def _expect(self, uses: _Uses) -> None:
        expected: dict[DataCache, list[Key]] = {}
        for cache, keys in uses:
            expected.setdefault(cache, []).extend(keys)
        for cache, keys in expected.items():
            cache.verify(dict.fromkeys(keys))
            self._stream(cache).expect(keys)

    def _stream(self, cache: DataCache) -> Preloading:
        stream = self._streams.get(cache)
        if stream is None:
            stream = self._streams[cache] = cache.preloading(self, self.npreload)
        return stream


class PreloadList(list[Any]):
    """A list over which a loop preloads: ``for v in volumes`` is a `PreloadIterator`.

    In all else a list. Slices, copies and sums of it are `PreloadList`s with the same ``npreload``
    and ``order``, and making them starts nothing. Items that are proxies are compared by identity.
    With ``order="any"`` each loop begins with the items that are in memory; indices, slices and
    ``reversed`` go by the order of the list.
    """

    npreload: int
    order: Order

    def __init__(
        self,
        iterable: Iterable[Any] = (),
        npreload: int | None = None,
        order: Order | None = None,
    ) -> None:
        if isinstance(iterable, PreloadList):
            npreload = iterable.npreload if npreload is None else npreload
            order = iterable.order if order is None else order
        super().__init__(quietly(iterable))
        self.npreload = checked(npreload)
        self.order = _checked_order("given" if order is None else order)

    def __iter__(self) -> Iterator[Any]:
        return PreloadIterator(self, self.npreload, self.order)

    def __reversed__(self) -> Iterator[Any]:
        return PreloadIterator(list.__getitem__(self, slice(None, None, -1)), self.npreload)

    def _like(self, items: Iterable[Any]) -> PreloadList:
        return PreloadList(items, self.npreload, self.order)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return self._like(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        joined = super().__add__(other)
        return joined if joined is NotImplemented else self._like(joined)

    def __radd__(self, other: Any) -> PreloadList:
        return self._like([*quietly(other), *list.__iter__(self)])

    def __iadd__(self, other: Iterable[Any]) -> PreloadList:  # type: ignore[misc] # typeshed knows lists of the same items only
        self.extend(other)
        return self

    def __mul__(self, count: SupportsIndex) -> PreloadList:
        return self._like(super().__mul__(count))

    __rmul__ = __mul__

    def extend(self, iterable: Iterable[Any]) -> None:
        super().extend(quietly(iterable))

    def copy(self) -> PreloadList:
        return self._like(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return PreloadList, (list(list.__iter__(self)), self.npreload, self.order)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return self.__reduce__()

    def __contains__(self, item: object) -> bool:
        return any(_same(mine, item) for mine in list.__iter__(self))

    def count(self, item: Any) -> int:
        return sum(_same(mine, item) for mine in list.__iter__(self))

    def index(self, item: Any, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> int:
        end = len(self) if stop is None else stop
        for position in range(*slice(start, end).indices(len(self))):
            if _same(list.__getitem__(self, position), item):
                return position
        raise ValueError("the item is not in the list")

    def remove(self, item: Any) -> None:
        del self[self.index(item)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list):
            return NotImplemented
        pairs = zip(list.__iter__(self), list.__iter__(other), strict=False)
        return len(self) == len(other) and all(_same(mine, theirs) for mine, theirs in pairs)

    __hash__ = None

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __repr__(self) -> str:
        order = "" if self.order == "given" else f", order={self.order!r}"
        return f"PreloadList({super().__repr__()}, npreload={self.npreload}{order})"


def _same(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if isinstance(mine, LazyReadData) or isinstance(theirs, LazyReadData):
        return False
    return bool(mine == theirs)


def quietly(iterable: Iterable[Any]) -> Iterable[Any]:
    """The items of ``iterable`` without starting any load; of a list as it is now."""
    return list.copy(iterable) if isinstance(iterable, list) else iterable


def room_for(items: Iterable[Any]) -> tuple[int, list[int]]:
    """The bytes that using ``items`` may take now, and those that each takes, by its headers.

    What can't be read counts nothing here: the error comes when the item is used.
    """
    room: dict[DataCache, int] = {}
    sizes = []
    for item in items:
        nbytes = 0
        for cache, keys in _uses(item):
            if cache not in room:
                room[cache] = cache.obtainable()
            for key in keys:
                with suppress(Exception):
                    nbytes += key.estimate()[1]
        sizes.append(nbytes)
    return min(room.values(), default=0), sizes


def checked(npreload: int | None) -> int:
    if npreload is None:
        return memory.usable_cpus()
    if isinstance(npreload, bool) or not isinstance(npreload, int) or npreload < 0:
        raise ValueError(f"npreload is {npreload!r}: write a number of items, 0 or more")
    return npreload


def _checked_order(order: Order) -> Order:
    if order not in ("given", "any"):
        raise ValueError(f'order is {order!r}: write "given" or "any"')
    return order


def glob(
    pattern: str | os.PathLike[str], *, npreload: int | None = None, **kwargs: Any
) -> PreloadList:
    """Proxies of the files that match ``pattern`` (``**`` for folders), sorted by name.

    Nothing is read. ``kwargs`` go to each `LazyReadData`. Raises `FileNotFoundError` where nothing
    matches.
    """
    files = sorted(_glob.glob(os.fspath(pattern), recursive=True))
    if not files:
        raise FileNotFoundError(f"no file matches {os.fspath(pattern)!r} (looked in {os.getcwd()})")
    return PreloadList([LazyReadData(file, **kwargs) for file in files], npreload)
