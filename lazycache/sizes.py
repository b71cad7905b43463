"""Sizes: as text, and of what Python objects hold.

`parse_size` reads what people write and refuses what different people read differently ("4G",
"0.8"); shares of the memory ("50%", "auto") are budgets, see `lazycache.memory`.

`nbytes_of` tells how many bytes stay in memory as long as a value does. For arrays that is the
memory of the *owner*, the last base: a view of one plane keeps the whole volume. Everything
else is measured by walking it, each object and each owner once. Types that keep memory where
Python can't see it (an extension's own allocations) are told by `register_size`; those of AIMS
are known.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from operator import index, length_hint
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _aims
from ._buffers import Lent
from .errors import SizeError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([A-Za-z]*)")
_WRITE = 'write bytes as an int, or a number with a unit, such as "4GiB", "512 MiB" or "8GB"'


def parse_size(value: int | str) -> int:
    """The number of bytes that ``value`` says: an int, or text such as "4GiB", "512 MiB", "8GB".

    Units are B, kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024), in
    upper or lower case; text of digits alone is bytes. A fraction of a byte is dropped. Anything
    else, negative sizes among it, is a `SizeError` that quotes the value.
    """
    if isinstance(value, str):
        return _parse_text(value)
    try:
        number = index(value)
    except TypeError:
        raise _refuse(value, _WRITE) from None
    if isinstance(value, bool) or number < 0:
        raise _refuse(value, _WRITE)
    return number


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _refuse(text, _WRITE)
    number, unit = match.groups()
    if not unit and number.isdigit():
        return int(number)
    if unit.lower() in ("k", "m", "g", "t"):
        letter = unit.upper()
        raise _refuse(
            text,
            f'write "{number}{letter}iB" (powers of 1024) or "{number}{letter}B" (powers of 1000)',
        )
    # "Gb" is gigabits to those who write it with care, "gb" a lazy gigabyte.
    bits = unit == "b" or (unit[:1].isupper() and unit.endswith("b"))
    if bits or unit.lower() not in _UNITS:
        raise _refuse(text, _WRITE)
    return int(Fraction(number) * _UNITS[unit.lower()])


def _refuse(value: object, write: str) -> SizeError:
    return SizeError(f"{value!r} is not a size: {write}")


def format_size(nbytes: int) -> str:
    """``nbytes`` for people, three digits and a power of 1024: "1.5 GiB", "512 MiB", "17 B".

    `parse_size` reads it back, to within half a percent. Differences may be negative.
    """
    sign, size = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    if size < 1024:
        return f"{sign}{size} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    for power, unit in enumerate(units, start=1):
        number = size / 1024**power
        if number < 1023.5 or unit == units[-1]:
            break
    digits = 2 if number < 10 else 1 if number < 100 else 0
    text = f"{number:.{digits}f}"
    return f"{sign}{text.rstrip('0').rstrip('.') if digits else text} {unit}"


Sizer = Callable[[Any], int]

_sizers: dict[type, Sizer] = {}

# An object of more parts than this is measured so far, and the rest guessed from it.
_VISITS = 200_000

# Shared by everybody, kept by nobody's value.
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, CodeType)

# A mapping may be this much longer than the memoryview that arrays are made over: address space
# for the alignment of its start, which nobody touches.
_SPARE = 2 << 20


def register_size(kind: type, function: Sizer) -> None:
    """Make `nbytes_of` ask ``function(value)`` for values of ``kind`` and of its subclasses.

    The function returns the bytes (an int, 0 or more) that the value keeps in memory, all its
    parts included. The nearest class of the value's MRO decides; registering again replaces.
    """
    if not isinstance(kind, type):
        raise TypeError(f"register_size needs a class, not {kind!r}")
    if not callable(function):
        raise TypeError(f"register_size needs a function from a value to bytes, not {function!r}")
    _sizers[kind] = function


def _registered(kind: type) -> Sizer | None:
    found = next((_sizers[base] for base in kind.__mro__ if base in _sizers), None)
    return _aims.size_of if found is None and _aims.is_kind(kind) else found


def nbytes_of(value: Any) -> int:
    """The bytes that stay in memory as long as ``value`` does.

    Arrays, memoryviews: the memory of their owner (for a memmap, its mapping), plus what an
    object array refers to and the mask of a masked array. Else what was registered for the
    type, else the object with all that it refers to: attributes, slots, items; cycles are safe,
    and what occurs twice counts once. After 200,000 parts the small objects of each container
    still to come are taken to be as those before them, so that the time is bounded.
    """
    if type(value) is np.ndarray and value.base is None and not value.dtype.hasobject:
        return value.nbytes
    meter = _Meter()
    meter.walk(value)
    return meter.total


def memory_in(value: Any) -> list[tuple[Any, int]]:
    """The owners of the arrays inside a value that is no array, with the bytes of each.

    Somebody may hold one of them without the value. Only those whose death can be told.
    """
    if isinstance(value, np.ndarray | memoryview | bytes | bytearray):
        return []
    meter = _Meter()
    meter.walk(value)
    owners = ((meter._seen[ident], nbytes) for ident, nbytes in meter._charged.items())
    return [(owner, nbytes) for owner, nbytes in owners if type(owner).__weakrefoffset__]


class _Meter:
    """The sum over everything reached so far; every object and every owner of memory once."""

    def __init__(self) -> None:
        self.total = 0
        self._small = 0  # the part of the total that is no array or other large memory
        # The values are references: the id of a temporary must not be given to another object.
        self._seen: dict[int, object] = {}
        self._charged: dict[int, int] = {}

    def walk(self, root: Any) -> None:
        stack = [_Items(iter((root,)), 0)]
        while stack:
            if len(self._seen) >= _VISITS:
                self.total += sum(items.guess_rest(self._small) for items in stack)
                return
            for value in stack[-1].iterator:
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    stack.extend(_Items(items, self._small) for items in self._visit(value))
                    break
            else:
                stack.pop()

    def _visit(self, value: Any) -> Iterator[Iterator[Any]]:
        """Count ``value`` itself; what comes back are the iterators over its parts."""
        if (sizer := _registered(type(value))) is not None:
            self.total += _answer(sizer, value)
        elif isinstance(value, np.ndarray | memoryview):
            yield from self._visit_view(value)
        elif isinstance(value, mmap.mmap):
            self._charge(value, 0 if value.closed else len(value))
        elif isinstance(value, bytes | bytearray):
            self._charge(value, sys.getsizeof(value))
        elif isinstance(value, MethodType):
            yield iter((value.__self__,))
        elif not isinstance(value, _SHARED):
            nbytes = sys.getsizeof(value, 0)
            self.total += nbytes
            self._small += nbytes
            yield from _parts(value)

    def _visit_view(self, value: NDArray[Any] | memoryview) -> Iterator[Iterator[Any]]:
        last: Any = value
        owner: Any = value
        # The same walk as _buffers.owner_of, which also needs the last view before the owner.
        while isinstance(owner, np.ndarray | memoryview):
            base = owner.base if isinstance(owner, np.ndarray) else owner.obj
            if base is None:
                break
            last, owner = owner, base
        if isinstance(owner, Lent):
            owner = owner.owner
        if isinstance(owner, np.ndarray):
            self._charge(owner, owner.nbytes)
            last = owner
        elif isinstance(owner, mmap.mmap):
            touched = last.nbytes if isinstance(last, memoryview) else 0
            mapped = len(owner)
            self._charge(owner, touched if mapped - touched <= _SPARE else mapped)
        elif isinstance(owner, bytes | bytearray):
            self._charge(owner, len(owner))
        elif id(owner) not in self._seen:
            before = self.total
            self.walk(owner)
            # Memory that an extension owns shows in nothing but the span of the arrays over it.
            self._charge(owner, max(0, _span(last) - (self.total - before)))
        if isinstance(last, np.ndarray) and last.dtype.hasobject:
            yield from _elements(last.view(np.ndarray))
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            yield iter(tuple(value.__dict__.values()))

    def _charge(self, owner: object, nbytes: int) -> None:
        charged = self._charged.get(id(owner), 0)
        if nbytes > charged:
            self._seen[id(owner)] = owner
            self._charged[id(owner)] = nbytes
            self.total += nbytes - charged


class _Items:
    """The parts of one object, on their way to be counted."""

    __slots__ = ("_length", "_small_before", "iterator")

    def __init__(self, iterator: Iterator[Any], small: int) -> None:
        self.iterator = iterator
        self._length = length_hint(iterator)
        self._small_before = small

    def guess_rest(self, small: int) -> int:
        """The small memory of the items still to come, if they are as those before them."""
        left = length_hint(self.iterator)
        taken = self._length - left
        return left * (small - self._small_before) // taken if taken else 0


def _answer(sizer: Sizer, value: Any) -> int:
    answer = sizer(value)
    try:
        nbytes = index(answer)
    except TypeError:
        nbytes = -1
    if nbytes < 0:
        raise SizeError(
            f"the function registered with register_size for {type(value).__qualname__} returned "
            f"{answer!r}: it must return a number of bytes, an int of 0 or more"
        )
    return nbytes


def _span(view: NDArray[Any] | memoryview) -> int:
    if isinstance(view, memoryview):
        return view.nbytes
    if not view.size:
        return 0
    low, high = np.lib.array_utils.byte_bounds(view)
    return high - low


def _elements(array: NDArray[Any]) -> Iterator[Iterator[Any]]:
    """Iterators over the objects in an array, those in fields of a structured dtype among them."""
    if array.dtype.names is None:
        yield iter(array.ravel(order="K").tolist())
    else:
        for name in array.dtype.names:
            if array[name].dtype.hasobject:
                yield from _elements(array[name])


def _parts(value: Any) -> Iterator[Iterator[Any]]:
    """Iterators over what an object refers to, by means that run none of its own code.

    Sets and dicts are copied first: another thread may change what a value refers to.
    """
    if isinstance(value, dict):
        yield iter(tuple(dict.keys(value)))
        yield iter(tuple(dict.values(value)))
    elif isinstance(value, list):
        yield list.__iter__(value)
    elif isinstance(value, tuple):
        yield tuple.__iter__(value)
    elif isinstance(value, set):
        yield iter(tuple(set.__iter__(value)))
    elif isinstance(value, frozenset):
        yield frozenset.__iter__(value)
    elif isinstance(value, deque):
        yield iter(tuple(deque.__iter__(value)))
    with suppress(AttributeError):
        yield iter((object.__getattribute__(value, "__dict__"),))
    for kind in type(value).__mro__:
        if "__slots__" in kind.__dict__:
            yield iter(tuple(_slot_values(kind, value)))


def _slot_values(kind: type, value: Any) -> Iterator[Any]:
    slots = kind.__dict__["__slots__"]
    for slot in (slots,) if isinstance(slots, str) else slots:
        private = slot.startswith("__") and not slot.endswith("__")
        name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
        if slot not in ("__dict__", "__weakref__"):
            with suppress(AttributeError, KeyError):  # never set; deleted from the class
                yield kind.__dict__[name].__get__(value, kind)
