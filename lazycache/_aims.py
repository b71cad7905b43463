"""Objects of AIMS (``soma.aims``), known by the names of their types: AIMS is never imported here.

Their memory is C++'s: what they hold can't be seen from Python, only asked for. An array over the
memory of a volume keeps the volume alive, with nothing in the array to show for it. A part of any
other object (the vertices of a mesh, a time step, the vertex of a graph) does not keep it, and is
garbage once the object is gone: `guarded` makes parts keep it.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import _buffers

_VOXELS = {
    "U8": "u1",
    "S8": "i1",
    "S16": "i2",
    "U16": "u2",
    "S32": "i4",
    "U32": "u4",
    "S64": "i8",
    "U64": "u8",
    "FLOAT": "f4",
    "DOUBLE": "f8",
    "CFLOAT": "c8",
    "CDOUBLE": "c16",
    "BOOL": "?",
}
_COLOURS = {"RGB": 3, "RGBA": 4, "HSV": 3, "VOID": 0}
VOLUME = "Volume_"
_MESH = "AimsTimeSurface_"
_TEXTURE = "TimeTexture_"
_BUCKET = "BucketMap_"
# What was measured of a voxel in a bucket; what an object, or an attribute of a graph, takes.
VOXEL_IN_BUCKET = 47
_OBJECT = 512
_ATTRIBUTE = 64
_FUNCTIONS = (BuiltinFunctionType, FunctionType, MethodType, functools.partial)


def is_kind(kind: type) -> bool:
    """Whether ``kind`` is a type of AIMS."""
    return kind.__module__.startswith("soma.aims")


def kind_of(value: Any) -> str:
    """The name of the type of an object of AIMS; "" for anything else."""
    kind = type(value)
    return kind.__name__ if is_kind(kind) else ""


def dtype_of(code: str) -> np.dtype[Any] | None:
    """The dtype of the voxels of ``"Volume_S16"`` or ``"S16"``; None where NumPy has none."""
    name = _VOXELS.get(code.removeprefix(VOLUME))
    return None if name is None else np.dtype(name)


def as_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """What `numpy.dtype` takes, or the name of a type of volumes."""
    if isinstance(dtype, str) and dtype.startswith(VOLUME):
        found = dtype_of(dtype)
        if found is None:
            raise TypeError(f"dtype={dtype!r}: volumes can't be converted to this; leave it out")
        return found
    return np.dtype(dtype)


def code_of(dtype: np.dtype[Any]) -> str | None:
    """The name that AIMS gives to a dtype; None where it has none."""
    native = dtype.newbyteorder("=")
    return next((code for code, name in _VOXELS.items() if np.dtype(name) == native), None)


def itemsize_of(code: str) -> int | None:
    """The bytes of one voxel, or of one value of a texture; None for a type not known here."""
    dtype = dtype_of(code)
    return _COLOURS.get(code.removeprefix(VOLUME)) if dtype is None else dtype.itemsize


def size_of(value: Any) -> int:
    """The bytes that an object of AIMS keeps in memory."""
    kind = kind_of(value)
    if kind.startswith(VOLUME):
        reference = value.refVolume()
        whole = reference.get() if reference else value
        return int(np.asarray(whole).nbytes)
    if kind.startswith(_MESH):
        sides = int(kind.split("_")[1])
        return sum(
            12 * (len(value.vertex(time)) + len(value.normal(time)))
            + 4 * sides * len(value.polygon(time))
            for time in value.keys()  # noqa: SIM118 - iterating over one gives its steps
        )
    if kind.startswith(_TEXTURE):
        item = itemsize_of(kind.removeprefix(_TEXTURE)) or 8
        return item * sum(len(value[time]) for time in value.keys())  # noqa: SIM118
    if kind.startswith(_BUCKET):
        count = sum(len(value[time]) for time in value.keys())  # noqa: SIM118
        return _OBJECT + VOXEL_IN_BUCKET * count
    if kind == "Graph":
        return _size_of_graph(value)
    return _OBJECT


def _size_of_graph(graph: Any) -> int:
    parts = [graph, *graph.vertices()]
    if hasattr(graph, "edges"):
        parts += graph.edges()
    return sum(_OBJECT + _size_of_attributes(part) for part in parts)


def _size_of_attributes(part: Any) -> int:
    total = 0
    for name in part.keys():  # noqa: SIM118 - iterating over a graph gives its vertices
        value = part[name]
        inner = value.get() if kind_of(value).startswith("rc_ptr_") else value
        own = size_of(inner) if kind_of(inner) and inner is not None else sys.getsizeof(value)
        total += _ATTRIBUTE + len(name) + own
    return total


def contents_of(value: Any) -> list[np.ndarray[Any, Any]] | None:
    """Copies of all that an object of AIMS holds, as arrays; None for other types."""
    kind = kind_of(value)
    parts: list[Any]
    if kind.startswith(VOLUME):
        parts = [value]
    elif kind.startswith(_MESH):
        parts = [
            part(time)
            for time in value.keys()  # noqa: SIM118
            for part in (value.vertex, value.normal, value.polygon)
        ]
    elif kind.startswith(_TEXTURE):
        parts = [value[time] for time in value.keys()]  # noqa: SIM118
    elif kind.startswith(_BUCKET):
        parts = [
            sorted(tuple(map(int, voxel)) for voxel in value[time].keys())  # noqa: SIM118
            for time in value.keys()  # noqa: SIM118
        ]
    elif kind == "AffineTransformation3d":
        parts = [value.toMatrix()]
    elif kind == "Graph":
        parts = [sorted(part.keys()) for part in (value, *value.vertices())]
    else:
        return None
    return [np.asarray(part).copy() for part in parts]


def readonly_view(array: np.ndarray[Any, Any], owner: Any) -> np.ndarray[Any, Any]:
    """``array``, over memory of ``owner``, as one that can't be written to and keeps it alive."""
    return np.asarray(_buffers.Lent(array, owner))


def attribute(owner: Any, name: str) -> Any:
    """An attribute or a method of an object of AIMS whose results keep the object alive."""
    if name == "header":
        return functools.partial(header_of, owner)
    return guarded(getattr(owner, name), owner)


def part(whole: Any, value: Any) -> Any:
    """``value``, found in ``whole``: `guarded` where that is an object of AIMS."""
    return guarded(value, whole) if kind_of(whole) else value


def guarded(value: Any, owner: Any) -> Any:
    """A part of ``owner`` that keeps it alive; arrays over its memory are read-only."""
    if isinstance(value, np.ndarray):
        return readonly_view(value, owner)
    if isinstance(value, list | tuple):
        return type(value)(guarded(item, owner) for item in value)
    if isinstance(value, _FUNCTIONS):
        return _method(value, owner)
    if is_kind(type(value)) and value is not owner and not kind_of(value).startswith(VOLUME):
        value._lazycache_owner = owner
    return value


def _method(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return guarded(function(*args, **kwargs), owner)

    return call


def header_of(thing: Any) -> dict[str, Any]:
    """A copy of all that the header of an object, or of a finder, says; it depends on nothing."""
    header = thing.header()
    try:
        found = ast.literal_eval(repr(header))
    except (SyntaxError, ValueError):
        found = None
    if isinstance(found, dict):
        return found
    return {name: _plain(header[name]) for name in header.keys()}  # noqa: SIM118 - no dict


def _plain(value: Any) -> Any:
    if isinstance(value, str | bytes | int | float | complex | None):
        return value
    try:
        return ast.literal_eval(repr(value))
    except (SyntaxError, ValueError):
        return repr(value)
