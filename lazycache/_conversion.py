"""Values converted for a file: rounded, never wrapped around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import WriteError

# Elements that are converted at a time. What is made on the way stays in the processor's cache.
PIECE = 1 << 15
# Bytes that a conversion takes at most, whatever is converted.
TRANSIENT = PIECE * 64


class Conversion:
    """From one type of values to another, for the file ``target``, some at a time.

    Raises WriteError as `check_kinds` does.
    """

    def __init__(self, source: np.dtype[Any], stored: np.dtype[Any], target: str) -> None:
        check_kinds(source, stored, target)
        self.source = source
        self.stored = stored
        self._target = target
        self._exact = np.can_cast(source, stored)
        self._lost = 0
        self._seen = 0

    def convert(self, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """``values`` (one axis) as the other type, in pieces; themselves where it is the same."""
        self._seen += values.size
        if self.source == self.stored:
            yield values
            return
        for start in range(0, values.size, PIECE):
            piece = values[start : start + PIECE]
            if not self._exact:
                piece, misfits = _convert(piece, self.stored)
                self._lost += misfits
            yield piece.astype(self.stored, copy=False)

    def check(self) -> None:
        """Raise WriteError if there were values that didn't fit, with their number."""
        if self._lost:
            raise WriteError(
                f"{self._target}: {self._lost} of {self._seen} values are NaN or out of the range "
                f"of {self.stored}; clip or replace them, or use a wider dtype="
            )


def check_kinds(source: np.dtype[Any], stored: np.dtype[Any], target: str) -> None:
    """Raise WriteError if values of one type can't be written as the other, whatever they are."""
    if source == stored:
        return
    if not {source.kind, stored.kind} <= set("biufc"):
        raise WriteError(f"{target}: {source} values can't be written as {stored}")
    if stored.kind == "b":
        raise WriteError(f"{target}: say which values are True, for example (result > 0)")
    if source.kind == "c" and stored.kind != "c":
        raise WriteError(f"{target}: {stored} would lose the imaginary part; write .real or abs()")


def _convert(block: NDArray[Any], stored: np.dtype[Any]) -> tuple[NDArray[Any], int]:
    """``block`` as ``stored``, and how many of its values that type can't hold."""
    with np.errstate(invalid="ignore", over="ignore"):
        if stored.kind in "fc":
            result = block.astype(stored)
            return result, int(np.count_nonzero(np.isfinite(block) & ~np.isfinite(result)))
        limits = np.iinfo(stored)
        if block.dtype.kind != "f":
            fits = (block >= limits.min) & (block <= limits.max)
        else:
            # float16 can't say the limits. One above the largest integer is a power of two,
            # exact in every wider type; the largest integer itself may not be.
            block = np.rint(block.astype(np.float32) if block.itemsize < 4 else block)
            fits = (block >= float(limits.min)) & (block < float(limits.max + 1))
        return block.astype(stored), block.size - int(np.count_nonzero(fits))
