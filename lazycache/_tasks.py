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


class Task:
    """A function called once, in a thread. Nothing waits in that thread."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = [work]  # until it is called: it may refer to who holds this task
        # Who comes first: the thread, or the caller who ended it before it began.
        self._first: dict[str, str] = {}
        self._error: BaseException | None = None
        self._finished = False
        # A lock, because telling takes no memory: none may be left.
        self._over = threading.Lock()
        self._over.acquire()

    def run(self) -> None:
        """What the thread does; raises nothing."""
        if self._first.setdefault("first", "thread") == "thread":
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
        if self._first.setdefault("first", "caller") == "thread":
            self._until_over()
        else:
            self._work.clear()  # and what it refers to: a thread may still come to see this

    def _until_over(self) -> None:
        # It is finished before the lock tells: an interrupt that loses what the lock told doesn't
        # have the next who waits wait for ever.
        while not self._finished:
            self._over.acquire()


class Threads:
    """At most ``count`` threads for tasks, in the order in which these are asked for.

    None of them ever waits: a thread ends when there is nothing more to do.
    """

    def __init__(self, count: int) -> None:
        self._asked: deque[Task] = deque()
        self._free = [None] * count  # one for each thread that may be started

    def ask(self, task: Task) -> None:
        """Have ``task`` run: by the caller, if no thread is to be had."""
        self._asked.append(task)
        if self._taken():
            try:
                _thread.start_new_thread(self._work, ())
            except RuntimeError:
                self._work()

    def _taken(self) -> bool:
        try:
            self._free.pop()
        except IndexError:
            return False
        return True

    def _work(self) -> None:
        while True:
            while self._asked:
                try:
                    task = self._asked.popleft()
                except IndexError:  # another thread was faster
                    break
                task.run()
                del task
            self._free.append(None)
            # Who asked before that was seen started no thread.
            if not self._asked or not self._taken():
                return


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
