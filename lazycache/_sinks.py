"""Where files grow that nobody is to see before they are whole, and what passes bytes on to them.

An interrupt may come anywhere: what is begun here is known before it exists, can be ended as often
as one likes, and ends by itself if nobody does.
"""

from __future__ import annotations

import os
import secrets
import shutil
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from . import _buffers
from ._tasks import Task, Threads

Bytes = NDArray[np.uint8]


class Scratch:
    """A hidden folder beside a file that is to be written; `move` puts its files in their places.

    ``path`` is where to write: a path of the same name in the folder. Other files may be created
    beside it. The folder goes at the end of the ``with`` block, or when nobody refers to this.
    """

    def __init__(self, target: str) -> None:
        self.folder, self.name = os.path.split(os.path.abspath(target))
        self._hidden = os.path.join(self.folder, f".lazycache-{secrets.token_hex(8)}")
        self.path = os.path.join(self._hidden, self.name)
        self._forgotten = weakref.finalize(self, _remove, self._hidden, os.getpid())

    def __enter__(self) -> Scratch:
        try:
            os.mkdir(self._hidden, 0o700)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._hidden, os.getpid())
        self._forgotten.detach()

    def written(self) -> list[str]:
        """The names of the files in the folder."""
        return os.listdir(self._hidden)

    def move(self, name: str) -> None:
        """Have the file of this name replace the one beside the folder."""
        os.replace(os.path.join(self._hidden, name), os.path.join(self.folder, name))


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked child ends without what its parent is writing
        shutil.rmtree(folder, ignore_errors=True)


class Behind:
    """Passes bytes on in chunks of one size, from a thread, while the caller goes on.

    ``nbytes`` is what will come altogether. Two chunks are held at most: one is filled while the
    one before is passed on, and waits for that if it is full. The last one, which may be shorter,
    is passed on by `finish`.
    """

    def __init__(self, passed_on: Callable[[Bytes], object], chunk: int, nbytes: int) -> None:
        self._pass_on = passed_on
        self._chunk = chunk
        count, size = (2, chunk) if nbytes > chunk else (1, nbytes)
        self._buffers = [_buffers.empty((size,), np.uint8) for _ in range(count)]
        self._filled = 0
        self._threads = Threads(1)
        self._tasks: list[Task] = []  # one for each full buffer, the oldest first

    def write(self, data: Bytes) -> None:
        """Take a copy of ``data``. Raises what passing on earlier ones raised, perhaps later."""
        start = 0
        while start < data.size:
            self._wait(len(self._buffers) - 1)
            count = min(self._chunk - self._filled, data.size - start)
            self._buffers[0][self._filled : self._filled + count] = data[start : start + count]
            self._filled += count
            start += count
            if self._filled == self._chunk:
                self._hand_over()

    def _wait(self, left: int) -> None:
        """Wait until no more than ``left`` buffers are full."""
        while len(self._tasks) > left:
            self._tasks[0].wait()
            del self._tasks[0]

    def _hand_over(self) -> None:
        task = Task(partial(self._pass_on, self._buffers[0]))
        self._tasks.append(task)
        self._threads.ask(task)
        self._buffers.reverse()
        self._filled = 0

    def finish(self) -> None:
        """All has come: pass on the rest. Raises what passing on raised."""
        self._wait(0)
        self._pass_on(self._buffers[0][: self._filled])

    def end(self) -> None:
        """Nothing is passed on any more when this returns."""
        for task in reversed(self._tasks):  # the last first, so that it doesn't begin
            task.end()
