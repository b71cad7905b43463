"""What makes a proxy behave as an array: operators, NumPy's protocols, indexing.

Operators, ufuncs, and those functions of NumPy whose result can be foretold give new proxies, of
expressions. Everything else computes: an element, ``bool()`` and ``float()``, fancy indexing,
functions with ``out=``, and any function that isn't known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _aims, _buffers
from . import operations as ops
from ._frames import location
from .express import (
    Expressible,
    called,
    computed,
    express,
    is_number,
    node_of,
    proxies_in,
    replaced,
    template_of,
)
from .expression import Node, OpNode, Slot, ValueNode, copy_of
from .stacking import Watch

# What array operators leave to the other operand, or to Python's TypeError.
_NO_OPERANDS = (str, bytes, dict, set, frozenset, type(None))

_REDUCTIONS = {
    "mean", "sum", "std", "var", "min", "max", "any", "all", "prod", "ptp", "argmin", "argmax",
    "median", "percentile", "quantile", "count_nonzero", "nanmean", "nansum", "nanstd", "nanvar",
    "nanmin", "nanmax", "nanmedian", "nanpercentile",
}  # fmt: skip
# Of all elements, block by block where the type allows it.
_TOTALS = {"mean", "sum", "std", "var", "min", "max", "any", "all", "prod"}
_VIEWS = {"transpose", "moveaxis", "swapaxes", "squeeze", "expand_dims", "flip"}
_ALIASES = {"amin": "min", "amax": "max", "around": "round", "concat": "concatenate"}
_JOINS = {"stack": ops.STACK, "concatenate": ops.CONCATENATE}

_watch = Watch()


def _binary(name: str) -> Callable[[Any, Any], Any]:
    op = ops.BINARY.get(name) or ops.COMPARISONS[name]
    compares = name in ("eq", "ne")

    def method(self: ArrayLike, other: Any) -> Any:
        if _declines(other, compares):
            return NotImplemented
        return express(op, (self, other))

    return method


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    op = ops.BINARY[name]

    def method(self: ArrayLike, other: Any) -> Any:
        return NotImplemented if _declines(other) else express(op, (other, self))

    return method


def _inplace(name: str) -> Callable[[Any, Any], Any]:
    op, plain = ops.INPLACE[name], ops.BINARY[name]

    def method(self: Any, other: Any) -> Any:
        if _declines(other):
            return NotImplemented
        # Numbers have no operators in place.
        self._become(node_of(plain if is_number(self) else op, (self, other)))
        return self

    return method


def _unary(name: str) -> Callable[[Any], Any]:
    op = ops.UNARY[name]

    def method(self: ArrayLike) -> Any:
        return express(op, (self,))

    return method


def _reduction(name: str) -> Callable[..., Any]:
    def method(self: ArrayLike, *args: Any, **kwargs: Any) -> Any:
        found = _reduced(name, (self, *args), kwargs)
        return getattr(self.data, name)(*args, **kwargs) if found is None else found

    method.__name__ = name
    method.__doc__ = f"`numpy.{name}` over ``axis``: an expression; computed without one."
    return method


def _declines(other: Any, compares: bool = False) -> bool:
    if isinstance(other, _NO_OPERANDS):
        return not compares
    return getattr(type(other), "__array_ufunc__", True) is None


class ArrayLike(Expressible):
    """The part of a proxy that behaves as an array."""

    __slots__ = ()

    __add__, __radd__, __iadd__ = _binary("add"), _reflected("add"), _inplace("add")
    __sub__, __rsub__, __isub__ = _binary("sub"), _reflected("sub"), _inplace("sub")
    __mul__, __rmul__, __imul__ = _binary("mul"), _reflected("mul"), _inplace("mul")
    __truediv__, __rtruediv__ = _binary("truediv"), _reflected("truediv")
    __floordiv__, __rfloordiv__ = _binary("floordiv"), _reflected("floordiv")
    __itruediv__, __ifloordiv__ = _inplace("truediv"), _inplace("floordiv")
    __mod__, __rmod__, __imod__ = _binary("mod"), _reflected("mod"), _inplace("mod")
    __pow__, __rpow__, __ipow__ = _binary("pow"), _reflected("pow"), _inplace("pow")
    __matmul__, __rmatmul__ = _binary("matmul"), _reflected("matmul")
    __imatmul__ = _inplace("matmul")
    __and__, __rand__, __iand__ = _binary("and"), _reflected("and"), _inplace("and")
    __or__, __ror__, __ior__ = _binary("or"), _reflected("or"), _inplace("or")
    __xor__, __rxor__, __ixor__ = _binary("xor"), _reflected("xor"), _inplace("xor")
    __lshift__, __rlshift__ = _binary("lshift"), _reflected("lshift")
    __rshift__, __rrshift__ = _binary("rshift"), _reflected("rshift")
    __ilshift__, __irshift__ = _inplace("lshift"), _inplace("rshift")
    __eq__, __ne__ = _binary("eq"), _binary("ne")
    __lt__, __le__, __gt__, __ge__ = _binary("lt"), _binary("le"), _binary("gt"), _binary("ge")
    __neg__, __pos__ = _unary("neg"), _unary("pos")
    __abs__, __invert__ = _unary("abs"), _unary("invert")
    __hash__ = object.__hash__

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other)

    def __rdivmod__(self, other: Any) -> Any:
        return (other // self, other % self)

    # Expressions by method

    mean, sum, std, var = map(_reduction, ("mean", "sum", "std", "var"))
    min, max, any, all = map(_reduction, ("min", "max", "any", "all"))
    prod, argmin, argmax = map(_reduction, ("prod", "argmin", "argmax"))

    def astype(self, dtype: DTypeLike) -> Any:
        """The data converted to ``dtype``, as `numpy.ndarray.astype` does."""
        return express(ops.ASTYPE, (self,), (np.dtype(dtype),))

    def clip(self, min: Any = None, max: Any = None) -> Any:
        """The data with values below ``min`` and above ``max`` set to these."""
        return express(ops.CLIP, (self, min, max))

    def round(self, decimals: int = 0) -> Any:
        """The data rounded to ``decimals`` places."""
        return express(ops.ROUND, (self,), (decimals,))

    def transpose(self, *axes: Any) -> Any:
        """The data with their axes in another order, reversed if none is given."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None
        return express(ops.view("transpose"), (self,), (order,))

    @property
    def T(self) -> Any:  # noqa: N802, the name that arrays have
        return self.transpose()

    def squeeze(self, axis: Any = None) -> Any:
        """The data without axes of length 1."""
        return express(ops.view("squeeze"), (self,), (axis,))

    # Indexing

    def __getitem__(self, index: Any) -> Any:
        """A slice is an expression; an element, and what masks and lists choose, are computed.

        Integers alone may name either, so the header is looked at.
        """
        items = index if isinstance(index, tuple) else (index,)
        if not all(_is_basic(item) for item in items):
            [data, *found] = computed([self, *proxies_in(items)])
            return _aims.part(data, data[replaced(index, iter(found))])
        integers = all(_is_integer(item) for item in items)
        if integers and (not self._is_array() or len(items) >= self.ndim):
            data = self.data
            return _aims.part(data, data[index])
        node = self._part(items)
        if node is None:
            template = (Slot(0), items)
            node = OpNode(ops.GETITEM, (self._node,), template, None, location(), self._grid)
        return self._derive(node)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change this proxy's data: what other proxies and expressions see stays as it was."""
        operands: list[Node] = [self._node]
        place = _template_of_index(index, operands)
        template = (Slot(0), place, template_of(value, operands))
        node = OpNode(ops.ASSIGN, tuple(operands), template, None, location(), self._grid)
        self._become(node)

    def __len__(self) -> int:
        if not self._is_array():
            return len(self.data)
        shape = self.shape
        if not shape:
            raise TypeError("len() of unsized object")
        return shape[0]

    def __iter__(self) -> Iterator[Any]:
        if not self._is_array():
            data = self.data
            return (_aims.part(data, item) for item in data)
        count = len(self)
        return (self[position] for position in range(count))

    def __contains__(self, item: Any) -> bool:
        return item in self.data

    # Numbers

    def __bool__(self) -> bool:
        return bool(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __complex__(self) -> complex:
        return complex(self.data)

    def __index__(self) -> int:
        return self.data.__index__()  # type: ignore[no-any-return]

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self.data, ndigits)

    def __format__(self, spec: str) -> str:
        return format(self.data, spec) if spec else str(self)

    # NumPy's protocols

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        data = self.data
        array: NDArray[Any] = _aims.part(data, np.asarray(data))
        if dtype is not None and array.dtype != np.dtype(dtype):
            if copy is False:
                raise ValueError("the data have another dtype: they can't be had without a copy")
            return array.astype(dtype)
        result = array.copy(order="K") if copy else array.view()
        _watch.converted(self, result)
        return result

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any
    ) -> Any:
        if out is None:
            if method == "__call__" and ufunc.nout == 1 and kwargs.keys() <= {"dtype", "casting"}:
                if ufunc is np.matmul:
                    return express(ops.BINARY["matmul"], inputs, **kwargs)
                if ufunc.signature is None:
                    return express(ops.ufunc(ufunc), inputs, **kwargs)
            given = {"axis": 0, **kwargs}
            known = given.keys() <= {"axis", "dtype", "keepdims"} and given["axis"] is not None
            if method == "reduce" and known and len(inputs) == 1:
                return express(ops.ufunc_reduce(ufunc), inputs, **given)
            return called(getattr(ufunc, method), inputs, kwargs)
        return _call_into(getattr(ufunc, method), inputs, out, kwargs)

    def __array_function__(self, func: Any, types: Iterable[type], args: Any, kwargs: Any) -> Any:
        if func.__module__ == "numpy":
            name = _ALIASES.get(func.__name__, func.__name__)
            found = _known_function(name, args, kwargs)
            if found is not None:
                return found
        return called(func, args, kwargs)


def _template_of_index(index: Any, nodes: list[Node]) -> Any:
    if isinstance(index, tuple):
        return tuple(_template_of_index(item, nodes) for item in index)
    return index if _is_basic(index) else template_of(index, nodes)


def _is_integer(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _is_basic(item: Any) -> bool:
    if isinstance(item, slice):
        ends = (item.start, item.stop, item.step)
        return all(end is None or _is_integer(end) for end in ends)
    return item is None or item is Ellipsis or _is_integer(item)


def _call_into(function: Callable[..., Any], inputs: Any, out: Any, kwargs: Any) -> Any:
    """The same with ``out=``, where proxies become what was written into a copy of their data."""
    copies = tuple(
        copy_of(np.asarray(item.data)) if isinstance(item, ArrayLike) else item for item in out
    )
    called(function, inputs, {**kwargs, "out": copies})
    for item, written in zip(out, copies, strict=True):
        if isinstance(item, ArrayLike):
            item._become(ValueNode(_buffers.readonly(written)))
    return out[0] if len(out) == 1 else out


def _known_function(name: str, args: Any, kwargs: Any) -> Any:
    """The expression of a function of NumPy; None where it has to be computed."""
    if name in _REDUCTIONS:
        return _reduced(name, args, kwargs)
    if name in ("shape", "ndim", "size") and len(args) == 1 and not kwargs:
        return getattr(args[0], name)
    if name in _VIEWS:
        if isinstance(args[0], ArrayLike) and args[0]._is_array():
            return express(ops.view(name), (args[0],), args[1:], **kwargs)
    elif name in _JOINS:
        given = _bound(name, args, kwargs)
        if given.keys() <= {"arrays", "axis"} and given.get("axis", 0) is not None:
            axis = given.get("axis", 0)
            return express(_JOINS[name], ([*given["arrays"]],), axis=axis)
    elif name == "where" and len(args) == 3:
        return express(ops.WHERE, args)
    elif name == "clip" and len(args) == 3 and not kwargs:
        return express(ops.CLIP, args)
    elif name == "round" and isinstance(args[0], ArrayLike) and kwargs.keys() <= {"decimals"}:
        return args[0].round(*args[1:], **kwargs)
    return None


def _reduced(name: str, args: Any, kwargs: Any) -> Any:
    """The expression of a reduction of one proxy over an axis, and the value of one over all.

    None for anything else.
    """
    if name.startswith("arg") and kwargs.get("keepdims") is False:
        return None
    given = _bound(name, args, kwargs)
    data = given.pop("a", None)
    if not isinstance(data, ArrayLike) or any(True for _ in proxies_in(given)):
        return None
    if given.get("axis") is None:
        known = name in _TOTALS and given.keys() <= {"axis", "dtype", "keepdims", "ddof"}
        if not known:
            return None
        if data._has_room():
            data.data  # noqa: B018, computed once for this and for what is asked of it next
        return express(ops.reduction(name), (data,), **given).data
    if given.keys() <= {"axis", "dtype", "keepdims", "ddof", "q", "method"}:
        return express(ops.reduction(name), (data,), **given)
    return None


def _bound(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name; an unknown one is left as NumPy's own error will name it."""
    names = _parameters(name)
    given = dict(zip(names, args, strict=False))
    given.update(kwargs)
    if len(args) > len(names):
        given["too many"] = args
    return given


@cache
def _parameters(name: str) -> tuple[str, ...]:
    if name in ("concatenate", "stack"):
        return ("arrays", "axis")
    return tuple(inspect.signature(getattr(np, name)).parameters)
