"""Reductions of all elements of an array, from block to block, to the same bytes as at once.

What may be taken in any order is: integers, truth values. Sums of floats depend on the order of
the additions, so these follow NumPy's: elements that aren't converted are added up pairwise, by
halves of the array down to some hundred elements; those that are converted go through a buffer,
and each bufferful is added up pairwise and then to the sum. What goes another way (complex numbers,
extremes of floats, among which zeros of both signs have no order) is left to NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = NDArray[Any]

_ANY_ORDER = {
    np.add, np.multiply, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor,
}  # fmt: skip
_LOGICAL = {np.logical_or, np.logical_and}
# Any size from some hundred on gives the same sums; smaller ones cost more calls.
_LEAF = 1 << 13


class Total(ABC):
    """Takes one piece after the other; ``value`` is what ``reduce`` of all of them gives."""

    value: Any

    @abstractmethod
    def take(self, terms: Row) -> None: ...


def total(
    function: np.ufunc, size: int, terms: np.dtype[Any], result: np.dtype[Any]
) -> Total | None:
    """For the reduction of ``size`` elements of the type ``terms``; None if it can't be told."""
    if function in _LOGICAL or (function in _ANY_ORDER and result.kind in "biu"):
        return _AnyOrder(function, result)
    if function is not np.add or result.char not in "fd" or terms.kind not in "biuf":
        return None
    if terms == result:
        return _Pairwise(size, result) if terms.isnative else None
    return _Buffered(result)


class _AnyOrder(Total):
    def __init__(self, function: np.ufunc, result: np.dtype[Any]) -> None:
        self._function = function
        self._dtype = None if function in _LOGICAL else result
        self.value = None

    def take(self, terms: Row) -> None:
        found = self._function.reduce(terms, dtype=self._dtype)
        if self.value is None:
            self.value = found
        else:
            with np.errstate(over="ignore"):  # integers in NumPy's loops wrap without a word
                self.value = self._function(self.value, found)


class _Pieces(Total):
    """Cuts what comes into the pieces that are added up at once."""

    def __init__(self, longest: int) -> None:
        self._kept: list[Row] = []
        self._longest = longest
        self._missing = 0

    def take(self, terms: Row) -> None:
        at = 0
        while at < terms.size:
            if not self._missing:
                self._missing = self._next()
            piece = terms[at : at + self._missing]
            at += piece.size
            self._missing -= piece.size
            if self._missing:
                self._kept.append(piece.copy())
            else:
                self._add(np.concatenate([*self._kept, piece]) if self._kept else piece)
                self._kept.clear()

    @abstractmethod
    def _next(self) -> int:
        """The elements of the next piece."""

    @abstractmethod
    def _add(self, piece: Row) -> None: ...


class _Pairwise(_Pieces):
    """NumPy's tree of halves, the left one a multiple of eight, walked with a stack."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        super().__init__(_LEAF)
        self._todo: list[int | None] = [size]  # None: add the last two sums
        self._sums: list[Any] = []
        self._dtype = dtype

    def _next(self) -> int:
        while True:
            size = self._todo.pop()
            assert size is not None
            if size <= self._longest:
                return size
            half = size // 2
            half -= half % 8
            self._todo += [None, size - half, half]

    def _add(self, piece: Row) -> None:
        self._sums.append(np.add.reduce(piece))
        while self._todo and self._todo[-1] is None:
            self._todo.pop()
            right = self._sums.pop()
            self._sums[-1] = np.add(self._sums[-1], right)

    @property
    def value(self) -> Any:
        return self._sums[0]


class _Buffered(_Pieces):
    """Sums that are converted on the way."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        super().__init__(np.getbufsize())
        self._dtype = dtype
        self._sum = dtype.type(0)

    def _next(self) -> int:
        return self._longest

    def take(self, terms: Row) -> None:
        if not self._missing:  # what fills the buffer several times goes at once
            whole = terms.size - terms.size % self._longest
            if whole:
                self._add(terms[:whole])
                terms = terms[whole:]
        super().take(terms)

    def _add(self, piece: Row) -> None:
        self._sum = np.add.reduce(piece, dtype=self._dtype, initial=self._sum)

    @property
    def value(self) -> Any:
        if self._kept:
            self._add(np.concatenate(self._kept))
            self._kept.clear()
        return self._sum
