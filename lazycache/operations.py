"""The operations that expressions are made of.

Operators use the functions of the ``operator`` module, so that objects of any kind work, and
scalars stay what they are; on arrays those call the same loops as the ufuncs given for ``into``.
An object's own operator never gives NotImplemented that way, but Python's TypeError.
Every `Op` here can be pickled by its fields.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _volumes
from .expression import Op
from .totals import Total, total

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Into:
    """``function`` with ``out=``."""

    function: Callable[..., Any]

    def __call__(self, out: Array, *args: Any, **kwargs: Any) -> None:
        self.function(*args, out=out, **kwargs)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the first argument, by its name."""

    name: str

    def __call__(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(data, self.name)(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class InPlace:
    """An in-place operator of arrays and volumes of AIMS.

    Other data are replaced by what ``plain`` gives: an object of another kind may be shared, and
    not every kind can be copied.
    """

    inplace: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, left: Any, right: Any) -> Any:
        if isinstance(left, np.ndarray) or _volumes.kind_of(left):
            return self.inplace(left, right)
        return self.plain(left, right)


def _operator(name: str, call: Callable[..., Any], ufunc: np.ufunc) -> Op:
    wraps = name in ("+", "-", "*")
    return Op(name, call, into=Into(ufunc), elementwise=True, wraps=wraps, own=True)


def _power_into(out: Array, base: Any, exponent: Any) -> None:
    # Array ** scalar has shortcuts (square, sqrt, reciprocal) that np.power hasn't, and the same
    # ones in place.
    if isinstance(exponent, np.ndarray) and exponent.ndim:
        np.power(base, exponent, out=out)
    elif isinstance(base, np.ndarray) and base.dtype == out.dtype:
        if out is not base:
            np.copyto(out, base)
        out **= exponent
    else:
        np.copyto(out, operator.pow(base, exponent))


def _where_into(out: Array, condition: Any, yes: Any, no: Any) -> None:
    np.copyto(out, no, casting="unsafe")
    np.copyto(out, yes, where=np.asarray(condition, bool), casting="unsafe")


def _round_into(out: Array, data: Any, decimals: int = 0) -> None:
    if out.dtype.kind in "iu" and decimals < 0:  # by way of float64
        np.copyto(out, np.round(data, decimals))
    else:
        np.round(data, decimals, out=out)


def _copy_into(out: Array, data: Array, dtype: DTypeLike, order: str = "K") -> None:
    np.copyto(out, data, casting="unsafe")


def _assign(target: Any, index: Any, value: Any) -> Any:
    if not isinstance(target, np.ndarray) and not _volumes.kind_of(target):
        target = copy.deepcopy(target)
    target[index] = value
    return target


BINARY = {
    "add": _operator("+", operator.add, np.add),
    "sub": _operator("-", operator.sub, np.subtract),
    "mul": _operator("*", operator.mul, np.multiply),
    "truediv": _operator("/", operator.truediv, np.true_divide),
    "floordiv": _operator("//", operator.floordiv, np.floor_divide),
    "mod": _operator("%", operator.mod, np.remainder),
    "pow": Op("**", operator.pow, into=_power_into, elementwise=True, own=True),
    "lshift": _operator("<<", operator.lshift, np.left_shift),
    "rshift": _operator(">>", operator.rshift, np.right_shift),
    "and": _operator("&", operator.and_, np.bitwise_and),
    "or": _operator("|", operator.or_, np.bitwise_or),
    "xor": _operator("^", operator.xor, np.bitwise_xor),
    "matmul": Op("@", operator.matmul, "matmul", own=True),
}
COMPARISONS = {
    "eq": _operator("==", operator.eq, np.equal),
    "ne": _operator("!=", operator.ne, np.not_equal),
    "lt": _operator("<", operator.lt, np.less),
    "le": _operator("<=", operator.le, np.less_equal),
    "gt": _operator(">", operator.gt, np.greater),
    "ge": _operator(">=", operator.ge, np.greater_equal),
}
UNARY = {
    "neg": _operator("-()", operator.neg, np.negative),
    "pos": _operator("+()", operator.pos, np.positive),
    "abs": _operator("abs", operator.abs, np.absolute),
    "invert": _operator("~", operator.invert, np.invert),
}
INPLACE = {
    name: Op(
        op.name + "=",
        InPlace(getattr(operator, "i" + name), op.call),
        "inplace",
        wraps=op.wraps,
        own=True,
    )
    for name, op in BINARY.items()
}
# The same by writing over the left operand, for objects that can't be given where to write.
OVER = {op.call: getattr(operator, "i" + name) for name, op in BINARY.items()}
GETITEM = Op("[...]", operator.getitem, "view")
ASSIGN = Op("[...]=", _assign, "assign", own=True)
# Of volumes of AIMS: one voxel with the header, and the volume of an array with that header.
HEADER = Op("header", _volumes.header_only, "reduce", own=True)
WITH_HEADER = Op("volume", _volumes.with_header, own=True)
ALIGN = Op("[..., None]", operator.getitem, "view")
WHERE = Op("where", np.where, into=_where_into)
CLIP = Op("clip", np.clip, into=Into(np.clip), elementwise=True)
ROUND = Op("round", np.round, into=_round_into)
ASTYPE = Op("astype", Method("astype"), into=_copy_into)
STACK = Op("stack", np.stack, "join")
CONCATENATE = Op("concatenate", np.concatenate, "join")


@cache
def ufunc(function: np.ufunc) -> Op:
    """An element-wise ufunc of one result, called by its own name."""
    wraps = function in (np.add, np.subtract, np.multiply)
    return Op(function.__name__, function, into=Into(function), elementwise=True, wraps=wraps)


@cache
def ufunc_reduce(function: np.ufunc) -> Op:
    """``function.reduce`` over ``axis``."""
    return Op(function.__name__ + ".reduce", AxisFold(function), "reduce")


@dataclass(frozen=True, slots=True)
class AxisFold:
    """``function.reduce``, which takes the slowest axes one element after the other.

    With ``deviations``, of the squared deviations of the data from their mean.
    """

    function: np.ufunc
    deviations: bool = False

    def __call__(self, data: Any, *mean: Any, **kwargs: Any) -> Any:
        return self.function.reduce(self.terms(data, *mean), **kwargs)

    def fold(self, target: Array, first: bool, data: Array, *mean: Any) -> None:
        """Take the next ``data`` into ``target``; the ``first`` find nothing of value there."""
        terms = self.terms(data, *mean)
        logical = self.function in (np.logical_or, np.logical_and)
        dtype = None if logical else target.dtype
        if not first:
            self.function(target, terms, out=target, dtype=dtype, casting="unsafe")
        elif self.function.identity is None:
            np.copyto(target, terms, casting="unsafe")
        else:
            self.function(self.function.identity, terms, out=target, dtype=dtype, casting="unsafe")

    def total(self, size: int, terms: np.dtype[Any], result: np.dtype[Any]) -> Total | None:
        """What takes all of an array, if its blocks can be told from the whole."""
        return total(self.function, size, terms, result)

    def terms(self, data: Any, *mean: Any) -> Any:
        """What is taken for ``data``."""
        return _square_norm(np.subtract(data, *mean)) if self.deviations else data


@dataclass(frozen=True, slots=True)
class IntoFirst:
    """``function`` with its first argument as ``out=``, cast as ``casting`` allows."""

    function: np.ufunc
    casting: Any = "same_kind"

    def __call__(self, first: Array, *rest: Any) -> Any:
        return self.function(first, *rest, out=first, casting=self.casting)


@cache
def reduction(name: str) -> Op:
    """``np.<name>(data, axis=..., ...)``; of all of an object, its method of that name."""
    return Op(name, Reduction(name), "reduce", own=True)


@dataclass(frozen=True, slots=True)
class Reduction:
    """The function of NumPy of this name, or, on data that is no array, the method.

    The methods of volumes of AIMS take no arguments.
    """

    name: str

    def __call__(self, data: Any, **kwargs: Any) -> Any:
        if _volumes.kind_of(data):
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            if kwargs or not hasattr(data, self.name):
                data = _volumes.array_of(data)
        if isinstance(data, np.ndarray | np.generic) or not hasattr(data, self.name):
            return getattr(np, self.name)(data, **kwargs)
        return getattr(data, self.name)(**kwargs)


@cache
def view(name: str) -> Op:
    """A function of NumPy that gives a view of its first argument."""
    return Op(name, getattr(np, name), "view")


# What the functions over lists are made of (see ``folds``). They take and give what NumPy's
# reductions have between their steps; ``quiet`` additions are not watched for wrapping, because
# their type was chosen to be wide enough, as NumPy chooses it.


def _divide(total: Array, count: Any) -> Array:
    np.true_divide(total, count, out=total, casting="unsafe", subok=False)
    return total


def _divide_total(total: Any, count: Any, ddof: float | None = None) -> Any:
    # Of one number, as NumPy divides it, and of an array of one.
    if ddof is not None:
        if ddof >= count:
            warnings.warn("Degrees of freedom <= 0 for slice", RuntimeWarning, stacklevel=2)
        count = np.maximum(np.intp(count) - ddof, 0)
    if isinstance(total, np.ndarray):
        return _divide(total.copy(), count)
    return total.dtype.type(total / count)


def _sqrt_total(total: Any) -> Any:
    return np.sqrt(total) if isinstance(total, np.ndarray) else total.dtype.type(np.sqrt(total))


def _divide_variance(total: Array, count: int, ddof: float) -> Array:
    if ddof >= count:
        warnings.warn("Degrees of freedom <= 0 for slice", RuntimeWarning, stacklevel=2)
    return _divide(total, np.maximum(np.intp(count) - ddof, 0))


def _divide_by_counts(total: Array, counts: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        np.divide(total, counts, out=total, casting="unsafe")
    return total


def _nan_mean(total: Array, counts: Array) -> Array:
    mean = _divide_by_counts(total, counts)
    if (counts == 0).any():
        warnings.warn("Mean of empty slice", RuntimeWarning, stacklevel=2)
    return mean


def _nan_variance(total: Array, counts: Array, ddof: float) -> Array:
    freedom = counts - ddof
    variance = _divide_by_counts(total, freedom)
    bad = freedom <= 0
    if bad.any():
        warnings.warn("Degrees of freedom <= 0 for slice.", RuntimeWarning, stacklevel=2)
        np.copyto(variance, np.nan, where=bad, casting="unsafe")
    return variance


def _warn_if_nan(extreme: Array) -> Array:
    if np.isnan(extreme).any():
        warnings.warn("All-NaN slice encountered", RuntimeWarning, stacklevel=2)
    return extreme


def _without_nan_into(out: Array, data: Array) -> None:
    np.copyto(out, data)
    if data.dtype.kind in "fc":
        np.copyto(out, 0, where=np.isnan(out))


def _without_nan(data: Array) -> Array:
    out = data.copy(order="K")
    _without_nan_into(out, data)
    return out


def _square_norm(data: Array) -> Array:
    if data.dtype.kind == "c":
        return np.asarray(np.add(np.square(data.real), np.square(data.imag)))
    return np.asarray(np.square(data))


# The bytes of a block of a computation that is done block by block.
BLOCK = 1 << 17


def _add_squares(total: Array, data: Array, mean: Array, dtype: DTypeLike) -> Array:
    """``total += |data - mean|**2`` without a whole temporary, where the memory order is one."""
    step = len(total)
    axis = 0
    if total.ndim == 1 and data.ndim == 1:
        step = max(1, BLOCK // mean.itemsize)
    elif total.ndim and data.strides and _order(data) == _order(total) == _order(mean):
        # Slabs across the slowest axis are contiguous in all three.
        axis = int(np.argmax(np.abs(total.strides)))
        step = max(1, total.shape[axis] * BLOCK // max(1, mean.nbytes))
    index: list[Any] = [slice(None)] * total.ndim
    for start in range(0, total.shape[axis], step):
        index[axis] = slice(start, start + step)
        slab = tuple(index)
        square = _square_norm(np.subtract(data[slab], mean[slab], dtype=dtype))
        np.add(total[slab], square, out=total[slab])
    return total


def _order(array: Array) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.argsort(np.abs(array.strides), kind="stable"))


def _zeros_into(out: Array, data: Array, dtype: DTypeLike) -> None:
    out.fill(0)


def _nan_deviation(data: Array, mean: Array, dtype: DTypeLike) -> Array:
    # NaN are left out: they have no deviation from the mean of the others.
    missing = np.isnan(data)
    clean = data.astype(dtype)
    np.copyto(clean, 0, where=missing)
    np.subtract(clean, mean, out=clean, casting="unsafe")
    np.copyto(clean, 0, where=missing)
    if clean.dtype.kind == "c":
        np.multiply(clean, clean.conj(), out=clean)
        return clean.real
    np.multiply(clean, clean, out=clean)
    return clean


def _not_nan(data: Array) -> Array:
    return ~np.isnan(data)


ADD_QUIET = Op("+=", IntoFirst(np.add), "inplace")
MINIMUM = Op("minimum", IntoFirst(np.minimum), "inplace")
MAXIMUM = Op("maximum", IntoFirst(np.maximum), "inplace")
FMIN = Op("fmin", IntoFirst(np.fmin), "inplace")
FMAX = Op("fmax", IntoFirst(np.fmax), "inplace")
SQRT = Op("sqrt", IntoFirst(np.sqrt), "inplace")
DIVIDE = Op("mean", _divide, "inplace")
DIVIDE_TOTAL = Op("mean", _divide_total)
SQRT_TOTAL = Op("sqrt", _sqrt_total)
DIVIDE_VARIANCE = Op("var", _divide_variance, "inplace")
NAN_MEAN = Op("nanmean", _nan_mean, "inplace")
NAN_MEAN_QUIET = Op("nanmean", _divide_by_counts, "inplace")
NAN_VARIANCE = Op("nanvar", _nan_variance, "inplace")
WARN_IF_NAN = Op("nanmin", _warn_if_nan, "inplace")
START = Op("+", np.add, into=Into(np.add))
COPY = Op("copy", np.array, into=_copy_into)
WITHOUT_NAN = Op("nan to 0", _without_nan, into=_without_nan_into, elementwise=True)
NOT_NAN = Op("count of numbers", _not_nan)
NOT_ZERO = Op("!=", np.not_equal, into=Into(np.not_equal), elementwise=True)
ZEROS = Op("0", np.zeros_like, into=_zeros_into)
ADD_SQUARES = Op("add squares", _add_squares, "inplace")
NAN_DEVIATION = Op("square", _nan_deviation)
SQUARED_DEVIATIONS = Op("add squares", AxisFold(np.add, deviations=True), "reduce")
