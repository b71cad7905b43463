"""What can be computed in blocks and still be NumPy's value to the byte.

An array without gaps is a row of elements in memory. Operations that work on each element alone
may be done on one piece of the row after the other, if all operands lie in memory in the same
order: a `Space` is that order. An operand may also have fewer axes, the fastest ones, and so be
the same for each period of the row (a 3D mask under a 4D run), or be a single element.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import operations as ops
from .expression import Op, OpNode
from .folds import Stacked
from .layout import Layout
from .voxelwise import Voxelwise

# The axes that are longer than 1, the fastest in memory first: (place, length).
_Axes = tuple[tuple[int, int], ...]


# Fewer elements than these aren't folded at a time. Not 1: NumPy adds up a lone one pairwise.
FEWEST = 1 << 10


class Space(NamedTuple):
    """A row of ``size`` elements: the axes of an array without gaps, the fastest first."""

    axes: _Axes
    size: int


@lru_cache(maxsize=1024)
def space_of(layout: Layout, ndim: int | None = None) -> Space | None:
    """The row that an array is, seen as one of ``ndim`` axes; None where it has gaps."""
    if layout.scalar:
        return Space((), 1)
    missing = 0 if ndim is None else ndim - len(layout.shape)
    step = layout.dtype.itemsize
    axes = []
    order = sorted(range(len(layout.shape)), key=lambda axis: abs(layout.strides[axis]))
    for axis in order:
        length = layout.shape[axis]
        if length == 0:
            return None
        if length == 1:
            continue
        if layout.strides[axis] != step:
            return None
        step *= length
        axes.append((axis + missing, length))
    return Space(tuple(axes), step // layout.dtype.itemsize)


class Way(NamedTuple):
    """How a step goes by blocks of ``space``.

    each  every element of the result comes from those at its place
    fold  elements of the slowest axes are added up, or the like, one after the other; the result
          has ``unit`` elements
    slab  the faster axes are reduced: a block is made of pieces of ``unit`` elements, at least two
    rows  as each, but the result has several rows of ``unit`` elements, one after the other
    total all elements are reduced to one
    """

    space: Space
    kind: Literal["each", "fold", "slab", "rows", "total"] = "each"
    unit: int = 1


def way(step: OpNode, layouts: Sequence[Layout | None], result: Layout | None) -> Way | None:
    """How ``step`` can be done in blocks; None if it has to be done at once.

    Volumes of one element are left out: where NumPy adds them up it does so pairwise.
    """
    known = [layout for layout in layouts if layout is not None and not layout.dtype.hasobject]
    if result is None or not known or len(known) < len(layouts):
        return None
    if step.op.own and any(layout.kind for layout in (*known, result)):
        return None
    if step.op.family == "reduce":
        return _reducing(step, known, result)
    if result.scalar or not _by_element(step):
        return None
    found = _rows(step, known, result) if isinstance(step.op.call, Voxelwise) else None
    space = space_of(result) if found is None else found.space
    if space is None or space.size < 2:
        return None
    ndim = max(len(layout.shape) for layout in known)
    if any(period(layout, space, ndim) is None for layout in known):
        return None
    return found or Way(space)


@lru_cache(maxsize=1024)
def period(layout: Layout, space: Space, ndim: int) -> int | None:
    """After how many elements of ``space``, of ``ndim`` axes, an operand of a step begins again.

    The size of the space for one that doesn't, 1 for a single element; None for one that can't be
    had in blocks.
    """
    own = space_of(layout, ndim)
    if own is None or own.axes != space.axes[: len(own.axes)]:
        return None
    return own.size


def _reducing(step: OpNode, layouts: list[Layout], result: Layout) -> Way | None:
    data, axis = layouts[0], (step.kwargs or {}).get("axis")
    space = space_of(data)
    if space is None or space.size < 2:
        return None
    ndim = len(data.shape)
    if math.prod(result.shape) == 1:
        return Way(space, "total") if _totals(step, layouts, space, result) else None
    if len(space.axes) < 2 or axis is None:
        return None
    gone = {int(item) % ndim for item in (axis if isinstance(axis, tuple) else (axis,))}
    kept = [(place, length) for place, length in space.axes if place not in gone]
    slowest, length = space.axes[-1]
    if slowest not in gone:
        # Slabs of one are summed up in another order than those of two.
        return (
            Way(space, "slab", space.size // length) if len(layouts) == 1 and length > 1 else None
        )
    unit = math.prod(length for _, length in kept)
    if not isinstance(step.op.call, ops.AxisFold) or tuple(kept) != space.axes[: len(kept)]:
        return None
    if unit < FEWEST or any(period(other, space, ndim) not in (1, unit) for other in layouts[1:]):
        return None
    if not (step.kwargs or {}).get("keepdims"):
        kept = [(place - sum(axis < place for axis in gone), size) for place, size in kept]
    return Way(space, "fold", unit) if space_of(result) == Space(tuple(kept), unit) else None


def _totals(step: OpNode, layouts: list[Layout], space: Space, result: Layout) -> bool:
    call = step.op.call
    if not isinstance(call, ops.AxisFold) or any(
        math.prod(other.shape) != 1 for other in layouts[1:]
    ):
        return False
    terms = call.terms(*(np.ones(1, layout.dtype) for layout in layouts)).dtype
    return call.total(space.size, terms, result.dtype) is not None


def _rows(step: OpNode, layouts: list[Layout], result: Layout) -> Way | None:
    """A function of voxels that gives several values for each: they make a last, slowest axis."""
    space = space_of(layouts[0])
    if space is None or len(result.shape) == len(layouts[0].shape):
        return None
    return Way(space, "rows", space.size)


_BY_ELEMENT = {
    ops.WHERE, ops.ROUND, ops.ASTYPE, ops.COPY, ops.START, ops.ZEROS, ops.NOT_NAN,
    ops.NAN_DEVIATION, ops.ADD_SQUARES, ops.ADD_QUIET, ops.MINIMUM, ops.MAXIMUM, ops.FMIN, ops.FMAX,
    ops.SQRT, ops.DIVIDE, ops.DIVIDE_VARIANCE, ops.NAN_MEAN, ops.NAN_MEAN_QUIET, ops.NAN_VARIANCE,
    ops.WARN_IF_NAN,
}  # fmt: skip
_HARMLESS = {"dtype", "order", "casting", "decimals", "ddof", "q"}


def _by_element(step: OpNode) -> bool:
    op = step.op
    if op.family not in ("map", "inplace") or not set(step.kwargs or ()) <= _HARMLESS:
        return False
    if isinstance(op.call, Stacked):
        # Several percentiles at once make an axis of their own.
        return np.ndim((step.kwargs or {}).get("q", 0)) == 0
    return isinstance(op.call, ops.InPlace | Voxelwise) or op.elementwise or op in _BY_ELEMENT


def takes_memory(op: Op) -> bool:
    """Whether ``op`` has temporaries of the size of its operands."""
    if isinstance(op.call, Voxelwise):
        return True
    return op.into is None and not isinstance(op.call, ops.IntoFirst | ops.InPlace)


def boundaries(
    space: Space, count: int, periods: Collection[int], unit: int = 1
) -> list[tuple[int, int]]:
    """The blocks of a space, of about ``count`` elements, none across the end of a period.

    Periods shorter than a block fit into it several times, and all blocks begin with one. With a
    ``unit``, blocks have two or more units, and no period is longer than that.
    """
    if unit > 1:
        pieces = max(1, space.size // (unit * max(2, count // unit)))
        cuts = [space.size // unit * piece // pieces * unit for piece in range(pieces + 1)]
        return list(pairwise(cuts))
    short = max((p for p in periods if 1 < p <= count), default=1)
    count -= count % short
    long = min((p for p in periods if p > count), default=space.size)
    pieces = -(-long // count)
    each = -(-long // pieces)
    each += -each % short
    return [
        (base + start, min(base + start + each, base + long))
        for base in range(0, space.size, long)
        for start in range(0, long, each)
    ]


def row(array: NDArray[Any]) -> NDArray[Any]:
    """An array without gaps as the row of its elements in memory: a view of one axis."""
    slowest_first = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(slowest_first).reshape(-1)


def slab(flat: NDArray[Any], layout: Layout, axis: int, length: int) -> NDArray[Any]:
    """A piece of the row of an array as an array of its shape, but of ``length`` along ``axis``.

    That is the slowest of its axes that are longer than 1.
    """
    shape = [length if place == axis else size for place, size in enumerate(layout.shape)]
    order = sorted(range(len(shape)), key=lambda place: -abs(layout.strides[place]))
    return flat.reshape([shape[place] for place in order]).transpose(np.argsort(order))


def place_of(axis: int, layout: Layout, ndim: int, kwargs: Mapping[str, Any]) -> int:
    """The place of an axis of the operand among the ``ndim`` axes of what a reduction gives."""
    gone = kwargs["axis"] if isinstance(kwargs["axis"], tuple) else (kwargs["axis"],)
    count = len(layout.shape)
    if kwargs.get("keepdims"):
        return axis + ndim - count
    before = sum(int(item) % count < axis for item in gone)
    return axis - before + ndim - (count - len(gone))
