"""Silence for libraries in C++ that tell their progress, and can't be told not to."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_BROKEN, _GOOD = 1, 0  # bits of std::ios_base::iostate
_lock = threading.Lock()
_inside = 0


@contextmanager
def quiet() -> Iterator[None]:
    """While anybody is inside, what C++ writes to ``std::cout`` is dropped.

    The stream is marked as broken meanwhile. What Python prints doesn't go through it, nor does
    what other processes write: nothing is redirected. Does nothing but on Linux.
    """
    global _inside
    mark = _marker()
    with _lock:
        _inside += 1
        mark(_BROKEN)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                mark(_GOOD)


@cache
def _marker() -> Callable[[int], None]:
    """What sets the state of ``std::cout``, in the C++ library that this process uses."""
    if not sys.platform.startswith("linux"):
        return lambda state: None
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        stream = ctypes.addressof(ctypes.c_char.in_dll(library, "_ZSt4cout"))
        clear = library._ZNSt9basic_iosIcSt11char_traitsIcEE5clearESt12_Ios_Iostate
    except (OSError, ValueError, AttributeError):  # another C++ library
        return lambda state: None
    clear.argtypes, clear.restype = [ctypes.c_void_p, ctypes.c_int], None

    def mark(state: int) -> None:
        table = ctypes.c_void_p.from_address(stream).value
        if table is not None:  # else nobody has used the stream yet
            # Where the state is, in an object that has a virtual base: three words above its table.
            base = ctypes.c_ssize_t.from_address(table - 3 * ctypes.sizeof(ctypes.c_void_p)).value
            clear(stream + base, state)

    return mark
