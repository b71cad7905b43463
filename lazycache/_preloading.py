"""What a loop tells a cache of its future, so that loads run ahead of it."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable
from typing import Any

from ._ledger import Schedule
from ._records import After, Scope, Stream
from ._table import Table
from .source import Key

# Where most of what a loop uses is in memory already, what is loaded ahead takes the place of what
# the next round would find. Each use that it runs ahead by costs one more read in as many as there
# are uses, so it runs ahead by no more than one in this many.
_SPARING = 25


class Preloading:
    """The loads that one loop wants ahead; `consumer` is the object whose death ends it.

    Nothing here waits for memory. A file whose header can't be read isn't loaded ahead: the demand
    for it tells what is wrong, at its own position.
    """

    def __init__(self, table: Table, scope: Scope, consumer: Any, npreload: int) -> None:
        self._table = table
        self._expected = 0
        self._there = 0  # how many of those were in memory when they became known
        schedule: Schedule[Key] = Schedule(table.uses_clock)
        self._stream = Stream(scope, schedule, npreload, contextvars.copy_context())
        ref = table.watch(self._stream, consumer)

        def work(after: After) -> None:
            table.streams[self._stream] = ref
            table.schedules.append(schedule)

        table.soon(work)

    def expect(self, keys: Iterable[Key]) -> None:
        """These keys will be used, in this order, after those that are expected already."""
        stream, table = self._stream, self._table

        def work(after: After) -> None:
            for key in keys:
                stream.schedule.append(key)
                self._expected += 1
                entry = table.entries.get(key)
                self._there += entry is not None
                if entry is not None and entry.pins == 0:
                    table.file(entry, after)

        table.soon(work)

    def want(self, keys: Iterable[Key], now: Iterable[Key] = ()) -> None:
        """Load these expected keys, and no others, as soon as there is room. Reads headers.

        They come in the order of their uses, the next one first. ``now`` are those that the loop
        is using now.
        """
        stream, table = self._stream, self._table
        peaks: list[tuple[Key, int]] = []
        for key in keys:
            try:
                peaks.append((key, key.estimate()[1]))
            except Exception:
                continue
        table.pool.look_at_machine()

        def work(after: After) -> None:
            stream.wanted.clear()
            sparing = 2 * self._there >= self._expected
            stream.now = tuple(now)
            free = min(level.budget - level.used for level in stream.scope.chain)
            for ahead, (key, peak) in enumerate(peaks):
                if key not in table.entries and key not in table.flights:
                    free -= peak
                    if sparing and free < 0 and ahead > self._expected // _SPARING:
                        break
                stream.want(key, peak)

        table.soon(work)

    def done(self, keys: Iterable[Key]) -> None:
        """The loop has gone past one use of each of these keys."""
        stream, table = self._stream, self._table

        def work(after: After) -> None:
            for key in keys:
                table.advance(stream.schedule, key)
                entry = table.entries.get(key)
                if entry is not None and entry.pins == 0:
                    table.file(entry, after)

        table.soon(work)

    def asked(self, keys: Iterable[Key]) -> bool:
        """Whether anybody asked for any of ``keys`` since they were loaded ahead, or not at all."""
        stream, table = self._stream, self._table
        found: list[bool] = []

        def work(after: After) -> None:
            waiting = {key for _, key in stream.wanted}
            for key in keys:
                entry, flight = table.entries.get(key), table.flights.get(key)
                if entry is not None:
                    found.append(entry.unasked is not stream)
                elif flight is not None:
                    found.append(not flight.prefetch or flight.stream is not stream)
                else:
                    # Wanted before, and gone since: used, or it couldn't be loaded.
                    found.append(key in stream.peaks and key not in waiting)

        table.soon(work)
        return not found or any(found)

    def close(self) -> None:
        """Stop, give back what was loaded and not used, and see idle threads end."""
        self._table.soon(lambda after: self._table.close_stream(self._stream, after))
        self._table.pool.join_threads(timeout=1.0)
