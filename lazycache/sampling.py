"""The values of a volume on the planes of another grid, by scipy.

One plane of the result is computed at a time, so nothing beside the source has the size of a
volume, but for the coefficients of splines. A plane has the same values whichever others are
computed.

A voxel of the result is outside where its centre lies beyond the centres of the outermost voxels of
the source, as in scipy and nibabel.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache import _buffers

# Headers hold float32, so that 0.8 mm isn't 0.8 there, and what should be halfway between two
# voxels is so nearly: numbers this near to a simple fraction are taken for it.
_NEAR = 1e-7
_SIMPLE = 100
# Coordinates are sums, rounded at each step.
_ROUNDING = 1e-9

Shape3 = tuple[int, ...]

# Bytes of coordinates and values of one voxel of a plane, at most.
_PER_VOXEL = 72
_OF_SCIPY = frozenset(map(np.dtype, ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")))

LARGEST_ORDER = 5


def plain(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """``matrix`` with its numbers that are nearly simple fractions made exactly these."""
    simple = [float(Fraction(number).limit_denominator(_SIMPLE)) for number in matrix.flat]
    near = np.reshape(simple, matrix.shape)
    return np.where(np.abs(near - matrix) <= _NEAR * np.maximum(1, np.abs(matrix)), near, matrix)


def transient_nbytes(
    dtype: np.dtype[Any], source: Shape3, matrix: NDArray[np.float64], shape: Shape3, order: int
) -> int:
    """The most bytes that a `Sampler` of these takes, and the computing of its planes."""
    planes = _PER_VOXEL * shape[0] * shape[1]
    if _is_same(source, plain(matrix), shape) or not _copies(dtype, order):
        return planes
    return planes + 8 * math.prod(source)


def _is_same(source: Shape3, matrix: NDArray[np.float64], shape: Shape3) -> bool:
    return source == shape and np.array_equal(matrix, np.eye(4))


def _copies(dtype: np.dtype[Any], order: int) -> bool:
    return order > 1 or (order == 1 and dtype not in _OF_SCIPY)


def channels(array: NDArray[Any]) -> list[NDArray[Any]]:
    """Views of the real numbers that ``array`` is made of: its fields, real and imaginary parts."""
    if array.dtype.names:
        return [array[name] for name in array.dtype.names]
    return [array.real, array.imag] if array.dtype.kind == "c" else [array]


class Sampler:
    """The values of a volume (three axes of real numbers) on a grid of ``shape``.

    ``matrix`` (4x4) leads from the grid's indices to those of the volume. ``order`` is that of the
    splines: 0 is the nearest voxel, with no arithmetic on its value. ``fill`` is for what lies
    outside, and for what is NaN where integers are wanted.
    """

    def __init__(
        self,
        volume: NDArray[Any],
        matrix: NDArray[np.float64],
        shape: Shape3,
        order: int,
        fill: float,
    ) -> None:
        matrix = plain(matrix)
        self._volume = volume
        self._matrix, self._offset = matrix[:3, :3], matrix[:3, 3]
        self._shape = shape
        self._order = order
        self._fill = fill
        self._same = _is_same(volume.shape, matrix, shape)
        if not self._same and _copies(volume.dtype, order):
            self._volume = _coefficients(volume, order)

    def plane(self, number: int, out: NDArray[Any]) -> None:
        """Put the voxels [:, :, number] of the grid into ``out``, rounded if it holds integers."""
        if self._same:
            convert(self._volume[:, :, number], out, self._fill)
        elif self._order == 0:
            self._nearest(number, out)
        else:
            self._interpolated(number, out)

    def _nearest(self, number: int, out: NDArray[Any]) -> None:
        x, y = np.ogrid[: self._shape[0], : self._shape[1]]
        places = []
        inside: Any = True
        for row, start, size in zip(self._matrix, self._offset, self._volume.shape, strict=True):
            # Along axes that don't matter one number does for all.
            terms = [step * at for step, at in zip(row, (x, y, number), strict=True) if step]
            place = np.asarray(sum(terms, start=start))
            inside = inside & (place >= -_ROUNDING) & (place <= size - 1 + _ROUNDING)
            nearest = np.floor(place + (0.5 + _ROUNDING)).astype(np.intp)
            places.append(nearest.clip(0, size - 1))
        convert(np.broadcast_to(self._volume[tuple(places)], out.shape), out, self._fill)
        out[~np.broadcast_to(inside, out.shape)] = self._fill

    def _interpolated(self, number: int, out: NDArray[Any]) -> None:
        from scipy.ndimage import affine_transform

        # Transposed, so that both are walked through in the order in which they lie in memory.
        values = np.empty((1, self._shape[1], self._shape[0]), np.float64)
        affine_transform(
            self._volume.T,
            self._matrix[::-1, ::-1],
            (self._offset + self._matrix[:, 2] * number)[::-1],
            output=values,
            order=self._order,
            mode="constant",
            cval=self._fill,
            prefilter=False,
        )
        convert(values[0].T, out, self._fill)


def _coefficients(volume: NDArray[Any], order: int) -> NDArray[np.float64]:
    found = _buffers.empty(volume.shape, np.float64, "F")
    found[...] = volume
    if order > 1:
        from scipy.ndimage import spline_filter1d

        for axis in range(3):
            spline_filter1d(found, order, axis, output=found)
    return found


def convert(values: NDArray[Any], out: NDArray[Any], fill: float) -> None:
    """``out[...] = values``: integers get the nearest one that they can hold, halves the even one.

    NaN becomes ``fill``. Of bool, whatever rounds to 0 is False.
    """
    wanted, given = out.dtype, values.dtype
    if wanted == given or wanted.kind == "f" or (given.kind == "b" and wanted.kind in "iu"):
        with np.errstate(over="ignore"):
            out[...] = values
    elif given.kind == "f":
        values = np.rint(values, dtype=np.float64)
        missing = np.isnan(values)
        if wanted.kind == "b":
            out[...] = values != 0
        else:
            low, high = map(float, _ends(wanted))
            if high > _ends(wanted)[1]:  # of 64 bits: the largest float below
                high = float(np.nextafter(high, 0))
            out[...] = np.where(missing, 0, values).clip(low, high)
        out[missing] = fill
    elif wanted.kind == "b":
        out[...] = values != 0
    else:
        low, high = (int(end) for end in _ends(wanted))
        first, last = (int(end) for end in _ends(given))
        out[...] = values.clip(max(low, first), min(high, last))


def _ends(dtype: DTypeLike) -> tuple[int, int]:
    info = np.iinfo(np.dtype(dtype))
    return int(info.min), int(info.max)


def holds(dtype: np.dtype[Any], fill: Any) -> bool:
    """Whether a voxel of ``dtype`` can have the value ``fill`` (the nearest float, for floats)."""
    if dtype.names:
        return all(holds(dtype[name], fill) for name in dtype.names)
    if dtype.kind == "c":
        return True
    if isinstance(fill, complex):
        return False
    if dtype.kind == "f":
        return True
    low, high = (0, 1) if dtype.kind == "b" else _ends(dtype)
    return bool(np.isfinite(fill)) and fill == int(fill) and low <= fill <= high
