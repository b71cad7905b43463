"""Functions over lists, as chains of operations that take one operand at a time.

``fold("mean")`` is `numpy.mean` of the stack of its operands along the new axis, to the byte,
without the stack. NumPy adds along that axis from the first operand to the last, each element on
its own, so a chain of additions in the same type gives the same sums. Types and memory order
depend on all operands together, so the chain is made once the headers are known; what they come
to is found on miniatures of the stack (see ``layout``).

Volumes of one element are stacked indeed: NumPy adds those pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import operations as ops
from .errors import ShapeMismatchError
from .expression import ONE, TWO, Info, Node, Op, OpNode, Slot, describe
from .grid import listed
from .layout import Layout, infer

LISTS = (
    "mean", "sum", "std", "var", "min", "max", "count_nonzero", "median", "percentile",
    "nanmean", "nansum", "nanstd", "nanvar", "nanmin", "nanmax",
)  # fmt: skip


@cache
def fold(name: str) -> Op:
    """The operation over a list that `numpy` calls ``name``; ``ddof=`` and ``q=`` are passed on."""
    return Op(name, Fold(name), "fold")


@dataclass(frozen=True, slots=True)
class Stacked:
    """A function of NumPy of the stack of its arguments, along the new axis."""

    function: Any

    def __call__(self, operands: list[Any], **kwargs: Any) -> Any:
        return self.function(np.stack(operands), axis=0, **kwargs)


@dataclass(frozen=True, slots=True)
class Fold:
    """Expands a function over a list into a chain; see the module."""

    name: str

    def __call__(self, node: OpNode, infos: Sequence[Info]) -> Node:
        check_shapes(node, infos)
        kwargs = dict(node.kwargs or {})
        layouts = [info.layout for info in infos]
        plan = None
        if all(layout is not None for layout in layouts) and self.name in _CHAINS:
            plan = _Chain.of(self.name, node, layouts, kwargs)
        if plan is None:
            slots = [Slot(index) for index in range(len(node.operands))]
            op = Op(self.name, Stacked(getattr(np, self.name)))
            return OpNode(op, node.operands, (slots,), kwargs, node.location, "ignore")
        chain: Node = _CHAINS[self.name](plan, **kwargs)
        return chain


def check_shapes(node: OpNode, infos: Sequence[Info]) -> None:
    """Raise one `ShapeMismatchError` that names the operands whose shape isn't the most common."""
    known = [
        (describe(operand), info.layout.shape)
        for operand, info in zip(node.operands, infos, strict=True)
        if info.layout is not None
    ]
    shapes = [shape for _, shape in known]
    if len(set(shapes)) < 2:
        return
    usual = max(dict.fromkeys(shapes), key=shapes.count)
    lines = [f"{name} has {shape}" for name, shape in known if shape != usual]
    raise ShapeMismatchError(
        f"{node.op.name} of {len(known)} images: {shapes.count(usual)} have the shape {usual}, but "
        f"{listed(lines)}. Leave those out, or bring them to one shape"
    )


class _Chain:
    """The operands of a fold, and the types that NumPy's reduction of their stack would have."""

    def __init__(self, node: OpNode, stack: Layout, result: Layout, order: str) -> None:
        self.operands = node.operands
        self.node = node
        self.stack = stack.dtype
        self.result = result.dtype
        self.order = order

    @classmethod
    def of(
        cls, name: str, node: OpNode, layouts: list[Layout], kwargs: dict[str, Any]
    ) -> _Chain | None:
        """None where only the real stack will do."""
        first = layouts[0]
        if math.prod(first.shape) < 2 or first.scalar:
            return None
        # Which distinct layouts there are decides everything; two make a stack.
        distinct = list(dict.fromkeys(layouts))
        sample = distinct if len(distinct) > 1 else distinct * 2
        slots = [Slot(index) for index in range(len(sample))]
        stack = infer(ops.STACK, (slots,), {"axis": 0}, sample)
        if stack is None:
            return None
        result = infer(ops.reduction(name), ONE, {"axis": 0, **kwargs}, [stack])
        if result is None or result.scalar:
            return None
        for order in ("K", "C", "F"):
            start = infer(ops.COPY, ONE, {"order": order}, [first._replace(dtype=result.dtype)])
            if start is not None and start.strides == result.strides:
                return cls(node, stack, result, order)
        return None

    def make(
        self, op: Op, *operands: Node, args: tuple[Any, ...] | None = None, **kwargs: Any
    ) -> Node:
        template = args or (TWO if len(operands) > 1 else ONE)
        return OpNode(op, operands, template, kwargs or None, self.node.location, "ignore")

    def total(self, items: Sequence[Node], dtype: np.dtype[Any]) -> Node:
        """The sum of ``items`` in ``dtype``, in the memory order of the result."""
        return self.totals([items], [dtype])[0]

    def totals(self, columns: Sequence[Sequence[Node]], dtypes: Sequence[Any]) -> list[Node]:
        """The sums of several columns, row by row, so that each file is read once for all."""
        # NumPy's sum begins with 0, which turns -0.0 into 0.0.
        sums = [
            self.make(
                ops.START, items[0], args=(Slot(0), 0), dtype=np.dtype(dtype), order=self.order
            )
            for items, dtype in zip(columns, dtypes, strict=True)
        ]
        args = (Slot(0), Slot(len(sums)))
        for row in range(1, len(columns[0])):
            for place, items in enumerate(columns):
                # The other sums are operands that aren't used: they put the last row before this.
                others = sums[:place] + sums[place + 1 :]
                sums[place] = self.make(ops.ADD_QUIET, sums[place], *others, items[row], args=args)
        return sums

    def extreme(self, op: Op) -> Node:
        best = self.make(ops.COPY, self.operands[0], dtype=self.stack, order=self.order)
        for operand in self.operands[1:]:
            best = self.make(op, best, operand)
        return best


def _accumulator(chain: _Chain, half: Any = np.float16) -> np.dtype[Any]:
    """The type in which NumPy adds up for a mean: float64 for integers, ``half`` for float16."""
    if chain.stack.kind in "biu":
        return np.dtype(np.float64)
    return np.dtype(half) if chain.stack == np.float16 else chain.stack


def _sum(chain: _Chain) -> Node:
    return chain.total(chain.operands, chain.result)


def _mean(chain: _Chain) -> Node:
    total = chain.total(chain.operands, _accumulator(chain, np.float32))
    mean = chain.make(ops.DIVIDE, total, args=(Slot(0), np.intp(len(chain.operands))))
    if chain.stack == np.float16:
        mean = chain.make(ops.ASTYPE, mean, args=(Slot(0), chain.stack))
    return mean


def _var(chain: _Chain, ddof: float = 0) -> Node:
    count = len(chain.operands)
    dtype = _accumulator(chain)
    total = chain.total(chain.operands, dtype)
    mean = chain.make(ops.DIVIDE, total, args=(Slot(0), np.intp(count)))
    total = chain.make(ops.ZEROS, mean, dtype=chain.result)
    for operand in chain.operands:
        args = (Slot(0), Slot(1), Slot(2))
        total = chain.make(ops.ADD_SQUARES, total, operand, mean, args=args, dtype=dtype)
    return chain.make(ops.DIVIDE_VARIANCE, total, args=(Slot(0), count), ddof=ddof)


def _std(chain: _Chain, ddof: float = 0) -> Node:
    return chain.make(ops.SQRT, _var(chain, ddof))


def _count(chain: _Chain) -> Node:
    items = [chain.make(ops.NOT_ZERO, operand, args=(Slot(0), 0)) for operand in chain.operands]
    return chain.total(items, np.dtype(np.intp))


def _nansum(chain: _Chain) -> Node:
    if chain.stack.kind not in "fc":
        return _sum(chain)
    items = [chain.make(ops.WITHOUT_NAN, operand) for operand in chain.operands]
    return chain.total(items, chain.result)


def _sum_and_count(chain: _Chain) -> list[Node]:
    numbers = [chain.make(ops.WITHOUT_NAN, operand) for operand in chain.operands]
    present = [chain.make(ops.NOT_NAN, operand) for operand in chain.operands]
    return chain.totals([numbers, present], [chain.stack, np.intp])


def _nanmean(chain: _Chain) -> Node:
    if chain.stack.kind not in "fc":
        return _mean(chain)
    return chain.make(ops.NAN_MEAN, *_sum_and_count(chain))


def _nanvar(chain: _Chain, ddof: float = 0) -> Node:
    if chain.stack.kind not in "fc":
        return _var(chain, ddof)
    total, counts = _sum_and_count(chain)
    mean = chain.make(ops.NAN_MEAN_QUIET, total, counts)
    squares = [
        chain.make(ops.NAN_DEVIATION, operand, mean, dtype=chain.stack)
        for operand in chain.operands
    ]
    return chain.make(ops.NAN_VARIANCE, chain.total(squares, chain.result), counts, ddof=ddof)


def _nanstd(chain: _Chain, ddof: float = 0) -> Node:
    return chain.make(ops.SQRT, _nanvar(chain, ddof))


def _nan_extreme(chain: _Chain, op: Op) -> Node:
    best = chain.extreme(op)
    return chain.make(ops.WARN_IF_NAN, best) if chain.stack.kind in "fc" else best


_CHAINS: dict[str, Any] = {
    "sum": _sum,
    "mean": _mean,
    "var": _var,
    "std": _std,
    "min": lambda chain: chain.extreme(ops.MINIMUM),
    "max": lambda chain: chain.extreme(ops.MAXIMUM),
    "count_nonzero": _count,
    "nansum": _nansum,
    "nanmean": _nanmean,
    "nanvar": _nanvar,
    "nanstd": _nanstd,
    "nanmin": lambda chain: _nan_extreme(chain, ops.FMIN),
    "nanmax": lambda chain: _nan_extreme(chain, ops.FMAX),
}
