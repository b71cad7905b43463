"""Meshes, textures, transformations, buckets and graphs."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ._headers import Header, fields_of
from ._limits import NotRecordedError
from ._memory import bare, dangling, kept_by
from ._volumes import DTYPES


class _Part:
    """A vector in the memory of an object: garbage once that is gone."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def __array__(self, dtype: Any = None, **other: Any) -> np.ndarray:
        if other:
            raise TypeError("only np.asarray works on a vector")
        array = bare(self._memory)
        kept_by(array, self)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return len(self._memory)


class _Headed:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def header(self) -> Header:
        return Header(self, self._fields)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")


class _Surface(_Headed):
    """Time steps of vertices, normals (n, 3) and polygons (p, sides)."""

    sides: int

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self._steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        if other is not None:
            if type(other) is not type(self):
                raise TypeError(f"{type(self).__name__} of a {type(other).__name__}")
            self._fields = fields_of(other.header())
            for step in other._steps:
                self._add(*step)

    def _add(self, vertex: Any, normal: Any, polygon: Any) -> None:
        step = (
            np.array(vertex, "f4").reshape(-1, 3),
            np.array(normal, "f4").reshape(-1, 3),
            np.array(polygon, "u4").reshape(-1, self.sides),
        )
        for memory in step:
            dangling(self, memory)
        self._steps.append(step)

    def vertex(self, time: int = 0) -> _Part:
        return _Part(self._steps[time][0])

    def normal(self, time: int = 0) -> _Part:
        return _Part(self._steps[time][1])

    def polygon(self, time: int = 0) -> _Part:
        return _Part(self._steps[time][2])

    def __len__(self) -> int:
        return len(self._steps)

    def size(self) -> int:
        return len(self)

    def keys(self) -> list[int]:
        return list(range(len(self)))


class AimsTimeSurface_2_VOID(_Surface):  # noqa: N801 - the name in AIMS
    sides = 2


class AimsTimeSurface_3_VOID(_Surface):  # noqa: N801 - the name in AIMS
    sides = 3


_Surface.__module__ = "soma.aims"
SURFACES: dict[int, type[_Surface]] = {2: AimsTimeSurface_2_VOID, 3: AimsTimeSurface_3_VOID}


def AimsTimeSurface(  # noqa: N802 - the name in AIMS
    vertices: Any, normals: Any, polygons: Any
) -> _Surface:
    """A mesh of one time step, or, of a mesh alone, its copy."""
    polygons = np.asarray(polygons)
    mesh = SURFACES[polygons.shape[1]]()
    mesh._add(vertices, np.zeros_like(vertices) if normals is None else normals, polygons)
    return mesh


class _Texture(_Headed):
    """Time steps of one value a vertex."""

    code: str

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self._steps: list[np.ndarray] = []
        if isinstance(other, _Texture):
            if type(other) is not type(self):
                raise TypeError(f"{type(self).__name__} of a {type(other).__name__}")
            self._fields = fields_of(other.header())
            for step in other._steps:
                self._add(step)

    def _add(self, values: Any) -> None:
        memory = np.array(values, DTYPES[self.code])
        dangling(self, memory)
        self._steps.append(memory)

    def __len__(self) -> int:
        return len(self._steps)

    def size(self) -> int:
        return len(self)

    def keys(self) -> list[int]:
        return list(range(len(self)))

    def __getitem__(self, time: int) -> _Part:
        if not 0 <= time < len(self):
            raise NotRecordedError("a time step that a texture doesn't have")
        return _Part(self._steps[time])


TEXTURES = {
    code: type(f"TimeTexture_{code}", (_Texture,), {"code": code, "__module__": "soma.aims"})
    for code in ("FLOAT", "S16", "S32", "U8", "U32", "DOUBLE")
}
globals().update({kind.__name__: kind for kind in TEXTURES.values()})


def TimeTexture(values: Any) -> _Texture:  # noqa: N802 - the name in AIMS
    """A texture of an array (vertices, or vertices by time), or the copy of one."""
    if isinstance(values, _Texture):
        return type(values)(values)
    values = np.asarray(values)
    codes = {DTYPES[code]: code for code in TEXTURES}
    made = TEXTURES[codes[values.dtype]]()
    for step in values.reshape(len(values), -1).T:
        made._add(step)
    return made


class AffineTransformation3d(_Headed):
    """A 4x4 matrix of millimetres to millimetres."""

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self._matrix = np.eye(4)
        if isinstance(other, AffineTransformation3d):
            self._matrix = other._matrix.copy()
            self._fields = fields_of(other.header())
        elif other is not None:
            self._matrix[...] = np.asarray(other)

    def toMatrix(self) -> np.ndarray:  # noqa: N802 - the name in AIMS
        return self._matrix.copy()


class BucketMap_VOID(_Headed):  # noqa: N801 - the name in AIMS
    """Time steps of voxels."""

    __hash__ = object.__hash__

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self._buckets: dict[int, np.ndarray] = {}
        if other is not None:
            raise TypeError("buckets have no copies")

    def __len__(self) -> int:
        return len(self._buckets)

    def size(self) -> int:
        return len(self)

    def keys(self) -> list[int]:
        return list(self._buckets)

    def __getitem__(self, time: int) -> _Bucket:
        return _Bucket(self, self._buckets[time])


class _Bucket:
    def __init__(self, owner: BucketMap_VOID, voxels: np.ndarray) -> None:
        self._owner, self._voxels = weakref.ref(owner), voxels

    def __len__(self) -> int:
        return len(self._voxels) if self._owner() is not None else 3688618971

    def keys(self) -> tuple[tuple[int, ...], ...]:
        if self._owner() is None:
            return ((-9253, -9253, -9253),) * len(self._voxels)
        return tuple(tuple(map(int, voxel)) for voxel in self._voxels)


class Vertex:
    """A vertex of a graph: garbage once the graph is gone."""

    def __init__(self, graph: Graph, attributes: dict[str, Any]) -> None:
        self._graph, self._attributes = weakref.ref(graph), attributes

    def __getitem__(self, name: str) -> Any:
        return self._attributes[name] if self._graph() is not None else "\udcdb"

    def __contains__(self, name: str) -> bool:
        return name in self._attributes and self._graph() is not None

    def keys(self) -> list[str]:
        return list(self._attributes) if self._graph() is not None else []


class Graph:
    """Attributes, and vertices of attributes. Nothing tells its size, nothing copies it."""

    def __init__(self, syntax: str = "") -> None:
        self._syntax = syntax
        self._attributes: dict[str, Any] = {}
        self._vertices: list[dict[str, Any]] = []

    def vertices(self) -> list[Vertex]:
        return [Vertex(self, attributes) for attributes in self._vertices]

    def order(self) -> int:
        return len(self._vertices)

    def getSyntax(self) -> str:  # noqa: N802 - the name in AIMS
        return self._syntax

    def __getitem__(self, name: str) -> Any:
        return self._attributes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._attributes

    def keys(self) -> list[str]:
        return list(self._attributes)

    def __copy__(self) -> Any:
        raise TypeError("a graph can't be copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'Graph' object")
