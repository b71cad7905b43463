"""Memory for arrays that goes back to the operating system as soon as nobody uses it.

Arrays from `LARGE` up get a private anonymous mapping of their own, in huge pages where they fill
some and the kernel has them, so that dropping the last view unmaps it. Smaller ones come from the C
allocator, which keeps freed blocks between survivors: `trim` asks it to give them back once
`TRIM_AFTER` bytes have been freed. It doesn't give back what is free at the end of the memory of a
thread, so what threads load must mostly not come from it.

A `Buffer` is written through `Buffer.writable` and handed out through `Buffer.readonly`, whose
views can't be made writeable again (they are made over a read-only memoryview). What must be
followed to know when the memory is free is `owner_of`: the last object behind a chain of views.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

Order = Literal["C", "F"]

LARGE = 256 << 10
TRIM_AFTER = 16 << 20
_HUGE_PAGE = 2 << 20
_OURS = (__name__.partition(".")[0], "numpy", "nibabel")
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_HUGE_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_SMALL_ADVICE = getattr(mmap, "MADV_NOHUGEPAGE", None)


class Buffer:
    """``nbytes`` bytes of zeroed or uninitialised memory, alive as long as any array made of it."""

    __slots__ = ("_memory", "nbytes", "owner")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.owner: Any
        if nbytes >= LARGE and _PRIVATE:
            self.owner, self._memory = _map(nbytes)
        else:
            self.owner = np.empty(nbytes, np.uint8)
            self._memory = self.owner.data

    def writable(
        self, shape: tuple[int, ...], dtype: DTypeLike, order: Order = "C"
    ) -> NDArray[Any]:
        """An array over this memory that may be written to."""
        return _as_array(self._memory, shape, np.dtype(dtype), order)

    def readonly(
        self, shape: tuple[int, ...], dtype: DTypeLike, order: Order = "C"
    ) -> NDArray[Any]:
        """An array over this memory that can't be written to, nor be made so."""
        return _as_array(self._memory.toreadonly(), shape, np.dtype(dtype), order)


def _map(nbytes: int) -> tuple[mmap.mmap, memoryview]:
    # One huge page of address space too many where huge pages are filled, so that the start can be
    # aligned; its pages are never touched and cost nothing. The tail stays in small pages, where
    # the kernel would give huge ones unasked as well: the resident size is exact.
    huge = nbytes - nbytes % _HUGE_PAGE
    try:
        mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE if huge else nbytes, flags=_PRIVATE)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes} bytes") from error
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -address % _HUGE_PAGE if huge else 0
    if _HUGE_ADVICE is not None and _SMALL_ADVICE is not None:
        # A kernel without transparent huge pages refuses the advice, and small pages do as well.
        with contextlib.suppress(OSError):
            mapping.madvise(_SMALL_ADVICE, offset + huge, len(mapping) - offset - huge)
            if huge:
                mapping.madvise(_HUGE_ADVICE, offset, huge)
    return mapping, memoryview(mapping)[offset : offset + nbytes]


def _as_array(
    memory: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any], order: Order
) -> NDArray[Any]:
    flat = np.frombuffer(memory, np.uint8)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return flat[:count].view(dtype).reshape(shape, order=order)


def empty(shape: tuple[int, ...], dtype: DTypeLike, order: Order = "C") -> NDArray[Any]:
    """Like `numpy.empty`, in memory that goes back to the system when the last view dies.

    Object and other dtypes that hold references get NumPy's own memory.
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes < LARGE or dtype.hasobject:
        return np.empty(shape, dtype, order)
    return Buffer(nbytes).writable(shape, dtype, order)


class Lent:
    """The memory of ``array``, which belongs to ``owner``, for arrays that can't be written to.

    For objects whose memory Python doesn't see as theirs: what is made of this keeps the owner
    alive, and says so.
    """

    __slots__ = ("__array_interface__", "_array", "owner")

    def __init__(self, array: NDArray[Any], owner: Any) -> None:
        interface = array.__array_interface__
        address, _ = interface["data"]
        self.__array_interface__ = {**interface, "data": (address, True)}
        self._array = array
        self.owner = owner


def owner_of(value: Any) -> Any:
    """The object whose death frees the memory of ``value``: its last base, or itself.

    Where that is of a type whose death nobody can be told of, such as ``bytearray``, it is the
    array made over it: all views that NumPy makes of such an array keep it alive.
    """
    array: NDArray[Any] | None = None
    while True:
        base: Any
        if isinstance(value, np.ndarray):
            base = value.base
            array = value
        elif isinstance(value, memoryview):
            base = value.obj
        elif isinstance(value, Lent):
            return value.owner
        else:
            known = array is None or type(value).__weakrefoffset__
            return value if known else array
        if base is None:
            return value
        value = base


def readonly(array: NDArray[Any]) -> NDArray[Any]:
    """A view of ``array`` that can't be made writeable again where its type allows it.

    Contiguous arrays of plain dtypes are re-made over a read-only memoryview. Others (strided
    views, object dtypes, subclasses of ndarray) become a view whose writeable flag is off.
    """
    if not array.flags.writeable and not isinstance(owner_of(array), np.ndarray):
        return array
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    if type(array) is np.ndarray and contiguous and not array.dtype.hasobject and array.nbytes:
        order: Order = "C" if array.flags.c_contiguous else "F"
        flat = array.reshape(-1, order=order).view(np.uint8)
        memory = flat.data.toreadonly()
        return _as_array(memory, array.shape, array.dtype, order)
    view = array.view()
    view.flags.writeable = False
    return view


def recall(value: Any) -> Callable[[], Any] | None:
    """How to have ``value`` again as long as somebody keeps its memory alive; None if unknown.

    NumPy makes the base of a slice the last array of the chain: a slice that somebody keeps
    doesn't keep alive the array that was handed out, only the one underneath. So that one is
    followed, and the array is made again over it.
    """
    if type(value) is np.ndarray and type(value.base) is np.ndarray:
        root: NDArray[Any] = value.base
        if root.flags.c_contiguous and not root.dtype.hasobject:
            offset = _address(value) - _address(root)
            shape, dtype, strides = value.shape, value.dtype, value.strides
            root_ref = weakref.ref(root)
            del root, value

            def remade() -> NDArray[Any] | None:
                root = root_ref()
                return None if root is None else np.ndarray(shape, dtype, root, offset, strides)

            return remade
    try:
        return weakref.ref(value)
    except TypeError:
        return None


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def let_go(error: BaseException) -> None:
    """Make ``error`` keep no array alive: empty the frames of this package that it came through.

    Those of NumPy and nibabel too, which were called from here; not those of users, who may want
    to look into them. Whoever keeps an error, as notebooks do with the last one, would keep what
    was half read and half computed. Frames that still run are left as they are.
    """
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        current = errors.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        errors += [current.__cause__, current.__context__]
        frames = [frame for frame, _ in traceback.walk_tb(current.__traceback__)]
        # The innermost first, as when the error dies.
        while frames:
            frame = frames.pop()
            if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
                with contextlib.suppress(RuntimeError):
                    frame.clear()


def _find_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return None


_malloc_trim = _find_trim()


def trim() -> None:
    """Give memory that the C allocator keeps for itself back to the system, where it can."""
    if _malloc_trim is not None:
        _malloc_trim(0)
