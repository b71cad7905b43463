"""Volumes of all types and their operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ._headers import Header, fields_of
from ._limits import KilledError, NotRecordedError
from ._memory import bare, kept_by

_COLOURS = ("red", "green", "blue", "alpha")
DTYPES = {
    "U8": np.dtype("u1"),
    "S16": np.dtype("i2"),
    "U16": np.dtype("u2"),
    "S32": np.dtype("i4"),
    "U32": np.dtype("u4"),
    "FLOAT": np.dtype("f4"),
    "DOUBLE": np.dtype("f8"),
    "CFLOAT": np.dtype("c8"),
    "BOOL": np.dtype("?"),
    "RGB": np.dtype([(name, "u1") for name in _COLOURS[:3]]),
    "RGBA": np.dtype([(name, "u1") for name in _COLOURS]),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_RANKS = ("U8", "S16", "U16", "S32", "U32", "FLOAT", "DOUBLE")


def promoted(left: str, right: str) -> str:
    """The type of the sum of two volumes."""
    return max(left, right, key=_RANKS.index)


def code_of(dtype: Any) -> str:
    """The name of a type of voxels: of a code, of the name of a volume type, of a dtype."""
    if isinstance(dtype, str) and dtype.removeprefix("Volume_") in DTYPES:
        return dtype.removeprefix("Volume_")
    try:
        return CODES[np.dtype(dtype)]
    except (TypeError, KeyError):
        raise NotRecordedError(f"a volume of {dtype!r}") from None


class _Reference:
    """What ``refVolume()`` gives: false where a volume isn't a view of a larger one."""

    def __init__(self, volume: VolumeBase | None) -> None:
        self._volume = volume

    def __bool__(self) -> bool:
        return self._volume is not None

    def get(self) -> VolumeBase | None:
        return self._volume


class VolumeBase:
    """Four axes or more, x first, Fortran order; ``code`` is the type of its voxels."""

    code: str
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        self._array: Any = None  # a weak reference to the array that was handed out
        self._whole: VolumeBase | None = None
        self._borrowed = False  # made over an array of NumPy: results go into the same memory
        fields: dict[str, Any] = {}
        [first] = args if len(args) == 1 else [args or (1,)]
        dtype = DTYPES[self.code]
        if isinstance(first, VolumeBase):
            if type(first) is not type(self):
                raise TypeError(f"{type(self).__name__} of a {type(first).__name__}")
            self._memory = np.array(first._memory, order="F")
            fields = fields_of(first.header())
        elif isinstance(first, np.ndarray):
            if first.dtype != dtype:
                raise TypeError(f"{type(self).__name__} of an array of {first.dtype}")
            self._memory = first.reshape(first.shape + (1,) * (4 - first.ndim))
            if not np.may_share_memory(self._memory, first):
                raise NotRecordedError("a volume over an array with gaps")
            self._borrowed = True
        else:
            sizes = tuple(map(operator.index, first if hasattr(first, "__len__") else (first,)))
            self._memory = np.zeros(sizes + (1,) * (4 - len(sizes)), dtype, "F")
        self._fields = {**_sizes(self._memory.shape), **fields}

    # What is in it

    def header(self) -> Header:
        return Header(self, self._fields)

    def copyHeaderFrom(self, header: Any) -> None:  # noqa: N802 - the name in AIMS
        sizes = {name: self._fields[name] for name in _sizes(self.shape) if name != "voxel_size"}
        self._fields = {**fields_of(header), **sizes}

    def refVolume(self) -> _Reference:  # noqa: N802 - the name in AIMS
        return _Reference(self._whole)

    def __array__(self, dtype: Any = None, **other: Any) -> np.ndarray:
        if other:
            raise TypeError("only np.asarray works on a volume")
        array = None if self._array is None else self._array()
        if array is None:
            import weakref

            array = bare(self._memory)
            self._array = weakref.ref(array)
            kept_by(array, self)
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def np(self) -> np.ndarray:
        return np.asarray(self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        np.asarray(self)[index] = value

    def max(self) -> Any:
        return self._memory.max().item()

    def min(self) -> Any:
        return self._memory.min().item()

    def __getstate__(self) -> tuple[Any, ...]:
        return fields_of(self.header()), np.asarray(self)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        type(self).__init__(self, state[1].shape)
        self.copyHeaderFrom(state[0])
        np.asarray(self)[...] = state[1]

    def __eq__(self, other: Any) -> Any:
        return self._compare(other, operator.eq)

    def __ne__(self, other: Any) -> Any:
        return self._compare(other, operator.ne)

    def _compare(self, other: Any, how: Callable[..., Any]) -> Any:
        if not isinstance(other, VolumeBase):
            return NotImplemented
        if type(other) is not type(self) or other.shape != self.shape:
            raise NotRecordedError("comparing volumes of two types or shapes")
        return self._result("BOOL", how(self._memory, other._memory))

    # What the operators share

    def _result(self, code: str, values: np.ndarray) -> VolumeBase:
        result = TYPES[code](values.shape)
        if self._borrowed and code == self.code and values.shape == self.shape:
            self._memory[...] = values
            result._memory, result._borrowed = self._memory, True
        else:
            result._memory[...] = values
        result._fields = fields_of(self.header())
        return result

    def _through_numpy(self, values: Any) -> VolumeBase:
        result = TYPES[code_of(values.dtype)](values)
        result.copyHeaderFrom(self.header())
        return result


def _sizes(shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "volume_dimension": list(shape),
        "sizeX": shape[0],
        "sizeY": shape[1],
        "sizeZ": shape[2],
        "sizeT": shape[3],
        "voxel_size": [1.0] * len(shape),
    }


def _number(value: Any, *, whole: bool) -> Any:
    """``value`` if it is a number that this operator takes, else None."""
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and not whole:
        return float(value)
    return None


def _as(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Converted as C does it: cut off, and around the corner."""
    if dtype.kind == "f" or values.dtype.kind != "f":
        return values.astype(dtype)
    return np.trunc(values).astype(np.int64).astype(dtype)


def _wide(values: Any, code: str) -> np.ndarray:
    dtype = DTYPES[code]
    return np.asarray(values).astype(dtype if dtype.kind == "f" else np.int64)


def _fitted(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Silently cut or filled, where sizes differ."""
    filled = np.zeros(shape, values.dtype)
    common = tuple(slice(0, min(pair)) for pair in zip(shape, values.shape, strict=True))
    filled[common] = values[common]
    return filled


def _divide(left: Any, right: Any) -> np.ndarray:
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype.kind != "f" and right.dtype.kind != "f":
        if not np.all(right):
            raise KilledError("SIGFPE: an integer division by 0")
        return np.trunc(left / right).astype(np.int64)
    return left / right


def _remainder(left: Any, right: Any) -> np.ndarray:
    if not np.all(right):
        raise KilledError("SIGFPE: an integer remainder of a division by 0")
    return np.fmod(left, right)


_SUMS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_BITS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _sum(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """``v + x``, ``x + v``, ``v += x``."""
    compute = _SUMS[name]

    def operand(self: VolumeBase, other: Any, code: str) -> Any:
        whole = name != "mul" and DTYPES[code].kind != "f"
        return _number(other, whole=whole)

    def forward(self: VolumeBase, other: Any) -> Any:
        if isinstance(other, VolumeBase):
            if other.code not in _RANKS:
                raise NotRecordedError(f"{self.code} {name} {other.code}")
            code = promoted(self.code, other.code)
            left, right = _wide(self._memory, code), _wide(other._memory, code)
            values = compute(left, _fitted(right, left.shape))
            return self._result(code, _as(values, DTYPES[code]))
        number = operand(self, other, self.code)
        if number is None:
            return NotImplemented
        values = compute(_wide(self._memory, self.code), number)
        return self._result(self.code, _as(values, DTYPES[self.code]))

    def reflected(self: VolumeBase, other: Any) -> Any:
        number = operand(self, other, self.code)
        if number is None:
            return NotImplemented
        values = compute(number, _wide(self._memory, self.code))
        return self._result(self.code, _as(values, DTYPES[self.code]))

    def in_place(self: VolumeBase, other: Any) -> Any:
        if isinstance(other, VolumeBase):
            if promoted(self.code, other.code) != self.code:
                raise NotRecordedError(f"{self.code} {name}= {other.code}")
            right: Any = _fitted(_wide(other._memory, self.code), self.shape)
        else:
            right = _number(other, whole=False)
            if right is None:
                return NotImplemented
        values = compute(_wide(self._memory, self.code), right)
        self._memory[...] = _as(values, DTYPES[self.code])
        return self

    return forward, reflected, in_place


def _truediv(self: VolumeBase, other: Any) -> Any:
    if isinstance(other, VolumeBase):
        return _div(self, other) if other.code == self.code else NotImplemented
    return _div(self, other)


def _div(self: VolumeBase, other: Any) -> Any:
    if isinstance(other, VolumeBase):
        if other.code not in _RANKS:
            raise NotRecordedError(f"{self.code} / {other.code}")
        code = promoted(self.code, other.code)
        right: Any = _fitted(_wide(other._memory, code), self.shape)
    else:
        code, right = self.code, _number(other, whole=False)
        if right is None:
            return NotImplemented
    with np.errstate(all="ignore"):
        values = _divide(_wide(self._memory, code), right)
    return self._result(code, _as(values, DTYPES[code]))


def _rdiv(self: VolumeBase, other: Any) -> Any:
    number = _number(other, whole=False)
    if number is None:
        return NotImplemented
    with np.errstate(all="ignore"):
        return self._result("DOUBLE", float(number) / self._memory.astype(float))


def _idiv(self: VolumeBase, other: Any) -> Any:
    if isinstance(other, VolumeBase) and other.code != self.code:
        raise NotRecordedError(f"{self.code} /= {other.code}")
    borrowed, self._borrowed = self._borrowed, False
    try:
        result = _div(self, other)
    finally:
        self._borrowed = borrowed
    if result is NotImplemented:
        return result
    self._memory[...] = result._memory
    return self


def _neg(self: VolumeBase) -> VolumeBase:
    return self._result(self.code, _as(-_wide(self._memory, self.code), DTYPES[self.code]))


def _whole(
    name: str, *, volumes: bool = True, zero: bool = False
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``v % x`` and ``v %= x``, and the like: of integers only."""
    compute = _remainder if zero else _BITS[name]

    def values_with(self: VolumeBase, other: Any) -> Any:
        if isinstance(other, VolumeBase):
            if not volumes or DTYPES[other.code].kind not in "iu":
                return None
            if type(other) is not type(self) or other.shape != self.shape:
                raise NotRecordedError(f"{self.code} {name} {other.code}")
            right: Any = other._memory.astype(np.int64)
        else:
            right = _number(other, whole=True)
        if right is None:
            return None
        return _as(compute(self._memory.astype(np.int64), right), DTYPES[self.code])

    def forward(self: VolumeBase, other: Any) -> Any:
        values = values_with(self, other)
        return NotImplemented if values is None else self._result(self.code, values)

    def in_place(self: VolumeBase, other: Any) -> Any:
        if name in ("or", "xor"):
            raise NotRecordedError(f"v {name}= x")
        values = values_with(self, other)
        if values is None:
            # Without this Python would go on to the operator that isn't in place.
            return NotImplemented
        self._memory[...] = values
        return self

    return forward, in_place


def _plain(other: Any) -> Any:
    """Integers of NumPy count as Python's: recorded of ``U8 // np.int16(2)``, which is U8."""
    return int(other) if isinstance(other, np.integer) else other


def _pow(self: VolumeBase, other: Any, modulo: Any = None) -> VolumeBase:
    return self._through_numpy(np.asarray(self).__pow__(_plain(other), modulo))


def _ipow(self: VolumeBase, other: Any) -> VolumeBase:
    array = np.asarray(self)
    array **= other
    return self


def _floordiv(self: VolumeBase, other: Any) -> VolumeBase:
    return self._through_numpy(np.asarray(self).__floordiv__(_plain(other)))


def _ifloordiv(self: VolumeBase, other: Any) -> VolumeBase:
    array = np.asarray(self)
    array //= other
    return self


def _operators(code: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _SUMS:
        found[f"__{name}__"], found[f"__r{name}__"], found[f"__i{name}__"] = _sum(name)
    found |= {"__truediv__": _truediv, "__rtruediv__": lambda self, other: NotImplemented}
    found |= {"__itruediv__": _idiv, "__div__": _div, "__rdiv__": _rdiv, "__idiv__": _idiv}
    found |= {"__pow__": _pow, "__ipow__": _ipow, "__neg__": _neg}
    found |= {"__floordiv__": _floordiv, "__ifloordiv__": _ifloordiv}
    if DTYPES[code].kind in "iu":
        found["__mod__"], found["__imod__"] = _whole("mod", zero=True)
        for name in ("and", "or"):
            found[f"__{name}__"], found[f"__i{name}__"] = _whole(name)
            found[f"__r{name}__"] = _whole(name, volumes=False)[0]
        found["__xor__"], found["__ixor__"] = _whole("xor", volumes=False)
    return found


def _unrecorded(self: VolumeBase, *others: Any) -> Any:
    raise NotRecordedError(f"arithmetic of {type(self).__name__}")


def _type(code: str) -> type[VolumeBase]:
    if code in _RANKS:
        methods = _operators(code)
    else:
        methods = dict.fromkeys(_operators("U8"), _unrecorded)
    # A class body without __eq__ of its own keeps the hash of its base: none.
    made = type(f"Volume_{code}", (VolumeBase,), {"code": code, **methods})
    made.__module__ = "soma.aims"
    return made


TYPES = {code: _type(code) for code in DTYPES}
globals().update({f"Volume_{code}": kind for code, kind in TYPES.items()})


def Volume(*args: Any, dtype: Any = None) -> VolumeBase:  # noqa: N802 - the name in AIMS
    """A copy of a volume, a volume over an array (aliased!), or one of zeros."""
    if len(args) == 1 and dtype is None:
        [first] = args
        if isinstance(first, np.ndarray):
            return TYPES[code_of(first.dtype)](first)
        if isinstance(first, VolumeBase):
            return type(first)(first)
    return TYPES[code_of(dtype or "FLOAT")](*args)


def view_of(whole: VolumeBase, index: tuple[slice, ...]) -> VolumeBase:
    """A volume that is a part of a larger one, which it keeps."""
    view = type(whole)(1)
    view._memory, view._whole = whole._memory[index], whole
    view._fields = {**fields_of(whole.header()), **_sizes(view.shape)}
    view._fields["voxel_size"] = fields_of(whole.header())["voxel_size"]
    return view
