"""Functions over lists of proxies, or over one proxy: expressions, all of them.

Over a list (any iterable) they give, voxel by voxel, what NumPy's function of the same name gives
for the stack of all images along its new axis, in value, type and memory order. They take one
image at a time and never stack them (`median` and `percentile` do, whole images). Sums add up in
NumPy's types: 16-bit integers don't wrap around. Over one proxy they work along ``axis``.

Over volumes of AIMS they give the same values as a volume, with the header of the first one; 64-bit
integers, of which AIMS has no volumes, become DOUBLE. Several percentiles at once, and what is
taken along ``axis``, are arrays.

``grid`` says what to do where images lie on different grids: ``"error"``, ``"warn"`` or
``"ignore"``; without it, what the proxies say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import operations as ops
from ._frames import location
from .arraylike import ArrayLike
from .express import express
from .expression import GridMode, Node, Op, OpNode, ValueNode, frozen
from .folds import fold
from .proxy import LazyReadData

Axis = int | tuple[int, ...] | None
Images = Iterable[Any]

__all__ = [
    "abs",
    "ceil",
    "clip",
    "cos",
    "count",
    "exp",
    "floor",
    "isfinite",
    "isnan",
    "log",
    "log2",
    "log10",
    "max",
    "maximum",
    "mean",
    "median",
    "min",
    "minimum",
    "nanmax",
    "nanmean",
    "nanmin",
    "nanstd",
    "nansum",
    "nanvar",
    "percentile",
    "round",
    "sign",
    "sin",
    "sqrt",
    "std",
    "sum",
    "tanh",
    "var",
    "where",
]  # fmt: skip


def _over(
    name: str, images: Images, axis: Axis, grid: GridMode | None, **kwargs: Any
) -> LazyReadData:
    """``name`` over the images of a list, or along ``axis`` of one image."""
    if isinstance(images, ArrayLike | np.ndarray | np.generic):
        one = images if isinstance(images, ArrayLike) else LazyReadData(images)
        return express(ops.reduction(name), (one,), axis=axis, **kwargs)  # type: ignore[no-any-return]
    if axis not in (None, 0):
        raise ValueError(
            f"{name} of a list is taken across its images: give one proxy to use axis={axis}, or "
            f"[{name}(image, axis={axis}) for image in images]"
        )
    return over_images(fold(name), images, grid, **kwargs)


def over_images(op: Op, images: Images, grid: GridMode | None, **kwargs: Any) -> LazyReadData:
    """The expression of ``op`` over the images of a list."""
    # A list is not asked for its iterator: that of a PreloadList would begin to load.
    given = list.copy(images) if isinstance(images, list) else list(images)
    items = [LazyReadData(item) if isinstance(item, str | os.PathLike) else item for item in given]
    if not items:
        raise ValueError(f"{op.name} of an empty list: no image was given")
    proxies = [item for item in items if isinstance(item, ArrayLike)]
    first = proxies[0] if proxies else LazyReadData(items[0])
    nodes: tuple[Node, ...] = tuple(
        item._node if isinstance(item, ArrayLike) else ValueNode(frozen(np.asarray(item)))
        for item in items
    )
    modes = (proxy._grid for proxy in proxies if proxy._grid != "error")
    mode: GridMode = grid if grid is not None else next(modes, "error")
    node = OpNode(op, nodes, (), kwargs or None, location(), mode)
    return first._derive(node)  # type: ignore[return-value]


def mean(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The mean. Integers are added up in float64, float16 in float32."""
    return _over("mean", images, axis, grid)


def sum(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The sum. Small integers are added up in 64 bits, unlike with ``+``."""
    return _over("sum", images, axis, grid)


def var(
    images: Images, axis: Axis = None, *, ddof: float = 0, grid: GridMode | None = None
) -> LazyReadData:
    """The variance, in two passes as NumPy's: each file is used twice."""
    return _over("var", images, axis, grid, ddof=ddof)


def std(
    images: Images, axis: Axis = None, *, ddof: float = 0, grid: GridMode | None = None
) -> LazyReadData:
    """The standard deviation; see `var`."""
    return _over("std", images, axis, grid, ddof=ddof)


def min(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The smallest value; NaN where there is one."""
    return _over("min", images, axis, grid)


def max(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The largest value; NaN where there is one."""
    return _over("max", images, axis, grid)


def count(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """How many values aren't zero, as `numpy.count_nonzero` (NaN isn't zero)."""
    return _over("count_nonzero", images, axis, grid)


def nanmean(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The mean of the values that aren't NaN; NaN, and a RuntimeWarning, where there is none."""
    return _over("nanmean", images, axis, grid)


def nansum(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The sum of the values that aren't NaN; 0 where there is none."""
    return _over("nansum", images, axis, grid)


def nanvar(
    images: Images, axis: Axis = None, *, ddof: float = 0, grid: GridMode | None = None
) -> LazyReadData:
    """The variance of the values that aren't NaN."""
    return _over("nanvar", images, axis, grid, ddof=ddof)


def nanstd(
    images: Images, axis: Axis = None, *, ddof: float = 0, grid: GridMode | None = None
) -> LazyReadData:
    """The standard deviation of the values that aren't NaN."""
    return _over("nanstd", images, axis, grid, ddof=ddof)


def nanmin(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The smallest of the values that aren't NaN."""
    return _over("nanmin", images, axis, grid)


def nanmax(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The largest of the values that aren't NaN."""
    return _over("nanmax", images, axis, grid)


def median(images: Images, axis: Axis = None, *, grid: GridMode | None = None) -> LazyReadData:
    """The median. Over a list all images have to be in memory at once."""
    return _over("median", images, axis, grid)


def percentile(
    images: Images, q: Any, axis: Axis = None, *, grid: GridMode | None = None
) -> LazyReadData:
    """The ``q``-th percentile (0 to 100). Over a list all images have to be in memory at once."""
    return _over("percentile", images, axis, grid, q=q)


def where(condition: Any, x: Any, y: Any) -> Any:
    """``x`` where ``condition`` is true, else ``y``."""
    return np.where(condition, x, y)


def clip(image: Any, low: Any, high: Any) -> Any:
    """``image`` with values below ``low`` and above ``high`` set to these."""
    return np.clip(image, low, high)


def round(image: Any, decimals: int = 0) -> Any:
    """``image`` rounded to ``decimals`` places."""
    return np.round(image, decimals)


def _elementwise(function: Any, text: str) -> Callable[..., Any]:
    def apply(*images: Any) -> Any:
        return function(*images)

    apply.__name__ = apply.__qualname__ = function.__name__
    apply.__doc__ = text
    return apply


abs = _elementwise(np.abs, "The absolute value.")
sqrt = _elementwise(np.sqrt, "The square root.")
exp = _elementwise(np.exp, "e to the power of each value.")
log = _elementwise(np.log, "The natural logarithm.")
log2 = _elementwise(np.log2, "The logarithm to the base 2.")
log10 = _elementwise(np.log10, "The logarithm to the base 10.")
sin = _elementwise(np.sin, "The sine.")
cos = _elementwise(np.cos, "The cosine.")
tanh = _elementwise(np.tanh, "The hyperbolic tangent.")
sign = _elementwise(np.sign, "-1, 0 or 1.")
floor = _elementwise(np.floor, "The largest integer not above each value.")
ceil = _elementwise(np.ceil, "The smallest integer not below each value.")
isnan = _elementwise(np.isnan, "True where a value is NaN.")
isfinite = _elementwise(np.isfinite, "True where a value is neither NaN nor infinite.")
minimum = _elementwise(np.minimum, "The smaller of two values.")
maximum = _elementwise(np.maximum, "The larger of two values.")
