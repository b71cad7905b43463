"""Arrays over memory that somebody else owns, as C++ gives them: their base is None."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy._core import _multiarray_umath

_NEW_FROM_DESCR = 94  # its place in the table of NumPy's C functions
_WRITEABLE, _ALIGNED = 0x0400, 0x0100
_GARBAGE = 0xDB


def _function(place: int, *types: Any) -> Callable[..., Any]:
    capsule = _multiarray_umath._ARRAY_API
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(pointer(capsule, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, *types)(table[place])


_new = _function(
    _NEW_FROM_DESCR,
    ctypes.py_object,
    ctypes.py_object,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
)


def bare(memory: np.ndarray) -> np.ndarray:
    """An array over the same memory that neither owns it nor keeps it alive."""
    count = ctypes.c_ssize_t * max(1, memory.ndim)
    shape, strides = count(*memory.shape), count(*memory.strides)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory.dtype))  # the function takes it over
    return _new(
        np.ndarray,
        memory.dtype,
        memory.ndim,
        ctypes.addressof(shape),
        ctypes.addressof(strides),
        memory.ctypes.data,
        _WRITEABLE | _ALIGNED,
        None,
    )


_held: dict[int, tuple[weakref.ref[Any], Any]] = {}


def kept_by(array: np.ndarray, owner: Any) -> None:
    """Keep ``owner`` alive as long as ``array``, with nothing in the array to show for it."""
    ident = id(array)
    _held[ident] = (weakref.ref(array, lambda _: _held.pop(ident)), owner)


_graveyard: list[np.ndarray] = []


def dangling(owner: Any, memory: np.ndarray) -> None:
    """When ``owner`` dies ``memory`` becomes garbage for those who still look at it."""

    def spoil() -> None:
        if memory.nbytes:
            np.frombuffer(memory, np.uint8)[...] = _GARBAGE
            _graveyard.append(memory)

    weakref.finalize(owner, spoil).atexit = False
