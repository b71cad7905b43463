"""Volumes of AIMS as operands: objects that hold an array and have operators of their own.

What their operators give isn't written down anywhere here: the operators are asked, for volumes of
a few voxels. Only what they must not be asked is known: an integer division by 0 ends the process.

Volumes can't be made read-only. So what the cache, or a user, may look at is copied before an
operator writes into it, and arrays over their memory are handed out read-only.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _aims

# What the names of types say of: whose arrays NumPy can describe, and hence calculate with.
Kind = str


@lru_cache(maxsize=1024)
def _kind_of_type(kind: type) -> Kind:
    name = kind.__name__
    known = _aims.is_kind(kind) and name.startswith(_aims.VOLUME)
    return name if known and _aims.dtype_of(name) is not None else ""


def kind_of(value: Any) -> Kind:
    """The name of the type of a volume, such as "Volume_S16"; "" for all else."""
    if type(value) is np.ndarray:
        return ""
    return _kind_of_type(type(value))  # type: ignore[arg-type] # types can be hashed


def is_known(kind: Kind) -> bool:
    """Whether a type of this name is one that `kind_of` tells."""
    return kind.startswith(_aims.VOLUME) and _aims.dtype_of(kind) is not None


def array_of(value: Any) -> Any:
    """The array that a volume holds, read-only, over its memory; anything else as it is."""
    return _aims.readonly_view(np.asarray(value), value) if kind_of(value) else value


def make(array: NDArray[Any], dtype: DTypeLike | None = None) -> Any:
    """A new volume with the values of ``array``, which has four axes or more, as ``dtype``.

    Its memory is its own: results of one made over an array would overwrite that.
    """
    code = _aims.code_of(array.dtype if dtype is None else np.dtype(dtype))
    volume = importlib.import_module("soma.aims").Volume(list(array.shape), dtype=code)
    np.copyto(np.asarray(volume), array, casting="unsafe")
    return volume


def copy(volume: Any) -> Any:
    """The same voxels and header, in memory of its own."""
    return type(volume)(volume)


def header_only(volume: Any, **_: Any) -> Any:
    """A volume of one voxel with the header of ``volume``."""
    array = np.asarray(volume)
    blank = make(np.zeros((1,) * array.ndim, array.dtype))
    blank.copyHeaderFrom(volume.header())
    return blank


def with_header(array: NDArray[Any], blank: Any) -> Any:
    """A volume of the values of ``array`` with the header of ``blank``.

    AIMS has no operators for volumes of 64-bit integers and half floats: they become float64 and
    float32.
    """
    dtype = array.dtype
    if dtype.kind in "iu" and dtype.itemsize > 4:
        dtype = np.dtype(np.float64)
    elif dtype == np.float16:
        dtype = np.dtype(np.float32)
    volume = make(array, dtype)
    volume.copyHeaderFrom(blank.header())
    return volume


# The operators that go through NumPy: their result lies in the memory of an array.
BORROWING = ("//", "**")


def owned(name: str, result: Any) -> Any:
    """The result of an operator as a volume in memory of its own."""
    return copy(result) if name in BORROWING and kind_of(result) else result


def check(name: str, arguments: Sequence[Any]) -> None:
    """Raise what an operator of AIMS doesn't: the process would end instead.

    `ZeroDivisionError` for integers divided by 0, `OverflowError` for the one quotient of integers
    that their type doesn't hold.
    """
    if name not in ("/", "/=", "%", "%=") or len(arguments) != 2:
        return
    left, right = arguments
    kind = kind_of(left)
    dtype = _aims.dtype_of(kind) if kind else None
    if dtype is None or dtype.kind not in "iu":
        return
    if kind_of(right):
        divisor = np.asarray(right)
        if divisor.dtype.kind not in "iu":
            return
    elif isinstance(right, int | float | np.integer | np.floating):
        divisor = np.asarray(right)
    else:
        return
    if not divisor.all():
        raise ZeroDivisionError(
            f"{kind} {name} {kind_of(right) or right!r}: integers can't be divided by 0, and there "
            "AIMS would end the process"
        )
    if dtype.kind == "i" and dtype.itemsize >= 4 and divisor.min() <= -1:
        dividend, lowest = np.asarray(left), np.iinfo(dtype).min
        if dividend.min() == lowest and np.any((dividend == lowest) & (divisor == -1)):
            raise OverflowError(
                f"{kind} {name} {kind_of(right) or right!r}: {lowest} / -1 is no {dtype}, and "
                "there AIMS would end the process"
            )
