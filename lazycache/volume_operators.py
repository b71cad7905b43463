"""Steps that volumes of AIMS do by their own operators.

A volume that nothing else needs any more is written over (``v += w`` in place of ``v + w``) where
that gives the very same voxels and type: which it does is tried, not assumed, since AIMS may round
the two in different ways. What anybody may look at is copied before it is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _volumes
from ._volumes import kind_of
from .expression import Op, OpNode, Slot, copy_of, fill
from .layout import Layout, hashable, layout_of
from .operations import OVER

# Only ever read and written by single calls. Emptied when full, which forgets nothing of value.
_same_over: dict[Any, bool] = {}
_FULL = 4096
_TRIED = (16, 16, 16, 1)


def apply_own(step: OpNode, values: list[Any], last: bool, result: Layout | None) -> Any:
    """The result of a step on ``values``, some of them volumes, which will have the layout
    ``result`` if that is known. The first of them is nobody else's if it is the ``last`` use of it.

    Raises what `lazycache._volumes.check` raises before AIMS would end the process.
    """
    op = step.op
    _volumes.check(op.name, fill(step.args, values))
    if op.family in ("inplace", "assign"):
        if not last:
            values = [_copied(values[0]), *values[1:]]
    elif last and result is not None and layout_of(values[0]) == result:
        layouts = [layout for value in values if (layout := layout_of(value)) is not None]
        if gives_same_over(step, layouts):
            return OVER[op.call](*fill(step.args, values))
    return _volumes.owned(op.name, op.call(*fill(step.args, values), **dict(step.kwargs or {})))


def _copied(value: Any) -> Any:
    if kind_of(value):
        return _volumes.copy(value)
    return copy_of(value) if type(value) is np.ndarray else value


def gives_same_over(step: OpNode, layouts: Sequence[Layout | None]) -> bool:
    """Whether an operator on volumes gives the same by writing over the first, its left one.

    Tried once for each operator, its constants and the types of the volumes, on many values. The
    header of a result is a copy of that of the left volume in any case.
    """
    op, left = step.op, step.args[0]
    over = OVER.get(op.call) if op.own else None
    known = [layout for layout in layouts if layout is not None]
    if over is None or len(known) < len(layouts) or type(left) is not Slot or left.position:
        return False
    key = (op, hashable(step.args), tuple((layout.dtype, layout.kind) for layout in known))
    try:
        found = _same_over.get(key)
    except TypeError:  # a constant that can't be hashed
        return False
    if found is None:
        if len(_same_over) >= _FULL:
            _same_over.clear()
        found = _same_over[key] = _try_over(op, over, step.args, known)
    return found


def _try_over(
    op: Op, over: Callable[..., Any], args: tuple[Any, ...], layouts: Sequence[Layout]
) -> bool:
    bits = np.random.default_rng(0)
    operands = []
    with np.errstate(all="ignore"):
        for layout in layouts:
            if layout.scalar or not layout.shape or layout.dtype.kind not in "iufc":
                return False
            count = math.prod(_TRIED) * layout.dtype.itemsize
            values = bits.integers(0, 256, count, np.uint8).view(layout.dtype).reshape(_TRIED)
            # Integers are never divided by these; which NaN comes out is nobody's concern.
            values[np.isin(values, (0, -1)) | np.isnan(values)] = 1
            operands.append(_volumes.make(values) if layout.kind else values)
        expected = op.call(*fill(args, operands))
        found = over(*fill(args, operands))
        if found is not operands[0] or kind_of(found) != kind_of(expected):
            return False
        pair = [np.array(np.asarray(volume)) for volume in (expected, found)]
        for values in pair:
            values[np.isnan(values)] = 0
        return pair[0].tobytes() == pair[1].tobytes()
