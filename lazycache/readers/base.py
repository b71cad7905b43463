"""What a reader promises, and what readers share.

A reader is an object with

``name``
    a short word; what ``reader="..."`` and messages use.
``can_read(path) -> bool``
    whether it takes this file, decided from its name and, at most, its first bytes. Never raises.
``probe(path, **options) -> Probe``
    shape, dtype, sizes, affine and header from the header alone: no voxel is read. Raises what
    `read` would raise for a missing, empty, foreign or (where it can be seen) truncated file.
``read(path, **options) -> object``
    the data. For a volume a read-only ndarray that shares memory with nothing else. Called by
    several threads at once on different files, and on the same file. Calls `checkpoint` between
    steps of about a millisecond, so that a prefetch nobody wants any more can stop.

and, where it can,

``converts``
    True if `probe` and `read` take ``dtype=`` and convert while loading (else the cache converts
    after loading, and accounts for both copies).
``read_part(path, index, **options) -> ndarray``
    the part ``index`` (a full tuple of int and slice, one for each axis, steps positive) reading
    no more than it needs: equal in value, dtype and axes order to ``read(path)[index]``.
``label``
    what to put behind a file's name in messages, where the data are another image than the file's:
    its grid is then compared with that of the file.
``inputs``
    paths of further files that it needs, which results then aren't saved over.
``open_blocks(path, **options) -> Blocks``
    the voxels forwards, in the order of the file (`Probe.order`), a few at a time: `Blocks`. Only
    asked for where ``probe(path, **options).in_blocks`` is true.
``write(path, data, affine, header)``
    writes; leaves nothing behind when it fails.

An error names the file and says what to do. ``lazycache.testing.check_reader`` holds a reader to
all of this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What the header of a file tells.

    ``shape`` and ``dtype`` are those of the data as `read` gives them (scaling applied), or None
    for data that is no array (a surface). ``nbytes`` is what the data will take in memory and
    ``peak_nbytes`` the most that reading takes at once, the data included. ``affine`` is the 4x4
    voxel-to-millimetre matrix, or None for a file that says nothing of space. ``files`` are all
    the files that the data come from (``.hdr`` and ``.img``): when one of them changes, the data
    have changed. ``dtype_reason`` says why the dtype isn't the one on disk. ``in_blocks`` says that
    ``open_blocks`` gives the data. ``kind`` is the name of the type of what `read` gives where that
    is an object and no array, such as "Volume_S16"; shape and dtype, where known, are then those of
    ``np.asarray`` of it.
    """

    format: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    nbytes: int
    peak_nbytes: int
    files: tuple[str, ...]
    order: Literal["C", "F"] = "C"
    affine: NDArray[np.float64] | None = None
    header: Any = None
    dtype_reason: str = ""
    in_blocks: bool = False
    kind: str = ""


class Blocks(Protocol):
    """The voxels of one file, forwards. Used by one thread at a time.

    ``into(flat)`` fills ``flat`` (one axis, contiguous, of the dtype that `probe` tells) with the
    next voxels, and raises what reading raises. ``skip(count)`` passes over some. It takes no more
    memory than the ``peak_nbytes`` of the probe less its ``nbytes``. ``close()`` lets go of the
    file.
    """

    def into(self, flat: NDArray[Any]) -> None: ...

    def skip(self, count: int) -> None: ...

    def close(self) -> None: ...


class BlockReader(Protocol):
    """The method of readers that can give blocks."""

    def open_blocks(self, path: str, **options: Any) -> Blocks: ...


@runtime_checkable
class Reader(Protocol):
    """The methods that every reader has; the module says what each promises."""

    @property
    def name(self) -> str: ...

    def can_read(self, path: str) -> bool: ...

    def probe(self, path: str, **options: Any) -> Probe: ...

    def read(self, path: str, **options: Any) -> Any: ...


class LoadCancelled(BaseException):
    """Raised by `checkpoint` in a load that nobody wants any more; never seen by users."""


class _Local(threading.local):
    cancelled: Callable[[], bool] | None = None


_local = _Local()


def checkpoint() -> None:
    """Called by readers between steps: ends a prefetch that was cancelled."""
    cancelled = _local.cancelled
    if cancelled is not None and cancelled():
        raise LoadCancelled


def outer_cancelled() -> Callable[[], bool]:
    """What `checkpoint` of this thread asks now, for a reader that puts something around it."""
    return _local.cancelled or (lambda: False)


@contextmanager
def cancellable(cancelled: Callable[[], bool]) -> Iterator[None]:
    """Make `checkpoint` of this thread ask ``cancelled`` for the length of the block."""
    outer = _local.cancelled
    _local.cancelled = cancelled
    try:
        yield
    finally:
        _local.cancelled = outer
