"""Reading: flights from their opening to their end, the threads that preload, and what may start.

A prefetch gets its bytes first and a thread after: it never waits for memory, and threads exist
only while there is something to read. A demand that finds a prefetch still queued reads it itself.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from . import _buffers, memory
from ._cycles import reading
from ._flight import AbandonedError, Flight, Joiner, name_file
from ._ledger import IDLE
from ._records import After, Entry, Scope, Stream, Use
from ._victims import make_room, shrink
from .readers.base import LoadCancelled, cancellable
from .sizes import format_size, memory_in, nbytes_of
from .source import Key
from .stats import Event

if TYPE_CHECKING:
    from ._table import Table

log = logging.getLogger("lazycache")

# The most threads that preload, however many loads a loop wants ahead.
MOST_THREADS = 32
# How long a reading of what the machine has left is believed, in seconds.
_FRESH = 0.2


class Pool:
    """The preloading threads of a table. Guarded by its lock, but where it says otherwise."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.queue: deque[Flight] = deque()
        self.working: set[threading.Thread] = set()
        # All that were started and haven't ended, to wait for. Changed without the lock.
        self.threads: set[threading.Thread] = set()
        # What the machine had left when somebody looked (outside the lock), and when that was.
        self.machine_left: int | None = None
        self._looked = -_FRESH
        self._freed = 0  # bytes of small arrays since the C allocator was last asked to trim
        self._cpus: int | None = None

    # Threads

    def limit(self) -> int:
        """How many threads may read ahead at once."""
        if self._cpus is None:
            self._cpus = memory.usable_cpus()
        if os.environ.get("LAZYCACHE_THREADS"):
            return self._cpus
        widest = max((s.npreload for s in list(self.table.streams)), default=1)
        return max(self._cpus, min(widest, MOST_THREADS))

    def start_workers(self) -> None:
        """Start the threads that the queue calls for. Called without the lock.

        The look at the queue is a guess: a thread too many finds nothing to do and ends.
        """
        if not self.queue:
            return
        for _ in range(min(len(self.queue), self.limit() - len(self.working))):
            thread = threading.Thread(target=self._work, name="lazycache-preload", daemon=True)
            self.threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                # No more threads, or the interpreter ends. Whoever needs the data reads them.
                self.threads.discard(thread)
                return

    def _work(self) -> None:
        me = threading.current_thread()
        taken: list[Flight | None] = []

        def begin(after: After) -> None:
            if len(self.working) < self.limit():
                self.working.add(me)
                taken.append(self._take(None))

        try:
            self.table.section(begin)
            while taken and (flight := taken.pop()) is not None:
                self._read_ahead(flight)
                del flight
                self.table.section(lambda after: taken.append(self._take(None)))
        finally:
            # By calls of C: the last section may have failed for want of memory.
            self.working.discard(me)
            self.threads.discard(me)

    def _read_ahead(self, flight: Flight) -> None:
        try:
            self.look_at_machine()
            if flight.context is None:
                self.read(flight)
            else:
                flight.context.copy().run(self.read, flight)
        except BaseException:
            # Told to whoever joined; a pool thread has nobody else to tell.
            log.debug("reading %s ended", flight.key.name, exc_info=True)
            # It may be that settling failed, for want of memory.
            self.table.section(lambda after: self.abandon(flight))

    def _take(self, wanted: Flight | None) -> Flight | None:
        """Make the calling thread the reader of ``wanted``, or of the next queued flight."""
        me = threading.current_thread()
        if wanted is None:
            if not self.queue:
                self.working.discard(me)
                return None
            wanted = self.queue.popleft()
        else:
            self.queue.remove(wanted)
        wanted.thread = threading.get_ident()
        return wanted

    def take_over(self, flight: Flight, use: Use) -> bool:
        """Let ``use`` read a queued flight instead of waiting for a pool thread."""
        if flight.thread is not None or flight not in self.queue:
            return False
        flight.use = use
        flight.stream = None
        self._take(flight)
        return True

    def join_threads(self, timeout: float) -> None:
        """Wait until the threads that have nothing left to read are gone.

        Called without the lock. A reader that can't be stopped is waited for ``timeout`` seconds.
        """
        if self.queue or self.table.inside():
            return
        deadline = self.table.clock() + timeout
        while (left := deadline - self.table.clock()) > 0:
            reading = {f.thread for f in list(self.table.flights.values()) if not f.cancelled}
            # Of those that begin just now none can be joined; they are started by one that can.
            ending = [
                thread
                for thread in list(self.threads)
                if thread.is_alive()
                and thread.ident not in reading
                and thread is not threading.current_thread()
            ]
            if not ending:
                return
            ending[0].join(left)

    def after_fork(self) -> None:
        """In a child process none of the threads is left."""
        self.queue.clear()
        self.working.clear()
        self.threads.clear()

    # Flights

    def open(self, key: Key, peak: int, use: Use | None, stream: Stream | None) -> Flight:
        scope = use.scope if use is not None else stream.scope if stream is not None else None
        assert scope is not None
        charge = self.table.accounts.charge(scope, peak, "flight", key.name)
        flight = self.table.flights[key] = Flight(key, charge, use=use, stream=stream)
        return flight

    def read(self, flight: Flight) -> None:
        """Read, outside the lock, and settle. What reading raises goes to everyone who joined;

        an interrupt (any exception that isn't an `Exception`) is raised here as well, and whoever
        had joined starts again.
        """
        table, key = self.table, flight.key
        started = table.clock()
        try:
            with reading(flight), cancellable(lambda: flight.cancelled):
                value = self._load(flight)
                nbytes, parts = nbytes_of(value), memory_in(value)
        except LoadCancelled as error:
            _buffers.let_go(error)
            table.section(lambda after: self.abandon(flight))
        except Exception as error:
            _buffers.let_go(error)
            name_file(error, key)
            failure = error
            table.section(lambda after: self._fail(flight, failure, after))
            del failure
        except BaseException as error:
            _buffers.let_go(error)
            table.section(lambda after: self._interrupted(flight))
            raise
        else:
            seconds = table.clock() - started
            box = [value]
            del value
            table.section(
                lambda after: self._land(flight, box.pop(), nbytes, parts, seconds, after)
            )

    def _load(self, flight: Flight) -> Any:
        try:
            return flight.key.load()
        except MemoryError:
            # The process has come to another limit before the budget. What is read ahead is left
            # to who demands it; a demand sends away what is only cached, and tries once more.
            if flight.prefetch or not self._evict(flight.charge.nbytes):
                raise
        return flight.key.load()

    def _evict(self, nbytes: int) -> bool:
        """Free memory of the process; False if there was nothing to be freed."""
        table = self.table
        before = table.root.used

        def work(after: After) -> None:
            make_room(table, table.root, nbytes, after)

        table.section(work)
        _buffers.trim()
        return table.root.used < before

    def _land(
        self,
        flight: Flight,
        value: Any,
        nbytes: int,
        parts: list[tuple[Any, int]],
        seconds: float,
        after: After,
    ) -> None:
        table, key = self.table, flight.key
        if table.flights.get(key) is not flight:
            after.garbage.values.append(value)  # abandoned by a fork
            return
        scope = flight.charge.scope
        reserved = flight.charge.nbytes
        unasked = flight.stream if flight.prefetch else None
        if self.machine_left is not None:
            self.machine_left -= nbytes  # until it is looked at again
        scope.counters.loads += 1
        scope.counters.load_seconds += seconds
        scope.counters.loaded_bytes += nbytes
        if flight.stream is not None:
            scope.counters.preloads += 1
        # Out of the flight's account before into the entry's: the peak must not count both.
        flight.ended = True
        table.accounts.recharge(flight.charge, nbytes=0)
        entry = table.land(key, value, nbytes, scope)
        entry.parts = parts
        if not flight.joiners and flight.cancelled:
            table.detach(entry, after)  # its reader looked at no checkpoint since
        elif not flight.joiners:
            entry.unasked = unasked
            table.file(entry, after)
        while flight.joiners:
            joiner = flight.joiners[-1]
            table.pin(joiner.use, entry)
            self._tell(flight, joiner, entry)
        self._end(flight)
        after.events.append((scope, Event("load", key.name, nbytes)))
        if nbytes > reserved:
            reader = getattr(getattr(key, "reader", None), "name", type(key).__name__)
            after.messages.append(
                f"{key.name}: the reader {reader!r} announced {format_size(reserved)} "
                f"and returned {format_size(nbytes)}"
            )
            shrink(table, scope, after, key.name)

    def _interrupted(self, flight: Flight) -> None:
        if flight.stream is not None:
            # Left to who demands it: tried ahead again, it might end so again and again.
            flight.stream.failed.add(flight.key)
        self.abandon(flight)

    def _fail(self, flight: Flight, error: Exception, after: After) -> None:
        flight.charge.scope.counters.load_failures += 1
        if flight.stream is not None:
            flight.stream.failed.add(flight.key)
        after.events.append((flight.charge.scope, Event("load_failure", flight.key.name, 0)))
        self._end(flight, error)

    def abandon(self, flight: Flight) -> None:
        """End a flight without data or error: whoever had joined starts again."""
        if self.table.flights.get(flight.key) is flight:
            flight.charge.scope.counters.abandoned += flight.stream is None or not flight.cancelled
            self._end(flight)

    def _end(self, flight: Flight, error: Exception | None = None) -> None:
        """Give back the flight's bytes and tell everyone who had joined."""
        table = self.table
        if table.flights.get(flight.key) is not flight:
            return
        # The flight leaves the table last: an interrupt in between finds it there, and ended.
        flight.ended = True
        while flight.joiners:
            joiner = flight.joiners[-1]
            self._tell(flight, joiner, AbandonedError() if error is None else error)
        table.accounts.discharge(flight.charge)
        if flight.stream is not None and flight.key not in table.entries:
            flight.stream.want_again(flight.key)
        del table.flights[flight.key]

    def _tell(self, flight: Flight, joiner: Joiner, outcome: Entry | Exception) -> None:
        # Runnable from now on: one that counted as blocked until it woke would make others
        # believe that nobody is left who could release.
        if self.table.blocked.get(joiner.thread) is flight:
            del self.table.blocked[joiner.thread]
        joiner.outcome.put(outcome)
        flight.joiners.pop()

    def finish_ended(self) -> None:
        """End what an interrupt left half ended, or half begun, so that nobody would read it.

        Whoever joined and wasn't told yet starts again.
        """
        for flight in list(self.table.flights.values()):
            if flight.ended or (flight.thread is None and flight not in self.queue):
                self._end(flight)

    def cancel(self, flight: Flight) -> None:
        """End a prefetch that nobody has joined: at once if it is queued, else soon."""
        flight.charge.scope.counters.cancelled += not flight.cancelled
        flight.cancelled = True
        if flight.thread is None and flight in self.queue:
            self.queue.remove(flight)
            self._end(flight)

    def disown(self, flight: Flight) -> None:
        """Its operation is over: whoever reads it for others goes on, what nobody reads ends."""
        use = flight.use
        if flight.thread is None or (use is not None and flight.thread == use.thread):
            if flight in self.queue:
                if flight.joiners:
                    flight.use = None
                    return
                self.queue.remove(flight)
            self.abandon(flight)
        elif not flight.joiners:
            flight.cancelled = True
        # Last: what an interrupt left half disowned is disowned again.
        flight.use = None

    def leave(self, flight: Flight, use: Use) -> None:
        """``use`` doesn't want this flight any more."""
        staying = [joiner for joiner in flight.joiners if joiner.use is not use]
        left = len(staying) < len(flight.joiners)
        flight.joiners = staying
        if flight.use is use:
            self.disown(flight)
        elif left and not staying and flight.use is None:
            self.cancel(flight)

    def join(self, flight: Flight, use: Use) -> Joiner:
        joiner = Joiner(use, threading.get_ident())
        flight.joiners.append(joiner)
        flight.prefetch = False
        return joiner

    # Prefetching

    def look_at_machine(self) -> None:
        """Read what the machine has left, if the last reading is old. Called without the lock."""
        now = self.table.clock()
        if now - self._looked >= _FRESH:
            self._looked = now
            self.machine_left = memory.available_now()

    def freed(self, nbytes: int) -> None:
        """Memory was freed; what the C allocator keeps of it goes back to the system now and then.

        Called without the lock: a count that threads get wrong now and then does no harm.
        """
        if self.machine_left is not None:
            self.machine_left += nbytes
        self._freed += nbytes
        if self._freed >= _buffers.TRIM_AFTER:
            self._freed = 0
            _buffers.trim()

    def admit(self, after: After) -> None:
        """Start the prefetches that fit, those first that are used soonest.

        While one waits for room that it may make, nothing that is used later is admitted to that
        room: it would be sent away again for the first, and want to come back, for ever.
        """
        table = self.table
        if not table.streams or table.first() is not None:
            return
        full: set[Scope] = set()
        waiting = list(table.streams)
        while waiting:
            soonest = min(waiting, key=Stream.first_position)
            waiting.remove(soonest)
            if self._admit_one(soonest, full, after):
                # Behind the others of the same position, now and in later sections.
                waiting.append(soonest)
                table.streams.move_to_end(soonest)

    def _admit_one(self, stream: Stream, full: set[Scope], after: After) -> bool:
        table = self.table
        while (key := stream.first_wanted()) is not None:
            ghost = table.ghosts.get(key)
            if ghost is not None and ghost.dying:
                # To bring back what is being evicted would undo the eviction, for ever.
                return False
            if key in table.flights or self._present(key, after):
                heapq.heappop(stream.wanted)
                continue
            peak = stream.peaks[key]
            levels = stream.scope.chain
            if any(peak > level.budget for level in levels):
                heapq.heappop(stream.wanted)
                continue
            if self._under_way(stream) >= max(stream.npreload, self.limit()):
                return False
            if not full.isdisjoint(levels):
                return False
            lacking = [
                level for level in levels if level.used + peak + stream.leaves(level) > level.budget
            ]
            if lacking or not self._machine_has(peak):
                full.update(lacking or levels)
                for level in lacking:
                    self._room_for(stream, key, peak, level, after)
                return False
            heapq.heappop(stream.wanted)
            flight = self.open(key, peak, None, stream)
            flight.context = stream.context
            self.queue.append(flight)
            return True
        return False

    def _present(self, key: Key, after: After) -> bool:
        table = self.table
        entry = table.entries.get(key)
        if entry is None:
            # What was evicted and is held outside stays evicted until it is asked for: taken back
            # here it would be the next victim of another stream, and so on for ever. If it dies
            # before, it is wanted again.
            ghost = table.ghosts.get(key)
            return ghost is not None and ghost.value() is not None
        if entry.pins == 0:
            entry.spent = None
            table.file(entry, after)
        return True

    def evict_for_machine(self, need: int, after: After) -> None:
        """Evict where the machine itself has less left than ``need``, whatever the budget says."""
        if self.machine_left is not None and need > self.machine_left:
            make_room(self.table, self.table.root, need - self.machine_left, after)

    def _machine_has(self, peak: int) -> bool:
        if self.machine_left is None:
            return True
        promised = sum(flight.charge.nbytes for flight in self.table.flights.values())
        return peak <= self.machine_left - promised

    def _under_way(self, stream: Stream) -> int:
        return sum(flight.stream is stream for flight in self.table.flights.values())

    def _room_for(self, stream: Stream, key: Key, peak: int, level: Scope, after: After) -> None:
        """Send away what nobody is known to want, or wants later than this."""
        table = self.table
        short = level.used - table.dying(level) - after.garbage.dying(level)
        short += peak + stream.leaves(level) - level.budget
        short = make_room(table, level, short, after, IDLE)
        if stream.npreload:
            # Not for a plan: what it keeps was foretold, and going now it would be read once more.
            make_room(table, level, short, after, ("planned",), stream.patience(key))
