"""What an operation would give, found without computing it.

The rules for dtypes, memory order and scalars are NumPy's own, and differ between its versions. So
they aren't written down here: the operation is carried out on *miniatures*, arrays of the same
dtypes and the same order of axes in memory, in which an axis of two or more has two. What comes
out tells the dtype, the order and the type of the result, or raises NumPy's own error. The shape
follows from the real shapes by one rule for each family of operations.

What was found is remembered by operation, constants and miniatures, so a chain of 100,000
additions of one kind makes one trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .errors import ShapeMismatchError
from .expression import Op, OpNode, Slot, empty_in_order, fill
from .operations import ADD_SQUARES, BLOCK, SQUARED_DEVIATIONS

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Shape, strides in bytes and dtype of an array, or of a NumPy scalar (``scalar``)."""

    shape: Shape
    strides: Shape
    dtype: np.dtype[Any]
    scalar: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> NDArray[Any]:
        """An uninitialised array of this layout, in memory that goes back to the system."""
        return empty_in_order(self.shape, self.dtype, self.strides)


def layout_of(value: Any) -> Layout | None:
    """The layout of an array or a NumPy scalar; None for anything else, subclasses included."""
    if type(value) is np.ndarray:
        return Layout(value.shape, value.strides, value.dtype)
    if isinstance(value, np.generic):
        return Layout((), (), value.dtype, scalar=True)
    return None


def lies(value: Any, layout: Layout | None) -> bool:
    """Whether ``value`` is an array of this very layout, or a NumPy scalar of it."""
    if layout is None:
        return False
    if type(value) is np.ndarray:
        return (
            value.dtype == layout.dtype
            and value.shape == layout.shape
            and value.strides == layout.strides
            and not layout.scalar
        )
    return layout_of(value) == layout


@lru_cache(maxsize=1024)
def dense(shape: Shape, dtype: np.dtype[Any], order: str = "C") -> Layout:
    """The layout of a C- or Fortran-ordered array without gaps."""
    axes = range(len(shape)) if order == "C" else range(len(shape) - 1, -1, -1)
    return Layout(shape, _strides(shape, tuple(axes), dtype.itemsize), dtype)


def infer(
    op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], layouts: list[Layout]
) -> Layout | None:
    """The layout of ``op.call(*args, **kwargs)`` on operands of ``layouts``.

    None where it can't be foretold. Raises `ShapeMismatchError` where the shapes don't go
    together, and what NumPy raises where the dtypes don't.
    """
    if not layouts:  # an operation on constants alone
        with np.errstate(all="ignore"):
            return layout_of(op.call(*args, **kwargs))
    if any(layout.dtype.hasobject for layout in layouts):
        return None
    foretold = getattr(op.call, "layout", None)
    if foretold is not None:  # a function of users: only its maker knows
        return foretold(layouts)  # type: ignore[no-any-return]
    if op.family == "assign":
        shape, axes = layouts[0].shape, _axes(layouts[0].strides)
        return Layout(shape, _strides(shape, axes, layouts[0].dtype.itemsize), layouts[0].dtype)
    if op.family == "view":
        operand = layouts[0]
        dummy = as_strided(np.empty((), operand.dtype), operand.shape, operand.strides)
        return layout_of(op.call(*fill(args, [dummy]), **kwargs))
    found = None if op.family in ("reduce", "join") else _SHAPES[op.family](layouts)
    outcome = _trial(op, args, kwargs, layouts)
    if outcome is None:
        return None
    if found is not None:
        shape = found
    elif op.family == "reduce":
        shape = _reduced(kwargs, layouts)
    else:
        shape = _joined(op, kwargs, [_shape(item, layouts) for item in args[0]], outcome)
    if outcome.scalar:
        return Layout((), (), outcome.dtype, scalar=True)
    # Several percentiles at once make axes of their own in front; they are constants, so the
    # trial has them in full.
    more = len(outcome.shape) - len(shape)
    if more < 0:
        return None
    shape = outcome.shape[:more] + shape
    return Layout(shape, _strides(shape, outcome.axes, outcome.dtype.itemsize), outcome.dtype)


def transient(node: OpNode, operands: Sequence[Layout | None], result: Layout | None) -> int:
    """Bytes that NumPy takes while it computes, besides operands and result; an upper estimate."""
    name = node.op.name
    told = getattr(node.op.call, "transient", None)
    if told is not None:
        return told  # type: ignore[no-any-return]
    if node.op.elementwise and name != "**":
        return 0
    layouts = [layout for layout in operands if layout is not None]
    if result is None or not layouts or len(layouts) < len(operands):
        return 0
    if node.op is SQUARED_DEVIATIONS:
        return 2 * math.prod(layouts[0].shape) * result.dtype.itemsize
    if hasattr(node.op.call, "layout") or (len(layouts) > 1 and name in ("median", "percentile")):
        # Of their stack.
        return 3 * sum(layout.nbytes for layout in layouts)
    if node.op is ADD_SQUARES and result is not None:
        same = len({_axes(layout.strides) for layout in layouts}) == 1
        return 2 * (min(BLOCK, result.nbytes) if same else result.nbytes)
    if name == "**" and layouts[0].dtype != result.dtype:  # computed aside, and converted
        return result.nbytes
    if node.op.family != "reduce":
        return 0
    operand = layouts[0]
    count = math.prod(operand.shape)
    if name.startswith("nan"):
        return 2 * operand.nbytes + count
    if name == "mean" and operand.dtype == result.dtype == np.float16:  # added up in float32
        return 2 * result.nbytes
    if name in ("var", "std"):
        return count * max(result.dtype.itemsize, operand.dtype.itemsize)
    if name in ("median", "percentile", "quantile"):
        return 2 * operand.nbytes
    if name in ("argmin", "argmax"):  # with the axis moved to the end
        return operand.nbytes
    if name == "count_nonzero":
        return count
    return 0


class _Outcome(NamedTuple):
    shape: Shape
    axes: tuple[int, ...]  # from the largest stride to the smallest
    dtype: np.dtype[Any]
    scalar: bool


_Miniature = tuple[Shape, tuple[int, ...], np.dtype[Any], bool]

# Only ever read and written by single calls. Emptied when full, which forgets nothing of value.
_outcomes: dict[Any, _Outcome | None] = {}
_FULL = 4096


def _trial(
    op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], layouts: list[Layout]
) -> _Outcome | None:
    miniatures = tuple(map(_miniature, layouts))
    key: Any = (op, hashable(args), hashable(kwargs), miniatures)
    try:
        return _outcomes[key]
    except KeyError:
        pass
    except TypeError:  # a constant that can't be hashed
        key = None
    if "ddof" in kwargs:  # more than the miniature has would be a warning
        kwargs = {**kwargs, "ddof": 0}
    with np.errstate(all="ignore"):
        value = op.call(*fill(args, [_make(miniature) for miniature in miniatures]), **kwargs)
    layout = layout_of(value)
    outcome = None
    if layout is not None:
        outcome = _Outcome(layout.shape, _axes(layout.strides), layout.dtype, layout.scalar)
    if key is not None:
        if len(_outcomes) >= _FULL:
            _outcomes.clear()
        _outcomes[key] = outcome
    return outcome


def _miniature(layout: Layout) -> _Miniature:
    shape = tuple(1 if size == 1 else 2 for size in layout.shape)
    return shape, _axes(layout.strides), layout.dtype, layout.scalar


def _make(miniature: _Miniature) -> Any:
    shape, axes, dtype, scalar = miniature
    array = np.ones([shape[axis] for axis in axes], dtype)
    return array[()] if scalar else array.transpose(np.argsort(axes)) if axes else array


def _axes(strides: Shape) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda axis: -abs(strides[axis])))


def _strides(shape: Shape, axes: tuple[int, ...], itemsize: int) -> Shape:
    strides = [0] * len(shape)
    step = itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


def hashable(value: Any) -> Any:
    """``value`` such that equal results mean equal behaviour: 1, 1.0 and True, 0.0 and -0.0 differ.

    Not everything that comes out can be hashed.
    """
    if type(value) is Slot:
        return value
    if isinstance(value, tuple | list):
        return (type(value), tuple(map(hashable, value)))
    if isinstance(value, dict):
        return tuple((name, hashable(item)) for name, item in value.items())
    if isinstance(value, float | complex | np.inexact):
        return (type(value), repr(value))
    return (type(value), value)


def _broadcast(layouts: list[Layout]) -> Shape:
    first = layouts[0].shape
    if all(layout.shape == first for layout in layouts):
        return first
    try:
        return np.broadcast_shapes(*[layout.shape for layout in layouts])
    except ValueError:
        raise ShapeMismatchError(
            "shapes " + " and ".join(str(layout.shape) for layout in layouts) + " don't go together"
        ) from None


def _of_first(layouts: list[Layout]) -> Shape:
    first = layouts[0].shape
    if layouts[0].scalar:  # scalars have no operators in place
        return _broadcast(layouts)
    if len(layouts) > 1 and _broadcast(layouts) != first:
        raise ShapeMismatchError(
            f"an operand of shape {layouts[1].shape} doesn't fit in place into one of shape {first}"
        )
    return first


def _product(layouts: list[Layout]) -> Shape:
    left, right = (layout.shape for layout in layouts)
    if not left or not right:
        raise ValueError("matmul takes no scalars; use * in their place")
    if left[-1] != right[-2 if len(right) > 1 else 0]:
        raise ShapeMismatchError(f"shapes {left} and {right} don't go together in a matrix product")
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    return (*np.broadcast_shapes(left[:-2], right[:-2]), *rows, *columns)


_SHAPES = {"map": _broadcast, "inplace": _of_first, "matmul": _product}


def _reduced(kwargs: dict[str, Any], layouts: list[Layout]) -> Shape:
    shape = layouts[0].shape
    axis = kwargs.get("axis")
    keepdims = kwargs.get("keepdims", False)
    chosen = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    gone = {int(item) % len(shape) for item in chosen} if shape else set()
    return tuple(
        1 if axis in gone else size
        for axis, size in enumerate(shape)
        if keepdims or axis not in gone
    )


def _shape(item: Any, layouts: list[Layout]) -> Shape:
    """The shape of an argument: an operand, or a number."""
    return layouts[item.position].shape if type(item) is Slot else np.shape(item)


def _joined(op: Op, kwargs: dict[str, Any], shapes: list[Shape], outcome: _Outcome) -> Shape:
    axis = int(kwargs.get("axis", 0)) % len(outcome.shape)
    if op.name == "stack":
        if any(shape != shapes[0] for shape in shapes):
            raise ShapeMismatchError("all arrays to be stacked must have one shape")
        return (*shapes[0][:axis], len(shapes), *shapes[0][axis:])
    first = (*shapes[0][:axis], *shapes[0][axis + 1 :])
    if any((*shape[:axis], *shape[axis + 1 :]) != first for shape in shapes):
        raise ShapeMismatchError("arrays to be joined must agree in all other axes")
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
