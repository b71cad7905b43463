"""Counting values that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20


class NotFinite(NamedTuple):
    nans: int
    infinite: int
    size: int

    def __str__(self) -> str:
        counts = ((self.nans, "NaN"), (self.infinite, "infinite"))
        found = " and ".join(f"{count} {word}" for count, word in counts if count)
        return f"{found or 'no NaN'} of {self.size} values"


def count_not_finite(value: Any) -> NotFinite:
    """How many values of an array are NaN or infinite: none in what holds no floats.

    Takes the memory of some million flags, whatever the size of the array.
    """
    if not isinstance(value, np.ndarray | np.generic):
        return NotFinite(0, 0, 0)
    array = np.asarray(value)
    nans = infinite = 0
    if array.dtype.kind in "fc":
        for block in _blocks(array):
            nans += int(np.count_nonzero(np.isnan(block)))
            infinite += int(np.count_nonzero(np.isinf(block)))
    return NotFinite(nans, infinite, array.size)


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All values in pieces, none of them copied."""
    if array.flags.forc:
        array = array.reshape(-1, order="A")
    if array.ndim > 1:
        for part in array:
            yield from _blocks(part)
    else:
        for start in range(0, array.size, _BLOCK):
            yield array[start : start + _BLOCK]
