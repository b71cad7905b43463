"""Integers that wrap around: NumPy's value is kept, and the user is told once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._frames import warn
from .errors import IntegerWrapWarning
from .expression import FileNode, Node, OpNode, ValueNode, fill
from .layout import infer, layout_of
from .outline import Outline


class Bounds:
    """Watches ``+ - *`` on integers for values that may have left their type.

    Bounds are taken from the data and carried along; where they would leave the type, they are
    taken anew from the operands, which are still right then.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.known: dict[Node, tuple[int, int]] = {}
        self.images: dict[Node, int] = {}
        self.wrapped: tuple[OpNode, np.dtype[Any], int] | None = None

    def forget(self, node: Node) -> None:
        self.known.pop(node, None)
        self.images.pop(node, None)

    def before(self, step: OpNode, operands: Sequence[Node], inputs: list[Any]) -> None:
        """Called with the operands of a step, before it runs."""
        known, images = self.images, 0
        for node in operands:
            count = known.get(node)
            if count is None:
                count = known[node] = self._images(node)
            images += count
        known[step] = images
        if not step.op.wraps or self.wrapped is not None or images < 2:
            return
        if type(inputs[0]) is np.ndarray and inputs[0].dtype.kind not in "iub":
            return
        layouts = [layout_of(value) for value in inputs]
        whole = [layout for layout in layouts if layout is not None and layout.dtype.kind in "iub"]
        if len(whole) < len(inputs) or step in self.outline.aligned:
            return
        layout = infer(step.op, step.args, dict(step.kwargs or {}), whole)
        if layout is None or layout.dtype.kind not in "iu" or layout.dtype.itemsize > 4:
            return
        arguments = fill(step.args, list(zip(operands, inputs, strict=True)))
        limits = np.iinfo(layout.dtype)
        for fresh in (False, True):
            bounds = [self._bounds(argument, fresh) for argument in arguments]
            if len(bounds) != 2 or None in bounds:
                return
            low, high = _combine(step.op.name, bounds[0], bounds[1])
            if limits.min <= low and high <= limits.max:
                self.known[step] = (low, high)
                return
        self.wrapped = (step, layout.dtype, images)

    def _images(self, node: Node) -> int:
        if isinstance(node, ValueNode):
            return int(isinstance(node.value, np.ndarray) and node.value.ndim > 0)
        return int(isinstance(node, FileNode))

    def _bounds(self, argument: Any, fresh: bool) -> Any:
        if not isinstance(argument, tuple):
            return (argument, argument) if isinstance(argument, int | np.integer) else None
        node, value = argument
        if fresh or node not in self.known:
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "iub" or not value.size:
                return None
            self.known[node] = (int(value.min()), int(value.max()))
        return self.known[node]

    def warn(self) -> None:
        if self.wrapped is None:
            return
        step, dtype, images = self.wrapped
        where = f" (in {step.op.name} at {step.where()})" if step.location else ""
        warn(
            f"the values of {images} images left the range of {dtype}{where}, and such values wrap "
            f"around in NumPy: write lc.mean(images) or lc.sum(images), or convert first with "
            f'.astype("int64") or dtype="float32"',
            IntegerWrapWarning,
        )


def _combine(name: str, left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    (a, b), (c, d) = ((int(x), int(y)) for x, y in (left, right))
    if name.startswith(("+", "add")):
        return a + c, b + d
    if name.startswith(("-", "subtract")):
        return a - d, b - c
    products = (a * c, a * d, b * c, b * d)
    return min(products), max(products)
