"""Reductions along the slowest axes of one array, as chains of steps that can go by blocks.

What NumPy adds up along such an axis it adds one element of the axis after the other, each place
on its own: ``run.mean(-1)`` of a 4D run as images have it takes the volumes in turn. So the steps
below give the same bytes. They are those of `numpy.mean` and `numpy.var`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import operations as ops
from .expression import ONE, TWO, Node, Op, OpNode, Slot
from .layout import Layout, infer
from .operations import Reduction
from .spaces import way

_KNOWN = {"axis", "keepdims", "dtype", "ddof"}
_PLAIN = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "any": np.logical_or,
    "all": np.logical_and,
}


def along_slowest(node: OpNode, data: Layout) -> Node | None:
    """The chain for a reduction of ``data``; None where it isn't one along the slowest axes."""
    kwargs = {"axis": None, **(node.kwargs or {})}
    if not isinstance(node.op.call, Reduction) or not kwargs.keys() <= _KNOWN:
        return None
    name = node.op.call.name
    total = ops.ufunc_reduce(_PLAIN.get(name, np.add))
    shape: dict[str, Any] = {key: kwargs[key] for key in ("axis", "keepdims") if key in kwargs}
    if name in _PLAIN:
        result = _node(node, total, node.operands, kwargs)
        return result if _folds(result, [data]) else None
    if name not in ("mean", "var", "std"):
        return None
    dtype = kwargs.get("dtype")
    if dtype is None and data.dtype.kind in "biu":
        dtype = np.dtype(np.float64)
    half = dtype is None and data.dtype == np.float16 and name == "mean"
    if half:
        dtype = np.dtype(np.float32)
    sums: dict[str, Any] = {**shape, "dtype": dtype}
    if name != "mean":
        sums["keepdims"] = True
    mean = _node(node, total, node.operands, sums)
    if not _folds(mean, [data]):
        return None
    axis = kwargs.get("axis")
    if axis is None:
        axis = tuple(range(len(data.shape)))
    lengths = [data.shape[int(item)] for item in (axis if isinstance(axis, tuple) else (axis,))]
    count = math.prod(lengths)
    if count == math.prod(data.shape):
        return _of_all(node, data, mean, count, half)
    mean = _node(node, ops.DIVIDE, (mean,), {}, (Slot(0), np.intp(count)))
    if name == "mean":
        return _node(node, ops.ASTYPE, (mean,), {}, (Slot(0), data.dtype)) if half else mean
    squares = _node(
        node, ops.SQUARED_DEVIATIONS, (*node.operands, mean), {**shape, "dtype": dtype}, TWO
    )
    freedom = {"ddof": kwargs.get("ddof", 0)}
    variance = _node(node, ops.DIVIDE_VARIANCE, (squares,), freedom, (Slot(0), count))
    return variance if name == "var" else _node(node, ops.SQRT, (variance,), {})


def _of_all(node: OpNode, data: Layout, mean: OpNode, count: int, half: bool) -> Node | None:
    """The chain for all elements at once, which gives a number (or an array of one)."""
    kwargs = dict(node.kwargs or {})
    whole = (Slot(0), np.intp(count))
    first = _node(node, ops.DIVIDE_TOTAL, (mean,), {}, whole)
    name = node.op.name
    if name == "mean":
        return _node(node, ops.ASTYPE, (first,), {}, (Slot(0), data.dtype)) if half else first
    sums = {**(mean.kwargs or {}), "keepdims": kwargs.get("keepdims", False)}
    squares = _node(node, ops.SQUARED_DEVIATIONS, (*node.operands, first), sums, TWO)
    if not _folds(squares, [data, infer(mean.op, ONE, dict(mean.kwargs or {}), [data])]):
        return None
    freedom = {"ddof": kwargs.get("ddof", 0)}
    variance = _node(node, ops.DIVIDE_TOTAL, (squares,), freedom, whole)
    return variance if name == "var" else _node(node, ops.SQRT_TOTAL, (variance,), {})


def _node(
    node: OpNode,
    op: Op,
    operands: tuple[Node, ...],
    kwargs: dict[str, Any],
    args: tuple[Any, ...] = ONE,
) -> OpNode:
    return OpNode(op, operands, args, kwargs, node.location, "ignore")


def _folds(step: OpNode, layouts: Sequence[Layout | None]) -> bool:
    known = [layout for layout in layouts if layout is not None]
    if len(known) < len(layouts):
        return False
    found = way(step, known, infer(step.op, step.args, dict(step.kwargs or {}), known))
    return found is not None and found.kind in ("fold", "total")
