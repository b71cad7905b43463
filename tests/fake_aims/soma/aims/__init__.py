"""A stand-in for the part of pyaims that lazycache touches.

It gives what ``tests/data/pyaims`` records of the real module (6.0.16) and raises on the rest:
`NotRecordedError` where nobody knows, `KilledError` where the real one would end the process. The
tests hold it to the records. Put ``tests/fake_aims`` on the path to have it as ``soma.aims``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _formats, _objects, _volumes, carto
from ._headers import Header, fields_of
from ._limits import KilledError, NotRecordedError, unknown
from ._objects import (
    AffineTransformation3d,
    AimsTimeSurface,
    AimsTimeSurface_2_VOID,
    AimsTimeSurface_3_VOID,
    BucketMap_VOID,
    Graph,
    TimeTexture,
)
from ._volumes import Volume

IS_STAND_IN = True

for _kind in (*_volumes.TYPES.values(), *_objects.TEXTURES.values()):
    globals()[_kind.__name__] = _kind

__all__ = [
    "AffineTransformation3d",
    "AimsTimeSurface",
    "AimsTimeSurface_2_VOID",
    "AimsTimeSurface_3_VOID",
    "BucketMap_VOID",
    "Finder",
    "Graph",
    "KilledError",
    "NotRecordedError",
    "Reader",
    "TimeTexture",
    "Volume",
    "carto",
    "read",
    "write",
]

_PARTIAL = ("ox", "oy", "oz", "ot", "sx", "sy", "sz", "st", "border")


class Finder:
    """Says what a file holds without reading it."""

    def __init__(self) -> None:
        self._format = ""
        self._fields: dict[str, Any] = {}

    def check(self, path: str) -> bool:
        if not isinstance(path, str):
            raise TypeError(f"check(): {type(path).__name__!r} is no str")
        carto.PluginLoader._check()
        found = _formats.recognised(path.partition("?")[0])
        if found is not None:
            self._format, self._fields = found
        return found is not None

    def objectType(self) -> str:  # noqa: N802 - the name in AIMS
        return str(self._fields.get("object_type", "Mesh" if self._format == "MESH" else ""))

    def dataType(self) -> str:  # noqa: N802 - the name in AIMS
        return str(self._fields.get("data_type", ""))

    def format(self) -> str:
        return self._format

    def header(self) -> Header:
        return Header(None, self._fields)


class Reader:
    """Reads whatever a file holds."""

    def __init__(self, typemap: Any = None, allocmode: Any = None, options: Any = None) -> None:
        if typemap is not None:
            raise NotRecordedError("typemap=")
        if isinstance(allocmode, carto.AllocatorStrategy.DataAccess):
            allocmode = carto.AllocatorContext(allocmode)
        if allocmode is not None and not isinstance(allocmode, carto.AllocatorContext):
            raise TypeError("allocmode must be an AllocatorContext or a DataAccess")
        if allocmode is not None and allocmode.access == carto.AllocatorStrategy.NotOwner:
            raise KilledError("allocmode=NotOwner crashed")
        self.allocmode = allocmode
        self.options = options

    def read(
        self, filename: str, border: int = 0, frame: int = -1, dtype: Any = None, object: Any = None
    ) -> Any:
        if object is not None:
            raise NotRecordedError("object=")
        finder = Finder()
        if not finder.check(filename):
            open(filename).close()
            raise OSError(f"Unknown file format or missing meta-file(s): {filename}")
        path, _, query = filename.partition("?")
        partial = dict(pair.split("=") for pair in query.split("&") if pair)
        if self.options:
            partial |= {name: self.options[name] for name in self.options if name in _PARTIAL}
            self.options["keep_allocation"] = False  # a mark that AIMS leaves in what it is given
        unheard = set(partial) - set(_PARTIAL)
        if unheard:
            raise NotRecordedError(f"the options {sorted(unheard)}")
        partial = {name: int(value) for name, value in partial.items()}
        if border:
            partial["border"] = border
        fields = fields_of(finder.header())
        if dtype is not None:
            known = {f"Volume_{code}" for code in _volumes.DTYPES}
            if dtype not in known or finder.objectType() != "Volume":
                raise OSError(f"Unsupported object type: {dtype}")
            possible = fields.get("possible_data_types", [finder.dataType()])
            if dtype.removeprefix("Volume_") not in possible:
                raise unknown(f"{path} is not of {dtype}")
        read = _formats.FORMATS[finder.format()].read
        if finder.objectType() != "Volume":
            if partial or frame >= 0:
                raise NotRecordedError("a part of what is no volume")
            thing = read(path, fields)
            if hasattr(thing, "_fields"):
                thing._fields = fields
            return thing
        code = finder.dataType() if dtype is None else dtype.removeprefix("Volume_")
        return _volume(read(path, fields), code, fields, partial, frame)


def _volume(
    values: np.ndarray, code: str, fields: dict[str, Any], partial: dict[str, int], frame: int
) -> Any:
    if frame >= 0:
        partial |= {"ot": frame, "st": 1}
    index = []
    for axis, size in zip("xyzt", values.shape, strict=False):
        start = partial.get(f"o{axis}", 0)
        count = partial.get(f"s{axis}", size - start)
        if not 0 <= start < start + count <= size:
            raise unknown(f"a part outside of the {size} voxels of {axis}")
        index.append(slice(start, start + count))
    part = values[tuple(index)]
    border = partial.get("border", 0)
    edge = [border, border, border] + [0] * (part.ndim - 3)
    edges = list(zip(part.shape, edge, strict=True))
    whole = _volumes.TYPES[code]([size + 2 * more for size, more in edges])
    inner = tuple(slice(more, more + size) for size, more in edges)
    whole._memory[inner] = _volumes._as(part, _volumes.DTYPES[code])
    volume = _volumes.view_of(whole, inner) if border else whole
    volume._hollow = part.shape != values.shape and not border
    sizes = _volumes._sizes(volume.shape)
    volume._fields = {**fields, **sizes, "voxel_size": fields["voxel_size"], "data_type": code}
    return volume


def read(
    filename: str,
    border: int = 0,
    frame: int = -1,
    dtype: Any = None,
    allocmode: Any = None,
    options: Any = None,
    object: Any = None,
) -> Any:
    """Like ``Reader(allocmode=allocmode, options=options).read(...)``."""
    reader = Reader(allocmode=allocmode, options=options)
    return reader.read(filename, border=border, frame=frame, dtype=dtype, object=object)


def write(obj: Any, filename: str, format: Any = None, options: Any = None) -> None:
    """Writes; an extension that it doesn't know is a success that wrote nothing of use."""
    if not isinstance(filename, str):
        raise TypeError(f"write(): {type(filename).__name__!r} is no str")
    forced = {"force_disk_data_type": True}
    if format is not None or options not in (None, forced):
        raise NotRecordedError("format= or options= of write")
    _formats.write(obj, filename, forced=options == forced)
