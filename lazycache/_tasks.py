"""Work that threads do while the caller goes on.

An interrupt may come anywhere: what is begun here is known before it exists, can be ended as often
as one likes, and ends by itself if nobody does. So there is no executor: its locks are taken by
Python code, and an interrupt of that leaves one held, so that nobody would ever see its threads
end.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

# Seconds that a thread with nothing to do waits for more: much longer than starting one takes.
_MOMENT = 0.02


class Task:
    """A function called once, in a thread, or by the caller. Nothing waits in that thread."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = [work]  # until it is called: it may refer to who holds this task
        # Who comes first: a thread, the caller who does it himself, or who ended it before that.
        self._first: dict[str, str] = {}
        self._error: BaseException | None = None
        self._finished = False
        # A lock, because telling takes no memory: none may be left.
        self._over = threading.Lock()
        self._over.acquire()

    @property
    def over(self) -> bool:
        """Whether nobody has to wait for it any more."""
        return self._finished

    @property
    def failed(self) -> bool:
        """Whether it raised something that nobody was told."""
        return self._error is not None

    def run(self, by: str = "thread") -> None:
        """What is done ``by`` a thread, or by the caller; what it raises is for who waits."""
        if self._first.setdefault("first", by) == by:
            try:
                self._work.pop()()
            except BaseException as error:
                self._error = error
            self._finished = True
            self._over.release()
        del self  # the traceback of the error has this frame

    def wait(self) -> None:
        """Wait for the end of what was started; raises what it raised, the first time."""
        self._until_over()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def end(self) -> None:
        """Wait for the end of what has begun; what hasn't never will."""
        if self._first.setdefault("first", "end") == "thread":
            self._until_over()
        # And what they refer to: a thread may still have this, or come to see it.
        self._work.clear()
        self._error = None

    def _until_over(self) -> None:
        # It is finished before the lock tells: an interrupt that loses what the lock told doesn't
        # have the next who waits wait for ever.
        while not self._finished:
            self._over.acquire()


class Threads:
    """Does tasks, in the order in which they are asked for, at most ``count`` at once.

    One of these may be done by the caller, while he waits for another: so each processor has one
    thread to run, and few have to be woken. No thread waits for long. One that has had nothing to
    do for a moment ends: nobody has to end it, and whoever asks on and on finds it there.
    One thread at a time may ask and wait.
    """

    def __init__(self, count: int) -> None:
        self._asked: deque[Task] = deque()
        # One for each thread that isn't at work: what it waits for, or None before it is started.
        self._free: list[_thread.LockType | None] = [None] * max(1, count - 1)
        self._helped = count > 1
        self._awaited: Task | None = None

    def ask(self, task: Task) -> None:
        """Have ``task`` run: by the caller, if no thread is to be had."""
        self._asked.append(task)
        self._have_it_done("caller")

    def wait(self, task: Task) -> None:
        """Wait for ``task``, and do what no thread has come to; raises what ``task`` raised."""
        self._awaited = task
        while self._helped and not task.over and self._do_one("caller"):
            pass
        task.wait()
        self._awaited = None

    @property
    def in_vain(self) -> bool:
        """Whether what the caller waits for has failed, so that he has no use for the rest."""
        awaited = self._awaited
        return awaited is not None and awaited.failed

    def _have_it_done(self, by: str) -> None:
        try:
            wake = self._free.pop()
        except IndexError:  # those at work will come to it
            return
        if wake is not None:
            wake.release()
            return
        wake = _thread.allocate_lock()
        wake.acquire()
        try:
            _thread.start_new_thread(self._work, (wake,))
        except RuntimeError:
            self._do(by)
            self._free.append(None)

    def _work(self, wake: _thread.LockType) -> None:
        while True:
            self._do("thread")
            self._free.append(wake)
            # Who asked before that was seen woke nobody.
            if not self._asked and wake.acquire(timeout=_MOMENT):
                continue
            try:
                self._free.remove(wake)
            except ValueError:
                pass  # taken by who asks, who wakes nobody any more
            else:
                if self._asked:
                    continue
            self._free.append(None)
            # Who asked before that was seen started no thread.
            if self._asked:
                self._have_it_done("thread")
            return

    def _do(self, by: str) -> None:
        while self._do_one(by):
            pass

    def _do_one(self, by: str) -> bool:
        try:
            task = self._asked.popleft()
        except IndexError:
            return False
        task.run(by)
        return True


def end_all(ends: Iterable[Callable[[], object]]) -> None:
    """Call each of ``ends``, whatever others raise; once more where one raises, as interrupts do.

    No `ExitStack`: the exceptions that pass through one are part of reference cycles, which would
    keep what couldn't be ended until the garbage collector comes.
    """
    ends = list(ends)
    try:
        for end in ends:
            end()
    except BaseException:
        for end in ends:
            with suppress(Exception):
                end()
        raise
