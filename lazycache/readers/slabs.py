"""Voxels that lie in one block of a file, read slab by slab into one buffer.

A slab is read, selected from, scaled and converted while it is in the processor's cache, and lands
at its place in the result: nothing else of the size of the volume ever exists. Where there is
nothing to do to the voxels they are decompressed straight into the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lazycache import _buffers

from .streams import STEP, Stream, decoders, is_compressed, open_stream

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the voxels are in a file, and what they mean.

    ``dtype`` is that on disk, with its byte order. ``order`` is the order of the axes in the file.
    A voxel's value is what is stored times ``slope`` plus ``inter``.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    order: Literal["C", "F"]
    slope: float = 1.0
    inter: float = 0.0
    open: Callable[[str], Stream] | None = None
    """Opens ``path`` where its name alone doesn't say how; such a stream is never kept."""

    @property
    def scaled(self) -> bool:
        return (self.slope, self.inter) != (1, 0)

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype of the values, scaling applied: as nibabel chooses it."""
        if not self.scaled:
            return self.dtype
        from nibabel import volumeutils

        utilities: Any = volumeutils  # its annotations leave out the arrays that it takes
        values: NDArray[Any] = utilities.apply_read_scaling(
            np.zeros(0, self.dtype), np.asarray(self.slope), np.asarray(self.inter)
        )
        return values.dtype

    @property
    def stored_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Position just after the last voxel."""
        return self.offset + self.stored_nbytes

    def nbytes(self, dtype: np.dtype[Any] | None = None) -> int:
        """What the result takes, in ``dtype`` or in that of the values."""
        return math.prod(self.shape) * (dtype or self.value_dtype).itemsize

    def peak_nbytes(self, dtype: np.dtype[Any] | None = None) -> int:
        """The most that reading takes: the result, the decoder's buffers, a slab at each stage."""
        values = self.value_dtype
        slab = min(STEP, self.stored_nbytes)
        beside = 0
        if self.open is not None or is_compressed(self.path):
            beside += 3 * slab
        if self.scaled or (dtype or values) != self.dtype:
            beside += slab
        if self.scaled and (dtype or values) != values:
            beside += slab * values.itemsize // self.dtype.itemsize
        return self.nbytes(dtype) + beside


class Blocks:
    """The voxels of one file forwards, in the order of the file, as many at a time as one likes.

    One thread at a time may use it. Close it at the end, or leave it to ``with closing(...)``.
    """

    def __init__(self, layout: Layout, dtype: np.dtype[Any] | None = None) -> None:
        self.dtype = layout.value_dtype if dtype is None else dtype
        self._layout = layout
        self._left = math.prod(layout.shape)
        self._scale = _Scale(layout) if layout.scaled else None
        self._scratch = np.empty(0, np.uint8)
        self._stream = (layout.open or open_stream)(layout.path)
        try:
            self._stream.skip_to(layout.offset)
        except BaseException:
            self._stream.close()
            raise

    def into(self, flat: NDArray[Any]) -> None:
        """Fill ``flat`` (one axis, contiguous, of `dtype`) with the next voxels.

        Raises what reading raises; the position is lost then. With the last voxel what follows it
        in the file is checked as far as `read` does.
        """
        stored = self._layout.dtype
        if self._scale is None and flat.dtype == stored:
            self._stream.readinto(flat.view(np.uint8).data)
        else:
            step = max(1, STEP // stored.itemsize)
            for start in range(0, flat.size, step):
                self._convert(flat[start : start + step])
        self._left -= flat.size
        if not self._left:
            self._stream.finish()

    def skip(self, count: int) -> None:
        """Pass over the next ``count`` voxels."""
        self._left -= count
        done = math.prod(self._layout.shape) - self._left
        self._stream.skip_to(self._layout.offset + done * self._layout.dtype.itemsize)

    def _convert(self, flat: NDArray[Any]) -> None:
        nbytes = flat.size * self._layout.dtype.itemsize
        if self._scratch.nbytes < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        self._stream.readinto(self._scratch[:nbytes].data)
        values = self._scratch[:nbytes].view(self._layout.dtype)
        if self._scale is None:
            flat[...] = values
        else:
            self._scale.into(flat, values)

    def close(self) -> None:
        """Let go of the file and of the buffers."""
        self._stream.close()
        self._scratch = np.empty(0, np.uint8)


def read(layout: Layout, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """All the voxels, read-only, in ``dtype`` or in that of the values."""
    return read_part(layout, (slice(None),) * len(layout.shape), dtype)


def read_part(layout: Layout, index: Index, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """The voxels at ``index`` (an int or a slice with a positive step for each axis), read-only.

    Only the slabs that hold some of them are read. A compressed file is decompressed from where
    the last part of it ended, or from its start.
    """
    values = layout.value_dtype
    dtype = values if dtype is None else np.dtype(dtype)
    # From here on the first axis is the one that varies fastest in the file.
    backwards = slice(None, None, -1) if layout.order == "C" else slice(None)
    sizes = layout.shape[backwards]
    taken = [_taken(item, size) for item, size in zip(index[backwards], sizes, strict=True)]
    counts = tuple(
        len(positions)
        for positions, item in zip(taken, index[backwards], strict=True)
        if isinstance(item, slice)
    )
    shape = counts[backwards]
    total = math.prod(counts)
    if total * min(dtype.itemsize, layout.dtype.itemsize) == 0:
        return _buffers.readonly(np.zeros(shape, dtype, layout.order))
    buffer = _buffers.Buffer(total * dtype.itemsize)
    flat = buffer.writable((total,), dtype)
    slabs = _slabs(taken, sizes, layout.dtype.itemsize)
    if layout.open is not None or total == math.prod(layout.shape):
        stream = (layout.open or open_stream)(layout.path)
        try:
            _fill(flat, layout, slabs, stream)
            if stream.position >= layout.end:
                stream.finish()
        finally:
            stream.close()
    else:
        first = layout.offset + layout.dtype.itemsize * _position(
            [positions[0] for positions in taken], sizes
        )
        with decoders.stream(layout.path, first, layout.end) as stream:
            _fill(flat, layout, slabs, stream)
    return buffer.readonly(shape, dtype, layout.order)


def _taken(item: int | slice, size: int) -> range:
    if isinstance(item, slice):
        return range(size)[item]
    position = range(size)[item]
    return range(position, position + 1)


@dataclass(frozen=True, slots=True)
class _Slab:
    """A run of stored voxels: where it starts (in voxels), its shape, what is taken of it."""

    start: int
    shape: tuple[int, ...]
    select: tuple[slice, ...]
    count: int

    @property
    def whole(self) -> bool:
        return self.count == math.prod(self.shape)


def _slabs(taken: list[range], sizes: tuple[int, ...], itemsize: int) -> Iterator[_Slab]:
    """Runs of at most `STEP` bytes, in the order of the file, that hold all voxels taken."""
    if not taken:
        yield _Slab(0, (), (), 1)
        return
    # The cut: rows below this axis are read whole, those along it a few at once, and those of the
    # axes above it one after the other.
    cut = max(
        axis
        for axis in range(len(sizes))
        if axis == 0 or math.prod(sizes[:axis]) * itemsize <= STEP
    )
    row = math.prod(sizes[:cut])
    along = taken[cut]
    at_once = max(1, STEP // (row * itemsize * along.step))
    below = tuple(slice(p.start, p.stop, p.step) for p in taken[:cut])
    below_count = math.prod(len(p) for p in taken[:cut])
    for above in product(*reversed(taken[cut + 1 :])):
        outer = _position(list(reversed(above)), sizes[cut + 1 :]) * row * sizes[cut]
        for first in range(0, len(along), at_once):
            rows = along[first : first + at_once]
            span = rows[-1] - rows[0] + 1
            yield _Slab(
                start=outer + rows[0] * row,
                shape=(*sizes[:cut], span),
                select=(*below, slice(0, span, rows.step)),
                count=below_count * len(rows),
            )


def _position(at: list[int], sizes: tuple[int, ...]) -> int:
    """The place of a voxel in the file, in voxels, the first axis varying fastest."""
    place = 0
    for index, size in zip(reversed(at), reversed(sizes), strict=True):
        place = place * size + index
    return place


def _fill(flat: NDArray[Any], layout: Layout, slabs: Iterator[_Slab], stream: Stream) -> None:
    itemsize = layout.dtype.itemsize
    direct = flat.dtype == layout.dtype and not layout.scaled
    scratch = np.empty(0, np.uint8)
    scale = _Scale(layout) if layout.scaled else None
    done = 0
    for slab in slabs:
        stream.skip_to(layout.offset + slab.start * itemsize)
        target = flat[done : done + slab.count]
        done += slab.count
        if direct and slab.whole:
            stream.readinto(target.view(np.uint8).data)
            continue
        nbytes = math.prod(slab.shape) * itemsize
        if scratch.nbytes < nbytes:
            scratch = np.empty(nbytes, np.uint8)
        stream.readinto(scratch[:nbytes].data)
        stored = scratch[:nbytes].view(layout.dtype).reshape(slab.shape, order="F")[slab.select]
        placed = target.reshape(stored.shape, order="F")
        if scale is None:
            placed[...] = stored
        else:
            scale.into(placed, stored)


class _Scale:
    """``stored * slope + inter`` to the byte as nibabel has it, with no large array in between.

    nibabel chooses a dtype that is wide enough and computes in it, so converting first and scaling
    in place gives the same, faster.
    """

    def __init__(self, layout: Layout) -> None:
        self._slope, self._inter = layout.slope, layout.inter
        self._scratch = np.empty(0, layout.value_dtype)

    def into(self, placed: NDArray[Any], stored: NDArray[Any]) -> None:
        values = placed
        if placed.dtype != self._scratch.dtype:
            if self._scratch.size < stored.size:
                self._scratch = np.empty(stored.size, self._scratch.dtype)
            values = self._scratch[: stored.size].reshape(stored.shape, order="F")
        values[...] = stored
        if self._slope != 1:
            values *= self._slope
        if self._inter != 0:
            values += self._inter
        if values is not placed:
            placed[...] = values
